"""Folders in Hugging Face's layout: written whole or not at all, read with little memory, refused with all reasons."""

import dataclasses
import errno
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from qkv.checkpoints import read_folder, read_tensors, write_tensors
from qkv.checkpoints.files import give_back
from qkv.checkpoints.huggingface import load_model, save_model
from qkv.errors import ConfigError, FileError
from qkv.presets import llama
from tiny import tiny_config, tiny_model, token_ids


def model(**settings):
    return tiny_model(config=dataclasses.replace(tiny_config(**settings), context=32))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_written_is_read(tmp_path):
    ours = model(tied=False)
    save_model(ours, tmp_path / "new" / "it", stop_ids=(3,), begin_id=1, files={"tokenizer.json": b"{}"})
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "new" / "it").iterdir()} == names
    again = load_model(tmp_path / "new" / "it")
    assert same(again, ours)
    with torch.no_grad():
        assert torch.equal(again(token_ids(1, 9)), ours(token_ids(1, 9)))
    for name in ("config.json", "generation_config.json"):
        data = json.loads((tmp_path / "new" / "it" / name).read_text())
        assert (data["bos_token_id"], data["eos_token_id"]) == (1, 3)


def test_shards(tmp_path):
    ours = model()
    save_model(ours, tmp_path / "it", max_shard_bytes=8000, stop_ids=(3, 4))
    shards = sorted((tmp_path / "it").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "it" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(sum(x.nbytes for x in found.values()) <= 8000 or len(found) == 1 for found in map(read_tensors, shards))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in read_folder(tmp_path / "it").values())
    assert same(load_model(tmp_path / "it"), ours)
    assert json.loads((tmp_path / "it" / "generation_config.json").read_text())["eos_token_id"] == [3, 4]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match=r"cannot be written \(No space left on device\); free some space"):
        save_model(model(), tmp_path / "it")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_and_names_that_are_paths(tmp_path):
    (tmp_path / "empty").mkdir()
    save_model(model(), tmp_path / "empty")
    with pytest.raises(ConfigError, match="empty: is there already, and nothing is overwritten; choose another place"):
        save_model(model(), tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"'\.\./x' cannot name a file of a model"):
        save_model(model(), tmp_path / "other", files={"../x": b""})
    with pytest.raises(ConfigError, match="gpt2 cannot express this model"):
        save_model(model(), tmp_path / "other", family="gpt2")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def damaged(folder, change):
    """A folder whose config or weights were changed."""
    save_model(model(tied=False), folder)
    data, state = json.loads((folder / "config.json").read_text()), read_folder(folder)
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(data, state)
    (folder / "config.json").write_text(json.dumps(data))
    write_tensors(folder / "model.safetensors", state)
    return folder


def several(data, state):
    del state["model.norm.weight"]
    state["model.layers.0.self_attn.q_proj.weight"] = torch.ones(3, 16)
    state["extra"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (several, r"it: 3 things do not fit: lacks 'model\.norm\.weight' of shape \(16,\); 'model\.layers\.0\.self"
            r"_attn\.q_proj\.weight' has shape \(3, 16\), the model needs \(16, 16\); 'extra' has no place in the m"),
        (lambda data, state: data.update(num_hidden_layers=2000), "asks for 2000 layers and there are 21 tensors"),
        (lambda data, state: data.update(num_key_value_heads=3), r"config\.json: .*n_heads=4 must be a positive mult"),
        (lambda data, state: data.update(head_dim=3), r"config\.json: .*rotary embedding pairs coordinates"),
        (lambda data, state: data.update(hidden_size=2**31 - 1, head_dim=4), r"config\.json: |has shape"),
        (lambda data, state: data.update(rms_norm_eps=-1.0), r"config\.json: .*eps=-1\.0 must not be negative"),
        (lambda data, state: data.update(rope_theta=0.5), r"config\.json: .*theta=0\.5 must be above 1"),
        (lambda data, state: data.update(model_type="lama"), "'model_type' is 'lama', which qkv does not know; did"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_at_once(tmp_path, change, message):
    with pytest.raises(FileError, match=message) as caught:
        load_model(damaged(tmp_path / "it", change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", [None, "float16", "bfloat16", "float32"])
def test_weights_of_several_types_become_one_as_in_transformers(tmp_path, named):
    types = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))

    def mixed(data, state):
        data.pop("torch_dtype")
        data |= {"dtype": named} if named else {}
        for (name, tensor), dtype in zip(list(state.items()), types, strict=False):
            state[name] = tensor.to(dtype)

    folder = damaged(tmp_path / "it", lambda data, state: mixed(data, state))
    ours = load_model(folder)
    if named:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()}
        with torch.no_grad():
            ids = torch.arange(7)[None]
            got, want = ours(ids).float(), theirs(ids).logits.float()
        assert (got - want).abs().max() < 4e-2 * want.abs().max()
    else:
        assert {p.dtype for p in ours.parameters()} == {torch.float32}


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrappers_of_torch_are_passed_over(tmp_path, wrapper):
    def wrapped(data, state):
        for name in list(state):
            state[wrapper + name] = state.pop(name)

    assert same(load_model(damaged(tmp_path / "it", wrapped)), load_model(damaged(tmp_path / "plain", lambda *_: None)))


# --- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from qkv.checkpoints.huggingface import load_model

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

load_model(Path(sys.argv[1]))  # all that has to be imported, is
before = memory("VmRSS")
model = load_model(Path(sys.argv[2]))
for weight in model.parameters():
    weight.detach().view(-1)[::512].sum()  # a number of each page
print(memory("VmHWM") - before, sum(weight.nbytes for weight in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux takes the pages back")
def test_a_load_takes_little_more_memory_than_the_weights(tmp_path):
    for name, width in (("small", 64), ("large", 1024)):
        sizes = {"d_model": width, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "d_ff": 11 * width // 4}
        config = llama(**sizes, vocab_size=500, theta=1e4, context=64)
        with torch.device("meta"):
            made = config.build()
        save_model(made.to_empty(device="cpu").bfloat16(), tmp_path / name)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, weights = map(int, done.stdout.split())
    assert weights > 190e6
    assert peak < 1.2 * weights


def test_what_was_given_back_is_no_more_and_its_neighbours_are(tmp_path):
    names = "abc"
    write_tensors(tmp_path / "x", {name: torch.full((3000,), i + 1.0) for i, name in enumerate(names)})
    found = read_tensors(tmp_path / "x")
    for tensor in found.values():
        tensor += 10  # in this process's pages only
    other = torch.ones(3000)
    give_back([found["b"], other, torch.ones(3, device="meta"), other[::2]])
    assert (found["a"] == 11).all()
    assert (found["c"] == 13).all()
    assert (other == 1).all()
    if sys.platform == "linux":
        assert (found["b"] == 2).any()  # as the file has it: nothing is kept of it but the file
    path = Path(tmp_path / "x")
    assert (read_tensors(path)["b"] == 2).all()
