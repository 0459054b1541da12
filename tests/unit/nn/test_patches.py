"""Pictures as tokens: patches and back, positions of rows and columns, and models that read them in any order."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import qkv
from qkv.errors import ConfigError
from qkv.nn.embedders import PatchEmbedderConfig, TokenEmbedderConfig
from qkv.nn.positions import GridResizeConfig, LearnedGridConfig, RoPEConfig, SinusoidalGridConfig
from qkv.ops.patches import patchify, unpatchify
from qkv.presets.vision import vit
from qkv.tokens import Layout, Tokens
from tiny import tiny_config, tiny_model

GRIDS = [(3, 2), (1, 4), (2, 5)]


def test_patches_by_hand():
    """Row by row, and in each patch channel by channel."""
    picture = torch.arange(16).reshape(2, 2, 4)
    assert patchify(picture, 2).tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]


@pytest.mark.parametrize(("shape", "patch"), [((3, 8, 12), 4), ((1, 5, 3), 1), ((2, 6, 6), 3)])
def test_unpatch_of_patch_is_the_picture(shape, patch):
    picture = torch.randn(shape)
    grid = shape[1] // patch, shape[2] // patch
    assert torch.equal(unpatchify(patchify(picture, patch), grid, patch), picture)


def test_a_map_of_patches_is_the_convolution_of_other_libraries():
    picture, weight = torch.randn(3, 8, 12, dtype=torch.float64), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    theirs = F.conv2d(picture[None], weight, stride=4)[0].flatten(1).T
    torch.testing.assert_close(patchify(picture, 4) @ weight.flatten(1).T, theirs)


@pytest.mark.parametrize("shape", [(3, 8, 9), (3, 7, 8), (3, 0, 8)])
def test_a_picture_that_is_no_whole_patches_is_refused(shape):
    with pytest.raises(ConfigError, match=f"{shape[1]} x {shape[2]} .* does not fall into patches of 4"):
        patchify(torch.zeros(shape), 4)


@pytest.mark.parametrize(("t", "f"), [(5, 12), (6, 13)])
def test_patches_that_are_no_grid_are_refused(t, f):
    with pytest.raises(ConfigError, match="a grid of 2 x 3 has 6"):
        unpatchify(torch.zeros(t, f), (2, 3), 2)


def test_where_the_patches_of_pictures_stand():
    tokens = Tokens.pictures([[(2, 2), (1, 3)], [(1, 2)]])
    assert tokens.coords[0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1], [0, 2]]
    assert tokens.coords[1, :2].tolist() == [[0, 0], [0, 1]]
    assert tokens.segment.tolist() == [[1, 1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0]]
    assert tokens.layout is Layout.RAGGED
    assert Tokens.pictures([[(2, 3)], [(3, 2)]]).layout is Layout.FULL
    assert Tokens.pictures([[(2, 3)], [(3, 2)]], 7).layout is Layout.RAGGED


def test_sinusoidal_positions_are_those_of_mae():
    """As in transformers, which builds rows first and then, for the weights of MAE, puts the half of columns first."""
    theirs = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    rows, columns = theirs.build_2d_sinusoidal_position_embedding(5, 3, 24, dtype=torch.float64).chunk(2, dim=1)
    ours = SinusoidalGridConfig().build(24)(Tokens.pictures([[(5, 3)]]), torch.float64)
    torch.testing.assert_close(ours[0], torch.cat([columns, rows], 1), rtol=0, atol=1e-12)


def test_a_learned_grid_is_read_by_row_and_column():
    table = LearnedGridConfig(rows=3, columns=5).build(4)
    with torch.no_grad():
        table.weight.copy_(torch.arange(60).view(15, 4))
    found = table(Tokens.pictures([[(2, 3)]]), torch.float32)
    assert (found[0, :, 0] / 4).tolist() == [0, 1, 2, 5, 6, 7]


RESIZES = {
    "bicubic": GridResizeConfig(),
    "antialias": GridResizeConfig(antialias=True),
    "bilinear": GridResizeConfig(kind="bilinear"),
    "offset": GridResizeConfig(antialias=True, offset=0.1),
}


def resized(table, grid, how):
    """By hand, of one picture: rows, then columns, each by a matrix."""

    def along(n, m):
        eye = torch.eye(m, dtype=torch.float64).view(1, m, m, 1).expand(1, m, m, 2).contiguous()
        size = {"scale_factor": ((n + 0.1) / m, 1.0)} if how.offset else {"size": (n, 2)}
        return F.interpolate(eye, **size, mode=how.kind, antialias=how.antialias)[0, :, :, 0]

    rows, columns = along(grid[0], table.rows), along(grid[1], table.columns)
    image = table.weight.view(table.rows, table.columns, -1)
    return torch.einsum("yxd,yr,xc->rcd", image, rows, columns).flatten(0, 1)


@pytest.mark.parametrize("name", RESIZES)
@torch.no_grad()
def test_a_learned_grid_is_resized_for_each_picture(name):
    """Side by side, two of one size, padding behind them; one of the trained size gets the table itself."""
    how = RESIZES[name]
    table = LearnedGridConfig(rows=3, columns=5, resize=how).build(4).double()
    table.weight.normal_()
    grids = [(2, 2), (3, 5), (7, 1), (5, 3), (2, 2)]
    found = table(Tokens.pictures([grids, [(4, 6)]], 52, prefix=1), torch.float64)
    parts = found[0].split([1 + h * w for h, w in grids] + [2])
    for grid, part in zip(grids, parts[:-1], strict=True):
        assert not part[0].any()
        wanted = table.weight if grid == (3, 5) else resized(table, grid, how)
        torch.testing.assert_close(part[1:], wanted, rtol=0, atol=0 if grid == (3, 5) else 1e-12)
    torch.testing.assert_close(found[1, 1:25], resized(table, (4, 6), how), rtol=0, atol=1e-12)
    assert not found[1, 25:].any()
    assert not parts[-1].any()


@pytest.mark.parametrize("name", RESIZES)
def test_a_resized_grid_learns(name):
    table = LearnedGridConfig(rows=2, columns=3, resize=RESIZES[name]).build(4).double()
    tokens = Tokens.pictures([[(3, 1), (2, 3), (1, 2)]], prefix=1)

    def forward(weight):
        return torch.func.functional_call(table, {"weight": weight}, (tokens, torch.float64))

    assert torch.autograd.gradcheck(forward, torch.randn(6, 4, dtype=torch.float64, requires_grad=True))
    assert table(Tokens.pictures([[]]), torch.float64).shape == (1, 0, 4)


@pytest.mark.parametrize("grid", [(4, 1), (1, 6), (2, 7)])
def test_a_picture_beyond_a_learned_grid_is_refused(grid):
    """A column too many is not the next row's first."""
    table = LearnedGridConfig(rows=3, columns=5).build(4)
    with pytest.raises(ConfigError, match="does not fit a table of 3 rows and 5 columns"):
        table(Tokens.pictures([[grid]]), torch.float32)


