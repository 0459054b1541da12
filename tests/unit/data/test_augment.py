"""What varies pictures in training: the same for the same seed, of the same size, and as its source defines it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import qkv
from qkv.data.augment import (
    CutMixConfig,
    Examples,
    HorizontalFlipConfig,
    MixupConfig,
    RandAugmentConfig,
    RandomAffineConfig,
    RandomErasingConfig,
    RandomResizedCropConfig,
    ShiftConfig,
    _operation,
    _random_box,
)
from qkv.data.labelled import LabelledBatches
from qkv.data.reads import Read
from qkv.errors import ConfigError
from qkv.tokens import Tokens

OF_EACH = [
    ShiftConfig(pixels=2),
    HorizontalFlipConfig(),
    RandomResizedCropConfig(),
    RandomErasingConfig(chance=1.0),
    RandomAffineConfig(degrees=20, scale=(0.8, 1.2)),
    RandAugmentConfig(n=3, magnitude=20),
]
MIXES = [MixupConfig(alpha=1.0), CutMixConfig()]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def generators(n, seed=0):
    return [np.random.default_rng([seed, i]) for i in range(n)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [*OF_EACH, *MIXES], ids=lambda x: x.tag())
def test_others_of_the_same_size_and_the_same_for_the_same_seed(augment, channels):
    before = Examples([noise(channels, 12, 9, seed=i) for i in range(8)], np.eye(8, dtype=np.float32))
    a, b, c = (augment.apply(before, generators(8, seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(x, y) for x, y in zip(a.pictures, b.pictures, strict=True))
    assert np.array_equal(a.targets, b.targets)
    for others in (before, c):
        assert any(not np.array_equal(x, y) for x, y in zip(a.pictures, others.pictures, strict=True))
    assert {(each.shape, each.dtype) for each in a.pictures} == {((channels, 12, 9), np.dtype(np.uint8))}
    assert np.array_equal(before.pictures[3], noise(channels, 12, 9, seed=3)), "what it was given is as it was"


def test_a_shift_moves_a_picture_by_so_many_pixels_and_no_more():
    picture = np.zeros((1, 5, 5), dtype=np.uint8)
    picture[0, 2, 2] = 9
    moved = {
        tuple(np.argwhere(ShiftConfig(pixels=1).vary(picture, np.random.default_rng(i))[0] == 9)[0].tolist())
        for i in range(100)
    }
    assert moved == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}


def test_a_flip_turns_left_to_right_as_often_as_it_says():
    picture, generator = noise(1, 2, 3), np.random.default_rng(0)
    made = [HorizontalFlipConfig(chance=0.3).vary(picture, generator) for _ in range(400)]
    assert 90 < sum(np.array_equal(x, picture[:, :, ::-1]) for x in made) < 150
    assert all(np.array_equal(x, picture) or np.array_equal(x, picture[:, :, ::-1]) for x in made)


def test_a_part_has_a_share_of_the_area_and_a_ratio_within_the_spans():
    generator = np.random.default_rng(0)
    boxes = [_random_box(200, 300, (0.2, 0.5), (0.5, 2.0), generator) for _ in range(300)]
    y, x, h, w = np.array([box for box in boxes if box]).T
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (y + h <= 200).all()
    assert (x + w <= 300).all()
    shares, ratios = h * w / 60_000, w / h
    assert 0.195 < shares.min() < 0.25
    assert 0.4 < shares.max() < 0.505
    assert 0.49 < ratios.min() < 0.7
    assert 1.4 < ratios.max() < 2.02
    assert _random_box(10, 10, (1.0, 1.0), (4.0, 4.0), generator) is None


def test_a_crop_that_fits_nowhere_takes_the_middle():
    """Of four columns for each row: all of a row of 8 pixels, and so two rows."""
    picture = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None] * 30, (1, 8, 8))
    crop = RandomResizedCropConfig(scale=(1.0, 1.0), ratio=(4.0, 4.0)).vary(picture, np.random.default_rng(0))
    wanted = Image.fromarray(picture[0]).resize((8, 8), Image.Resampling.BICUBIC, (0, 3, 8, 5))
    assert np.array_equal(crop[0], np.asarray(wanted))


def test_a_turn_is_around_the_middle():
    """A quarter turn and all that is bigger or smaller keeps the middle where it is."""
    picture = np.zeros((1, 9, 9), dtype=np.uint8)
    picture[0, 3:6, 3:6] = 240
    for seed in range(20):
        made = RandomAffineConfig(degrees=90, scale=(0.7, 1.4)).vary(picture, np.random.default_rng(seed))
        y, x = np.indices((9, 9))
        assert abs((made[0] * y).sum() / made.sum() - 4) < 0.2
        assert abs((made[0] * x).sum() / made.sum() - 4) < 0.2
    larger = RandomAffineConfig(degrees=1e-6, scale=(2.0, 2.0)).vary(picture, np.random.default_rng(0))
    assert larger.sum() / picture.sum() == pytest.approx(4, rel=0.05)


def test_operations_of_rand_augment_at_their_largest():
    """Of the table of torchvision's RandAugment."""
    values = np.array([[0, 100, 127, 128, 255] * 4] * 20, dtype=np.uint8)
    image = Image.fromarray(values)

    def made(name, share=1.0, sign=1):
        return np.asarray(_operation(image, name, share, sign)).astype(int)

    assert (made("solarize") == 255 - values).all()
    assert (made("solarize", 0.5) == np.where(values < 128, values, 255 - values)).all()
    assert (made("posterize") == values & 0xF0).all()
    assert (made("posterize", 9 / 30) == values & 0xFE).all()
    assert abs(made("Brightness", sign=-1) - values * 0.1).max() <= 1
    assert abs(made("Brightness") - np.minimum(values * 1.9, 255)).max() <= 1
    moved = int(150 / 331 * 20)
    assert (made("translate_x")[:, moved:] == values[:, : 20 - moved]).all()
    assert (made("translate_y", sign=-1)[: 20 - moved] == values[moved:]).all()
    assert (made("translate_y", sign=-1)[20 - moved :] == 0).all()
    assert (made("shear_x")[0] == values[0]).all()
    assert (made("shear_x")[10, :17] == values[10, 3:]).all()
    assert (made("rotate") == np.asarray(image.rotate(30))).all()
    assert (made("identity") == values).all()
    still = ("Brightness", "Color", "Contrast", "Sharpness", "posterize", "translate_x", "shear_y", "rotate")
    for name in still:
        assert (made(name, share=0.0) == values).all(), name


