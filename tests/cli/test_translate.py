"""Pairs from end to end: train, resume, translate, evaluate, inspect; and the mistakes of users."""

import io
import json
import re
from pathlib import Path

import jiwer
import pytest
import sacrebleu

import qkv
from qkv.cli import main
from qkv.errors import ConfigError
from qkv.models.decoders import LuongConfig
from qkv.presets.translators import PAIR_PRESETS
from qkv.tasks import Asked, PairDataConfig
from qkv.tasks.pairs import edit_distance
from qkv.training import evaluate_model, read_recipe, train
from qkv.yaml_files import dump_yaml, read_yaml
from runs import assert_same_run, fast, kill_at, last_manifest, start_qkv  # noqa: F401 - a fixture

MODELS = {"recurrent": "bahdanau", "transformer": "translator"}


def write_recipe(folder, model="bahdanau", **changes):
    rows = [(a + b + c, f"{c}{b}{a}") for a in "abcde" for b in "fghij" for c in "klmn"]
    (folder / "pairs.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in rows))
    recipe = {
        "model": model and {"preset": model, "d_model": 32},
        "data": {
            "type": "PairData",
            "source": {"type": "TSV", "path": str(folder / "pairs.tsv")},
            "tokenizer": {"type": "CharacterTokenizer"},
            "target_tokenizer": {"type": "CharacterTokenizer"},
            "validation": 0.2,
        },
        "steps": 12,
        "context": 16,
        "batch_size": 8,
        "optimizer": {"lr": 0.01},
        "schedule": {"type": "Cosine", "warmup": 2},
        "precision": "float32",
        "evaluate_every": 6,
        "save_every": 4,
        "sample": {"tokens": 6},
    } | changes
    path = folder / "pairs.yaml"
    path.write_text(dump_yaml(recipe))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QKV_CACHE", str(folder / "cache"))
        assert train(write_recipe(folder, steps=150, save_every=150, evaluate_every=75), out=folder / "run") == 0
    return folder / "run"


def test_it_learns_to_read_backwards(run, capsys):
    assert main(["translate", str(run), "afk"]) == 0
    assert capsys.readouterr().out == "kfa\n"
    assert (run / "samples.txt").read_text().count("→") >= 6


def test_it_is_shown_part_by_part(run, capsys):
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    n = sum(p.numel() for p in qkv.load(run).model.parameters())
    assert f"run · {n:,} parameters" in shown
    assert "reads with 1 × GRU in both directions, writes with 1 × Bahdanau" in " ".join(shown.split())
    assert "source: 15 tokens" in shown
    assert re.search(r"net\.net\.weight_hh_l0 +96 × 32 +3,072", shown)
    assert sum(int(m.replace(",", "")) for m in re.findall(r"^ \w+ +([\d,]+) +[\d.]+ %", shown, re.MULTILINE)) == n


def test_it_keeps_the_laws(run, capsys):
    assert main(["check", str(run)]) == 0
    assert "alignment" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*PAIR_PRESETS, "dates", "phonemes"])
def test_presets_and_recipes_are_shown(name, capsys):
    assert main(["show", name]) == 0
    assert "set by the data" in capsys.readouterr().out


