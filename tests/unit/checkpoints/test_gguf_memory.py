"""What a load of a GGUF file takes, at the most, beyond what it keeps."""

import subprocess
import sys

import pytest
import torch

from qkv.checkpoints.families import family_of
from qkv.checkpoints.gguf import KINDS, HuggingFace, from_huggingface, write_gguf
from qkv.presets import llama

PEAK = """
import sys
from pathlib import Path
import torch
from qkv.checkpoints.gguf import load_gguf

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

dtype = getattr(torch, sys.argv[3], None)
load_gguf(Path(sys.argv[1]), dtype=dtype)  # all that has to be imported, is
before = memory("VmRSS")
model = load_gguf(Path(sys.argv[2]), dtype=dtype)
for weight in model.state_dict().values():
    weight.view(-1)[::512].sum()  # a number of each page
print(memory("VmHWM") - before, sum(weight.nbytes for weight in model.state_dict().values()))
"""


def write(path, width):
    """A Llama in Q4_1, its table in Q8_0: of zeros, which cost no time."""
    sizes = {"d_model": width, "n_layers": 4, "n_heads": 8, "n_kv_heads": 8, "d_ff": 3 * width}
    config = llama(**sizes, vocab_size=20 * width, theta=1e4, context=64)
    family = family_of(config)
    with torch.device("meta"):
        state = family.keys(config).to_theirs(config.build().state_dict())
    made, kinds = {}, {}
    for key, tensor in state.items():
        kind = "F32" if tensor.ndim == 1 else "Q8_0" if "embed" in key or "lm_head" in key else "Q4_1"
        stored, kinds[key] = KINDS[kind].stored(tensor.shape), kind
        made[key] = torch.zeros(stored, dtype=KINDS[kind].dtype or torch.uint8)
    metadata, tensors = from_huggingface(HuggingFace(family.write(config), made, kinds))
    write_gguf(path, metadata, tensors)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    write(folder / "small", 64)
    write(folder / "large", 1024)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux takes the pages back")
@pytest.mark.parametrize("dtype", ["packed", "bfloat16"])
def test_a_load_takes_little_more_memory_than_what_it_keeps(files, dtype):
    command = [sys.executable, "-c", PEAK, str(files / "small"), str(files / "large"), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, kept = map(int, done.stdout.split())
    assert kept > 60e6
    assert peak < 1.1 * kept, f"{peak / kept:.2f}"
