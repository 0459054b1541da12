"""Image processors: what qkv makes of a picture by a folder's file is what `transformers` makes of it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import qkv
from qkv.cli import main
from qkv.data.pictures import PicturesConfig
from qkv.errors import ConfigError, FileError
from qkv.loading.encoder import Encoder
from qkv.loading.processor import FILE, read_processor, write_processor
from qkv.ops.patches import unpatchify

NORMALISED = 2e-6
"""Values up to 3 in float32, of which each side rounds three times in its own order."""

SMALL = {"size": {"height": 14, "width": 18}}
CASES = {
    "ViT": (ViTImageProcessorPil, SMALL),
    "ViT, sides of one number": (ViTImageProcessorPil, {"size": 14}),
    "ViT, not resized": (ViTImageProcessorPil, {"do_resize": False}),
    "ViT, nearest": (ViTImageProcessorPil, SMALL | {"resample": 0}),
    "ViT, lanczos": (ViTImageProcessorPil, SMALL | {"resample": 1}),
    "ViT, not normalised": (ViTImageProcessorPil, SMALL | {"do_normalize": False}),
    "ViT, rescaled by another factor": (ViTImageProcessorPil, SMALL | {"rescale_factor": 1 / 127.5}),
    "ViT, not rescaled": (ViTImageProcessorPil, SMALL | {"do_rescale": False, "image_mean": 127.0, "image_std": 60.0}),
    "DeiT": (DeiTImageProcessorPil, {"size": 16, "crop_size": 13}),
    "Bit": (BitImageProcessorPil, {"size": {"shortest_edge": 17}, "crop_size": {"height": 14, "width": 12}}),
    "Bit, a crop beyond the picture": (BitImageProcessorPil, {"size": {"shortest_edge": 7}, "crop_size": 12}),
    "Bit, cropped only": (BitImageProcessorPil, {"do_resize": False, "crop_size": 20}),
    "CLIP": (CLIPImageProcessorPil, {"size": 15, "crop_size": 15}),
    "Siglip": (SiglipImageProcessorPil, SMALL),
    "Siglip, the shorter side": (SiglipImageProcessorPil, {"size": 15}),
}


def drawn(mode, width, height):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if bands == 1 else pixels, mode=None)


PICTURES = {
    "colour": drawn("RGB", 23, 21), "grey": drawn("L", 19, 25), "tall": drawn("RGB", 9, 41),
    "wide": drawn("RGB", 43, 8), "clear": drawn("RGBA", 17, 15),
}  # fmt: skip


def folder_of(tmp_path, data, model_type="vit"):
    (tmp_path / FILE).write_text(json.dumps(data))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return tmp_path


def pixels(config: PicturesConfig, picture):
    values = config.read(picture)
    return unpatchify(config.patches(values, 1), values.shape[1:], 1)


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_transformers(case, tmp_path):
    kind, said = CASES[case]
    theirs = kind(**said, do_convert_rgb=True)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    config = read_processor(tmp_path, 3)
    (tmp_path / FILE).write_bytes(write_processor(config))
    assert read_processor(tmp_path, 3) == config
    again = BitImageProcessorPil.from_pretrained(tmp_path)
    for name, picture in PICTURES.items():
        ours = pixels(config, picture)
        for processor in (theirs, again):
            (expected,) = processor(picture, return_tensors="pt").pixel_values
            atol = NORMALISED * max(1.0, expected.abs().max().item() / 3)
            torch.testing.assert_close(ours, expected, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_dinov3_does_not_round_what_it_resizes(tmp_path):
    """Its class needs torchvision, which does this to floats."""
    config = read_processor(folder_of(tmp_path, {"image_processor_type": "DINOv3ViTImageProcessorFast"} | SMALL), 3)
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))
    for picture in (PICTURES["colour"], PICTURES["wide"]):
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
        expected = (F.interpolate(x, (14, 18), mode="bilinear", antialias=True)[0] - mean) / std
        # 1e-5: pillow's sums and torch's differ in order; rounding to 8 bits would be off by up to 9e-3
        torch.testing.assert_close(pixels(config, picture), expected, rtol=0, atol=1e-5)
    (tmp_path / FILE).write_bytes(write_processor(config))
    assert read_processor(tmp_path, 3) == config
    raw = np.asarray(PICTURES["colour"]).transpose(2, 0, 1)
    trained = config.resized(raw)  # what varies pictures in training takes bytes
    assert trained.dtype == np.uint8
    assert np.abs(trained - config.read(PICTURES["colour"])).max() < 1.1  # each axis is rounded


@pytest.mark.parametrize("most", [9, 12, 40])
def test_siglip2_reads_pictures_in_their_shape(most, tmp_path):
    """As many patches as there may be: its processor gives these, pixel by pixel, and then padding."""
    theirs = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=most, do_convert_rgb=True)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    config = read_processor(tmp_path, 3)
    (tmp_path / FILE).write_bytes(write_processor(config))
    assert read_processor(tmp_path, 3) == config
    for picture in PICTURES.values():
        made = theirs(picture, return_tensors="pt")
        grid = tuple(made.spatial_shapes[0].tolist())
        ours = config.patches(config.read(picture), 4)
        assert config.read(picture).shape == (3, 4 * grid[0], 4 * grid[1])
        expected = made.pixel_values[0, : len(ours)].view(-1, 16, 3).transpose(1, 2).flatten(1)  # channels last there
        torch.testing.assert_close(ours, expected, rtol=0, atol=NORMALISED)


def test_grey_models_read_grey(tmp_path):
    theirs = ViTImageProcessorPil(**SMALL, image_mean=[0.4], image_std=[0.3])
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    config = read_processor(tmp_path, 1)
    (expected,) = theirs(PICTURES["grey"], return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels(config, PICTURES["grey"]), expected, rtol=0, atol=NORMALISED)


def test_what_a_file_leaves_out_is_as_its_processor_has_it(tmp_path):
    known = {"vit": ViTImageProcessorPil, "deit": DeiTImageProcessorPil, "dinov2": BitImageProcessorPil,
             "clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}  # fmt: skip
    for model_type, processor in known.items():
        kind = processor.__name__.removesuffix("ImageProcessorPil")
        bare = read_processor(folder_of(tmp_path, {"image_processor_type": f"{kind}ImageProcessor"}), 3)
        older = read_processor(folder_of(tmp_path, {"feature_extractor_type": f"{kind}FeatureExtractor"}), 3)
        unnamed = read_processor(folder_of(tmp_path, {}, model_type), 3)
        processor().save_pretrained(tmp_path)
        assert bare == older == unnamed == read_processor(tmp_path, 3)


def test_a_model_of_texts_and_pictures_has_it_among_others(tmp_path):
    data = {"image_processor": {"image_processor_type": "SiglipImageProcessor"} | SMALL, "processor_class": "x"}
    folder_of(tmp_path, {}).joinpath(FILE).rename(tmp_path / "processor_config.json")
    (tmp_path / "processor_config.json").write_text(json.dumps(data))
    assert read_processor(tmp_path, 3).size == (14, 18)
    (tmp_path / "processor_config.json").unlink()
    assert read_processor(tmp_path, 3) is None


VIT = {"image_processor_type": "ViTImageProcessor"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"image_processor_type": "Siglip2ImageProcessor", "size": {"height": 8, "width": 8}},
            "'size' is .*, which qkv does not implement",
        ),
        ({}, "'image_processor_type' is 'ImageProcessor'; qkv knows ViTImageProcessor, "),
        ({"image_processor_type": "BeitImageProcessor"}, "is 'BeitImageProcessor'; qkv knows"),
        (VIT | {"crop_pct": 0.9}, "'crop_pct' is not known to qkv"),
        (VIT | {"do_pad": True}, "'do_pad' is True, which qkv does not implement"),
        (VIT | {"do_resize": 1}, "'do_resize' is 1 and must be of type bool"),
        (VIT | {"data_format": "channels_last"}, "'data_format' is 'channels_last'"),
        (VIT | {"resample": 6}, "'resample' is 6; pillow has 0 to 5"),
        (
            VIT | {"size": {"shortest_edge": 7, "longest_edge": 9}},
            "'size' says {'shortest_edge': 7, .*}, and qkv reads",
        ),
        (VIT | {"size": {"height": 7}}, "'size' says {'height': 7}"),
        (VIT | {"size": 10**9}, "'size' says 1000000000, .* from 1 to 16384"),
        (VIT | {"size": "big"}, "'size' says 'big'"),
        (VIT | {"crop_size": {"shortest_edge": 7}}, "'crop_size' is of one side"),
        (VIT | {"image_mean": [0.5]}, "'image_mean' is .* a number for each of 3 channels"),
        (VIT | {"image_mean": [True] * 3}, "'image_mean' is .* a number for each of 3 channels"),
        (VIT | {"image_std": [1, 0, 1]}, "no std 0"),
        (VIT | {"image_std": [10**400] * 3}, "'image_std' is"),
        (VIT | {"rescale_factor": 0}, "'rescale_factor' is 0.0 and must be above 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join([*value][-1:]),
)
def test_what_is_not_understood_is_refused(data, message, tmp_path):
    with pytest.raises(FileError, match=message):
        read_processor(folder_of(tmp_path, data, "x"), 3)


def test_a_long_picture_is_no_bomb():
    config = PicturesConfig(channels=1, size=224, mean=(0.5,), std=(0.5,))
    with pytest.raises(FileError, match="it would have 224 x 22400000 pixels, more than"):
        config.read(Image.new("L", (1, 100_000)))


@pytest.fixture(scope="module")
def encoder():
    config = qkv.preset("vit-small", d_model=16, n_layers=1, n_heads=2, patch=4, channels=3, n_classes=5)
    config = config.replace(embed=config.embed.replace(prefix=2))
    pictures = PicturesConfig(channels=3, size=(8, 12), resample="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
    return Encoder(config.build().eval(), None, qkv.loading.facts.Facts(pictures=pictures))


def test_paths_pictures_and_values_are_read(encoder, tmp_path):
    picture = PICTURES["colour"]
    picture.save(tmp_path / "x.png")
    values = pixels(encoder.facts.pictures, picture)
    expected = encoder.embed(values)
    assert expected.shape == (1, 16)
    for one in (str(tmp_path / "x.png"), tmp_path / "x.png", picture, [picture], values[None], [values]):
        assert torch.equal(encoder.embed(one), expected)
        assert len(encoder.classify(one)) == 1
    (stream,) = encoder.embed(picture, pool=None)
    assert stream.shape == (2 + 6, 16)
    larger = torch.randn(3, 12, 8)
    both = encoder.embed([larger, picture])  # sizes may differ, and kinds, too
    torch.testing.assert_close(both[1], expected[0])
    torch.testing.assert_close(both[:1], encoder.embed(larger))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(1, 8, 8), r"a picture is \(1, 8, 8\) in torch.float32 and must be \(3, height, width\) of floats"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "in torch.uint8 and must be"),
        (torch.zeros(3, 8, 9), "8 x 9 .* does not fall into patches of 4"),
        (torch.zeros(3, 0, 8), "0 x 8 .* does not fall into patches of 4"),
    ],
    ids=["channels", "whole", "patches", "empty"],
)
def test_values_that_do_not_fit_are_one_line(values, message, encoder):
    with pytest.raises(ConfigError, match=message):
        encoder.embed([values])


def test_without_a_file_pictures_are_not_guessed(encoder):
    unknown = Encoder(encoder.model, None, qkv.loading.facts.Facts())
    with pytest.raises(ConfigError, match=r"put preprocessor_config\.json into its folder, or give values"):
        unknown.embed(PICTURES["colour"])
    assert unknown.embed(torch.zeros(3, 8, 8)).shape == (1, 16)


def test_the_file_is_written_beside_the_weights(encoder, tmp_path):
    qkv.save(encoder, tmp_path / "out")
    again = qkv.load(tmp_path / "out")
    assert again.facts == encoder.facts
    (tmp_path / "out" / "config.json").write_text("{}")
    assert read_processor(tmp_path / "out", 3) == encoder.facts.pictures
    assert transformers.ViTImageProcessorPil.from_pretrained(tmp_path / "out").size["width"] == 12


@torch.no_grad()
def test_a_folder_of_transformers_classifies_files(tmp_path, capsys):
    """Model and processor are theirs; so is what `qkv convert` makes of them."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    names = {0: "cat", 1: "dog", 2: "cow"}
    config = transformers.ViTConfig(**sizes, image_size=12, patch_size=4, initializer_range=0.5, id2label=names)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    processor = ViTImageProcessorPil(size=12, image_mean=[0.4, 0.5, 0.6])
    for part in (model, processor):
        part.save_pretrained(tmp_path / "theirs")
    PICTURES["wide"].save(tmp_path / "x.png")
    path = str(tmp_path / "x.png")
    wanted = model(**processor(PICTURES["wide"], return_tensors="pt")).logits[0].softmax(-1)
    found = {guess.label: guess.probability for guess in qkv.load(tmp_path / "theirs").classify(path)[0]}
    torch.testing.assert_close(torch.tensor([found[name] for name in names.values()]), wanted, rtol=0, atol=1e-5)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "hf", "--no-certificate"]) == 0
    again = ViTImageProcessorPil.from_pretrained(tmp_path / "ours")
    assert (again.size["height"], again.image_mean) == (12, (0.4, 0.5, 0.6))
    assert main(["classify", str(tmp_path / "ours"), path, "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(names[int(wanted.argmax())])
