"""The block structure of a mask says of every tile what the square says."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.lowered import lower
from qkv.masks import Causal, Chunked, Full, Mask, Strided, Window, allowed
from qkv.tiles import EMPTY, FULL, tile_kinds, work
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
def lowered(draw):
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
        return lower(mask, queries, tokens, past=True)
    return lower(mask, tokens, tokens)


def square(mask):
    return allowed(mask.mask, *mask.places)


@settings(max_examples=200, deadline=None)
@given(mask=lowered(), n_queries=st.integers(1, 6), n_keys=st.integers(1, 6))
def test_a_tile_is_what_its_pairs_are(mask, n_queries, n_keys):
    kinds = tile_kinds(mask.mask, *mask.places, n_queries, n_keys)
    for i, j in torch.cartesian_prod(torch.arange(kinds.shape[1]), torch.arange(kinds.shape[2])).tolist():
        pairs = square(mask)[:, i * n_queries : (i + 1) * n_queries, j * n_keys : (j + 1) * n_keys].flatten(1)
        assert not (pairs.any(1) & (kinds[:, i, j] == EMPTY)).any()
        assert not (~pairs.all(1) & (kinds[:, i, j] == FULL)).any()


@settings(max_examples=200, deadline=None)
@given(mask=lowered(), size=st.integers(1, 6), together=st.integers(1, 4), longest=st.integers(1, 20))
def test_the_work_covers_what_is_allowed_once(mask, size, together, longest):
    pairs = square(mask)
    seen = torch.zeros_like(pairs, dtype=torch.long)
    for at in work(tile_kinds(mask.mask, *mask.places, size, size), *mask.size, together, longest, size):
        assert at.queries.stop - at.queries.start <= size * together
        for run in at.runs:
            assert run.keys.stop - run.keys.start <= max(longest, size)
            part = (at.rows, at.queries, run.keys)
            seen[part] += 1
            assert not run.full or pairs[part].all()
    assert seen.max() <= 1
    assert not (pairs & (seen == 0)).any()


def test_simple_masks_are_known_exactly():
    """Nothing is left to chance where it matters for speed: a window is a band of tiles."""
    tokens = Tokens.full(1, 64)

    def picture(mask):
        kinds = tile_kinds(mask, *lower(mask, tokens, tokens).places, 8, 8)
        return ["".join(".+#"[kind] for kind in row) for row in kinds[0].tolist()]

    assert picture(Causal())[:3] == ["+.......", "#+......", "##+....."]
    assert picture(Causal() & Window(size=9))[:4] == ["+.......", "++......", ".++.....", "..++...."]
    assert picture(Window(size=17))[3] == ".+###+.."
    assert picture(Chunked(size=16))[2] == "..##...."
    assert picture(~Causal())[0] == "+#######"
    packed = Tokens.packed([[16, 8, 40]])
    kinds = tile_kinds(Full(), *lower(Full(), packed, packed).places, 8, 8)
    assert set(kinds.unique().tolist()) == {EMPTY, FULL}
    assert (kinds[0] == FULL).sum() == 2 * 2 + 1 + 5 * 5
