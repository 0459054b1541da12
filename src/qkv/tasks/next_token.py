"""Documents each of whose tokens predicts the next: what texts, conversations and vectors have in common."""

import dataclasses
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from qkv.data import Batches, Dataset, PackedBatches, Split
from qkv.errors import ConfigError
from qkv.loading.loaded import Loaded
from qkv.models.model import Model, ModelConfig
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.tasks.evaluation import Evaluation, evaluate
from qkv.tasks.task import Recipe, Task


class NextToken(Task):
    """Base of the tasks that predict what comes next in a document.

    Args:
        dataset: The documents.
        start: The model that the run begins with; None: fresh weights.
    """

    def __init__(self, dataset: Dataset, start: Loaded | None) -> None:
        self.dataset, self.start = dataset, start

    @property
    def fingerprint(self) -> str:
        return self.dataset.train.fingerprint

    def complete(self, model: ModelConfig, recipe: Recipe) -> TransformerConfig:
        assert isinstance(model, TransformerConfig)
        n = self.dataset.train.n_tokens
        if n <= recipe.context:
            raise ConfigError(
                f"context={recipe.context} and the corpus has only {n} tokens to train on; lower context, or give more "
                "data"
            )
        model = self.sized(model)
        if (mask := model.mask_ahead) is not None:
            raise ConfigError(
                f"a recipe trains a model to predict what comes next, and the mask {mask.tag()} of an attention "
                "lets a token see it; use Causal, alone or as one side of And"
            )
        return dataclasses.replace(model, context=model.context or recipe.context)

    @abstractmethod
    def sized(self, model: TransformerConfig) -> TransformerConfig:
        """The model for tokens like these; `ConfigError` where it takes others."""

    def batches(self, recipe: Recipe) -> tuple[Batches, Batches | None]:
        sizes: Any = {"context": recipe.context, "batch_size": recipe.batch_size, "seed": recipe.seed}
        train, held_out = self.dataset.train, self.dataset.validation
        out = PackedBatches(held_out, shuffle=False, **sizes) if held_out.n_documents else None
        return PackedBatches(train, shuffle=True, **sizes), out

    def save(self, folder: Path) -> None:
        if self.dataset.tokenizer is not None:
            self.dataset.tokenizer.save(folder)
        if self.start is not None:
            self.start.facts.save(folder)

    def opened(self, model: Model) -> Loaded:
        """The model with its tokenizer, as it is in the middle of training."""
        assert isinstance(model, Transformer)
        if self.start is not None:
            return dataclasses.replace(self.start, model=model)
        return Loaded.of(model, self.dataset.tokenizer)


def evaluate_split(opened: Loaded, split: Split) -> Evaluation:
    """The loss on all documents of a split, in rows as long as the model can read, but no longer than they."""
    context = min(opened.config.limit or 1024, max(np.diff(split.offsets).max().item(), min(split.n_tokens, 1024)))
    return evaluate(opened.model, PackedBatches(split, context=context, batch_size=8, seed=0, shuffle=False))
