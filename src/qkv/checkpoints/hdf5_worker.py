"""A script that `keras_transly` runs: `hdf5_worker.py MODEL.h5 FOLDER` writes what is in the one into the other.

It runs in a process of its own, since HDF5's library does not end on some damaged files, and cannot be stopped from
inside. It imports nothing of qkv, so that it starts at once.
"""

import contextlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_CONFIG = 1 << 20  # bytes
MEMORY = 1 << 30  # bytes beyond those of the file
SECONDS = 3  # of computing


def limit(size: int) -> None:
    """Bound what this process may use for a file of `size` bytes."""
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY + size, MEMORY + size))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def convert(source: Path, folder: Path) -> None:
    """Write `config.json`, and the arrays as `weights.safetensors`, named by their paths."""
    import h5py

    size = source.stat().st_size
    with h5py.File(source, "r") as file:
        text: Any = file.attrs["model_config"]
        data = text.encode() if isinstance(text, str) else bytes(text)
        if len(data) > MAX_CONFIG:
            raise ValueError(f"its config has {len(data)} bytes")
        arrays = {name: array(item, size) for name, item in datasets(h5py, file["model_weights"], "")}
    header, end = dict[str, Any](), 0
    for name, values in arrays.items():
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [begin, end]}
    if end > size:
        raise ValueError("its arrays are larger than the file")
    head = json.dumps(header).encode()
    with (folder / "weights.safetensors").open("wb") as out:
        out.writelines([struct.pack("<Q", len(head)), head, *(values.tobytes() for values in arrays.values())])
    (folder / "config.json").write_bytes(data)


def datasets(h5py: Any, group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All arrays below a group with their paths; links out of the file are refused."""
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{path}{name} is a link")
        item = group[name]
        if isinstance(item, h5py.Dataset):
            yield path + name, item
        elif path.count("/") < 6:
            yield from datasets(h5py, item, f"{path}{name}/")


def array(data: Any, size: int) -> Any:
    """A float array that lies in the file as it is: nothing compressed, nothing elsewhere."""
    if data.is_virtual or data.external or data.chunks or data.dtype.str != "<f4" or data.nbytes > size:
        raise ValueError(f"{data.name} is not plain float32 within the file")
    return data[()]


if __name__ == "__main__":
    try:
        limit(Path(sys.argv[1]).stat().st_size)
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:
        sys.exit(" ".join(str(error).split())[:150] or type(error).__name__)
