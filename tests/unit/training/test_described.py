"""Pictures and texts: trained, measured, saved, used for words of one's own; and what cannot be learned."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import qkv
from qkv.cli import main
from qkv.data.described import Described, DescribedBatches, DescribedFilesConfig
from qkv.data.emojis import EmojisConfig
from qkv.data.reads import Read
from qkv.errors import ConfigError, FileError
from qkv.tasks.described import DescribedDataConfig, recall

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
PLACES = {"up": (0, 0), "low": (4, 0), "right": (0, 4)}


def picture(colour, place):
    values = np.zeros((8, 8, 3), np.uint8)
    y, x = PLACES[place]
    values[y : y + 4, x : x + 4] = COLOURS[colour]
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures and a table of their texts; one of the pictures has two."""
    place = tmp_path_factory.mktemp("pictures")
    rows = ["picture,text"]
    for colour in COLOURS:
        for where in PLACES:
            picture(colour, where).save(place / f"{colour}-{where}.png")
            (place / f"{colour}-{where}.txt").write_text(f"{colour} {where}\n\n{colour}\n")
            rows.append(f"{colour}-{where}.png,{colour} {where}")
    rows.append("red-up.png,the first")
    (place / "table.csv").write_text("\n".join(rows))
    return place


def recipe(source, **changes):
    model = qkv.preset("two-towers-small", d_model=16, n_layers=1, n_heads=2, text_layers=1, width=8, patch=4)
    data = {"type": "DescribedData", "source": source, "validation": 0.2, "tokenizer": {"type": "WordTokenizer"}}
    made = {"model": model.to_dict(), "data": data, "steps": 40, "context": 8, "batch_size": 9}
    made |= {"optimizer": {"lr": 1e-2}, "precision": "float32", "evaluate_every": 40, "save_every": 20}
    return made | changes


def train(data, out, *more):
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(data))
    assert main(["train", str(path), "--out", str(out), *more]) == 0
    return out


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return train(
        recipe({"type": "DescribedFiles", "path": str(folder / "table.csv")}), tmp_path_factory.mktemp("runs") / "run"
    )


