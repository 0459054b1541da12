"""`qkv chat`: in a terminal (a real one, of the pseudo kind), and with lines from a pipe."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

import qkv
from chats import write_chat_run
from qkv.cli import main
from qkv.generation import SamplingConfig

GREEDY = SamplingConfig(temperature=0)
CODE = "import sys\nfrom qkv.cli import main\nsys.exit(main(sys.argv[1:]))"
# What a script runs in its background ignores Ctrl-C, and so would all that it starts; in a terminal nothing does.
HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
SLOW = """
import time
from qkv.generation import Engine
step = Engine.step
def slowly(engine):
    time.sleep(0.05)
    return step(engine)
Engine.step = slowly
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_chat_run(tmp_path_factory.mktemp("chat") / "run")


class Terminal:
    """A program in a pseudo-terminal, and the person before it."""

    def __init__(self, *arguments, before=""):
        self.own, theirs = pty.openpty()
        command = [sys.executable, "-c", HEARD + before + CODE, *map(str, arguments)]
        environment = os.environ | {"TERM": "dumb", "PYTHONUTF8": "1", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text):
        os.write(self.own, text.encode())

    def wait_for(self, pattern, seconds=60):
        """What is shown up to where the pattern is found."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            if not select.select([self.own], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"waited for {pattern!r} and saw {self.shown!r}")
            self.shown += os.read(self.own, 4096).decode(errors="replace").replace("\r\n", "\n")
        seen, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return seen

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def interrupt_at_the_prompt(self):
        """Ctrl-C, and again where nothing happens, as a person does.

        Python's `input` does not see a Ctrl-C that comes after the prompt is shown and before it waits for a key: on
        a busy machine, one of seven that follow the prompt at once.
        """
        for _ in range(5):
            self.interrupt()
            if select.select([self.own], [], [], 5)[0]:
                return
        raise AssertionError("Ctrl-C at the prompt does nothing")

    def leave(self):
        """The exit code, and what else it said."""
        rest = self.shown
        try:
            while select.select([self.own], [], [], 30)[0] and (data := os.read(self.own, 4096)):
                rest += data.decode(errors="replace")
        except OSError:  # the other end is closed
            pass
        code = self.process.wait(30)
        os.close(self.own)
        assert "Traceback" not in rest
        return code, rest


@pytest.fixture
def terminal(run):
    """Starts `qkv chat`, and sees that nothing of it is left."""
    started = []

    def start(*arguments, before=""):
        started.append(Terminal("chat", run, "--temperature", "0", *arguments, before=before))
        started[-1].wait_for(r"/help for help.*\n> ")
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def answers(run, *questions, system=None, tokens=10):
    conversation = qkv.Conversation(qkv.load(run), system=system, max_new_tokens=tokens, sampling=GREEDY)
    return ["".join(conversation.ask(question)) for question in questions]


def readable(text):
    """Letters that a terminal passes on as they are."""
    return "".join(re.findall("[A-Za-z0-9]", text))


def test_a_conversation_in_a_terminal(terminal, run):
    first, second = answers(run, "Hello", "And?", system="Be kind.")
    (again,) = answers(run, "And?", system="Be kind.")
    (other,) = answers(run, "And?", system="Be short.")
    assert len({readable(x) for x in (first, second, again, other)}) == 4
    person = terminal("--max-new-tokens", "10", "--system", "Be kind.")
    for typed, want in [
        ("Hello", first),
        ("And?", second),
        ("/system", "Be kind."),
        ("/reset", "(begun anew)"),
        ("And?", again),
        ("/system Be short.", "(begun anew under this instruction)"),
        ("", ""),
        ("And?", other),
        ("/help", "/exit"),
        ("/rest", "(/rest is not known; /help lists what is)"),
    ]:
        person.type(typed + "\n")
        assert readable(want) in readable(person.wait_for(r"\n> "))
    person.type("/exit\n")
    assert person.leave()[0] == 0


def test_ctrl_c_stops_the_answer_and_then_the_program(terminal):
    person = terminal("--max-new-tokens", "300", before=SLOW)
    person.type("Hello\n")
    person.wait_for(r"Hello\n(.|\n)")  # it has begun to answer
    person.interrupt()
    person.wait_for(r"\(stopped\)\n> ", 20)
    person.type("/system\n")
    person.wait_for(r"\(no instruction\)\n> ")
    person.interrupt_at_the_prompt()
    code, rest = person.leave()
    assert code == 130
    assert rest.strip() == ""


def test_ctrl_d_leaves(terminal):
    person = terminal()
    person.type("\x04")
    assert person.leave()[0] == 0


def test_the_end_of_the_context_is_told_in_words(terminal):
    person = terminal("--max-new-tokens", "40")
    for i in range(4):
        person.type(f"{i}" + "x" * 90 + "\n")
        seen = person.wait_for(r"\n> ")
    assert "note: the context is full: the oldest" in seen
    assert "messages were dropped" in seen
    person.type("x" * 500 + "\n")
    seen = person.wait_for(r"\n> ")
    assert re.search(r"\(the message takes \d+ tokens", seen)
    assert "write a shorter one)" in seen.replace("\n", "")


def pipe(run, text, *arguments):
    command = [sys.executable, "-c", CODE, "chat", str(run), "--temperature", "0", "--max-new-tokens", "10", *arguments]
    return subprocess.run(command, input=text, capture_output=True, check=False)


@pytest.fixture
def piped(monkeypatch, capsys):
    """The same in this process, which is quicker: exit code, standard output and errors."""

    def chat(run, text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        code = main(["chat", str(run), "--temperature", "0", "--max-new-tokens", "10"])
        return code, *capsys.readouterr()

    return chat


def test_lines_from_a_pipe(run):
    first, second = answers(run, "Hello", "/reset", system="Be kind.")
    done = pipe(run, b"Hello\n\n/reset\r\n", "--system", "Be kind.")
    assert done.returncode == 0
    assert done.stdout.decode() == f"{first}\n{second}\n"
    assert set(done.stderr.decode().splitlines()) <= {"qkv: note: the answer is cut: max_new_tokens were generated"}


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (b"x" * 500, 2, "the message takes 537 tokens"),
        (b"a\xff\n", 3, "standard input: line 1 is not UTF-8"),
    ],
)
def test_mistakes_in_a_pipe(run, text, code, message, piped):
    found, out, err = piped(run, text)
    assert found == code
    (line,) = err.splitlines()
    assert line.startswith("qkv: error: ")
    assert message in line
    assert not out


def test_a_model_without_a_template(tmp_path, capsys, monkeypatch, piped):
    plain = write_chat_run(tmp_path / "run", template=False)
    code, _, err = piped(plain, b"Hello\n")
    assert code == 2
    assert "the model has no chat template and cannot chat" in err
    (plain / "checkpoints").rename(tmp_path / "checkpoints")  # it is said before weights are read
    assert "the model has no chat template and cannot chat" in piped(plain, b"Hello\n")[2]
    (tmp_path / "checkpoints").rename(plain / "checkpoints")
    (plain / "adapter_config.json").write_text("{}")  # adapters speak with the tokenizer of their base
    assert "'base_model_name_or_path' is None" in piped(plain, b"Hello\n")[2]
    (plain / "adapter_config.json").unlink()
    (plain / "chat_template.jinja").write_text("{{ 'a' * 10 ** 9 }}")
    code, _, err = piped(plain, b"Hello\n")
    assert code == 3
    assert err.count("\n") == 1
    assert main(["chat", str(tmp_path / "nothing")]) == 3
    assert "there is no such file or folder" in capsys.readouterr().err
