"""Recipes: everything that decides what a training run computes, as one config."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

from qkv.config import Config, assign, config, expand_home, read_yaml
from qkv.data import (
    ConversationsConfig,
    DataConfig,
    Dataset,
    FilesConfig,
    PairDataConfig,
    PairDataset,
    Tokenizer,
    TokenizerConfig,
    TokenizerFileConfig,
    VectorFilesConfig,
)
from qkv.errors import ConfigError, FileError, suggest
from qkv.generation import SamplingConfig
from qkv.models.pairs import PairModelConfig
from qkv.models.seq2seq import Seq2SeqConfig
from qkv.models.transformer import TransformerConfig
from qkv.nn.adapters import LoRAConfig
from qkv.nn.embedders import TokenEmbedderConfig, VectorEmbedderConfig
from qkv.nn.heads import LMHeadConfig, VectorHeadConfig
from qkv.presets import PAIR_PRESETS, preset

ModelConfig = TransformerConfig | PairModelConfig
"""What a recipe can train."""


@final
@config
class AdamWConfig(Config):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), fused.

    Attributes:
        lr: The highest learning rate; the schedule multiplies it.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the root of the second.
        weight_decay: Per step and unit of learning rate, on weights with two axes (not on norms and biases).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr={self.lr} must be above 0 and finite")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={list(self.betas)} must be at least 0 and below 1")
        if not (self.eps > 0 and 0 <= self.weight_decay < math.inf):
            raise ConfigError(f"eps={self.eps} must be above 0 and weight_decay={self.weight_decay} at least 0")


@config
class ScheduleConfig(Config, ABC):
    """Base of the schedules.

    Attributes:
        warmup: Steps over which the learning rate rises from 0, in a straight line.
        final: Share of the highest learning rate that is left at the end.
    """

    warmup: int = 50
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.final <= 1:
            raise ConfigError(f"warmup={self.warmup} must not be negative and final={self.final} be between 0 and 1")

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with in `step` (from 0) of `steps`."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return self.after_warmup(step, steps)

    @abstractmethod
    def after_warmup(self, step: int, steps: int) -> float:
        """The factor once the warm-up is over."""


@final
@config
class CosineConfig(ScheduleConfig):
    """Half a cosine from the end of the warm-up to the last step (Loshchilov and Hutter 2017, without restarts)."""

    def after_warmup(self, step: int, steps: int) -> float:
        """From 1 to `final`."""
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(1.0, done))) / 2


@final
@config
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay: constant, then down in a straight line over the last steps (Hu et al. 2024, section 4).

    Attributes:
        decay: Share of all steps that the way down takes.
    """

    decay: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay={self.decay} is a share of the steps and must be between 0 and 1")

    def after_warmup(self, step: int, steps: int) -> float:
        """1, then down to `final`."""
        left = (steps - step) / max(1.0, self.decay * steps)
        return self.final + (1 - self.final) * min(1.0, left)


@final
@config
class SampleConfig(Config):
    """The text that a run writes after each evaluation.

    Attributes:
        prompt: What it goes on from; empty: the beginning of a document. Where the data are conversations, what the
            user says, to which the text is the answer. Of pairs, the source; empty: the first that were held out.
        tokens: How many tokens at most.
        temperature: As in generation. Not of pairs.
    """

    prompt: str = ""
    tokens: int = 120
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"sample.tokens={self.tokens} must be at least 1; to write no sample, set sample to null")
        self.sampling(seed=0)

    def sampling(self, seed: int) -> SamplingConfig:
        """How its tokens are drawn."""
        return SamplingConfig(temperature=self.temperature, seed=seed)


@final
@config
class StartConfig(Config):
    """Trained weights to begin with.

    Attributes:
        path: What `qkv.load` takes: a run, a folder in Hugging Face's layout, a GGUF file whose weights are not packed.
            Where the data are pairs: a run on pairs.
        dropout: Probability of dropout on the embeddings and on every sublayer's update, or between the layers of a
            recurrent model; None: as the checkpoint says.
    """

    path: str
    dropout: float | None = None

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError(f"start.dropout={self.dropout} must be at least 0 and below 1")

    def model(self, config: ModelConfig) -> ModelConfig:
        """The model of the checkpoint, whose config this is, with the dropout set."""
        return config if self.dropout is None else config.with_dropout(self.dropout)


