"""What every model has, whatever it reads and writes: a config, blocks, a head and a loss."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, cast, final

import torch
import torch.distributed as dist
from torch import nn

from qkv.config import Config, Configured, config
from qkv.errors import ConfigError
from qkv.nn.quantised import Table
from qkv.nn.sublayer import Aux, Sublayer
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens, placed


@config
class ModelConfig(Config, ABC):
    """Base of the configs of models."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Layers, or applications of blocks, counted without building one."""

    @property
    @abstractmethod
    def longest(self) -> int | None:
        """Tokens of the longest text it can take; None: any."""

    @property
    def limit(self) -> int | None:
        """Tokens of the longest text that it is made for and can take: the context of a text; None: not known."""
        return self.longest

    @property
    def single_stack(self) -> Any:
        """The config itself where the model is one stack of blocks, which can be drawn block by block; else None."""
        return None

    @property
    def vocabularies(self) -> tuple[int | None, ...]:
        """Tokens of each vocabulary, a source's before a target's; None: open."""
        return ()

    @property
    def sentence(self) -> str:
        """What kind of model it is, for people."""
        return self.tag()

    def with_dropout(self, p: float) -> "ModelConfig":
        """The same with the probability of every dropout set."""
        return _with_dropout(self, p)

    @abstractmethod
    def closed(self) -> "ModelConfig":
        """The same with a size for each that only data would set, so that it can be built without any."""

    def build(self) -> "Model":
        """The model, with fresh weights (none on the meta device)."""
        return self._build()


def _with_dropout(part: Any, p: float) -> Any:
    if isinstance(part, tuple):
        return tuple(_with_dropout(item, p) for item in part)
    if not isinstance(part, Config):
        return part
    values = {f.name: getattr(part, f.name) for f in fields(cast("Any", part))}
    return type(part)(**{name: p if name == "dropout" else _with_dropout(x, p) for name, x in values.items()})


class Model(Configured, nn.Module, ABC):
    """Base of the models.

    Attributes:
        config: What it was built from.
        head: What it puts out, and the loss that trains it; None: it has no loss.
        blocks: Each of which may be compiled, or computed twice; none in a recurrent model.
        checkpoint_blocks: In training, keep only the stream between blocks and compute the rest again in the backward
            pass (Chen et al. 2016): less memory, a third more time.
    """

    # Each model narrows these, which a type checker forbids for what is not Any.
    config: Any
    head: Any
    blocks: Any
    checkpoint_blocks: Any
    _averaged: bool = False

    def after_step(self, loads: Mapping[str, Tensor]) -> None:
        """After the optimiser's step: hand each sublayer the loads that it reported, summed over the batches."""
        for path, part in self.named_modules() if loads else ():
            name = path.replace(".sublayers.", ".") + "."
            own = {key.removeprefix(name): load for key, load in loads.items() if key.startswith(name)}
            if own and isinstance(part, Sublayer):
                part.after_step(own)

    @property
    @abstractmethod
    def table(self) -> Table | None:
        """The embedder's vectors, for a head that shares them; None: there are none."""

    def readout(self, x: Float[Tensor, "B T D"], tokens: Tokens | None = None) -> Float[Tensor, "..."]:
        """The head's outputs for a stream; without `tokens` each row is one full sequence."""
        if self.head is None:
            return x
        return self.head(x, placed(x, tokens), self.table)

    def head_loss(
        self, x: Float[Tensor, "B T D"], tokens: Tokens, targets: Tensor, scale: float | None
    ) -> Float[Tensor, ""]:
        """The loss of a stream that is ready for the head; arguments as in `loss`."""
        if self.head is None:
            raise ConfigError("the model has no head and so no loss; give its config a head, such as LMHead")
        if scale is None:
            scale = 1 / max(1, self.head.count(targets, tokens))
        return self.head.loss(x, tokens, self.table, targets, scale)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> tuple[str, ...]:
        """Nothing. `DistributedDataParallel` asks for it where it wraps a model, and does not say so in another way."""
        self._averaged = True
        return ()

    @final
    def loss(
        self, inputs: Any, targets: Tensor, tokens: Tokens | None = None, *, scale: float | None = None
    ) -> tuple[Float[Tensor, ""], Aux | None]:
        """`scale` times the loss summed over the tokens that have a target, and the sublayers' report.

        It calls the model with `targets`, since FSDP2 gathers weights around calls alone. Around a model,
        `DistributedDataParallel` is called likewise: `ddp(inputs, tokens, targets=targets, scale=scale)`.

        Args:
            inputs: What the model reads.
            targets: The right output for each token; a token id of -100 counts nothing.
            tokens: Where the tokens that have targets stand; None: one full sequence per row.
            scale: None: one over the number of tokens with a target, that is, the mean.

        Raises:
            ConfigError: The model has no head, or `DistributedDataParallel` would not hear of the loss.
        """
        if self._averaged and torch.is_grad_enabled() and dist.is_initialized():
            raise ConfigError(
                "the model is inside DistributedDataParallel, which averages no gradient of model.loss(...); call "
                "ddp(inputs, tokens, targets=targets, scale=scale), which gives the same"
            )
        return self(inputs, tokens, targets=targets, scale=scale)


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The model is in evaluation mode while this runs, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
