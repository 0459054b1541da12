"""What a sublayer may read besides the residual stream. Nothing is ever written into it: results are returned."""

from dataclasses import dataclass
from typing import Final, final

from qkv.caches import Cache
from qkv.errors import ConfigError
from qkv.lowered import LoweredMask
from qkv.ops.rotary import Rotation
from qkv.recorder import Recorder
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens, placed


@dataclass(frozen=True)
class Memory:
    """What cross-attention reads: vectors, and where their tokens stand."""

    x: Float[Tensor, "B S M"]
    tokens: Tokens

    @staticmethod
    def of(memory: "Memory | Float[Tensor, 'B S M'] | None") -> "Memory | None":
        """The same; vectors alone are one full sequence per row.

        Raises:
            ConfigError: It is of another kind.
        """
        if memory is None or isinstance(memory, Memory):
            return memory
        shape = tuple(getattr(memory, "shape", ()))
        if len(shape) != 3:
            raise ConfigError(f"memory is {shape or type(memory).__name__}; give vectors (B, S, M), or a Memory")
        return Memory(memory, placed(memory, None))


@final
class Context:
    """Made once per forward pass by the stack, and handed to every block.

    Not a dataclass: FSDP2 copies those before each block, rounds their rotary phases to the type of its weights, and
    has each copy of a lowered mask compute its tiles again.

    Attributes:
        tokens: Where the tokens of the stream stand.
        masks: Each distinct mask of the stack, lowered once; a layer holds an index into it.
        rotations: Each distinct rotary embedding of the stack, its phases computed once; a layer holds an index.
        cache: What earlier calls have seen, while decoding.
        recorder: Who looks inside, if anyone.
        memory: What cross-attention reads.
        memory_masks: Each distinct mask of cross-attention, lowered once.
        slot: How many applications of attention came before this block; a shared layer that is applied twelve times
            has twelve slots.
    """

    def __init__(
        self,
        tokens: Tokens,
        masks: tuple[LoweredMask, ...],
        rotations: tuple[Rotation, ...] = (),
        cache: Cache | None = None,
        recorder: Recorder | None = None,
        memory: Memory | None = None,
        memory_masks: tuple[LoweredMask, ...] = (),
        slot: int = 0,
    ) -> None:
        self.tokens: Final = tokens
        self.masks: Final = masks
        self.rotations: Final = rotations
        self.cache: Final = cache
        self.recorder: Final = recorder
        self.memory: Final = memory
        self.memory_masks: Final = memory_masks
        self.slot: Final = slot

    def at(self, slot: int) -> "Context":
        """The same for the block whose first application of attention is number `slot`."""
        of_attention = self.cache, self.recorder, self.memory, self.memory_masks
        return Context(self.tokens, self.masks, self.rotations, *of_attention, slot)