@final
@config
class RecipeConfig(Config):
    """A whole training run.

    Attributes:
        model: The model. In a file: a config, a preset's name, or `{preset: name, …}` with changes. With `start` it is
            left out.
        start: Trained weights to begin with; model and tokenizer are theirs. None: fresh weights.
        adapter: Train adapters beside the frozen weights of `start`; None: train all weights.
        data: The corpus; of pairs, `type: PairData`, for a model of pairs. With `start` its tokenizers are left out.
        steps: Updates of the weights.
        context: Tokens of a row; of pairs, of a source or a target at most.
        batch_size: Rows computed at once.
        accumulation: How many such batches make one update; the loss is the mean over all their tokens.
        optimizer: How weights are updated.
        schedule: How the learning rate moves.
        clip: Largest norm of the gradient; None: not clipped.
        precision: Type of the matrix products; weights stay float32. "auto" times a few steps of each and says so.
        compile: Compile each block with `torch.compile`.
        checkpoint_blocks: Keep only the stream between blocks, and compute the rest twice.
        seed: Of the weights, the order of the data and dropout.
        non_finite: What to do about a loss or gradient that is not finite: stop, or skip the update.
        evaluate_every: Steps between evaluations on held-out data.
        evaluate_batches: Batches of one evaluation; None: all. The last evaluation always takes all.
        save_every: Steps between checkpoints.
        keep: Checkpoints to keep.
        sample: Text to write after each evaluation; None: none.
    """

    model: ModelConfig | None = None
    start: StartConfig | None = None
    adapter: LoRAConfig | None = None
    data: DataConfig | PairDataConfig
    steps: int
    context: int = 256
    batch_size: int = 16
    accumulation: int = 1
    optimizer: AdamWConfig = AdamWConfig()
    schedule: ScheduleConfig = CosineConfig()
    clip: float | None = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    checkpoint_blocks: bool = False
    seed: int = 0
    non_finite: Literal["stop", "skip"] = "stop"
    evaluate_every: int = 100
    evaluate_batches: int | None = 16
    save_every: int = 100
    keep: int = 2
    sample: SampleConfig | None = None

    def __post_init__(self) -> None:
        counts = ("steps", "context", "batch_size", "accumulation", "evaluate_every", "save_every", "keep")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.evaluate_batches is not None and self.evaluate_batches < 1:
            raise ConfigError(f"evaluate_batches={self.evaluate_batches} must be at least 1; null takes all")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"clip={self.clip} must be above 0; null does not clip")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2**63")
        if self.sample is not None and isinstance(self.data.source, VectorFilesConfig):
            raise ConfigError("sample writes text and the data are vectors; set sample to null")
        self._check_pairs()
        self._check_start()
        longest = self.model.longest if isinstance(self.model, PairModelConfig) else None
        longest = self.model.embed.max_length if isinstance(self.model, TransformerConfig) else longest
        if longest is not None and self.context > longest:
            raise ConfigError(
                f"context={self.context} is longer than the model's position table of {longest}; lower it"
            )

    def _check_start(self) -> None:
        if self.start is None and self.model is None:
            raise ConfigError("the recipe has neither model nor start; give one of them")
        if self.start is None and self.adapter is not None:
            raise ConfigError("adapter needs trained weights to sit on; add start with the path of a checkpoint")
        if self.start is not None and self.data.tokenizer is not None:
            raise ConfigError("with start the tokenizer is the checkpoint's; leave data.tokenizer out")

    def _check_pairs(self) -> None:
        pairs = isinstance(self.data, PairDataConfig)
        if self.adapter is not None and pairs:
            raise ConfigError("adapter is for language models and the data are pairs; leave adapter out")
        if self.model is not None and pairs != isinstance(self.model, PairModelConfig):
            needed = "a model of pairs, such as bahdanau" if pairs else "a Transformer"
            raise ConfigError(
                f"the data are {self.data.tag()} and model is {self.model.tag()}; give {needed}, or other data"
            )
        if self.checkpoint_blocks and pairs:
            raise ConfigError("checkpoint_blocks is for language models and the data are pairs; leave it out")
        if self.compile and isinstance(self.model, Seq2SeqConfig):
            raise ConfigError("compile compiles blocks and a recurrent translator has none; leave it out")
        if pairs and self.sample is not None and self.sample.temperature != SampleConfig.temperature:
            raise ConfigError("sample.temperature is for language models: a translation is not drawn; leave it out")

    def resolved(self, dataset: Dataset | PairDataset, base: ModelConfig | None = None) -> "RecipeConfig":
        """The same recipe with the sizes that only the data and `start` know, and with absolute paths.

        Args:
            dataset: The corpus.
            base: The model of the checkpoint that the recipe starts from.

        Raises:
            ConfigError: The model takes other input than the data give, has too small a vocabulary or is not that of
                `start`, or the corpus or the sample's prompt do not fit the context.
        """
        model = self._model(base)
        if isinstance(dataset, PairDataset):
            assert isinstance(model, PairModelConfig)
            return self._resolved_pairs(dataset, model)
        assert isinstance(model, TransformerConfig)
        if dataset.train.n_tokens <= self.context:
            raise ConfigError(
                f"context={self.context} and the corpus has only {dataset.train.n_tokens} tokens to train on; "
                "lower context, or give more data"
            )
        if dataset.tokenizer is not None:
            model = _for_text(model, dataset.tokenizer.vocab_size)
        else:
            assert dataset.n_features is not None
            model = _for_vectors(model, dataset.n_features)
        model = dataclasses.replace(model, context=model.context or self.context)
        _check_causal(model)
        if self.sample is not None and dataset.tokenizer is not None:
            assert model.context is not None
            _check_prompt(dataset.tokenizer, self.sample.prompt, min(model.context, self.context) - 1)
        assert isinstance(self.data, DataConfig)
        return dataclasses.replace(self, model=model, start=self._absolute_start(), data=_absolute(self.data))

    def _absolute_start(self) -> StartConfig | None:
        return None if self.start is None else dataclasses.replace(self.start, path=_absolute_path(self.start.path))

    def _resolved_pairs(self, dataset: PairDataset, model: PairModelConfig) -> "RecipeConfig":
        tokenizer, data = dataset.tokenizer, self.data
        assert isinstance(data, PairDataConfig)
        sizes = tokenizer.source.vocab_size, tokenizer.target.vocab_size
        model = model.with_vocabularies(*sizes, shared=tokenizer.shared)
        if self.sample is not None and self.sample.prompt:
            _check_prompt(tokenizer.source, self.sample.prompt, self.context)
        tokenizers = (data.tokenizer, data.target_tokenizer)
        first, second = (None if each is None else _absolute_tokenizer(each) for each in tokenizers)
        data = dataclasses.replace(data, source=data.source.absolute(), tokenizer=first, target_tokenizer=second)
        return dataclasses.replace(self, model=model, start=self._absolute_start(), data=data)

    def _model(self, base: ModelConfig | None) -> ModelConfig:
        """The model that is written out, or that of `start`; where there are both, they are one."""
        if self.start is None:
            assert self.model is not None
            return self.model
        assert base is not None
        model = self.start.model(base)
        given = model if self.model is None else self.model
        expected = model
        if isinstance(given, TransformerConfig) and isinstance(model, TransformerConfig):  # a run may set its own
            expected = dataclasses.replace(model, context=given.context)
        if given != expected:
            raise ConfigError(
                f"model is another one than that of start.path={self.start.path} with start.dropout="
                f"{self.start.dropout}; leave model out"
            )
        return given


