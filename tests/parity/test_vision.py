"""Models of pictures, in and out: tiny random models of `transformers` are read by qkv, written, and read again there.

Pictures are of the trained size and of others, alone and side by side.
"""

import json

import pytest
import torch
import transformers

import qkv
from qkv.checkpoints.families import FAMILIES, family_of
from qkv.checkpoints.huggingface import load_model, save_model
from qkv.cli import main
from qkv.data.reads import Read, side_by_side, without_padding
from qkv.errors import ConfigError, FileError
from qkv.loading.certificate import read_certificate
from qkv.loading.convert import convert
from qkv.nn.positions import SinusoidalGridConfig
from qkv.ops.patches import patchify
from tolerances import FLOAT64, HF_FLOAT32_INSIDE

PATCH, NATIVE = 4, (3, 3)
SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 3 * PATCH, "patch_size": PATCH,
    "num_labels": 3, "layer_norm_eps": 1e-3,
}  # fmt: skip
VIT = SIZES | {"intermediate_size": 41}
DINO = SIZES | {"mlp_ratio": 2, "layerscale_value": 0.3}
CASES = {
    "ViTModel": ("vit", VIT),
    "ViTForImageClassification": ("vit", VIT | {"qkv_bias": False, "num_channels": 1}),
    "DeiTModel": ("deit", VIT),
    "DeiTForImageClassification": ("deit", VIT),
    "DeiTForImageClassificationWithTeacher": ("deit", VIT),
    "Dinov2Model": ("dinov2", DINO),
    "Dinov2ForImageClassification": ("dinov2", DINO | {"use_mask_token": False}),
    "Dinov2ForImageClassification, gated": ("dinov2", DINO | {"use_swiglu_ffn": True}),
    "Dinov2WithRegistersModel": ("dinov2_with_registers", DINO | {"num_register_tokens": 2, "use_swiglu_ffn": True}),
    "Dinov2WithRegistersForImageClassification": ("dinov2_with_registers", DINO | {"num_register_tokens": 3}),
}
GRIDS = [NATIVE, (2, 5), (4, 1), (5, 5)]
"""Rows and columns of patches; of pictures of other sizes than the trained one."""


def theirs(case):
    """Their model in float64, with wide weights."""
    kind, settings = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, case.partition(",")[0])(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.4).add_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
    return model


def picture(grid, channels=3):
    generator = torch.Generator().manual_seed(sum(grid))
    sides = grid[0] * PATCH, grid[1] * PATCH
    return torch.randn(channels, *sides, generator=generator, dtype=torch.float64)


@torch.no_grad()
def their_outputs(model, grid):
    """The stream behind the final norm (T, width), and the head's output; of a model without head its class token."""
    resizes = {} if model.config.model_type.startswith("dinov2") else {"interpolate_pos_encoding": True}
    inner = getattr(model, model.base_model_prefix, model)
    seen = []
    hook = inner.layernorm.register_forward_hook(lambda _, __, out: seen.append(out))
    out = model(picture(grid, model.config.num_channels)[None], **resizes)
    hook.remove()
    head = out.get("logits", out.get("pooler_output"))
    return seen[0][0], head[0]


def read(grid, ours):
    patches = patchify(picture(grid, ours.config.embed.channels), PATCH)
    n = ours.config.embed.prefix
    return Read(torch.nn.functional.pad(patches, (0, 0, n, 0)), grid=grid, prefix=n)


