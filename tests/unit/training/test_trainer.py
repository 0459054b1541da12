"""The trainer: micro-batches, the order of the data, numbers that are not finite, what a run leaves behind."""

import json
import math
import signal

import pytest
import torch

from qkv.errors import ConfigError, TrainingError
from qkv.training import RecipeConfig, start, train, trainer
from qkv.training.start import difference
from qkv.training.trainer import Trainer
from runs import (
    at_step,
    fast,  # noqa: F401 - a fixture
    last_manifest,
    lengths_of,
    metrics,
    recipe_data,
    terminate_at,
    write_corpus,
    write_recipe,
)
from tolerances import FLOAT32, FLOAT64

pytestmark = pytest.mark.usefixtures("fast")


def make_trainer(tmp_path, **changes):
    recipe = RecipeConfig.from_dict(recipe_data(write_corpus(tmp_path), **changes))
    task = recipe.data.prepare()
    return Trainer(recipe.resolved(task), task)


# --- law 15: accumulation -------------------------------------------------------------------------------------------


def lines_of_many_lengths(folder):
    """Documents of a JSONL file: rows are packed unevenly, so micro-batches differ in their number of tokens."""
    path = folder / "lines.jsonl"
    words = ("cat", "a mat and", "the cat sat on a mat and saw two birds", "grey", "old hills", "fly over the old grey")
    path.write_text("".join(json.dumps({"text": word * (1 + i % 3)}) + "\n" for i, word in enumerate(words * 6)))
    return path


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_micro_batches_equal_one_batch(tmp_path, dtype, tolerance):
    """Loss and gradients of three unequal micro-batches are those of the mean over all their tokens."""
    data = recipe_data(lines_of_many_lengths(tmp_path), dropout=0.0, accumulation=3, batch_size=2)
    recipe = RecipeConfig.from_dict(data)
    task = recipe.data.prepare()
    run = Trainer(recipe.resolved(task), task)
    run.model.to(dtype)
    batches = run._micro_batches(0)
    counts = [int((batch.targets >= 0).sum()) for batch in batches]
    assert len(set(counts)) > 1
    loss, count, _ = run._gradients(batches, "float32")
    assert count == sum(counts)
    found = gradients(run.model)
    run.model.zero_grad()
    total = 0.0
    for batch in batches:  # each row by itself, summed, and divided at the end
        for row, lengths in enumerate(lengths_of(batch.tokens)):
            begin = 0
            for n in lengths:
                piece = slice(begin, begin + n)
                logits = run.model(batch.inputs[row : row + 1, piece])
                part = torch.nn.functional.cross_entropy(logits[0], batch.targets[row, piece], reduction="sum")
                part.backward()
                total, begin = total + part.item(), begin + n
    assert loss == pytest.approx(total / count, abs=tolerance)
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad / count, atol=tolerance, rtol=0.0)


def test_accumulation_gives_the_run_of_one_large_batch(tmp_path):
    """As long as no epoch ends inside an update. The sums run in another order; 6 steps do not amplify that."""
    recipe = write_recipe(tmp_path, dropout=0.0, steps=6, batch_size=8, evaluate_every=3)
    assert train(recipe, out=tmp_path / "large") == 0
    assert train(recipe, sets=["batch_size=2", "accumulation=4", "evaluate_batches=8"], out=tmp_path / "small") == 0
    large, small = metrics(tmp_path / "large"), metrics(tmp_path / "small")
    assert [entry.keys() for entry in large] == [entry.keys() for entry in small]
    for a, b in zip(large, small, strict=True):
        assert {key: pytest.approx(value, abs=20 * FLOAT32) for key, value in a.items()} == b


# --- the order of the data ------------------------------------------------------------------------------------------


def inputs(run, step):
    return torch.cat([batch.inputs for batch in run._micro_batches(step)])