def _for_text(model: TransformerConfig, n: int) -> TransformerConfig:
    """The model for a vocabulary of `n` tokens."""
    embed = model.embed
    if not isinstance(embed, TokenEmbedderConfig):
        raise ConfigError(f"the data are text and model.embed is {embed.tag()}; use TokenEmbedder")
    if model.head is not None and not isinstance(model.head, LMHeadConfig):
        raise ConfigError(f"the data are text and model.head is {model.head.tag()}; use LMHead")
    if embed.vocab_size is not None and embed.vocab_size < n:
        raise ConfigError(
            f"the tokenizer has {n} tokens and model.embed.vocab_size is {embed.vocab_size}; leave it out, or set it "
            f"to {n} or more"
        )
    return dataclasses.replace(model, embed=dataclasses.replace(embed, vocab_size=embed.vocab_size or n))


def _for_vectors(model: TransformerConfig, n: int) -> TransformerConfig:
    """The model for vectors of `n` numbers."""
    embed, head = model.embed, model.head
    if not isinstance(embed, VectorEmbedderConfig):
        raise ConfigError(f"the data are vectors and model.embed is {embed.tag()}; use VectorEmbedder")
    if embed.n_features not in (None, n):
        raise ConfigError(
            f"the vectors have {n} features and model.embed.n_features is {embed.n_features}; leave it out, or set "
            f"it to {n}"
        )
    if isinstance(head, VectorHeadConfig) and head.n_out not in (None, n):
        raise ConfigError(
            f"the vectors have {n} features and model.head.n_out is {head.n_out}; the model predicts the next vector, "
            "so leave it out"
        )
    return dataclasses.replace(model, embed=dataclasses.replace(embed, n_features=n))