@pytest.mark.parametrize(
    "config", [LearnedGridConfig(rows=3, columns=5), SinusoidalGridConfig()], ids=["learned", "sin"]
)
def test_positions_of_pictures_refuse_texts(config):
    with pytest.raises(ConfigError, match=r"1 coordinate each; give Tokens\.pictures"):
        config.build(8)(Tokens.full(1, 4), torch.float32)


def test_positions_of_texts_refuse_pictures():
    model = tiny_model(config=tiny_config(position=RoPEConfig()))
    with pytest.raises(ConfigError, match="RoPE turns by 1 coordinate and the tokens have 2"):
        model(torch.zeros(1, 6, dtype=torch.long), Tokens.pictures([[(2, 3)]]))


def test_an_odd_width_is_refused():
    with pytest.raises(ConfigError, match="d_model=6 must be a multiple of 4"):
        SinusoidalGridConfig().build(6)


def test_where_the_tokens_before_patches_stand():
    """They have kinds of their own, and no place."""
    tokens = Tokens.pictures([[(1, 2), (1, 1)], [(1, 1)]], prefix=2)
    assert tokens.types.tolist() == [[1, 2, 0, 0, 1, 2, 0], [1, 2, 0, 0, 0, 0, 0]]
    assert tokens.segment.tolist() == [[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0]]
    assert tokens.coords[0].tolist() == [[-1, -1]] * 2 + [[0, 0], [0, 1]] + [[-1, -1]] * 2 + [[0, 0]]
    assert Tokens.pictures([[(2, 3)], [(3, 2)]], prefix=1).layout is Layout.FULL


TABLES = {
    "learned": LearnedGridConfig(rows=3, columns=5),
    "resized": LearnedGridConfig(rows=3, columns=4, resize=GridResizeConfig()),
    "sin": SinusoidalGridConfig(),
}


def picture_model(table, prefix=0):
    config = vit(d_model=16, n_layers=2, n_heads=4, patch=2, channels=3, n_classes=7)
    return tiny_model(config=config.replace(embed=config.embed.replace(position=TABLES[table], prefix=prefix)))


def picture(grid, prefix=0):
    """Its patches; rows that are not looked at hold NaN."""
    return F.pad(torch.randn(grid[0] * grid[1], 12, dtype=torch.float64), (0, 0, prefix, 0), value=float("nan"))


