"""Rotary embedding in Hugging Face's configs, in and out.

The newer layout is one dict, `rope_parameters`; the older one has `rope_theta` beside a dict `rope_scaling`. Both are
read. The older one is written, since every loader reads it.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qkv.checkpoints.families.config_reader import ConfigReader
from qkv.errors import ConfigError, FileError
from qkv.nn.positions import (
    AttentionPositionConfig,
    DynamicNTKScalingConfig,
    LinearScalingConfig,
    Llama3ScalingConfig,
    LongRoPEScalingConfig,
    RoPEConfig,
    RoPEScalingConfig,
    YaRNScalingConfig,
)


@dataclass(frozen=True)
class RopeKeys:
    """What a family calls the parts of its rotary embedding, and what it takes where they are left out.

    Attributes:
        theta: The key of the base outside of `rope_parameters`.
        base: The base where none is given.
        fraction: The key of the share of a head that is rotated; None: the family rotates whole heads.
        share: That share where none is given.
        aliases: Further names that newer files have for the same values.
        original: The context before LongRoPE, where the config's own key for it does not give it; such a family knows
            no other scaling. None: it has no such key, and the dict gives it.
        stretched: Whether `max_position_embeddings` counts texts after linear scaling; else those before it.
    """

    theta: str = "rope_theta"
    base: float = 10_000.0
    fraction: str | None = None
    share: float = 1.0
    aliases: tuple[str, ...] = ()
    original: int | None = None
    stretched: bool = False


PLAIN = RopeKeys()


def read_rope(source: ConfigReader, context: int, names: RopeKeys = PLAIN) -> RoPEConfig:
    """The rotary embedding of a model, in either layout.

    Raises:
        FileError: An unknown kind of scaling, or an unknown key in it.
    """
    newer: dict[str, Any] = source.optional("rope_parameters", dict) or {}
    older: dict[str, Any] = source.optional("rope_scaling", dict) or {}
    if newer and older:
        raise FileError(f"{source.source}: has both 'rope_parameters' and 'rope_scaling'; leave one of them")
    given = {key: source.optional(key, float) for key in (names.theta, names.fraction, *names.aliases) if key}
    for own, alias in ((names.theta, "rope_theta"), (names.fraction, "partial_rotary_factor")):
        if own in given and given.get(alias) is not None and given[own] not in (None, given[alias]):
            raise FileError(f"{source.source}: {own!r} is {given[own]} and {alias!r} {given[alias]}; make them equal")
    theta, fraction = given[names.theta], given.get(names.fraction or "")
    found = dataclasses.replace(
        names, base=names.base if theta is None else theta, share=names.share if fraction is None else fraction
    )
    if names.original is not None:
        original = source.take_positive("original_max_position_embeddings", names.original)
        found = dataclasses.replace(found, original=original)
    return read_parameters(ConfigReader(newer or older, f"{source.source}, rope"), context, found)


def read_parameters(rope: ConfigReader, context: int, names: RopeKeys) -> RoPEConfig:
    """The rotary embedding in one dict of parameters; what it does not say is as in `names`.

    Raises:
        FileError: An unknown kind of scaling, or an unknown key in it.
    """
    theta, fraction = rope.take("rope_theta", float, names.base), names.share
    kind = rope.optional("rope_type", str)
    kind = kind or rope.take("type", str, "default")
    rope.require("type", kind)  # some files give both
    known = _READERS if names.original is None else ("default", "longrope", "su")
    if kind not in known:
        raise FileError(f"{rope.source}: the scaling {kind!r} is not implemented; qkv knows {', '.join(known)}")
    scaling = _READERS[kind](rope, context, names.original)
    if names.fraction is not None:
        fraction = rope.take("partial_rotary_factor", float, fraction)
    rope.require("partial_rotary_factor", 1.0)
    rope.finish()
    return RoPEConfig(theta=theta, scaling=scaling, fraction=fraction)


def write_rope(position: AttentionPositionConfig | None, context: int, names: RopeKeys = PLAIN) -> dict[str, Any]:
    """The keys of a config for this rotary embedding, in the older layout.

    Raises:
        ConfigError: It is another kind of position, or a scaling that no such config can say.
    """
    if not isinstance(position, RoPEConfig):
        found = "None" if position is None else position.tag()
        raise ConfigError(f"attention's position is {found}, and this family has RoPE")
    data: dict[str, Any] = {names.theta: position.theta}
    if names.fraction is not None:
        data[names.fraction] = position.fraction
    if position.scaling is not None:
        if type(position.scaling) not in _WRITTEN:
            raise ConfigError(f"no config of Hugging Face says {position.scaling.tag()}")
        kind, *keys = _WRITTEN[type(position.scaling)]
        values = {key: getattr(position.scaling, _OURS.get(key, key)) for key in keys}
        data["rope_scaling"] = {"rope_type": kind} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }
        if isinstance(position.scaling, LongRoPEScalingConfig) and names.original is not None:
            _older_longrope(data, position.scaling, context)
    return data


def reach(context: int, rope: RoPEConfig, names: RopeKeys = PLAIN) -> int:
    """Tokens of the longest text under the scaling, from what `max_position_embeddings` says.

    That counts the texts before they are stretched, but for Llama 3.1, LongRoPE and most files with YaRN.
    """
    match rope.scaling:
        case LinearScalingConfig() if names.stretched:
            return context
        case LinearScalingConfig(factor=factor) | DynamicNTKScalingConfig(factor=factor):
            return max(context, int(context * factor))
        case YaRNScalingConfig(factor=factor, original_length=original):
            return max(context, int(original * factor))
        case _:
            return context


def unstretched(context: int, rope: AttentionPositionConfig | None, names: RopeKeys = PLAIN) -> int:
    """What `max_position_embeddings` says of the longest text: what the scaling is computed from goes before it."""
    match rope.scaling if isinstance(rope, RoPEConfig) else None:
        case LinearScalingConfig() if names.stretched:
            return context
        case LinearScalingConfig(factor=factor):
            return math.ceil(context / max(1.0, factor) - 1e-6)
        case DynamicNTKScalingConfig(original_length=original):
            return original
        case _:
            return context


def _older_longrope(data: dict[str, Any], config: LongRoPEScalingConfig, context: int) -> None:
    """Older loaders of Phi-3 take three keys in the dict and no more."""
    scaling = data["rope_scaling"]
    scaling["type"] = scaling.pop("rope_type")
    data["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if config.attention_factor == _usual_factor(context / config.original_length, config.original_length):
        del scaling["attention_factor"]


def _yarn(rope: ConfigReader, context: int, outer: int | None) -> YaRNScalingConfig:
    original = rope.take_positive("original_max_position_embeddings", context)
    factor = rope.take_factor("factor", context / original)
    mscale, mscale_all = rope.optional("mscale", float), rope.optional("mscale_all_dim", float)
    magnitude = rope.optional("attention_factor", float)
    if magnitude is None and mscale and mscale_all and factor > 1:  # DeepSeek's way to say it
        magnitude = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    return YaRNScalingConfig(
        factor=factor,
        original_length=original,
        beta_fast=rope.optional("beta_fast", float) or 32.0,
        beta_slow=rope.optional("beta_slow", float) or 1.0,
        attention_factor=magnitude,
        truncate=rope.take("truncate", bool, True),
    )


def _llama3(rope: ConfigReader, context: int, outer: int | None) -> Llama3ScalingConfig:
    return Llama3ScalingConfig(
        factor=rope.take_factor("factor"),
        original_length=rope.take_positive("original_max_position_embeddings", context),
        low_freq_factor=rope.take("low_freq_factor", float),
        high_freq_factor=rope.take("high_freq_factor", float),
    )


def _dynamic(rope: ConfigReader, context: int, outer: int | None) -> RoPEScalingConfig:
    rope.optional("original_max_position_embeddings", int)  # Hugging Face goes by the context, too
    return DynamicNTKScalingConfig(factor=rope.take_factor("factor"), original_length=context)


def _longrope(rope: ConfigReader, context: int, outer: int | None) -> LongRoPEScalingConfig:
    inner = rope.take_positive("original_max_position_embeddings", context)
    original = inner if outer is None else outer  # Phi-3's own key for it goes first
    usual = _usual_factor(rope.take_factor("factor", context / original), original)
    return LongRoPEScalingConfig(
        original_length=original,
        short_factors=_numbers(rope, "short_factor"),
        long_factors=_numbers(rope, "long_factor"),
        attention_factor=rope.take("attention_factor", float, usual),
    )


def _usual_factor(factor: float, original: int) -> float:
    """Ding et al. 2024, section 3.3's factor in Phi-3's form, where the config gives none."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def _numbers(rope: ConfigReader, key: str) -> tuple[float, ...]:
    values = rope.take(key, list)
    if not all(isinstance(value, (int, float)) for value in values):
        raise FileError(f"{rope.source}: {key!r} must be a list of numbers; fix the file")
    return tuple(float(value) for value in values)


_READERS: dict[str, Callable[[ConfigReader, int, int | None], RoPEScalingConfig | None]] = {
    "default": lambda rope, context, outer: None,
    "linear": lambda rope, context, outer: LinearScalingConfig(factor=rope.take_factor("factor")),
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "su": _longrope,  # its name in the first files of Phi-3
}

_OURS = {
    "original_max_position_embeddings": "original_length",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}
_WRITTEN: dict[type[RoPEScalingConfig], tuple[str, ...]] = {
    LinearScalingConfig: ("linear", "factor"),
    DynamicNTKScalingConfig: ("dynamic", "factor"),
    YaRNScalingConfig: (
        "yarn", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate",
    ),
    Llama3ScalingConfig: (
        "llama3", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    ),
    LongRoPEScalingConfig: (
        "longrope", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor",
    ),
}  # fmt: skip
"""What `rope_type` calls a scaling, and its keys there: our fields, but for `_OURS`."""
