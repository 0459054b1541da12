"""What is printed where standard output is not Unicode, and what begins with a dash."""

import json
import os
import subprocess
import sys

import pytest

from qkv.cli import main
from qkv.laws import LAWS
from qkv.training.recipe_files import built_in_recipe

TEXT = "你好 é 😀 ─"
PROGRAM = f"""
import sys
from qkv import cli
from qkv.cli.opening import json_line
sys.argv = ["qkv", "print"]
cli.app.command(lambda: print({TEXT!r}), name="print")
cli.app.command(lambda: print(json_line({{"text": {TEXT!r}}})), name="json")
raise SystemExit(cli.main([sys.stdin.read()]))
"""


def printed(verb, encoding):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=verb.encode(), capture_output=True, check=True, env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    return done.stdout.decode(encoding).strip()


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_nothing_is_lost_where_the_output_is_not_unicode(encoding):
    assert json.loads(printed("json", encoding)) == {"text": TEXT}
    assert printed("print", encoding) == TEXT.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("text", ["- item", "-5 degrees", "---", "--help me", "-h is a flag"])
@pytest.mark.parametrize("verb", ["generate", "translate", "inspect"])
def test_a_text_that_begins_with_a_dash(verb, text, capsys):
    assert main([verb, "nowhere", text]) == 2
    assert f"qkv {verb} MODEL -- TEXT" in capsys.readouterr().err
    assert main([verb, "nowhere", "--", text]) == 3  # it got as far as the model
    assert "nowhere: there is no such" in capsys.readouterr().err


def test_the_help_names_the_recipes(capsys):
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    for name in ("dates", "digits", "hindi", "phonemes", "shakespeare"):
        assert built_in_recipe(name) is not None
        assert name in said


def test_a_check_says_what_the_laws_mean(capsys):
    assert main(["check", "small"]) == 0
    said = capsys.readouterr().out
    assert all(law.says in said for law in LAWS)
