"""Sequences of real vectors, such as readings of sensors: a model learns the next one."""

import dataclasses
from typing import final

from qkv.errors import ConfigError
from qkv.models.model import Model
from qkv.models.transformer import TransformerConfig
from qkv.nn.embedders import VectorEmbedderConfig
from qkv.nn.heads import VectorHeadConfig
from qkv.tasks.next_token import NextToken
from qkv.tasks.task import Recipe, SampleConfig


@final
class Vectors(NextToken):
    """See `DataConfig`."""

    def sized(self, model: TransformerConfig) -> TransformerConfig:
        """See `NextToken`."""
        embed, head, n = model.embed, model.head, self.dataset.n_features
        if not isinstance(embed, VectorEmbedderConfig):
            raise ConfigError(f"the data are vectors and model.embed is {embed.tag()}; use VectorEmbedder")
        if embed.n_features not in (None, n):
            raise ConfigError(
                f"the vectors have {n} features and model.embed.n_features is {embed.n_features}; leave it out, or "
                f"set it to {n}"
            )
        if isinstance(head, VectorHeadConfig) and head.n_out not in (None, n):
            raise ConfigError(
                f"the vectors have {n} features and model.head.n_out is {head.n_out}; the model predicts the next "
                "vector, so leave it out"
            )
        return dataclasses.replace(model, embed=dataclasses.replace(embed, n_features=n))

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """There is none: `DataConfig.check` refuses it."""
        raise AssertionError
