"""Values of another kind, and empty ones: one line that says what to give, or the answer.

In a process of its own, as a user has it: in this one a checker of signatures would speak first.
"""

import subprocess
import sys

import pytest
import torch

from qkv.errors import ConfigError
from qkv.masks import Causal, Full, Window
from qkv.ops import BACKENDS, attend
from qkv.tokens import Tokens

WRONG = {
    "attend(q, q, q, mask=torch.ones(3, 3, dtype=torch.bool))": "mask is Tensor and must be a mask such as Causal()",
    "attend(q, q, q, mask=None)": "mask is NoneType and must be a mask such as Causal()",
    "attend(q, q, q, mask=Causal)": "mask is the class Causal and must be a mask such as Causal()",
    "attend(q, q[:, :, :2], q[:, :, :2], mask=Causal())": "3 queries and 2 keys, of which queries are the last",
    "AttentionConfig(n_heads=2, mask=Causal)": "AttentionConfig.mask is the class Causal; give an instance: Causal(",
    "AttentionConfig(2)": "takes its values by name; write AttentionConfig(",
    "Or(Causal(), Full())": "Or takes its values by name; write Or(a=..., b=...)",
    "Window('4')": "Window.size = '4': input should be a valid integer",
    "Window(10**30)": "size has more than 63 bits, beyond any size",
    "Window(10**12)": "size=1000000000000 must be at least 1 and below 2**31",
    "Repeat(n=10**9, pattern=())": "n=1000000000 must be from 0 to 100000",
    "SamplingConfig(seed=10**30)": "seed has more than 63 bits",
    "Causal().replace(size=3)": "Causal has no 'size'",
    "Tokens.full(1, 4).with_blocks(0)": "size=0 must be at least 1",
    "Tokens.from_padding(torch.tensor([[0.0, 0.0, -1e9]]))": "the mask is of torch.float32; give one that is True at",
    "Tokens.padded([3, 2], side='middle')": "side='middle' is unknown; give 'left' or 'right'",
    "Tokens.padded([]).shape, Tokens.packed([]).shape": "((0, 0), (0, 0))",
    "'nothing' if Causal().draw(0) == '' else 0": "nothing",
    "preset(3)": "no preset 3; known: ",
    "load(3)": "3 is no path; give one as text or as a pathlib.Path",
    "load('.', dtype='float32')": "dtype='float32' is no type of PyTorch; give one such as torch.bfloat16",
    "load('.', device='gpu')": "; give a type such as torch.bfloat16, and a device that is there",
    "load('.', quantize='int3')": "quantize='int3' is unknown; give one of int8, int4",
    "train(3)": "the recipe is 3; give a path, a mapping like a recipe's file, or a RecipeConfig",
    "Tokens.packed([3, 2])": "3 is no list of lengths; give for each row the lengths of its documents, such as",
    "Tokens.padded([[3, 2]])": "[[3, 2]] is no list of lengths; give a length for each row, such as",
    "Tokens.padded(torch.tensor([3, 2])).shape": "(2, 3)",
}


def test_each_wrong_kind_is_one_line_that_says_what_to_give():
    script = f"""
import torch
from qkv import *
q = torch.randn(1, 2, 3, 4)
for line in {list(WRONG)!r}:
    try:
        print(eval(line))
    except ConfigError as error:
        print(*str(error).splitlines(), sep="↵")
    except Exception as error:
        print(type(error), error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    for line, said, want in zip(WRONG, done.stdout.splitlines(), WRONG.values(), strict=True):
        assert want in said, line


def test_a_config_of_one_field_takes_it_alone_and_changes_by_name():
    assert Window(4) == Window(size=4)
    assert Window(4).replace(size=5) == Window(size=5)
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        Window(4).replace(siz=5)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("mask", [Causal(), Full(), Causal() & Window(size=2)])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 0), (0, 0, 0), (2, 0, 3), (2, 3, 0)])
def test_nothing_gives_nothing(backend, mask, batch, queries, keys):
    """No rows, no tokens; queries without a key see nothing, which is 0."""
    q, k = (torch.randn(batch, 2, n, 8, requires_grad=True) for n in (queries, keys))
    if backend == "documents" or (keys < queries and mask != Full()):
        return
    out = attend(q, k, k, mask=mask, backend=backend)
    out.sum().backward()
    assert out.shape == (batch, 2, queries, 8)
    assert (out == 0).all()
    assert all(x.grad is None or (x.grad == 0).all() for x in (q, k))


def test_a_prefix_and_blocks_as_drawings():
    full, packed = Tokens.full(1, 6), Tokens.packed([[3, 4]], 8)
    assert Causal().draw(full.with_prefix(3)) == "███···\n███···\n███···\n████··\n█████·\n██████"
    assert Causal().draw(full.with_blocks(2)) == "██····\n██····\n████··\n████··\n██████\n██████"
    rows = ["██······", "██······", "███·····", "···██···", "···██···", "···███··", "···████·", "········"]
    assert Causal().draw(packed.with_prefix(2)) == "\n".join(rows)
    each = Tokens.full(2, 4).with_prefix(torch.tensor([1, 3]))
    assert each.order.tolist() == [[0, 1, 2, 3], [2, 2, 2, 3]]