def test_a_run_is_used_and_measured(run, folder, tmp_path, capsys):
    loaded = qkv.load(run)
    assert isinstance(loaded, qkv.Matcher)
    path = folder / "green-low.png"
    vectors = loaded.embed(["green low", path, "red up", str(path), Image.open(path)])
    assert vectors.shape == (5, 8)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5))
    assert torch.equal(vectors[1], vectors[3])
    assert torch.equal(vectors[1], vectors[4])
    assert vectors[0] @ vectors[1] > vectors[2] @ vectors[1]
    (guesses,) = loaded.classify(path, ["red", "green", "blue"], top=2)
    assert guesses[0].label == "green"
    assert guesses[0].probability > guesses[1].probability
    assert loaded.classify([], ["red"]) == []
    again = tmp_path / "saved"
    qkv.save(loaded, again)
    assert torch.equal(qkv.load(again).embed(["green low", path]), loaded.embed(["green low", path]))

    assert main(["eval", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"text_of_picture_r1", "text_of_picture_r5", "picture_of_text_r1", "picture_of_text_r5"} <= report.keys()
    assert report["picture_of_text_r5"] == last["picture_of_text_r5"] == 1.0  # of two that are held out
    assert main(["classify", str(run), str(path), "--labels", "red, green", "--template", "{} low", "--json"]) == 0
    assert next(iter(json.loads(capsys.readouterr().out)["classes"])) == "green"
    assert main(["embed", str(run), str(path), "--against", "green low"]) == 0
    assert capsys.readouterr().out.startswith(" 0.")
    assert main(["show", str(run)]) == 0
    assert "two towers: one reads texts" in capsys.readouterr().out
    for options, message in (
        ([], "is a model of texts and pictures and this is for an encoder; use qkv classify --labels"),
        (["--labels", ","], "give a list of what the pictures may show"),
        (["--labels", "red", "--template", "x"], "has no {}, where the label is to stand"),
        (["--template", "x {}"], "--template 'x {}' is for --labels; give both"),
    ):
        assert main(["classify", str(run), str(path), *options]) == 2
        assert message in capsys.readouterr().err


def test_a_stopped_run_goes_on_bit_for_bit_and_a_trained_model_is_trained_on(run, folder, tmp_path):
    source = {"type": "DescribedFiles", "path": str(folder / "table.csv")}
    again = train(recipe(source), tmp_path / "again")
    shutil.rmtree(max((again / "checkpoints").iterdir()))
    train(recipe(source), again, "--resume")
    for a, b in zip(qkv.load(again).model.parameters(), qkv.load(run).model.parameters(), strict=True):
        assert torch.equal(a, b)
    made = recipe(None, data={"type": "DescribedData", "source": source}, start={"path": str(run)}, steps=1)
    del made["model"]
    tuned = qkv.load(train(made, tmp_path / "tuned"))
    assert tuned.facts == qkv.load(run).facts


def test_a_folder_and_a_table_say_the_same(folder):
    of_folder = {item.texts[0]: item for item in DescribedFilesConfig(path=str(folder)).items()}
    of_table = {item.texts[0]: item for item in DescribedFilesConfig(path=str(folder / "table.csv")).items()}
    assert list(of_folder) == sorted(of_table)
    assert all(np.array_equal(of_folder[name].picture, item.picture) for name, item in of_table.items())
    assert of_table["red up"].texts == ("red up", "the first")
    assert of_folder["red up"].texts == ("red up", "red")


def test_what_is_held_out_is_shown_nowhere_in_training():
    items = [Described(np.full((1, 4, 4), i % 5, np.uint8), (f"thing {i % 5}", f"word {i}")) for i in range(20)]

    class Source:
        def items(self):
            return iter(items)

    data = DescribedDataConfig(source=EmojisConfig(), validation=0.4, tokenizer=qkv.CharacterTokenizerConfig())
    object.__setattr__(data, "source", Source())
    task = data.prepare()
    shown = {tuple(texts[0]) for _, texts in task._train}
    assert (len(task._train), len(task._validation)) == (12, 8)
    assert shown.isdisjoint(tuple(texts[0]) for _, texts in task._validation)


def test_texts_are_drawn_and_those_that_are_equal_have_one_number():
    words = [np.array([word]) for word in range(5)]
    items = [
        (np.zeros((3, 4, 4)), [words[0], words[3]]),
        (np.ones((3, 4, 4)), [words[1], words[3], words[4]]),
        (np.ones((3, 4, 8)), [words[2]]),
    ]

    def read_picture(x):
        return Read(torch.zeros(x.shape[2] // 4, 48), grid=(1, x.shape[2] // 4))

    sizes = {"context": 4, "batch_size": 3, "seed": 0}
    batches = DescribedBatches(items, read_picture, Read, [qkv.ShiftConfig(pixels=1)], shuffle=True, **sizes)
    targets = torch.stack([row for epoch in range(400) for row in batches.batch(epoch, 0).targets])
    assert set(map(tuple, targets.tolist())) == {(0, 0), (0, 1), (2, 2), (2, 1), (2, 3), (4, 4)}
    shares = [((targets == torch.tensor(pair)).all(-1).sum() / 400).item() for pair in ((0, 0), (2, 2), (2, 1))]
    assert shares == pytest.approx([0.5, 0.5, 0.25], abs=0.07)
    fixed = DescribedBatches(items, read_picture, Read, [qkv.ShiftConfig(pixels=9)], shuffle=False, **sizes)
    batch = fixed.batch(0, 0)
    assert batch.targets.tolist() == [[0, 0], [2, 2], [4, 4]]
    assert (batch.tokens.valid.sum().item(), batch.inputs.tokens.shape) == (4, (3, 1))  # nothing is padded


def test_recall():
    likeness = torch.tensor([[0.9, 0.1, 0.5], [0.3, 0.2, 0.1], [0.0, 0.7, 0.6]])
    right = torch.eye(3, dtype=torch.bool)
    assert recall(likeness, right, 1) == pytest.approx(1 / 3)
    assert recall(likeness, right, 2) == 1.0
    assert recall(torch.ones(3, 3), right, 1) == 0.0  # a model to which all is alike knows nothing
    right[2, 1] = True  # two pictures of one thing
    assert recall(likeness, right, 1) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("picture,text\na.png,x", "a.png: no such file"),
        ("picture,text\nred-up.png,", "row 1: the text is empty"),
        ("file,text\nred-up.png,x", "needs an object with the key 'picture', found file, text; set `picture`"),
        ("picture,text\nred-up.png,x\nred-low.png,y", "2 first texts, of which some are held out; give 3"),
    ],
)
def test_what_cannot_be_learned_is_said(rows, message, folder, tmp_path):
    for path in folder.glob("*.png"):
        shutil.copy(path, tmp_path)
    (tmp_path / "table.csv").write_text(rows)
    source = DescribedFilesConfig(path=str(tmp_path / "table.csv"))
    with pytest.raises(FileError, match=message):
        DescribedDataConfig(source=source, tokenizer=qkv.WordTokenizerConfig()).prepare()
    with pytest.raises(FileError, match=r"has no .*\.txt beside it"):
        list(DescribedFilesConfig(path=str(tmp_path)).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": qkv.preset("small").to_dict()}, "the data are DescribedData and model is Transformer; give TwoTow"),
        ({"sample": {"prompt": "x"}}, "set sample to null"),
        ({"start": {"path": "x"}}, "with start the tokenizer is the checkpoint's"),
    ],
)
def test_recipes_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        qkv.RecipeConfig.from_dict(recipe({"type": "Emojis"}) | changes)


def test_emojis(monkeypatch, tmp_path):
    """The packages stand in the place of others; what is drawn and said comes together by the characters."""
    import tarfile
    from io import BytesIO

    def package(name, files):
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            for path, data in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(data)
                archive.addfile(info, BytesIO(data))

    png = BytesIO()
    picture("red", "up").save(png, "PNG")
    package("emoji-datasource-google", {"package/img/google/64/2639-fe0f.png": png.getvalue()})
    words = [{"label": "frowning", "hexcode": "2639", "tags": ["sad"]}, {"label": "new", "hexcode": "1F9FF"}]
    package("emojibase-data", {"package/en/data.json": json.dumps(words).encode()})
    asked = []

    def fetch(name, version, sha256, *, registry):
        asked.append((name, version, len(sha256), registry))
        return Path(tmp_path / name)

    monkeypatch.setattr("qkv.data.emojis.fetch", fetch)
    (item,) = EmojisConfig(size=(4, 4)).items()
    assert (item.picture.shape, item.texts) == ((3, 4, 4), ("frowning", "sad"))
    assert asked == [("emojibase-data", "17.0.0", 64, "npm"), ("emoji-datasource-google", "16.0.0", 64, "npm")]
