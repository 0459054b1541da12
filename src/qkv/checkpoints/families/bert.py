"""BERT and its relatives: post-norm encoders with tables of positions and types. What tells them apart is a table."""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from qkv.checkpoints.families.config_reader import ConfigReader, Key, read_keys
from qkv.checkpoints.families.encoder_heads import BODY, MASKED, TEXTS, TOKENS, HeadKeys, Heads
from qkv.checkpoints.families.family import Family, renamed, say, stack, sublayer, with_widths
from qkv.checkpoints.maps import KeyMap, Rule, fuse_qkv
from qkv.errors import ConfigError
from qkv.masks import Full
from qkv.models.stack import Repeat, runs
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PostNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.heads import TransformConfig
from qkv.nn.norms import LayerNormConfig
from qkv.nn.positions import LearnedPositionsConfig

_KEYS: Final = (
    Key("vocab_size", "embed.vocab_size", int),
    Key("type_vocab_size", "embed.types", int, 2),
    Key("hidden_dropout_prob", "embed.dropout", float, 0.1),
    Key("hidden_size", "model.d_model", int, 768),
    Key("num_hidden_layers", "model.n_layers", int, 12),
    Key("max_position_embeddings", "model.places", int, 512),
    Key("num_attention_heads", "attention.n_heads", int, 12),
    Key("attention_probs_dropout_prob", "attention.weight_dropout", float, 0.1),
    Key("intermediate_size", "ffn.d_ff", int, 3072),
    Key("hidden_act", "ffn.activation", str, "gelu"),
    Key("layer_norm_eps", "norm.eps", float, 1e-12),
)


@final
@dataclass(frozen=True)
class Names:
    """Keys within a layer: of queries, keys and values, of the other linear maps, and of the norms."""

    qkv: tuple[str, str, str] = ("attention.self.query", "attention.self.key", "attention.self.value")
    o_proj: str = "attention.output.dense"
    up_proj: str = "intermediate.dense"
    down_proj: str = "output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    ffn_norm: str = "output.LayerNorm"


@final
@dataclass(frozen=True)
class Bert:
    """How a family differs from its relatives.

    Attributes:
        name: Its `model_type`.
        prefix: What stands before every key but those of heads.
        heads: Its heads.
        defaults: What Hugging Face takes where a file leaves a key out.
        unused: Vectors at the beginning of the table of positions that no token uses.
        factorised: Whether embeddings have a width of their own, and layers share weights in groups (ALBERT).
        layer: The keys of a layer, `{}` being its number.
        names: Those within a layer.
        harmless: Keys that change nothing.
    """

    name: str
    prefix: str
    heads: Heads
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unused: int = 0
    factorised: bool = False
    layer: str = "encoder.layer.{}"
    names: Names = Names()
    harmless: tuple[str, ...] = ()

    def family(self) -> Family:
        """The family of this table."""
        return Family(
            read=functools.partial(_read, self),
            keys=functools.partial(_keys, self),
            prefix=self.prefix,
            head=f"{self.heads.keys[MASKED].out}.weight",
            table=f"{self.prefix}embeddings.word_embeddings.weight",
            name=self.name,
            draft=functools.partial(_draft, self),
        )


# --- in and out -----------------------------------------------------------------------------------------------------


def _read(spec: Bert, source: ConfigReader) -> TransformerConfig:
    made = read_keys(source, _KEYS, spec.defaults)
    model, dropout, norm = made["model"], made["embed"]["dropout"], LayerNormConfig(**made["norm"])
    positions = LearnedPositionsConfig(length=model["places"] - spec.unused, unused=spec.unused)
    attention = AttentionConfig(mask=Full(), bias=True, dropout=dropout, **made["attention"])
    ffn = FFNConfig(bias=True, dropout=dropout, **made["ffn"])
    block = PostNormConfig(norm=norm, sublayers=(attention, ffn))
    width = source.take_positive("embedding_size", 128) if spec.factorised else None
    head = spec.heads.read(
        source,
        masked=TransformConfig(activation=ffn.activation, norm=norm),
        pooled=TransformConfig(activation="tanh"),
        dropout=dropout,
    )
    blocks = _in_groups(source, block, model["n_layers"]) if spec.factorised else stack([block] * model["n_layers"])
    for key, value in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        source.require(key, value)
    source.finish(*spec.harmless)
    return TransformerConfig(
        d_model=model["d_model"],
        embed=TokenEmbedderConfig(position=positions, norm=norm, width=width, **made["embed"]),
        blocks=blocks,
        head=head,
        context=positions.length,
    )


