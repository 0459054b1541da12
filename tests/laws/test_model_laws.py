"""The laws of whole models: padding, packing, caching and the future leave the answer unchanged."""

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.masks import Causal, Full, Window
from qkv.models.stack import Repeat
from qkv.nn.blocks import OutputNormConfig, ParallelConfig, PostNormConfig, PreNormConfig, SandwichConfig
from qkv.nn.positions import LearnedPositionsConfig, SinusoidalPositionsConfig
from qkv.recorder import Recorder
from qkv.tokens import Tokens
from tiny import FEATURES, VOCAB, tiny_config, tiny_model, token_ids
from tolerances import BF16, FLOAT32, FLOAT64

BLOCKS = [PreNormConfig, PostNormConfig, OutputNormConfig, SandwichConfig, ParallelConfig]
KINDS = {
    "rotary": {},
    "learned": {"position": None, "table": LearnedPositionsConfig(length=32)},
    "sinusoidal": {"position": None, "table": SinusoidalPositionsConfig()},
    "window": {"mask": Causal() & Window(size=3)},
    "full": {"mask": Full()},
    "wide values": {"value_dim": 6, "qk_norm": None},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def close(got, want, tolerance=FLOAT64):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@every_kind
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_a_row_in_a_ragged_batch_equals_the_row_alone(kind, lengths, side):
    """Law 1."""
    model, width = tiny_model(**kind), max(lengths) + 2
    ids = token_ids(len(lengths), width)
    tokens = Tokens.padded(lengths, width, side=side)
    with torch.no_grad():
        batched = model(ids, tokens)
        for row, n in enumerate(lengths):
            place = slice(width - n, width) if side == "left" else slice(0, n)
            close(batched[row, place], model(ids[row : row + 1, place])[0])


@every_kind
def test_poison_in_the_padding_changes_nothing(kind):
    """Law 3, through the whole model: vectors of NaN where there is no token."""
    model, tokens = tiny_model(vectors=True, **kind), Tokens.padded([6, 3], side="left")
    x = torch.randn(2, 6, FEATURES, dtype=torch.float64)
    poisoned = torch.where(tokens.valid[..., None], x, float("nan"))
    targets = torch.randn(2, 6, FEATURES, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model(x, tokens)[tokens.valid], model(poisoned, tokens)[tokens.valid])
    model.loss(poisoned, targets, tokens)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model, ids = tiny_model(**kind), token_ids(2, 6)
    with torch.no_grad():
        other = torch.where(tokens.valid, ids, -7)  # an id that is none
        assert torch.equal(model(ids, tokens)[tokens.valid], model(other, tokens)[tokens.valid])


@pytest.mark.parametrize("block", BLOCKS)
def test_packed_documents_do_not_leak(block):
    """Law 16: change document A, and document B is bitwise the same; B's loss has no gradient in A."""
    model, tokens = tiny_model(block=block, vectors=True), Tokens.packed([[4, 3]], 9)
    x = torch.randn(1, 9, FEATURES, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone()
    other[:, :4] += 1
    out = model(x, tokens)
    assert torch.equal(out[:, 4:7], model(other, tokens)[:, 4:7])
    assert not torch.equal(out[:, :4], model(other, tokens)[:, :4])
    (gradient,) = torch.autograd.grad(out[:, 4:7].square().sum(), x)
    assert (gradient[:, :4] == 0).all()
    assert (gradient[:, 4:7] != 0).any()


@every_kind
def test_packed_equals_apart(kind):
    """Law 16, whatever the mask and the positions: also where the mask has to be a tensor."""
    model, ids = tiny_model(**kind), token_ids(2, 11)
    with torch.no_grad():
        packed = model(ids, Tokens.packed([[5, 4], [3, 1, 6]], 11))
        for row, start, end in [(0, 0, 5), (0, 5, 9), (1, 0, 3), (1, 3, 4), (1, 4, 10)]:
            close(packed[row, start:end], model(ids[row : row + 1, start:end])[0])


@pytest.mark.parametrize("block", BLOCKS)
def test_the_future_has_no_gradient(block):
    model = tiny_model(block=block, vectors=True)
    x = torch.randn(1, 7, FEATURES, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[:, 3].square().sum(), x)
    assert (gradient[:, 4:] == 0).all()
    assert (gradient[:, :4].abs().sum(-1) > 0).all()


def test_without_positions_attention_is_permutation_equivariant():
    model = tiny_model(position=None, mask=Full())
    ids, order = token_ids(2, 8), torch.randperm(8)
    with torch.no_grad():
        close(model(ids)[:, order], model(ids[:, order]))


def test_rotary_positions_depend_on_differences_only():
    model, ids = tiny_model(), token_ids(1, 8)
    with torch.no_grad():
        close(model(ids, Tokens.full(1, 8, start=1000)), model(ids))
        far = model(ids, dataclasses.replace(Tokens.full(1, 8), coords=2 * torch.arange(8)[None, :, None]))
        assert (far - model(ids)).abs().max() > 0.01


def test_grouped_heads_equal_repeated_ones():
    """A model with 2 kv heads equals one with 4 whose kv rows are repeated."""
    grouped, many = tiny_model(), tiny_model(n_kv_heads=4)
    state = grouped.state_dict()
    for name in [name for name in state if "qkv_proj" in name]:
        q, k, v = state[name].unflatten(0, (2, 4, 4)).split([2, 1, 1], 1)  # 2 groups of 2 queries, 1 key, 1 value
        state[name] = torch.cat([q, k.expand_as(q), v.expand_as(q)], 2).flatten(0, 2)
    many.load_state_dict(state)
    with torch.no_grad():
        close(many(token_ids(2, 9)), grouped(token_ids(2, 9)))


@every_kind
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), max_size=3), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=2))
def test_a_cache_equals_no_cache(kind, cuts, lengths):
    """Laws 4 and 27: prefill in any chunks, then token by token; also with rows of different lengths."""
    if kind.get("mask") == Full():
        return  # not causal: later tokens change earlier ones
    model, ids = tiny_model(**kind), token_ids(2, 10)
    bounds = sorted({0, 10, *cuts})
    with torch.no_grad():
        want, cache = model(ids), model.make_cache(2, 10)
        got = [model(ids[:, a:b], cache=cache) for a, b in itertools.pairwise(bounds)]
        close(torch.cat(got, 1), want)
        cache, width = model.make_cache(2, 12), max(lengths)
        prompt = torch.zeros(2, width, dtype=torch.long)
        for row, n in enumerate(lengths):
            prompt[row, :n] = ids[row, :n]
        model(prompt, Tokens.padded(lengths, width), cache=cache)
        for step in range(3):
            new = torch.stack([ids[row, n + step] for row, n in enumerate(lengths)])[:, None]
            got = model(new, cache=cache)
            for row, n in enumerate(lengths):
                close(got[row, 0], want[row, n + step])
        assert cache.length.tolist() == [n + 3 for n in lengths]


