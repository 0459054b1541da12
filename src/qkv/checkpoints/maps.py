"""Invertible maps between a foreign model's tensors and ours.

A `KeyMap` is a list of `Rule`s. A rule names tensors on both sides; in between come operations, each of which can be
undone bit for bit. So one table serves to load and to export:

    Rule("wte.weight", "embed.weight")
    Rule("h.{}.attn.c_attn.weight", "blocks.{}.qkv.weight", Transpose(), Split((64, 64, 64)), fuse_qkv(...))
"""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias, TypeVar, final

import torch

from qkv.checkpoints.files import give_back
from qkv.errors import ConfigError, FileError
from qkv.nn.ffn import glu_group
from qkv.shapes import Tensor

M = TypeVar("M")
Tensors: TypeAlias = tuple[Tensor, ...]

_MAX_SHARED = 1000  # applications of blocks that share weights; the file of a stranger may ask for any number


class ShapeError(ValueError):
    """A tensor does not fit an operation. `KeyMap` turns it into a `FileError` that names the keys."""


class Operation(ABC):
    """Tensors to tensors, and back to the same bits. Results may be views of the arguments."""

    @abstractmethod
    def forward(self, theirs: Tensors) -> Tensors:
        """From their layout to ours.

        Raises:
            ShapeError: The tensors are not of the shapes or the single dtype that this needs.
        """

    @abstractmethod
    def inverse(self, ours: Tensors) -> Tensors:
        """From our layout to theirs: undoes `forward`, and raises as it does."""


@final
@dataclasses.dataclass(frozen=True)
class Transpose(Operation):
    """Swap the two axes of each tensor (GPT-2 stores its weights as inputs by outputs)."""

    def forward(self, theirs: Tensors) -> Tensors:
        for tensor in theirs:
            if tensor.ndim != 2:
                raise ShapeError(f"found {tuple(tensor.shape)}, needs two axes")
        return tuple(tensor.T for tensor in theirs)

    def inverse(self, ours: Tensors) -> Tensors:
        return self.forward(ours)


@final
@dataclasses.dataclass(frozen=True)
class Flatten(Operation):
    """All axes but the first as one, as of the weight of a convolution; `shape` is theirs without the first."""

    shape: tuple[int, ...]

    def forward(self, theirs: Tensors) -> Tensors:
        for tensor in theirs:
            if tuple(tensor.shape[1:]) != self.shape:
                raise ShapeError(f"found {tuple(tensor.shape)}, needs {self.shape} behind the first")
        return tuple(tensor.flatten(1) for tensor in theirs)

    def inverse(self, ours: Tensors) -> Tensors:
        return tuple(tensor.unflatten(1, self.shape) for tensor in ours)


@final
@dataclasses.dataclass(frozen=True)
class Fuse(Operation):
    """Join the rows of several tensors: `widths` of them, or in turn so many in each of `n_groups` groups."""

    widths: tuple[int, ...]
    n_groups: int = 1

    def forward(self, theirs: Tensors) -> Tensors:
        _expect(theirs, tuple(self.n_groups * width for width in self.widths))
        groups = [tensor.unflatten(0, (self.n_groups, -1)) for tensor in theirs]  # (groups, rows, …)
        return (torch.cat(groups, 1).flatten(0, 1),)

    def inverse(self, ours: Tensors) -> Tensors:
        _expect(ours, (self.n_groups * sum(self.widths),))
        groups = ours[0].unflatten(0, (self.n_groups, -1))  # (groups, rows, …)
        return tuple(part.flatten(0, 1) for part in groups.split(self.widths, 1))


@final
@dataclasses.dataclass(frozen=True)
class Split(Operation):
    """Cut the rows of one tensor into pieces of these `widths`: the inverse of `Fuse`."""

    widths: tuple[int, ...]

    def forward(self, theirs: Tensors) -> Tensors:
        return Fuse(self.widths).inverse(theirs)

    def inverse(self, ours: Tensors) -> Tensors:
        return Fuse(self.widths).forward(ours)


@final
@dataclasses.dataclass(frozen=True)
class Permute(Operation):
    """Reorder the rows of each tensor within blocks of `len(order)`: row i of a block is its row `order[i]`.

    With a head's width as the length this goes from interleaved rotary pairs (0 1, 2 3, …) to halves:
    `Permute((*range(0, K, 2), *range(1, K, 2)))`.
    """

    order: tuple[int, ...]

    def forward(self, theirs: Tensors) -> Tensors:
        for tensor in theirs:
            if tensor.ndim < 1 or tensor.shape[0] % len(self.order):
                raise ShapeError(f"found {tuple(tensor.shape)}, needs a multiple of {len(self.order)} rows")
        return tuple(tensor.unflatten(0, (-1, len(self.order)))[:, self.order].flatten(0, 1) for tensor in theirs)

    def inverse(self, ours: Tensors) -> Tensors:
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return Permute(tuple(back)).forward(ours)


