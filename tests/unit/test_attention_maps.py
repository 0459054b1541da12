"""What a model attended to, in numbers and as a picture."""

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image

from qkv.cli import main
from qkv.data.pictures import PicturesConfig
from qkv.errors import ConfigError
from qkv.inspect import AttentionMaps, draw_attention
from qkv.inspect.attention import AttentionRecorder
from qkv.loading.encoder import Encoder
from qkv.loading.facts import Facts
from qkv.loading.loaded import Loaded
from qkv.loading.saved import save
from qkv.masks import Causal, Full
from qkv.nn.pooling import FirstTokenConfig
from qkv.presets.vision import vit
from tiny import tiny_config, tiny_model


def vision(prefix=0):
    config = vit(d_model=16, n_layers=2, n_heads=2, patch=4, channels=1, n_classes=3)
    head = config.head.replace(pool=FirstTokenConfig()) if prefix else config.head
    model = tiny_model(torch.float32, config=config.replace(embed=config.embed.replace(prefix=prefix), head=head))
    return Encoder(model, None, Facts(pictures=PicturesConfig(channels=1, mean=(0.5,), std=(0.25,))))


@pytest.fixture
def picture():
    """Three rows and two columns of patches; the one in the middle on the right is bright."""
    values = np.full((12, 8), 20, dtype=np.uint8)
    values[4:8, 4:] = 250
    return Image.fromarray(values)


@pytest.mark.parametrize("prefix", [0, 3])
def test_the_weights_are_those_with_which_the_outputs_were_made(picture, prefix):
    maps = vision(prefix).attention(picture)
    assert maps.layers == ("blocks.0.attention", "blocks.1.attention")
    assert maps.tokens == (*("class", "register 1", "register 2")[:prefix], "0,0", "0,1", "1,0", "1,1", "2,0", "2,1")
    for weights in maps.weights:
        assert weights.shape == (2, 6 + prefix, 6 + prefix)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6 + prefix))
    assert max(maps.differences) < 1e-5
    assert maps.pixels.shape == (1, 12, 8)
    torch.testing.assert_close(maps.pixels[0], torch.from_numpy(np.asarray(picture) / 255).float())
    values = torch.randn(1, 12, 8)
    seen = vision(prefix).attention(values)
    assert seen.pixels.min() >= 0
    assert seen.tokens == maps.tokens


def test_a_kernel_that_computes_something_else_is_seen(picture, monkeypatch):
    reader, attend = vision(), AttentionRecorder.attention
    monkeypatch.setattr(AttentionRecorder, "attention", lambda self, name, p, out: attend(self, name, p, out + 0.1))
    assert min(reader.attention(picture).differences) > 0.05


def test_a_bright_patch_is_found():
    """Every token looks at the patch in row 1 and column 1 alone, and the class token at itself, too."""
    weights = torch.zeros(1, 7, 7)
    weights[:, :, 4] = 1
    weights[:, 0] = torch.tensor([0.5, 0, 0, 0.5, 0, 0, 0])
    maps = AttentionMaps(("class", *"abcdef"), ("a",), (weights,), (0.0,), (3, 2), torch.zeros(1, 12, 8))
    assert maps.over_picture(weights[0]).tolist() == [[0, 0], [0.5, 0], [0, 0]]
    assert maps.over_picture(weights[0], (2, 1)).tolist() == [[0, 0], [0, 1], [0, 0]]
    mean = maps.over_picture(weights[0], "mean")
    assert mean.argmax() == 3
    with pytest.raises(ConfigError, match=r"query=\(3, 0\) is outside of 3 rows and 2 columns"):
        maps.over_picture(weights[0], (3, 0))


def test_a_rollout_by_hand():
    """Two layers, each of which swaps two tokens: half stays each time, and twice the swap is the way back."""
    swap = torch.tensor([[[0.0, 1], [1, 0]]])
    maps = AttentionMaps(("a", "b"), ("x", "y"), (swap, swap), (0.0, 0.0))
    assert maps.rollout().tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("mask", [Causal(), Full()], ids=["causal", "full"])
def test_texts(tmp_path, mask):
    """Fewer kv heads than heads, ids without a tokenizer, and one layer of two."""
    model = tiny_model(torch.float32, config=tiny_config(mask=mask))
    reader = Loaded(model) if mask == Causal() else Encoder(model)
    maps = reader.attention([5, 6, 7, 8])
    assert maps.tokens == ("5", "6", "7", "8")
    assert max(maps.differences) < 1e-5
    assert (maps.weights[0].triu(1).abs().max() == 0) == (mask == Causal())
    (only,) = reader.attention([5, 6, 7, 8], layers=[1]).weights
    assert torch.equal(only, maps.weights[1])
    with pytest.raises(ConfigError, match=r"no attention with numbers \[7\]"):
        reader.attention([5, 6], layers=[7])
    draw_attention(maps, tmp_path / "all.png")
    draw_attention(maps, tmp_path / "one.png", layer=1, head=0)
    for wrong, says in (
        ({"layer": 2}, "layer=2: there are 2 layers of attention, which count from 0"),
        ({"layer": 1, "head": 4}, "head=4: layer 1 has 4 heads"),
        ({"query": "mean"}, "query is for pictures and the input is a text"),
        ({"rollout": True, "head": 1}, "a rollout is of all layers and heads"),
    ):
        with pytest.raises(ConfigError, match=says):
            draw_attention(maps, tmp_path / "no.png", **wrong)


def test_the_most_looked_at_is_the_bluest(tmp_path):
    """Over a white picture, in a panel by itself."""
    weights = torch.zeros(1, 6, 6)
    weights[:, :, 3] = 1
    maps = AttentionMaps(tuple("abcdef"), ("a",), (weights,), (0.0,), (3, 2), torch.ones(1, 12, 8))
    draw_attention(maps, tmp_path / "a.png", layer=0, head=0)
    image = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    blue = image[..., 2] - image[..., 0]
    y, x = np.nonzero(blue > 0.4)
    panel = image.shape[1] // 2
    assert (blue > 0.4).mean() > 0.02
    assert x.min() > panel * 1.3  # in the right column of the right panel
    assert abs(y.mean() / image.shape[0] - 0.5) < 0.15  # and its middle row


def test_the_verb(tmp_path, capsys, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    save(vision(1), tmp_path / "model")
    picture.save("p.png")
    assert main(["inspect", "model", "p.png", "--query", "1,1"]) == 0
    out = capsys.readouterr().out
    assert "7 tokens in 2 layers; weights times values are what the layers put out" in out
    assert (tmp_path / "attention.png").exists()
    for options, says in (
        (["--query", "left"], "--query left is unknown; give class, mean, or ROW,COLUMN"),
        (["--translation", "x"], "translation is for models of pairs, and this is an encoder"),
        (["--layer", "9"], "layer=9: there are 2 layers"),
    ):
        assert main(["inspect", "model", "p.png", *options]) == 2
        assert says in capsys.readouterr().err
