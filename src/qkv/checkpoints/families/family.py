"""What every family has: its config, read strictly and written, and how its keys map to ours."""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast, final

from qkv.checkpoints.maps import KeyMap, Rule
from qkv.config import Config
from qkv.errors import ConfigError, FileError
from qkv.models.stack import Repeat, runs
from qkv.models.transformer import TransformerConfig
from qkv.nn.activations import ActivationName
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import BlockConfig, ParallelPreNormConfig, PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig, GLUConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.sublayer import SublayerConfig

T = TypeVar("T")
S = TypeVar("S", bound=SublayerConfig)

MAX_LAYERS = 10_000
"""A config may ask for any number, and each layer costs memory before the weights are looked at."""

ACTIVATION_NAMES: dict[str, ActivationName] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "identity",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Hugging Face's names and ours."""

BOOKKEEPING = frozenset({
    "_attn_implementation_autoset", "_model_name_or_path", "_name_or_path", "architectures", "auto_map",
    "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "cls_token_id", "decoder_start_token_id",
    "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "mask_token_id", "model_type", "output_attentions", "output_hidden_states",
    "pad_token_id", "prefix", "pretraining_tp", "problem_type", "return_dict", "sep_token_id", "task_specific_params",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "unk_token_id",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
})  # fmt: skip
"""Keys that do not change what a decoder computes."""

SAMPLING = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Keys of older files that say how to draw tokens; so does `generation_config.json`."""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        read: The config of a model, from a strict reader of its `config.json`.
        keys: The map of its keys, for such a config.
        prefix: What stands before every key but the head's; older files leave it out.
        head: Their key of the head's weight.
        table: Their key of the embedding table, which the head shares when it is tied.
        name: The `model_type` of its configs.
        draft: What `config.json` would say of a model, not yet checked: use `write`.
    """

    read: Callable[["ConfigReader"], TransformerConfig]
    keys: Callable[[TransformerConfig], KeyMap]
    prefix: str
    head: str
    table: str
    name: str
    draft: Callable[[TransformerConfig], dict[str, Any]]

    def write(self, config: TransformerConfig) -> dict[str, Any]:
        """What `config.json` says of a model: the inverse of `read`.

        Probabilities of dropout are written where the family has keys for them. How weights are drawn is not.

        Raises:
            ConfigError: The family cannot express the model; the message says what.
        """
        try:
            data = self.draft(config)
            again = self.read(ConfigReader(data, "config.json"))
        except (ConfigError, FileError) as error:
            raise ConfigError(f"{self.name} cannot express this model: {error}") from None
        if difference := _difference(_explicit(config), _explicit(again)):
            raise ConfigError(f"{self.name} cannot express this model: {difference}")
        return data


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
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:  # NaN, too
                raise FileError(f"{self.source}: {key!r} is not a finite number; mend the file")
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

    def take_factor(self, key: str, default: float | None = None) -> float:
        """By what something is multiplied or divided; as `take`, and above 0."""
        value = self.take(key, float, default)
        if value <= 0:
            raise FileError(f"{self.source}: {key!r} is {value} and must be above 0; mend the file")
        return value

    def take_layers(self, key: str, default: int | None = None) -> int:
        """The number of layers; as `take_positive`, and at most `MAX_LAYERS`."""
        value = self.take_positive(key, default)
        if value > MAX_LAYERS:
            raise FileError(f"{self.source}: {key!r} is {value}, and qkv reads at most {MAX_LAYERS} layers")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of a key, or None where it is absent or `null`."""
        return self.nullable(key, kind, None)

    def nullable(self, key: str, kind: type[T], default: T | None) -> T | None:
        """The value of a key for which `null` says something: None for `null`, the default where it is absent."""
        if self._rest.get(key) is not None:
            return self.take(key, kind)
        absent = key not in self._rest
        self._rest.pop(key, None)
        return default if absent else None

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
        for key in sorted(self._rest.keys() - BOOKKEEPING - SAMPLING - {*ignored}):
            raise FileError(f"{self.source}: {key!r} is not known to qkv, and it might change what the model computes")


# --- layers ---------------------------------------------------------------------------------------------------------

_LONGEST_PATTERN = 12  # layers


def stack(layers: Sequence[BlockConfig]) -> Repeat | tuple[BlockConfig | Repeat, ...]:
    """Layers as data, as short as can be: a pattern so many times over and what is left, or runs of equal blocks."""
    for period in range(1, min(len(layers), _LONGEST_PATTERN) + 1):
        rounds = len(layers) // period
        if (period == 1 or rounds > 1) and all(a == b for a, b in zip(layers, layers[period:], strict=False)):
            repeat = Repeat(n=rounds, pattern=layers[0] if period == 1 else tuple(layers[:period]))
            left = _runs(layers[rounds * period :])
            return (repeat, *left) if left else repeat
    return _runs(layers)


def _runs(layers: Sequence[BlockConfig]) -> tuple[BlockConfig | Repeat, ...]:
    runs = [(block, len(list(equal))) for block, equal in itertools.groupby(layers)]
    return tuple(block if n == 1 else Repeat(n=n, pattern=block) for block, n in runs)


def uniform(
    d_model: int,
    embed: TokenEmbedderConfig,
    block: PreNormConfig | ParallelPreNormConfig,
    n_layers: int,
    *,
    tied: bool,
    context: int,
) -> TransformerConfig:
    """A decoder of equal blocks, with another of their norms at its end."""
    return TransformerConfig(
        d_model=d_model,
        embed=embed,
        blocks=stack([block] * n_layers),
        final_norm=block.norm,
        head=LMHeadConfig(tied=tied),
        context=context,
    )


def renamed(theirs: str, ours: str, parts: Sequence[str] = ("weight", "bias")) -> list[Rule]:
    """The parts of a module that is the same on both sides."""
    return [Rule(f"{theirs}.{part}", f"{ours}.{part}") for part in parts]


def layers_of(config: TransformerConfig) -> list[BlockConfig]:
    """The block of each layer, from the input up: layer i's weights are those of `blocks.{i}`.

    Raises:
        ConfigError: Layers share weights, which no family here has, or there are none.
    """
    if any(run.shared and run.n > 1 for run in runs(config.blocks)):
        raise ConfigError("its layers share weights")
    if not (layers := [block for run in runs(config.blocks) for _ in range(run.n) for block in run.blocks]):
        raise ConfigError("it has no layers")
    return layers


class Parts(NamedTuple):
    """What a decoder of language models is made of; of its layers the first."""

    embed: TokenEmbedderConfig
    layers: list[BlockConfig]
    attention: AttentionConfig
    head: LMHeadConfig


def parts_of(config: TransformerConfig) -> Parts:
    """The parts of a decoder whose layers are attention and one more sublayer.

    Raises:
        ConfigError: It is another kind of model.
    """
    layers = layers_of(config)
    if not isinstance(config.embed, TokenEmbedderConfig) or config.embed.vocab_size is None:
        raise ConfigError(f"embed is {config.embed.tag()}, and families of language models read tokens")
    if not isinstance(config.head, LMHeadConfig):
        found = "None" if config.head is None else config.head.tag()
        raise ConfigError(f"head is {found}, and families of language models have LMHead")
    if len(layers[0].sublayers) != 2:
        raise ConfigError(f"a block has {len(layers[0].sublayers)} sublayers, and this family's have 2")
    return Parts(config.embed, layers, sublayer(layers[0], 0, AttentionConfig), config.head)


def sublayer(block: BlockConfig, i: int, kind: type[S]) -> S:
    """Sublayer `i` of a block.

    Raises:
        ConfigError: It is of another kind.
    """
    found = block.sublayers[i]
    if not isinstance(found, kind):
        raise ConfigError(f"sublayer {i + 1} of a block is {found.tag()}, and this family has {kind.tag()}")
    return found


def context_of(config: TransformerConfig) -> int:
    """Tokens of the longest text, which every config of Hugging Face must give: it sizes the table of positions too.

    Raises:
        ConfigError: It is not known.
    """
    longest = config.longest or config.limit
    if longest is None:
        raise ConfigError("its context is not known; set TransformerConfig.context")
    return longest


def activation_name(name: ActivationName, preferred: str = "gelu_pytorch_tanh") -> str:
    """Hugging Face's name of an activation; of the two of `gelu_tanh` the preferred one."""
    return preferred if name == "gelu_tanh" else next(key for key, ours in ACTIVATION_NAMES.items() if ours == name)


