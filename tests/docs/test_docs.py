"""Every block of the README and of docs/ that a reader would run does run; every file and name in them exists.

A page is followed from top to bottom, in a folder with a short book.txt. Comments that do not show on the page help:

    <!-- setup: python -->    is run where it stands
    <!-- not run: reason -->  the next block is only shown

Blocks of python, bash and yaml are run; text is shown. A yaml block that begins with `# name.yaml` is saved under that
name, and others replace keys of the one before. Recipes run with a small model and few steps.
"""

import dataclasses
import re
import shlex
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import qkv.cli
import qkv.training.recipe_files as recipes
import qkv.training.session as session
import qkv.training.start as start
from qkv.config import Config

ROOT = Path(__file__).parents[2]
RUN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*RUN, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TARGETS = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
TESTS = {name for file in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
by_name = pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)


# --- blocks ---------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    line: int
    language: str
    text: str


_PARTS = re.compile(
    r"^<!-- (?P<key>setup|not run):(?P<value>.*?)-->$|^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


def blocks(page: Path) -> Iterator[Block]:
    """What is to be run, in order."""
    content, skip = page.read_text(encoding="utf-8"), False
    for found in _PARTS.finditer(content):
        line = content.count("\n", 0, found.start()) + 1
        if found["key"] == "setup":
            yield Block(line, "python", found["value"].removeprefix("\n"))
        elif found["key"]:
            assert found["value"].strip(), f"line {line}: say why it is not run"
            skip = True
        elif skip:
            skip = False
        else:
            yield Block(line, found["language"], found["text"])


class Session:
    """A reader who types in what a page says."""

    def __init__(self, page: Path) -> None:
        self.module = types.ModuleType(f"page {page.stem}")
        sys.modules[self.module.__name__] = self.module  # where type annotations of classes are looked up
        self.page = page
        self.recipe: dict = {}

    def follow(self, block: Block) -> None:
        match block.language:
            case "python":
                self.python(block.text, block.line)
            case "bash":
                for line in block.text.replace("\\\n", " ").splitlines():
                    self.shell(line)
            case "yaml":
                self.read_recipe(block.text)
            case language:
                assert language == "text", f"line {block.line}: python, bash, yaml or text, not {language!r}"

    def python(self, text: str, line: int) -> None:
        code = compile("\n" * line + text, str(self.page), "exec")
        exec(code, self.module.__dict__)

    def shell(self, line: str) -> None:
        match shlex.split(line, comments=True):
            case []:
                pass
            case ["qkv" | ".venv/bin/qkv", *arguments]:
                assert qkv.cli.main(arguments) == 0, line
            case ["!", "qkv", *arguments]:
                assert qkv.cli.main(arguments) > 0, line
            case ["make", *targets]:
                assert not set(targets) - set(TARGETS), line
            case ["git" | "cd" | "pip" | "source", *_]:
                pass
            case _:
                subprocess.run(line, shell=True, check=True, executable="/bin/bash")

    def read_recipe(self, text: str) -> None:
        """A whole recipe, or keys that replace those of the one before."""
        name = re.match(r"# (\S+\.yaml)\n", text)
        file = Path(name[1] if name else "changed.yaml")
        self.recipe = yaml.safe_load(text) if name else self.recipe | yaml.safe_load(text)
        file.write_text(text if name else yaml.safe_dump(self.recipe), encoding="utf-8")
        recipes.read_recipe(file)


def shrunk(recipe: qkv.RecipeConfig) -> qkv.RecipeConfig:
    """The same kind of run in a second; a recipe that is small already stays as it is, so that runs can be resumed."""

    def fewer(n: int) -> int:
        return n if n <= 50 else max(2, n // 200)

    counts = {name: fewer(getattr(recipe, name)) for name in ("steps", "save_every")}
    counts["evaluate_every"] = counts["steps"]  # each evaluation draws a plot
    sizes = {"context": min(recipe.context, 32), "batch_size": min(recipe.batch_size, 2)}
    if recipe.model is None or recipe.start is not None:  # the model is that of `start`, which the page made small
        return dataclasses.replace(recipe, **counts)
    if isinstance(recipe.data, qkv.PairDataConfig):  # a page of pairs is small already
        return dataclasses.replace(recipe, **counts, batch_size=sizes["batch_size"])
    stack = recipe.model.blocks
    stack = dataclasses.replace(stack, n=1) if isinstance(stack, qkv.Repeat) else stack
    model = dataclasses.replace(recipe.model, d_model=min(recipe.model.d_model, 48), blocks=stack)
    return dataclasses.replace(recipe, model=model, **counts, **sizes)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with a short book, which is also the corpus of the built-in recipe; runs are small."""
    desk = tmp_path / "desk"
    desk.mkdir()
    book = desk / "book.txt"
    book.write_text("ROMEO.\nThe sea, the ships, the wind that fills a sail.\n" * 60)
    read = recipes.read_recipe

    def read_small(path, sets=()):
        config = read(path, sets)
        shipped = qkv.DataConfig | qkv.MaskedDataConfig | qkv.PairDataConfig
        if not isinstance(config.data, shipped):  # a page's own task is small already
            return config
        if isinstance(config.data.source, qkv.PackageConfig):
            data = dataclasses.replace(config.data, source=qkv.FilesConfig(path=str(book)))
            config = dataclasses.replace(config, data=data)
        return shrunk(config)

    monkeypatch.setattr(start, "read_recipe", read_small)
    monkeypatch.setattr(session, "matmul_peak", lambda *_: 1e11)  # a second each time
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(desk)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that a second one only costs
    with warnings.catch_warnings():  # the CLI prints them, as it does for its users
        warnings.simplefilter("always")
        yield desk
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_every_block_runs(page, desk):
    session = Session(page)
    for block in blocks(page):
        session.follow(block)


# --- names ----------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    return _PARTS.sub("", page.read_text(encoding="utf-8"))


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@by_name
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{target}: no such heading"


@by_name
def test_files_tests_and_targets_exist(page):
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        name, _, test = code.partition("::")
        if re.fullmatch(r"[\w./-]+\.(py|pyi|md)|(src|tests|docs|benchmarks)/[\w./-]*", name):
            places = [place / name for place in (ROOT, ROOT / "src/qkv", ROOT / "tests", ROOT / "docs")]
            found = [place for place in places if place.exists()]
            assert found, f"{name} does not exist"
            assert not test or re.search(rf"def {test}\b", found[0].read_text()), f"{name} has no {test}"
        elif re.fullmatch(r"test_\w+", code):
            assert code in TESTS, f"there is no {code}"
        elif target := re.fullmatch(r"make (\w+)", code):
            assert target[1] in TARGETS, f"the Makefile has no {target[1]}"


@by_name
def test_configs_and_public_names_exist(page):
    configs = {cls.__name__ for cls in Config._registry.values()}
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for name in re.findall(r"\b[A-Z]\w+Config\b", code):
            assert name in configs, f"there is no {name}"
        if name := re.fullmatch(r"qkv\.([A-Za-z]\w*)(\(.*\))?", code):
            assert hasattr(qkv, name[1]), f"there is no qkv.{name[1]}"


# --- the checks themselves can fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert False\n```\n",
        "```bash\nqkv train nowhere.yaml\n```\n",
        "```bash\nmake nonsense\n```\n",
        "```bash\nls nowhere\n```\n",
        "```yaml\nsteps: 0\n```\n",
        "```ruby\n```\n",
        "<!-- not run: -->\n```python\n```\n",
    ],
)
def test_a_block_that_does_not_run_fails(text, desk):
    page = desk / "page.md"
    page.write_text(text)
    with pytest.raises((AssertionError, subprocess.CalledProcessError, qkv.ConfigError)):
        test_every_block_runs(page, desk)


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (test_links_lead_somewhere, "[x](nowhere.md)"),
        (test_links_lead_somewhere, "# A\n[x](#b)"),
        (test_files_tests_and_targets_exist, "`nn/nothing.py`"),
        (test_files_tests_and_targets_exist, "`unit/test_cost.py::test_nothing`"),
        (test_files_tests_and_targets_exist, "`test_nothing`"),
        (test_files_tests_and_targets_exist, "`make nonsense`"),
        (test_configs_and_public_names_exist, "`NothingConfig`"),
        (test_configs_and_public_names_exist, "`qkv.nothing`"),
    ],
)
def test_a_name_that_does_not_exist_fails(check, text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError):
        check(page)