def fuse_qkv(n_heads: int, n_kv_heads: int, head_dim: int, value_dim: int) -> Fuse:
    """Join q, k and v: for each kv head the rows of its group's query heads, of its key head, of its value head.

    Raises:
        ConfigError: `n_heads` is not a multiple of `n_kv_heads`.
    """
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ConfigError(f"n_heads={n_heads} must be a multiple of n_kv_heads={n_kv_heads}")
    return Fuse((n_heads // n_kv_heads * head_dim, head_dim, value_dim), n_kv_heads)


def fuse_glu(d_ff: int) -> Fuse:
    """Join the gate and the values of a GLU."""
    group = glu_group(d_ff)
    return Fuse((group, group), d_ff // group)


@final
class Rule:
    """What some of their tensors are in our model. Without operations: the same tensors under other names.

    Args:
        theirs: A key or several. `{}` in it stands for the layer's number: the rule then holds for every layer.
        ours: Likewise.
        operations: In the order from theirs to ours.
    """

    def __init__(self, theirs: str | tuple[str, ...], ours: str | tuple[str, ...], *operations: Operation):
        self.theirs = (theirs,) if isinstance(theirs, str) else theirs
        self.ours = (ours,) if isinstance(ours, str) else ours
        self.operations = operations
        assert len({"{}" in name for name in (*self.theirs, *self.ours)}) == 1, f"per layer or not: {self.ours}"

    def at_layers(self, n: int) -> "list[Rule]":
        """The rule for each layer, with its number in the keys; the rule itself where it names none."""
        if "{}" not in self.ours[0]:
            return [self]

        def at(names: tuple[str, ...], layer: int) -> tuple[str, ...]:
            return tuple(name.replace("{}", str(layer)) for name in names)

        return [Rule(at(self.theirs, i), at(self.ours, i), *self.operations) for i in range(n)]

    def forward(self, tensors: Tensors) -> Tensors:
        """From the tensors named `theirs` to those named `ours`."""
        for operation in self.operations:
            tensors = operation.forward(tensors)
        return tensors

    def inverse(self, tensors: Tensors) -> Tensors:
        """From the tensors named `ours` to those named `theirs`."""
        for operation in reversed(self.operations):
            tensors = operation.inverse(tensors)
        return tensors


@final
class KeyMap:
    """All the tensors of a model, theirs and ours.

    Args:
        rules: Each key is in one rule only.
        n_layers: The rules with `{}` hold for the layers from 0 to `n_layers - 1`.
        ignore: Their keys that carry nothing, such as the buffer of a causal mask; `{}` is any number.
        unused: Their keys of what the model was trained with and does not have, such as another head.
        zeros: Their keys that may be left out, as of a bias, which then is 0; each with that of a tensor of as many
            rows. They are always written.

    Attributes:
        rules: With those per layer written out for each.
        unused: Those that no rule names after all.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        n_layers: int,
        ignore: Sequence[str] = (),
        unused: Sequence[str] = (),
        zeros: Mapping[str, str] | None = None,
    ):
        self._zeros = dict(zeros or {})
        self.rules = [at for rule in rules for at in rule.at_layers(n_layers)]
        self.unused = {*unused} - {name for rule in self.rules for name in rule.theirs}
        ignore = (*ignore, *self.unused)
        self._ignore = re.compile("|".join(re.escape(key).replace(r"\{\}", r"\d+") for key in ignore) or "$^")
        for side in ([rule.theirs for rule in self.rules], [rule.ours for rule in self.rules]):
            names = [name for names in side for name in names]
            assert len(set(names)) == len(names), "a key is in two rules"

    def to_ours(
        self,
        state: dict[str, Tensor],
        *,
        source: str = "the checkpoint",
        step: Callable[[Rule, Tensors], Tensors] = Rule.forward,
    ) -> dict[str, Tensor]:
        """Our tensors from theirs. `state` is emptied on the way, so that a large model is not in memory twice.

        Args:
            state: By their keys.
            source: What errors call the file or folder.
            step: What to make of the tensors of a rule; for one that does more than the rule says.

        Raises:
            FileError: Keys are missing or left over, or shapes do not fit: all are named.
        """
        steps = [(rule.theirs, rule.ours, partial(step, rule)) for rule in self.rules]
        return _convert(self._known(state), steps, source)

    def to_theirs(self, state: dict[str, Tensor], *, source: str = "the model") -> dict[str, Tensor]:
        """Their tensors from ours: the inverse of `to_ours`. Also empties `state`, and raises as it does."""
        return _convert(state, [(rule.ours, rule.theirs, rule.inverse) for rule in self.rules], source)

    def check(self, state: Mapping[str, Tensor], model: Mapping[str, Tensor], *, source: str) -> None:
        """Check their tensors as `check_fit` does, before any is converted, in their names and shapes."""
        check_fit(self._known(dict(state)), self.to_theirs(dict(model)), source=source)

    def _known(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same dict without what carries nothing, and with the zeros that are left out."""
        for key in [key for key in state if self._ignore.fullmatch(key)]:
            del state[key]
        for key, like in self._zeros.items():
            if key not in state and like in state:
                state[key] = state[like].new_zeros(state[like].shape[:1])
        return state


def check_fit(tensors: Mapping[str, Tensor], model: Mapping[str, Tensor], *, source: str) -> None:
    """Check that tensors are those of a model's `state_dict()`, before any is copied into it.

    Raises:
        FileError: Keys are missing or left over, shapes differ, or integers stand for floats: all are named.
    """
    faults: list[str] = []
    for key, needed in model.items():
        if key not in tensors:
            faults.append(f"lacks {key!r} of shape {tuple(needed.shape)}")
        elif tensors[key].shape != needed.shape:
            found = tuple(tensors[key].shape)
            faults.append(f"{key!r} has shape {found}, the model needs {tuple(needed.shape)}")
        elif needed.is_floating_point() and not tensors[key].is_floating_point():
            faults.append(f"{key!r} is of {tensors[key].dtype}, the model needs floats")
    _refuse(faults + [_left_over(key) for key in tensors if key not in model], source)


def build_empty(build: Callable[[], M], depth: int, n_tensors: int, *, source: str) -> M:
    """A model on the meta device, from a config of a stranger and with weights of so many tensors.

    Layers that share their weights need no tensors of their own, so a thousand are always allowed.

    Raises:
        FileError: It has more layers than its weights can be of, or cannot be built.
    """
    if depth > max(n_tensors, _MAX_SHARED):
        raise FileError(f"{source}: asks for {depth} layers and there are {n_tensors} tensors of weights; fix 'model'")
    try:
        with torch.device("meta"):
            return build()
    except (ConfigError, RuntimeError, TypeError) as error:  # the latter two: sizes beyond what a tensor can have
        raise FileError(f"{source}: the model cannot be built: {str(error).splitlines()[0]}") from None


def _convert(
    state: dict[str, Tensor],
    steps: Sequence[tuple[tuple[str, ...], tuple[str, ...], Callable[[Tensors], Tensors]]],
    source: str,
) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    faults: list[str] = []
    for inputs, outputs, function in steps:
        missing = [key for key in inputs if key not in state]
        tensors = tuple(state.pop(key) for key in inputs if key in state)
        if missing:
            faults += [f"lacks {key!r}" for key in missing]
            continue
        try:
            results = function(tensors)
        except ShapeError as error:
            faults.append(f"{', '.join(map(repr, inputs))}: {error}")
            continue
        made.update(zip(outputs, results, strict=True))
        kept = {tensor.untyped_storage().data_ptr() for tensor in results}
        give_back(tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in kept)
    _refuse(faults + [_left_over(key) for key in state], source)
    return made


_TOLD = 20  # so many faults are told one by one


def _refuse(faults: Sequence[str], source: str) -> None:
    if not faults:
        return
    count = f"{len(faults)} things do not fit: " if len(faults) > 1 else ""
    more = f"; and {len(faults) - _TOLD} more" if len(faults) > _TOLD else ""
    told = "; ".join(faults[:_TOLD])
    raise FileError(f"{source}: {count}{told}{more}; use the config that belongs to these weights")


def _left_over(key: str) -> str:
    return f"{key!a} has no place in the model"


def _expect(tensors: Tensors, rows: tuple[int, ...]) -> None:
    """Each tensor has so many rows, and is otherwise like the first."""
    first = tensors[0]
    for tensor, n in zip(tensors, rows, strict=True):
        if tuple(tensor.shape) != (needed := (n, *first.shape[1:])):
            raise ShapeError(f"found {tuple(tensor.shape)}, needs {needed}")
        if tensor.dtype != first.dtype:  # torch.cat would promote, and the way back would not give the same bits
            raise ShapeError(f"found {tensor.dtype} beside {first.dtype}, needs one dtype")
