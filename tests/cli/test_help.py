"""The command line as a whole: help, mistakes, exit codes."""

import resource
import subprocess
import sys

import pytest

from qkv.cli import main
from qkv.errors import ConfigError, FileError, TrainingError

VERBS = ["chat", "check", "convert", "eval", "forecast", "generate", "inspect", "pull", "show", "train", "translate"]
OPTIONS = {
    "chat": [
        "--expand",
        "--max-new-tokens",
        "--min-p",
        "--quantize",
        "--repetition-penalty",
        "--seed",
        "--system",
        "--temperature",
        "--top-k",
        "--top-p",
    ],
    "check": ["--dtype", "--seed"],
    "convert": ["--certificate", "--dtype", "--no-certificate", "--to"],
    "eval": ["--beams", "--conversations", "--field", "--json", "--length-penalty"],
    "forecast": ["--out", "--steps"],
    "generate": [
        "--batch-size",
        "--beams",
        "--expand",
        "--file",
        "--json",
        "--length-penalty",
        "--max-new-tokens",
        "--min-p",
        "--quantize",
        "--repetition-penalty",
        "--samples",
        "--seed",
        "--stop",
        "--temperature",
        "--top-k",
        "--top-p",
    ],
    "pull": [],
    "inspect": ["--head", "--layer", "--out", "--query", "--rollout", "--translation"],
    "translate": [
        "--batch-size",
        "--beams",
        "--file",
        "--json",
        "--length-penalty",
        "--max-new-tokens",
        "--n-best",
        "--scores",
    ],
    "show": ["--batch", "--context", "--dtype", "--kernels", "--tokens"],
    "train": ["--out", "--resume", "--set"],
}


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"│ {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_of_each_verb_are_these(verb, capsys):
    """Options are an interface: scripts are written with them."""
    assert main([verb, "--help"]) == 0
    words = capsys.readouterr().out.replace("│", " ").split()
    assert sorted({word for word in words if word.startswith("--") and word != "--out."}) == OPTIONS[verb]


def test_help_is_fast_and_does_not_import_torch():
    code = "import sys; from qkv.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    seconds = []
    for _ in range(5):
        start = _seconds_of_children()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        seconds.append(_seconds_of_children() - start)
    # 0.15 s; the bound leaves room for a slow machine and none for torch, which takes more than 1 s.
    assert min(seconds) < 0.6


def _seconds_of_children():
    """What they have computed: it does not grow where others compute beside them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["genrate"], 2, 'Unknown command "genrate". Did you mean "generate"?'),
        (["generate"], 2, "MODEL requires an argument"),
        (["generate", "x", "y", "--temprature", "1"], 2, "Unknown option: --temprature. Did you mean --temperature?"),
        (["generate", "x", "y", "--seed", "one"], 2, "Invalid value for --seed: 'one' is no whole number"),
        (["generate", "x", "y", "z"], 2, "Unused Tokens: ['z']"),
        (["show", "gpt2", "--dtype", "int8"], 2, 'Invalid value "int8" for --dtype. Choose from'),
        (["generate", "no/such/folder"], 3, "there is no such file or folder; give a run"),
        (["eval", "no/such/folder", "text"], 3, "there is no such file or folder; give a run"),
        (["train", "no/such.yaml"], 3, "no/such.yaml: "),
    ],
)
def test_a_mistake_is_one_line_on_stderr(arguments, code, message, capsys):
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qkv: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.fixture
def failing(monkeypatch):
    """Runs a verb that raises what the test says."""

    def run(error):
        def fail(_):
            raise error

        monkeypatch.setattr("qkv.cli.show.find_config", fail)
        return main(["show", "gpt2"])

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a=1 must be\n  2"), 2, "qkv: error: a=1 must be 2\n"),
        (FileError("f: bad"), 3, "qkv: error: f: bad\n"),
        (TrainingError("the loss is nan"), 1, "qkv: error: the loss is nan\n"),
        (PermissionError(13, "Permission denied", "f"), 3, "qkv: error: f: Permission denied; check the path"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(failing, error, code, line, capsys):
    assert failing(error) == code
    assert capsys.readouterr().err.startswith(line)


def test_a_bug_keeps_its_traceback(failing):
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())


def test_a_reader_who_has_enough_is_no_error():
    code = "import sys; from qkv.cli import app, main; app.command(lambda: print('x' * 10**6), name='talk'); "
    command = [sys.executable, "-c", f"{code} sys.exit(main(['talk']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
