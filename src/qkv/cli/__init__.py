"""The command line: one file per verb, which is imported when the verb is used."""

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from io import TextIOWrapper

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError

import qkv
from qkv.errors import QkvError

_USAGE, _FILE, _INTERRUPTED, _BROKEN_PIPE = 2, 3, 130, 141  # exit codes

_LONGEST = 1500  # characters of a message

STANDARD_INPUT = "\0-"
"""How `generate` is told of a dash, which cyclopts takes for an option. Nobody can type it: no argument holds a NUL."""

app = App(
    name="qkv",
    help="Attention and Transformers: train a model, measure it, let it write, look at what it is made of.",
    version=lambda: qkv.__version__,
    help_format="plaintext",  # Markdown would cost 50 ms of imports
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)
app.command("qkv.cli.train:train", name="train", help="Train a model as a recipe says.")
app.command("qkv.cli.evaluate:evaluate", name="eval", help="Measure a trained model: on what it held out, or on data.")
app.command("qkv.cli.generate:generate", name="generate", help="Let a trained model continue a text.")
app.command("qkv.cli.forecast:forecast", name="forecast", help="Continue series of vectors.")
app.command("qkv.cli.translate:translate", name="translate", help="Translate with a model that was trained on pairs.")
app.command("qkv.cli.inspect:inspect", name="inspect", help="Draw what a translation looked at.")
app.command("qkv.cli.chat:chat", name="chat", help="Talk with a model that was trained on conversations.")
app.command("qkv.cli.embed:embed", name="embed", help="Turn texts into vectors, or say how alike they are.")
app.command("qkv.cli.classify:classify", name="classify", help="Say which class each text is of.")
app.command("qkv.cli.classify:fill", name="fill", help="Say what may stand where a text is masked.")
app.command("qkv.cli.pull:pull", name="pull", help="Download pretrained weights.")
app.command("qkv.cli.convert:convert", name="convert", help="Write a model in another layout: Hugging Face, GGUF, qkv.")
app.command("qkv.cli.check:check", name="check", help="Ask a model about the laws it should keep.")
app.command("qkv.cli.show:show", name="show", help="Draw a model, and count what it costs.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0: done. 2: a wrong option, argument or config. 3: a file. 130: interrupted. Each mistake is one line on stderr.
    """
    warnings.showwarning = _note
    # A stream that whoever called has closed is None; what is meant for it goes nowhere.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of a character that the terminal does not know
    words = _with_dashes(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return code or 0
    except UnknownOptionError as error:
        return _fail(f"{error}{_behind_dashes(words)}", _USAGE)
    except CycloptsError as error:
        return _fail(str(error), _USAGE)
    except QkvError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _close_output()  # whoever read it has enough
        return _BROKEN_PIPE
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EIO):
            _close_output()
            return _fail(
                f"the output cannot be written ({error.strerror}); free some space, or let it go elsewhere", _FILE
            )
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}; check the path and its permissions", _FILE)


def _with_dashes(words: Sequence[str]) -> list[str]:
    """The words, with the dash of `qkv generate MODEL -` and `-f -` in a form that passes for a value.

    Behind the first argument, which is the model, a dash means nothing else but where `--stop` asks for a text.
    """
    if not words or words[0] not in ("generate", "translate", "embed", "classify"):
        return list(words)
    meant = {place for place, word in enumerate(words) if word == "-" and place > 1 and words[place - 1] != "--stop"}
    named = {f"{option}=-": f"{option}={STANDARD_INPUT}" for option in ("--file", "-f")}
    return [STANDARD_INPUT if place in meant else named.get(word, word) for place, word in enumerate(words)]


def _behind_dashes(words: Sequence[str]) -> str:
    """How to give a text that begins with a dash, where the verb takes texts."""
    takes_texts = bool(words) and words[0] in ("generate", "translate", "inspect", "embed", "classify", "fill")
    return f" A text that begins with a dash goes behind --: qkv {words[0]} MODEL -- TEXT." if takes_texts else ""


def _close_output() -> None:
    """Let standard output go nowhere: Python would complain when it closes what cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    print(f"qkv: error: {_line(message)}", file=sys.stderr)
    return code


def _note(message: Warning | str, *_: object) -> None:
    print(f"qkv: warning: {_line(str(message))}", file=sys.stderr)


def _line(message: str) -> str:
    """One line for a terminal, whatever a file has brought into the message: printable, its beginning and its end."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
    line = " ".join(message.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