def _in_groups(source: ConfigReader, block: PostNormConfig, n_layers: int) -> tuple[Repeat, ...]:
    """Groups of layers that share their weights, each of so many blocks."""
    n_groups, inner = source.take_positive("num_hidden_groups", 1), source.take_positive("inner_group_num", 1)
    rounds = Counter(i * n_groups // n_layers for i in range(n_layers))
    return tuple(Repeat(n=rounds[group], pattern=(block,) * inner, shared=True) for group in sorted(rounds))


def _draft(spec: Bert, config: TransformerConfig) -> dict[str, Any]:
    embed, all_runs = config.embed, list(runs(config.blocks))
    if not isinstance(embed, TokenEmbedderConfig) or not isinstance(embed.position, LearnedPositionsConfig):
        raise ConfigError("its embedder is no table of tokens with a table of positions")
    first = with_widths(all_runs[0].blocks[0], config.d_model)
    parts = {"model": config, "embed": embed, "attention": sublayer(first, 0, AttentionConfig),
             "ffn": sublayer(first, 1, FFNConfig), "norm": first.norm}  # fmt: skip
    values = {"model.n_layers": config.depth, "model.places": embed.position.length + spec.unused}
    data: dict[str, Any] = {"model_type": spec.name, **say(_KEYS, parts, values), **spec.heads.write(config.head)}
    if spec.unused:
        data["pad_token_id"] = spec.unused - 1  # behind which positions count
    if spec.factorised:
        inner = len(all_runs[0].blocks)
        data |= {"embedding_size": embed.width, "num_hidden_layers": config.depth // inner,
                 "num_hidden_groups": len(all_runs), "inner_group_num": inner}  # fmt: skip
    return data


def _keys(spec: Bert, config: TransformerConfig) -> KeyMap:
    embed, names, both = f"{spec.prefix}embeddings", spec.names, ("weight", "bias")
    rules = [
        Rule(f"{embed}.word_embeddings.weight", "embed.weight"),
        Rule(f"{embed}.position_embeddings.weight", "embed.position.weight"),
        Rule(f"{embed}.token_type_embeddings.weight", "embed.types"),
        *renamed(f"{embed}.LayerNorm", "embed.norm"),
        *spec.heads.rules(config.head),
    ]
    if spec.factorised:
        rules += renamed(f"{spec.prefix}encoder.embedding_hidden_mapping_in", "embed.widen")
    blocks = [block for run in runs(config.blocks) for block in run.blocks * (1 if run.shared else run.n)]
    inner = len(next(runs(config.blocks)).blocks) if spec.factorised else 1
    for i, block in enumerate(blocks):
        attention = sublayer(block, 0, AttentionConfig)
        theirs, ours = spec.prefix + spec.layer.format(i // inner, i % inner), f"blocks.{i}"
        head_dim = attention.head_dim or config.d_model // attention.n_heads
        fuse = fuse_qkv(attention.n_heads, attention.n_heads, head_dim, head_dim)
        for part in both:
            three = tuple(f"{theirs}.{x}.{part}" for x in names.qkv)
            rules.append(Rule(three, f"{ours}.sublayers.attention.qkv_proj.{part}", fuse))
        rules += renamed(f"{theirs}.{names.o_proj}", f"{ours}.sublayers.attention.o_proj")
        rules += renamed(f"{theirs}.{names.up_proj}", f"{ours}.sublayers.ffn.up_proj")
        rules += renamed(f"{theirs}.{names.down_proj}", f"{ours}.sublayers.ffn.down_proj")
        rules += renamed(f"{theirs}.{names.attention_norm}", f"{ours}.norms.attention")
        rules += renamed(f"{theirs}.{names.ffn_norm}", f"{ours}.norms.ffn")
    masked = spec.heads.keys[MASKED]
    biases = {f"{masked.out}.bias", masked.bias or ""} - {name for rule in rules for name in rule.theirs}
    heads = (spec.heads.keys[BODY].dense, "cls.seq_relationship")  # of BERT's other task
    unused = [f"{name}.{part}" for name in heads for part in both]
    return KeyMap(rules, 0, ignore=(*biases, f"{embed}.position_ids", f"{embed}.token_type_ids"), unused=unused)


# --- the families ---------------------------------------------------------------------------------------------------


def _heads(stem: str, pooler: str, masked: HeadKeys, texts: HeadKeys, dropout: str = "classifier_dropout") -> Heads:
    keys = {BODY: HeadKeys(dense=pooler), MASKED: masked, TEXTS: texts, TOKENS: HeadKeys(out="classifier")}
    return Heads(stem, keys, dropout)


_TRANSFORM: Final = "cls.predictions.transform"
BERT: Final = Bert(
    name="bert",
    prefix="bert.",
    heads=_heads(
        "Bert",
        "bert.pooler.dense",
        HeadKeys(f"{_TRANSFORM}.dense", f"{_TRANSFORM}.LayerNorm", "cls.predictions.decoder", "cls.predictions.bias"),
        HeadKeys("bert.pooler.dense", out="classifier"),
    ),
    defaults={"vocab_size": 30_522},
)
"""Devlin et al. 2019."""


def _roberta(name: str, stem: str) -> Bert:
    return Bert(
        name=name,
        prefix="roberta.",
        heads=_heads(
            stem,
            "roberta.pooler.dense",
            HeadKeys("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
            HeadKeys("classifier.dense", out="classifier.out_proj"),
        ),
        defaults={"vocab_size": 50_265},
        unused=2,
    )


ROBERTA: Final = _roberta("roberta", "Roberta")
"""Liu et al. 2019: positions count from behind the padding's."""

XLM_ROBERTA: Final = _roberta("xlm-roberta", "XLMRoberta")
"""Conneau et al. 2020."""

CAMEMBERT: Final = _roberta("camembert", "Camembert")
"""Martin et al. 2020."""

ALBERT: Final = Bert(
    name="albert",
    prefix="albert.",
    heads=_heads(
        "Albert",
        "albert.pooler",
        HeadKeys("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias"),
        HeadKeys("albert.pooler", out="classifier"),
        "classifier_dropout_prob",
    ),
    defaults={
        "vocab_size": 30_000,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "intermediate_size": 16_384,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    factorised=True,
    layer="encoder.albert_layer_groups.{}.albert_layers.{}",
    names=Names(
        qkv=("attention.query", "attention.key", "attention.value"),
        o_proj="attention.dense",
        up_proj="ffn",
        down_proj="ffn_output",
        attention_norm="attention.LayerNorm",
        ffn_norm="full_layer_layer_norm",
    ),
    harmless=("down_scale_factor", "eos_token_ids", "gap_size", "net_structure_type", "num_memory_blocks"),
)
"""Lan et al. 2020: factorised embeddings, and groups of layers that share their weights."""
