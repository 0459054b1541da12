"""A stack of blocks over one stream: what a Transformer, an encoder and a decoder have in common."""

from collections.abc import Iterator
from typing import Annotated, Any, final

from torch import nn
from torch.utils.checkpoint import checkpoint

from qkv.caches import Cache
from qkv.config import Config, config, must
from qkv.context import Context, Memory
from qkv.errors import ConfigError
from qkv.lowered import lower
from qkv.masks import Mask, sees_ahead
from qkv.models.init import InitConfig
from qkv.nn.blocks import Block, BlockConfig, sublayers_of
from qkv.nn.mixer import AttentionLayer, Mixer, Seat
from qkv.nn.norms import NormConfig
from qkv.nn.positions import RotaryConfig
from qkv.nn.sublayer import Aux, Sublayer, SublayerConfig, merge
from qkv.recorder import Recorder
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


@final
@config
class Repeat(Config):
    """A pattern of blocks, `n` times over.

    Attributes:
        n: How often.
        pattern: One block, or several in turn.
        shared: Whether all rounds use the same weights (Lan et al. 2020, ALBERT, section 3.1).
    """

    n: Annotated[int, must("be from 0 to 100000", lambda n: 0 <= n <= 100_000)]
    pattern: BlockConfig | tuple[BlockConfig, ...]
    shared: bool = False

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The pattern as a tuple."""
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)


Blocks = BlockConfig | Repeat | tuple[BlockConfig | Repeat, ...]
"""The blocks of a stack in a config, from the input up."""


def runs(blocks: Blocks) -> Iterator[Repeat]:
    """The same as repeated patterns, from the input up; a block that stands alone is a pattern once."""
    for part in blocks if isinstance(blocks, tuple) else (blocks,):
        yield part if isinstance(part, Repeat) else Repeat(n=1, pattern=part)


def sublayers(blocks: Blocks) -> Iterator[SublayerConfig]:
    """The sublayers of all patterns, from the input up, each pattern once."""
    return (part for run in runs(blocks) for block in run.blocks for part in block.sublayers)


def depth(blocks: Blocks) -> int:
    """Applications of blocks, counted without building one."""
    return sum(run.n * len(run.blocks) for run in runs(blocks))


def mask_ahead(blocks: Blocks) -> Mask | None:
    """The first mask that lets a token see one after it; None: there is none."""
    masks = (part.stream_mask for part in sublayers(blocks))
    return next((mask for mask in masks if mask is not None and sees_ahead(mask)), None)


class Stack(nn.Module):
    """Blocks that update one stream, and the norm after the last of them.

    It gives each of its layers a seat, lowers each distinct mask and computes each distinct rotation once per forward
    pass, and knows the layout of a cache.

    Attributes:
        blocks: The distinct blocks.
        order: The index of the block of each application.
        masks: The distinct masks of self-attention.
        final_norm: The norm after the last block.
        embed: What makes the stream that goes in, for a stack that has it among its weights; `run` does not call it.
        checkpoint_blocks: In training, keep only the stream between blocks and compute the rest again in the backward
            pass (Chen et al. 2016): less memory, a third more time.
    """

    blocks: Any  # a ModuleList does not know the type of its items

    def __init__(
        self, d_model: int, blocks: Blocks, final_norm: NormConfig | None = None, *, embed: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.checkpoint_blocks = False
        self.embed = embed
        self.blocks, self.order = nn.ModuleList(), list[int]()
        for run in runs(blocks):
            first = len(self.blocks)
            self.blocks += [block.build(d_model) for _ in range(1 if run.shared else run.n) for block in run.blocks]
            self.order += [*range(first, len(self.blocks))] * (run.n if run.shared else 1)
        self.final_norm = nn.Identity() if final_norm is None else final_norm.build(d_model)
        self.masks, self._memory_masks = list[Mask](), list[Mask]()
        self._rotations = list[tuple[RotaryConfig, int]]()
        self._slots = [self._seat(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]

    def _seat(self, path: str, block: Block) -> int:
        """Give every layer of a block that needs one its seat; returns how many have a slot."""
        mixers = {name: part for name, part in block.sublayers.items() if isinstance(part, Mixer)}
        for slot, (name, part) in enumerate(mixers.items()):
            mask = rotation = 0
            if isinstance(part, AttentionLayer):
                mask = _index(part.mask, self._memory_masks if part.reads_memory else self.masks)
                rotation = 0 if part.rope is None else _index((part.rope, part.rotated), self._rotations)
            part.seat = Seat(mask, rotation, slot, f"{path}.{name}")
        return len(mixers)

    @property
    def reads_memory(self) -> bool:
        """Whether there is cross-attention, so that a memory is needed."""
        return bool(self._memory_masks)

    @property
    def rotates_by_length(self) -> bool:
        """Whether a token's rotation may depend on the length of its text."""
        return any(position.by_length for position, _ in self._rotations)

    def keeps(self, before: int, after: int) -> bool:
        """Whether a cache of a text of `before` tokens is right for the same text when it has grown to `after`."""
        return before == 0 or all(position.keeps(before, after) for position, _ in self._rotations)

    def applications(self) -> Iterator[tuple[str, Sublayer]]:
        """Each application of a sublayer in the order in which they act, named as in `Aux`: `blocks.3.attention`."""
        for i in self.order:
            for name, part in self.blocks[i].sublayers.items():
                yield f"blocks.{i}.{name}", part

    def keepers(self) -> list[tuple[str, Mixer]]:
        """The applications that have a slot in a cache, in the order of the slots."""
        return [(name, part) for name, part in self.applications() if isinstance(part, Mixer)]

    def draw(self, init: InitConfig, seed: int, prefix: str = "") -> None:
        """Draw all weights anew, also those that a subclass adds; `seed` and `prefix` as for `InitConfig.apply`."""
        distinct = [part for block in self.blocks for part in sublayers_of(block)]
        init.apply(self, distinct, max(1, sum(1 for _ in self.applications())), seed, prefix)

    def run(
        self,
        x: Float[Tensor, "B T D"],
        tokens: Tokens,
        *,
        cache: Cache | None = None,
        recorder: Recorder | None = None,
        memory: Memory | Float[Tensor, "B S M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        """The stream after the final norm, and what the sublayers report.

        Args:
            x: The stream that the first block sees.
            tokens: Where its tokens stand.
            cache: From `make_cache`; the new tokens are added to it.
            recorder: Handed queries, keys and outputs of every attention.
            memory: What cross-attention reads; vectors alone are one full sequence per row.
        """
        ctx = self.context(x, tokens, cache=cache, recorder=recorder, memory=memory)
        aux, slot = None, 0
        for i in self.order:
            block = self.blocks[i]
            if cache is not None:
                ctx = ctx.at(slot)
            if self.checkpoint_blocks and self.training:
                x, report = checkpoint(block, x, ctx, use_reentrant=False)  # type: ignore[misc]
            else:
                x, report = block(x, ctx)
            if report is not None:
                aux = merge(aux, report.under(f"blocks.{i}"))
            slot += self._slots[i]
        if cache is not None:
            cache.advance()
        return self.final_norm(x), aux

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
        weight = next(self.parameters())
        shapes = [part.cache_shape() for _, part in self.keepers()]
        return Cache(shapes, batch, capacity, rollback=rollback, room=room, dtype=weight.dtype, device=weight.device)

    def context(
        self,
        x: Float[Tensor, "B T D"],
        tokens: Tokens,
        *,
        cache: Cache | None = None,
        recorder: Recorder | None = None,
        memory: Memory | Float[Tensor, "B S M"] | None = None,
    ) -> Context:
        """What the blocks read besides the stream. Arguments as in `run`."""
        keys = {} if cache is None else cache.begin(tokens)
        seen = [keys.get(mask.reach, tokens) for mask in self.masks]
        masks = tuple(lower(mask, tokens, k, past=k is not tokens) for mask, k in zip(self.masks, seen, strict=True))
        if cache is not None and self.rotates_by_length:
            grown = zip(cache.length.tolist(), tokens.valid.sum(1).tolist(), strict=True)
            if any(not self.keeps(before, before + new) for before, new in grown):
                raise ConfigError(
                    "the text grows past a length from which on all of its tokens are rotated anew; read it whole into "
                    "an empty cache, or use `start`, which does so"
                )
        rotations = tuple(position.rotation(tokens, width, x.dtype) for position, width in self._rotations)
        memory_masks, memory = (), Memory.of(memory)
        if memory is not None:
            memory_masks = tuple(lower(mask, tokens, memory.tokens) for mask in self._memory_masks)
        return Context(tokens, masks, rotations, cache, recorder, memory, memory_masks)


def _index(item: Any, found: list[Any]) -> int:
    """Its place in the list, where it is put if it is not there."""
    if item not in found:
        found.append(item)
    return found.index(item)
