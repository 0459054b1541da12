"""Multi-head self-attention: four matrix products (qkv, q kᵀ, weights times v, output)."""

import math
from typing import ClassVar, NamedTuple, final

from torch import nn

from qkv.caches import CacheShape
from qkv.config import config
from qkv.context import Context
from qkv.errors import ConfigError
from qkv.masks import Mask, lower
from qkv.nn.norms import NormConfig
from qkv.nn.positions import RoPEConfig
from qkv.nn.sublayer import Aux, Sublayer, SublayerConfig
from qkv.ops.attend import attend
from qkv.ops.rotary import rotate
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


class Seat(NamedTuple):
    """Where a stack keeps what one of its attention layers needs; given by the stack when it is built.

    Attributes:
        mask: Index into `Context.masks`.
        rotation: Index into `Context.rotations`.
        slot: Added to `Context.slot`: how many attention layers stand before this one in its block.
    """

    mask: int = 0
    rotation: int = 0
    slot: int = 0


@final
@config
class AttentionConfig(SublayerConfig):
    """Self-attention with any number of query heads per kv head.

    Source: Vaswani et al. 2017, section 3.2.2; one kv head for all (multi-query) is Shazeer 2019, one per group of
    query heads Ainslie et al. 2023; the norm of queries and keys Dehghani et al. 2023, section 2.

    Attributes:
        n_heads: Query heads.
        mask: Who may attend to whom. Required: there is no safe default.
        n_kv_heads: Key and value heads; divides `n_heads`. None: as many as `n_heads`.
        head_dim: Width of queries and keys of one head. None: d_model / n_heads.
        value_dim: Width of the values of one head. None: `head_dim`.
        bias: Whether the query, key and value projections have biases.
        out_bias: Whether the output projection has one. None: as `bias`.
        position: Rotary embedding; None where positions were added to the embeddings, or there are none.
        qk_norm: Norm of each head's queries and keys, before the rotation.
        weight_dropout: Probability that an attention weight is dropped in training.
        scale: What q·k is multiplied with. None: 1/√head_dim.
    """

    name: ClassVar[str] = "attention"

    n_heads: int
    mask: Mask
    n_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    bias: bool = False
    out_bias: bool | None = None
    position: RoPEConfig | None = None
    qk_norm: NormConfig | None = None
    weight_dropout: float = 0.0
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        if self.n_heads < 1 or n_kv_heads < 1 or self.n_heads % n_kv_heads:
            raise ConfigError(f"n_heads={self.n_heads} must be a positive multiple of n_kv_heads={n_kv_heads}")
        if not 0 <= self.weight_dropout < 1:
            raise ConfigError(f"weight_dropout={self.weight_dropout} must be at least 0 and below 1")

    def build(self, d_model: int) -> "Attention":
        """The sublayer for a stream of width `d_model`."""
        return Attention(self, d_model)


@final
class Attention(Sublayer):
    """See `AttentionConfig`.

    `qkv_proj.weight` holds, for each kv head: the rows of its group's query heads, its key rows, its value rows. So a
    share of the kv heads is a run of rows, which can be put on another device.
    """

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__(config)
        if config.head_dim is None and d_model % config.n_heads:
            raise ConfigError(
                f"d_model={d_model} must be a multiple of n_heads={config.n_heads}; change one, or give head_dim"
            )
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or d_model // config.n_heads
        self.value_dim = config.value_dim or self.head_dim
        if config.position is not None and self.head_dim % 2:
            raise ConfigError(f"rotary embedding pairs coordinates and head_dim={self.head_dim} is odd; make it even")
        self.scale = 1 / math.sqrt(self.head_dim) if config.scale is None else config.scale
        self.weight_dropout = config.weight_dropout
        self.mask, self.position = config.mask, config.position
        self.seat = Seat()
        per_group = (self.n_heads // self.n_kv_heads + 1) * self.head_dim + self.value_dim
        out_bias = config.bias if config.out_bias is None else config.out_bias
        self.qkv_proj = nn.Linear(d_model, self.n_kv_heads * per_group, bias=config.bias)
        self.o_proj = nn.Linear(self.n_heads * self.value_dim, d_model, bias=out_bias)
        self.q_norm = config.qk_norm.build(self.head_dim) if config.qk_norm else None
        self.k_norm = config.qk_norm.build(self.head_dim) if config.qk_norm else None

    def update(self, x: Float[Tensor, "B T D"], ctx: Context | None) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        """Attention of the stream to itself."""
        ctx = self._alone(x) if ctx is None else ctx
        q, k, v = self._heads(x, ctx)
        if ctx.cache is not None:
            k, v = ctx.cache.update(ctx.slot + self.seat.slot, k, v)
        mask = ctx.masks[self.seat.mask]
        dropout = self.weight_dropout if self.training else 0.0
        out = attend(q, k, v, mask=mask, scale=self.scale, dropout=dropout)
        if ctx.recorder is not None:
            ctx.recorder.attention(ctx.slot + self.seat.slot, q, k, mask, self.scale, out)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def _heads(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, K), keys (B, G, T, K) and values (B, G, T, v), normed and rotated."""
        batch, length, _ = x.shape
        per_key = self.n_heads // self.n_kv_heads
        qkv = self.qkv_proj(x).view(batch, length, self.n_kv_heads, -1)
        q, k, v = qkv.split([per_key * self.head_dim, self.head_dim, self.value_dim], dim=-1)
        q = q.unflatten(-1, (per_key, self.head_dim))  # (B, T, G, H/G, K)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.position is not None:
            by = ctx.rotations[self.seat.rotation]
            q, k = rotate(q, by, self.position.layout), rotate(k, by, self.position.layout)
        return q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _alone(self, x: Tensor) -> Context:
        tokens = Tokens.full(x.shape[0], x.shape[1], device=x.device)
        rotations = ()
        if self.position is not None:
            rotations = (self.position.rotation(tokens, self.head_dim, x.shape[1], x.dtype),)
        return Context(tokens, (lower(self.mask, tokens, tokens),), rotations)

    def cache_shape(self) -> CacheShape:
        """What a cache keeps of one token."""
        return CacheShape(self.n_kv_heads, self.head_dim, self.value_dim)

    def residual_weights(self) -> list[Tensor]:
        """The output projection."""
        return [self.o_proj.weight]

    def flops(self, n_keys: int) -> int:
        """Two per weight, and two for each key and coordinate in q kᵀ and in the sum of values."""
        weights = self.qkv_proj.weight.numel() + self.o_proj.weight.numel()
        return 2 * weights + 2 * self.n_heads * n_keys * (self.head_dim + self.value_dim)
