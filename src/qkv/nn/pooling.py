"""From the tokens of a document to one vector: what a classifier and an embedding read."""

from abc import ABC, abstractmethod
from typing import Annotated, Final, Literal, final

import torch
from torch import nn

from qkv.config import Config, Configured, Count, config, must
from qkv.context import Memory
from qkv.documents import Documents
from qkv.masks import Full
from qkv.nn.cross import CrossAttentionConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.norms import LayerNormConfig, NormConfig
from qkv.nn.sublayer import SublayerConfig
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


class Pool(Configured, nn.Module, ABC):
    """Base of the pools."""

    @final
    def forward(self, x: Float[Tensor, "B T D"], tokens: Tokens) -> Float[Tensor, "N E"]:
        """A vector for each of the N documents, row by row and within a row in their order; padding has no part."""
        documents = Documents.of(tokens)
        return self.pool(documents.gather(x), documents)

    @abstractmethod
    def pool(self, x: Float[Tensor, "N L D"], documents: Documents) -> Float[Tensor, "N E"]:
        """As `forward`, of the documents side by side, with zeros behind their ends."""


@config
class PoolConfig(Config, ABC):
    """Base of the configs of pools."""

    def width(self, d_model: int) -> int:
        """Numbers of the vector that it makes of vectors of `d_model`."""
        return d_model

    def build(self, width: int) -> Pool:
        """The pool of vectors of `width` numbers."""
        return self._build(width)


@final
@config
class FirstTokenConfig(PoolConfig):
    """The vector of the first token, such as a class token (Devlin et al. 2019, BERT, section 3).

    Attributes:
        skip: Tokens at the beginning that are passed over. Of a document without more of them the vector is 0.
    """

    skip: Annotated[int, must("not be negative", lambda n: n >= 0)] = 0


@final
class FirstToken(Pool, config=FirstTokenConfig):
    """One token."""

    def __init__(self, config: FirstTokenConfig, width: int) -> None:
        super().__init__()
        self.skip = config.skip

    def pool(self, x: Float[Tensor, "N L D"], documents: Documents) -> Float[Tensor, "N D"]:
        return x[:, self.skip : self.skip + 1].sum(1) if self.skip else x[:, 0]


@final
@config
class MeanPoolConfig(PoolConfig):
    """The mean over all tokens (Reimers and Gurevych 2019, section 3).

    Attributes:
        skip: Tokens at the beginning that have no part, such as a class token. Of a document without more of them the
            mean is 0.
    """

    skip: Annotated[int, must("not be negative", lambda n: n >= 0)] = 0


@final
class MeanPool(Pool, config=MeanPoolConfig):
    """A mean, taken in at least float32."""

    def __init__(self, config: MeanPoolConfig, width: int) -> None:
        super().__init__()
        self.skip = config.skip

    def pool(self, x: Float[Tensor, "N L D"], documents: Documents) -> Float[Tensor, "N D"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        lengths = (documents.lengths - self.skip).clamp(min=1)
        return (x[:, self.skip :].to(wide).sum(1) / lengths[:, None]).to(x.dtype)


@final
@config
class ConcatPoolConfig(PoolConfig):
    """What several pools give, side by side: the class token and the mean of the rest, as DINOv2's classifier reads.

    Attributes:
        pools: From left to right.
    """

    pools: tuple[PoolConfig, ...]

    def width(self, d_model: int) -> int:
        return sum(each.width(d_model) for each in self.pools)


@final
class ConcatPool(Pool, config=ConcatPoolConfig):
    """Several pools."""

    def __init__(self, config: ConcatPoolConfig, width: int) -> None:
        super().__init__()
        self.pools = nn.ModuleList(each.build(width) for each in config.pools)

    def pool(self, x: Float[Tensor, "N L D"], documents: Documents) -> Float[Tensor, "N E"]:
        return torch.cat([each.pool(x, documents) for each in self.pools if isinstance(each, Pool)], -1)


@final
@config
class LastTokenConfig(PoolConfig):
    """The vector of the last token, such as the end of a text, which alone sees all under a causal mask (CLIP)."""


@final
class LastToken(Pool, config=LastTokenConfig):
    """One token."""

    def __init__(self, config: LastTokenConfig, width: int) -> None:
        super().__init__()

    def pool(self, x: Float[Tensor, "N L D"], documents: Documents) -> Float[Tensor, "N D"]:
        return x[torch.arange(len(x), device=x.device), documents.lengths - 1]


@final
@config
class AttentionPoolConfig(PoolConfig):
    """y + f(norm(y)) of what a trained query y reads in all tokens (Zhai et al. 2022, section 3.2, "MAP").

    Attributes:
        n_heads: Of the attention.
        norm: Before f.
        ffn: f.
    """

    n_heads: Count
    norm: NormConfig = LayerNormConfig(eps=1e-6)
    ffn: SublayerConfig = FFNConfig(activation="gelu_tanh", bias=True)


@final
class AttentionPool(Pool, config=AttentionPoolConfig):
    """Cross-attention of one query to the tokens of each document, and an FFN."""

    def __init__(self, config: AttentionPoolConfig, width: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, width))
        self.attention = CrossAttentionConfig(n_heads=config.n_heads, mask=Full(), bias=True).build(width)
        self.norm = config.norm.build(width)
        self.ffn = config.ffn.build(width)

    def pool(self, x: Float[Tensor, "N L D"], documents: Documents) -> Float[Tensor, "N D"]:
        probe = self.probe.expand(len(x), 1, -1)
        y, _ = self.attention(probe, memory=Memory(x, documents.tokens))
        update, _ = self.ffn(self.norm(y))
        return (y + update)[:, 0]


PoolName = Literal["mean", "first"]
POOLS: Final[dict[PoolName, PoolConfig]] = {"mean": MeanPoolConfig(), "first": FirstTokenConfig()}
"""Those without weights, by name."""
