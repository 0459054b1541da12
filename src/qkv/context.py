"""What a sublayer may read besides the residual stream. Nothing is ever written into it: results are returned."""

from dataclasses import dataclass

from qkv.caches import Cache
from qkv.masks import LoweredMask
from qkv.ops.rotary import Rotation
from qkv.recorder import Recorder
from qkv.tokens import Tokens


@dataclass(frozen=True)
class Context:
    """Made once per forward pass by the stack, and handed to every block.

    Attributes:
        tokens: Where the tokens of the stream stand.
        masks: Each distinct mask of the stack, lowered once; a layer holds an index into it.
        rotations: Each distinct rotary embedding of the stack, its phases computed once; a layer holds an index.
        cache: What earlier calls have seen, while decoding.
        recorder: Who looks inside, if anyone.
        slot: How many applications of attention came before this block; a shared layer that is applied twelve times
            has twelve slots.
    """

    tokens: Tokens
    masks: tuple[LoweredMask, ...]
    rotations: tuple[Rotation, ...] = ()
    cache: Cache | None = None
    recorder: Recorder | None = None
    slot: int = 0
