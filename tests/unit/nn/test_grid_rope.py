"""Rotary embedding of pictures: laws, code that nobody here wrote, and pictures of unequal size side by side."""

import pytest
import torch
from transformers import DINOv3ViTConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding, apply_rotary_pos_emb_vision

import qkv
from qkv.errors import ConfigError
from qkv.nn.positions import AxialRoPEConfig, CentredRoPEConfig, RoPEConfig
from qkv.ops.rotary import rotate
from qkv.tokens import Tokens
from tolerances import FLOAT64

GRIDS = [(3, 5), (4, 1), (2, 2), (3, 5)]
BOTH = [AxialRoPEConfig(), CentredRoPEConfig()]


def scores(config, tokens, q, k):
    """The product of one query and one key at each pair of places."""
    by = config.rotation(tokens, q.shape[-1], torch.float64)
    q, k = (rotate(x.expand(*tokens.shape, 1, -1), by)[:, :, 0] for x in (q, k))
    return q @ k.mT


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_axial_scores_depend_on_distances_alone(layout):
    q, k = torch.randn(2, 8, dtype=torch.float64)
    (found,) = scores(AxialRoPEConfig(layout=layout), Tokens.pictures([[(4, 6)]]), q, k)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    of = {}
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            of.setdefault(tuple((a - b).tolist()), []).append(found[i, j])
    assert len(of) == 7 * 11
    assert all((torch.stack(same) - same[0]).abs().max() < FLOAT64 for same in of.values())
    values = torch.stack([same[0] for same in of.values()])
    assert len(values.round(decimals=9).unique()) == len(of)  # and on both


def test_axial_is_that_of_qwen2_vl():
    x, tokens = torch.randn(1, 15, 3, 8), Tokens.pictures([[(3, 5)]])
    theirs = Qwen2VLVisionRotaryEmbedding(Qwen2VLVisionConfig(embed_dim=24, num_heads=3))
    want, _ = apply_rotary_pos_emb_vision(x[0], x[0], *theirs(x, tokens.coords[0]))
    by = AxialRoPEConfig().rotation(tokens, 8, torch.float32)
    torch.testing.assert_close(rotate(x, by)[0], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_centred_is_that_of_dinov3(grid):
    theirs = DINOv3ViTRopePositionEmbedding(DINOv3ViTConfig(hidden_size=24, num_attention_heads=3, patch_size=4)).eval()
    cos, sin = theirs(torch.zeros(1, 3, 4 * grid[0], 4 * grid[1]))
    x = torch.randn(1, 3, 2 + grid[0] * grid[1], 8)
    want, _ = apply_rotary_pos_emb(x, x, cos, sin)
    by = CentredRoPEConfig().rotation(Tokens.pictures([[grid]], prefix=2), 8, torch.float32)
    torch.testing.assert_close(rotate(x.transpose(1, 2), by).transpose(1, 2), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("config", BOTH, ids=lambda config: config.tag())
def test_side_by_side_is_as_alone_and_what_has_no_place_is_not_turned(config):
    rows = Tokens.pictures([GRIDS, [(2, 3)]], 50, prefix=1)
    by = config.rotation(rows, 8, torch.float64)
    parts = by.cos[0].split([1 + h * w for h, w in GRIDS] + [8])
    for grid, part in zip(GRIDS, parts[:-1], strict=True):
        alone = config.rotation(Tokens.pictures([[grid]], prefix=1), 8, torch.float64).cos[0]
        assert torch.equal(part, alone)
        assert part[0].eq(1).all()
        assert not part[1:].eq(1).all()
    assert by.cos.isfinite().all()
    assert by.sin.isfinite().all()
    assert config.rotation(Tokens.pictures([[]]), 8, torch.float32).cos.shape[1] == 0


def test_a_picture_of_more_patches_is_the_same_picture():
    """The middle of the middle patch of three is that of one, and of five."""
    by = [CentredRoPEConfig().rotation(Tokens.pictures([[(n, n)]]), 8, torch.float64).cos[0] for n in (1, 3, 5)]
    torch.testing.assert_close(by[0][0], by[1][4], rtol=0, atol=FLOAT64)
    torch.testing.assert_close(by[0][0], by[2][12], rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("config", BOTH, ids=lambda config: config.tag())
@torch.no_grad()
def test_a_model_reads_pictures_side_by_side_as_alone(config):
    attention = qkv.AttentionConfig(n_heads=2, mask=qkv.Full(), position=config)
    block = qkv.PreNormConfig(norm=qkv.LayerNormConfig(), sublayers=(attention, qkv.FFNConfig()))
    embed = qkv.PatchEmbedderConfig(patch=2, channels=1, prefix=2)
    model = qkv.TransformerConfig(d_model=16, embed=embed, blocks=block, final_norm=qkv.LayerNormConfig()).build()
    model = model.double().eval()
    x = torch.randn(1, sum(2 + h * w for h, w in GRIDS), 4, dtype=torch.float64)
    packed = model.encode(x, Tokens.pictures([GRIDS], prefix=2))[0]
    alone = [
        model.encode(part, Tokens.pictures([[grid]], prefix=2))[0]
        for part, grid in zip(x.split([2 + h * w for h, w in GRIDS], 1), GRIDS, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=FLOAT64)
    order = torch.randperm(x.shape[1])  # patches that change places together with their positions
    moved = model.encode(x[:, order], Tokens.pictures([GRIDS], prefix=2).reordered(order))[0]
    torch.testing.assert_close(moved, packed[:, order], rtol=0, atol=FLOAT64)


def test_what_does_not_fit_is_one_line():
    with pytest.raises(ConfigError, match=r"rows and columns and the tokens have 1 coordinate each; give Tokens\.pict"):
        AxialRoPEConfig().rotation(Tokens.full(1, 4), 8, torch.float32)
    with pytest.raises(ConfigError, match="as many pairs by row as by column and head_dim=6; make it a multiple of 4"):
        CentredRoPEConfig().width(6)
    assert BOTH[0].describe() != BOTH[1].replace(theta=BOTH[0].theta).describe()
    short = qkv.AttentionConfig.from_dict({"n_heads": 1, "mask": {"type": "Full"}, "position": {"theta": 5.0}})
    assert short.position == RoPEConfig(theta=5.0)  # without a type it is that of texts
