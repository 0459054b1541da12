"""Multi-head latent attention: keys and values come from one small vector a token, which is all that a cache keeps."""

from typing import ClassVar, final

import torch
from torch import nn

from qkv.caches import CacheShape
from qkv.config import Count, config
from qkv.context import Context
from qkv.lowered import LoweredMask
from qkv.masks import Mask
from qkv.nn.mixer import AttentionLayer, Heads
from qkv.nn.norms import NormConfig
from qkv.nn.positions import RoPEConfig
from qkv.nn.sublayer import SublayerConfig, in_turn
from qkv.ops.backend import Problem
from qkv.ops.rotary import rotate
from qkv.shapes import Float, Int, Tensor


@final
@config
class LatentAttentionConfig(SublayerConfig):
    """Multi-head latent attention.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1, equations 9 to 19.

    Attributes:
        n_heads: Heads; all read one latent.
        mask: Who may attend to whom.
        norm: Norm of the latents.
        kv_rank: Width of the latent from which keys and values come.
        plain_dim: Width of a head's queries and keys that know no position.
        rotary_dim: Width of its queries that are rotated; the rotated key is one for all heads.
        value_dim: Width of the values of one head.
        q_rank: Width of the latent from which queries come; None: they come from the stream.
        position: The rotary embedding.
        bias: Whether the projections to the latents, and the output projection, have biases.
        scale: What q·k is multiplied with. None: 1/√(plain_dim + rotary_dim).
    """

    name: ClassVar[str] = "attention"

    n_heads: Count
    mask: Mask
    norm: NormConfig
    kv_rank: Count
    plain_dim: Count
    rotary_dim: Count
    value_dim: Count
    q_rank: Count | None = None
    position: RoPEConfig = RoPEConfig()
    bias: bool = False
    scale: float | None = None

    def notes(self, d_model: int) -> list[str]:
        heads = f"{self.n_heads} heads of {self.plain_dim} + {self.rotary_dim}, latent {self.kv_rank:,}"
        return [heads, f"{self.mask.describe()} mask", self.position.describe()]

    @property
    def stream_mask(self) -> Mask:
        return self.mask


@final
class LatentAttention(AttentionLayer, config=LatentAttentionConfig):
    """Latent attention, computed in one of two ways with the same result.

    `expanded`: every head's keys and values are made from the latents, and attended to as usual: fewer operations a
    pair of tokens, best for many queries. `absorbed`: the expansions are multiplied into the queries and the outputs,
    so that all heads attend to the latents themselves: nothing is expanded, best for few queries and a long cache.
    """

    def __init__(self, config: LatentAttentionConfig, d_model: int) -> None:
        c = config
        heads = Heads(c.n_heads, c.n_heads, c.plain_dim + c.rotary_dim, c.value_dim)  # those of the expanded way
        super().__init__(c, c.mask, heads, c.scale)
        self.config, self.rope, self.rotated = c, c.position, c.position.width(c.rotary_dim)
        width = c.n_heads * (c.plain_dim + c.rotary_dim)
        self.q_down_proj = None if c.q_rank is None else nn.Linear(d_model, c.q_rank, bias=c.bias)
        self.q_norm = None if c.q_rank is None else c.norm.build(c.q_rank)
        self.q_proj = nn.Linear(c.q_rank or d_model, width, bias=False)
        self.kv_down_proj = nn.Linear(d_model, c.kv_rank + c.rotary_dim, bias=c.bias)
        self.kv_norm = c.norm.build(c.kv_rank)
        self.kv_proj = nn.Linear(c.kv_rank, c.n_heads * (c.plain_dim + c.value_dim), bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.value_dim, d_model, bias=c.bias)
        # Up to so many queries, absorbing takes fewer operations than expanding every key of the cache.
        more = 2 * c.kv_rank - c.plain_dim - c.value_dim
        self.few = c.kv_rank * (c.plain_dim + c.value_dim) // more if more > 0 else 2**31

    def update(self, x: Float[Tensor, "B T D"], ctx: Context) -> tuple[Float[Tensor, "B T D"], None]:
        c, by = self.config, ctx.rotations[self.seat.rotation]
        h = x if self.q_down_proj is None or self.q_norm is None else self.q_norm(self.q_down_proj(x))
        q = self.q_proj(h).unflatten(-1, (c.n_heads, -1)).transpose(1, 2)  # (B, H, T, plain + rotary)
        plain, turned = q.split([c.plain_dim, c.rotary_dim], dim=-1)
        turned = rotate(turned.transpose(1, 2), by).transpose(1, 2)
        latent, key = self.kv_down_proj(x).split([c.kv_rank, c.rotary_dim], dim=-1)
        latents = torch.cat([self.kv_norm(latent), rotate(key, by)], dim=-1)[:, None]  # (B, 1, T, r)
        if ctx.cache is not None:
            latents, _ = ctx.cache.update(ctx.slot + self.seat.slot, latents, latents[..., :0])
        mask = ctx.masks[self.seat.mask]
        few = ctx.cache is not None and x.shape[1] <= self.few
        out = (self.absorbed if few else self.expanded)(plain, turned, latents, mask, ctx)
        return self.o_proj(out), None

    def expanded(self, plain: Tensor, turned: Tensor, latents: Tensor, mask: LoweredMask, ctx: Context) -> Tensor:
        """Keys and values of every head, made from the latents; (B, T, H·v)."""
        c = self.config
        latent, key = latents.split([c.kv_rank, c.rotary_dim], dim=-1)
        kv = self.kv_proj(latent[:, 0]).unflatten(-1, (c.n_heads, -1)).transpose(1, 2)
        k, v = kv.split([c.plain_dim, c.value_dim], dim=-1)
        k = torch.cat([k, key.expand(-1, c.n_heads, -1, -1)], dim=-1)
        return self.attend(Problem(torch.cat([plain, turned], dim=-1), k, v, mask, self.scale), ctx)

    def absorbed(self, plain: Tensor, turned: Tensor, latents: Tensor, mask: LoweredMask, ctx: Context) -> Tensor:
        """Attention to the latents; (B, T, H·v)."""
        c = self.config
        keys, values = self.kv_proj.weight.unflatten(0, (c.n_heads, -1)).split([c.plain_dim, c.value_dim], dim=1)
        q = torch.cat([torch.einsum("bhtk,hkr->bhtr", plain, keys), turned], dim=-1)
        out = self.attend(Problem(q, latents, latents[..., : c.kv_rank], mask, self.scale), ctx)
        return torch.einsum("bthr,hvr->bthv", out.unflatten(-1, (c.n_heads, -1)), values).flatten(2)

    def cache_shape(self) -> CacheShape:
        return CacheShape(1, self.config.kv_rank + self.config.rotary_dim, 0, self.mask.reach)

    def slices(self) -> dict[str, dict[str, Int[Tensor, " rows"]]]:
        """q and o. Keys and values come from a weight that `absorbed` multiplies into the queries."""
        return {
            "q_proj": in_turn(1, q=self.q_proj.out_features),
            "o_proj": in_turn(1, o=self.o_proj.out_features),
        }
