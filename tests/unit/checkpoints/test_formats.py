"""Files that an older qkv wrote hold the rows of a GLU in another order, and compute the same."""

import json

import pytest
import torch
import torch.nn.functional as F
import yaml

import qkv
from qkv import GLUConfig
from qkv.checkpoints import Store, digest, read_tensors, write_tensors
from qkv.checkpoints.formats import digest_of_base, from_format
from qkv.errors import FileError
from qkv.nn.adapters import LoRAConfig, adapter_state, add_adapters
from tiny import tiny_model

IDS = torch.arange(12).view(1, 12) % 7


def old_rows(tensor):
    """As format 1 had them, row by row: the gate, then the values, from groups of 8 (the tiny model's d_ff is 24)."""
    gate = [i for i in range(48) if i % 16 < 8]
    return tensor[gate + [i for i in range(48) if i % 16 >= 8]]


def in_format_1(state):
    return {name: old_rows(t) if "gate_up_proj" in name and t.ndim else t for name, t in state.items()}


def make_older(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))


@pytest.mark.parametrize("d_ff", [1, 5, 24, 32, 96])
def test_old_rows_compute_the_same(d_ff):
    gate, up, x = torch.randn(d_ff, 4), torch.randn(d_ff, 4), torch.randn(3, 1, 4)
    glu = GLUConfig(d_ff=d_ff).build(4)
    old = {"gate_up_proj.weight": torch.cat([gate, up]), "down_proj.weight": glu.down_proj.weight}
    glu.load_state_dict(from_format(1, old))
    want = F.linear(F.silu(x @ gate.T) * (x @ up.T), glu.down_proj.weight)
    assert (glu(x)[0] - want).abs().max() < 1e-5 * want.abs().max()


def test_a_share_of_the_groups_is_a_glu_of_its_own():
    """What a device does that holds half of the rows: tensor parallelism adds the updates up."""
    glu, x = GLUConfig(d_ff=64).build(4).double(), torch.randn(2, 3, 4).double()
    halves = []
    for rows, columns in zip(glu.gate_up_proj.weight.chunk(2), glu.down_proj.weight.chunk(2, dim=1), strict=True):
        half = GLUConfig(d_ff=32).build(4).double()
        half.load_state_dict({"gate_up_proj.weight": rows, "down_proj.weight": columns})
        halves.append(half(x)[0])
    assert (sum(halves) - glu(x)[0]).abs().max() < 1e-14


def test_an_older_checkpoint_is_turned_with_its_moments(tmp_path):
    state = tiny_model().state_dict()
    moments = {f"exp_avg.{name}": t + 1 for name, t in state.items()} | {
        f"step.{name}": torch.tensor(3.0) for name in state
    }
    store = Store(tmp_path)
    make_older(store.save(3, {"model": in_format_1(state), "optimizer": in_format_1(moments)}, {}))
    checkpoint = store.latest()
    for file, want in (("model", state), ("optimizer", moments)):
        found = checkpoint.tensors(file)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_an_older_folder_is_turned(tmp_path):
    model, folder = tiny_model().eval(), tmp_path / "model"
    qkv.save(model, folder)
    told = yaml.safe_load((folder / "model.yaml").read_text())
    assert told.pop("format") == 2
    (folder / "model.yaml").write_text(yaml.safe_dump(told))
    old = in_format_1({name: t.clone() for name, t in read_tensors(folder / "model.safetensors").items()})
    write_tensors(folder / "model.safetensors", old)
    assert torch.equal(qkv.load(folder).model(IDS), model(IDS))


@pytest.mark.parametrize("number", [0, 3, "2", None])
def test_a_newer_folder_is_refused(tmp_path, number):
    qkv.save(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "model.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"format": number}))
    with pytest.raises(FileError, match=r"format=.* is not one of 1 to 2; load it with a newer qkv"):
        qkv.load(tmp_path / "model")


def test_adapters_know_an_older_base_and_are_none_of_its_rows():
    model = tiny_model()
    state = model.state_dict()
    assert digest_of_base(state) == digest(in_format_1(state)) != digest(state)
    add_adapters(model, LoRAConfig())
    adapters = adapter_state(model)
    assert all(from_format(1, adapters)[name] is tensor for name, tensor in adapters.items())


def test_what_has_no_halves_is_left_to_the_check_of_shapes():
    strange = {"a.gate_up_proj.weight": torch.ones(3, 2), "gate_up_proj.bias": torch.ones(0)}
    assert from_format(1, strange) == strange
