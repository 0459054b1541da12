"""What a sublayer may read besides the residual stream. Nothing is ever written into it: results are returned."""

from dataclasses import dataclass

from qkv.caches import Cache
from qkv.lowered import LoweredMask
from qkv.ops.rotary import Rotation
from qkv.recorder import Recorder
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


@dataclass(frozen=True)
class Memory:
    """What cross-attention reads: vectors, and where their tokens stand."""

    x: Float[Tensor, "B S M"]
    tokens: Tokens


@dataclass(frozen=True)
class Context:
    """Made once per forward pass by the stack, and handed to every block.

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

    tokens: Tokens
    masks: tuple[LoweredMask, ...]
    rotations: tuple[Rotation, ...] = ()
    cache: Cache | None = None
    recorder: Recorder | None = None
    memory: Memory | None = None
    memory_masks: tuple[LoweredMask, ...] = ()
    slot: int = 0
