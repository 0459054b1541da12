"""Classes of texts: trained from scratch and from an encoder, resumed, measured, used; and what cannot be learned."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import yaml

import qkv
from qkv.cli import main
from qkv.data.labelled import LabelledBatches, LabelledFilesConfig
from qkv.data.reads import Read
from qkv.errors import ConfigError, FileError
from qkv.loading.encoder import Encoder
from qkv.masks import Full
from qkv.tasks.findings import Confusion
from qkv.tasks.targets import OneClassConfig
from qkv.training.recipe import RecipeConfig
from qkv.training.trainer import Trainer
from tiny import tiny_config

COLOURS, ANIMALS = ["red", "green", "blue", "black"], ["cat", "dog", "horse", "cow"]
TEXTS = [(f"{a} {b}", "colour" if a in COLOURS else "animal") for a in COLOURS + ANIMALS for b in "wxyz"]


def recipe(source, **changes):
    model = tiny_config(mask=Full()).replace(head=None).to_dict()
    model["embed"]["vocab_size"] = None
    data = {"type": "ClassData", "source": source, "validation": 0.2, "tokenizer": {"type": "CharacterTokenizer"}}
    made = {"model": model, "data": data, "steps": 40, "context": 16, "batch_size": 8, "precision": "float32"}
    return made | {"optimizer": {"lr": 1e-2}, "evaluate_every": 20} | changes


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *TEXTS])
    return path


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    return train(recipe({"type": "LabelledFiles", "path": str(table)}), tmp_path_factory.mktemp("runs") / "run")


def train(data, out, *more):
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(data))
    assert main(["train", str(path), "--out", str(out), *more]) == 0
    return out


def test_a_run_learns_says_and_draws(run, capsys):
    loaded = qkv.load(run)
    assert isinstance(loaded, Encoder)
    assert loaded.facts.labels == ("animal", "colour")
    assert [guesses[0].label for guesses in loaded.classify(["red z", "cow"])] == ["colour", "animal"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "validation_loss" in line]
    assert all("accuracy" in line for line in evaluations)  # each was of all that is held out
    last = evaluations[-1]
    assert last["accuracy"] == last["f1"] == 1.0
    assert (run / "confusion.png").stat().st_size > 1000
    assert main(["eval", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    assert report["classes"]["animal"]["f1"] == 1.0


def test_speed_is_of_tokens_and_what_is_held_out_is_read_once(table, monkeypatch):
    config = RecipeConfig.from_dict(recipe({"type": "LabelledFiles", "path": str(table)}))
    task = config.data.prepare()
    trainer = Trainer(config.resolved(task), task)
    batch = trainer.batches.batch(0, 0)
    assert trainer.update()["tokens"] == len(batch.targets)  # texts, which are what the loss is the mean over
    assert trainer.read == batch.inputs.numel() > len(batch.targets)
    seen = []
    forward = type(trainer.model).forward
    monkeypatch.setattr(type(trainer.model), "forward", lambda *args, **more: seen.append(1) or forward(*args, **more))
    assert {"accuracy", "f1"} <= trainer.evaluate(None).keys()
    assert len(seen) == len(trainer.held_out)


def test_it_is_measured_on_other_texts(run, tmp_path, capsys):
    path = tmp_path / "more.jsonl"
    path.write_text('{"said": "red x", "label": "animal"}\n{"said": "dog x", "label": "animal"}\n')
    assert main(["eval", str(run), str(path), "--field", "said", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["accuracy"], report["texts"]) == (0.5, 2)
    path.write_text('{"text": "red x", "label": "plant"}\n')
    assert main(["eval", str(run), str(path)]) == 3
    assert (
        "line 1: 'label' is 'plant', and the model has no such class; there are animal, colour"
        in capsys.readouterr().err
    )


def test_a_stopped_run_goes_on_bit_for_bit(run, table, tmp_path):
    made = recipe({"type": "LabelledFiles", "path": str(table)}, save_every=20)
    again = train(made, tmp_path / "again")
    shutil.rmtree(max((again / "checkpoints").iterdir()))  # as if it had been stopped after step 20
    train(made, again, "--resume")
    for a, b in zip(qkv.load(again).model.parameters(), qkv.load(run).model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_trained_model_is_given_a_fresh_head(run, table, tmp_path):
    loaded = qkv.load(run)
    (tmp_path / "three.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": i % 3}) + "\n" for i, (text, _) in enumerate(TEXTS))
    )
    data = {"type": "ClassData", "source": {"type": "LabelledFiles", "path": str(tmp_path / "three.jsonl")}}
    made = recipe(None, data=data, start={"path": str(run)}, steps=1) | {"optimizer": {"lr": 1e-30}}
    del made["model"]
    tuned = qkv.load(train(made, tmp_path / "tuned"))
    assert tuned.facts.labels == ("0", "1", "2")
    assert tuned.model.head.proj.weight.shape == (3, 16)
    before = {name: p for name, p in loaded.model.named_parameters() if not name.startswith("head.")}
    for name, p in tuned.model.named_parameters():
        assert name.startswith("head.") or torch.equal(p, before[name])
    train(made | {"steps": 2}, tmp_path / "tuned", "--resume")


def test_a_fresh_head_is_trained_beside_adapters(run, table, tmp_path, capsys):
    (tmp_path / "three.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": i % 3}) + "\n" for i, (text, _) in enumerate(TEXTS))
    )
    data = {"type": "ClassData", "source": {"type": "LabelledFiles", "path": str(tmp_path / "three.jsonl")}}
    made = recipe(None, data=data, start={"path": str(run)}, steps=4, save_every=2, adapter={"type": "LoRA", "rank": 2})
    del made["model"]
    tuned = train(made, tmp_path / "tuned")
    last = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert main(["eval", str(tuned), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    loaded, before = qkv.load(tuned), dict(qkv.load(run).model.named_parameters())
    assert loaded.facts.labels == ("0", "1", "2")
    same = {name for name, p in loaded.model.named_parameters() if name in before and p.shape == before[name].shape
            and torch.equal(p, before[name])}  # fmt: skip
    assert any(name.startswith("embed.") for name in same)
    assert not any(".qkv." in name for name in same)
    again = tmp_path / "again"
    shutil.copytree(tuned, again)
    newest = max((again / "checkpoints").iterdir())
    assert (newest / "head.safetensors").is_file()
    shutil.rmtree(newest)
    train(made, again, "--resume")
    for a, b in zip(qkv.load(again).model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert main(["convert", str(tuned), str(tmp_path / "peft"), "--to", "peft"]) == 3
    assert "trained a head beside its adapters; use qkv convert --to hf" in capsys.readouterr().err
    qkv.save(loaded, tmp_path / "saved")
    assert qkv.load(tmp_path / "saved").classify("red x") == loaded.classify("red x")


def test_folders_of_classes(tmp_path):
    for text, label in TEXTS:
        (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / label / f"{text}.txt").write_text(text)
    run = train(recipe({"type": "ClassFolders", "path": str(tmp_path / "data")}, steps=2), tmp_path / "run")
    assert qkv.load(run).facts.labels == ("animal", "colour")


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ("a,x\nb,x\nc,x\n", {}, "the classes of all items are 'x'; give two classes or more"),
        ("a,x\n,y\n", {}, "row 2: 'text' is empty"),
        ("a,x\n", {}, "1 texts, of which none can be held out"),
        ("a,x\nb,y\nc,x\nd,y\n", {"context": 0}, "context"),
        ("a long text,x\nb,y\nc,x\nd,y\n", {"context": 4}, "context=4 and the longest text has 11 tokens"),
    ],
)
def test_what_cannot_be_learned_is_one_line(rows, changes, message, tmp_path, capsys):
    (tmp_path / "texts.csv").write_text("text,label\n" + rows)
    made = recipe({"type": "LabelledFiles", "path": str(tmp_path / "texts.csv")}, **changes)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) in (2, 3)
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_class_that_only_the_held_out_texts_have(table, tmp_path):
    (tmp_path / "other.csv").write_text("text,label\nrose,plant\n")
    data = recipe({"type": "LabelledFiles", "path": str(table)})["data"] | {"validation": str(tmp_path / "other.csv")}
    with pytest.raises(
        FileError, match="row 1: 'label' is 'plant', and the model has no such class; there are animal, colour"
    ):
        RecipeConfig.from_dict(recipe(None, data=data)).data.prepare()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": {}}, "sample writes text and the data are classes"),
        ({"start": {"path": "x"}}, "with start the tokenizer is the checkpoint's"),
        ({"model.head": {"type": "LMHead"}}, "model.head is LMHead, which gives no classes; set it to null"),
        ({"model.head": {"type": "ClassHead"}}, "model.head has no pool, and each item has one class"),
        (
            {
                "model.head": {"type": "ClassHead", "pool": {"type": "FirstToken"}},
                "data.head": {"type": "ClassHead", "pool": {"type": "MeanPool"}},
            },
            "model.head and data.head are two different heads",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(table, changes, message):
    made = recipe({"type": "LabelledFiles", "path": str(table)})
    for key, value in changes.items():
        inner, _, last = key.rpartition(".")
        (made[inner] if inner else made)[last] = value
    with pytest.raises(ConfigError, match=message):
        RecipeConfig.from_dict(made)


def test_a_run_that_cuts_is_measured_on_what_it_cuts(table, tmp_path):
    made = recipe({"type": "LabelledFiles", "path": str(table)}, context=3, steps=1)
    made["data"]["cut"] = True
    made["model"]["embed"]["position"] = {"type": "LearnedPositions", "length": 3}  # which reads no more
    train(made, tmp_path / "run")


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "texts.csv").write_text("text,label,label\na,x,y\n")
    with pytest.raises(FileError, match="2 columns are called 'label'; give each a name of its own"):
        list(LabelledFilesConfig(path=str(tmp_path / "texts.csv")).items())


def test_classes_have_one_order_in_every_process():
    assert OneClassConfig().fitted(["10", "2", "02", "-1", "0", "-0"]).labels == ("-1", "-0", "0", "02", "2", "10")
    assert OneClassConfig().fitted(["9" * 5000, "1"]).labels == ("1", "9" * 5000)


def test_the_names_of_classes_are_not_lost(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "facts.yaml").unlink()
    with pytest.raises(FileError, match=r"has no facts\.yaml, which names the classes"):
        qkv.load(tmp_path / "run")


def test_longer_texts_are_cut_where_asked(table):
    made = recipe({"type": "LabelledFiles", "path": str(table)}, context=3)
    made["data"]["cut"] = True
    config = RecipeConfig.from_dict(made)
    task = config.data.prepare()
    batches, _ = task.batches(config.resolved(task))
    assert int(batches.batch(0, 0).tokens.index.max()) == 2


def test_batches_hold_each_document_once_and_no_padding():
    documents = [np.arange(n, 2 * n) for n in range(1, 8)]
    batches = LabelledBatches(documents, torch.arange(7), Read, context=9, batch_size=3, seed=1, shuffle=True)
    seen = []
    for i in range(len(batches)):
        batch = batches.batch(2, i)
        assert batch.tokens.valid.all()
        parts = batch.inputs[0].split([len(documents[label]) for label in batch.targets.tolist()])
        for label, part in zip(batch.targets.tolist(), parts, strict=True):
            assert part.tolist() == documents[label].tolist()
            seen.append(label)
    assert sorted(seen) == list(range(7))


def test_measures_are_those_of_their_definitions():
    true, found = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 1])
    confusion = Confusion.of(("a", "b", "c"), true, found)
    assert confusion.counts.tolist() == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    accuracy, f1 = (measure.value for measure in confusion.measures())
    assert accuracy == pytest.approx(3 / 6)
    assert f1 == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert confusion.by_class()["b"] == {"precision": 1 / 3, "recall": 1 / 2, "f1": pytest.approx(0.4), "items": 2}
