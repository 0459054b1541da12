"""A method of another kind of model says whose it is."""

import copy
import pickle

import pytest

from qkv.errors import ConfigError
from qkv.loading.encoder import Encoder
from qkv.loading.loaded import Loaded
from qkv.loading.ready import Bare
from qkv.masks import Full
from tiny import tiny_model

LANGUAGE, ENCODER = Loaded(tiny_model()), Encoder(tiny_model(mask=Full()))


@pytest.mark.parametrize(
    ("ready", "name", "message"),
    [
        (LANGUAGE, "fill", "fill is for an encoder, and this is a language model; use qkv generate, chat, forecast or"),
        (LANGUAGE, "classify", "classify is for an encoder.*, and this is a language model"),
        (LANGUAGE, "translate", "translate is for a model of pairs, and this is a language model"),
        (
            ENCODER,
            "generate",
            "generate is for a language model, and this is an encoder; use qkv embed, fill, classify",
        ),
        (
            Bare(LANGUAGE.model),
            "embed",
            "embed is for .*, and this is a model without tokenizers; use qkv show or check",
        ),
    ],
    ids=["fill", "classify", "translate", "generate", "embed"],
)
def test_a_verb_of_another_kind(ready, name, message):
    with pytest.raises(ConfigError, match=message):
        getattr(ready, name)
    assert not hasattr(ready, name)


def test_other_names_are_plain_attribute_errors():
    for name in ("fil", "_fill", "__len__"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'") as error:
            getattr(LANGUAGE, name)
        assert not isinstance(error.value, ConfigError)
    assert copy.copy(LANGUAGE).model is LANGUAGE.model
    assert pickle.loads(pickle.dumps(Bare(LANGUAGE.model))).what == Bare.what
