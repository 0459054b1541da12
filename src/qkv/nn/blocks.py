"""Blocks: where the norms stand around the sublayers. One class and one equation each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from typing import ClassVar, final

import torch
from torch import nn

from qkv.config import Config, Configured, Share, config
from qkv.context import Context, Memory
from qkv.errors import ConfigError
from qkv.nn.norms import Norm, NormConfig
from qkv.nn.sublayer import Aux, Sublayer, SublayerConfig, merge
from qkv.shapes import Float, Tensor
from qkv.tokens import Layout, Tokens, placed


@config
class BlockConfig(Config, ABC):
    """Base of the configs of blocks.

    Attributes:
        norm: The norm at every place where the block has one.
        sublayers: The parts, in the order in which they act (usually attention, then FFN).
        layer_scale: Where trained factors of each sublayer's update begin, of which each channel has one (LayerScale:
            Touvron et al. 2021, Going deeper with image transformers, section 2.1); None: there are none.
        drop_path: Probability that a document goes past a sublayer in training; the updates of the others are divided
            by one minus it (stochastic depth: Huang et al. 2016, where it rises in a line from 0 with the layer).
    """

    formula: ClassVar[str] = ""
    """Its equation in text, in terms of x, norm and a sublayer f; `qkv show` draws the norms from it."""

    norm: NormConfig
    sublayers: tuple[SublayerConfig, ...]
    layer_scale: float | None = None
    drop_path: Share = 0.0

    def __post_init__(self) -> None:
        if not self.sublayers:
            raise ConfigError(f"{type(self).__name__} has no sublayers; give it at least one")

    def build(self, d_model: int) -> "Block":
        """The block for a stream of width `d_model`."""
        return self._build(d_model)


Function = Callable[[Tensor], Tensor]
"""A sublayer or a norm, as an equation sees it: the stream, or something of its shape, in and out."""


class Block(Configured, nn.Module, ABC):
    """Base of the blocks: holds the sublayers by name and collects what they report. A block states its equation."""

    def __init__(self, config: BlockConfig, d_model: int) -> None:
        super().__init__()
        self.sublayers = nn.ModuleDict(
            {name: part.build(d_model) for name, part in zip(_names(config.sublayers), config.sublayers, strict=True)}
        )

        factors = {} if config.layer_scale is None else dict.fromkeys(self.sublayers, config.layer_scale)
        self.factors = nn.ParameterDict({name: torch.full((d_model,), start) for name, start in factors.items()})
        self.drop_path = config.drop_path

    def norm_each(self, norm: NormConfig, d_model: int) -> nn.ModuleDict:
        """A norm for each sublayer, under its name."""
        return nn.ModuleDict({name: norm.build(d_model) for name in self.sublayers})

    @abstractmethod
    def equation(self, x: Float[Tensor, "B T D"], sublayers: Sequence[Function]) -> Float[Tensor, "B T D"]:
        """The stream after this block.

        Args:
            x: The stream before it.
            sublayers: Each gives its update, in the order in which they act.
        """

    @final
    def forward(
        self,
        x: Float[Tensor, "B T D"],
        ctx: Context | Tokens | None = None,
        *,
        memory: Memory | Float[Tensor, "B S M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        """The stream after this block, and what its sublayers report. Arguments as in `Sublayer.forward`."""
        reports: list[Aux] = []

        def function(name: str, sublayer: nn.Module) -> Function:
            def update(h: Tensor) -> Tensor:
                out, aux = sublayer(h, ctx, memory=memory)
                if aux is not None:
                    reports.append(aux.under(name))
                out = out * self.factors[name] if name in self.factors else out
                return _drop(out, ctx, self.drop_path) if self.drop_path and self.training else out

            return update

        x = self.equation(x, [function(name, sublayer) for name, sublayer in self.sublayers.items()])
        return x, reduce(merge, reports, None)


def _drop(update: Tensor, ctx: Context | Tokens | None, p: float) -> Tensor:
    """The updates of documents, of which each is dropped with probability `p`."""
    tokens = placed(update, ctx.tokens if isinstance(ctx, Context) else ctx)
    n = 1 if tokens.layout is Layout.FULL else tokens.shape[1]  # documents of a row, at most
    kept = torch.rand(len(update), n + 1, device=update.device) >= p
    return update * (kept.gather(1, tokens.segment) / (1 - p)).to(update.dtype)[..., None]


def _names(sublayers: Sequence[SublayerConfig]) -> list[str]:
    """A name for each: its own, with a number from the second of that name on."""
    for part in sublayers:
        if not getattr(type(part), "name", ""):
            kind = type(part).__name__
            raise TypeError(f"{kind} has no name for its parameters; write name: ClassVar[str] = ... in the class")
    names = [part.name for part in sublayers]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}_{n + 1}" if n else name for name, n in zip(names, before, strict=True)]


def sublayers_of(block: Block) -> list[Sublayer]:
    """The sublayers of a block, in the order in which they act."""
    return [part for part in block.sublayers.values() if isinstance(part, Sublayer)]


class Sequential(Block, ABC):
    """Base of the blocks whose sublayers act one after the other, each with a norm of its own."""

    def __init__(self, config: BlockConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.norms = self.norm_each(config.norm, d_model)

    @abstractmethod
    def step(self, x: Tensor, f: Function, norm: Function) -> Tensor:
        """The stream after one sublayer."""

    def equation(self, x: Float[Tensor, "B T D"], sublayers: Sequence[Function]) -> Float[Tensor, "B T D"]:
        for f, norm in zip(sublayers, self.norms.values(), strict=True):
            x = self.step(x, f, norm)
        return x


@final
@config
class PreNormConfig(BlockConfig):
    """x = x + f(norm(x)), for each sublayer f (GPT-2, Llama; analysed in Xiong et al. 2020)."""

    formula: ClassVar[str] = "x = x + f(norm(x))"


@final
class PreNorm(Sequential, config=PreNormConfig):
    """A norm before each sublayer."""

    def step(self, x: Tensor, f: Function, norm: Function) -> Tensor:
        return x + f(norm(x))


@final
@config
class PostNormConfig(BlockConfig):
    """x = norm(x + f(x)), for each sublayer f (Vaswani et al. 2017, section 3.1; BERT)."""

    formula: ClassVar[str] = "x = norm(x + f(x))"


@final
class PostNorm(Sequential, config=PostNormConfig):
    """A norm of each sum."""

    def step(self, x: Tensor, f: Function, norm: Function) -> Tensor:
        return norm(x + f(x))


@final
@config
class OutputNormConfig(BlockConfig):
    """x = x + norm(f(x)), for each sublayer f (OLMo 2, section 3.2; Swin v2)."""

    formula: ClassVar[str] = "x = x + norm(f(x))"


@final
class OutputNorm(Sequential, config=OutputNormConfig):
    """A norm of each update."""

    def step(self, x: Tensor, f: Function, norm: Function) -> Tensor:
        return x + norm(f(x))


@final
@config
class SandwichConfig(BlockConfig):
    """x = x + norm₂(f(norm₁(x))), for each sublayer f (Ding et al. 2021, CogView, section 2.4; Gemma 2)."""

    formula: ClassVar[str] = "x = x + norm₂(f(norm₁(x)))"


@final
class Sandwich(Block, config=SandwichConfig):
    """A norm before each sublayer, and one of its update."""

    def __init__(self, config: SandwichConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.norms = self.norm_each(config.norm, d_model)
        self.out_norms = self.norm_each(config.norm, d_model)

    def equation(self, x: Float[Tensor, "B T D"], sublayers: Sequence[Function]) -> Float[Tensor, "B T D"]:
        for f, norm, out_norm in zip(sublayers, self.norms.values(), self.out_norms.values(), strict=True):
            x = x + out_norm(f(norm(x)))
        return x


@final
@config
class ParallelConfig(BlockConfig):
    """x = x + Σ f(norm(x)) over all sublayers f, which share one norm (GPT-J; Chowdhery et al. 2022, section 2)."""

    formula: ClassVar[str] = "x = x + Σ f(norm(x))"


@final
class Parallel(Block, config=ParallelConfig):
    """All sublayers read the stream through one norm."""

    def __init__(self, config: ParallelConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.norm: Norm = config.norm.build(d_model)

    def equation(self, x: Float[Tensor, "B T D"], sublayers: Sequence[Function]) -> Float[Tensor, "B T D"]:
        h = self.norm(x)
        return sum([f(h) for f in sublayers], start=x)


@final
@config
class ParallelPreNormConfig(BlockConfig):
    """x = x + Σ f(norm_f(x)) over all sublayers f, each with a norm of its own (Black et al. 2022, GPT-NeoX)."""

    formula: ClassVar[str] = "x = x + Σ f(norm_f(x))"


@final
class ParallelPreNorm(Block, config=ParallelPreNormConfig):
    """All sublayers read the stream, each through its own norm."""

    def __init__(self, config: ParallelPreNormConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.norms = self.norm_each(config.norm, d_model)

    def equation(self, x: Float[Tensor, "B T D"], sublayers: Sequence[Function]) -> Float[Tensor, "B T D"]:
        return sum([f(norm(x)) for f, norm in zip(sublayers, self.norms.values(), strict=True)], start=x)
