"""Recipes: everything that decides what a training run computes, as one config."""

import dataclasses
from typing import Annotated, Literal, final

from qkv.config import Config, Count, Positive, Share, config, must
from qkv.errors import ConfigError
from qkv.models.model import ModelConfig
from qkv.models.transformer import TransformerConfig
from qkv.nn.adapters import LoRAConfig
from qkv.tasks import DataConfig, SampleConfig, Task, TaskConfig
from qkv.tasks.task import absolute
from qkv.training.optimizer import AdamWConfig
from qkv.training.schedule import CosineConfig, ScheduleConfig

Rows = Annotated[Count, must("be from 1 to 100000", lambda n: n <= 100_000)]


@final
@config
class StartConfig(Config):
    """Trained weights to begin with.

    Attributes:
        path: What `qkv.load` takes: a run, a folder in Hugging Face's layout, a GGUF file (if packed, made float32).
            Where the data are pairs: a run on pairs.
        dropout: Probability of dropout on the embeddings and on every sublayer's update, or between the layers of a
            recurrent model; None: as the checkpoint says.
    """

    path: str
    dropout: Share | None = None

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

    model: TransformerConfig | ModelConfig | None = None
    start: StartConfig | None = None
    adapter: LoRAConfig | None = None
    data: DataConfig | TaskConfig
    steps: Count
    context: Count = 256
    batch_size: Rows = 16
    accumulation: Rows = 1
    optimizer: AdamWConfig = AdamWConfig()
    schedule: ScheduleConfig = CosineConfig()
    clip: Positive | None = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    checkpoint_blocks: bool = False
    seed: Annotated[int, must("be at least 0", lambda n: n >= 0)] = 0
    non_finite: Literal["stop", "skip"] = "stop"
    evaluate_every: Count = 100
    evaluate_batches: Count | None = 16
    save_every: Count = 100
    keep: Count = 2
    sample: SampleConfig | None = None

    def __post_init__(self) -> None:
        self.data.check(self)
        if self.start is None and self.model is None:
            raise ConfigError("the recipe has neither model nor start; give one of them")
        if self.start is None and self.adapter is not None:
            raise ConfigError("adapter needs trained weights to sit on; add start with the path of a checkpoint")
        if self.model is not None and not self.model.depth:
            raise ConfigError("the model has no blocks (model.blocks.n=0, or an empty list); give it at least one")
        longest = None if self.model is None else self.model.longest
        if longest is not None and self.context > longest:
            raise ConfigError(
                f"context={self.context} is longer than the model's position table of {longest}; lower it"
            )

    def resolved(self, task: Task, base: ModelConfig | None = None) -> "RecipeConfig":
        """The same recipe with the sizes that only the data and `start` (`base`) know, and with absolute paths.

        Raises:
            ConfigError: Something in it does not fit the data, or `start`.
        """
        return absolute(dataclasses.replace(self, model=self._model(task, base)))

    def _model(self, task: Task, base: ModelConfig | None) -> ModelConfig:
        """The model that is written out, or that of `start`, as the task completes it; where there are both, one."""
        if self.start is None:
            assert self.model is not None
            return task.complete(self.model, self)
        assert base is not None
        model = task.complete(self.start.model(base), self)
        if self.model is None:
            return model
        if self.model.to_dict() | {"context": None} != model.to_dict() | {"context": None}:  # a run may set its own
            raise ConfigError(
                f"model is another one than that of start.path={self.start.path} with start.dropout="
                f"{self.start.dropout}; leave model out"
            )
        return task.complete(self.model, self)