def test_mixed_pictures_have_the_shares_of_both():
    pictures = [np.full((3, 10, 10), 40 * i, dtype=np.uint8) for i in range(6)]
    for mix in MIXES:
        made = mix.apply(Examples(pictures, np.eye(6, dtype=np.float32)), generators(6))
        np.testing.assert_allclose(made.targets.sum(1), 1, rtol=1e-6)
        assert (np.count_nonzero(made.targets, axis=1) == 2).sum() >= 4
        for picture, shares in zip(made.pictures, made.targets, strict=True):
            assert picture.mean() == pytest.approx(40 * shares @ np.arange(6), abs=0.5)
        partners = made.targets.copy()
        np.fill_diagonal(partners, 0)
        assert (partners > 0).any(0).sum() >= 4, "each is the partner of one"
    assert len(np.unique(made.pictures[0])) <= 2, "CutMix has pixels of one or of the other"


def test_only_pictures_of_one_size_are_mixed_and_as_often_as_it_says():
    pictures = [noise(1, 4, 4), noise(1, 4, 6), noise(1, 4, 4, seed=1)]
    made = MixupConfig(alpha=1.0).apply(Examples(pictures, np.eye(3, dtype=np.float32)), generators(3))
    assert made.targets[1].tolist() == [0, 1, 0]
    assert np.array_equal(made.pictures[1], pictures[1])
    assert made.targets[0, 2] > 0
    many = Examples([noise(1, 2, 2)] * 200, np.eye(200, dtype=np.float32))
    mixed = np.count_nonzero(MixupConfig(alpha=1.0, chance=0.25).apply(many, generators(200)).targets, axis=1) == 2
    assert 30 < mixed.sum() < 70


def test_shares_are_targets_of_a_head_of_classes():
    model = qkv.preset("vit-small", d_model=8, n_layers=1, n_heads=2, channels=1, n_classes=3).build().eval()
    inputs, tokens = torch.randn(4, 6, 4), Tokens.pictures([[(2, 3)]] * 4)
    labels = torch.tensor([0, 2, 1, 1])
    plain, _ = model.loss(inputs, labels, tokens, scale=0.5)
    shares = F.one_hot(labels, 3).float()
    torch.testing.assert_close(model.loss(inputs, shares, tokens, scale=0.5)[0], plain)
    mixed, others = 0.75 * shares + 0.25 * shares.roll(1, 0), model.loss(inputs, labels.roll(1), tokens, scale=0.5)[0]
    torch.testing.assert_close(model.loss(inputs, mixed, tokens, scale=0.5)[0], 0.75 * plain + 0.25 * others)
    assert model.head.count(mixed, tokens) == 4
    with pytest.raises(ConfigError, match=r"targets are \(4, 2\) and the outputs \(4, 3\)"):
        model.loss(inputs, mixed[:, :2], tokens)


@pytest.mark.parametrize("mixes", [False, True])
def test_a_batch_varies_by_epoch_and_item_alone(mixes):
    pictures = [noise(1, 4, 4, seed=i) for i in range(10)]
    augment = (ShiftConfig(pixels=1), *MIXES) if mixes else (ShiftConfig(pixels=1),)

    def made(augment=augment, **changes):
        settings = {"context": 4, "batch_size": 5, "seed": 0, "shuffle": True, "n_classes": 3} | changes
        read = lambda x: Read(torch.from_numpy(x.reshape(4, 4).copy()).float(), grid=(2, 2))  # noqa: E731
        return LabelledBatches(pictures, torch.arange(10) % 3, read, augment=augment, **settings)

    a, b = made().batch(3, 1), made().batch(3, 1)
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.targets, b.targets)
    assert (a.targets.shape, a.targets.is_floating_point()) == (((5, 3), True) if mixes else ((5,), False))
    unvaried = made(augment=()).batch(3, 1)
    assert unvaried.targets.shape == (5,)
    assert not torch.equal(unvaried.inputs, a.inputs)
    if not mixes:
        assert torch.equal(unvaried.targets, a.targets)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RandomResizedCropConfig(scale=(0.5, 0.2)),
            "scale goes from 0.5 to 0.2; give the smaller number",
        ),
        (lambda: RandomErasingConfig(ratio=(2.0, 1.0)), "ratio goes from 2.0 to 1.0"),
        (lambda: RandomResizedCropConfig(scale=(0.5, 1.5)), "scale goes up to 1.5, and a part is at most the whole"),
        (lambda: RandomAffineConfig(degrees=1, scale=(2.0, 1.0)), "scale goes from 2.0 to 1.0"),
        (lambda: RandAugmentConfig(magnitude=31), "magnitude=31 must be from 0 to 30"),
        (lambda: MixupConfig(chance=0.0), "chance=0.0 must be above 0 and at most 1"),
    ],
    ids=["scale", "ratio", "whole", "affine", "magnitude", "chance"],
)
def test_bad_settings_are_one_line(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
