"""Recipes: schedules by hand, values that are refused, presets, sizes that come from the data."""

from pathlib import Path

import numpy as np
import pytest

from qkv.errors import ConfigError, FileError
from qkv.tasks import SampleConfig
from qkv.training import AdamWConfig, CosineConfig, RecipeConfig, WSDConfig, read_recipe
from qkv.yaml_files import dump_yaml
from runs import fast, recipe_data, write_corpus, write_recipe, write_vectors  # noqa: F401 - `fast` is a fixture
from tiny import tiny_config


def factors(schedule, steps):
    return [schedule.factor(step, steps) for step in range(steps)]


def test_warmup_then_cosine():
    """Three steps up (1/4, 2/4, 3/4), then half a cosine over the four that are left."""
    half = 0.5**0.5
    expected = [0.25, 0.5, 0.75, 1, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert factors(CosineConfig(warmup=3), 7) == pytest.approx(expected)


def test_cosine_ends_at_its_final_share():
    schedule = CosineConfig(warmup=0, final=0.1)
    assert schedule.factor(0, 10) == 1
    assert schedule.factor(5, 10) == pytest.approx(0.55)
    assert schedule.factor(10, 10) == schedule.factor(12, 10) == pytest.approx(0.1)


def test_warmup_stable_decay():
    """Two steps up, constant, then down over the last half: 5/5, 4/5, …, 1/5, and 0 where training has ended."""
    schedule = WSDConfig(warmup=2, decay=0.5)
    assert factors(schedule, 10) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert schedule.factor(10, 10) == 0
    assert factors(WSDConfig(warmup=0, decay=0.5, final=0.5), 4) == pytest.approx([1, 1, 1, 0.75])
    assert factors(WSDConfig(warmup=0, decay=0.0), 4) == [1, 1, 1, 1]


def test_a_warmup_longer_than_the_run():
    assert factors(CosineConfig(warmup=9), 2) == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamWConfig(lr=0.0), r"lr=0\.0 must be above 0 and finite"),
        (lambda: AdamWConfig(lr=float("inf")), r"lr=inf must be a finite number"),
        (lambda: AdamWConfig(betas=(0.9, 1.0)), r"betas=\[0\.9, 1\.0\] must be at least 0 and below 1"),
        (lambda: AdamWConfig(eps=0.0), r"eps=0\.0 must be above 0"),
        (lambda: AdamWConfig(weight_decay=-0.1), r"weight_decay=-0\.1 must not be negative"),
        (lambda: CosineConfig(warmup=-1), r"warmup=-1 must not be negative"),
        (lambda: CosineConfig(final=1.5), r"final=1\.5 be between 0 and 1"),
        (lambda: WSDConfig(decay=1.5), r"decay=1\.5 is a share of the steps"),
        (
            lambda: SampleConfig(tokens=0),
            r"sample\.tokens=0 must be at least 1; to write no sample, set sample to null",
        ),
        (lambda: SampleConfig(temperature=-1.0), r"temperature=-1\.0 must be at least 0"),
    ],
)
def test_values_of_the_parts(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(
            (key, 0, f"{key}=0 must be (at least 1|from 1)")
            for key in ("steps", "context", "batch_size", "accumulation", "keep")
        ),
        ("evaluate_batches", 0, r"evaluate_batches=0 must be at least 1"),
        ("clip", 0.0, r"clip=0\.0 must be above 0"),
        ("batch_size", 10**9, "batch_size=1000000000 must be from 1 to 100000"),
        ("accumulation", 10**9, "accumulation=1000000000 must be from 1 to 100000"),
        ("seed", -1, r"seed=-1 must be at least 0"),
        ("seed", 2**63, r"more than 63 bits"),
        (
            "precision",
            "float16",
            r"RecipeConfig\.precision = 'float16': input should be 'auto', 'float32' or 'bfloat16'",
        ),
    ],
)
def test_values_of_the_recipe(key, value, message):
    with pytest.raises(ConfigError, match=message):
        RecipeConfig.from_dict(recipe_data("corpus.txt") | {key: value})


def test_a_recipe_makes_the_round_trip():
    recipe = RecipeConfig.from_dict(recipe_data("corpus.txt", sample={"prompt": "the"}))
    assert RecipeConfig.from_dict(recipe.to_dict()) == recipe


