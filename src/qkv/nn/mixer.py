"""What attends: the base of the sublayers that let tokens read other tokens, and what a stack has to know of them."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, final

from qkv.caches import CacheShape
from qkv.context import Context, Memory
from qkv.errors import ConfigError
from qkv.masks import Mask, lower
from qkv.nn.positions import RoPEConfig
from qkv.nn.sublayer import Aux, Sublayer
from qkv.ops.attend import solve
from qkv.ops.backend import Problem
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


class Seat(NamedTuple):
    """Where a stack keeps what one of its attention layers needs; given by the stack when it is built.

    Attributes:
        mask: Index into `Context.masks`, or `Context.memory_masks`.
        rotation: Index into `Context.rotations`.
        slot: Added to `Context.slot`: how many attention layers stand before this one in its block.
    """

    mask: int = 0
    rotation: int = 0
    slot: int = 0


class Heads(NamedTuple):
    """How many heads, and how wide: H, G, K and the width of the values."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int


class Mixer(Sublayer, ABC):
    """Base of the attention layers.

    Attributes:
        mask: Who may attend to whom.
        rope: The rotary embedding, and of how many coordinates of a head; None: there is none.
        seat: Where the stack keeps what this layer needs.
    """

    reads_memory: ClassVar[bool] = False
    """Whether keys and values come from the context's memory instead of the stream."""

    mask: Mask
    rope: RoPEConfig | None = None
    rotated: int = 0
    seat: Seat = Seat()

    @final
    def update(self, x: Float[Tensor, "B T D"], ctx: Context | None) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        """What each token reads."""
        return self.read(x, self.alone(x) if ctx is None else ctx), None

    @abstractmethod
    def read(self, x: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B T D"]:
        """What each token reads."""

    @property
    @abstractmethod
    def heads(self) -> Heads:
        """Of the problems that it hands to `attend` in training."""

    @abstractmethod
    def cache_shape(self) -> CacheShape:
        """What a cache keeps of one token."""

    def alone(self, x: Float[Tensor, "B T D"], memory: Float[Tensor, "B S M"] | None = None) -> Context:
        """The context of this layer without a stack around it: each row of `x`, and of `memory`, is one full sequence.

        Raises:
            ConfigError: The layer reads a memory, and there is none.
        """
        tokens = Tokens.full(x.shape[0], x.shape[1], device=x.device)
        rotations = ()
        if self.rope is not None:
            rotations = (self.rope.rotation(tokens, self.rotated, x.shape[1], x.dtype),)
        if not self.reads_memory:
            return Context(tokens, (lower(self.mask, tokens, tokens),), rotations)
        if memory is None:
            raise ConfigError("cross-attention reads a memory; call it as layer(x, layer.alone(x, memory))")
        there = Tokens.full(memory.shape[0], memory.shape[1], device=x.device)
        masks = (lower(self.mask, tokens, there),)
        return Context(tokens, (), rotations, memory=Memory(memory, there), memory_masks=masks)

    def attend(self, problem: Problem, ctx: Context) -> Float[Tensor, "B T heads"]:
        """Solve it, show it to the recorder if there is one, and put the heads of a token side by side."""
        out = solve(problem)
        if ctx.recorder is not None:
            ctx.recorder.attention(ctx.slot + self.seat.slot, problem, out)
        return out.transpose(1, 2).flatten(2)
