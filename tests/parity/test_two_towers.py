"""SigLIP, SigLIP 2 (NaFlex) and CLIP, in and out: tiny random models of `transformers`, vectors and logits of both."""

import json

import pytest
import torch
import transformers

import qkv
from qkv.checkpoints.huggingface import load_model, save_model
from qkv.errors import FileError
from qkv.loading.certificate import read_certificate
from qkv.loading.convert import convert
from qkv.models.two_towers import Captioned, embedded
from qkv.ops.patches import patchify
from qkv.tokens import Tokens
from tolerances import FLOAT64

SIZES = {"hidden_size": 24, "intermediate_size": 41, "num_hidden_layers": 2, "num_attention_heads": 3,
         "layer_norm_eps": 1e-3}  # fmt: skip
TEXT = SIZES | {"vocab_size": 31, "max_position_embeddings": 9}
PICTURE = SIZES | {"hidden_size": 30, "image_size": 12, "patch_size": 4, "num_channels": 3}
CASES = {
    "siglip": {"text_config": TEXT | {"projection_size": 30}, "vision_config": PICTURE},
    "siglip2": {"text_config": TEXT | {"projection_size": 30}, "vision_config": PICTURE | {"num_patches": 9}},
    "clip": {"text_config": TEXT | {"eos_token_id": 30}, "vision_config": PICTURE, "projection_dim": 17},
    "clip, the highest id ends": {
        "text_config": TEXT | {"eos_token_id": 2}, "vision_config": PICTURE, "projection_dim": 17
    },
}  # fmt: skip
CASES["siglip2"]["vision_config"].pop("image_size")
GRIDS = [(2, 4), (3, 3), (1, 2)]
ENDS = [9, 4, 6]  # of the texts of CLIP, behind which others fill up


def theirs(case):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.partition(",")[0], **CASES[case])
    stem = {"siglip": "Siglip", "siglip2": "Siglip2", "clip": "CLIP"}[case.partition(",")[0]]
    model = getattr(transformers, f"{stem}Model")(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


def texts(case):
    ids = torch.randint(3, 30, (3, 9), generator=torch.Generator().manual_seed(1))
    if case.startswith("clip"):
        for row, end in zip(ids, ENDS, strict=True):
            row[end - 1 :] = 30
    return ids


def pictures(case):
    grids = GRIDS if case == "siglip2" else [(3, 3)] * 3
    torch.manual_seed(2)
    return [torch.randn(3, 4 * h, 4 * w, dtype=torch.float64) for h, w in grids], grids


@torch.no_grad()
def their_outputs(model, case):
    seen, grids = pictures(case)
    if case == "siglip2":  # patches pixel by pixel, filled up
        values = torch.zeros(3, 9, 48, dtype=torch.float64)
        mask = torch.zeros(3, 9, dtype=torch.long)
        for i, x in enumerate(seen):
            flat = x.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 3, 4, 0).reshape(-1, 48)
            values[i, : len(flat)], mask[i, : len(flat)] = flat, 1
        out = model(texts(case), values, pixel_attention_mask=mask, spatial_shapes=torch.tensor(grids))
    else:
        out = model(texts(case), torch.stack(seen))
    return out.text_embeds, out.image_embeds, out.logits_per_image


@torch.no_grad()
def our_outputs(model, case):
    seen, grids = pictures(case)
    prefix = model.config.picture.embed.prefix
    patches = [torch.nn.functional.pad(patchify(x, 4), (0, 0, prefix, 0)) for x in seen]
    tokens = Tokens.padded(ENDS, 9) if case.startswith("clip") else Tokens.full(3, 9)
    inputs = Captioned(texts(case), tokens, torch.cat(patches)[None])
    places = Tokens.pictures([grids], prefix=prefix)
    text, picture = embedded(model.text, inputs.texts, tokens)[0], embedded(model.picture, inputs.pictures, places)[0]
    return text, picture, model(inputs, places)


@pytest.mark.parametrize("case", CASES)
def test_in_and_out(case, tmp_path):
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    wanted = their_outputs(model, case)
    allowed = 1e-6 if case == "siglip2" else FLOAT64  # its positions are resized in float32
    for mine, other in zip(our_outputs(ours, case), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=allowed, atol=allowed)
    save_model(ours, tmp_path / "ours")
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for mine, other in zip(their_outputs(again.eval(), case), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=FLOAT64)
    assert load_model(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("case", ["siglip", "siglip2", "clip"])
def test_a_certificate(case, tmp_path):
    model = theirs(case).float()
    model.save_pretrained(tmp_path / "theirs")
    made = read_certificate(convert(tmp_path / "theirs", tmp_path / "ours", to="hf"))
    assert len(made["largest_difference"]["layers"]) == 4  # two of each tower
    assert all(0 < x < 1e-4 for x in made["largest_difference"]["layers"])
    assert made["largest_difference"]["logits"] < 1e-4 < made["largest"]["logits"]
    assert isinstance(qkv.load(tmp_path / "ours"), qkv.Matcher)


def test_a_folder_is_used(tmp_path):
    model = theirs("siglip")
    model.save_pretrained(tmp_path)
    tokenizer = qkv.WordTokenizerConfig().train(["cat dog bird"])
    tokenizer.save(tmp_path)
    said = {"do_resize": True, "size": {"height": 12, "width": 12}, "image_processor_type": "SiglipImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    loaded = qkv.load(tmp_path)
    assert isinstance(loaded, qkv.Matcher)
    assert (loaded.facts.fill, loaded.facts.pad_id) == (9, 1)
    ids = torch.tensor([tokenizer.encode("cat dog") + [1] * 7])  # as it was trained, with what fills texts up
    with torch.no_grad():
        vector = model.get_text_features(ids).pooler_output
    torch.testing.assert_close(loaded.embed("cat dog", unit=False), vector.float(), rtol=1e-5, atol=1e-5)
    (guesses,) = loaded.classify([torch.zeros(3, 12, 12)], ["cat", "dog"])
    assert {guess.label for guess in guesses} == {"cat", "dog"}


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"vision_use_head": False}, "'vision_use_head' is False"),
        ("vision_config", {"patch_size": [4, 2]}, "patches of 4 x 2 pixels; qkv reads square ones"),
        ("text_config", {"snake": 1}, "text_config: 'snake' is not known to qkv"),
        ("text_config", {"hidden_act": "snake"}, "'hidden_act' is 'snake'"),
    ],
)
def test_what_is_not_implemented_is_refused(part, changes, message, tmp_path):
    theirs("siglip").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    data[part] |= changes
    path.write_text(json.dumps(data))
    with pytest.raises(FileError, match=message):
        load_model(tmp_path)
