"""Key maps: orders as drawn tables, and both ways to the same bits."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.checkpoints.maps import Fuse, KeyMap, Operation, Permute, Rule, Split, Transpose, check_fit, fuse_qkv
from qkv.errors import ConfigError, FileError

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8)


def rows(*names):
    """One row per name, holding its place in the alphabet and its digit, so that orders can be read."""
    return torch.tensor([[ord(name[0]) * 10 + int(name[1:])] for name in names])


def test_fused_rows_go_group_by_group():
    """Four query heads of two rows, two key heads of two, two value heads of three."""
    q, k, v = rows(*(f"q{i}" for i in range(8))), rows("k0", "k1", "k2", "k3"), rows(*(f"v{i}" for i in range(6)))
    (fused,) = fuse_qkv(n_heads=4, n_kv_heads=2, head_dim=2, value_dim=3).forward((q, k, v))
    first = ("q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1", "v2")
    second = ("q4", "q5", "q6", "q7", "k2", "k3", "v3", "v4", "v5")
    assert torch.equal(fused, rows(*first, *second))


def test_permute_takes_interleaved_pairs_to_halves_in_each_head():
    (found,) = Permute((0, 2, 1, 3)).forward((rows("a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3"),))
    assert torch.equal(found, rows("a0", "a2", "a1", "a3", "b0", "b2", "b1", "b3"))


def test_the_small_ones_as_torch_has_them():
    a, b = torch.arange(6).reshape(2, 3), torch.arange(9).reshape(3, 3)
    assert torch.equal(Transpose().forward((a,))[0], a.T)
    assert torch.equal(Fuse((2, 3)).forward((a, b))[0], torch.cat((a, b)))
    assert torch.equal(Split((1, 2)).forward((b,))[1], b[1:])


def test_gpt2_attention_is_made_of_small_pieces():
    """Conv1D: inputs by outputs, and q, k, v side by side."""
    c_attn = torch.randn(4, 12)
    rule = Rule(
        "c_attn", "qkv", Transpose(), Split((4, 4, 4)), fuse_qkv(n_heads=2, n_kv_heads=2, head_dim=2, value_dim=2)
    )
    ours = KeyMap([rule], n_layers=0).to_ours({"c_attn": c_attn})["qkv"]
    q, k, v = c_attn.T.split(4)
    assert torch.equal(ours, torch.cat((q[:2], k[:2], v[:2], q[2:], k[2:], v[2:])))


sizes = st.integers(1, 4)


@st.composite
def models(draw):
    """A map that uses every operation, and random tensors of a fitting model."""
    groups, repeat, head, value, width, n_layers = (draw(sizes) for _ in range(6))
    head *= 2
    qkv = fuse_qkv(groups * repeat, groups, head, value)
    halves = Permute(tuple(draw(st.permutations(range(head)))))
    q, k, v = groups * repeat * head, groups * head, groups * value
    rules = [
        Rule("wte", "embed"),
        Rule("h.{}.c_attn", "blocks.{}.qkv", Transpose(), Split((q, k, v)), qkv),
        Rule(("h.{}.q.bias", "h.{}.k.bias", "h.{}.v.bias"), "blocks.{}.qkv.bias", qkv),
        Rule("h.{}.rotary", "blocks.{}.rotary", halves),
        Rule(("h.{}.gate", "h.{}.up"), "blocks.{}.glu", Transpose(), Fuse((width, width + 1))),
        Rule("h.{}.kv", ("blocks.{}.k", "blocks.{}.v"), Split((2, width))),
    ]
    shapes = {"wte": (5, width)}
    for i in range(n_layers):
        shapes |= {f"h.{i}.c_attn": (width, q + k + v), f"h.{i}.rotary": (groups * head, width)}
        shapes |= {f"h.{i}.q.bias": (q,), f"h.{i}.k.bias": (k,), f"h.{i}.v.bias": (v,)}
        shapes |= {f"h.{i}.gate": (3, width), f"h.{i}.up": (3, width + 1), f"h.{i}.kv": (2 + width, 2)}
    dtype = draw(st.sampled_from(DTYPES))
    theirs = {name: torch.randint(-99, 99, shape).to(dtype) for name, shape in shapes.items()}
    return KeyMap(rules, n_layers), theirs


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@settings(max_examples=60, deadline=None)
@given(model=models())
def test_both_ways_give_the_same_bits(model):
    key_map, theirs = model
    ours = key_map.to_ours(dict(theirs))
    assert_same(key_map.to_theirs(dict(ours)), theirs)
    random = {name: torch.randint(-99, 99, tensor.shape).to(tensor.dtype) for name, tensor in ours.items()}
    assert_same(key_map.to_ours(key_map.to_theirs(dict(random))), random)


def test_sources_are_let_go_rule_by_rule():
    """An 8B model must not be in memory twice: what the first rule fused is gone when the second one runs."""
    state = {name: torch.ones(2) for name in "abc"}
    source = weakref.ref(state["a"])
    gone = []

    class Look(Operation):
        def forward(self, theirs):
            gone.append(source() is None)
            return theirs

        inverse = forward

    KeyMap([Rule(("a", "b"), "ab", Fuse((2, 2))), Rule("c", "c", Look())], n_layers=0).to_ours(state)
    assert gone == [True]
    assert not state


# --- errors ---------------------------------------------------------------------------------------------------------

QKV = fuse_qkv(n_heads=4, n_kv_heads=2, head_dim=2, value_dim=3)
MAP = KeyMap(
    [Rule(("h.{}.q", "h.{}.k", "h.{}.v"), "blocks.{}.qkv", QKV), Rule("wte", "embed", Transpose())],
    n_layers=1,
    ignore=("h.{}.mask",),
)


def good():
    return {"h.0.q": torch.ones(8, 5), "h.0.k": torch.ones(4, 5), "h.0.v": torch.ones(6, 5), "wte": torch.ones(2, 3)}


def test_the_good_one_passes_with_what_may_be_ignored():
    MAP.to_ours(good() | {"h.0.mask": torch.ones(1), "h.17.mask": torch.ones(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h.0.q": None}, r"x\.bin: lacks 'h\.0\.q'; use the config"),
        ({"h.1.q": torch.ones(1)}, r"x\.bin: 'h\.1\.q' has no place in the model; use"),
        (
            {"y": torch.ones(1), "z": torch.ones(1)},
            r"2 things do not fit: 'y' has no place in the model; 'z' has no place in the model; use",
        ),
        ({"h.0.masks": torch.ones(1)}, r"'h\.0\.masks' has no place"),
        ({"hx0.mask": torch.ones(1)}, r"'hx0\.mask' has no place"),
        ({"h.0.k": torch.ones(5, 5)}, r"'h\.0\.q', 'h\.0\.k', 'h\.0\.v': found \(5, 5\), needs \(4, 5\)"),
        ({"h.0.v": torch.ones(6, 4)}, r"found \(6, 4\), needs \(6, 5\)"),
        ({"h.0.q": torch.ones(())}, r"found \(\), needs \(8,\)"),
        ({"h.0.v": torch.ones(6, 5).half()}, r"found torch\.float16 beside torch\.float32, needs one dtype"),
        ({"wte": torch.ones(3)}, r"'wte': found \(3,\), needs two axes"),
    ],
)
def test_errors_name_the_key_and_both_facts(change, message):
    state = {name: tensor for name, tensor in (good() | change).items() if tensor is not None}
    with pytest.raises(FileError, match=message):
        MAP.to_ours(state, source="x.bin")


def test_all_mistakes_are_told_at_once():
    state = good() | {f"x{i}": torch.ones(1) for i in range(30)} | {"h.0.k": torch.ones(5, 5)}
    del state["wte"]
    with pytest.raises(FileError) as caught:
        MAP.to_ours(state)
    message = str(caught.value)
    assert message.startswith("the checkpoint: 32 things do not fit: 'h.0.q', 'h.0.k', 'h.0.v': found (5, 5), needs")
    assert "lacks 'wte'; 'x0' has no place" in message
    assert "'x17' has no place in the model; and 12 more; use the config" in message
    assert "x18" not in message
    assert "\n" not in message


def test_a_state_is_checked_in_its_own_names_before_anything_is_converted():
    model = {"blocks.0.qkv": torch.empty(18, 5, device="meta"), "embed": torch.empty(3, 2, device="meta")}
    MAP.check(good() | {"h.0.mask": torch.ones(1)}, model, source="x")
    state = good() | {"h.0.q": torch.ones(9, 5), "wte": torch.ones(2, 4), "y": torch.ones(1)}
    del state["h.0.v"]
    with pytest.raises(FileError) as caught:
        MAP.check(state, model, source="x")
    assert str(caught.value) == (
        "x: 4 things do not fit: 'h.0.q' has shape (9, 5), the model needs (8, 5); lacks 'h.0.v' of shape (6, 5); "
        "'wte' has shape (2, 4), the model needs (2, 3); 'y' has no place in the model; "
        "use the config that belongs to these weights"
    )
    assert len(state) == 4


def test_errors_on_the_way_back():
    ours = MAP.to_ours(good())
    with pytest.raises(FileError, match=r"the model: lacks 'embed'"):
        MAP.to_theirs({"blocks.0.qkv": ours["blocks.0.qkv"]})
    with pytest.raises(FileError, match=r"'blocks\.0\.qkv': found \(17, 5\), needs \(18, 5\)"):
        MAP.to_theirs(ours | {"blocks.0.qkv": torch.ones(17, 5)})
    with pytest.raises(FileError, match=r"'extra' has no place"):
        MAP.to_theirs(ours | {"extra": torch.ones(1)})


@pytest.mark.parametrize(
    ("operation", "tensors"),
    [
        (Permute((1, 0)), ((3, 2),)),
        (Permute((1, 0)), ((),)),
        (Fuse((2, 2)), ((2, 2), (2, 3))),
        (Split((2, 2)), ((5,),)),
    ],
)
def test_every_operation_checks_its_shapes(operation, tensors):
    names = tuple("abcd"[: len(tensors)])
    state = {name: torch.ones(shape) for name, shape in zip(names, tensors, strict=True)}
    outputs = ("x", "y") if isinstance(operation, Split) else "x"
    with pytest.raises(FileError, match=r"found .*, needs "):
        KeyMap([Rule(names, outputs, operation)], n_layers=0).to_ours(state)


def test_heads_that_do_not_divide():
    for n_kv_heads in (3, 0):
        with pytest.raises(ConfigError, match=rf"n_heads=4 must be a multiple of n_kv_heads={n_kv_heads}"):
            fuse_qkv(n_heads=4, n_kv_heads=n_kv_heads, head_dim=2, value_dim=2)


@pytest.mark.parametrize(
    "rules",
    [
        [Rule("a", "x"), Rule("a", "y")],
        [Rule("a", "x"), Rule("b", "x")],
        [Rule("a.{}", "x.{}"), Rule("a.1", "y")],
    ],
)
def test_a_key_in_two_rules_is_our_mistake(rules):
    with pytest.raises(AssertionError, match="a key is in two rules"):
        KeyMap(rules, n_layers=2)


def test_check_fit():
    model = {"a": torch.empty(2, 3, device="meta"), "b": torch.empty(1)}
    check_fit({"a": torch.ones(2, 3), "b": torch.ones(1)}, model, source="x")
    cases = [
        ({"b": torch.ones(1)}, r"x: lacks 'a' of shape \(2, 3\)"),
        ({"a": torch.ones(3, 2), "b": torch.ones(1)}, r"x: 'a' has shape \(3, 2\), the model needs \(2, 3\)"),
        ({"a": torch.ones(2, 3), "b": torch.ones(1), "c": torch.ones(1)}, r"x: 'c' has no place"),
    ]
    for tensors, message in cases:
        with pytest.raises(FileError, match=message):
            check_fit(tensors, model, source="x")
