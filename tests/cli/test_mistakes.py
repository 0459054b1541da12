"""Mistakes that people make: one line that names the fact and the remedy, exit code 2 or 3, and nothing lost."""

import json
import os
import shutil

import pytest

from qkv.cli import main
from qkv.training import train
from runs import fast, snapshot, start_qkv, write_recipe  # noqa: F401 - `fast` is a fixture

OPTION, FILE = 2, 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of five steps that every test gets a copy of."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QKV_CACHE", str(folder / "cache"))
        train(write_recipe(folder, steps=5, save_every=2), out=folder / "run")
    return folder


@pytest.fixture
def place(tmp_path, trained, monkeypatch, fast):  # noqa: F811
    """The working directory: a recipe, its corpus, a trained run."""
    for name in ("tiny.yaml", "corpus.txt"):
        shutil.copy(trained / name, tmp_path / name)
    shutil.copytree(trained / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(path, old, new):
    """Edit a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def corpus(content, name="corpus.txt"):
    """What to do to the folder: give it another corpus."""

    def prepare(place):
        (place / "corpus.txt").unlink()
        (place / name).write_bytes(content)
        change(place / "tiny.yaml", path_in(place / "tiny.yaml"), name)

    return prepare


def path_in(recipe):
    (line,) = (line for line in recipe.read_text().splitlines() if "corpus.txt" in line)
    return line.rsplit("path: ", 1)[1].split("}")[0].split(",")[0]


def recipe(text):
    """What to do to the folder: give it another recipe."""
    return lambda place: (place / "tiny.yaml").write_text(text)


def nothing(place):
    """The folder is well; the mistake is in the command."""


TRAIN, RESUME = ("train", "tiny.yaml", "--out", "new"), ("train", "tiny.yaml", "--resume")


def settings(*changes):
    return [*TRAIN, *(word for text in changes for word in ("--set", text))]


def untrained(place):
    for path in (place / "run" / "checkpoints").iterdir():
        shutil.rmtree(path)


def damaged(place):
    for path in (place / "run" / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


def other_tokenizer(place):
    path = place / "run" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] |= {chr(0x3B1 + i): 100 + i for i in range(9)}
    path.write_text(json.dumps(data))


PACKAGE = "type: Package, name: shakespeare, version: '0.6', sha256: {}, files: '*.txt'"


def package(sha256):
    def prepare(place):
        data = (place / "tiny.yaml").read_text()
        source = next(line for line in data.splitlines() if "type: Files" in line)
        indent = source[: len(source) - len(source.lstrip())]
        change(place / "tiny.yaml", source, f"{indent}source: {{{PACKAGE.format(sha256)}}}")

    return prepare


MISTAKES = {
    # the recipe
    "typo in a key": (
        lambda p: change(p / "tiny.yaml", "batch_size", "batch_sise"),
        TRAIN,
        OPTION,
        ("tiny.yaml: batch_sise: Recipe has no 'batch_sise'", "did you mean 'batch_size'?"),
    ),
    "typo in --set": (nothing, settings("optimiser.lr=1"), OPTION, ("no 'optimiser'", "did you mean 'optimizer'?")),
    "--set without =": (nothing, settings("steps"), OPTION, ("--set 'steps'", "write it as key.key=value")),
    "a value of the wrong type": (nothing, settings("steps=many"), OPTION, ("steps = 'many'", "integer")),
    "a value where parts should be": (nothing, settings("steps.x=1"), OPTION, ("--set steps.x", "has no part 'x'")),
    "heads that do not divide": (nothing, settings("model.d_model=18"), OPTION, ("d_model=18", "n_heads=4")),
    "no steps": (nothing, settings("steps=0"), OPTION, ("steps=0 must be at least 1",)),
    "a learning rate of zero": (nothing, settings("optimizer.lr=0.0"), OPTION, ("lr=0.0 must be above 0",)),
    "an unknown preset": (nothing, settings("model=gtp2"), OPTION, ("no preset 'gtp2'", "did you mean 'gpt2'?")),
    "an unknown activation": (
        nothing,
        settings("model.blocks.pattern.sublayers.1.activation=gleu"),
        OPTION,
        ("gleu", "gelu"),
    ),
    "an unknown tokenizer": (
        nothing,
        settings("data.tokenizer.type=BPE"),
        OPTION,
        ("data.tokenizer: no type 'BPE' fits here", "BPETokenizer"),
    ),
    "a vocabulary smaller than the tokenizer's": (
        nothing,
        settings("model.embed.vocab_size=5"),
        OPTION,
        ("the tokenizer has 23 tokens and model.embed.vocab_size is 5", "leave it out"),
    ),
    "a context longer than the position table": (
        nothing,
        settings("model.embed.position={type: LearnedPositions, length: 8}"),
        OPTION,
        ("context=16 is longer than the model's position table of 8", "lower it"),
    ),
    "a corpus shorter than the context": (
        nothing,
        settings("context=100000"),
        OPTION,
        ("context=100000", "tokens to train on", "lower context"),
    ),
    "no such recipe": (
        nothing,
        ("train", "tinny.yaml"),
        FILE,
        ("tinny.yaml: no such file", "phonemes, shakespeare"),
    ),
    "a recipe that is not YAML": (recipe("steps: [1\n"), TRAIN, OPTION, ("tiny.yaml, line 2: not valid YAML",)),
    "a recipe that is a text": (
        recipe("steps\n"),
        TRAIN,
        OPTION,
        ("tiny.yaml: holds a str and must hold the keys of a recipe",),
    ),
    "an empty recipe": (recipe(""), TRAIN, OPTION, ("tiny.yaml: holds nothing and must hold the keys of a recipe",)),
    "a key given twice": (recipe("steps: 1\nsteps: 2\n"), TRAIN, OPTION, ("line 2", "'steps' is given twice")),
    "a recipe without data": (recipe("model: small\nsteps: 2\n"), TRAIN, OPTION, ("needs 'data'", "give it a value")),
    # the corpus
    "no corpus": (
        lambda p: (p / "corpus.txt").unlink(),
        settings("data.source.path=gone.txt"),
        FILE,
        ("gone.txt: no such",),
    ),
    "an empty corpus": (corpus(b""), TRAIN, FILE, ("corpus.txt): there is nothing in it; give files with text",)),
    "a corpus of one letter": (corpus(b"a"), TRAIN, FILE, ("too short to hold out 0.1 of it", "give more data")),
    "a binary file": (corpus(b"\x7fELF\0\0\xff\xfe"), TRAIN, FILE, ("corpus.txt: byte 6 is not UTF-8 text",)),
    "JSONL with a broken line": (
        corpus(b'{"text": "the cat"}\n{"text": \n', "lines.jsonl"),
        TRAIN,
        FILE,
        ("lines.jsonl, line 2: not valid JSON", "write one object per line"),
    ),
    "JSONL with another field": (
        corpus(b'{"content": "the cat"}\n', "lines.jsonl"),
        TRAIN,
        FILE,
        ("lines.jsonl, line 1: needs an object with the key 'text', found content", "set `field`"),
    ),
    "a wrong sha256": (package("'0123'"), TRAIN, OPTION, ("sha256", "0123")),
    # the run folder
    "--out that exists": (
        nothing,
        ("train", "tiny.yaml", "--out", "run"),
        OPTION,
        ("run exists and is not empty", "add --resume"),
    ),
    "--out that cannot be written": (
        nothing,
        ("train", "tiny.yaml", "--out", "corpus.txt/run"),
        FILE,
        ("corpus.txt/run: cannot be written (Not a directory)", "choose another --out"),
    ),
    "--resume without --out": (nothing, RESUME, OPTION, ("--resume needs a run to continue", "add --out RUN")),
    "--resume of no run": (nothing, (*RESUME, "--out", "elsewhere"), FILE, ("elsewhere is no run", "give the folder")),
    "--resume with another recipe": (
        nothing,
        (*RESUME, "--out", "run", "--set", "model.d_model=32"),
        OPTION,
        ("run/recipe.yaml says model.d_model is 16, not 32", "or begin a new run"),
    ),
    "--resume of damaged checkpoints": (
        damaged,
        (*RESUME, "--out", "run"),
        FILE,
        ("none of its 2 checkpoints is whole",),
    ),
    "a model without blocks": (
        nothing,
        settings("model.blocks.n=0"),
        OPTION,
        ("the model has no blocks", "at least one"),
    ),
    "eval on an empty file": (
        corpus(b""),
        ("eval", "run", "corpus.txt"),
        FILE,
        ("corpus.txt: there is no text in it; give files with text",),
    ),
    # the model
    "an empty GGUF file": (
        lambda p: (p / "x.gguf").write_bytes(b""),
        ("show", "x.gguf"),
        FILE,
        ("x.gguf: the file is empty; copy or download",),
    ),
    "a recipe beside, and no run": (
        lambda p: (p / "tiny.yaml").rename(p / "recipe.yaml"),
        ("generate", ".", "the"),
        FILE,
        ("recipe.yaml: is a recipe and no run", "train it with qkv train"),
    ),
    "no such model": (
        nothing,
        ("generate", "rum", "the"),
        FILE,
        ("rum: there is no such file or folder", "give a run"),
    ),
    "a folder that is no model": (nothing, ("generate", ".", "the"), FILE, ("has neither adapter_config.json (",)),
    "a run without a checkpoint": (
        untrained,
        ("generate", "run", "the"),
        FILE,
        ("run: the run has no checkpoint yet",),
    ),
    "damaged checkpoints": (damaged, ("generate", "run", "the"), FILE, ("none of its 2 checkpoints is whole",)),
    "the wrong tokenizer": (
        other_tokenizer,
        ("generate", "run", "the"),
        FILE,
        ("the tokenizer has 109 tokens and the model 23", "put the tokenizer there that belongs to the model"),
    ),
    "a prompt longer than the context": (
        nothing,
        ("generate", "run", "the cat sat on a mat"),
        OPTION,
        ("prompt 0 has 20 tokens and the context 16", "cut it to 15"),
    ),
    "a character that the model does not know": (
        nothing,
        ("generate", "run", "Zebra"),
        OPTION,
        ("the character 'Z' is not in the corpus", "leave it out"),
    ),
    "a negative temperature": (
        nothing,
        ("generate", "run", "the", "--temperature", "-1"),
        OPTION,
        ("temperature=-1.0 must be at least 0",),
    ),
    "top-p above 1": (
        nothing,
        ("generate", "run", "the", "--top-p", "2"),
        OPTION,
        ("top_p=2.0 must be above 0 and at most 1",),
    ),
    "no tokens to add": (nothing, ("generate", "run", "the", "--max-new-tokens", "0"), OPTION, ("must be at least 1",)),
    "eval on no file": (nothing, ("eval", "run", "gone.txt"), FILE, ("gone.txt: no such file or folder",)),
    "show of nothing": (nothing, ("show", "smal"), OPTION, ("no preset 'smal'", "did you mean 'small'?")),
    # the command
    "an unknown verb": (nothing, ("tain", "tiny.yaml"), OPTION, ("tain", "train")),
    "an unknown option": (nothing, ("train", "tiny.yaml", "--steps", "5"), OPTION, ("--steps",)),
    "a missing argument": (nothing, ("train",), OPTION, ("RECIPE requires an argument",)),
    "a number that is none": (nothing, ("generate", "run", "--top-k", "few"), OPTION, ("few", "no whole number")),
}


def error_line(shown):
    """The one line that a mistake is worth."""
    assert "Traceback" not in shown
    (line,) = shown.splitlines()
    assert line.startswith("qkv: error: ")
    return line


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(place, capsys, name):
    prepare, command, code, parts = MISTAKES[name]
    prepare(place)
    capsys.readouterr()
    before = snapshot(place)
    assert main(list(command)) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    line = error_line(shown.err)
    for part in parts:
        assert part in line
    after = {path: data for path, data in snapshot(place).items() if path.parts[0] != "cache"}
    assert after == before
    assert not (place / "new").exists()
    assert not (place / "runs").exists()


@pytest.mark.parametrize("name", ["typo in a key", "the wrong tokenizer", "an unknown option"])
def test_mistakes_in_a_process_of_their_own(place, name):
    prepare, command, code, parts = MISTAKES[name]
    prepare(place)
    process = start_qkv(*command, cwd=place)
    shown, errors = process.communicate(timeout=60)
    assert (process.returncode, shown) == (code, "")
    assert all(part in error_line(errors) for part in parts)


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root may write anywhere")
def test_a_folder_without_permission(place, capsys):
    (place / "locked").mkdir(mode=0o500)
    assert main(["train", "tiny.yaml", "--out", "locked/run"]) == FILE
    assert "locked/run: cannot be written (Permission denied); choose another --out" in error_line(
        capsys.readouterr().err
    )


@pytest.mark.filterwarnings("always")
def test_a_damaged_newest_checkpoint_is_a_warning(place, capsys):
    """The one before is read."""
    newest = max((place / "run" / "checkpoints").iterdir())
    (newest / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert main(["generate", "run", "the", "--seed", "0", "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("the")
    assert shown.err.startswith("qkv: warning: ")
    assert f"{newest.name}/model.safetensors" in shown.err
