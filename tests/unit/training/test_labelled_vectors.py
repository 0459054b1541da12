"""Series of vectors with a number or a class: a table and folders, trained on, measured, used; and what is refused."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml

import qkv
from qkv.cli import main
from qkv.data.labelled_vectors import LabelledVectorsConfig
from qkv.data.sources import open_vectors
from qkv.errors import ConfigError, FileError
from qkv.loading.encoder import Encoder
from qkv.training.recipe import RecipeConfig
from tiny import tiny_config


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Series of unequal length, and the mean of their first feature in a table beside them."""
    folder, random = tmp_path_factory.mktemp("series"), np.random.default_rng(0)
    with (folder / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label"])
        for i in range(60):
            level = random.normal()
            series = np.column_stack([level + 0.1 * random.normal(size=3 + i % 4), random.normal(size=3 + i % 4)])
            np.save(folder / f"{i}.npy", series)
            rows.writerow([f"{i}.npy", 50 + 10 * series[:, 0].mean()])
    return folder / "table.csv"


def recipe(source, **data):
    model = tiny_config(vectors=True, layers=1).replace(head=None).to_dict()
    model["embed"]["n_features"] = None
    data = {"type": "ClassData", "source": source, "validation": 0.2} | data
    made = {"model": model, "data": data, "steps": 60, "context": 16, "batch_size": 16, "precision": "float32"}
    return made | {"optimizer": {"lr": 1e-2}, "evaluate_every": 60}


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    made = recipe({"type": "LabelledVectors", "path": str(table)}, targets={"type": "Numbers"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made))
    assert main(["train", str(folder / "recipe.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_a_quantity_of_series_is_learned(run, table, tmp_path, capsys):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["r2"] > 0.8
    loaded = qkv.load(run)
    assert isinstance(loaded, Encoder)
    files = [table.parent / f"{i}.npy" for i in range(5)]
    wanted = [50 + 10 * np.load(file)[:, 0].mean() for file in files]
    found = loaded.predict(files)
    assert np.abs(found[:, 0].numpy() - wanted).max() < 8
    arrays = loaded.predict([torch.tensor(np.load(file)) for file in files])
    torch.testing.assert_close(arrays, found)
    torch.testing.assert_close(loaded.predict(np.load(files[2])), found[2:3])  # of another length than its neighbours
    capsys.readouterr()
    assert main(["classify", str(run), str(files[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["numbers"] == [pytest.approx(found[0].item(), rel=1e-4)]
    assert main(["eval", str(run), str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["series"] == 60
    assert loaded.embed(files).shape == (5, 16)
    qkv.save(loaded, tmp_path / "saved")  # its masks are causal, and it is no model that goes on with series
    assert torch.equal(qkv.load(tmp_path / "saved").predict(files), found)


def test_what_is_no_series_is_refused(run, tmp_path):
    loaded = qkv.load(run)
    np.save(tmp_path / "two.npy", np.zeros((2, 3, 2)))
    with pytest.raises(FileError, match=r"two\.npy: holds 2 series; give each a file of its own"):
        loaded.predict(tmp_path / "two.npy")
    with pytest.raises(ConfigError, match=r"a series is floats \(T, features\), found torch\.int64 \(2,\)"):
        loaded.predict([[1, 2]])
    with pytest.raises(ConfigError, match="the vectors have 3 features and the model takes 2"):
        loaded.predict(torch.zeros(4, 3))


def test_folders_of_classes_hold_series_and_hidden_ones_are_left_out(tmp_path):
    for label in ("still", "moving", ".ipynb_checkpoints"):
        (tmp_path / label).mkdir()
        np.save(tmp_path / label / "a.npy", np.ones((2, 3, 2), dtype=np.float32))
        (tmp_path / label / "b.csv").write_text("x,y\n1,2\n3.5,-4e1\n")
    source = LabelledVectorsConfig(path=str(tmp_path))
    found = [(item.item.shape, item.label) for item in source.items()]
    shapes = [(3, 2), (3, 2), (2, 2)]
    assert found == [(shape, label) for label in ("moving", "still") for shape in shapes]
    assert list(source.notes()) == [
        f"{tmp_path}: left out .ipynb_checkpoints; a folder whose name begins with a dot is no class"
    ]
    config = RecipeConfig.from_dict(recipe({"type": "LabelledVectors", "path": str(tmp_path)}))
    task = config.data.prepare()
    resolved = config.resolved(task)
    assert (resolved.model.embed.n_features, resolved.model.head.n_classes) == (2, 2)
    assert list(config.data.notes()) == list(source.notes())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2\n3\n", r"row 2: has 1 values and the first 2"),
        ("a,b\n1,2\n3,x\n", r"row 3: 'x' is no number; write a vector of numbers in each row"),
        ("a,b\n", "has no row of numbers"),
        ("1;2\n3;4\n", "has no row of numbers|is no number"),
        ("1,nan\n", "has a value that is not finite"),
        ("", "has no row of numbers"),
    ],
)
def test_a_table_of_numbers_that_is_none(text, message, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.csv").write_text(text)
    with pytest.raises(FileError, match=message):
        list(LabelledVectorsConfig(path=str(tmp_path)).items())


def test_numbers_in_rows_are_read_with_names_and_without(tmp_path):
    (tmp_path / "x.csv").write_text("1,2\n\n3,4\n")
    assert open_vectors(tmp_path / "x.csv").tolist() == [[1, 2], [3, 4]]
    (tmp_path / "x.csv").write_text("time,level\n1,2\n")
    assert open_vectors(tmp_path / "x.csv").tolist() == [[1, 2]]


def test_series_of_several_widths_are_refused(tmp_path):
    (tmp_path / "table.jsonl").write_text('{"file": "a.npy", "label": 1}\n{"file": "b.npy", "label": 2}\n')
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    np.save(tmp_path / "b.npy", np.zeros((3, 1)))
    with pytest.raises(FileError, match=r"b\.npy: 1 features, but .*a\.npy has 2; give all the same width"):
        list(LabelledVectorsConfig(path=str(tmp_path / "table.jsonl")).items())
    (tmp_path / "b.npy").unlink()
    with pytest.raises(FileError, match=r"b\.npy: not a readable \.npy array"):
        list(LabelledVectorsConfig(path=str(tmp_path / "table.jsonl")).items())


def test_what_is_for_texts_or_pictures_is_refused(table):
    source = {"type": "LabelledVectors", "path": str(table)}
    with pytest.raises(ConfigError, match="for texts and the source holds vectors"):
        RecipeConfig.from_dict(recipe(source, cut=True))
    with pytest.raises(ConfigError, match="for pictures and the source holds vectors"):
        RecipeConfig.from_dict(recipe(source, augment=[{"type": "Shift", "pixels": 1}]))
