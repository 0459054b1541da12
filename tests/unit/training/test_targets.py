"""What labelled items have besides one class: numbers, and several classes. Trained, measured, used, refused."""

import json
import math

import numpy as np
import pytest
import torch
import yaml

import qkv
from qkv.cli import main
from qkv.data.labelled import LabelledFilesConfig
from qkv.errors import ConfigError, FileError
from qkv.loading.facts import Facts
from qkv.masks import Full
from qkv.nn.heads import ClassHeadConfig, SquaredErrorConfig
from qkv.nn.pooling import MeanPoolConfig
from qkv.tasks.findings import FoundNumbers, FoundSets
from qkv.tasks.targets import NumbersConfig, OneClassConfig, SeveralClassesConfig, targets_for
from qkv.training.recipe import RecipeConfig
from tiny import tiny_config

WORDS = [f"{a}{b}" for a in "abcdefgh" for b in "wxyz"]
PRICES = [(word, 1000.0 + 100 * "wxyz".index(word[1])) for word in WORDS]
SAYS = {"early": "abcd", "last": "z", "odd": "aceg"}
SETS = [(word, [name for name, letters in SAYS.items() if set(word) & set(letters)]) for word in WORDS]


def recipe(path, targets, **changes):
    model = tiny_config(mask=Full()).replace(head=None).to_dict()
    model["embed"]["vocab_size"] = None
    data = {"type": "ClassData", "source": {"type": "LabelledFiles", "path": str(path)}, "validation": 0.2}
    data |= {"tokenizer": {"type": "CharacterTokenizer"}, "targets": targets}
    made = {"model": model, "data": data, "steps": 60, "context": 16, "batch_size": 16, "precision": "float32"}
    return made | {"optimizer": {"lr": 1e-2}, "evaluate_every": 40} | changes


