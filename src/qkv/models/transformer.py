"""The Transformer: an embedder, a stack of blocks, a norm and a head."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qkv.caches import Cache
from qkv.config import Config, config
from qkv.context import Context, Memory
from qkv.errors import ConfigError
from qkv.lowered import LoweredMask, lower
from qkv.masks import Mask, sees_ahead
from qkv.models.decoding import ROOM, CachedDecoding
from qkv.models.init import InitConfig
from qkv.models.model import Model, ModelConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import Block, BlockConfig, sublayers_of
from qkv.nn.embedders import EmbedderConfig
from qkv.nn.heads import Head, HeadConfig
from qkv.nn.latent import LatentAttentionConfig
from qkv.nn.mixer import Mixer, Seat
from qkv.nn.norms import NormConfig
from qkv.nn.positions import RoPEConfig
from qkv.nn.stateful import Stateful
from qkv.nn.sublayer import Aux, SublayerConfig, merge
from qkv.recorder import Recorder
from qkv.shapes import Float, Tensor
from qkv.tokens import Layout, Tokens


@final
@config
class Repeat(Config):
    """A pattern of blocks, `n` times over.

    Attributes:
        n: How often.
        pattern: One block, or several in turn.
        shared: Whether all rounds use the same weights (Lan et al. 2020, ALBERT, section 3.1).
    """

    n: int
    pattern: BlockConfig | tuple[BlockConfig, ...]
    shared: bool = False

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ConfigError(f"Repeat.n={self.n} must not be negative")


@final
@config
class TransformerConfig(ModelConfig):
    """A whole model as data.

    Attributes:
        d_model: Width of the stream.
        embed: What turns input into the stream.
        blocks: The stack, from the input up.
        final_norm: Norm after the last block (pre-norm stacks need it, post-norm ones do not).
        head: What the model puts out; None: the stream itself.
        init: How weights are drawn.
        context: Tokens of the longest document it is meant for; None: not known.
    """

    d_model: int
    embed: EmbedderConfig
    blocks: BlockConfig | Repeat | tuple[BlockConfig | Repeat, ...]
    final_norm: NormConfig | None = None
    head: HeadConfig | None = None
    init: InitConfig = InitConfig()
    context: int | None = None

    def __post_init__(self) -> None:
        if self.d_model < 1:
            raise ConfigError(f"d_model={self.d_model} must be at least 1")
        if self.context is not None and self.context < 1:
            raise ConfigError(f"context={self.context} must be at least 1; leave it out where it is not known")

    def sublayers(self) -> Iterator[SublayerConfig]:
        """The distinct sublayers' configs, from the input up."""
        for part in self.blocks if isinstance(self.blocks, tuple) else (self.blocks,):
            pattern = part.pattern if isinstance(part, Repeat) else part
            for block in pattern if isinstance(pattern, tuple) else (pattern,):
                yield from block.sublayers

    @property
    def depth(self) -> int:
        """Applications of blocks, counted without building one."""
        parts = self.blocks if isinstance(self.blocks, tuple) else (self.blocks,)
        return sum(
            part.n * (len(part.pattern) if isinstance(part.pattern, tuple) else 1) if isinstance(part, Repeat) else 1
            for part in parts
        )

    @property
    def single_stack(self) -> "TransformerConfig":
        """See `ModelConfig`."""
        return self

    @property
    def longest(self) -> int | None:
        """That of the table of positions."""
        return self.embed.max_length

    @property
    def mask_ahead(self) -> Mask | None:
        """The first mask of self-attention that lets a token see one after it: such a model learns to look it up."""
        masks = (part.mask for part in self.sublayers() if isinstance(part, AttentionConfig | LatentAttentionConfig))
        return next((mask for mask in masks if sees_ahead(mask)), None)

    def with_dropout(self, p: float) -> "TransformerConfig":
        """The same with the probability of dropout set, of the embeddings and of every sublayer's update."""
        embed = dataclasses.replace(self.embed, dropout=p)
        return dataclasses.replace(self, embed=embed, blocks=_with_dropout(self.blocks, p))

    def closed(self) -> "TransformerConfig":
        """See `ModelConfig`."""
        return dataclasses.replace(self, embed=self.embed.closed())

    def build(self) -> "Transformer":
        """The model, with fresh weights (none on the meta device)."""
        return Transformer(self)


def _with_dropout(blocks: Any, p: float) -> Any:
    """The same blocks, runs of blocks or tuples of them, with the dropout of every sublayer set."""
    if isinstance(blocks, tuple):
        return tuple(_with_dropout(part, p) for part in blocks)
    if isinstance(blocks, Repeat):
        return dataclasses.replace(blocks, pattern=_with_dropout(blocks.pattern, p))
    assert isinstance(blocks, BlockConfig)
    return dataclasses.replace(blocks, sublayers=tuple(dataclasses.replace(f, dropout=p) for f in blocks.sublayers))


