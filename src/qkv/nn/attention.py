"""Multi-head self-attention: four matrix products (qkv, q kᵀ, weights times v, output)."""

from typing import ClassVar, Literal, final

import torch
from torch import nn

from qkv.caches import CacheShape
from qkv.config import Positive, config
from qkv.context import Context
from qkv.lowered import LoweredMask
from qkv.masks import Mask
from qkv.nn.mixer import AttentionLayer, MultiHeadConfig
from qkv.nn.positions import AttentionPositionConfig, RotaryConfig, ScoreBiasConfig
from qkv.nn.sublayer import in_turn
from qkv.ops.backend import Problem
from qkv.ops.rotary import rotate
from qkv.shapes import Float, Int, Tensor


@final
@config
class AttentionConfig(MultiHeadConfig):
    """Self-attention with any number of query heads per kv head. Its heads: see `MultiHeadConfig`.

    Source: Vaswani et al. 2017, section 3.2.2; one kv head for all (multi-query) is Shazeer 2019, one per group of
    query heads Ainslie et al. 2023; the norm of queries and keys Dehghani et al. 2023, section 2.

    Attributes:
        position: Rotary embedding, or a bias of the scores; None where positions were added to the embeddings, or there
            are none.
        qk_norm_over: Whether `qk_norm` is taken over each head, with one weight for all of them, or over all heads of a
            token side by side (OLMo 2).
        softcap: c in c · tanh(score / c) (Gemma 2); None: scores are not bounded.
        sinks: Whether each head has a trained logit for a key that has no value (gpt-oss).
    """

    name: ClassVar[str] = "attention"

    position: AttentionPositionConfig | None = None
    qk_norm_over: Literal["head", "heads"] = "head"
    softcap: Positive | None = None
    sinks: bool = False

    def notes(self, d_model: int) -> list[str]:
        extras = {
            "queries and keys normed": self.qk_norm,
            f"scores capped at {self.softcap}": self.softcap,
            "a sink in each head": self.sinks,
        }
        position = [self.position.describe()] if self.position else []
        return super().notes(d_model) + position + [text for text, there in extras.items() if there]

    @property
    def stream_mask(self) -> Mask:
        return self.mask


@final
class Attention(AttentionLayer, config=AttentionConfig):
    """Self-attention with one fused projection to queries, keys and values.

    `qkv_proj.weight` holds, for each kv head: the rows of its group's query heads, its key rows, its value rows. So a
    share of the kv heads is a run of rows, which can be put on another device.
    """

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__(config, config.mask, config.heads(d_model), config.scale)
        self.n_heads, self.n_kv_heads, self.head_dim, self.value_dim = self.heads
        self.weight_dropout, self.softcap = config.weight_dropout, config.softcap
        self.rope = config.position if isinstance(config.position, RotaryConfig) else None
        self.rotated = 0 if self.rope is None else self.rope.width(self.head_dim)
        per_group = (self.n_heads // self.n_kv_heads + 1) * self.head_dim + self.value_dim
        out_bias = config.bias if config.out_bias is None else config.out_bias
        self.qkv_proj = nn.Linear(d_model, self.n_kv_heads * per_group, bias=config.bias)
        self.o_proj = nn.Linear(self.n_heads * self.value_dim, d_model, bias=out_bias)
        self.norm_heads = config.qk_norm_over == "heads"
        q_heads, k_heads = (self.n_heads, self.n_kv_heads) if self.norm_heads else (1, 1)
        self.q_norm = config.qk_norm.build(q_heads * self.head_dim) if config.qk_norm else None
        self.k_norm = config.qk_norm.build(k_heads * self.head_dim) if config.qk_norm else None
        self.score_bias = config.position.build(self.n_heads) if isinstance(config.position, ScoreBiasConfig) else None
        self.sinks = nn.Parameter(torch.zeros(self.n_heads)) if config.sinks else None

    def update(self, x: Float[Tensor, "B T D"], ctx: Context) -> tuple[Float[Tensor, "B T D"], None]:
        q, k, v = self._heads(x, ctx)
        if ctx.cache is not None:
            k, v = ctx.cache.update(ctx.slot + self.seat.slot, k, v)
        problem = self.problem(q, k, v, ctx.masks[self.seat.mask], training=self.training)
        return self.o_proj(self.attend(problem, ctx)), None

    def problem(self, q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, *, training: bool) -> Problem:
        bias = None if self.score_bias is None else self.score_bias(k.shape[2], q)
        dropout = self.weight_dropout if training else 0.0
        return Problem(q, k, v, mask, self.scale, dropout, bias, self.sinks, self.softcap)

    def _heads(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, K), keys (B, G, T, K) and values (B, G, T, v), normed and rotated."""
        batch, length, _ = x.shape
        per_key = self.n_heads // self.n_kv_heads
        qkv = self.qkv_proj(x).unflatten(-1, (self.n_kv_heads, -1))
        heads, v = qkv.split([(per_key + 1) * self.head_dim, self.value_dim], dim=-1)
        heads = heads.view(batch, length, self.n_kv_heads, per_key + 1, self.head_dim)  # the group's queries, its key
        if self.q_norm is not None and self.k_norm is not None:
            q, k = heads.split([per_key, 1], dim=-2)
            if self.norm_heads:
                q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
            else:
                q, k = self.q_norm(q), self.k_norm(k)
            heads = torch.cat([q, k], dim=-2)
        if self.rope is not None:
            heads = rotate(heads, ctx.rotations[self.seat.rotation])
        q, k = heads[..., :-1, :].flatten(2, 3), heads[..., -1, :]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def cache_shape(self) -> CacheShape:
        return CacheShape(self.n_kv_heads, self.head_dim, self.value_dim, self.mask.reach)

    def slices(self) -> dict[str, dict[str, Int[Tensor, " rows"]]]:
        """q, k and v, whose rows go kv group by kv group, and o."""
        per_key = self.n_heads // self.n_kv_heads
        qkv = in_turn(self.n_kv_heads, q=per_key * self.head_dim, k=self.head_dim, v=self.value_dim)
        return {"qkv_proj": qkv, "o_proj": in_turn(1, o=self.o_proj.out_features)}
