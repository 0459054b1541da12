"""What sublayers report: losses that are scaled by tokens, loads, and a place after the optimiser's step."""

from typing import ClassVar, final

import pytest
import torch

from qkv.config import config
from qkv.nn.sublayer import Aux, Sublayer, SublayerConfig
from qkv.training import RecipeConfig, train
from qkv.training.trainer import Trainer
from runs import fast, metrics, recipe_data, write_corpus, write_recipe  # noqa: F401 - `fast` is a fixture
from tolerances import FLOAT32

pytestmark = pytest.mark.usefixtures("fast")


@final
@config
class RoutedConfig(SublayerConfig):
    """Two experts, each a vector that is added; a token goes to the one that its first number says."""

    name: ClassVar[str] = "routed"

    weight: float = 0.5

    def build(self, d_model):
        return Routed(self, d_model)


@final
class Routed(Sublayer):
    def __init__(self, config, d_model):
        super().__init__(config)
        self.weight = config.weight
        self.experts = torch.nn.Parameter(torch.ones(2, d_model))
        self.register_buffer("balance", torch.zeros(2))

    def update(self, x, ctx):
        expert = (x[..., 0] > 0).long()
        valid = torch.ones_like(expert, dtype=torch.bool) if ctx is None else ctx.tokens.valid
        load = torch.bincount(expert[valid], minlength=2)
        push = self.weight * (self.experts.sum() * valid).sum()  # a loss for each token
        return self.experts[expert], Aux({"push": push}, {"load": load})

    def after_step(self, loads):
        self.balance += loads["load"]

    def residual_weights(self):
        return [self.experts]

    def flops(self, n_keys):
        return 0


def routed_data(folder, **changes):
    data = recipe_data(write_corpus(folder), dropout=0.0, **changes)
    data["model"]["blocks"]["pattern"]["sublayers"].append({"type": "Routed"})
    return data


def make_trainer(tmp_path, **changes):
    recipe = RecipeConfig.from_dict(routed_data(tmp_path, **changes))
    task = recipe.data.prepare()
    return Trainer(recipe.resolved(task), task)


def routed_of(trainer):
    return next(part for part in trainer.model.modules() if isinstance(part, Routed))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_extra_loss_is_scaled_by_tokens(tmp_path, accumulation):
    """0.5 for each token: the gradient of the mean is 0.5, however the tokens are spread over batches."""
    with_loss, without = (
        make_trainer(tmp_path, accumulation=accumulation),
        make_trainer(tmp_path, accumulation=accumulation),
    )
    routed_of(without).weight = 0.0
    found = []
    for trainer in (with_loss, without):
        _, count, report = trainer._gradients(trainer._micro_batches(0), "float32")
        found.append(routed_of(trainer).experts.grad)
    torch.testing.assert_close(found[0] - found[1], torch.full_like(found[0], 0.5), rtol=0, atol=FLOAT32)
    assert int(report.loads["blocks.0.routed.load"].sum()) == count


def test_reports_reach_the_metrics_and_the_layer(tmp_path):
    trainer = make_trainer(tmp_path, accumulation=3, optimizer={"lr": 1e-9})
    each = 0.5 * routed_of(trainer).experts.sum().item()
    entry = trainer.update()
    assert entry["aux.blocks.0.routed.push"] == pytest.approx(each, rel=1e-4)
    assert sum(entry["load.blocks.0.routed.load"]) == entry["tokens"]
    assert routed_of(trainer).balance.tolist() == entry["load.blocks.0.routed.load"]
    before = routed_of(trainer).balance.clone()
    found = trainer.evaluate(2)
    assert found["validation_aux.blocks.0.routed.push"] == pytest.approx(each, rel=1e-4)
    assert torch.equal(routed_of(trainer).balance, before), "only training moves what balances"


def test_a_run_with_a_routed_layer(tmp_path):
    path = write_recipe(tmp_path, steps=3)
    assert train(path, sets=["model.blocks.pattern.sublayers.1={type: Routed}"], out=tmp_path / "run") == 0
    assert all("aux.blocks.0.routed.push" in entry for entry in metrics(tmp_path / "run") if "loss" in entry)
