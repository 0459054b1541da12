"""Heads of encoders as Hugging Face names them: masked tokens, pooled vectors, classes of texts and of tokens."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from qkv.checkpoints.families.config_reader import ConfigReader
from qkv.checkpoints.families.family import renamed
from qkv.checkpoints.maps import Rule
from qkv.errors import ConfigError, FileError
from qkv.nn.heads import (
    BinaryCrossEntropyConfig,
    ClassHeadConfig,
    CrossEntropyConfig,
    HeadConfig,
    LMHeadConfig,
    ObjectiveConfig,
    SquaredErrorConfig,
    TransformConfig,
)
from qkv.nn.norms import LayerNormConfig
from qkv.nn.pooling import FirstTokenConfig, PoolConfig

BODY, MASKED, TEXTS, TOKENS = "Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"
"""Ends of the names of their classes."""

_SAME: Final = {"ForPreTraining": MASKED}  # the same head, and one more that nobody uses

_PROBLEMS: Final[Mapping[str, ObjectiveConfig]] = {
    "single_label_classification": CrossEntropyConfig(),
    "multi_label_classification": BinaryCrossEntropyConfig(),
    "regression": SquaredErrorConfig(),
}
"""What they call our objectives; of texts alone."""


@final
@dataclass(frozen=True)
class HeadKeys:
    """The keys of one head.

    Attributes:
        dense: Of the linear map of its transform; None: it has no transform.
        norm: Of the transform's norm; None: it has none.
        out: Of the last linear map; None: there is none.
        bias: Of the last map's bias, where that stands elsewhere.
    """

    dense: str | None = None
    norm: str | None = None
    out: str | None = None
    bias: str | None = None


@final
@dataclass(frozen=True)
class Heads:
    """The heads of a family.

    Attributes:
        stem: What the names of its classes begin with.
        keys: Of each head, by the end of the class's name.
        dropout: The key of the classifier's dropout; None: it has none.
        whole: The end of the name of the class that classifies whole inputs.
        pools: What else it is that classes of other names read, by the ends of these names.
    """

    stem: str
    keys: Mapping[str, HeadKeys]
    dropout: str | None = "classifier_dropout"
    whole: str = TEXTS
    pools: Mapping[str, PoolConfig] = field(default_factory=dict)

    def kind(self, source: ConfigReader) -> str:
        """The end of the name of the class that a config names."""
        names = source.take("architectures", list, [self.stem + BODY])
        name = str(names[0]) if names else self.stem + BODY
        end = name.removeprefix(self.stem)
        end = _SAME.get(end, end)
        if not name.startswith(self.stem) or end not in self.keys:
            known = ", ".join(self.stem + end for end in self.keys)
            raise FileError(f"{source.source}: 'architectures' names {name!r}; qkv knows {known}")
        return end

    def read(
        self,
        source: ConfigReader,
        *,
        masked: TransformConfig,
        pooled: TransformConfig,
        pool: PoolConfig | None = None,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> HeadConfig | None:
        """The head that a config asks for.

        Args:
            source: The config.
            masked: The transform before the vocabulary.
            pooled: The transform before classes.
            pool: What classes of whole inputs are read from, where `pools` does not say; None: the first token.
            dropout: That of a classifier where the config does not say.
            bias: Whether the vocabulary has a bias.
        """
        kind = self.kind(source)
        tied = source.take("tie_word_embeddings", bool, True)
        dropout = dropout if self.dropout is None else source.take(self.dropout, float, dropout)
        labels = source.optional("id2label", dict)
        n = source.optional_count("num_labels") or len(labels or {}) or 2
        problem = source.optional("problem_type", str) or ("regression" if n == 1 else "single_label_classification")
        if problem not in _PROBLEMS:
            raise FileError(f"{source.source}: 'problem_type' is {problem!r}; qkv knows {', '.join(_PROBLEMS)}")
        if n == 1 and kind not in (BODY, MASKED, TOKENS) and problem.startswith("single"):
            raise FileError(f"{source.source}: 'problem_type' is {problem!r} and there is one class; name two or more")
        keys = self.keys[kind]
        if kind == MASKED:
            return LMHeadConfig(tied=tied, bias=bias, transform=masked)
        transform = None if keys.dense is None else pooled
        if kind == BODY:
            pooled_too = source.take("has_pooler", bool, True) and _has(source.tensors, keys.dense)
            return ClassHeadConfig(pool=FirstTokenConfig(), transform=transform) if transform and pooled_too else None
        if kind == TOKENS:
            return ClassHeadConfig(n_classes=n, transform=transform, dropout=dropout)
        return ClassHeadConfig(
            n_classes=n,
            objective=_PROBLEMS[problem],
            pool=self.pools.get(kind, pool or FirstTokenConfig()),
            transform=transform,
            dropout=dropout,
        )

    def write(self, head: HeadConfig | None) -> dict[str, Any]:
        """What a config says of a head."""
        end, said = self.end(head), dict[str, Any]()
        if isinstance(head, LMHeadConfig):
            said["tie_word_embeddings"] = head.tied
        if isinstance(head, ClassHeadConfig) and head.n_classes is not None:
            said["id2label"] = {str(i): f"LABEL_{i}" for i in range(head.n_classes)}
            said["label2id"] = {name: int(i) for i, name in said["id2label"].items()}
            said |= {} if self.dropout is None else {self.dropout: head.dropout}
            if head.pool is not None:
                if head.n_classes == 1 and head.objective == CrossEntropyConfig():
                    raise ConfigError("the head has a single class, which transformers refuses; give it two or more")
                said["problem_type"] = next(name for name, each in _PROBLEMS.items() if each == head.objective)
        if head is None and self.keys[BODY].dense is not None:
            said["has_pooler"] = False
        return {"architectures": [self.stem + end], **said}

    def end(self, head: HeadConfig | None) -> str:
        """The end of the name of the class that has such a head.

        Raises:
            ConfigError: There is none.
        """
        match head:
            case None | ClassHeadConfig(n_classes=None):
                return BODY
            case LMHeadConfig():
                return MASKED
            case ClassHeadConfig(pool=None):
                return TOKENS
            case ClassHeadConfig():
                return next((end for end, pool in self.pools.items() if pool == head.pool), self.whole)
        raise ConfigError(f"head is {head.tag()}, and encoders have LMHead, ClassHead or none")

    def rules(self, head: HeadConfig | None) -> list[Rule]:
        """The map of the head's keys."""
        if head is None:
            return []
        keys, rules = self.keys[self.end(head)], list[Rule]()
        assert isinstance(head, LMHeadConfig | ClassHeadConfig)
        if head.transform is not None and keys.dense is not None:
            parts = ("weight", "bias") if head.transform.bias else ("weight",)
            rules += renamed(keys.dense, "head.transform.proj", parts)
            if head.transform.norm is not None and keys.norm is not None:
                rules += renamed(keys.norm, "head.transform.norm", norm_parts(head.transform.norm))
        if keys.out is not None and isinstance(head, ClassHeadConfig):
            rules += renamed(keys.out, "head.proj")
        if isinstance(head, LMHeadConfig):
            rules += [] if head.tied else [Rule(f"{keys.out}.weight", "head.weight")]
            # A tied map is said to have its bias elsewhere; one of its own has it at home.
            rules += [Rule((head.tied and keys.bias) or f"{keys.out}.bias", "head.bias")] if head.bias else []
        return rules


def _has(tensors: Collection[str], key: str | None) -> bool:
    """Whether there is such a module among the tensors, with or without a prefix; yes where they are not known."""
    end = f"{(key or '').partition('.')[2]}.weight"
    return not tensors or any(name.endswith(end) for name in tensors)


def norm_parts(norm: object) -> tuple[str, ...]:
    """The weights of a LayerNorm."""
    return ("weight", "bias") if isinstance(norm, LayerNormConfig) and norm.bias else ("weight",)
