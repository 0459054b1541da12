"""A translator of dates learns where year, month and day stand, and nobody tells it."""

from pathlib import Path

import pytest
import torch

from date_fields import fields_looked_at, fields_of
from qkv.data import DatesConfig
from qkv.loading.facts import Facts
from qkv.loading.translator import Translator
from qkv.training import read_recipe
from qkv.training.trainer import Trainer

SHARE = 0.95  # of the fields of the output
SMALL = ("steps=240", "model.d_model=48", "optimizer.lr=8.0e-3", "data.source.n=8000", "data.source.locales=[en,de,fr]")
STEPS = 160  # before the learning rate goes down


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The recipe `dates`, narrower and in three languages, and dates that it has not seen."""
    pytest.importorskip("babel")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QKV_CACHE", str(tmp_path_factory.mktemp("cache")))
        recipe = read_recipe(Path("dates"), SMALL)
        data = recipe.data.prepare()
    trainer = Trainer(recipe.resolved(data), data)
    while trainer.step < STEPS:
        trainer.update()
    torch.set_num_threads(before)
    words = data.tokenizer
    facts = Facts.of_pairs(words.target, recipe.context)
    return Translator(trainer.model.eval(), words.source, words.target, facts), data.held_out[:60]


def test_it_looks_at_the_field_that_it_writes(trained):
    """It begins to after some hundred steps; before, a third of the fields are right."""
    translator, dates = trained
    right = dict.fromkeys(("year", "month", "day"), 0)
    for source, target in dates:
        found = fields_looked_at(translator.align(source, target).weights, source, target)
        for field, where in found.items():
            right[field] += where == field
    assert min(right.values()) >= SHARE * len(dates), right


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ("4. März 2021", ("2021", "März", "4")),
        ("Donnerstag, 4. März 2021", ("2021", "März", "4")),
        ("March 4, 2021", ("2021", "March", "4")),
        ("jueves, 4 de marzo de 2021", ("2021", "marzo", "4")),
        ("torsdag den 4. marts 2021", ("2021", "marts", "4")),
        ("2021. március 4., csütörtök", ("2021", "március", "4")),
    ],
)
def test_the_fields_of_a_date(source, fields):
    found = fields_of(source, "2021-03-04")
    assert tuple(source[found[name]] for name in ("year", "month", "day")) == fields


def test_every_date_has_its_fields():
    pytest.importorskip("babel")
    for source, target in DatesConfig(n=3000).pairs():
        found = fields_of(source, target)
        assert int(source[found["year"]]) == int(target[:4])
        assert int(source[found["day"]]) == int(target[8:])
        assert source[found["month"]].isalpha()


def test_the_field_with_the_most_attention():
    source, target = "4. March 2021", "2021-03-04"
    weights = torch.zeros(11, len(source))
    weights[:4, -2], weights[5:7, 0], weights[8:10, 4] = 1, 1, 1
    assert fields_looked_at(weights, source, target) == {"year": "year", "month": "day", "day": "month"}