def _check_causal(model: TransformerConfig) -> None:
    """Refuse a mask that lets a token see what it is to predict: the loss would fall, and nothing be learnt."""
    if (mask := model.mask_ahead) is not None:
        raise ConfigError(
            f"a recipe trains a model to predict what comes next, and the mask {mask.tag()} of an attention "
            "lets a token see it; use Causal, alone or as one side of And"
        )


def _check_prompt(tokenizer: Tokenizer, prompt: str, room: int) -> None:
    try:
        n = len(tokenizer.encode(prompt))
    except ConfigError as error:
        raise ConfigError(f"sample.prompt: {error}") from None
    if n > room:
        raise ConfigError(f"sample.prompt has {n} tokens and there is room for {room}; make it shorter")


def _absolute(data: DataConfig) -> DataConfig:
    """The same corpus, whatever the working directory is."""
    source, tokenizer = data.source, data.tokenizer
    if isinstance(source, FilesConfig | VectorFilesConfig | ConversationsConfig):
        source = dataclasses.replace(source, path=str(expand_home(source.path).absolute()))
    tokenizer = None if tokenizer is None else _absolute_tokenizer(tokenizer)
    return dataclasses.replace(data, source=source, tokenizer=tokenizer)


def _absolute_tokenizer(tokenizer: TokenizerConfig) -> TokenizerConfig:
    if isinstance(tokenizer, TokenizerFileConfig):
        return dataclasses.replace(tokenizer, path=str(expand_home(tokenizer.path).absolute()))
    return tokenizer


def _absolute_path(path: str) -> str:
    """The same place, whatever the working directory is; a name that is no path stays as it is."""
    place = expand_home(path)
    return str(place.absolute()) if place.exists() else path


_BUILT_IN = Path(__file__).parent.parent / "recipes"


def built_in_recipe(name: str) -> Path | None:
    """The file of a recipe that comes with qkv, such as `shakespeare`; None: there is none of that name."""
    return {file.stem: file for file in _BUILT_IN.glob("*.yaml")}.get(name)


def _find(path: Path) -> Path:
    """The file itself, or that of a recipe that comes with qkv."""
    if not path.exists() and (found := built_in_recipe(str(path))):
        return found
    if not path.exists():
        known = sorted(file.stem for file in _BUILT_IN.glob("*.yaml"))
        raise FileError(f"{path}: no such file, and no recipe of that name; {suggest(str(path), known)}")
    return path


def read_recipe(path: Path, sets: Sequence[str] = ()) -> RecipeConfig:
    """A recipe from a YAML file, with changes such as `"optimizer.lr=3e-4"`.

    The name of a recipe that comes with qkv, such as `shakespeare`, stands for its file.

    Raises:
        FileError: The file cannot be read.
        ConfigError: It is not a recipe; the message names the key.
    """
    data = read_yaml(_find(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values, found {type(data).__name__}")
    for change in sets:
        key = change.partition("=")[0]
        if key == "model.preset":
            _allow_preset(data, change)
        elif key.startswith("model."):  # inside what the preset says
            expand_preset(data)
        assign(data, change)
    expand_preset(data)
    try:
        return RecipeConfig.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def expand_preset(data: dict[str, Any]) -> None:
    """Put the preset's config where `data["model"]` names one, in place; keys beside `preset` replace those in it."""
    model = data.get("model")
    if isinstance(model, str):
        data["model"] = _preset(model)
    elif isinstance(model, dict) and "preset" in model:
        changes = {key: value for key, value in model.items() if key != "preset"}
        data["model"] = _preset(str(model["preset"])) | changes


def _allow_preset(data: dict[str, Any], change: str) -> None:
    """Refuse a preset where the model is written out: all of its keys would stand above the preset's."""
    model = data.get("model")
    if model is None or isinstance(model, str):
        data["model"] = {"preset": model}
    elif isinstance(model, dict) and "preset" not in model and model:
        name = change.partition("=")[2]
        raise ConfigError(f"--set {change}: the recipe writes the model out; --set model={name} replaces it as a whole")


def _preset(name: str) -> dict[str, Any]:
    """The config of a preset, of a language model or of a model of pairs."""
    return PAIR_PRESETS[name]().to_dict() if name in PAIR_PRESETS else preset(name).to_dict()
