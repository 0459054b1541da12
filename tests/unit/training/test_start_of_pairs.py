"""Runs on pairs that begin with a trained translator."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import qkv
from qkv.data import CharacterTokenizerConfig, TSVConfig
from qkv.errors import ConfigError, FileError
from qkv.models.pairs import Pair
from qkv.models.seq2seq import Seq2SeqConfig
from qkv.presets.translators import PAIR_PRESETS
from qkv.tasks import PairDataConfig
from qkv.tokens import Tokens
from qkv.training import train
from qkv.yaml_files import dump_yaml
from runs import assert_same_run, fast, kill_at, metrics, recipe_data, write_corpus  # noqa: F401 - fast is a fixture
from transly import write_tiny

pytestmark = pytest.mark.usefixtures("fast")
CHARACTERS = {"type": "CharacterTokenizer"}
TWO, ONE = {"tokenizer": CHARACTERS, "target_tokenizer": CHARACTERS}, {"tokenizer": CHARACTERS}
BASES = {
    "recurrent": ("bahdanau", TWO),
    "transformer": ("translator", TWO),
    "one tokenizer": ("attention-is-all-you-need", ONE),
}
WORDS = [a + b + c for a in "abcde" for b in "fghij" for c in "klmn"]


def write_recipe(path, rows, tokenizers, **changes):
    path.with_suffix(".tsv").write_text("".join(f"{source}\t{target}\n" for source, target in rows))
    source = {"type": "TSV", "path": str(path.with_suffix(".tsv"))}
    recipe = {
        "data": {"type": "PairData", "source": source, "validation": 0.2} | tokenizers,
        "steps": 12,
        "context": 16,
        "batch_size": 8,
        "optimizer": {"lr": 0.01},
        "precision": "float32",
        "evaluate_every": 6,
        "save_every": 4,
    } | changes
    path.write_text(dump_yaml(recipe))
    return path


def make_base(folder: Path, kind="recurrent", **changes):
    """A run that reads backwards, aloud."""
    preset, tokenizers = BASES[kind]
    rows = [(word, word[::-1].upper()) for word in WORDS]
    model = {"preset": preset, "d_model": 32}
    recipe = write_recipe(folder / "first.yaml", rows, tokenizers, model=model, **changes)
    assert train(recipe, out=folder / "base") == 0
    return folder / "base"


def write_tune(base, rows=None, **changes):
    """A recipe that goes on from it with words that stay as they are."""
    rows = [(word, word.upper()) for word in WORDS] if rows is None else rows
    data = {"start": {"path": str(base)}, "sample": {"tokens": 4}} | changes
    return write_recipe(base.parent / "tune.yaml", rows, data.pop("tokenizers", {}), **data)


def logits(run):
    ids = torch.tensor([[1, 6, 11]])
    with torch.no_grad():
        return qkv.load(run).model(Pair(ids, Tokens.full(1, 3), torch.tensor([[0, 5, 3]])))


@pytest.mark.parametrize("kind", BASES)
def test_a_run_begins_with_the_weights_and_tokenizers_of_its_start(kind, tmp_path):
    base = make_base(tmp_path, kind)
    assert train(write_tune(base, steps=1, optimizer={"lr": 1e-9}), out=tmp_path / "tuned") == 0
    torch.testing.assert_close(logits(tmp_path / "tuned"), logits(base), rtol=0, atol=1e-4)  # one step of 1e-9
    before, after = qkv.load(base), qkv.load(tmp_path / "tuned")
    assert after.source.identity() == before.source.identity()
    assert after.target.identity() == before.target.identity()
    fresh = before.model.config.build()
    assert any(not torch.equal(p, fresh.state_dict()[name]) for name, p in before.model.state_dict().items())


def test_it_learns_on_and_needs_its_start_no_more(tmp_path):
    base = make_base(tmp_path, steps=150, save_every=150)
    assert qkv.load(base).translate("afk") == "KFA"
    run = tmp_path / "tuned"
    assert train(write_tune(base, steps=100, save_every=100), out=run) == 0
    assert metrics(run)[-1]["validation_loss"] < metrics(run)[0]["loss"]
    assert "→" in (run / "samples.txt").read_text()
    shutil.rmtree(base)
    assert qkv.load(run).translate("afk") == "AFK"


@pytest.mark.parametrize("kind", ["recurrent", "one tokenizer"])
def test_resume_is_exact(kind, tmp_path):
    recipe = write_tune(make_base(tmp_path, kind), start={"path": str(tmp_path / "base"), "dropout": 0.2})
    assert train(recipe, out=tmp_path / "whole") == 0
    kill_at(9, recipe, tmp_path / "cut")
    assert train(recipe, out=tmp_path / "cut", resume=True) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert train(tmp_path / "whole" / "recipe.yaml", out=tmp_path / "again") == 0  # the resolved recipe repeats it
    assert_same_run(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("name", PAIR_PRESETS)
def test_the_dropout_is_set_everywhere(name):
    def found(data):
        """The values of every `dropout` in a config."""
        if isinstance(data, list):
            return set().union(*map(found, data))
        if not isinstance(data, dict):
            return set()
        own = {data["dropout"]} if "dropout" in data else set()
        return own.union(*map(found, data.values()))

    config = PAIR_PRESETS[name]()
    if isinstance(config, Seq2SeqConfig):
        assert config.with_dropout(0.3).encoder.dropout == 0  # it is between layers, and there is one
        config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, layers=2))
    assert found(config.with_dropout(0.3).to_dict()) == {0.3}
    assert config.with_dropout(0.3).with_dropout(0.1) == config.with_dropout(0.1)


def test_resume_needs_the_start_until_there_is_a_checkpoint(tmp_path):
    """The run has its own weights and tokenizers then; before that it would begin with fresh ones."""
    base = make_base(tmp_path)
    recipe = write_tune(base, model=None)
    assert train(recipe, out=tmp_path / "whole") == 0
    kill_at(9, recipe, tmp_path / "cut")
    kill_at(2, recipe, tmp_path / "early")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="base: there is no such"):
        train(recipe, out=tmp_path / "early", resume=True)
    assert train(recipe, out=tmp_path / "cut", resume=True) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert train(tmp_path / "cut" / "recipe.yaml", sets=["steps=14"], resume=True) == 0


def test_recipes_that_do_not_fit_their_start(tmp_path):
    base = make_base(tmp_path)

    def refused(message, error=ConfigError, **changes):
        with pytest.raises(error, match=message):
            train(write_tune(base, **changes), out=tmp_path / "never")
        assert not (tmp_path / "never").exists()

    refused("the recipe has neither model nor start", start=None)
    refused("the data are pairs and there is no tokenizer; add data.tokenizer", start=None, model="bahdanau")
    refused(r"model is another one than that of start\.path=.* with start\.dropout=None; leave", model="bahdanau")
    refused(r"with start the tokenizer is the checkpoint's; leave data\.tokenizer out", tokenizers=TWO)
    refused("adapter is for language models", adapter={"rank": 2})
    refused("the character 'x' is not in", rows=[("xa", "A"), ("b", "B"), ("c", "C")])
    refused("has neither adapter_config", FileError, start={"path": str(tmp_path)})
    with pytest.raises(ConfigError, match="target_tokenizer is set and tokenizer is not"):
        PairDataConfig(source=TSVConfig(path="x"), target_tokenizer=CharacterTokenizerConfig())


def test_a_language_model_is_no_start_of_pairs_and_the_reverse(tmp_path):
    base = make_base(tmp_path)
    data = recipe_data(write_corpus(tmp_path))
    del data["model"], data["data"]["tokenizer"]
    (tmp_path / "text.yaml").write_text(dump_yaml(data | {"start": {"path": str(base)}}))
    with pytest.raises(ConfigError, match="is no language model; start from one, or give pairs"):
        train(tmp_path / "text.yaml", out=tmp_path / "never")


def test_targets_that_begin_in_another_way_are_refused(tmp_path):
    """As those of the package transly: training has one token for the begin and the end."""
    folder = tmp_path / "transly"
    folder.mkdir()
    write_tiny(folder)
    with pytest.raises(ConfigError, match=r"start\.path=.*transly: its targets begin with another token than they end"):
        train(write_tune(folder), out=tmp_path / "never")
