"""Parameters, bytes and FLOPs of a model, part by part, from its config alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from qkv.config import Config
from qkv.errors import ConfigError
from qkv.masks import Causal, Full, Mask, Place
from qkv.models.model import ModelConfig
from qkv.models.stack import Repeat, runs
from qkv.models.transformer import TransformerConfig
from qkv.nn.blocks import BlockConfig, sublayers_of
from qkv.nn.embedders import Embedder
from qkv.nn.heads import HeadConfig

_SAMPLED_QUERIES = 512


@final
@dataclass(frozen=True)
class PartCost:
    """One part of a model, all its copies together.

    Attributes:
        config: What it is built from.
        name: What it is called in the model.
        copies: How often it is applied in one pass.
        parameters: Numbers that are trained; shared ones count once, where they are kept.
        flops: Floating-point operations of its matrix products in the forward pass of one token.
        cached: Numbers that a cache keeps of one token.
        state: Numbers that a cache keeps of a text, however long it is.
        idle: Parameters that do not act on a token: those of experts that are not chosen for it.
        parts: The same for what it is made of.
        open: What sets a size that the config leaves open, and is missing in the counts; empty if nothing does.
    """

    config: Config
    name: str
    copies: int
    parameters: int
    flops: float = 0.0
    cached: int = 0
    state: int = 0
    idle: int = 0
    parts: "tuple[PartCost, ...]" = ()
    open: str = ""


@final
@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parts: From the input up.
        context: Tokens of the text that `flops_per_token` is for.
        dtype: Type of the weights and of the cache.
    """

    parts: tuple[PartCost, ...]
    context: int
    dtype: torch.dtype

    @property
    def parameters(self) -> int:
        """Numbers that are trained; shared ones count once."""
        return self._sum("parameters")

    @property
    def active_parameters(self) -> int:
        """Parameters that act on one token: fewer where tokens are routed to experts."""
        return self.parameters - self._sum("idle")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters."""
        return self.parameters * self.dtype.itemsize

    @property
    def flops_per_token(self) -> float:
        """Of the matrix products in the forward pass, as the mean over a text of `context` tokens."""
        return self._sum("flops")

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward pass: the gradients of the inputs and of the weights cost a forward pass each."""
        return 3 * self.flops_per_token

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values."""
        return self._sum("cached") * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of the states that recurrent and convolutional layers keep of a text, however long it is."""
        return self._sum("state") * self.dtype.itemsize

    def _sum(self, name: str) -> Any:
        return sum(getattr(part, name) for part in self.parts)


def summary(config: TransformerConfig, *, context: int | None = None, dtype: torch.dtype = torch.float32) -> Cost:
    """What the model of this config costs. No memory is taken: it is built on the meta device, each block once.

    FLOPs are two per weight of a matrix product and token, and for attention what the mask asks for: under `Causal` a
    token sees (context + 1) / 2 keys on average. (Other counts take `context` keys for every mask.) Norms, activations,
    softmax and the lookup of embeddings are left out: they are below a hundredth.

    Args:
        config: The model. Its vocabulary may be open: see `PartCost.open`.
        context: Tokens of the text; None: the context of the config, or 1024.
        dtype: Type of the weights and of the cache.

    Raises:
        ConfigError: The config cannot be built, or `context` is less than 1.
    """
    context = config.limit or 1024 if context is None else context
    if context < 1:
        raise ConfigError(f"context={context} must be at least 1")
    with torch.device("meta"):
        parts = [_embedder(config)]
        for run in runs(config.blocks):
            parts += [_block(block, config.d_model, run, context) for block in run.blocks]
        if config.final_norm is not None:
            norm = config.final_norm
            parts.append(PartCost(norm, "final_norm", 1, _count(norm.build(config.d_model).parameters())))
        if config.head is not None:
            parts.append(_head(config.head, config))
    return Cost(tuple(parts), context, dtype)


def parameters(config: ModelConfig) -> int:
    """How many a model has whose sizes are all set; those of a stack are counted without building it."""
    if config.single_stack is not None:
        return summary(config.single_stack).parameters
    with torch.device("meta"):
        return _count(config.build().parameters())


def training_flops_per_token(config: ModelConfig, context: int, *, frozen: bool = False) -> float:
    """What `Cost` says about training on texts of `context` tokens.

    Of a model that is no single stack it is an estimate: every weight but those of the embeddings once for each token
    of the target, as if the source were as long, and no scores.

    Where the weights are `frozen`, their gradients are left out, and so are the few operations of adapters.
    """
    if config.single_stack is None:
        with torch.device("meta"):
            model = config.build()
        tables = {id(part.table) for part in model.modules() if isinstance(part, Embedder)}
        tied = model.head is not None and not model.head.matrix_flops()  # it multiplies with one of the tables
        weights = [p for p in model.parameters() if p.dim() > 1 and (tied or id(p) not in tables)]
        return 6.0 * _count(weights)
    cost = summary(config.single_stack, context=context)
    return 2 * cost.flops_per_token if frozen else cost.training_flops_per_token


def mean_keys(mask: Mask, length: int) -> float:
    """How many keys a token of a text of `length` tokens sees, on average.

    Exact for `Full` and `Causal`, and for texts of up to 512 tokens; else the mean over 512 tokens, evenly spread.
    """
    if isinstance(mask, Full):
        return length
    if isinstance(mask, Causal):
        return (length + 1) / 2
    device = torch.device("cpu")  # also within `torch.device("meta")`
    keys = torch.arange(length, device=device)
    queries = torch.linspace(0, length - 1, min(length, _SAMPLED_QUERIES), device=device).round().long()
    seen = sum(int(mask.allow(Place(q, q), Place(keys, keys)).sum()) for q in queries)
    return seen / len(queries)


def _embedder(config: TransformerConfig) -> PartCost:
    embed, width = config.embed, config.d_model
    if embed.left_open:
        table = embed.position.build(width).parameters() if embed.position else ()
        return PartCost(embed, "embed", 1, _count(table), open=embed.left_open)
    built = embed.build(width)
    return PartCost(embed, "embed", 1, _count(built.parameters()), float(built.flops()))


def _block(config: BlockConfig, width: int, repeat: Repeat, context: int) -> PartCost:
    block, n = config.build(width), repeat.n
    stored = min(n, 1) if repeat.shared else n
    parts = []
    for name, part, layer in zip(block.sublayers, config.sublayers, sublayers_of(block), strict=True):
        mask = layer.attends()
        keys = 0.0 if mask is None else mean_keys(mask, context)
        # linear in the keys, whose mean is no integer
        flops = layer.flops(0) + (layer.flops(1) - layer.flops(0)) * keys
        size = _count(layer.parameters())
        idle = (size - layer.active_parameters()) * stored
        kept = layer.cached() * n, layer.state_size(width) * n
        parts.append(PartCost(part, name, n, size * stored, flops * n, *kept, idle))
    whole = _count(block.parameters()) * stored
    norms = PartCost(config.norm, "norms", n, whole - sum(part.parameters for part in parts))
    sums = (sum(getattr(part, name) for part in parts) for name in ("flops", "cached", "state", "idle"))
    return PartCost(config, "blocks", n, whole, *sums, parts=(norms, *parts))


def _head(head: HeadConfig, config: TransformerConfig) -> PartCost:
    embed = config.embed
    if note := head.left_open(embed):
        return PartCost(head, "head", 1, 0, open=note)
    built = head.build(config.d_model, embed)
    table = None if embed.left_open else embed.build(config.d_model).table
    return PartCost(head, "head", 1, _count(built.parameters()), float(built.flops(table)))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
