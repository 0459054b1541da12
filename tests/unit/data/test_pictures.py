"""Pictures: what is read of files, good and bad, corpora of them, and a classifier of pictures from end to end."""

import gzip
import json
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import qkv
from qkv.cli import main
from qkv.data.pictures import (
    IDXFilesConfig,
    PackagePicturesConfig,
    PictureFile,
    PictureFoldersConfig,
    PicturesConfig,
    PictureTablesConfig,
    read_picture,
)
from qkv.data.reads import Read, side_by_side, without_padding
from qkv.errors import ConfigError, FileError
from qkv.loading.encoder import patches_of
from qkv.ops.patches import unpatchify
from qkv.tokens import Layout
from qkv.training.recipe import RecipeConfig


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_a_picture_is_channels_rows_columns(tmp_path):
    pixels = noise(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.array_equal(read_picture(tmp_path / "x.png", channels=3), pixels.transpose(2, 0, 1))
    assert read_picture(tmp_path / "x.png", channels=1).shape == (1, 5, 7)
    assert read_picture(tmp_path / "x.png", channels=1, size=(4, 6)).shape == (1, 4, 6)


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    """pillow's own conversion cuts all above 255 off to white."""
    Image.fromarray(np.array([[0, 0x1234], [0x80FF, 0xFFFF]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png", channels=1)[0].tolist() == [[0, 0x12], [0x80, 0xFF]]


def test_what_is_transparent_is_white():
    picture = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    picture.putpixel((1, 0), (10, 20, 30, 255))
    assert read_picture(picture, channels=3)[:, 0].T.tolist() == [[255, 255, 255], [10, 20, 30]]


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(3, 5)).save(tmp_path / "x.png", exif=exif)
    assert read_picture(tmp_path / "x.png", channels=1).shape == (1, 5, 3)


def test_cmyk_and_animations(tmp_path):
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "x.jpg")
    red, green, blue = read_picture(tmp_path / "x.jpg", channels=3)[:, 0, 0]
    assert red < 30
    assert min(green, blue) > 200
    frames = [Image.new("L", (4, 4), value) for value in (50, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "x.gif", channels=1)[0, 0, 0] == 50


def test_bad_pictures_are_one_line(tmp_path, monkeypatch):
    Image.fromarray(noise(64, 64)).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(tmp_path / "float.tiff")
    header = struct.pack(">IIBBBBB", 0, 5, 8, 0, 0, 0, 0)  # 0 x 5
    (tmp_path / "zero.png").write_bytes(data[:16] + header + data[29:])
    for name in ("cut.png", "text.png", "empty.png", "float.tiff", "zero.png"):
        with pytest.raises(FileError, match=rf"{name}: cannot be read as a picture \(.+\)"):
            read_picture(tmp_path / name, channels=1)
    with pytest.raises(FileError, match="no such file"):
        read_picture(tmp_path / "none.png", channels=1)
    Image.fromarray(noise(64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # 64 x 64 is above it, and below twice as much
    with pytest.raises(FileError, match=r"bomb\.png: cannot be read as a picture \(.*decompression bomb"):
        read_picture(tmp_path / "bomb.png", channels=1)


def test_values_are_normalised_by_those_of_the_corpus():
    pictures = [noise(3, 4, 6, seed=i) // (i + 1) for i in range(3)]
    config = PicturesConfig.of(pictures)
    values = np.concatenate([x.reshape(3, -1) for x in pictures], 1) / 255
    np.testing.assert_allclose(config.mean, values.mean(1), atol=6e-5)
    np.testing.assert_allclose(config.std, values.std(1), atol=6e-5)
    assert (config.channels, config.size) == (3, (4, 6))
    back = unpatchify(config.patches(pictures[0], 2), (2, 3), 2)
    expected = (pictures[0] / 255 - values.mean(1)[:, None, None]) / values.std(1)[:, None, None]
    np.testing.assert_allclose(back, expected, atol=1e-3)
    assert PicturesConfig.of([noise(1, 4, 6), noise(1, 4, 8)]).size is None
    assert PicturesConfig.of([np.zeros((1, 2, 2), dtype=np.uint8)]).std == (1.0,)
    with pytest.raises(FileError, match="pictures have 1 and 3 channels"):
        PicturesConfig.of([noise(1, 4, 6), noise(3, 4, 6)])


def idx(pixels):
    return struct.pack(f">BBBB{pixels.ndim}I", 0, 0, 8, pixels.ndim, *pixels.shape) + pixels.tobytes()


def test_the_files_of_mnist(tmp_path):
    pixels, path = noise(5, 4, 6), tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(pixels)))
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.array([3, 1, 4, 1, 5], dtype=np.uint8))))
    items = list(IDXFilesConfig(path=str(path)).items())
    assert [item.label for item in items] == ["3", "1", "4", "1", "5"]
    assert np.array_equal(np.stack([item.item for item in items])[:, 0], pixels)
    labels.write_bytes(idx(np.zeros(4, dtype=np.uint8)))
    with pytest.raises(FileError, match="5 pictures, and 4 labels in train-labels-idx1"):
        list(IDXFilesConfig(path=str(path)).items())
    for data, message in (
        (idx(pixels)[:-1], "says 5 x 4 x 6 bytes and holds 119"),
        (idx(pixels[:0]), "says 0 x 4 x 6 bytes and holds 0"),
        (b"\0\0\x0d\3" + bytes(20), "is no IDX file of bytes with 3 axes"),
        (b"", "is no IDX file"),
    ):
        path.write_bytes(data)
        with pytest.raises(FileError, match=message):
            list(IDXFilesConfig(path=str(path)).items())
    with pytest.raises(FileError, match="has images-idx3 in it"):
        list(IDXFilesConfig(path=str(labels)).items())


def test_a_table_of_a_package(tmp_path, monkeypatch):
    import qkv.data.pictures as module

    table = [b"0,16,8,4,seven\n"]
    monkeypatch.setattr(module, "fetch", lambda *_: tmp_path)
    monkeypatch.setattr(module, "read_archive", lambda *_: [("a.csv.gz", gzip.compress(table[0]))])
    made = PackagePicturesConfig(name="x", version="1", sha256="0" * 64, file="*", size=(2, 2), white=16)
    (item,) = made.items()
    assert (item.item.tolist(), item.label) == ([[[0, 255], [127, 63]]], "seven")
    for row in (b"0,17,8,4,seven\n", b"0,1,8,seven\n", b"0,x,8,4,seven\n"):
        table[0] = row
        with pytest.raises(ConfigError, match="line 1: is no 2 x 2 whole numbers from 0 to 16"):
            list(made.items())


# --- a classifier -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise with a light upper or left half, of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(40):
        pixels = noise(4 + 2 * (i % 3), 6 - 2 * (i % 2), 3, seed=i) // 2
        label = ("upper", "left")[i % 2]
        half = pixels[: len(pixels) // 2] if label == "upper" else pixels[:, : pixels.shape[1] // 2]
        half += 120
        (folder / label).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


def vit(**changes):
    return qkv.preset("vit-small", **({"d_model": 16, "n_layers": 1, "n_heads": 2} | changes)).to_dict()


def recipe(folder, **changes):
    data = {"type": "ClassData", "source": {"type": "PictureFolders", "path": str(folder)}, "validation": 0.2}
    made = {"model": vit(), "data": data, "steps": 60, "context": 16, "batch_size": 8, "precision": "float32"}
    return made | {"optimizer": {"lr": 1e-2}, "evaluate_every": 60, "schedule": {"type": "WSD"}} | changes


def train(made, out, *more):
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(made))
    assert main(["train", str(path), "--out", str(out), *more]) == 0
    return out


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return train(recipe(folder), tmp_path_factory.mktemp("runs") / "run")


def test_pictures_of_unequal_size_are_learned_and_classified(run, folder, capsys):
    loaded = qkv.load(run)
    assert loaded.facts.pictures.size is None
    paths = [str(next((folder / label).iterdir())) for label in ("left", "upper")]
    assert [guesses[0].label for guesses in loaded.classify(paths)] == ["left", "upper"]
    with Image.open(paths[0]) as picture:
        assert loaded.classify(picture)[0] == loaded.classify(paths[0])[0]
    assert loaded.embed(paths).shape == (2, 16)
    assert main(["classify", str(run), *paths, "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == paths[0]
    assert lines[1].endswith("left")
    assert main(["classify", str(run), "nowhere.png"]) == 3
    assert "nowhere.png: no such file" in capsys.readouterr().err


def test_it_is_measured_on_what_was_held_out_and_on_others(run, folder, capsys):
    assert main(["eval", str(run)]) == 0
    assert "pictures" in capsys.readouterr().out
    assert main(["eval", str(run), str(folder), "--json"]) == 0
    assert '"pictures": 40' in capsys.readouterr().out


def test_a_batch_is_the_same_each_time_and_varies_by_epoch(folder):
    made = recipe(folder)
    made["data"]["augment"] = [{"type": "Shift", "pixels": 1}]
    config = RecipeConfig.from_dict(made)
    task = config.data.prepare()
    train, held_out = task.batches(config.resolved(task))
    assert torch.equal(train.batch(3, 0).inputs, train.batch(3, 0).inputs)
    plain = made | {"data": {**made["data"], "augment": []}}
    config = RecipeConfig.from_dict(plain)
    unvaried = config.data.prepare()
    others, same = unvaried.batches(config.resolved(unvaried))
    assert not torch.equal(train.batch(3, 0).inputs, others.batch(3, 0).inputs)
    assert torch.equal(held_out.batch(0, 0).inputs, same.batch(0, 0).inputs)
    assert task.fingerprint == unvaried.fingerprint


@pytest.mark.parametrize("prefix", [0, 2])
@torch.no_grad()
def test_items_of_equal_length_stand_in_a_row_each(prefix):
    """And others side by side, with the same outputs."""
    config = qkv.preset("vit-small", d_model=16, n_layers=1, n_heads=2, channels=1, n_classes=5)
    config = config.replace(embed=config.embed.replace(prefix=prefix))
    how = PicturesConfig(channels=1, mean=(0.5,), std=(0.5,))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 1, 4, 6), dtype=np.uint8)
    reads = [patches_of(picture, how, config.embed) for picture in pictures]
    n = 6 + prefix
    inputs, tokens = without_padding(reads)
    assert (inputs.shape, tokens.layout) == ((3, n, 4), Layout.FULL)
    model = config.build().eval()
    together = model(*side_by_side(reads))
    torch.testing.assert_close(model(inputs, tokens), together)
    uneven = [*reads[:2], reads[2]._replace(grid=(3, 2))]
    assert without_padding(uneven)[0].shape == (1, 3 * n, 4)


def test_texts_of_equal_length_stand_in_a_row_each():
    texts, tokens = without_padding([Read([1, 2], [0, 1]), Read([3, 4])])
    assert (texts.tolist(), tokens.kinds.tolist()) == ([[1, 2], [3, 4]], [[0, 1], [0, 0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 4}, "context=4 and the longest picture has 12 tokens; raise context"),
        ({"model": vit(patch=4)}, "does not fall into patches of 4"),
        (
            {"model": vit(channels=1)},
            "the pictures have 3 channels and model.embed.channels is 1",
        ),
        (
            {"model": vit() | {"embed": {"type": "TokenEmbedder"}}},
            "the data are pictures and model.embed is TokenEmbedder",
        ),
        ({"model": {"preset": "small"}}, "model.head is LMHead, which gives no classes"),
    ],
    ids=["context", "patch", "channels", "embed", "head"],
)
def test_a_model_that_does_not_fit_is_one_line(folder, changes, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **changes)))
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) in (2, 3)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_belongs_to_texts_or_pictures_alone(folder):
    made = recipe(folder)
    made["data"]["tokenizer"] = {"type": "CharacterTokenizer"}
    with pytest.raises(ConfigError, match="for texts and the source holds pictures"):
        RecipeConfig.from_dict(made)
    made["data"] |= {"source": {"type": "ClassFolders", "path": "x"}, "augment": [{"type": "Shift", "pixels": 1}]}
    with pytest.raises(ConfigError, match="for pictures and the source holds texts"):
        RecipeConfig.from_dict(made)