@final
class Transformer(Model):
    """Tokens in, a stack of blocks, a head out. See `TransformerConfig`.

    Attributes:
        config: What it was built from.
        checkpoint_blocks: In training, keep only the stream between blocks and compute the rest again in the backward
            pass (Chen et al. 2016): less memory, a third more time.
    """

    config: TransformerConfig
    head: Head | None
    blocks: nn.ModuleList

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.embed = config.embed.build(config.d_model)
        blocks, self.order = _build_blocks(config)
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = config.final_norm.build(config.d_model) if config.final_norm else nn.Identity()
        self.head = config.head.build(config.d_model, config.embed) if config.head else None
        self._slots = [len(_keepers(block)) for block in blocks]
        self._seating = _seat(blocks)
        if not next(self.parameters()).is_meta:
            self.reset_parameters()

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The distinct masks of self-attention in the stack."""
        return tuple(self._seating.masks)

    @property
    def reads_memory(self) -> bool:
        """Whether there is cross-attention, and `forward` needs a memory."""
        return bool(self._seating.memory_masks)

    def reset_parameters(self) -> None:
        """Draw all weights anew, as `config.init` says."""
        sublayers = [part for block in self.blocks for part in sublayers_of(_block(block))]
        updates = sum(len(sublayers_of(_block(self.blocks[i]))) for i in self.order)
        self.config.init.apply(self, sublayers, max(1, updates))

    def forward(
        self,
        inputs: Tensor,
        tokens: Tokens | None = None,
        *,
        cache: Cache | None = None,
        recorder: Recorder | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, "B T out"]:
        """The outputs of the head for every token: logits (B, T, V) for a language model.

        Args:
            inputs: Token ids (B, T), or what else the embedder takes.
            tokens: Where they stand; None: one full sequence per row, after what the cache holds.
            cache: From `make_cache`; the new tokens are added to it.
            recorder: Handed queries, keys and outputs of every attention.
            memory: What cross-attention reads.

        Raises:
            ConfigError: The input is longer than the position table or the cache.
        """
        x, _ = self.encode(inputs, tokens, cache=cache, recorder=recorder, memory=memory)
        return self.readout(x)

    def encode(
        self,
        inputs: Tensor,
        tokens: Tokens | None = None,
        *,
        cache: Cache | None = None,
        recorder: Recorder | None = None,
        memory: Memory | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        """The stream after the final norm, and what the sublayers report. Arguments as in `forward`."""
        tokens = _place(inputs, tokens, cache)
        self._check_length(tokens, cache)
        if tokens.layout is not Layout.FULL:  # whatever the padding holds: NaN, or an id that is none
            inputs = torch.where(tokens.valid.view(*tokens.shape, *(1,) * (inputs.dim() - 2)), inputs, 0)
        x = self.embed(inputs, tokens)
        ctx = self._context(x, tokens, cache, recorder, memory)
        aux, slot = None, 0
        for i in self.order:
            block = self.blocks[i]
            if cache is not None or recorder is not None:
                ctx = dataclasses.replace(ctx, slot=slot)
            if self.checkpoint_blocks and self.training:
                x, report = checkpoint(block, x, ctx, use_reentrant=False)  # type: ignore[misc]
            else:
                x, report = block(x, ctx)
            aux, slot = merge(aux, report), slot + self._slots[i]
        if cache is not None:
            cache.advance()
        return self.final_norm(x), aux

    def readout(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T out"]:
        """The head's outputs for a stream from `encode`."""
        return x if self.head is None else self.head(x, self.embed.table)

    def loss(
        self, inputs: Tensor, targets: Tensor, tokens: Tokens | None = None, *, scale: float | None = None
    ) -> tuple[Float[Tensor, ""], Aux | None]:
        """`scale` times the head's loss summed over the tokens that have a target, and the sublayers' report.

        Args:
            inputs: As in `forward`.
            targets: The right output for each token; a token id of -100 counts nothing.
            tokens: As in `forward`.
            scale: None: one over the number of tokens with a target, that is, the mean.

        Raises:
            ConfigError: The model has no head.
        """
        if self.head is None:
            raise ConfigError("the model has no head and so no loss; give its config a head, such as LMHead")
        tokens = _place(inputs, tokens, None)
        x, aux = self.encode(inputs, tokens)
        if scale is None:
            scale = 1 / max(1, self.head.count(targets, tokens.valid))
        return self.head.loss(x, self.embed.table, targets, tokens.valid, scale), aux

    def start(
        self, prompts: Sequence[Sequence[int]], *, capacity: int, recorder: Recorder | None = None
    ) -> CachedDecoding:
        """Read prompts, one for each row, and be ready to write on.

        Args:
            prompts: Token ids, at least one each; the lengths may differ.
            capacity: Tokens of the longest text that will be read.
            recorder: Handed queries, keys and outputs of every attention, at each step.

        Raises:
            ConfigError: The model cannot work on texts of that length.
        """
        cache = self.make_cache(len(prompts), capacity, room=max(map(len, prompts)) + ROOM)
        decoding = CachedDecoding(self.encode, self.readout, cache, recorder=recorder)
        decoding.read(prompts)
        return decoding

    def make_cache(self, batch: int, capacity: int, *, rollback: int = 0, room: int | None = None) -> Cache:
        """An empty cache for `batch` rows of at most `capacity` tokens, in the model's type and on its device.

        Args:
            batch: Rows.
            capacity: Tokens of the longest row. Layers whose mask is a window keep no more than the window of them.
            rollback: How many tokens `Cache.rollback` must be able to take back.
            room: For how many tokens there is memory at first; it doubles as they come. None: for all.

        Raises:
            ConfigError: The model cannot work on texts of that length.
        """
        longest = self.config.embed.max_length
        if longest is not None and capacity > longest:
            raise ConfigError(
                f"a cache for {capacity} tokens is longer than the position table of {longest}; make it smaller"
            )
        for position, _ in self._seating.rotations:
            if position.scaling is not None:
                position.scaling.check_cache(capacity)
        weight = next(self.parameters())
        shapes = [part.cache_shape() for i in self.order for part in _keepers(_block(self.blocks[i]))]
        return Cache(shapes, batch, capacity, rollback=rollback, room=room, dtype=weight.dtype, device=weight.device)

    def _context(
        self,
        x: Tensor,
        tokens: Tokens,
        cache: Cache | None = None,
        recorder: Recorder | None = None,
        memory: Memory | None = None,
    ) -> Context:
        keys = {} if cache is None else cache.begin(tokens)
        masks = tuple(_lowered(mask, tokens, keys.get(mask.reach, tokens)) for mask in self._seating.masks)
        longest = tokens.shape[1] + (0 if cache is None else cache.bound)
        rotations = tuple(
            position.rotation(tokens, width, longest, x.dtype) for position, width in self._seating.rotations
        )
        memory_masks = ()
        if memory is not None:
            memory_masks = tuple(lower(mask, tokens, memory.tokens) for mask in self._seating.memory_masks)
        return Context(tokens, masks, rotations, cache, recorder, memory, memory_masks)

    def _check_length(self, tokens: Tokens, cache: Cache | None) -> None:
        longest = self.config.embed.max_length
        n = tokens.shape[1] + (0 if cache is None else cache.bound)
        if longest is None or n <= longest:
            return
        if tokens.layout is Layout.RAGGED:  # documents may be shorter than the row
            n = int(tokens.index.max()) + 1
        if n > longest:
            raise ConfigError(f"the input has {n} tokens and the position table {longest}; give it at most {longest}")


