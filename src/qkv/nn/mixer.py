"""What attends: the base of the sublayers that let tokens read other tokens, and what a stack has to know of them."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, final

from qkv.caches import CacheShape
from qkv.config import Share, config
from qkv.context import Context, Memory
from qkv.errors import ConfigError
from qkv.lowered import LoweredMask, lower
from qkv.masks import Mask
from qkv.nn.norms import NormConfig
from qkv.nn.positions import RoPEConfig
from qkv.nn.sublayer import Aux, Sublayer, SublayerConfig
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


@config
class HeadsConfig(SublayerConfig, ABC):
    """Base of the configs of attention with query heads and kv heads.

    Attributes:
        n_heads: Query heads.
        mask: Who may attend to whom. Required: there is no safe default.
        n_kv_heads: Key and value heads; divides `n_heads`. None: as many as `n_heads`.
        head_dim: Width of queries and keys of one head. None: d_model / n_heads.
        value_dim: Width of the values of one head. None: `head_dim`.
        bias: Whether the query, key and value projections have biases.
        out_bias: Whether the output projection has one. None: as `bias`.
        qk_norm: Norm of each head's queries and keys, before a rotation.
        weight_dropout: Probability that an attention weight is dropped in training.
        scale: What q·k is multiplied with. None: 1/√head_dim.
    """

    n_heads: int
    mask: Mask
    n_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    bias: bool = False
    out_bias: bool | None = None
    qk_norm: NormConfig | None = None
    weight_dropout: Share = 0.0
    scale: float | None = None

    def notes(self, d_model: int) -> list[str]:
        kv = "" if self.n_kv_heads in (None, self.n_heads) else f", {self.n_kv_heads} kv heads"
        width = self.head_dim or d_model // self.n_heads
        return [f"{self.n_heads} heads of {width}{kv}", f"{self.mask.describe()} mask"]

    def __post_init__(self) -> None:
        n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        if self.n_heads < 1 or n_kv_heads < 1 or self.n_heads % n_kv_heads:
            raise ConfigError(f"n_heads={self.n_heads} must be a positive multiple of n_kv_heads={n_kv_heads}")


class Heads(NamedTuple):
    """How many heads, and how wide: H, G, K and the width of the values."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int

    @staticmethod
    def of(config: HeadsConfig, d_model: int) -> "Heads":
        """Those of a config, for a stream of width `d_model`.

        Raises:
            ConfigError: `d_model` cannot be shared out.
        """
        if config.head_dim is None and d_model % config.n_heads:
            raise ConfigError(
                f"d_model={d_model} must be a multiple of n_heads={config.n_heads}; change one, or give head_dim"
            )
        head_dim = config.head_dim or d_model // config.n_heads
        return Heads(config.n_heads, config.n_kv_heads or config.n_heads, head_dim, config.value_dim or head_dim)

    @property
    def scale(self) -> float:
        """What q·k is multiplied with, unless a config says otherwise: 1/√K."""
        return 1 / math.sqrt(self.head_dim)


class Mixer(Sublayer, ABC):
    """Base of the attention layers.

    Attributes:
        mask: Who may attend to whom.
        heads: Of the problems that it hands to `attend` in training.
        rope: The rotary embedding, and of how many coordinates of a head; None: there is none.
        seat: Where the stack keeps what this layer needs.
    """

    reads_memory: ClassVar[bool] = False
    """Whether keys and values come from the context's memory instead of the stream."""

    mask: Mask
    heads: Heads
    rope: RoPEConfig | None = None
    rotated: int = 0
    seat: Seat = Seat()

    @final
    def update(self, x: Float[Tensor, "B T D"], ctx: Context | None) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        return self.read(x, self.alone(x) if ctx is None else ctx), None

    @abstractmethod
    def read(self, x: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B T D"]:
        """What each token reads."""

    @abstractmethod
    def cache_shape(self) -> CacheShape:
        """What a cache keeps of one token."""

    def attends(self) -> Mask:
        return self.mask

    def cached(self) -> int:
        shape = self.cache_shape()
        return shape.n_kv_heads * (shape.head_dim + shape.value_dim)

    def problem(self, q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, *, training: bool) -> Problem:
        """What is to be solved; a layer may add dropout, a bias, sinks or a soft-cap."""
        return Problem(q, k, v, mask, scale=1.0)

    def alone(self, x: Float[Tensor, "B T D"], memory: Float[Tensor, "B S M"] | None = None) -> Context:
        """The context of this layer without a stack around it: each row of `x`, and of `memory`, is one full sequence.

        Raises:
            ConfigError: The layer reads a memory, and there is none.
        """
        tokens = Tokens.full(x.shape[0], x.shape[1], device=x.device)
        rotations, places = (), self.seat.mask + 1  # in a stack it has a seat, and looks there
        if self.rope is not None:
            rotation = self.rope.rotation(tokens, self.rotated, x.shape[1], x.dtype)
            rotations = (rotation,) * (self.seat.rotation + 1)
        if not self.reads_memory:
            return Context(tokens, (lower(self.mask, tokens, tokens),) * places, rotations)
        if memory is None:
            raise ConfigError("cross-attention reads a memory; call it as layer(x, layer.alone(x, memory))")
        there = Tokens.full(memory.shape[0], memory.shape[1], device=x.device)
        masks = (lower(self.mask, tokens, there),) * places
        return Context(tokens, (), rotations, memory=Memory(memory, there), memory_masks=masks)

    def attend(self, problem: Problem, ctx: Context) -> Float[Tensor, "B T heads"]:
        """Solve it, show it to the recorder if there is one, and put the heads of a token side by side."""
        out = solve(problem)
        if ctx.recorder is not None:
            ctx.recorder.attention(ctx.slot + self.seat.slot, problem, out)
        return out.transpose(1, 2).flatten(2)