def test_a_ragged_chunk_after_a_ragged_prompt():
    model, ids = tiny_model(), token_ids(2, 12)
    with torch.no_grad():
        want, cache = model(ids), model.make_cache(2, 12)
        model(ids[:, :5], Tokens.padded([5, 3], 5), cache=cache)
        chunk = torch.zeros(2, 4, dtype=torch.long)
        chunk[0, 2:], chunk[1] = ids[0, 5:7], ids[1, 3:7]
        got = model(chunk, Tokens.padded([2, 4], side="left"), cache=cache)
    close(got[0, 2:], want[0, 5:7])
    close(got[1], want[1, 3:7])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BF16)])
def test_a_cache_in_lower_precision(dtype, tolerance):
    """Law 27: float32 tight, bfloat16 bounded; relative to the spread of the logits."""
    model, ids = tiny_model(dtype), token_ids(2, 24)
    with torch.no_grad():
        want, cache = model(ids), model.make_cache(2, 24)
        got = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(24)], 1)
    assert ((got - want).abs().max() / want.std()).item() < tolerance * 3


def test_dropout_is_dead_in_evaluation_and_alive_in_training():
    """Laws 6 and 29."""
    config = tiny_config(weight_dropout=0.3, dropout=0.3)
    config = dataclasses.replace(config, embed=dataclasses.replace(config.embed, dropout=0.3))
    model, plain, ids = tiny_model(config=config), tiny_model(), token_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids))
        close(model(ids), plain(ids))
        assert torch.equal(plain.train()(ids), plain.eval()(ids))
        assert not torch.equal(model.train()(ids), model(ids))


