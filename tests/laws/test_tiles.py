"""The block structure of a mask says of every tile what the square says."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.lowered import lower
from qkv.masks import Causal, Chunked, Full, Mask, Rule, Strided, Window
from qkv.ops.tiles import tiles, work
from qkv.tokens import Tokens

leaves = st.one_of(
    st.just(Full()),
    st.just(Causal()),
    st.builds(Window, size=st.integers(1, 9)),
    st.builds(Chunked, size=st.integers(1, 9)),
    st.builds(Strided, stride=st.integers(1, 5)),
)


def composed(m):
    pair = st.tuples(m, m)
    return st.one_of(pair.map(lambda ab: ab[0] & ab[1]), pair.map(lambda ab: ab[0] | ab[1]), m.map(lambda a: ~a))


masks = st.recursive(leaves, composed, max_leaves=4)


@st.composite
def rules(draw):
    """A mask over packed, padded or full rows, with queries that may be the last of the keys."""
    mask: Mask = draw(masks)
    kind = draw(st.sampled_from(["packed", "left", "right", "full", "past"]))
    if kind == "packed":
        rows = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3))
        tokens = Tokens.packed(rows, max(sum(row) for row in rows) + draw(st.integers(0, 3)))
    elif kind in ("left", "right"):
        tokens = Tokens.padded(draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)), side=kind)
    else:
        tokens = Tokens.full(2, draw(st.integers(1, 20)))
    if kind == "past":
        queries = Tokens.full(2, 3, start=tokens.shape[1])
        tokens = Tokens.full(2, tokens.shape[1] + 3)
        rule = lower(mask, queries, tokens, past=True).rule
        return rule or Rule(mask, *(torch.stack([x.index[:1], x.order[:1], x.segment[:1]]) for x in (queries, tokens)))
    return lower(mask, tokens, tokens).as_rule(tokens.shape[1], tokens.shape[1], torch.device("cpu"))


@settings(max_examples=200, deadline=None)
@given(rule=rules(), n_queries=st.integers(1, 6), n_keys=st.integers(1, 6))
def test_a_tile_is_what_its_pairs_are(rule, n_queries, n_keys):
    square = rule.dense()[:, 0]
    some, every = tiles(rule, n_queries, n_keys)
    for i, j in torch.cartesian_prod(torch.arange(some.shape[1]), torch.arange(some.shape[2])).tolist():
        pairs = square[:, i * n_queries : (i + 1) * n_queries, j * n_keys : (j + 1) * n_keys].flatten(1)
        assert not (pairs.any(1) & ~some[:, i, j]).any()
        assert not (~pairs.all(1) & every[:, i, j]).any()


@settings(max_examples=200, deadline=None)
@given(rule=rules(), n_queries=st.integers(1, 6), n_keys=st.integers(1, 6), longest=st.integers(1, 20))
def test_the_work_covers_what_is_allowed_once(rule, n_queries, n_keys, longest):
    square = rule.dense()[:, 0]
    seen = torch.zeros_like(square, dtype=torch.long)
    for at in work(rule, n_queries, n_keys, longest):
        for run in at.runs:
            assert run.keys.stop - run.keys.start <= max(longest, n_keys)
            part = (at.rows, at.queries, run.keys)
            seen[part] += 1
            assert not run.full or square[part].all()
    assert seen.max() <= 1
    assert not (square & (seen == 0)).any()


def test_simple_masks_are_known_exactly():
    """Nothing is left to chance where it matters for speed: a window is a band of tiles."""
    tokens = Tokens.full(1, 64)

    def picture(mask):
        rule = lower(mask, tokens, tokens).as_rule(64, 64, torch.device("cpu"))
        some, every = (x[0].tolist() for x in tiles(rule, 8, 8))
        return [
            "".join("#" if e else "+" if s else "." for s, e in zip(*row, strict=True))
            for row in zip(some, every, strict=True)
        ]

    assert picture(Causal())[:3] == ["+.......", "#+......", "##+....."]
    assert picture(Causal() & Window(size=9))[:4] == ["+.......", "++......", ".++.....", "..++...."]
    assert picture(Window(size=17))[3] == ".+###+.."
    assert picture(Chunked(size=16))[2] == "..##...."
    assert picture(~Causal())[0] == "+#######"
    packed = Tokens.packed([[16, 8, 40]])
    rule = lower(Full(), packed, packed).as_rule(64, 64, torch.device("cpu"))
    some, every = tiles(rule, 8, 8)
    assert torch.equal(some, every)
    assert some[0].sum() == 2 * 2 + 1 + 5 * 5