@torch.no_grad()
def our_outputs(ours, grids):
    """The same of several, side by side."""
    inputs, tokens = side_by_side([read(grid, ours) for grid in grids])
    stream, _ = ours.encode(inputs, tokens)
    streams = stream[0].split([ours.config.embed.prefix + h * w for h, w in grids])
    heads = ours.readout(stream, tokens) if ours.head is not None else torch.stack([x[0] for x in streams])
    return list(zip(streams, heads, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_in_and_out(case, tmp_path):
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    wanted = [their_outputs(model, grid) for grid in GRIDS]
    for found, want, grid in zip(our_outputs(ours, GRIDS), wanted, GRIDS, strict=True):
        # DINOv2 resizes in float32
        allowed = HF_FLOAT32_INSIDE if case.startswith("Dino") and grid != NATIVE else FLOAT64
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=allowed)
    assert ours.config.mask_ahead is not None  # so that `qkv.load` does not take it for a language model

    save_model(ours, tmp_path / "ours")
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float64)
    assert (set(info["missing_keys"]), set(info["unexpected_keys"])) == (set(), set())
    for grid, want in zip(GRIDS, wanted, strict=True):
        for a, b in zip(their_outputs(again.eval(), grid), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64 if "Teacher" in case else 0)
    assert load_model(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("case", ["DeiTForImageClassificationWithTeacher", "Dinov2WithRegistersForImageClassification"])
@torch.no_grad()
def test_packed_pictures_are_the_pictures_alone(case, tmp_path):
    """And a batch of equal ones is one of each."""
    model = theirs(case)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    alone = [our_outputs(ours, [grid])[0] for grid in GRIDS]
    for found, want in zip(our_outputs(ours, GRIDS), alone, strict=True):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)
    inputs, tokens = without_padding([read(NATIVE, ours)] * 2)
    assert inputs.shape[0] == 2
    torch.testing.assert_close(ours(inputs, tokens)[1], alone[0][1], rtol=0, atol=FLOAT64)


def test_the_vector_of_a_picture_is_its_class_token(tmp_path):
    """And of all its tokens those of `transformers`, of pictures of several sizes at once."""
    model = theirs("Dinov2WithRegistersModel").float()
    model.save_pretrained(tmp_path)
    loaded, pictures = qkv.load(tmp_path), [picture(grid).float() for grid in GRIDS]
    with torch.no_grad():
        want = [model(each[None]) for each in pictures]
    torch.testing.assert_close(loaded.embed(pictures), torch.cat([x.pooler_output for x in want]), rtol=0, atol=1e-5)
    for found, each in zip(loaded.embed(pictures, pool=None), want, strict=True):
        torch.testing.assert_close(found, each.last_hidden_state[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["ViTModel", "DeiTForImageClassificationWithTeacher", "Dinov2Model"])
def test_a_certificate(case, tmp_path, monkeypatch, capsys):
    """It compares with `transformers`, and sees a fault."""
    from qkv.loading import certificate

    theirs(case).float().save_pretrained(tmp_path / "theirs")
    told = read_certificate(convert(tmp_path / "theirs", tmp_path / "ours", to="hf"))
    assert told["inputs"]["tokens"] == 9 + (2 if case.startswith("DeiT") else 1)
    assert max(*told["largest_difference"]["layers"], told["largest_difference"]["logits"]) < 1e-4
    assert main(["show", str(tmp_path / "ours")]) == 0
    assert "against transformers" in capsys.readouterr().out
    honest = certificate._our_stream
    monkeypatch.setattr(certificate, "_our_stream", lambda model, picture: honest(model, picture.flip(3)))
    told = read_certificate(convert(tmp_path / "theirs", tmp_path / "qkv", to="qkv"))
    assert told["largest_difference"]["logits"] > 0.01


def test_a_model_without_pooler_has_no_head(tmp_path):
    model = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.head is None


def test_pictures_that_are_not_square_are_known_by_both_sides(tmp_path):
    model = transformers.ViTModel(transformers.ViTConfig(**VIT | {"image_size": (2 * PATCH, 3 * PATCH)})).eval()
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    want = model(picture((2, 3)).float()[None]).last_hidden_state
    torch.testing.assert_close(our_outputs(ours.double(), [(2, 3)])[0][0].float(), want[0], rtol=0, atol=1e-5)
    save_model(ours, tmp_path / "ours")
    assert load_model(tmp_path / "ours").config == ours.config


def test_the_names_of_classes_travel(tmp_path):
    model = theirs("ViTForImageClassification")
    model.config.id2label = {0: "cat", 1: "dog", 2: "cow"}
    model.save_pretrained(tmp_path / "theirs")
    loaded = qkv.load(tmp_path / "theirs")
    assert loaded.facts.labels == ("cat", "dog", "cow")
    save_model(loaded.model, tmp_path / "ours", labels=loaded.facts.labels)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["id2label"] == {
        "0": "cat",
        "1": "dog",
        "2": "cow",
    }


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("ViTModel", {"architectures": ["ViTForMaskedImageModeling"]}, "names 'ViTForMaskedImageModeling'; qkv knows"),
        ("ViTModel", {"patch_size": [4, 2]}, "patches of 4 x 2 pixels; qkv reads square ones"),
        ("ViTModel", {"image_size": "big"}, "'image_size' is 'big' and must be a number of pixels, or two"),
        (
            "ViTModel",
            {"image_size": 20},
            r"position_embeddings' has shape \(1, 10, 24\), the model needs \(1, 26, 24\)",
        ),
        ("ViTModel", {"pooler_output_size": 7}, "'pooler_output_size' is 7, which qkv does not implement"),
        ("Dinov2Model", {"window": 3}, "'window' is not known to qkv"),
    ],
)
def test_what_is_not_implemented_is_refused(case, changes, message, tmp_path):
    theirs(case).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(FileError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("vit", {"prefix": 2}, "embed.prefix is 2, and there it could only be 1"),
        ("vit", {"position": SinusoidalGridConfig()}, "its embedder is none of patches with a learned grid"),
        ("deit", {}, "embed.prefix is 1, and there it could only be 2"),
        ("dinov2", {}, "sublayers|layer_scale"),
    ],
)
def test_what_a_family_does_not_have_is_not_written(family, change, message):
    made = FAMILIES["vit"].parse(transformers.ViTConfig(**VIT).to_dict(), "config.json")
    config = made.replace(embed=made.embed.replace(**change))
    with pytest.raises(ConfigError, match=f"{family} cannot express this model: .*({message})"):
        family_of(config, family)


