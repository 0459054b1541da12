"""Mistakes that once went unnoticed, or were told in words of the inside."""

import json
import subprocess
import sys
import warnings
from typing import ClassVar

import pytest
import torch
import yaml

import qkv
from qkv.config import checked, config
from qkv.errors import ConfigError
from qkv.generation import forecast
from qkv.loading.foreign import _sampling
from qkv.nn.embedders import Embedder, EmbedderConfig
from qkv.nn.sublayer import Sublayer, SublayerConfig
from qkv.training.recipe import RecipeConfig
from qkv.training.recipe_files import expand_preset
from runs import train, write_recipe
from tiny import tiny_config

CALLS = {
    "loaded.generate(3)": "prompts=3: ",
    "loaded.generate('a', max_new_tokens='x')": "max_new_tokens='x': input should be a valid integer",
    "loaded.generate('a', stop=3)": "stop=3: ",
    "loaded.generate('a', n=2.5)": "n=2.5: input should be a valid integer",
    "loaded.generate('a', temperature='hot')": "temperature = 'hot': input should be a valid number",
    "loaded.stream(3)": "prompt=3: ",
    "loaded.score(3)": "text=3: ",
    "loaded.score('a', batch_size='x')": "batch_size='x': input should be a valid integer",
    "loaded.embed(5)": "5 is nothing that the model reads; give a text",
    "Tokens.padded([2**62])": "a length of 4611686018427387904 tokens is beyond any size",
    "len(loaded.generate('a', max_new_tokens=np.int64(3), temperature=0)) > 0": "True",
}


def test_arguments_of_another_kind_are_one_line():
    """In a process of its own: in this one a checker of signatures may speak first."""
    script = f"""
import numpy as np
from qkv import *
from qkv.nn.attention import AttentionConfig
block = PreNormConfig(norm=RMSNormConfig(), sublayers=(AttentionConfig(n_heads=2, mask=Causal()),))
made = TransformerConfig(d_model=8, embed=TokenEmbedderConfig(vocab_size=4), blocks=block, head=LMHeadConfig())
loaded = Loaded.of(made.build().eval(), CharacterTokenizerConfig().train(["abc"]), Facts())
for line in {list(CALLS)!r}:
    try:
        print(eval(line))
    except ConfigError as error:
        print(*str(error).splitlines(), sep="↵")
    except Exception as error:
        print(type(error), error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    for said, wanted in zip(done.stdout.splitlines(), CALLS.values(), strict=True):
        assert wanted in said


def test_what_a_hint_does_not_say_is_let_through():
    @checked
    def call(a: int, b: "torch.Tensor", *more: int, c: float = 1.0):
        return a, c

    assert call(1, "anything") == (1, 1.0)
    assert call(1, None, c=2) == (1, 2)
    with pytest.raises(ConfigError, match="c='x': input should be a valid number"):
        call(1, None, c="x")


# --- parts of one's own -----------------------------------------------------------------------------------------------


def test_a_forgotten_decorator_is_named():
    class BareConfig(SublayerConfig):
        name: ClassVar[str] = "bare"
        size: int = 3

    class AloneConfig(qkv.Config):
        size: int = 3

    for kind in (BareConfig, AloneConfig):
        with pytest.raises(TypeError, match=f"{kind.__name__} is no config yet: .* write @config above the class"):
            kind(size=4)


def test_a_forgotten_name_is_named():
    @config
    class NamelessConfig(SublayerConfig):
        def build(self, d_model):
            return self._build(d_model)

    class Nameless(Sublayer, config=NamelessConfig):
        def update(self, x, ctx):
            return x, None

        def residual_weights(self):
            return []

    blocks = qkv.PreNormConfig(norm=qkv.RMSNormConfig(), sublayers=(NamelessConfig(),))
    with pytest.raises(TypeError, match=r"NamelessConfig has no name for its parameters; write name: ClassVar\[str\]"):
        tiny_config().replace(blocks=blocks).build()


@config
class DoubledConfig(EmbedderConfig):
    n: int

    def for_vectors(self, n):
        if n != self.n:
            raise ConfigError(f"these have {n} numbers")
        return self


class Doubled(Embedder, config=DoubledConfig):
    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        self.proj = torch.nn.Linear(config.n, d_model)

    def embed(self, inputs):
        return self.proj(2 * inputs)


def test_an_embedder_of_vectors_of_ones_own_forecasts():
    model = tiny_config(vectors=True).replace(embed=DoubledConfig(n=5), head=qkv.VectorHeadConfig(n_out=5)).build()
    assert forecast(model, torch.randn(1, 4, 5), 2).shape == (1, 2, 5)
    with pytest.raises(ConfigError, match="does not read these series: these have 3 numbers"):
        forecast(model, torch.randn(1, 4, 3), 2)


# --- recipes and folders ----------------------------------------------------------------------------------------------


def test_sizes_beside_a_preset_are_those_of_the_preset():
    data = {"model": {"preset": "small", "n_layers": 2, "head": None}}
    expand_preset(data)
    assert data["model"] == qkv.preset("small", n_layers=2, head=None).to_dict()
    with pytest.raises(ConfigError, match="preset 'small' has no 'n_layer'; did you mean 'n_layers'"):
        expand_preset({"model": {"preset": "small", "n_layer": 2}})


def test_a_text_where_a_mapping_is_meant(tmp_path):
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    with pytest.raises(ConfigError, match=r"schedule: is the text 'Cosine' and must be a mapping; write \{type: Cosin"):
        RecipeConfig.from_dict(recipe | {"schedule": "Cosine"})
    with pytest.raises(ConfigError, match="schedule: no type 'cosine' fits here; did you mean 'Cosine'"):
        RecipeConfig.from_dict(recipe | {"schedule": "cosine"})


def test_a_warm_up_beyond_the_end_is_said(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    short = ["steps=3", "schedule.warmup=3"]
    assert train(recipe, sets=short, out=tmp_path / "a") == 0
    assert (
        "warning: schedule.warmup=3 and the run has 3 steps: the learning rate never gets to" in capsys.readouterr().out
    )
    assert train(recipe, sets=["steps=3", "schedule.warmup=2"], out=tmp_path / "b") == 0
    assert "warmup" not in capsys.readouterr().out


def test_sampling_that_nobody_can_draw_by_is_said(tmp_path):
    path = tmp_path / "generation_config.json"
    with pytest.warns(UserWarning, match=r"generation_config.json: nobody can draw tokens in this way \(.*top_p"):
        assert _sampling(json.loads('{"do_sample": true, "top_p": 7.0}'), path) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _sampling({"do_sample": True, "top_p": 0.7}, path).top_p == 0.7
