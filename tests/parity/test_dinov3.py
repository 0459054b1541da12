"""DINOv3, in and out: tiny random models of `transformers` are read by qkv, written, and read again there."""

import json

import pytest
import torch
import transformers

import qkv
from qkv.checkpoints.families import FAMILIES, family_of
from qkv.checkpoints.huggingface import load_model, save_model
from qkv.errors import ConfigError, FileError
from qkv.loading.certificate import read_certificate
from qkv.loading.convert import convert
from qkv.nn.positions import AxialRoPEConfig
from tolerances import HF_FLOAT32_INSIDE

PATCH = 4
SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "patch_size": PATCH,
    "layer_norm_eps": 1e-3, "num_register_tokens": 2, "layerscale_value": 0.3,
}  # fmt: skip
CASES = {
    "plain": {},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu", "rope_theta": 30.0},
    "no registers, all biases": {"num_register_tokens": 0, "key_bias": True, "num_channels": 1},
    "values alone have a bias": {"query_bias": False},
    "no biases": {"query_bias": False, "value_bias": False, "proj_bias": False, "mlp_bias": False},
}
GRIDS = [(3, 3), (2, 5), (4, 1), (5, 7)]


def theirs(case):
    """Their model in float64, with wide weights."""
    torch.manual_seed(0)
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES | CASES[case])).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.4).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


def picture(grid, channels):
    generator = torch.Generator().manual_seed(sum(grid))
    return torch.randn(channels, grid[0] * PATCH, grid[1] * PATCH, generator=generator, dtype=torch.float64)


@torch.no_grad()
def streams(model):
    return [model(picture(grid, model.config.num_channels)[None]).last_hidden_state[0] for grid in GRIDS]


@pytest.mark.parametrize("case", CASES)
def test_in_and_out(case, tmp_path):
    """Pictures of several sizes are read side by side, and are what they are alone."""
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    loaded = qkv.load(tmp_path / "theirs")
    pictures = [picture(grid, model.config.num_channels) for grid in GRIDS]
    wanted = streams(model)
    # angles are computed in float32 there
    for found, want in zip(loaded.embed(pictures, pool=None), wanted, strict=True):
        torch.testing.assert_close(found, want.float(), rtol=0, atol=HF_FLOAT32_INSIDE)
    save_model(loaded.model, tmp_path / "ours")
    again, info = transformers.DINOv3ViTModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float64
    )
    assert (set(info["missing_keys"]), set(info["unexpected_keys"])) == (set(), set())
    state = again.eval().state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state.pop(key), value) or key == "embeddings.mask_token"  # which is for training alone
    assert not any(value.any() for value in state.values())  # biases that were not there
    for found, want in zip(streams(again), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=HF_FLOAT32_INSIDE)
    assert load_model(tmp_path / "ours").config == loaded.config
    assert FAMILIES["dinov3_vit"] is family_of(loaded.config)


def test_a_certificate(tmp_path):
    theirs("plain").float().save_pretrained(tmp_path / "theirs")
    told = read_certificate(convert(tmp_path / "theirs", tmp_path / "ours", to="hf"))
    assert max(*told["largest_difference"]["layers"], told["largest_difference"]["logits"]) < 1e-4
    assert told["inputs"]["tokens"] == 1 + 2 + 24


PUBLISHED = {  # what their configs say that differs from the defaults of the family
    "dinov3-s16": {"num_register_tokens": 4},
    "dinov3-b16": {
        "num_register_tokens": 4, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    },
    "dinov3-l16": {
        "num_register_tokens": 4, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096,
        "num_hidden_layers": 24,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name):
    config = transformers.DINOv3ViTConfig(**PUBLISHED[name])
    ours = FAMILIES["dinov3_vit"].parse(config.to_dict(), "config.json")
    made = qkv.preset(name, channels=3)
    assert FAMILIES["dinov3_vit"].parse(family_of(made).write(made), "config.json") == ours
    with torch.device("meta"):
        more = sum(p.numel() for p in transformers.DINOv3ViTModel(config).parameters())
        more -= sum(p.numel() for p in made.build().parameters())
    assert more == made.d_model * (1 - made.depth)  # the mask token is theirs, a bias of the keys ours
    assert qkv.preset(name, n_classes=7).head.n_classes == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query_bias": False},
            "'query_bias' is False, and 2 of 2 layers have such a bias; use the config",
        ),
        ({"key_bias": True}, "'key_bias' is True, and 0 of 2 layers have such a bias"),
        ({"architectures": ["DINOv3ViTBackbone"]}, "names 'DINOv3ViTBackbone'; qkv knows DINOv3ViTModel"),
        ({"num_register_tokens": 3}, r"needs \[\(1, 1, 24\), \(1, 3, 24\), \(1, 1, 24\)\]|has shape \(1, 2, 24\)"),
        ({"window": 3}, "'window' is not known to qkv"),
        ({"patch_size": [4, 2]}, "patches of 4 x 2 pixels; qkv reads square ones"),
        ({"num_attention_heads": 4}, "as many pairs by row as by column and head_dim=6; make it a multiple of 4"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_is_not_implemented_is_refused(changes, message, tmp_path):
    theirs("plain").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(FileError, match=message):
        load_model(tmp_path)


def test_what_the_family_does_not_have_is_not_written():
    made = FAMILIES["dinov3_vit"].parse(transformers.DINOv3ViTConfig(**SIZES).to_dict(), "config.json")
    block = made.blocks.pattern
    turned = block.replace(sublayers=(block.sublayers[0].replace(position=AxialRoPEConfig()), block.sublayers[1]))
    for config, message in (
        (made.replace(blocks=made.blocks.replace(pattern=turned)), "are not attention with CentredRoPE"),
        (made.replace(embed=made.embed.replace(prefix=0)), "none of patches with a class token"),
        (made.replace(head=qkv.ClassHeadConfig(n_classes=3)), "head is ClassHead, and this family has none"),
        (made.replace(blocks=made.blocks.replace(pattern=block.replace(layer_scale=None))), "layer_scale|must be"),
    ):
        with pytest.raises(ConfigError, match=f"dinov3_vit cannot express this model: .*({message})"):
            family_of(config, "dinov3_vit")
