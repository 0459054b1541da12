"""Sequences of real vectors, such as readings of sensors: a model learns the next one."""

import dataclasses
from typing import final

from qkv.models.model import Model
from qkv.models.transformer import TransformerConfig
from qkv.tasks.next_token import NextToken
from qkv.tasks.task import Recipe, SampleConfig


@final
class Vectors(NextToken):
    """See `DataConfig`."""

    def sized(self, model: TransformerConfig) -> TransformerConfig:
        n, head = self.dataset.n_features, model.head
        assert n is not None
        return dataclasses.replace(model, embed=model.embed.for_vectors(n), head=head and head.for_vectors(n))

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """There is none: `DataConfig.check` refuses it."""
        raise AssertionError
