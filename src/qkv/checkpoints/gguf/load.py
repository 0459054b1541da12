"""Models from GGUF files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from qkv.checkpoints.families import FAMILIES
from qkv.checkpoints.files import give_back
from qkv.checkpoints.gguf.blocks import INT4, expand, int4_groups
from qkv.checkpoints.gguf.kinds import KINDS
from qkv.checkpoints.gguf.names import HuggingFace, to_huggingface
from qkv.checkpoints.gguf.reader import read_gguf
from qkv.checkpoints.maps import KeyMap, Rule, ShapeError, Tensors, build_empty, check_fit
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.nn.quantised import HalfLinear, Int4Linear, Packed
from qkv.ops.int4 import Groups, pack_parts, parts_of
from qkv.shapes import Tensor


@final
@dataclass(frozen=True)
class Opened:
    """A file whose weights still lie as they are stored.

    Attributes:
        path: Where it is.
        metadata: All of the file's, the vocabulary included.
        config: Of the model.
        keys: From `huggingface.state` to the model's tensors.
        huggingface: The tensors and their kinds.
    """

    path: Path
    metadata: dict[str, Any]
    config: TransformerConfig
    keys: KeyMap
    huggingface: HuggingFace

    @property
    def has_blocks(self) -> bool:
        """Whether some of its numbers are quantised."""
        return not all(KINDS[kind].dtype for kind in self.huggingface.kinds.values())


def open_gguf(path: Path) -> Opened:
    """The config of a GGUF file's model, and its weights as they are stored: mapped, blocks as rows of bytes.

    Raises:
        FileError: The file breaks a rule of the format, or holds what qkv does not know.
    """
    file = read_gguf(path)
    made = to_huggingface(file)
    family = FAMILIES[made.config["model_type"]]
    config = family.parse(made.config, str(path))
    return Opened(path, file.metadata, config, family.keys(config), made)


def load_gguf(source: Path | Opened, *, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a GGUF file, on the CPU.

    Its tensors are made one by one, some rows at a time: little more is in memory than what is kept.

    Args:
        source: The file. One that is open already is emptied of its weights.
        dtype: Type of all weights; those stored in it stay memory-mapped. None: four-bit weights stay packed, other
            matrices become float16 and the rest float32 (a file without blocks keeps its own types). PyTorch has no
            product for the blocks of Q8_0, Q6_K, Q5_0 and Q5_1, and ours none for a fused projection whose parts are
            of different kinds: those are the others.

    Raises:
        FileError: As `open_gguf`, or the weights do not fit the config.
    """
    opened = source if isinstance(source, Opened) else open_gguf(source)
    kinds, name = opened.huggingface.kinds, str(opened.path)
    model = build_empty(opened.config.build, opened.config.depth, len(opened.huggingface.state), source=name)
    packing = _Packing(model, kinds) if dtype is None and opened.has_blocks else None

    def step(rule: Rule, tensors: Tensors) -> Tensors:
        return packing.step(rule, tensors) if packing else rule.forward(_expanded(rule, tensors, kinds, dtype))

    ours = opened.keys.to_ours(opened.huggingface.state, source=name, step=step)
    if packing:
        ours = {name: tensor for name, tensor in ours.items() if name not in packing.names}
    check_fit(ours, {name: tensor for name, tensor in model.state_dict().items() if tensor.is_meta}, source=name)
    model.load_state_dict(ours, assign=True, strict=False)
    return model.requires_grad_(packing is None).eval()


