"""The small parts: optimiser, precision, evaluation, the search for numbers that are not finite, memory."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from qkv.checkpoints import Store
from qkv.data import PackedBatches, Split
from qkv.errors import ConfigError, FileError
from qkv.tasks import Asked, Evaluation, evaluate
from qkv.training import AdamWConfig, evaluate_model, train
from qkv.training import precision as precisions
from qkv.training.finite import first_non_finite
from qkv.training.memory import keep_pages
from qkv.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from qkv.training.precision import fastest, matmul_peak, products_in
from runs import fast, metrics, recipe_data, write_corpus, write_recipe  # noqa: F401 - `fast` is a fixture
from tiny import tiny_config, tiny_model, token_ids
from tolerances import FLOAT64

CPU = torch.device("cpu")


# --- optimiser ------------------------------------------------------------------------------------------------------


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def test_weights_decay_and_norms_and_biases_do_not():
    """Without a gradient to follow, a step is the decay alone: 1 - lr * weight_decay."""
    net = small_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = make_optimizer(AdamWConfig(lr=0.1, weight_decay=0.5), net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        factor = 0.95 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_the_first_step_has_the_size_of_the_learning_rate():
    """Both moments are then the gradient and its square, so the step is lr * sign, minus the decay."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 2.0)
    optimizer = make_optimizer(AdamWConfig(lr=0.1, weight_decay=0.5), net)
    net.weight.grad = torch.tensor([[-30.0]])
    optimizer.step()
    assert net.weight.item() == pytest.approx(2 * 0.95 + 0.1)