def test_beams_scores_and_lines(run, capsys, monkeypatch, tmp_path):
    assert main(["translate", str(run), "bgm", "--beams", "3", "--n-best", "2", "--scores"]) == 0
    first, second = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert first[1] == "mgb"
    assert float(first[0]) > float(second[0])
    (tmp_path / "in.txt").write_text("afk\n\ncjn\n")
    assert main(["translate", str(run), "-f", str(tmp_path / "in.txt"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["source"], line["text"], line["ended"]) for line in lines] == [
        ("afk", "kfa", True),
        ("", "", True),
        ("cjn", "njc", True),
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"afk\n")))
    assert main(["translate", str(run), "-"]) == 0
    assert capsys.readouterr().out == "kfa\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\ufeffafk\r\n  \ncjn".encode())))
    assert main(["translate", "--batch-size", "1", str(run), "--beams", "2", "-"]) == 0
    assert capsys.readouterr().out == "kfa\n\nnjc\n"  # a line for each line
    for option in ("--file=-", "-f=-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"afk")))
        assert main(["translate", str(run), option]) == 0
        assert capsys.readouterr().out == "kfa\n"
    monkeypatch.setattr("sys.stdin", None)  # as of `<&-`
    assert main(["translate", str(run), "-"]) == 3
    assert "standard input: is closed" in capsys.readouterr().err


def test_nothing_is_written_before_all_can_be_read(run, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("afk\n\n" * 20 + "afx\n")
    assert main(["translate", str(run), "-f", str(tmp_path / "in.txt"), "--batch-size", "1"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "text 41: the character 'x' is not in" in shown.err


def test_pairs_left_out_for_their_length_are_not_measured(fast, tmp_path, capsys):  # noqa: F811
    path = write_recipe(tmp_path, context=4)
    with (tmp_path / "pairs.tsv").open("a") as file:
        file.writelines(f"{c * 9}\t{c * 9}\n" for c in "abcdefghijklmn")
    data = read_yaml(path)
    data["data"]["longest"] = 4
    path.write_text(dump_yaml(data))
    assert train(path, out=tmp_path / "run") == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    held_out = PairDataConfig.from_dict(data["data"]).divided()[1]
    result = json.loads(capsys.readouterr().out)
    assert result["pairs"] == sum(len(source) < 9 for source, _ in held_out) < len(held_out)


def test_what_was_held_out_is_known_only_of_the_corpus_that_was_trained_on(fast, tmp_path, capsys):  # noqa: F811
    assert train(write_recipe(tmp_path), out=tmp_path / "run") == 0
    assert main(["eval", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "pairs.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.tsv").write_text("".join(lines[::-1]))
    assert main(["eval", str(tmp_path / "run")]) == 3
    assert "its corpus is another one than it was trained on" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run"), str(tmp_path / "pairs.tsv")]) == 0


def test_a_recipe_that_starts_from_a_translator_is_shown(run, capsys, tmp_path):
    (tmp_path / "more.yaml").write_text(dump_yaml({"start": {"path": str(run)}, "steps": 1}))
    assert main(["show", str(tmp_path / "more.yaml")]) == 0
    assert "a recurrent translator" in capsys.readouterr().out


def test_numbers_are_whole_on_a_narrow_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["show", "attention-is-all-you-need"]) == 0
    shown = capsys.readouterr().out
    total = re.search(r"· ([\d,]+) parameters", shown)[1]
    assert re.search(rf"total .*{total}", shown)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_what_cannot_be_shown_loses_no_step(tmp_path):
    """Standard output on a full disk, and one that nobody reads."""
    recipe = write_recipe(tmp_path, steps=200_000, save_every=200_000, evaluate_every=200_000)
    with Path("/dev/full").open("w") as full:
        done = start_qkv("train", recipe, "--out", tmp_path / "full", stdout=full)
        _, errors = done.communicate(timeout=60)
    assert done.returncode == 3
    assert errors.startswith("qkv: error: the output cannot be written (No space left on device); free some space")
    assert errors.count("\n") == 1
    done = start_qkv("train", recipe, "--out", tmp_path / "pipe")
    assert any(line.startswith("step") for line in done.stdout)
    done.stdout.close()
    assert done.wait(timeout=60) == 141
    assert last_manifest(tmp_path / "pipe")["step"] >= 1
    done.stderr.close()


def test_blocks_that_share_weights_are_loaded_again(fast, tmp_path):  # noqa: F811
    path = write_recipe(tmp_path, "translator")
    assert train(path, sets=["model.encoder.shared=true", "model.encoder.n=40"], out=tmp_path / "run") == 0
    assert qkv.load(tmp_path / "run").model.config.depth == 42


def test_a_preset_can_be_changed_from_the_command_line(fast, tmp_path):  # noqa: F811
    path = write_recipe(tmp_path)
    recipe = read_recipe(path, ["model.preset=luong", "model.encoder.layers=2"])
    assert isinstance(recipe.model.decoder, LuongConfig)
    assert (recipe.model.encoder.layers, recipe.model.d_model) == (2, 32)
    assert read_recipe(path, ["model=luong"]).model.d_model == 128
    assert read_recipe(write_recipe(tmp_path, model=None), ["model.preset=luong"]).model.d_model == 128
    path.write_text(dump_yaml(recipe.to_dict()))
    with pytest.raises(ConfigError, match="the recipe writes the model out; --set model=bahdanau replaces it"):
        read_recipe(path, ["model.preset=bahdanau"])


def test_eval_of_what_was_held_out_and_of_a_file(run, capsys, tmp_path):
    assert main(["eval", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pairs"] == 20
    assert result["exact"] > 0.8
    assert sum(part["pairs"] for part in result["by_length"]) == 20
    (tmp_path / "p.tsv").write_text("afk\tkfa\nbfk\tkfa\n")
    assert main(["eval", str(run), str(tmp_path / "p.tsv")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:4] == ["all", "2", "50.00%", "16.67%"]
    assert out[2].split()[0] == "1-5"
    (tmp_path / "p.tsv").write_text("afk\tkfa\nbfk\tkfZ\n")  # Z: a character that the model cannot write
    assert main(["eval", str(run), str(tmp_path / "p.tsv")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["all", "2", "50.00%", "16.67%"]


def test_words_are_compared_and_not_the_space_between_them(fast, tmp_path):  # noqa: F811
    path = write_recipe(tmp_path)
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}{b}\t{a} {b}\n" for a in "abcdefgh" for b in "ijklmnop"))
    words = [f'data.{which}={{"type": "WordTokenizer"}}' for which in ("target_tokenizer",)]
    assert train(path, sets=[*words, "steps=150"], out=tmp_path / "run") == 0
    (tmp_path / "p.tsv").write_text("ai\ta  i\nbj\tb j new\n")
    result = evaluate_model(Asked(path=tmp_path / "run", data=tmp_path / "p.tsv")).to_dict()
    assert (result["exact"], result["error_rate"]) == (0.5, 0.2)


def test_scores_are_those_of_sacrebleu(run, tmp_path):
    (tmp_path / "p.tsv").write_text("afk\tkfa\nbgm\tmgx\n")
    result = evaluate_model(Asked(path=run, data=tmp_path / "p.tsv")).to_dict()
    texts = [qkv.load(run).translate(text) for text in ("afk", "bgm")]
    assert result["chrf"] == sacrebleu.corpus_chrf(texts, [["kfa", "mgx"]]).score


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance([], [1, 2]) == edit_distance([1, 2], []) == 2
    assert edit_distance("abc", "abc") == 0
    a, b = "the cat sat on a mat", "a cat sat in the mat now"
    assert edit_distance(a.split(), b.split()) / 6 == jiwer.wer(a, b)


def test_inspect_draws_the_alignment(run, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["inspect", str(run), "afk", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "afk → kfa" in capsys.readouterr().out
    found = qkv.load(run).align("afk", "kfa")
    assert found.source == ("a", "f", "k")
    assert found.target == ("k", "f", "a", "⏎")
    assert found.weights.shape == (4, 3)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_resumed_run_is_one_that_was_never_stopped(model, fast, tmp_path):  # noqa: F811
    recipe = write_recipe(tmp_path, model)
    assert train(recipe, out=tmp_path / "whole") == 0
    kill_at(9, recipe, tmp_path / "cut")
    assert train(recipe, out=tmp_path / "cut", resume=True) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert qkv.load(tmp_path / "cut").translations(["afk"])[0][0].score <= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "small"}, "the data are PairData and model is Transformer; give a model of pairs"),
        ({"context": 3}, "context=3 and the longest pair has 4 tokens on one side"),
        ({"model": "attention-is-all-you-need"}, "the data have two tokenizers"),
        ({"checkpoint_blocks": True}, "checkpoint_blocks works on blocks and this model, a recurrent one, has none"),
        ({"compile": True}, "compile works on blocks and this model, a recurrent one, has none; leave it out"),
        ({"sample": {"temperature": 0.5}}, r"sample\.temperature is for language models"),
        ({"sample": {"prompt": "xyz"}}, r"sample\.prompt: the character 'x' is not in"),
        ({"sample": {"prompt": "afkbglafkbglafkbg"}}, r"sample\.prompt has 17 tokens and there is room for 16"),
        ({"adapter": {"rank": 2}}, "adapter is for language models and the data are pairs; leave adapter out"),
    ],
)
def test_recipes_that_do_not_fit(changes, message, fast, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        train(write_recipe(tmp_path, **changes), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["translate", "RUN", "xyz"], 2, "the character 'x' is not in the corpus"),
        (["translate", "RUN"], 2, "there is nothing to translate"),
        (["translate", "RUN", "a", "-f", "b"], 2, "give one of the two"),
        (["translate", "RUN", "a", "--n-best", "2"], 2, "--n-best 2 must be from 1 to --beams 1"),
        (["translate", "no/such", "a"], 3, "no/such: no such folder"),
        (["translate", "RUN", "a", "--beams", "1.5"], 2, "Invalid value for --beams: '1.5' is no whole number"),
        (["show", "small", "--context", "1e3"], 2, "Invalid value for --context: '1e3' is no whole"),
        (["translate", "RUN", "a", "--beams", "1001"], 2, "beams=1001 must be from 1 to 1000"),
        (["translate", "RUN", "a", "--scores", "--json"], 2, "--json says the scores already"),
        (["show", "RUN", "--tokens", "9"], 2, "--tokens is for --kernels"),
        (["show", "bahdnau"], 2, "did you mean 'bahdanau'?"),
        (["eval", "RUN", "."], 3, "is a folder"),
        (["eval", "no/run"], 3, "no/run: no such folder"),
        (["inspect", "RUN", "afk", "--out", "picture"], 3, "picture: its ending does not say what kind of picture"),
        (["inspect", "RUN", "afk", "--out", ""], 3, "its ending does not say"),
        (["eval", "RUN", "no.tsv"], 3, "no such file"),
        (["eval", "RUN", "--conversations"], 2, "--conversations and --field are for language models"),
        (["show", "RUN", "--kernels"], 2, "--kernels is for language models and"),
        (["show", "RUN", "--context", "9"], 2, "is a model of pairs; leave it out"),
        (["translate", "RUN", "a", "--beams", "0"], 2, "beams=0 must be from 1 to 1000"),
        (["translate", "RUN", "a", "--length-penalty", "1000"], 2, "length_penalty=1000.0 must be from -10 to 10"),
        (["translate", "RUN", " "], 2, "there is nothing to translate"),
        (["translate", "~nobody-here/x", "a"], 3, "there is no home folder of that name"),
        (["translate", "RUN", "-f", "no.txt"], 3, "no.txt: no such file"),
        (["eval", "RUN", "/dev/null"], 3, "/dev/null: "),
        (["eval", "RUN", "~nobody-here/x"], 3, "there is no home folder of that name"),
        (["inspect", "RUN", ""], 2, "the text is blank"),
        (["inspect", "RUN", "afk", "--out", "no/such/a.png"], 3, "cannot be written"),
    ],
)
def test_mistakes(run, arguments, code, message, capsys):
    assert main([str(run) if word == "RUN" else word for word in arguments]) == code
    assert message in capsys.readouterr().err
