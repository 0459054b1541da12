"""Models as ONNX before onnxruntime: the logits are ours, for batches and lengths other than that of the export.

`pip install -e '.[judge]'` brings both; without it these tests are skipped.
"""

import pytest
import torch

import qkv
from tolerances import FLOAT32

pytest.importorskip("onnxscript", reason="the exporter of PyTorch needs it; pip install -e '.[judge]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[judge]'")

HEADS = {"d_model": 32, "n_heads": 2, "vocab_size": 65}
LLAMA = HEADS | {"n_layers": 2, "n_kv_heads": 1, "d_ff": 48}
MODELS = {
    "gpt2": HEADS | {"n_layers": 2, "context": 64},
    "mistral-7b": LLAMA | {"mask": qkv.Causal() & qkv.Window(size=6)},
    "gemma2-2b": HEADS | {"n_rounds": 1, "n_kv_heads": 1, "head_dim": 16, "d_ff": 48},  # its soft-cap is no SDPA
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_ours(name, tmp_path):
    torch.manual_seed(0)
    model = qkv.preset(name, **MODELS[name]).build().eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids = torch.randint(65, (2, 16))
    torch.onnx.export(model, (ids,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((2, 16), (3, 21), (1, 5)):
        ids = torch.randint(65, shape)
        (got,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(ids), rtol=0, atol=FLOAT32)
