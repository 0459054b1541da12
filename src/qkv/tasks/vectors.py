"""Sequences of real vectors, such as readings of sensors: a model learns the next one."""

import dataclasses
from collections.abc import Iterable
from typing import final

import numpy as np

from qkv.data import Split
from qkv.errors import ConfigError
from qkv.loading.loaded import Loaded
from qkv.models.model import Model
from qkv.models.transformer import TransformerConfig
from qkv.tasks.evaluation import Measure, Report
from qkv.tasks.next_token import NextToken, evaluate_split
from qkv.tasks.task import Recipe, SampleConfig


@final
class Vectors(NextToken):
    """See `DataConfig`."""

    unit = "squared error"

    def sized(self, model: TransformerConfig) -> TransformerConfig:
        n, head = self.dataset.n_features, model.head
        assert n is not None
        return dataclasses.replace(model, embed=model.embed.for_vectors(n), head=head and head.for_vectors(n))

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """There is none: `DataConfig.check` refuses it."""
        raise AssertionError

    def next_steps(self, folder: str) -> str:
        return f"qkv forecast {folder} SERIES.npy --steps 20 --out NEXT.npy   ·   qkv eval {folder}"


def evaluate_vectors(opened: Loaded, documents: Iterable[np.ndarray]) -> Report:
    """The squared error of a model on sequences, each (T, features)."""
    split, n = Split.from_vectors(documents), opened.config.embed.to_dict()["n_features"]
    if split.values.shape[1] != n:
        raise ConfigError(f"the vectors have {split.values.shape[1]} features and the model reads {n}; give its own")
    found = evaluate_split(opened, split)
    loss = Measure("loss", found.loss, Vectors.unit, lower_is_better=True)
    return Report((loss, Measure("tokens", found.tokens, form=",")))