@pytest.mark.usefixtures("fast")
def test_sizes_and_paths_come_from_the_data(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = RecipeConfig.from_dict(recipe_data("corpus.txt"))
    task = recipe.data.prepare()
    resolved = recipe.resolved(task)
    assert resolved.model.embed.vocab_size == task.tokenizer.vocab_size
    assert resolved.model.context == 16
    assert resolved.data.source.path == str(tmp_path / "corpus.txt")
    assert resolved.resolved(task) == resolved


def text_recipe(tmp_path, change):
    data = recipe_data(write_corpus(tmp_path))
    change(data)
    return RecipeConfig.from_dict(data)


def vector_recipe(tmp_path, change):
    data = recipe_data(write_corpus(tmp_path)) | {"model": tiny_config(vectors=True).to_dict()}
    data["data"] = {"source": {"type": "VectorFiles", "path": str(write_vectors(tmp_path))}}
    change(data)
    return RecipeConfig.from_dict(data)


VECTORS, TEXT = tiny_config(vectors=True).to_dict(), tiny_config().to_dict()


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (
            text_recipe,
            lambda d: d.update(context=5000),
            r"context=5000 and the corpus has only \d+ tokens to train on; lower",
        ),
        (
            text_recipe,
            lambda d: d["model"]["embed"].update(vocab_size=3),
            r"has 23 tokens and model\.embed\.vocab_size is 3;",
        ),
        (
            text_recipe,
            lambda d: d.update(model=VECTORS),
            r"the data are text and model\.embed is VectorEmbedder; use Token",
        ),
        (
            text_recipe,
            lambda d: d["model"].update(head={"type": "VectorHead", "n_out": 3}),
            r"the data are text and model\.head is VectorHead; use LMHead",
        ),
        (
            text_recipe,
            lambda d: d.update(sample={"prompt": "the cat sat on a mat"}),
            r"sample\.prompt has 20 tokens and there is room for 15; make it shorter",
        ),
        (text_recipe, lambda d: d.update(sample={"prompt": "Q"}), r"the character 'Q' is not in the corpus"),
        (
            vector_recipe,
            lambda d: d.update(model=TEXT),
            r"the data are vectors and model\.embed is TokenEmbedder; use Vec",
        ),
        (
            vector_recipe,
            lambda d: d["model"]["embed"].update(n_features=7),
            r"the vectors have 5 features and model\.embed\.n_features is 7; leave it out, or set it to 5",
        ),
        (
            vector_recipe,
            lambda d: d["model"]["head"].update(n_out=1),
            r"the vectors have 5 features and model\.head\.n_out is 1; the model predicts the next vector",
        ),
        (
            text_recipe,
            lambda d: d["model"]["blocks"]["pattern"]["sublayers"][0].update(mask={"type": "Chunked", "size": 3}),
            r"predict what comes next, and the mask Chunked of an attention lets a token see it; use Causal",
        ),
    ],
)
def test_a_model_that_does_not_fit_the_data(tmp_path, make, change, message):
    recipe = make(tmp_path, change)
    with pytest.raises(ConfigError, match=message):
        recipe.resolved(recipe.data.prepare())


def test_samples_need_text(tmp_path):
    with pytest.raises(ConfigError, match=r"sample writes text and the data are vectors; set sample to null"):
        vector_recipe(tmp_path, lambda d: d.update(sample={}))


def test_a_context_longer_than_the_position_table(tmp_path):
    table = {"type": "LearnedPositions", "length": 8}
    with pytest.raises(ConfigError, match=r"context=16 is longer than the model's position table of 8; lower it"):
        text_recipe(tmp_path, lambda d: d["model"]["embed"].update(position=table))


# --- files ----------------------------------------------------------------------------------------------------------


def test_changes_and_presets(tmp_path):
    path = write_recipe(tmp_path)
    recipe = read_recipe(path, ["model=small", "model.d_model=128", "optimizer.lr=3e-4"])
    assert (recipe.model.d_model, recipe.model.blocks.n, recipe.optimizer.lr) == (128, 4, 3e-4)
    data = recipe_data("corpus.txt", model={"preset": "small", "d_model": 64})
    path.write_text(dump_yaml(data))
    assert read_recipe(path).model.d_model == 64


def test_recipes_that_come_with_qkv():
    assert read_recipe(Path("shakespeare")).steps > 100


def test_no_such_recipe(tmp_path):
    message = r"shakespear: no such file, and no recipe of that name; did you mean 'shakespeare'\?"
    with pytest.raises(FileError, match=message):
        read_recipe(Path("shakespear"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"list\.yaml: holds a list and must hold the keys of a recipe"):
        read_recipe(tmp_path / "list.yaml")


def test_vectors_of_another_type_are_read(tmp_path):
    np.save(tmp_path / "waves.npy", np.zeros((40, 5)))
    recipe = RecipeConfig.from_dict(
        {
            "model": VECTORS,
            "data": {"source": {"type": "VectorFiles", "path": str(tmp_path)}},
            "steps": 1,
            "context": 16,
        }
    )
    assert recipe.resolved(recipe.data.prepare()).model.embed.n_features == 5
