"""`qkv.save` writes what `qkv.load` reads, for any model; sizes of presets."""

import dataclasses
import inspect
import os
from typing import final

import pytest
import torch

import qkv
from qkv.config import config
from qkv.data import CharacterTokenizerConfig
from qkv.errors import ConfigError, FileError
from qkv.models.model import Model, ModelConfig
from qkv.models.pairs import Pair
from qkv.nn.adapters import add_adapters
from qkv.nn.quantised import quantise
from qkv.presets import PRESETS
from qkv.presets.translators import PAIR_PRESETS
from qkv.tokens import Tokens
from qkv.yaml_files import dump_yaml, parse_yaml

TEXT = ["to be or not to be\n"]
SMALL = {"d_model": 16, "n_layers": 2, "n_rounds": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24, "vocab_size": 31}
SMALL |= {"context": 32, "head_dim": 8}
WORDS = CharacterTokenizerConfig().train(TEXT)


def small(name):
    """A preset with small sizes, of those that it has."""
    sizes = inspect.signature((PRESETS | PAIR_PRESETS)[name]).parameters
    return qkv.preset(name, **{key: value for key, value in SMALL.items() if key in sizes})


def made(config):
    """A model with weights large enough that a wrong one would show."""
    torch.manual_seed(0)
    model = config.build()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    return model.eval()


def pair():
    ids = torch.tensor([[3, 1, 2]])
    return Pair(ids, Tokens.full(1, 3), torch.tensor([[1, 2, 3, 4]]))


@pytest.mark.parametrize("name", PRESETS)
def test_a_language_model_alone_makes_the_round_trip(tmp_path, name):
    model = made(small(name))
    qkv.save(model, tmp_path / "saved")
    again = qkv.load(tmp_path / "saved")
    ids = torch.arange(12)[None]
    assert again.config == model.config
    assert (again.tokenizer, again.facts) == (None, qkv.Facts())
    assert torch.equal(again.model(ids), model(ids))


@pytest.mark.parametrize("tokenizers", [False, True])
@pytest.mark.parametrize("name", PAIR_PRESETS)
def test_a_model_of_pairs_makes_the_round_trip(tmp_path, name, tokenizers):
    n = WORDS.vocab_size
    model = made(small(name).with_vocabularies(n, n, shared=True))
    facts = qkv.Facts(begin_id=2, stop_ids=(0,), longest=9, longest_target=7)
    qkv.save(qkv.Translator(model, WORDS, WORDS, facts) if tokenizers else model, tmp_path / "saved")
    again = qkv.load(tmp_path / "saved")
    assert again.config == model.config
    assert torch.equal(again.model(pair()), model(pair()))
    if tokenizers:
        assert again.facts == facts
        assert again.source.identity() == again.target.identity() == WORDS.identity()
        assert again.translate("to be") == qkv.Translator(model, WORDS, WORDS, facts).translate("to be")
    else:
        assert isinstance(again, qkv.Bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_that_is_known_of_a_model_makes_the_round_trip(tmp_path, dtype):
    facts = qkv.Facts(begin_id=3, begins=True, stop_ids=(2, 5), pad_id=0, pad_side="left")
    template = qkv.ChatTemplate("{{ messages[0].content }}")
    loaded = qkv.Loaded(made(small("small")).to(dtype), WORDS, facts, template)
    qkv.save(loaded, tmp_path)
    again = qkv.load(tmp_path)
    assert again.facts == facts
    assert again.tokenizer.to_json() == WORDS.to_json()
    assert again.template.source == template.source
    assert next(again.model.parameters()).dtype == dtype
    assert again.generate("to", max_new_tokens=4, sampling=qkv.SamplingConfig(seed=1)) == loaded.generate(
        "to", max_new_tokens=4, sampling=qkv.SamplingConfig(seed=1)
    )


def test_a_model_of_vectors_makes_the_round_trip(tmp_path):
    block = qkv.PreNormConfig(norm=qkv.RMSNormConfig(), sublayers=(qkv.GLUConfig(),))
    vectors = qkv.TransformerConfig(
        d_model=8, embed=qkv.VectorEmbedderConfig(n_features=3), blocks=block, head=qkv.VectorHeadConfig()
    )
    model, x = made(vectors), torch.randn(1, 5, 3)
    qkv.save(model, tmp_path / "a" / "b")
    assert torch.equal(qkv.load(tmp_path / "a" / "b").model(x), model(x))


@config
class ToyModelConfig(ModelConfig):
    """A model that qkv does not know."""

    n: int
    depth = 1
    longest = None

    def with_dropout(self, p):
        return self

    def closed(self):
        return self

    def build(self):
        return ToyModel(self)


@final
class ToyModel(Model):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.net = torch.nn.Linear(config.n, config.n)

    table = None

    def loss(self, inputs, targets, tokens=None, *, scale=None):
        raise NotImplementedError


def test_a_model_that_qkv_does_not_know_is_found_by_the_name_of_its_config(tmp_path):
    model = ToyModelConfig(n=3).build()
    qkv.save(model, tmp_path)
    again = qkv.load(tmp_path)
    assert isinstance(again, qkv.Bare)
    assert again.config == model.config
    assert torch.equal(again.model.net.weight, model.net.weight)
    with pytest.raises(ConfigError, match="is a model without tokenizers; leave it out"):
        qkv.load(tmp_path, quantize="int8")


def test_a_folder_of_an_older_version_is_read(tmp_path):
    qkv.save(qkv.Loaded(made(small("small")), WORDS, qkv.Facts(begin_id=3, stop_ids=(2,))), tmp_path)
    data = parse_yaml((tmp_path / "model.yaml").read_text())
    kept = {key: data[key] for key in ("model", "stop_ids", "begin_id")}
    (tmp_path / "model.yaml").write_text(dump_yaml(kept))
    assert qkv.load(tmp_path).facts == qkv.Facts(begin_id=3, stop_ids=(2,))


def test_saving_again_replaces_the_model_and_nothing_else(tmp_path):
    first, second = made(small("small")), made(qkv.preset("small", d_model=16, vocab_size=31, n_layers=1))
    folder = tmp_path / "saved"
    qkv.save(first, folder)
    qkv.save(second, folder)
    assert qkv.load(folder).config == second.config
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match="saved: is there already, and nothing is overwritten; choose another place, or remove it"
    ):
        qkv.save(first, folder)
    assert qkv.load(folder).config == second.config
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_model_that_replaces_its_own_file_is_written_whole(tmp_path):
    qkv.save(made(small("small")), tmp_path / "saved")
    loaded = qkv.load(tmp_path / "saved")  # its weights are mapped from the file
    want = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    qkv.save(loaded, tmp_path / "saved")
    state = qkv.load(tmp_path / "saved").model.state_dict()
    assert all(torch.equal(state[name], want[name]) for name in want)