def _lowered(mask: Mask, tokens: Tokens, keys: Tokens) -> LoweredMask:
    return lower(mask, tokens, keys, past=keys is not tokens)


def _place(inputs: Tensor, tokens: Tokens | None, cache: Cache | None) -> Tokens:
    """Where the inputs stand: after what the cache holds, if there is one."""
    if tokens is None:
        start = 0 if cache is None else cache.bound if cache.even else cache.length
        return Tokens.full(inputs.shape[0], inputs.shape[1], start=start, device=inputs.device)
    if tokens.shape != inputs.shape[:2]:
        raise ConfigError(f"tokens are {tokens.shape} and inputs {tuple(inputs.shape[:2])} (B, T); make them equal")
    return tokens if cache is None or cache.bound == 0 else tokens.shifted(cache.length)


def _build_blocks(config: TransformerConfig) -> tuple[list[Block], list[int]]:
    """The distinct blocks, and the order in which they are applied."""
    blocks: list[Block] = []
    order: list[int] = []
    for part in config.blocks if isinstance(config.blocks, tuple) else (config.blocks,):
        repeat = part if isinstance(part, Repeat) else Repeat(n=1, pattern=part)
        pattern = repeat.pattern if isinstance(repeat.pattern, tuple) else (repeat.pattern,)
        first = len(blocks)
        blocks += [block.build(config.d_model) for _ in range(1 if repeat.shared else repeat.n) for block in pattern]
        new = list(range(first, len(blocks)))
        order += new * repeat.n if repeat.shared else new
    return blocks, order


class _Seating(NamedTuple):
    """What the attention layers of a stack share: each distinct thing once."""

    masks: list[Mask]
    memory_masks: list[Mask]
    rotations: list[tuple[RoPEConfig, int]]


def _seat(blocks: list[Block]) -> _Seating:
    """Give every attention layer its seat."""
    found = _Seating([], [], [])
    for block in blocks:
        for slot, part in enumerate(_keepers(block)):
            if isinstance(part, Stateful):
                part.seat = Seat(slot=slot)
                continue
            mask = _index(part.mask, found.memory_masks if part.reads_memory else found.masks)
            rotation = 0 if part.rope is None else _index((part.rope, part.rotated), found.rotations)
            part.seat = Seat(mask, rotation, slot)
    return found


def _index(item: Any, found: list[Any]) -> int:
    """Its place in the list, where it is put if it is not there."""
    if item not in found:
        found.append(item)
    return found.index(item)


def _keepers(block: Block) -> list[Mixer | Stateful]:
    """What has a place in a cache."""
    return [part for part in sublayers_of(block) if isinstance(part, Mixer | Stateful)]


def _block(module: nn.Module) -> Block:
    assert isinstance(module, Block)
    return module
