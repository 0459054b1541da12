"""Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

Which of their modules holds which rows of our fused projections follows from the family's map of keys: the numbers of
our rows are sent through it. So a family that can be exported needs nothing of its own here.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final, get_args

import torch
from torch import nn

from qkv.checkpoints.families import Family
from qkv.checkpoints.families.config_reader import ConfigReader
from qkv.checkpoints.files import read_json
from qkv.checkpoints.tensors import read_tensors, write_tensors
from qkv.disk import write_whole, writing
from qkv.errors import FileError
from qkv.models.transformer import TransformerConfig
from qkv.nn.adapters import LoRAConfig, Target
from qkv.nn.sublayer import Sublayer
from qkv.shapes import Float, Int, Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
)  # fmt: skip
"""What does not change the function, or only says which modules have tensors, as the tensors themselves do."""
_ONLY = {
    "bias": "none", "loftq_config": {}, "lora_bias": False, "peft_type": "LORA", "use_dora": False, "use_qalora": False,
} | dict.fromkeys(
    ("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication",
     "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters",
     "trainable_token_indices", "use_bdlora", "velora_config")
)  # fmt: skip
"""Settings of which we know one value."""
_BEYOND = "which qkv reads none of; merge it with PEFT (`merge_and_unload`), save the model, and give that"
_INITS = (True, False, "gaussian", "orthogonal")  # the others change the weights of the base as well


@final
class Adapter(NamedTuple):
    """Adapters without their model; the weights are named as `qkv.nn.adapters.adapter_state` does."""

    config: LoRAConfig
    state: dict[str, Tensor]


def read_adapter(folder: Path, family: Family, model: TransformerConfig) -> Adapter:
    """Adapters from a PEFT folder, for `add_adapters` and `load_adapters`.

    One module of theirs may hold several slices of ours (GPT-2's `c_attn`): each gets a copy of its A. Modules of a
    smaller rank are filled up with zeros.

    Args:
        folder: With the two files.
        family: Of the model.
        model: What the adapters belong to.

    Raises:
        FileError: A setting changes the function in a way that we do not compute, or a tensor does not fit.
    """
    settings, source = _Settings.read(folder / CONFIG), folder / WEIGHTS
    tensors, modules = read_tensors(source), list(_modules(family, model))
    found = {i: pair for i, module in enumerate(modules) if (pair := settings.take(tensors, module, source))}
    if tensors:
        keys = family.head, "lm_head.weight", family.table
        ends = tuple(f"{_PREFIX}{key.removesuffix('weight')}" for key in keys if key)
        reason = "is no adapter of a projection of this model; use the model it is for"
        if min(tensors).startswith(ends):
            reason = f"adapts the head or the embedding table, {_BEYOND}"
        raise FileError(f"{source}: {min(tensors)!a} {reason}")
    if not found:
        raise FileError(f"{source}: holds no adapters; give a folder of PEFT's")
    settings.check_targets({module.theirs: i in found for i, module in enumerate(modules)}, source)
    rank = max(len(pair.a) for pair in found.values())
    targets = tuple(name for name in get_args(Target) if any(name in modules[i].slices for i in found))
    state: dict[str, Tensor] = {}
    for i, module in enumerate(modules):
        for name, place in module.slices.items():
            if name in targets:
                a, b = _padded(found.get(i), place, rank, module.width)
                state |= {f"{module.ours}.lora_a.{name}": a, f"{module.ours}.lora_b.{name}": b}
    alpha = settings.strength() * rank
    return Adapter(LoRAConfig(rank=rank, alpha=alpha, dropout=settings.dropout, targets=targets), state)


def _padded(pair: "_Pair | None", rows: Int[Tensor, " rows"], rank: int, width: int) -> tuple[Tensor, Tensor]:
    """A and B of a slice, filled up with zeros; zeros alone for a layer without adapters."""
    like = torch.empty(0) if pair is None else pair.a
    a, b = like.new_zeros(rank, width), like.new_zeros(len(rows), rank)
    if pair is not None:
        a[: len(pair.a)], b[:, : len(pair.a)] = pair.a, pair.b[rows] * pair.scale
    return a, b


def write_adapter(folder: Path, adapter: Adapter, family: Family, model: TransformerConfig, *, base: str) -> None:
    """Write a PEFT folder.

    Where one module of theirs holds several slices of ours, it gets the rank of all together.

    Args:
        folder: Made if it is not there.
        adapter: From `read_adapter`, or a run's config and weights.
        family: Of the model.
        model: What the adapters belong to.
        base: Path or name under which a reader finds the model.

    Raises:
        FileError: The folder cannot be written.
    """
    modules = list(_modules(family, model))
    slices = [[name for name in module.slices if f"{module.ours}.lora_a.{name}" in adapter.state] for module in modules]
    adapted = [(module, names) for module, names in zip(modules, slices, strict=True) if names]
    tensors: dict[str, Tensor] = {}
    for module, names in adapted:
        a, b = _joined(module, names, adapter)
        tensors |= {f"{_PREFIX}{module.theirs}.lora_A.weight": a, f"{_PREFIX}{module.theirs}.lora_B.weight": b}
    # PEFT finds modules by the endings of their names: one word where that is enough.
    mixed = {_ending(module.theirs, 1) for module, names in zip(modules, slices, strict=True) if not names}
    endings = {_ending(module.theirs, 2 if _ending(module.theirs, 1) in mixed else 1) for module, _ in adapted}
    several = {_ending(module.theirs, 1): len(names) for module, names in adapted if len(names) > 1}
    config = adapter.config
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "target_modules": sorted(endings),
        "fan_in_fan_out": any(module.transposed for module, _ in adapted),
        "rank_pattern": {name: config.rank * n for name, n in several.items()},
        "alpha_pattern": {name: config.alpha * n for name, n in several.items()},
    }  # fmt: skip
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        write_whole(folder / CONFIG, [json.dumps(settings, indent=2).encode()])


def _joined(module: "_Module", names: list[str], adapter: Adapter) -> tuple[Tensor, Tensor]:
    """One A and one B for several slices: each has its rows of A, and its block of B."""
    a, b = ([adapter.state[f"{module.ours}.lora_{letter}.{name}"] for name in names] for letter in "ab")
    whole = b[0].new_zeros(len(module.rows), sum(part.shape[1] for part in b))
    for i, (name, part) in enumerate(zip(names, b, strict=True)):
        whole[module.slices[name], i * part.shape[1] : (i + 1) * part.shape[1]] = part
    return torch.cat(a), whole


# --- their modules and our slices -------------------------------------------------------------------------------------


class _Module(NamedTuple):
    """One of their projections, whose rows are some of those of ours."""

    theirs: str
    ours: str
    rows: Int[Tensor, " rows"]  # for each of its rows, the row of ours
    slices: dict[str, Int[Tensor, " places"]]  # for each slice of ours that it holds, the places among its own rows
    width: int  # of its input
    transposed: bool  # whether its weight is stored inputs by outputs


def _modules(family: Family, config: TransformerConfig) -> Iterator[_Module]:
    with torch.device("meta"):
        model = config.build()
    ours = {
        f"{path}.{name}": (part.get_submodule(name), slices)
        for path, part in model.named_modules()
        if isinstance(part, Sublayer)
        for name, slices in part.slices().items()
    }
    for rule in family.keys(config).rules:
        path = rule.ours[0].removesuffix(".weight")
        if path not in ours or not rule.ours[0].endswith(".weight"):
            continue
        projection, slices = ours[path]
        assert isinstance(projection, nn.Linear)
        numbers = rule.inverse((torch.arange(projection.out_features)[:, None],))  # as if its input had width 1
        for theirs, number in zip(rule.theirs, numbers, strict=True):
            rows = number.flatten()
            held = {name: place for name, part in slices.items() if (place := _places(part, rows)) is not None}
            transposed = number.shape[0] == 1
            yield _Module(theirs.removesuffix(".weight"), path, rows, held, projection.in_features, transposed)


def _places(part: Int[Tensor, " rows"], rows: Int[Tensor, " n"]) -> Int[Tensor, " rows"] | None:
    """Where the rows of a slice stand among others; None where they are not there."""
    place = torch.full((int(max(part.max(), rows.max())) + 1,), -1)
    place[rows] = torch.arange(len(rows))
    found = place[part]
    return found if bool((found >= 0).all()) else None


def _ending(name: str, n: int) -> str:
    return ".".join(name.split(".")[-n:])


# --- reading ----------------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """A and B of one module."""

    a: Float[Tensor, "r in"]
    b: Float[Tensor, "rows r"]
    scale: float  # of B A, as a share of what the settings say for all


class _Settings(NamedTuple):
    """What `adapter_config.json` says that we compute."""

    rank: int
    alpha: float
    dropout: float
    ranks: dict[str, Any]
    alphas: dict[str, Any]
    by_root: bool
    targets: list[Any] | None
    everywhere: bool  # whether `targets` hold for all layers

    @classmethod
    def read(cls, path: Path) -> "_Settings":
        source = ConfigReader(read_json(path), str(path))
        for key, value in _ONLY.items():
            source.require(key, value)
        if whole := source.take("modules_to_save", list, []):
            raise FileError(f"{path}: 'modules_to_save' is {whole!r}, whole weights beside the adapters, {_BEYOND}")
        if (init := source.take("init_lora_weights", object, True)) not in _INITS:
            reason = "which also changed the base; convert it to plain LoRA with PEFT first"
            raise FileError(f"{path}: 'init_lora_weights' is {init!r}, {reason}")
        settings = cls(
            source.take_positive("r", 8),
            source.take_factor("lora_alpha", 8.0),
            source.take("lora_dropout", float, 0.0),
            source.take("rank_pattern", dict, {}),
            source.take("alpha_pattern", dict, {}),
            source.take("use_rslora", bool, False),
            targets if isinstance(targets := source.optional("target_modules", object), list) else None,
            not source.optional("layers_to_transform", object) and not source.optional("exclude_modules", object),
        )
        source.finish(*_HARMLESS)
        for key, value in (*settings.ranks.items(), *settings.alphas.items()):
            if not re.fullmatch(r"\w[\w.]*", key) or type(value) not in (int, float) or not 0 < value < math.inf:
                reason = "is not the end of a name and a number; fix it"
                raise FileError(f"{path}: the pattern {key!a}: {value!r} {reason}")
        if not 0 <= settings.dropout < 1:
            raise FileError(f"{path}: 'lora_dropout' is {settings.dropout} and must be from 0 to below 1; fix it")
        return settings

    def check_targets(self, adapted: Mapping[str, bool], source: Path) -> None:
        """The modules that have tensors are those that 'target_modules' lists, since PEFT passes over the others."""
        for name, there in adapted.items() if self.targets is not None else ():
            listed = any(f".{name}".endswith(f".{target}") for target in self.targets or ())
            if (there and not listed) or (listed and not there and self.everywhere):
                reason = "has an adapter and is not in" if there else "has no adapter and is in"
                raise FileError(f"{source}: {name!r} {reason} 'target_modules' of {CONFIG}; use files of one adapter")

    def strength(self, name: str = "") -> float:
        """What B A of a module is multiplied with."""
        rank = self.rank_of(name)
        return _matching(self.alphas, name, self.alpha) / (math.sqrt(rank) if self.by_root else rank)

    def rank_of(self, name: str) -> int:
        return int(_matching(self.ranks, name, self.rank))

    def take(self, tensors: dict[str, Tensor], module: _Module, source: Path) -> _Pair | None:
        """The tensors of a module, out of all; None where it has none."""
        keys = [f"{_PREFIX}{module.theirs}.lora_{letter}.weight" for letter in "AB"]
        a, b = (tensors.pop(key, None) for key in keys)
        if a is None and b is None:
            return None
        rank = self.rank_of(module.theirs)
        for key, tensor, shape in zip(keys, (a, b), ((rank, module.width), (len(module.rows), rank)), strict=True):
            if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)} of {tensor.dtype}"
                raise FileError(f"{source}: {key!r} {found}, the model needs floats {shape}; use the model it is for")
        assert a is not None
        assert b is not None
        return _Pair(a, b, self.strength(module.theirs) / self.strength())


def _matching(pattern: dict[str, Any], name: str, default: float) -> float:
    """The value for a module: that of the first key with which its name ends."""
    return next((value for key, value in pattern.items() if f".{name}".endswith(f".{key}")), default)
