"""What the next steps need, made in a thread while the model works."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Generic, TypeVar, final

T = TypeVar("T")

_STEPS: Final = 2


@final
class Ahead(Generic[T]):
    """Makes what is asked for next while what was asked for is used. Its thread ends with it.

    One is enough: decoding, resizing and arrays leave the interpreter to others while they work.

    Args:
        make: What there is for a step, a function of its number alone.
        end: The number behind that of the last step.
    """

    def __init__(self, make: Callable[[int], T], end: int) -> None:
        self._make, self._end = make, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qkv-ahead")
        self._made: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        """What there is for this step. An error in making it is raised here."""
        wanted = range(step, min(step + 1 + _STEPS, max(self._end, step + 1)))
        self._made = {i: self._made.get(i) or self._thread.submit(self._make, i) for i in wanted}
        return self._made.pop(step).result()
