"""Sublayers in which tokens read other tokens, and what a stack has to know of them."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, final

from torch import nn

from qkv.caches import CacheShape
from qkv.config import Share, config
from qkv.context import Context, Memory
from qkv.documents import Documents
from qkv.errors import ConfigError
from qkv.lowered import LoweredMask, lower
from qkv.masks import Mask
from qkv.nn.norms import NormConfig
from qkv.nn.positions import RotaryConfig
from qkv.nn.sublayer import Sublayer, SublayerConfig
from qkv.ops.attend import solve
from qkv.ops.backend import Problem
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


class Seat(NamedTuple):
    """Where a stack keeps what one of its layers needs; given by the stack when it is built.

    Attributes:
        mask: Index into `Context.masks`, or `Context.memory_masks`.
        rotation: Index into `Context.rotations`.
        slot: Added to `Context.slot`: how many layers with a slot come before this one in its block.
        name: Its path in the stack, for a recorder.
    """

    mask: int = 0
    rotation: int = 0
    slot: int = 0
    name: str = ""


class Mixer(Sublayer, ABC):
    """Base of attention, recurrence and convolution. The last projection of each is `o_proj`."""

    seat: Seat = Seat()
    o_proj: nn.Linear

    def cache_shape(self) -> CacheShape:
        """The keys and values that a cache keeps of one token; by default none."""
        return CacheShape(0, 0, 0)

    def residual_weights(self) -> list[Tensor]:
        return [self.o_proj.weight]


@config
class MultiHeadConfig(SublayerConfig, ABC):
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

    def heads(self, d_model: int) -> "Heads":
        """How many heads, and how wide, for a stream of width `d_model`.

        Raises:
            ConfigError: `d_model` cannot be shared out.
        """
        if self.head_dim is None and d_model % self.n_heads:
            raise ConfigError(
                f"d_model={d_model} must be a multiple of n_heads={self.n_heads}; change one, or give head_dim"
            )
        head_dim = self.head_dim or d_model // self.n_heads
        return Heads(self.n_heads, self.n_kv_heads or self.n_heads, head_dim, self.value_dim or head_dim)


class Heads(NamedTuple):
    """How many heads, and how wide: H, G, K and the width of the values."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int


class AttentionLayer(Mixer, ABC):
    """Base of the attention layers.

    Attributes:
        mask: Who may attend to whom.
        heads: Of the problems that it hands to `attend` in training.
        scale: What q·k is multiplied with; unless a config says otherwise, 1/√K.
        reads_memory: Whether keys and values come from the context's memory instead of the stream.
        rope: The rotary embedding, and of how many coordinates of a head; None: there is none.
    """

    rope: RotaryConfig | None = None
    rotated: int = 0
    weight_dropout: float = 0.0

    def __init__(self, config: SublayerConfig, mask: Mask, heads: Heads, scale: float | None) -> None:
        super().__init__(config)
        self.mask, self.heads, self.reads_memory = mask, heads, config.reads_memory
        self.scale = 1 / math.sqrt(heads.head_dim) if scale is None else scale

    @abstractmethod
    def cache_shape(self) -> CacheShape: ...

    def attends(self) -> Mask:
        return self.mask

    def cached(self) -> int:
        shape = self.cache_shape()
        return shape.n_kv_heads * (shape.head_dim + shape.value_dim)

    def flops(self, n_keys: int) -> int:
        """Two per weight of a projection, and two for each key and coordinate in q kᵀ and in the sum of values."""
        weights = sum(part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear))
        return 2 * weights + 2 * self.heads.n_heads * n_keys * (self.heads.head_dim + self.heads.value_dim)

    def alone(self, x: Float[Tensor, "B T D"], tokens: Tokens, memory: Memory | None) -> Context:
        there = memory.tokens if self.reads_memory and memory is not None else tokens
        masks = (lower(self.mask, tokens, there),) * (self.seat.mask + 1)  # in a stack it has a seat, and looks there
        rotations = ()
        if self.rope is not None:
            rotations = (self.rope.rotation(tokens, self.rotated, x.dtype),) * (self.seat.rotation + 1)
        return Context(tokens, masks, rotations, memory=memory, memory_masks=masks)

    def problem(self, q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, *, training: bool) -> Problem:
        """What is to be solved; a layer may add a bias, sinks or a soft-cap."""
        return Problem(q, k, v, mask, self.scale, self.weight_dropout if training else 0.0)

    def attend(self, problem: Problem, ctx: Context) -> Float[Tensor, "B T heads"]:
        """Solve it, show it to the recorder if there is one, and put the heads of a token side by side."""
        out = solve(problem)
        if ctx.recorder is not None:
            ctx.recorder.attention(self.seat.name, problem, out)
        return out.transpose(1, 2).flatten(2)


Kept = tuple[Tensor, ...]
"""What is carried on, each tensor (rows, …)."""


class Stateful(Mixer, ABC):
    """Base of the recurrent and convolutional sublayers. Each document begins anew; the future is never seen."""

    @abstractmethod
    def run(self, x: Float[Tensor, "N L D"], documents: Documents, state: Kept) -> tuple[Float[Tensor, "N L D"], Kept]:
        """The updates of documents that begin at the left, and the state behind each.

        Args:
            x: What the documents bring.
            documents: How long they are.
            state: Where each goes on from.
        """

    @abstractmethod
    def fresh(self, n: int, like: Tensor) -> Kept:
        """The state of `n` documents before their first token."""

    @final
    def update(self, x: Float[Tensor, "B T D"], ctx: Context) -> tuple[Float[Tensor, "B T D"], None]:
        """Document by document; with a cache, each row goes on where it was."""
        documents, slot = Documents.of(ctx.tokens), ctx.slot + self.seat.slot
        if not documents.place.numel():
            return documents.scatter(documents.gather(x)), None
        rows = (None if ctx.cache is None else ctx.cache.recall(slot)) or self.fresh(len(x), x)
        out, after = self.run(documents.gather(x), documents, tuple(part[documents.row] for part in rows))
        if ctx.cache is not None:
            pairs = zip(rows, after, strict=True)
            ctx.cache.keep(slot, tuple(part.index_copy(0, documents.row, new.to(part.dtype)) for part, new in pairs))
        return documents.scatter(out), None

    @final
    def state_size(self, d_model: int) -> int:
        return sum(part.numel() for part in self.fresh(1, next(self.parameters()).new_empty(1, d_model)))
