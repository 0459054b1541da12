"""Parameters, bytes and FLOPs of a model, part by part, from its config alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from qkv.config import Config
from qkv.errors import ConfigError
from qkv.masks import Causal, Full, Mask, Place
from qkv.models.model import ModelConfig
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.blocks import Block, BlockConfig, sublayers_of
from qkv.nn.embedders import EmbedderConfig, TokenEmbedder, TokenEmbedderConfig, VectorEmbedderConfig
from qkv.nn.heads import LMHead, VectorHeadConfig
from qkv.nn.mixer import Mixer

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
        parts: The same for what it is made of.
        open: What sets a size that the config leaves open, and is missing in the counts; empty if nothing does.
    """

    config: Config
    name: str
    copies: int
    parameters: int
    flops: float
    cached: int = 0
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
        return sum(part.parameters for part in self.parts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters."""
        return self.parameters * self.dtype.itemsize

    @property
    def flops_per_token(self) -> float:
        """Of the matrix products in the forward pass, as the mean over a text of `context` tokens."""
        return sum(part.flops for part in self.parts)

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward pass: the gradients of the inputs and of the weights cost a forward pass each."""
        return 3 * self.flops_per_token

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values."""
        return sum(part.cached for part in self.parts) * self.dtype.itemsize


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
        for run in config.blocks if isinstance(config.blocks, tuple) else (config.blocks,):
            repeat = run if isinstance(run, Repeat) else Repeat(n=1, pattern=run)
            pattern = repeat.pattern if isinstance(repeat.pattern, tuple) else (repeat.pattern,)
            parts += [_block(block, config.d_model, repeat, context) for block in pattern]
        if config.final_norm is not None:
            norm = config.final_norm
            parts.append(PartCost(norm, "final_norm", 1, _count(norm.build(config.d_model).parameters()), 0.0))
        if config.head is not None:
            parts.append(_head(config))
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
        tables = {id(part.weight) for part in model.modules() if isinstance(part, TokenEmbedder)}
        tied = isinstance(model.head, LMHead) and model.head.weight is None
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
    if note := _open(embed):
        table = embed.position.build(width).parameters() if embed.position else ()
        return PartCost(embed, "embed", 1, _count(table), 0.0, open=note)
    built = embed.build(width)
    return PartCost(embed, "embed", 1, _count(built.parameters()), _linear_flops(built))


def _block(config: BlockConfig, width: int, repeat: Repeat, context: int) -> PartCost:
    block = config.build(width)
    stored = min(repeat.n, 1) if repeat.shared else repeat.n
    parts = []
    for name, part, layer in zip(block.sublayers, config.sublayers, sublayers_of(block), strict=True):
        keys, cached = 0.0, 0
        if isinstance(layer, Mixer):
            shape = layer.cache_shape()
            keys, cached = mean_keys(layer.mask, context), shape.n_kv_heads * (shape.head_dim + shape.value_dim)
        flops = (
            layer.flops(0) + (layer.flops(1) - layer.flops(0)) * keys
        )  # linear in the keys, whose mean is no integer
        size = _count(layer.parameters())
        parts.append(PartCost(part, name, repeat.n, size * stored, flops * repeat.n, cached * repeat.n))
    return PartCost(
        config,
        "blocks",
        repeat.n,
        _count(block.parameters()) * stored,
        sum(part.flops for part in parts),
        sum(part.cached for part in parts),
        (_norms(config, block, repeat.n, stored), *parts),
    )


def _norms(config: BlockConfig, block: Block, copies: int, stored: int) -> PartCost:
    """All norms of a block that stand on the stream."""
    inside = sum(_count(layer.parameters()) for layer in sublayers_of(block))
    return PartCost(config.norm, "norms", copies, (_count(block.parameters()) - inside) * stored, 0.0)


def _head(config: TransformerConfig) -> PartCost:
    head, embed = config.head, config.embed
    assert head is not None
    note = "" if isinstance(head, VectorHeadConfig) and head.n_out is not None else _open(embed)
    if note:
        return PartCost(head, "head", 1, 0, 0.0, open=note)
    built = head.build(config.d_model, embed)
    flops = _linear_flops(built)
    if isinstance(built, LMHead) and isinstance(embed, TokenEmbedderConfig) and embed.vocab_size is not None:
        flops = 2.0 * config.d_model * embed.vocab_size
    return PartCost(head, "head", 1, _count(built.parameters()), flops)


def _open(embed: EmbedderConfig) -> str:
    match embed:
        case TokenEmbedderConfig(vocab_size=None):
            return "set by the tokenizer"
        case VectorEmbedderConfig(n_features=None):
            return "set by the data"
    return ""


def _linear_flops(module: nn.Module) -> float:
    return 0.0 + sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
