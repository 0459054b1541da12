"""Training from Python: a recipe as a path, a mapping or a config; data that are no files; the run with its model."""

import time

import numpy as np
import pytest
import torch

import qkv
from qkv.training.recipe_files import read_recipe
from runs import fast, metrics, recipe_data, write_corpus, write_recipe  # noqa: F401 - `fast` is a fixture

pytestmark = pytest.mark.usefixtures("fast")


def test_a_recipe_is_a_path_a_mapping_or_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, steps=3)
    data = recipe_data(write_corpus(tmp_path), steps=3)
    runs = [qkv.train(recipe) for recipe in (path, str(path), data, read_recipe(path))]
    assert data == recipe_data(write_corpus(tmp_path), steps=3), "a mapping is left as it was"
    assert len({run.path for run in runs}) == 4
    assert {run.exit_code for run in runs} == {0}
    for run in runs:
        assert run.metrics == metrics(run.path)
        assert not run.model.training
        for a, b in zip(run.model.parameters(), runs[0].model.parameters(), strict=True):
            assert torch.equal(a, b)
    assert isinstance(runs[0].loaded.generate("the", max_new_tokens=3), str)
    assert "step 3/3" in capsys.readouterr().out


def test_a_run_goes_on(tmp_path):
    path = write_recipe(tmp_path, steps=3)
    run = qkv.train(path, out=tmp_path / "run")
    more = qkv.train(run.path / "recipe.yaml", sets=["steps=5"], resume=True)
    assert more.path == run.path
    assert [entry["step"] for entry in more.metrics if "loss" in entry] == [1, 2, 3, 4, 5]


def test_texts_and_vectors_from_python(tmp_path):
    corpus = write_corpus(tmp_path)
    recipe = recipe_data(corpus, steps=2)
    texts = [f"{i} the boats at dusk " * 20 for i in range(20)]
    run = qkv.train(recipe, data=texts, out=tmp_path / "texts")
    assert list(read_recipe(run.path / "recipe.yaml").data.source.documents()) == texts
    vectors = [np.random.default_rng(i).normal(size=(40 + i, 3)) for i in range(4)]
    recipe["data"] = {"validation": 0.2}
    recipe["model"]["embed"] = {"type": "VectorEmbedder"}
    recipe["model"]["head"] = {"type": "VectorHead"}
    recipe |= {"context": 8, "sample": None}
    run = qkv.train(recipe, data=vectors, out=tmp_path / "vectors")
    found = read_recipe(run.path / "recipe.yaml").data.source.documents()
    assert all(np.allclose(a, b) for a, b in zip(found, vectors, strict=True))


@pytest.mark.parametrize("data", [[], ["a", 3], [{"prompt": "a", "response": "b"}, "a"]])
def test_data_of_several_kinds(tmp_path, data):
    with pytest.raises(qkv.errors.ConfigError, match=r"data holds .*; give only texts, only conversations, only pairs"):
        qkv.train(recipe_data(write_corpus(tmp_path)), data=data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arrays_of_anything_but_floats_are_named(tmp_path):
    with pytest.raises(qkv.errors.ConfigError, match=r"data holds array of object; give .* arrays of floats \(T, feat"):
        qkv.train(recipe_data(write_corpus(tmp_path)), data=[np.array([[1, None]])], out=tmp_path / "run")


def test_nothing_held_out_is_not_evaluated(tmp_path):
    run = qkv.train(write_recipe(tmp_path, steps=3), sets=["data.validation=0"], out=tmp_path / "run")
    assert run.exit_code == 0
    assert not any("validation_loss" in entry for entry in run.metrics)


@pytest.mark.parametrize("value", [10**30, 10**15, 10**8 + 1])
@pytest.mark.parametrize(
    "key",
    ["accumulation", "model.blocks.n", "model.d_model", "model.blocks.pattern.sublayers.1.d_ff", "seed", "keep",
     "batch_size", "context", "model.embed.vocab_size"],
)  # fmt: skip
def test_sizes_beyond_all_use_are_refused_at_once_and_leave_no_run(tmp_path, key, value):
    """Or they are harmless; they neither hang nor fill the memory."""
    start = time.process_time()
    run = tmp_path / "run"
    try:
        qkv.train(write_recipe(tmp_path, steps=1), sets=[f"{key}={value}"], out=run)
    except qkv.errors.ConfigError:
        assert not run.exists()
    else:
        assert key in ("seed", "keep", "batch_size", "model.embed.vocab_size")
    assert time.process_time() - start < 20