@pytest.mark.parametrize("table", TABLES)
@torch.no_grad()
def test_what_stands_before_patches_is_trained_and_has_no_position(table):
    embed = picture_model(table, prefix=2).embed
    x = embed(picture((3, 2), 2)[None], Tokens.pictures([[(3, 2)]], prefix=2))[0]
    assert torch.equal(x[:2], embed.prefix)
    bare = picture_model(table).embed
    bare.load_state_dict({name: p for name, p in embed.state_dict().items() if name != "prefix"})
    patches = torch.randn(1, 6, 12, dtype=torch.float64)
    found = embed(F.pad(patches, (0, 0, 2, 0)), Tokens.pictures([[(3, 2)]], prefix=2))[:, 2:]
    assert torch.equal(found, bare(patches, Tokens.pictures([[(3, 2)]])))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("table", TABLES)
@torch.no_grad()
def test_pictures_side_by_side_are_as_alone(table, prefix):
    """Of unequal size, packed into one row, and padded."""
    model = picture_model(table, prefix)
    stand = partial(Tokens.pictures, prefix=prefix)
    pictures = [picture(grid, prefix) for grid in GRIDS]
    alone = torch.cat([model(x[None], stand([[grid]])) for x, grid in zip(pictures, GRIDS, strict=True)])
    packed = model(torch.cat(pictures)[None], stand([GRIDS]))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    padded = torch.full((3, 10 + prefix, 12), float("nan"), dtype=torch.float64)
    for row, x in zip(padded, pictures, strict=True):
        row[: len(x)] = x
    torch.testing.assert_close(model(padded, stand([[grid] for grid in GRIDS])), alone, rtol=0, atol=1e-12)
    assert alone.shape == (3, 7)
    assert alone.std() > 0.1


@pytest.mark.parametrize("table", TABLES)
@torch.no_grad()
def test_patches_moved_with_their_positions_give_the_same(table):
    """And without them something else."""
    model, x, tokens = picture_model(table), torch.randn(1, 15, 12, dtype=torch.float64), Tokens.pictures([[(3, 5)]])
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    moved = Tokens(tokens.index, tokens.order, tokens.segment, tokens.coords[:, order], tokens.layout)
    torch.testing.assert_close(model(x[:, order], moved), model(x, tokens), rtol=0, atol=1e-12)
    assert not torch.allclose(model(x[:, order], tokens), model(x, tokens), atol=1e-3)


@pytest.mark.parametrize(("table", "prefix"), [("learned", 0), ("resized", 2)])
def test_the_laws_are_asked_of_models_of_pictures(table, prefix):
    report = qkv.laws.check(picture_model(table, prefix))
    assert report.holds
    assert {"packing", "padding"} <= {verdict.law.name for verdict in report.verdicts}


def test_what_an_embedder_of_patches_refuses():
    with pytest.raises(ConfigError, match="channels=None; set it"):
        PatchEmbedderConfig(patch=2).build(8)
    with pytest.raises(ConfigError, match=r"the patches are \(1, 4, 5\) and must be \(B, T, 12\)"):
        PatchEmbedderConfig(patch=2, channels=3).build(8)(torch.zeros(1, 4, 5), Tokens.full(1, 4))
    embed = PatchEmbedderConfig(patch=2, channels=3, prefix=2)
    with pytest.raises(ConfigError, match=r"has prefix=2 and no token is .* Tokens\.pictures\(grids, prefix=2\)"):
        embed.build(8)(torch.zeros(1, 4, 12), Tokens.full(1, 4))
    with pytest.raises(ConfigError, match="types from 0 to 3 do not fit an embedder that tells 3 apart"):
        embed.build(8)(torch.zeros(1, 4, 12), Tokens.pictures([[(1, 1)]], prefix=3))
    with pytest.raises(ConfigError, match="prefix=2 tokens are of kinds of their own and types=2"):
        embed.replace(types=2)
    with pytest.raises(ConfigError, match="prefix=-1 must not be negative"):
        embed.replace(prefix=-1)
    with pytest.raises(ConfigError, match=r"have 1 channels and model\.embed\.channels is 3"):
        PatchEmbedderConfig(patch=2, channels=3).for_pictures(1)
    with pytest.raises(ConfigError, match=r"the data are pictures and model\.embed is TokenEmbedder"):
        TokenEmbedderConfig().for_pictures(1)


# Parameters of timm's models of 224 x 224 pixels and 1000 classes, of which the head, the class token and the learned
# positions are taken off, since these have none.
@pytest.mark.parametrize(
    ("name", "published"),
    [("vit-ti16", 5_717_416), ("vit-s16", 22_050_664), ("vit-b16", 86_567_656), ("vit-l16", 304_326_632)],
)
def test_the_sizes_of_the_presets(name, published):
    with torch.device("meta"):
        model = qkv.preset(name, channels=3).build()
    d = model.config.d_model
    assert sum(p.numel() for p in model.parameters()) == published - 1000 * (d + 1) - d - 197 * d
