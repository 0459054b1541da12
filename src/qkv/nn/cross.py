"""Cross-attention: queries from the stream, keys and values from a memory, which may have another width."""

from typing import ClassVar, final

from torch import nn

from qkv.caches import CacheShape
from qkv.config import config
from qkv.context import Context
from qkv.errors import ConfigError
from qkv.nn.mixer import AttentionLayer, MultiHeadConfig
from qkv.nn.sublayer import in_turn
from qkv.shapes import Float, Int, Tensor


@final
@config
class CrossAttentionConfig(MultiHeadConfig):
    """Attention to a memory, such as an encoder's output. Its heads: see `MultiHeadConfig`.

    `mask` says which tokens of the memory a token of the stream may attend to; it is usually `Full()`.

    Source: Vaswani et al. 2017, section 3.2.3 ("encoder-decoder attention").

    Attributes:
        memory_dim: Width of the memory. None: that of the stream.
    """

    name: ClassVar[str] = "cross_attention"
    reads_memory: ClassVar[bool] = True

    memory_dim: int | None = None

    def notes(self, d_model: int) -> list[str]:
        heads, mask = super().notes(d_model)
        return [heads, f"reads a memory {self.memory_dim or d_model:,} wide", mask]


@final
class CrossAttention(AttentionLayer, config=CrossAttentionConfig):
    """`kv_proj.weight` holds, for each kv head, its key rows and then its value rows."""

    def __init__(self, config: CrossAttentionConfig, d_model: int) -> None:
        super().__init__(config, config.mask, config.heads(d_model), config.scale)
        self.n_heads, self.n_kv_heads, self.head_dim, self.value_dim = self.heads
        self.weight_dropout = config.weight_dropout
        out_bias = config.bias if config.out_bias is None else config.out_bias
        memory_dim = config.memory_dim or d_model
        self.q_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=config.bias)
        self.kv_proj = nn.Linear(memory_dim, self.n_kv_heads * (self.head_dim + self.value_dim), bias=config.bias)
        self.o_proj = nn.Linear(self.n_heads * self.value_dim, d_model, bias=out_bias)
        self.q_norm = config.qk_norm.build(self.head_dim) if config.qk_norm else None
        self.k_norm = config.qk_norm.build(self.head_dim) if config.qk_norm else None

    def update(self, x: Float[Tensor, "B T D"], ctx: Context) -> tuple[Float[Tensor, "B T D"], None]:
        """What each token reads in the memory.

        Raises:
            ConfigError: There is no memory, or it has another width or number of rows.
        """
        if ctx.memory is None:
            raise ConfigError("cross-attention reads a memory and was given none; give it memory=")
        memory = ctx.memory.x
        if len(memory) != len(x):
            raise ConfigError(f"the memory has {len(memory)} rows and the stream {len(x)}; give each row its own")
        if memory.shape[-1] != self.kv_proj.in_features:
            raise ConfigError(
                f"the memory is {memory.shape[-1]} wide and cross-attention takes {self.kv_proj.in_features}; set "
                "memory_dim"
            )
        q = self.q_proj(x).unflatten(-1, (self.n_heads, self.head_dim))
        q = (q if self.q_norm is None else self.q_norm(q)).transpose(1, 2)
        if ctx.cache is None:
            k, v = self._keys(memory)
        else:
            k, v = ctx.cache.remember(ctx.slot + self.seat.slot, lambda: self._keys(memory))
        problem = self.problem(q, k, v, ctx.memory_masks[self.seat.mask], training=self.training)
        return self.o_proj(self.attend(problem, ctx)), None

    def _keys(self, memory: Float[Tensor, "B S M"]) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S v"]]:
        kv = self.kv_proj(memory).unflatten(-1, (self.n_kv_heads, -1))
        k, v = kv.split([self.head_dim, self.value_dim], dim=-1)
        k = k if self.k_norm is None else self.k_norm(k)
        return k.transpose(1, 2), v.transpose(1, 2)

    def cache_shape(self) -> CacheShape:
        return CacheShape(0, 0, 0)

    def flops(self, n_keys: int) -> int:
        """Of a token of the stream; the keys and values of the memory, computed once, are left out."""
        return super().flops(n_keys) - 2 * self.kv_proj.weight.numel()

    def slices(self) -> dict[str, dict[str, Int[Tensor, " rows"]]]:
        return {
            "q_proj": in_turn(1, q=self.n_heads * self.head_dim),
            "kv_proj": in_turn(self.n_kv_heads, k=self.head_dim, v=self.value_dim),
            "o_proj": in_turn(1, o=self.o_proj.out_features),
        }
