"""The rooms are open: a task defined here goes through recipe, command line, trainer, evaluation, save and load."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar, final

import pytest
import torch

import qkv
from qkv import Batch, Batches, ConfigError, Measure, Ready, Task, TaskConfig, Tokens
from qkv.cli import main
from qkv.config import config
from qkv.training import train
from qkv.yaml_files import dump_yaml
from runs import assert_same_run, fast, kill_at, metrics  # noqa: F401 - `fast` is a fixture

pytestmark = pytest.mark.usefixtures("fast")


@final
@dataclass(frozen=True)
class Sorter(Ready):
    """What `qkv.load` hands out for a run that learned to sort."""

    what = "a sorter"
    verbs = "qkv eval"

    model: qkv.Transformer
    facts: None = None

    def files(self):
        return {}

    def sort(self, rows):
        with torch.no_grad():
            return self.model(torch.tensor(rows)).argmax(-1).tolist()


@final
@config
class SortTokensConfig(TaskConfig):
    """Rows of random tokens, each to be put in order."""

    opens: ClassVar[type] = Sorter

    rows: int = 400
    width: int = 5
    vocabulary: int = 6
    seed: int = 0

    def prepare(self, start=None):
        made = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(self.vocabulary, (self.rows, self.width), generator=made).unique(dim=0)
        rows = rows[torch.randperm(len(rows), generator=made)]
        return SortTokens(self, rows[:-40], rows[-40:])

    @classmethod
    def open(cls, folder, model):
        return Sorter(model)


@final
@dataclass
class SortTokens(Task):
    settings: SortTokensConfig
    train: torch.Tensor
    held_out: torch.Tensor

    @property
    def fingerprint(self):
        return str(hash(tuple(self.train.flatten().tolist())))

    def complete(self, model, recipe):
        if recipe.sample is not None and not recipe.sample.prompt:
            raise ConfigError("sample.prompt is empty; give tokens to sort")
        return replace(model, embed=replace(model.embed, vocab_size=self.settings.vocabulary))

    def batches(self, recipe):
        sizes = {"context": recipe.context, "batch_size": recipe.batch_size, "seed": recipe.seed}
        return Rows(self.train, shuffle=True, **sizes), Rows(self.held_out, shuffle=False, **sizes)

    def measures(self, model, found):
        right = (model(self.held_out).argmax(-1) == self.held_out.sort(1).values).all(1)
        return (Measure("exact", right.double().mean().item(), lower_is_better=False, form=".1%"),)

    def sample(self, model, recipe, settings):
        row = [int(token) for token in settings.prompt.split()]
        return f"{settings.prompt} → {Sorter(model).sort([row])[0]}"

    def notes(self, recipe):
        yield f"{len(self.train)} rows to sort"

    def next_steps(self, folder):
        return f"qkv eval {folder}"


@final
class Rows(Batches):
    def __init__(self, values, **sizes):
        super().__init__(**sizes)
        self.values = values

    @property
    def n_rows(self):
        return len(self.values)

    def rows(self, epoch, first, end):
        order = torch.arange(len(self.values))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(epoch))
        some = self.values[order[first:end]]
        return Batch(some, some.sort(1).values, Tokens.full(*some.shape))


def model():
    """A small Transformer whose tokens see one another in both directions."""
    read = qkv.AttentionConfig(n_heads=4, mask=qkv.Full())
    block = qkv.PreNormConfig(norm=qkv.RMSNormConfig(), sublayers=(read, qkv.GLUConfig(d_ff=64)))
    position = qkv.LearnedPositionsConfig(length=8)
    return qkv.TransformerConfig(
        d_model=32,
        embed=qkv.TokenEmbedderConfig(position=position),
        blocks=qkv.Repeat(n=2, pattern=block),
        final_norm=qkv.RMSNormConfig(),
        head=qkv.LMHeadConfig(tied=False),
    )


def write_recipe(folder, **changes):
    recipe = {
        "model": model().to_dict(),
        "data": {"type": "SortTokens"},
        "steps": 30,
        "context": 8,
        "batch_size": 32,
        "optimizer": {"lr": 0.01},
        "schedule": {"type": "Cosine", "warmup": 4},
        "precision": "float32",
        "evaluate_every": 15,
        "save_every": 10,
        "sample": {"prompt": "3 1 2 0 2"},
    } | changes
    (folder / "sort.yaml").write_text(dump_yaml(recipe))
    return folder / "sort.yaml"


def test_a_task_trains_samples_and_is_measured(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(write_recipe(tmp_path, steps=150)), "--out", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "351 rows to sort" in shown
    assert "3 1 2 0 2 → [0, 1, 2, 2, 3]" in shown
    assert f"next: qkv eval {run}" in shown
    assert metrics(run)[-1]["exact"] > 0.5
    assert (run / "samples.txt").exists()


def test_a_task_resumes_bit_for_bit(tmp_path):
    recipe = write_recipe(tmp_path)
    assert train(recipe, out=tmp_path / "whole") == 0
    kill_at(17, recipe, tmp_path / "cut")
    assert main(["train", str(recipe), "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert main(["train", str(tmp_path / "whole" / "recipe.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_a_task_refuses_what_does_not_fit(tmp_path, capsys):
    recipe = write_recipe(tmp_path, sample={})
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "sample.prompt is empty; give tokens to sort" in capsys.readouterr().err


def test_a_task_evaluates_saves_and_loads(tmp_path, capsys):
    run, saved = tmp_path / "run", tmp_path / "saved"
    assert train(write_recipe(tmp_path), out=run) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(metrics(run)[-1]["validation_loss"])
    assert found["exact"] == metrics(run)[-1]["exact"]
    assert main(["eval", str(run)]) == 0
    assert "exact" in capsys.readouterr().out
    assert main(["eval", str(run), "--beams", "3"]) == 2
    opened = qkv.load(run)
    assert isinstance(opened, Sorter)
    qkv.save(opened, saved)
    again = qkv.load(saved)
    assert isinstance(again, Sorter)
    assert again.sort([[3, 1, 2, 0, 2]]) == opened.sort([[3, 1, 2, 0, 2]])
    assert main(["show", str(run)]) == main(["check", str(run)]) == 0