def test_the_order_is_a_function_of_seed_and_step(tmp_path):
    one, again, other = (make_trainer(tmp_path, accumulation=2, seed=seed) for seed in (0, 0, 1))
    forwards = [inputs(one, step) for step in range(25)]
    backwards = [inputs(again, step) for step in reversed(range(25))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not torch.equal(inputs(other, 0), forwards[0])
    n = len(one.batches)
    assert not torch.equal(torch.cat(forwards[: n // 2]), torch.cat(forwards[n // 2 : 2 * (n // 2)]))


def test_an_epoch_has_every_row_once(tmp_path):
    run = make_trainer(tmp_path, accumulation=1)
    epoch = [run._micro_batches(step)[0] for step in range(len(run.batches))]
    seen = sum(int((batch.targets >= 0).sum()) for batch in epoch)
    left_out = run.task.dataset.train.n_tokens - run.task.dataset.train.n_documents - seen
    assert 0 <= left_out < 2 * run.recipe.batch_size * run.recipe.context


# --- numbers that are not finite ------------------------------------------------------------------------------------


def spoil_step(monkeypatch, step):
    """At one step the attention of the first block puts out NaN."""
    handles = []

    def spoil(self):
        part = self.model.blocks[0].sublayers["attention"]
        handles.append(part.register_forward_hook(lambda module, _, out: (out[0] * torch.nan, out[1])))

    at_step(monkeypatch, step, spoil)
    at_step(monkeypatch, step + 1, lambda _: handles.pop().remove())


def test_a_loss_that_is_not_finite_stops_and_leaves_no_trace(tmp_path, monkeypatch):
    """The checkpoint is the one that a signal just before would have left: weights, optimiser, random numbers."""
    recipe, run = write_recipe(tmp_path, steps=12), tmp_path / "run"
    assert terminate_at(7, recipe, tmp_path / "before") == 143
    with monkeypatch.context() as patch:
        spoil_step(patch, 8)
        message = (
            r"step 8: the loss is nan and the gradient's norm nan; it began in blocks\.0\.sublayers\.attention "
            r"\(Attention\)\. The weights are as they were; lower optimizer\.lr, or set non_finite=skip"
        )
        with pytest.raises(TrainingError, match=message):
            train(recipe, out=run)
    assert last_manifest(run) == last_manifest(tmp_path / "before")
    assert train(recipe, out=tmp_path / "straight") == 0
    assert train(recipe, out=run, resume=True) == 0
    assert last_manifest(run) == last_manifest(tmp_path / "straight")


def test_or_the_step_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    recipe, run = write_recipe(tmp_path, steps=12, save_every=1, keep=12), tmp_path / "run"
    spoil_step(monkeypatch, 8)
    assert train(recipe, sets=["non_finite=skip"], out=run) == 0
    assert "warning: skipped 1 of the steps, where the loss or the gradient was not finite" in capsys.readouterr().out
    entries = [entry for entry in metrics(run) if "loss" in entry]
    assert [entry["step"] for entry in entries if entry.get("skipped")] == [8]
    assert entries[7]["loss"] is None
    assert all(math.isfinite(entry["loss"]) for entry in entries[:7] + entries[8:])
    hashes = [
        json.loads((run / "checkpoints" / f"step-{step:08}" / "manifest.json").read_text())["files"][
            "model.safetensors"
        ]
        for step in range(1, 13)
    ]
    assert hashes[7] == hashes[6]
    assert len({entry["sha256"] for entry in hashes}) == 11


def test_a_learning_rate_that_ruins_the_weights(tmp_path):
    recipe = write_recipe(tmp_path, clip=None, dropout=0.0, schedule={"type": "Cosine", "warmup": 0})
    with pytest.raises(TrainingError, match=r"step 2: the loss is 3\.\d+ and the gradient's norm nan; it began in .*"):
        train(recipe, sets=["optimizer.lr=1e30"], out=tmp_path / "run")
    assert last_manifest(tmp_path / "run")["step"] == 1


def test_the_gradient_is_clipped(tmp_path):
    """What is logged is the norm before clipping; AdamW's moments show what was used."""
    run = make_trainer(tmp_path, clip=0.01, dropout=0.0)
    assert run.update()["gradient_norm"] > 0.5
    squares = sum(state["exp_avg"].square().sum() for state in run.optimizer.state.values())
    beta = run.recipe.optimizer.betas[0]
    assert math.sqrt(squares) / (1 - beta) == pytest.approx(0.01, rel=1e-3)


def test_the_schedule_sets_the_learning_rate(tmp_path):
    run = make_trainer(tmp_path)
    rates = [run.update()["lr"] for _ in range(6)]
    assert rates == [0.01 * run.recipe.schedule.factor(step, 40) for step in range(6)]
    assert {group["lr"] for group in run.optimizer.param_groups} == {rates[-1]}


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, steps=100, sample={"prompt": "the", "tokens": 12}, evaluate_every=50)
    assert train(recipe, sets=["precision=auto"]) == 0
    run, shown = tmp_path / "runs" / "tiny-1", capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == [
        *("checkpoints", "loss.png", "metrics.jsonl", "recipe.yaml"),
        *("samples.txt", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "the faster here (float32" in shown
    assert "precision: auto" not in (run / "recipe.yaml").read_text()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000095", "step-00000100"]
    entries = metrics(run)
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 101))
    assert [entry["step"] for entry in entries if "validation_loss" in entry] == [50, 100]
    assert entries[-1]["bits_per_byte"] < 3 < 4.3 < entries[0]["loss"] / math.log(2)
    assert "--- after step 50 ---\nthe" in (run / "samples.txt").read_text()
    assert 'next: qkv generate runs/tiny-1 "Once"' in shown
    assert train(recipe, sets=["steps=1"]) == 0
    assert (tmp_path / "runs" / "tiny-2").is_dir()


def test_a_run_hands_the_signals_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert terminate_at(2, write_recipe(tmp_path, steps=3), tmp_path / "run") == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_choosing_the_precision_changes_no_number(tmp_path, monkeypatch):
    """It runs the model, with dropout, before the first step."""
    recipe = write_recipe(tmp_path, steps=3)

    def fastest(step):
        return step("bfloat16") and step("float32") and ("float32", {"float32": 1.0, "bfloat16": 2.0})

    monkeypatch.setattr(trainer, "fastest", fastest)
    assert train(recipe, out=tmp_path / "given") == 0
    assert train(recipe, sets=["precision=auto"], out=tmp_path / "chosen") == 0
    assert last_manifest(tmp_path / "given") == last_manifest(tmp_path / "chosen")


def test_a_folder_that_is_taken(tmp_path, monkeypatch):
    """It is noticed before the corpus is read."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "mine.txt").write_text("mine")
    monkeypatch.setattr(start, "_open", None)
    with pytest.raises(
        ConfigError, match=r"run exists and is not empty; add --resume to continue it, or choose another"
    ):
        train(recipe, out=run)
    assert [path.name for path in run.iterdir()] == ["mine.txt"]


def test_a_model_without_a_head_or_beyond_all_memory(tmp_path):
    recipe = write_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"the recipe's model has no head and so no loss; set model\.head"):
        train(recipe, sets=["model.head=null"], out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"the model cannot be built \(.*\); make it smaller"):
        train(recipe, sets=["model.embed.vocab_size=1000000000000000"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_first_difference_is_named():
    old = {"a": 1, "b": [1, {"c": None}], "d": [1]}
    assert difference(old, old, "x") is None
    assert difference(old, old | {"b": [1, {"c": 2}]}, "x") == "x.b.1.c is None, not 2"
    assert difference(old, old | {"d": [1, 2]}, "x") == "x.d is [1], not [1, 2]"
    assert difference({"a": 1}, {"e": 1}, "x") == "x is {'a': 1}, not {'e': 1}"
