"""Reading a foreign `config.json` so that no key of it is passed over in silence."""

import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, cast, final

from qkv.errors import FileError
from qkv.nn.activations import ActivationName

T = TypeVar("T")

MAX_LAYERS = 10_000
"""A config may ask for any number, and each layer costs memory before the weights are looked at."""

ACTIVATION_NAMES: dict[str, ActivationName] = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "identity",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Hugging Face's names and ours."""

_HARMLESS = frozenset({
    # what is kept beside a model
    "_attn_implementation_autoset", "_num_labels", "_model_name_or_path", "_name_or_path", "architectures", "auto_map",
    "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "cls_token_id", "decoder_start_token_id",
    "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label", "initializer_range",
    "is_decoder", "is_encoder_decoder", "label2id", "mask_token_id", "max_sequence_length", "model_type",
    "output_attentions", "output_hidden_states", "output_past", "predict_special_tokens",
    "pad_token_id", "prefix", "pretraining_tp", "problem_type", "return_dict", "sep_token_id", "task_specific_params",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "unk_token_id",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
    # how older files say to draw tokens; so does `generation_config.json`
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Keys that do not change what a decoder computes."""


_OFF = ("add_cross_attention", "tie_encoder_decoder")  # of decoders that read an encoder's output


@final
class ConfigReader:
    """Reads a foreign config so that no key is passed over in silence.

    Args:
        data: The parsed JSON.
        source: What errors call it.
        tensors: The keys of the weights beside it; none where they are not known.
    """

    def __init__(self, data: dict[str, Any], source: str, tensors: Collection[str] = ()) -> None:
        self._rest = dict(data)
        self.source = source
        self.tensors = tensors

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of a key; `null` counts as absent.

        Raises:
            FileError: It is absent and there is no default, or it is of another type.
        """
        value: object = self._rest.pop(key, None)
        if value is None:
            if default is None:
                raise FileError(f"{self.source}: lacks {key!r}; the file must give it")
            return default
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:  # NaN, too
                raise FileError(f"{self.source}: {key!r} is not a finite number; fix the file")
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FileError(f"{self.source}: {key!r} is {value!r} and must be of type {kind.__name__}; fix the file")
        return cast(T, value)

    def take_positive(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A count; as `take`, and from 1 to `most`."""
        return self._positive(key, self.take(key, int, default), most)

    def _positive(self, key: str, value: int, most: int = 2**31 - 1) -> int:
        if not 1 <= value <= most:
            raise FileError(f"{self.source}: {key!r} is {value} and must be from 1 to {most}; fix the file")
        return value

    def take_factor(self, key: str, default: float | None = None) -> float:
        """By what something is multiplied or divided; as `take`, and above 0."""
        value = self.take(key, float, default)
        if value <= 0:
            raise FileError(f"{self.source}: {key!r} is {value} and must be above 0; fix the file")
        return value

    def optional(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """The value of a key for which `null` says something: None for `null`, the default where it is absent."""
        if self._rest.get(key, default) is None:
            self._rest.pop(key, None)
            return None
        return self.take(key, kind, default)

    def optional_count(self, key: str, default: int | None = None) -> int | None:
        """As `optional`, and at least 1."""
        value = self.optional(key, int, default)
        return None if value is None else self._positive(key, value)

    def require(self, key: str, value: object) -> None:
        """A key that may be there, with the one value that qkv implements.

        Raises:
            FileError: It has another.
        """
        found = self._rest.pop(key, value)
        if found is not None and found != value and not (value is None and found in ([], {})):
            reason = f"is {found!r}, which qkv does not implement for this family; only {value!r}"
            raise FileError(f"{self.source}: {key!r} {reason}")

    def finish(self, *ignored: str) -> None:
        """Refuse what was not read.

        Raises:
            FileError: A key is left that says something, and is neither in `ignored` nor mere bookkeeping.
        """
        for key in _OFF:
            self.require(key, value=False)
        said = {key for key, value in self._rest.items() if value is not None and value not in ([], {})}
        for key in sorted(said - _HARMLESS - {*ignored}):
            raise FileError(
                f"{self.source}: {key!r} is not known to qkv, and it might change what the model computes; if it does "
                "not, delete it from the file"
            )


@final
@dataclass(frozen=True)
class Key:
    """A key of `config.json` and the setting of ours that it is.

    Attributes:
        theirs: The key.
        ours: Its part (model, embed, attention, ffn, norm or head) and field.
        kind: int: a count. str: the name of an activation.
        default: What Hugging Face takes where the key is left out; None: the file must give it.
        nullable: Whether it may be left out, or `null`, which is None.
        meant: Values that mean another one.
    """

    theirs: str
    ours: str
    kind: type[int | float | str]
    default: Any = None
    nullable: bool = False
    meant: Mapping[str, str] = field(default_factory=dict)

    def read(self, source: ConfigReader, default: Any) -> Any:
        """The value of our setting."""
        if self.kind is int and self.nullable:
            return source.optional_count(self.theirs, default)
        if self.kind is int:
            most = MAX_LAYERS if self.ours == "model.n_layers" else 2**31 - 1
            return source.take_positive(self.theirs, default, most)
        if self.kind is not str:
            return (source.optional if self.nullable else source.take)(self.theirs, self.kind, default)
        name = source.take(self.theirs, str, default)
        name = self.meant.get(name, name)
        if name not in ACTIVATION_NAMES:
            known = ", ".join(sorted(ACTIVATION_NAMES))
            raise FileError(f"{source.source}: {self.theirs!r} is {name!r}; qkv knows {known}")
        return ACTIVATION_NAMES[name]

    def write(self, value: Any) -> Any:
        """The value of their key. `gelu_tanh` has two names, of which older families have one."""
        if self.kind is not str:
            return value
        if value == "gelu_tanh":
            return "gelu_new" if self.default in ("gelu", "gelu_new") else "gelu_pytorch_tanh"
        return next(name for name, ours in ACTIVATION_NAMES.items() if ours == value)


Settings: TypeAlias = dict[str, dict[str, Any]]  # by part and field


def read_keys(source: ConfigReader, keys: Sequence[Key], defaults: Mapping[str, Any]) -> Settings:
    """Our settings; `defaults` go before those of the keys."""
    made: Settings = defaultdict(dict)
    for key in keys:
        part, name = key.ours.split(".")
        made[part][name] = key.read(source, defaults.get(key.theirs, key.default))
    return made
