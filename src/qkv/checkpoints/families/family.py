"""What every family has: its config, read and written, and how its keys map to ours."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from qkv.checkpoints.families.config_reader import ConfigReader, Key, Settings
from qkv.checkpoints.maps import KeyMap, Rule
from qkv.config import Config
from qkv.errors import ConfigError, FileError
from qkv.masks import Causal
from qkv.models.model import ModelConfig
from qkv.models.stack import Repeat, runs
from qkv.models.transformer import TransformerConfig
from qkv.models.two_towers import TwoTowersConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import BlockConfig, ParallelPreNormConfig, PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig, GLUConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import LayerNormConfig
from qkv.nn.sublayer import SublayerConfig

S = TypeVar("S", bound=SublayerConfig)


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        read: The config of a model, from a strict reader of its `config.json`.
        keys: The map of its keys, for such a config.
        prefix: What stands before every key but the head's; older files leave it out.
        head: Their key of the head's weight; empty: it never shares the table.
        table: Their key of the embedding table, which the head shares when it is tied; empty: there is none.
        name: The `model_type` of its configs.
        draft: What `config.json` would say of a model, not yet checked: use `write`.
        of: The kind of its configs.
    """

    read: Callable[[ConfigReader], Any]
    keys: Callable[[Any], KeyMap]
    prefix: str
    head: str
    table: str
    name: str
    draft: Callable[[Any], dict[str, Any]]
    of: type[ModelConfig] = TransformerConfig

    def parse(self, data: dict[str, Any], source: str, tensors: Collection[str] = ()) -> Any:
        """The config of a model from its `config.json`; errors call that `source`.

        Args:
            data: What stands there.
            source: What errors call it.
            tensors: The keys of the weights beside it, which say what the file leaves open.

        Raises:
            FileError: The file asks for something that qkv does not implement, or knows.
        """
        try:
            return self.read(ConfigReader(data, source, tensors))
        except ConfigError as error:
            raise FileError(f"{source}: {error}") from None

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """What `config.json` says of a model: the inverse of `read`.

        Probabilities of dropout are written where the family has keys for them. How weights are drawn is not.

        Raises:
            ConfigError: The family cannot express the model; the message says what.
        """
        try:
            if not isinstance(config, self.of):
                raise ConfigError(f"it is {config.tag()}, and this family has {self.of.tag()}")
            data = self.draft(config)
            again = self.parse(data, "config.json")
        except (ConfigError, FileError) as error:
            raise ConfigError(f"{self.name} cannot express this model: {error}") from None
        if difference := _difference(_explicit(config), _explicit(again)):
            raise ConfigError(f"{self.name} cannot express this model: {difference}")
        return data


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


def uniform(made: Settings, kind: type[PreNormConfig | ParallelPreNormConfig]) -> TransformerConfig:
    """A decoder of equal blocks of attention and an FFN, with LayerNorm, from its settings by part."""
    model, norm = made["model"], LayerNormConfig(**made["norm"])
    attention = AttentionConfig(mask=Causal(), **made["attention"])
    block = kind(norm=norm, sublayers=(attention, FFNConfig(bias=True, dropout=attention.dropout, **made["ffn"])))
    return TransformerConfig(
        d_model=model["d_model"],
        embed=TokenEmbedderConfig(**made["embed"]),
        blocks=stack([block] * model["n_layers"]),
        final_norm=norm,
        head=LMHeadConfig(**made["head"]),
        context=model["context"],
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
        raise ConfigError("its context is not known; set `context` in its config to the tokens of its longest text")
    return longest


def write_keys(config: TransformerConfig, keys: Sequence[Key], ffn: type[SublayerConfig]) -> dict[str, Any]:
    """What the keys say of a decoder.

    Raises:
        ConfigError: It is another kind of model.
    """
    embed, layers, attention, head = parts_of(config)
    sublayer(layers[0], 1, ffn)
    first = with_widths(layers[0], config.d_model)
    parts = {"model": config, "embed": embed, "attention": first.sublayers[0], "ffn": first.sublayers[1],
             "norm": first.norm, "head": head}  # fmt: skip
    values = {"model.context": context_of(config), "model.n_layers": len(layers), "attention.scale": attention.scale}
    return say(keys, parts, values)


def say(keys: Sequence[Key], parts: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the keys say of a model: from its parts, where `values` do not give it."""

    def value(key: Key) -> Any:
        part, name = key.ours.split(".")
        return key.write(values[key.ours] if key.ours in values else getattr(parts[part], name))

    return {key.theirs: value(key) for key in keys}


# --- whether two configs are of one model ---------------------------------------------------------------------------


def _explicit(config: Any) -> dict[str, Any]:
    """A model as plain data in which defaults are spelled out, without what does not change what it computes."""
    if isinstance(config, TwoTowersConfig):
        return {"text": _explicit(config.text), "picture": _explicit(config.picture), "contrast": config.contrast.tag()}
    block_data = functools.lru_cache(maxsize=None)(lambda block: _plain(with_widths(block, config.d_model)))
    embed = config.embed
    if isinstance(embed, TokenEmbedderConfig) and embed.scale is None:
        embed = dataclasses.replace(embed, scale=math.sqrt(config.d_model))
    return {
        "d_model": config.d_model,
        "embed": _plain(embed),
        "layers": [layer for run in runs(config.blocks) for layer in _layers(run, block_data)],
        "final_norm": _plain(config.final_norm),
        "head": _plain(config.head),
    }


def _layers(run: Repeat, data: Callable[[BlockConfig], Any]) -> list[Any]:
    """A layer each; where rounds share their weights, one for all of them that says how many there are."""
    blocks = [data(block) for block in run.blocks]
    return [{"rounds": run.n, "blocks": blocks}] if run.shared and run.n > 1 else blocks * run.n


def with_widths(block: BlockConfig, d_model: int) -> BlockConfig:
    """The same with each width that follows from others spelled out."""
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


_DROPPED = ("dropout", "weight_dropout", "drop_path")


def _without_dropout(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_dropout(value) for key, value in data.items() if key not in _DROPPED}
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
