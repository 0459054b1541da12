"""The picture of an alignment: its names, its fonts, its size."""

import warnings

import matplotlib.ft2font
import matplotlib.image
import pytest
import torch
from matplotlib import font_manager, rcParams

from qkv.errors import FileError
from qkv.inspect import Alignment, draw_alignment, drawing


def drawn(path, source, target):
    weights = torch.full((len(target), len(source)), 1 / len(source))
    draw_alignment(Alignment(tuple(source), tuple(target), weights, "".join(target)), path)
    return matplotlib.image.imread(path)


def test_its_size_is_bounded_however_long_the_texts(tmp_path):
    small, large = drawn(tmp_path / "a.png", "ab", "cde"), drawn(tmp_path / "b.png", "ab" * 1000, "c" * 1500)
    assert small.shape < large.shape
    assert max(large.shape) < 45 * 150


def test_an_ending_says_what_kind_of_picture(tmp_path):
    for name in ("picture", ".png", "a.txt"):
        with pytest.raises(FileError, match="its ending does not say what kind of picture"):
            drawn(tmp_path / name, "ab", "c")
    assert not list(tmp_path.iterdir())


def test_a_font_that_has_what_the_usual_one_lacks_is_used(tmp_path):
    """STIX, which comes with matplotlib, stands for one that somebody installed for their script."""
    (stix,) = {font.fname for font in font_manager.fontManager.ttflist if font.fname.endswith("STIXGeneral.ttf")}
    theirs = matplotlib.ft2font.FT2Font(stix).get_charmap()
    ours = matplotlib.ft2font.FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()
    lacks = next(chr(code) for code in sorted(set(theirs) - set(ours)) if chr(code).isprintable())
    assert len(drawing._families(f"a{lacks}")) > len(drawing._families("a")) == len(rcParams["font.family"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(tmp_path / "a.png", lacks, "ab")


def test_what_no_font_has_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", font_manager.fontManager.ttflist[:0])
    drawing._families.cache_clear()
    with pytest.warns(UserWarning, match="the fonts here lack some of the characters; install one that has them"):
        drawn(tmp_path / "a.png", "日本", "ab")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(tmp_path / "b.png", "äß→", "ab")
    drawing._families.cache_clear()
