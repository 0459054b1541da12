"""Models of vectors: trained, measured, and forecasting, in Python and on the command line."""

import numpy as np
import pytest
import torch

import qkv
from qkv.cli import main
from qkv.errors import ConfigError, FileError
from qkv.loading.loaded import Loaded
from qkv.masks import Full
from qkv.tasks import Asked
from qkv.training import evaluate_model, train
from qkv.yaml_files import dump_yaml
from runs import fast, metrics, recipe_data, write_corpus, write_vectors  # noqa: F401 - `fast` is a fixture
from tiny import FEATURES, tiny_config, tiny_model
from tolerances import FLOAT32

pytestmark = pytest.mark.usefixtures("fast")


def test_the_users_own_vectors(tmp_path):
    """Training lowers the loss of the next vector far below that of predicting zeros (1/2, for waves)."""
    data = recipe_data(write_corpus(tmp_path)) | {"model": tiny_config(vectors=True).to_dict()}
    data["data"] = {"source": {"type": "VectorFiles", "path": str(write_vectors(tmp_path))}, "validation": 0.2}
    (tmp_path / "vectors.yaml").write_text(dump_yaml(data))
    assert train(tmp_path / "vectors.yaml", out=tmp_path / "run") == 0
    found = metrics(tmp_path / "run")
    losses = [entry["loss"] for entry in found if "loss" in entry]
    assert losses[-1] < 0.1 < 0.4 < losses[0]
    assert found[-1]["validation_loss"] < 0.1
    assert "bits_per_byte" not in found[-1]
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    # What it held out is what was evaluated at the end; other series are measured alike.
    held_out = evaluate_model(Asked(path=tmp_path / "run")).to_dict()
    everything = evaluate_model(Asked(path=tmp_path / "run", data=tmp_path / "waves.npy")).to_dict()
    assert held_out["loss"] == pytest.approx(found[-1]["validation_loss"])
    assert everything["loss"] < 0.1
    assert everything["tokens"] == 299 > 4 * held_out["tokens"]
    with pytest.raises(FileError, match=r"corpus\.txt: not a readable \.npy array"):
        evaluate_model(Asked(path=tmp_path / "run", data=tmp_path / "corpus.txt"))
    with pytest.raises(ConfigError, match="--conversations and --field are for language models; leave them out"):
        evaluate_model(Asked(path=tmp_path / "run", data=tmp_path / "waves.npy", field="x"))
    np.save(tmp_path / "wide.npy", np.zeros((9, 2)))
    with pytest.raises(ConfigError, match=f"the vectors have 2 features and the model reads {FEATURES}; give its own"):
        evaluate_model(Asked(path=tmp_path / "run", data=tmp_path / "wide.npy"))
    check_forecasts(tmp_path)


def check_forecasts(folder):
    """Of the run: step by step what the model expects, which is near what comes, in Python and on the command line."""
    loaded = qkv.load(folder / "run")
    series = np.load(folder / "waves.npy").reshape(2, 150, FEATURES)
    seen, coming = series[:, :10], series[:, 10:14]
    found = loaded.forecast(seen, steps=4)
    want = torch.tensor(seen)
    with torch.no_grad():
        for _ in range(4):  # without a cache
            want = torch.cat([want, loaded.model(want)[:, -1:]], 1)
    torch.testing.assert_close(found, want[:, 10:], rtol=0, atol=FLOAT32)
    assert (found - torch.tensor(coming)).square().mean() < 0.1
    torch.testing.assert_close(loaded.forecast(seen[0].tolist(), steps=4), found[0], rtol=0, atol=FLOAT32)
    np.save(folder / "seen.npy", seen)
    options = ["--steps", "4", "--out", str(folder / "next.npy")]
    assert main(["forecast", str(folder / "run"), str(folder / "seen.npy"), *options]) == 0
    assert np.allclose(np.load(folder / "next.npy"), found.numpy(), atol=FLOAT32)
    assert main(["forecast", str(folder / "run"), str(folder / "corpus.txt"), *options]) == 3
    for out in ("seen.npy", "next.txt"):  # what is read, and what NumPy does not write
        before = (folder / "seen.npy").read_bytes()
        words = ["forecast", str(folder / "run"), str(folder / "seen.npy"), "--steps", "1", "--out", str(folder / out)]
        assert main(words) == 2
        assert (folder / "seen.npy").read_bytes() == before
    assert main(["generate", str(folder / "run"), "x"]) == 2


@pytest.mark.parametrize(
    ("shape", "steps", "message"),
    [
        ((4, FEATURES), 0, "there are 4 vectors and steps=0 to come; both must be at least 1"),
        ((0, FEATURES), 2, "there are 0 vectors and steps=2 to come; both must be at least 1"),
        ((15, FEATURES), 3, "15 vectors and steps=3 are 17 to read and the context is 16; give the last 14 or fewer"),
        (
            (4, 2),
            2,
            f"the vectors have 2 features and model.embed.n_features is {FEATURES}",
        ),
        ((4,), 2, r"the values are \(4,\); give \(T, features\) or \(N, T, features\)"),
    ],
)
def test_forecasts_that_cannot_be(shape, steps, message):
    loaded = Loaded(tiny_model(torch.float32, config=tiny_config(vectors=True).replace(context=16)))
    assert loaded.forecast(np.ones((14, FEATURES)), steps=3).shape == (3, FEATURES)
    with pytest.raises(ConfigError, match=message):
        loaded.forecast(np.ones(shape), steps=steps)


def test_models_that_forecast_nothing():
    ones = np.ones((4, FEATURES))
    with pytest.raises(ConfigError, match="the model reads no vectors and has nothing to forecast"):
        Loaded(tiny_model(torch.float32)).forecast(ones, steps=2)
    with pytest.raises(ConfigError, match="the mask Full lets a vector see what comes after it"):
        Loaded(tiny_model(torch.float32, vectors=True, mask=Full())).forecast(ones, steps=2)
    two = tiny_config(vectors=True).replace(head=qkv.VectorHeadConfig(n_out=2))
    with pytest.raises(ConfigError, match=f"the model puts out 2 numbers for vectors of {FEATURES}, which is no"):
        Loaded(tiny_model(torch.float32, config=two)).forecast(ones, steps=2)
    vectors = Loaded(tiny_model(torch.float32, vectors=True))
    for wrong, message in ((ones * np.nan, "a value that is not finite"), ([["a"]], "the values are no array of numb")):
        with pytest.raises(ConfigError, match=message):
            vectors.forecast(wrong, steps=2)
    with pytest.raises(ConfigError, match="the model reads vectors and writes no text; use forecast"):
        vectors.generate("x")