def written(path, rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def train(data, out):
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(data))
    assert main(["train", str(path), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def prices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prices")
    return train(recipe(written(folder / "prices.jsonl", PRICES), {"type": "Numbers"}), folder / "run")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return train(recipe(written(folder / "sets.jsonl", SETS), {"type": "SeveralClasses"}), folder / "run")


def test_numbers_are_learned_and_said_in_their_units(prices, tmp_path, capsys):
    last = json.loads((prices / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["rmse"] < 50
    assert last["r2"] > 0.8
    assert last["rmse"] == pytest.approx(math.sqrt(last["validation_loss"]) * qkv.load(prices).facts.scale[1], rel=1e-4)
    assert (prices / "numbers.png").stat().st_size > 1000
    assert not (prices / "confusion.png").exists()
    loaded = qkv.load(prices)
    assert loaded.predict(["aw", "hz"]).tolist() == [[pytest.approx(1000, abs=80)], [pytest.approx(1300, abs=80)]]
    with pytest.raises(ConfigError, match="gives numbers, which are not likely or unlikely; use `predict`"):
        loaded.classify("aw")
    capsys.readouterr()
    assert main(["classify", str(prices), "aw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["numbers"] == [pytest.approx(1000, abs=80)]
    assert main(["eval", str(prices), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rmse"] == pytest.approx(last["rmse"], rel=1e-4)
    assert report["loss"] == pytest.approx(last["validation_loss"], rel=1e-4)
    other = written(tmp_path / "other.jsonl", [("aw", 2000), ("bw", "2000")])
    assert main(["eval", str(prices), str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mae"] == pytest.approx(1000, abs=80)


def test_a_saved_model_keeps_its_units_and_a_head_takes_them_in(prices, tmp_path):
    loaded = qkv.load(prices)
    wanted = loaded.predict(["aw", "hz"])
    qkv.save(loaded, tmp_path / "saved")
    assert torch.equal(qkv.load(tmp_path / "saved").predict(["aw", "hz"]), wanted)
    inside = qkv.load(prices).in_units()
    assert inside.facts.scale is None
    torch.testing.assert_close(inside.predict(["aw", "hz"]), wanted, rtol=1e-5, atol=0)
    assert torch.equal(qkv.load(prices).predict(["aw", "hz"]), wanted)  # the files are as they were


def test_several_classes_are_learned(sets, tmp_path, capsys):
    last = json.loads((sets / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["micro_f1"] > 0.9
    assert last["exact"] > 0.8
    (guesses,) = qkv.load(sets).classify("az")
    assert {guess.label for guess in guesses if guess.probability > 0.5} == {"early", "last", "odd"}
    with pytest.raises(ConfigError, match="gives no numbers; use `classify`"):
        qkv.load(sets).predict("az")
    capsys.readouterr()
    other = written(tmp_path / "other.jsonl", [("az", ["early", "last", "odd"]), ("hw", [])])
    assert main(["eval", str(sets), str(other), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact"] == report["micro_f1"] == 1
    assert report["classes"]["last"]["items"] == 1


def test_what_is_found_of_numbers_is_by_its_definition():
    found = FoundNumbers(np.array([1.0, 2, 3, 6]), np.array([1.0, 4, 3, 5]))
    rmse, mae, r2 = (measure.value for measure in found.measures())
    assert (rmse, mae, r2) == (pytest.approx(math.sqrt(5 / 4)), 0.75, pytest.approx(1 - 5 / 14))
    assert [each.name for each in FoundNumbers(np.ones(3), np.zeros(3)).measures()] == ["rmse", "mae"]


def test_what_is_found_of_sets_is_by_its_definition():
    true = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=bool)
    found = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]], dtype=bool)
    micro, macro, exact = (measure.value for measure in FoundSets(("a", "b", "c"), true, found).measures())
    assert micro == pytest.approx(2 * 2 / (4 + 4))
    assert macro == pytest.approx((2 / 3 + 1 / 2) / 2)  # of b there is none
    assert exact == 0.5


def test_numbers_are_standardised_by_those_to_train_on():
    targets = NumbersConfig().fitted([1.0, 3.0])
    assert (targets.mean, targets.std) == (2, 1)
    assert targets.encoded([1.0, 5.0], ["", ""]).tolist() == [[-1], [3]]
    assert targets.facts().scale == (2, 1)
    assert targets.findings(torch.tensor([[-1.0]]), torch.tensor([[3.0]])).found.tolist() == [5]
    assert NumbersConfig(mean=0.0, std=10.0).fitted([1.0, 3.0]).encoded([5.0], [""]).tolist() == [[0.5]]
    assert NumbersConfig().of_facts(Facts()).encoded([5.0], [""]).tolist() == [[5]]
    assert targets_for(ClassHeadConfig(objective=SquaredErrorConfig(), pool=MeanPoolConfig())) == NumbersConfig()


@pytest.mark.parametrize(
    ("targets", "label", "message"),
    [
        (NumbersConfig(), "much", "x is 'much' and must be a finite number"),
        (NumbersConfig(), "nan", "x is 'nan' and must be a finite number"),
        (NumbersConfig(), True, "x is True and must be a finite number"),
        (NumbersConfig(), 10**400, "and must be a finite number"),
        (NumbersConfig(), None, "x is None and must be a finite number"),
        (SeveralClassesConfig(), "a;b", "x is 'a;b' and must be a list of classes; write one, or set data.targets.sep"),
        (SeveralClassesConfig(), [["a"]], "must be the name of a class"),
        (SeveralClassesConfig(), {"a": 1}, "must be a list of classes"),
        (OneClassConfig(), 1.5, "x is 1.5 and must be the name of a class; for numbers set data.targets to Numbers"),
        (OneClassConfig(), ["a"], "for several classes to SeveralClasses"),
        (OneClassConfig(), None, "x is None and must be the name of a class"),
    ],
)
def test_a_label_of_another_kind_is_refused(targets, label, message):
    with pytest.raises(FileError, match=message):
        targets.parse(label, "x")


def test_labels_in_a_text_are_separated():
    targets = SeveralClassesConfig(separator=";")
    assert targets.parse(" b;a; b ;", "x") == ("b", "a")
    assert targets.parse("", "x") == ()
    fitted = targets.fitted([("b", "a"), ()])
    assert fitted.encoded([("a",), ()], ["", ""]).tolist() == [[1, 0], [0, 0]]
    with pytest.raises(FileError, match="y is 'c', and the model has no such class; there are a, b"):
        fitted.encoded([("c",)], ["y"])
    with pytest.raises(ConfigError, match="separator is empty"):
        SeveralClassesConfig(separator="")


def test_classes_that_are_named_keep_their_order():
    assert OneClassConfig(labels=("z", "a")).fitted(["a", "z"]).labels == ("z", "a")
    with pytest.raises(FileError, match="the classes of all items are 'z', 'z'; give two classes or more, each once"):
        OneClassConfig(labels=("z", "z")).fitted(["z"])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [([3.0, 3.0], "the numbers of all items are 3; give several"), ([1e308, -1e308, 1e308], "are too large")],
)
def test_numbers_of_which_nothing_is_to_learn(numbers, message):
    with pytest.raises(FileError, match=message):
        NumbersConfig().fitted(numbers)


def test_a_head_for_other_targets_is_refused(tmp_path):
    made = recipe(written(tmp_path / "prices.jsonl", PRICES), {"type": "Numbers"})
    head = {"type": "ClassHead", "pool": {"type": "MeanPool"}, "objective": {"type": "BinaryCrossEntropy"}}
    config = RecipeConfig.from_dict(made | {"data": made["data"] | {"head": head}})
    with pytest.raises(ConfigError, match=r"objective BinaryCrossEntropy and data\.targets are Numbers, with Sq"):
        config.resolved(config.data.prepare())


def test_a_label_is_where_it_stands(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1\nb\n")
    items = list(LabelledFilesConfig(path=str(tmp_path / "a.csv")).items())
    assert [item.label for item in items] == ["1", None]
    assert items[1].where == f"{tmp_path / 'a.csv'}, row 2: 'label'"
