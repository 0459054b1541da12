"""The one legend of axis letters, used in signatures (checked in tests) and in einsum strings.

B batch            T query tokens        S key tokens          D d_model
H query heads      G kv heads            K head_dim            P position coordinates
F d_ff             E experts             V vocabulary
"""

from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Integer", "Shaped", "Tensor"]
