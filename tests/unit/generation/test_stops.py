import random

import pytest

from qkv.errors import ConfigError
from qkv.generation import StopFilter


def run(pieces, stops):
    stop_filter = StopFilter(stops)
    shown = [stop_filter.push(piece) for piece in pieces]
    return [*shown, stop_filter.flush()]


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["ab", "cd"], [], ["ab", "cd", ""]),
        (["ab", "cd"], ["cd"], ["ab", "", ""]),
        (["ab", "cd"], ["bc"], ["a", "", ""]),
        (["ab", "xd"], ["bc"], ["a", "bxd", ""]),
        (["ab"], ["bc"], ["a", "b"]),
        (["aab"], ["ab"], ["a", ""]),
        (["aa", "ab"], ["aab"], ["", "a", ""]),
        (["x\n\nq: y"], ["\n\nq:", "\n\n\n"], ["x", ""]),
        (["abc"], ["b", "abc"], ["a", ""]),
        (["zab"], ["b", "ab"], ["z", ""]),
    ],
)
def test_what_is_shown(pieces, stops, shown):
    assert run(pieces, stops) == shown


def test_how_the_text_is_cut_up_changes_nothing():
    dice = random.Random(0)
    for _ in range(3000):
        text = "".join(dice.choices("ab", k=12))
        stops = ["".join(dice.choices("ab", k=dice.randint(2, 5))) for _ in range(2)]
        cuts = sorted(dice.sample(range(13), 3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        want = text[: min(ends)[1]] if ends else text
        assert "".join(run(pieces, stops)) == "".join(run(text, stops)) == want


def test_nothing_comes_after_a_stop():
    stop_filter = StopFilter(["."])
    assert stop_filter.push("a.b") == "a"
    assert stop_filter.stopped
    assert stop_filter.push("c") == stop_filter.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="a stop string is empty and would end every text at once"):
        StopFilter(["\n", ""])