PUBLISHED = {  # what the configs of the published models say that differs from the defaults of their family
    "deit-ti16": ("deit", {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}),
    "deit-s16": ("deit", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}),
    "deit-b16": ("deit", {}),
    "dinov2-s14": ("dinov2", {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}),
    "dinov2-b14": ("dinov2", {"image_size": 518}),
    "dinov2-l14": (
        "dinov2", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518}
    ),
    "dinov2-s14, registers=4": (
        "dinov2_with_registers",
        {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14},
    ),
}  # fmt: skip
STEMS = {"deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name):
    """With a classifier of a thousand classes: the parameters of theirs, and no mask token, or second row of places."""
    kind, said = PUBLISHED[name]
    config = transformers.AutoConfig.for_model(kind, num_labels=1000, **said)
    stem = f"{STEMS[kind]}ForImageClassification{'WithTeacher' if kind == 'deit' else ''}"
    ours = FAMILIES[kind].parse(config.to_dict() | {"architectures": [stem]}, "config.json")
    preset, _, registers = name.partition(", registers=")
    changes = {"registers": int(registers)} if registers else {}
    made = qkv.preset(preset, channels=3, n_classes=1000, **changes)
    family = family_of(made)
    assert family.name == kind
    assert FAMILIES[kind].parse(family.write(made), "config.json") == ours
    with torch.device("meta"):
        model = getattr(transformers, stem)(config)
        more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in made.build().parameters())
    d = made.d_model
    places = 2 if kind == "deit" else 1
    teacher = 1000 if kind == "deit" else 0  # the biases of both classifiers are one of ours
    assert more == places * d + teacher + (0 if kind == "deit" else d)


def test_stochastic_depth_of_a_preset_rises_in_a_line():
    config = qkv.preset("deit-ti16", channels=3, n_classes=10, n_layers=3, drop_path=0.1)
    assert [block.drop_path for block in config.blocks] == [0.0, 0.05, 0.1]
    assert family_of(config).name == "deit"