def test_the_state_makes_the_round_trip_by_name():
    net, other = small_net(), small_net()
    optimizers = [make_optimizer(AdamWConfig(), part) for part in (net, other)]
    assert optimizer_tensors(optimizers[0], net) == {}

    def step(part, optimizer, seed):
        torch.manual_seed(seed)
        for p in part.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    step(net, optimizers[0], 1)
    saved = optimizer_tensors(optimizers[0], net)
    assert set(saved) == {f"{m}.{n}" for m in ("step", "exp_avg", "exp_avg_sq") for n, _ in net.named_parameters()}
    other.load_state_dict(net.state_dict())
    load_optimizer(optimizers[1], other, saved)
    for part, optimizer in zip((net, other), optimizers, strict=True):
        step(part, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert saved["step.0.weight"].item() == 2  # what was saved is the optimiser's own, and the copy is not
    assert optimizers[1].state[other[0].weight]["step"].item() == 2


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", ["float32", "bfloat16"])
def test_the_faster_precision_is_chosen_by_its_median(monkeypatch, quick):
    """One slow outlier of the faster one changes nothing, nor does a slow first round."""
    now, calls = [0.0], {"float32": 0, "bfloat16": 0}
    monkeypatch.setattr(precisions.time, "perf_counter", lambda: now[0])

    def step(name):
        calls[name] += 1
        slow = 100.0 if name == quick and calls[name] in (1, 3) else 0.0
        now[0] += (1.0 if name == quick else 2.0) + slow

    assert fastest(step) == (quick, {name: 1.0 if name == quick else 2.0 for name in calls})


def test_products_in_bfloat16_round_and_in_float32_do_not():
    x = torch.full((4, 4), 1 + 2**-10)
    with products_in("bfloat16", CPU):
        assert (x @ x).dtype == torch.bfloat16
    with products_in("float32", CPU):
        assert (x @ x).dtype == torch.float32


def test_the_peak_is_measured_with_random_numbers_of_its_own(monkeypatch):
    monkeypatch.setattr(precisions.time, "perf_counter", iter([i / 2 for i in range(20)]).__next__)
    before = torch.get_rng_state()
    assert matmul_peak("float32", CPU) == pytest.approx(2 * 1536**3 / 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_keeping_pages_never_fails(monkeypatch):
    assert keep_pages() in (True, False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_pages() is False


# --- evaluation -----------------------------------------------------------------------------------------------------


def split_of(*lengths):
    offsets = np.cumsum([0, *lengths])
    return Split(token_ids(int(offsets[-1])).numpy().astype(np.uint16), offsets, n_bytes=int(offsets[-1]))


def test_evaluation_is_the_mean_over_all_targets():
    """Against each document on its own, through the logits; documents are packed, and the last batch is smaller."""
    split, model = split_of(9, 4, 2, 7, 9, 3, 5), tiny_model()
    total, count = 0.0, 0
    for begin, end in zip(split.offsets, split.offsets[1:], strict=False):
        ids = torch.from_numpy(split.values[begin:end].astype(np.int64))[None]
        losses = nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum")
        total, count = total + losses.item(), count + ids.shape[1] - 1
    batches = PackedBatches(split, context=8, batch_size=2, seed=0, shuffle=False)
    model.train()
    found = evaluate(model, batches)
    assert found.tokens == count == 32
    assert found.total == pytest.approx(total, abs=FLOAT64)
    assert found.loss == pytest.approx(total / 32, abs=FLOAT64)
    assert model.training
    first = evaluate(model, batches, limit=1)
    assert first.tokens < count
    assert evaluate(model, batches, limit=99) == found


def test_evaluation_is_without_dropout():
    model = tiny_model(config=tiny_config(weight_dropout=0.5, dropout=0.5)).train()
    batches = PackedBatches(split_of(9, 9), context=8, batch_size=2, seed=0, shuffle=False)
    assert evaluate(model, batches) == evaluate(model, batches)


def test_nothing_measured_is_no_division_by_zero():
    assert Evaluation(0.0, 0).loss == 0.0


@pytest.mark.usefixtures("fast")
def test_bits_per_byte_by_hand(tmp_path):
    """A model of zeros gives every token 1/V: bits per byte are targets * log2(V) / bytes."""
    run, text = tmp_path / "run", tmp_path / "text.txt"
    assert train(write_recipe(tmp_path, steps=1), out=run) == 0
    zero_the_weights(run)
    text.write_text("the cat sat\n")
    found = evaluate_model(Asked(path=run, data=text)).to_dict()
    vocabulary = len(set("the cat sat on a mat and saw two birds fly over old grey hills.\n")) + 1
    assert (found["bytes"], found["tokens"]) == (12, 13)  # 12 characters and the end of the text
    assert found["loss"] == pytest.approx(math.log(vocabulary))
    assert found["perplexity"] == pytest.approx(vocabulary)
    assert found["bits_per_byte"] == pytest.approx(13 * math.log2(vocabulary) / 12)
    with pytest.raises(FileError, match=r"nothing\.txt: no such file"):
        evaluate_model(Asked(path=run, data=tmp_path / "nothing.txt"))


def zero_the_weights(run):
    store = Store(run / "checkpoints")
    newest = store.latest()
    files = {name: newest.tensors(name) for name in newest.files}
    files["model"] = {key: torch.zeros_like(tensor) for key, tensor in files["model"].items()}
    store.save(newest.step + 1, files, newest.state)


@pytest.mark.usefixtures("fast")
def test_without_data_a_run_of_text_is_measured_on_what_it_held_out(tmp_path):
    assert train(write_recipe(tmp_path), out=tmp_path / "run") == 0
    last = metrics(tmp_path / "run")[-1]
    found = evaluate_model(Asked(path=tmp_path / "run"))
    assert found.to_dict()["loss"] == pytest.approx(last["validation_loss"])
    assert found.to_dict()["bits_per_byte"] == pytest.approx(last["bits_per_byte"])
    assert str(found).splitlines()[0].endswith("nats per token")
    with pytest.raises(ConfigError, match="DATA is missing"):
        evaluate_model(Asked(path=tmp_path / "run", conversations=True))


# --- numbers that are not finite ------------------------------------------------------------------------------------


def test_the_innermost_module_is_named_and_random_numbers_stay():
    model = tiny_model()
    before = torch.get_rng_state()

    def compute():
        torch.rand(3)
        model(token_ids(1, 4))

    assert first_non_finite(model, compute) == "the head's loss or the backward pass"
    model.blocks[1].sublayers["ffn"].register_forward_hook(lambda *_: (torch.full((1, 4, 16), torch.nan), None))
    name = first_non_finite(model, compute)
    assert name == "blocks.1.sublayers.ffn (GLU)"
    with torch.no_grad():
        model.embed.weight[3, 3] = torch.inf
    assert first_non_finite(model, compute) == "the weight embed.weight"
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.embed._forward_hooks


@pytest.mark.parametrize(
    ("moment", "saved"),
    [
        ("exp_avg", torch.zeros(2, 3)),
        ("exp_avg_sq", torch.zeros(3, 2, dtype=torch.float64)),
        ("step", torch.zeros(2)),
        ("step", torch.zeros((), dtype=torch.int64)),
    ],
)
def test_moments_of_another_shape_or_type_are_refused(moment, saved):
    """The fused optimizer would write past their end."""
    model = torch.nn.Linear(2, 3, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    good = optimizer_tensors(optimizer, model)
    load_optimizer(optimizer, model, good)
    with pytest.raises(RuntimeError, match=rf"{moment}\.weight is .* of shape"):
        load_optimizer(optimizer, model, good | {f"{moment}.weight": saved})