@pytest.mark.parametrize("field", ["embed", "weight", "residual"])
def test_each_dropout_acts(field):
    config = tiny_config(weight_dropout=0.5 * (field == "weight"), dropout=0.5 * (field == "residual"))
    config = dataclasses.replace(config, embed=dataclasses.replace(config.embed, dropout=0.5 * (field == "embed")))
    model, ids = tiny_model(config=config).train(), token_ids(1, 5)
    assert not torch.equal(model(ids), model(ids))


def test_tied_weights_stay_one():
    """Law 11: through saving, loading, copying, emptying and casting; the gradient is the sum of both uses."""
    model = tiny_model()
    assert [name for name in model.state_dict() if name.startswith(("embed", "head"))] == ["embed.weight"]
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    ids, targets = token_ids(2, 6), token_ids(2, 6, seed=2)
    with torch.no_grad():
        empty.embed.weight[3] += 1
        assert not torch.equal(empty(ids)[..., 3], model(ids)[..., 3])
    untied = tiny_model(tied=False)
    untied.load_state_dict(model.state_dict() | {"head.weight": model.embed.weight.detach()})
    for each in (model, untied):
        each.loss(ids, targets)[0].backward()
    close(model.embed.weight.grad, untied.embed.weight.grad + untied.head.weight.grad)


def test_a_shared_block_is_one_set_of_weights():
    config = tiny_config(layers=3)
    shared = dataclasses.replace(config, blocks=dataclasses.replace(config.blocks, shared=True))
    model, apart = tiny_model(config=shared), tiny_model(config=config)
    assert len(model.blocks) == 1
    state = model.state_dict()
    for name in [name for name in state if name.startswith("blocks.0.")]:
        state |= {name.replace("blocks.0.", f"blocks.{i}."): state[name] for i in (1, 2)}
    apart.load_state_dict(state)
    ids, cache = token_ids(2, 7), model.make_cache(2, 7)
    with torch.no_grad():
        close(model(ids), apart(ids))
        steps = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(7)], 1)
        close(steps, model(ids))


def test_a_pattern_of_blocks_with_two_masks():
    config = tiny_config()
    block = config.blocks.pattern
    local = dataclasses.replace(
        block, sublayers=(dataclasses.replace(block.sublayers[0], mask=Causal() & Window(size=2)), block.sublayers[1])
    )
    config = dataclasses.replace(config, blocks=Repeat(n=2, pattern=(local, block)))
    model, ids = tiny_model(config=config), token_ids(1, 8)
    assert [part.sublayers["attention"].seat.mask for part in model.blocks] == [0, 1, 0, 1]
    cache = model.make_cache(1, 8)
    with torch.no_grad():
        steps = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(8)], 1)
        close(steps, model(ids))


class Notes(Recorder):
    def __init__(self):
        self.names, self.errors = [], []

    def attention(self, name, problem, out):
        self.names.append(name)
        self.errors.append(out.shape)


def test_a_recorder_changes_nothing_and_sees_every_application():
    model, ids, notes = tiny_model(layers=3), token_ids(2, 7), Notes()
    with torch.no_grad():
        assert torch.equal(model(ids, recorder=notes), model(ids))
    assert notes.names == [f"blocks.{i}.attention" for i in range(3)]
    assert notes.errors == [(2, 4, 7, 4)] * 3


def test_a_sublayer_works_alone():
    model = tiny_model(layers=1)
    attention, x = model.blocks[0].sublayers["attention"], torch.randn(2, 5, 16, dtype=torch.float64)
    update, aux = attention(x)
    assert update.shape == x.shape
    assert aux is None
    with torch.no_grad():
        h = model.embed(token_ids(2, 5), Tokens.full(2, 5))
        block = model.blocks[0]
        h = h + attention(block.norms["attention"](h))[0]
        h = h + block.sublayers["ffn"](block.norms["ffn"](h))[0]
        close(model.readout(model.final_norm(h)), model(token_ids(2, 5)))
    assert model(token_ids(2, 5)).shape[-1] == VOCAB