def test_a_corpus_too_large_for_memory_is_read_when_needed(folder, monkeypatch):
    """With the same batches and normalisation as where it is held."""
    import qkv.data.pictures as module

    config = RecipeConfig.from_dict(recipe(folder))
    task = config.data.prepare()
    monkeypatch.setattr(module, "MOST_HELD", 1000)
    items = [item.item for item in config.data.source.items()]
    assert {type(item) for item in items} == {PictureFile}
    lazy = config.data.prepare()
    assert lazy.reading.pictures == task.reading.pictures
    for a, b in zip(task.batches(config.resolved(task)), lazy.batches(config.resolved(lazy)), strict=True):
        assert torch.equal(a.batch(0, 0).inputs, b.batch(0, 0).inputs)
        assert torch.equal(a.batch(0, 0).tokens.coords, b.batch(0, 0).tokens.coords)
    assert lazy.fingerprint == config.data.prepare().fingerprint


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_of_a_picture_is_in_its_header(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.png"
    Image.fromarray(noise(3, 5)).save(path, exif=exif)
    file = PictureFile(path, "x", 3, None)
    assert file.shape == np.asarray(file).shape == read_picture(path, channels=3).shape
    for changes in ({"size": 6}, {"size": (4, 8), "crop": (2, 2)}, {"crop": (8, 4)}):
        model = PicturesConfig(channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, **changes)
        wanted = model.read(path)
        read = replace(file, model=model)
        assert read.shape == wanted.shape
        assert np.array_equal(np.asarray(read), wanted)
    assert PictureFile(path, "x", 1, (4, 6)).shape == np.asarray(PictureFile(path, "x", 1, (4, 6))).shape
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(FileError, match=r"x: cannot be read as a picture \(.+\)"):
        _ = PictureFile(path, "x", 3, None).shape


def test_tables_of_pictures(tmp_path, monkeypatch):
    """In the layout of the hub, with and without names of the classes."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    files = []
    for i in range(4):
        Image.fromarray(noise(4, 6, 3, seed=i)).save(tmp_path / f"{i}.png")
        files.append({"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": f"{i}.png"})
    table = arrow.table({"image": files, "label": [1, 0, 1, 0], "other": [0] * 4})
    path = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(table, path)
    items = list(PictureTablesConfig(path=str(tmp_path)).items())
    assert [item.label for item in items] == ["1", "0", "1", "0"]
    assert np.array_equal(items[2].item, noise(4, 6, 3, seed=2).transpose(2, 0, 1))
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), path)
    made = PictureTablesConfig(path=str(path), channels=1, size=(2, 2))
    assert [(item.item.shape, item.label) for item in made.items()][:2] == [((1, 2, 2), "dog"), ((1, 2, 2), "cat")]
    parquet.write_table(arrow.table({"image": [files[0], None], "label": [0, 1]}), path)
    with pytest.raises(FileError, match=r"parquet, row 2: 'image' holds no file of a picture"):
        list(made.items())
    with pytest.raises(
        FileError, match=r"has no columns 'picture' and 'label' to read \(.+\); set `field` and `label`"
    ):
        list(made.replace(field="picture").items())
    path.write_bytes(b"PAR1 is all that is right")
    with pytest.raises(FileError, match=r"parquet: has no columns"):
        list(made.items())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FileError, match=r'parquet files need pyarrow; pip install "qkv\[parquet\]"'):
        list(made.items())


def test_folders_without_pictures(tmp_path):
    with pytest.raises(FileError, match="holds no folders"):
        list(PictureFoldersConfig(path=str(tmp_path)).items())
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileError, match=r"has no \.bmp, .* file"):
        list(PictureFoldersConfig(path=str(tmp_path)).items())


def test_a_picture_in_numbers_is_resized_as_a_file_is(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (3, 14, 22), dtype=np.uint8)
    Image.fromarray(values.transpose(1, 2, 0)).save(tmp_path / "a.png")
    settings = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    for more in ({}, {"size": (8, 8)}, {"size": 10, "crop": (8, 8)}, {"size": (14, 22)}):
        pictures = PicturesConfig(**settings, **more)
        assert np.array_equal(pictures.resized(values), pictures.read(tmp_path / "a.png"))