def test_what_fails_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("qkv.loading.saved.write_whole", full)
    with pytest.raises(FileError, match="saved: cannot be written \\(No space left on device\\); free some space"):
        qkv.save(made(small("small")), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_says_what_to_do(tmp_path):
    def refused(model, match):
        with pytest.raises(ConfigError, match=match):
            qkv.save(model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    packed = made(small("small"))
    quantise(packed, "int8")
    refused(packed, "weights are packed; load it with a dtype, such as torch.float32, and save that")
    adapted = made(small("small"))
    add_adapters(adapted, qkv.LoRAConfig(rank=2))
    refused(adapted, r"adapters beside its weights; call qkv.merge_adapters\(model\) before")
    changed = made(small("small"))
    changed.embed.weight = torch.nn.Parameter(torch.zeros(40, 16))
    refused(changed, "it is not what its config says; save a model as its config built it")
    refused(torch.nn.Linear(2, 2), "Linear is no model of qkv")


def test_a_wrong_fact_in_a_file_is_said(tmp_path):
    qkv.save(made(small("small")), tmp_path)
    text = (tmp_path / "model.yaml").read_text()
    for old, new, match in (
        ("stop_ids: []", "stop_ids: [a]", "not a model of qkv: Facts.stop_ids"),
        ("begins: false", "begin: false", "Facts has no 'begin'; did you mean"),
    ):
        (tmp_path / "model.yaml").write_text(text.replace(old, new))
        with pytest.raises(FileError, match=match):
            qkv.load(tmp_path)


def test_a_preset_takes_its_sizes_and_parts_of_its_config():
    config = qkv.preset("small", vocab_size=100, n_layers=3, context=64)
    assert (config.embed.vocab_size, config.depth, config.context) == (100, 3, 64)
    assert dataclasses.replace(qkv.preset("small", vocab_size=100), context=64) == qkv.preset(
        "small", vocab_size=100, context=64
    )
    assert qkv.preset("llama3-8b", n_layers=2).depth == 2
    assert qkv.preset("bahdanau", d_model=24).d_model == 24
    for name, changes, match in (
        ("small", {"embed__vocab_size": 5}, "preset 'small' has no 'embed__vocab_size'; did you mean 'vocab_size'"),
        ("small", {"n_head": 5}, "preset 'small' has no 'n_head'; did you mean 'n_heads'"),
        ("smal", {}, "no preset 'smal'; did you mean 'small'"),
        ("nothing", {}, "no preset 'nothing'; .*bahdanau.*gpt2"),
    ):
        with pytest.raises(ConfigError, match=match):
            qkv.preset(name, **changes)


@pytest.mark.parametrize(
    ("context", "table", "limit"), [(64, 32, 32), (16, 32, 16), (None, 32, 32), (16, None, 16), (None, None, None)]
)
def test_the_context_is_the_smaller_of_what_it_is_made_for_and_what_it_can_take(context, table, limit):
    position = None if table is None else qkv.LearnedPositionsConfig(length=table)
    config = dataclasses.replace(
        qkv.preset("small"), embed=qkv.TokenEmbedderConfig(vocab_size=9, position=position), context=context
    )
    assert config.limit == limit
    assert qkv.summary(config).context == (limit or 1024)