# --- whether two configs are of one model ---------------------------------------------------------------------------


def _explicit(config: TransformerConfig) -> dict[str, Any]:
    """A model as plain data in which defaults are spelled out, without what does not change what it computes."""
    block_data = functools.lru_cache(maxsize=None)(lambda block: _plain(_with_widths(block, config.d_model)))
    embed = config.embed
    if isinstance(embed, TokenEmbedderConfig) and embed.scale is None:
        embed = dataclasses.replace(embed, scale=math.sqrt(config.d_model))
    return {
        "d_model": config.d_model,
        "embed": _plain(embed),
        "layers": [block_data(block) for block in layers_of(config)],
        "final_norm": _plain(config.final_norm),
        "head": _plain(config.head),
        "context": config.longest or config.limit,
    }


def _with_widths(block: BlockConfig, d_model: int) -> BlockConfig:
    return dataclasses.replace(block, sublayers=tuple(_with_width(part, d_model) for part in block.sublayers))


def _with_width(part: SublayerConfig, d_model: int) -> SublayerConfig:
    match part:
        case AttentionConfig():
            head_dim = part.head_dim or d_model // part.n_heads
            return dataclasses.replace(
                part,
                n_kv_heads=part.n_kv_heads or part.n_heads,
                head_dim=head_dim,
                value_dim=part.value_dim or head_dim,
                out_bias=part.bias if part.out_bias is None else part.out_bias,
                scale=1 / math.sqrt(head_dim) if part.scale is None else part.scale,
                qk_norm_over=part.qk_norm_over if part.qk_norm else "head",
            )
        case GLUConfig():
            return dataclasses.replace(part, d_ff=part.width(d_model), multiple_of=1)
        case FFNConfig():
            return dataclasses.replace(part, d_ff=part.d_ff or 4 * d_model)
    return part


def _plain(part: Config | None) -> Any:
    return None if part is None else _without_dropout(part.to_dict())


def _without_dropout(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_dropout(value) for key, value in data.items() if key not in ("dropout", "weight_dropout")}
    return [_without_dropout(item) for item in data] if isinstance(data, list) else data


def _difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """The first place where two models differ, in words."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.get("type") == theirs.get("type"):
        pairs = [(ours[key], theirs[key], f"{path}.{key}".lstrip(".")) for key in ours]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(a, b, f"{path}.{i}") for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return None if ours == theirs else f"{path} is {_brief(ours)}, and there it could only be {_brief(theirs)}"
    return next((found for pair in pairs if (found := _difference(*pair))), None)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("type"))
    return f"{len(value)} items" if isinstance(value, list) else repr(value)