@final
class _Packing:
    """Puts packed matrices into a model: four bits where they have them, else float16.

    Args:
        model: On the meta device; the modules in question are replaced.
        kinds: Of the file's tensors.
    """

    def __init__(self, model: Transformer, kinds: Mapping[str, str]) -> None:
        self.model, self.kinds = model, kinds
        linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        self.names = linear | {"embed.weight", "head.weight"}

    def step(self, rule: Rule, tensors: Tensors) -> Tensors:
        """What `KeyMap.to_ours` does for a rule; a matrix is in the model then."""
        (name,) = rule.ours  # of all families
        if name not in self.names:
            return rule.forward(_expanded(rule, tensors, self.kinds, torch.float32))
        path = name.removesuffix(".weight")
        owner, used = self.model.get_submodule(path), {self.kinds[key] for key in rule.theirs}
        if isinstance(owner, nn.Linear):
            four = len(used) == 1 and used <= INT4
            made = _four(rule, tensors, used.pop(), owner) if four else self._half(rule, tensors, owner, owner.bias)
            above, _, last = path.rpartition(".")
            setattr(self.model.get_submodule(above), last, made)
        else:
            made = self._half(rule, tensors, owner, None)
            del owner.weight
            owner.weight = made
        assert isinstance(made.weight, Tensor)
        return (made.weight,)

    def _half(self, rule: Rule, tensors: Tensors, owner: nn.Module, bias: Tensor | None) -> Packed:
        (weight,) = rule.forward(_expanded(rule, tensors, self.kinds, torch.float16))
        _check(weight.shape, owner)
        return HalfLinear(weight, bias)


def _four(rule: Rule, tensors: Tensors, kind: str, owner: nn.Linear) -> Packed:
    rows, columns = owner.weight.shape
    if sum(tensor.nbytes for tensor in tensors) != KINDS[kind].nbytes((rows, columns)):
        # Said before anything of the size that the model asks for is made.
        _check(KINDS[kind].shape(rule.forward(tensors)[0].shape), owner)

    def groups() -> Iterator[Groups]:
        (weight,) = rule.forward(tensors)  # after what is kept, and gone before the next: it leaves no hole
        _check(KINDS[kind].shape(weight.shape), owner)
        for part in _in_turn(weight, parts_of(rows, columns)):
            codes, scale, zero = int4_groups(part, kind)
            if not (scale.isfinite().all() and zero.isfinite().all()):
                raise ShapeError("found scales that are not finite, needs finite ones")
            yield codes, scale, zero

    return Int4Linear(pack_parts(groups(), rows, columns), rows, columns, owner.bias)


def _check(shape: Sequence[int], owner: nn.Module) -> None:
    assert isinstance(owner.weight, Tensor)
    if tuple(shape) != (needed := tuple(owner.weight.shape)):
        raise ShapeError(f"found {tuple(shape)}, needs {needed}")


def _expanded(rule: Rule, tensors: Tensors, kinds: Mapping[str, str], dtype: torch.dtype | None) -> Tensors:
    """The numbers of a rule's tensors in another type; None: their own."""
    named = zip(rule.theirs, tensors, strict=True)
    return tuple(_expanded_one(tensor, kinds[key], dtype or tensor.dtype) for key, tensor in named)


_PART = 1 << 20
"""Bytes of a file at a time."""


def _expanded_one(tensor: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    turned = tensor.ndim == 2 and tensor.stride(1) != 1  # GPT-2's blocks are a transposed view of rows of bytes
    rows = tensor.T if turned else tensor
    made = torch.empty(KINDS[kind].shape(rows.shape), dtype=dtype)
    step, at = max(1, _PART // rows[0].nbytes), 0
    for part in _in_turn(rows, (slice(a, a + step) for a in range(0, len(rows), step))):
        made[at : at + step] = expand(part, kind, dtype)
        if not torch.stack(torch.aminmax(made[at : at + step])).isfinite().all():  # a NaN is both
            raise ShapeError(f"found numbers that are not finite in {dtype}, needs finite ones")
        at += step
    return made.T if turned else made


def _in_turn(rows: Tensor, parts: Iterable[slice]) -> Iterator[Tensor]:
    """Some rows of a tensor after the other, each given back to the system when the next is asked for."""
    for part in parts:
        yield rows[part]
        give_back((rows[part],))
