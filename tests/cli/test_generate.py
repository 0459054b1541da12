"""`qkv generate` and `qkv eval` on a run."""

import io
import json
import math

import pytest
import torch

import qkv
from qkv.checkpoints import Store
from qkv.cli import main
from qkv.data import CharacterTokenizerConfig
from qkv.generation import SamplingConfig
from qkv.loading.loaded import Loaded
from qkv.presets import llama
from qkv.yaml_files import dump_yaml


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    folder.mkdir()
    torch.manual_seed(0)
    tokenizer = CharacterTokenizerConfig().train(["abcdefgh é\n"])
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 8, "theta": 100.0, "context": 64}
    config = llama(vocab_size=tokenizer.vocab_size, **sizes)
    tokenizer.save(folder)
    (folder / "recipe.yaml").write_text(dump_yaml({"model": config.to_dict()}))
    Store(folder / "checkpoints").save(1, {"model": config.build().state_dict()}, {})
    return folder


def test_the_text_alone_goes_to_stdout(run, capsys):
    sampling = SamplingConfig(temperature=0.8, seed=2)
    want = qkv.load(run).generate("abc", max_new_tokens=12, sampling=sampling)
    assert main(["generate", str(run), "abc", "--seed", "2", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr() == (f"abc{want}\n", "")


def test_every_option_reaches_the_sampling(run, capsys, monkeypatch):
    given = {}

    def stream(self, prompt, **options):
        given.update(options)
        return iter(())

    monkeypatch.setattr(Loaded, "stream", stream)
    sampling = {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 7}
    flags = [word for name, value in sampling.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["generate", str(run), "a", "--max-new-tokens", "30", "--stop", "ef", "--stop", "hg", *flags]) == 0
    assert given == {"max_new_tokens": 30, "stop": ["ef", "hg"], "beams": None, "length_penalty": None} | sampling


def test_several_samples_one_after_the_other(run, capsys):
    want = qkv.load(run).generate("ab", n=3, max_new_tokens=9, sampling=SamplingConfig(temperature=0.8, seed=1))
    assert main(["generate", str(run), "ab", "--samples", "3", "--seed", "1", "--max-new-tokens", "9"]) == 0
    lines = capsys.readouterr().out
    assert lines == ("\n" + "─" * 40 + "\n").join("ab" + text for text in want) + "\n"


def test_a_note_where_the_context_is_too_short(run, capsys):
    assert main(["generate", str(run), "--max-new-tokens", "90", "--seed", "0"]) == 0
    assert "note: the text can have 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["abZ"], "the character 'Z' is not in the corpus"),
        (["a" * 70], "prompt 0 has 70 tokens and the context 64; cut it to 63 or fewer"),
        (["a", "--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        (["a", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["a", "--samples", "0"], "n=0 samples: must be at least 1"),
        (["a", "--stop", ""], "a stop string is empty"),
    ],
)
def test_mistakes(run, arguments, message, capsys):
    assert main(["generate", str(run), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("qkv: error: ")
    assert message in err


def test_eval_as_a_table_and_for_machines(run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc def gh é\n" * 9)
    assert main(["eval", str(run), str(tmp_path / "text.txt"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == 9 * 14
    assert math.isclose(result["perplexity"], math.exp(result["loss"]))
    assert main(["eval", str(run), str(tmp_path / "text.txt")]) == 0
    table = capsys.readouterr().out
    assert f"loss                  {result['loss']:.4f}  nats per token\n" in table
    assert f"bytes                    {result['bytes']}\n" in table


# --- several prompts --------------------------------------------------------------------------------------------------

PROMPTS = ["abc", "h", "d e f g h" * 3, "é", "gg"]
ARGUMENTS = ["--seed", "2", "--max-new-tokens", "9"]


def alone(run, prompts):
    sampling = SamplingConfig(temperature=0.8, seed=2)
    loaded = qkv.load(run)
    return [loaded.complete([prompt], max_new_tokens=9, sampling=sampling)[0] for prompt in prompts]


def as_lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("size", ["1", "2", "8"])
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_the_prompts_of_a_file(run, tmp_path, capsys, name, size):
    lines = PROMPTS if name.endswith(".txt") else [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
    (tmp_path / name).write_text("\n\n".join(lines) + "\r\n", encoding="utf-8")
    options = ["-f", str(tmp_path / name), "--json", "--batch-size", size, *ARGUMENTS]
    assert main(["generate", str(run), *options]) == 0
    out, err = capsys.readouterr()
    want = alone(run, PROMPTS)
    for line, x in zip(as_lines(out), want, strict=True):
        assert line.pop("log_probability") == pytest.approx(x.score.total, abs=1e-4)
        assert line == {"prompt": x.prompt, "text": x.text, "finish": x.finish.name.lower()}
    assert {line["finish"] for line in as_lines(out)} <= {"length", "stop"}
    assert err == ""


@pytest.mark.parametrize("dash", [["-"], ["-f", "-"]])
def test_the_prompts_of_standard_input(run, capsys, monkeypatch, dash):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(PROMPTS).encode())))
    assert main(["generate", str(run), *dash, *ARGUMENTS]) == 0
    want = [one.prompt + one.text for one in alone(run, PROMPTS)]
    assert capsys.readouterr().out == ("\n" + "─" * 40 + "\n").join(want) + "\n"


def test_one_prompt_as_json(run, capsys):
    assert main(["generate", str(run), "abc", "--json", *ARGUMENTS]) == 0
    assert as_lines(capsys.readouterr().out)[0]["text"] == alone(run, ["abc"])[0].text
    assert main(["generate", str(run), "a" * 60, "--json", "--samples", "2", "--seed", "1"]) == 0
    assert {line["finish"] for line in as_lines(capsys.readouterr().out)} <= {"context", "stop"}


@pytest.mark.parametrize(
    ("content", "arguments", "code", "message"),
    [
        (b"a", ["b", "-f", "prompts.txt"], 2, "there is a prompt and a --file of them; give one of the two"),
        (b"a", ["-f", "prompts.txt", "--samples", "2"], 2, "--samples 2 is for a single prompt"),
        (b"a", ["-f", "prompts.txt", "--batch-size", "0"], 2, "--batch-size 0 must be at least 1"),
        (b"a\n" + b"b" * 70, ["-f", "prompts.txt"], 2, "prompt 2 of 2 has 70 tokens and the context 64; cut it to 63"),
        (b"a\nZ", ["-f", "prompts.txt"], 2, "the character 'Z' is not in the corpus"),
        (b" \n\n", ["-f", "prompts.txt"], 3, "prompts.txt: holds no text; put one in each line"),
        (b"\xff", ["-f", "prompts.txt"], 3, "prompts.txt: "),
        (b"a", ["-f", "nothing.txt"], 3, "nothing.txt"),
        (b"a", ["-f", "."], 3, ".: is a folder; give a file"),
        (b'{"text": "a"}', ["-f", "prompts.jsonl"], 3, "prompts.jsonl, line 1: "),
        (b"a", ["-f", "prompts.jsonl"], 3, "prompts.jsonl, line 1: "),
    ],
)
def test_mistakes_with_several_prompts(run, tmp_path, capsys, monkeypatch, content, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "prompts.jsonl"):
        (tmp_path / name).write_bytes(content)
    assert main(["generate", str(run), *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qkv: error: ")
    assert err.count("\n") == 1
    assert message in err
