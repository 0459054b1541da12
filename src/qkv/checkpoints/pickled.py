"""Foreign pickled weights (`pytorch_model.bin`): the only module that calls `torch.load`. Ours are never pickled."""

import warnings
import zipfile
from pathlib import Path

import torch

from qkv.checkpoints.files import brief, file_size, quote
from qkv.errors import FileError
from qkv.shapes import Tensor

_REMEDY = "convert it to safetensors where it was made"


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, memory-mapped and read with `weights_only`.

    Only the zip format (torch 1.6 and later) is read, and only a flat dict of tensors.

    Raises:
        FileError: The file is missing, damaged, compressed, or holds something else than tensors.
    """
    _check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of itself
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler runs over hostile bytes: any of a dozen types
        raise FileError(f"{path}: not readable as weights only ({brief(error)}); {_REMEDY}") from None
    if not isinstance(content, dict):
        raise FileError(f"{path}: holds a {type(content).__name__}, not a dict of tensors; {_REMEDY}")
    size = path.stat().st_size
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise FileError(f"{path}: entry {quote(name)} is not a named tensor; {_REMEDY}")
        if tensor.numel() * tensor.itemsize > size:  # strides of zero: small in the file, huge once copied
            raise FileError(f"{path}: tensor {quote(name)} is larger than the file of {size} bytes; {_REMEDY}")
    return content


def _check_zip(path: Path) -> None:
    file_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception as error:  # zipfile, too, has many types for damage
        raise FileError(f"{path}: not a zip file as torch.save writes since torch 1.6 ({error}); {_REMEDY}") from None
    if compressed:  # a small file could unpack to any size
        raise FileError(f"{path}: a compressed zip file, which torch.save never writes; {_REMEDY}")
