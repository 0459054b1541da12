"""What every family has: how to read its config strictly, and how its keys map to ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast, final

from qkv.checkpoints.maps import KeyMap
from qkv.errors import FileError
from qkv.models.transformer import Repeat, TransformerConfig
from qkv.nn.activations import ActivationName
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import BlockConfig

T = TypeVar("T")

ACTIVATION_NAMES: dict[str, ActivationName] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Hugging Face's names and ours."""

BOOKKEEPING = (
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_range", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "task_specific_params",
    "torch_dtype", "transformers.js_config", "transformers_version", "use_cache",
)  # fmt: skip
"""Keys that do not change what a decoder computes."""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        read: The config of a model, from a strict reader of its `config.json`.
        keys: The map of its keys, for such a config.
        prefix: What stands before every key but the head's; older files leave it out.
        head: Their key of the head's weight.
        table: Their key of the embedding table, which the head shares when it is tied.
    """

    read: Callable[["ConfigReader"], TransformerConfig]
    keys: Callable[[TransformerConfig], KeyMap]
    prefix: str
    head: str
    table: str


@final
class ConfigReader:
    """Reads a foreign config so that no key is passed over in silence.

    Args:
        data: The parsed JSON.
        source: What errors call it.
    """

    def __init__(self, data: dict[str, Any], source: str) -> None:
        self._rest = dict(data)
        self.source = source

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
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FileError(f"{self.source}: {key!r} is {value!r} and must be of type {kind.__name__}; mend the file")
        return cast(T, value)

    def take_positive(self, key: str, default: int | None = None) -> int:
        """A count; as `take`, and at least 1."""
        value = self.take(key, int, default)
        if not 1 <= value < 2**31:
            raise FileError(f"{self.source}: {key!r} is {value} and must be from 1 to 2^31 - 1; mend the file")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of a key, or None where it is absent or `null`."""
        if self._rest.get(key) is None:
            self._rest.pop(key, None)
            return None
        return self.take(key, kind)

    def activation(self, key: str, default: str) -> ActivationName:
        """An activation by its foreign name."""
        name = self.take(key, str, default)
        if name not in ACTIVATION_NAMES:
            raise FileError(f"{self.source}: {key!r} is {name!r}; qkv knows {', '.join(sorted(ACTIVATION_NAMES))}")
        return ACTIVATION_NAMES[name]

    def require(self, key: str, value: object) -> None:
        """A key that may be there, with the one value that qkv implements.

        Raises:
            FileError: It has another.
        """
        found = self._rest.pop(key, value)
        if found is not None and found != value:
            raise FileError(
                f"{self.source}: {key!r} is {found!r}, which qkv does not implement for this family; only {value!r}"
            )

    def finish(self, *ignored: str) -> None:
        """Refuse what was not read.

        Raises:
            FileError: A key is left that is neither in `ignored` nor mere bookkeeping.
        """
        for key in self._rest.keys() - {*BOOKKEEPING, *ignored}:
            raise FileError(f"{self.source}: {key!r} is not known to qkv, and it might change what the model computes")


def one_block(config: TransformerConfig) -> tuple[int, BlockConfig]:
    """(layers, block) of a stack of equal blocks."""
    assert isinstance(config.blocks, Repeat)
    assert isinstance(config.blocks.pattern, BlockConfig)
    return config.blocks.n, config.blocks.pattern


def attention_of(block: BlockConfig) -> AttentionConfig:
    """The attention of a block that begins with it."""
    assert isinstance(block.sublayers[0], AttentionConfig)
    return block.sublayers[0]
