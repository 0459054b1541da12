"""Checkpoints from one layout to another."""

import copy
import tempfile
from pathlib import Path
from typing import Any, Final, Literal

import torch

from qkv.api import MODEL, export_adapter, find, load_language_model, load_opened
from qkv.certificate import NAME, certificate
from qkv.certificate import encode as encode_certificate
from qkv.checkpoints import write_tensors
from qkv.checkpoints.families import family_of
from qkv.checkpoints.gguf import HuggingFace, Opened, encode, file_type, from_huggingface, open_gguf, write_gguf
from qkv.checkpoints.huggingface import save_model
from qkv.checkpoints.tensors import sync_folder
from qkv.config import dump_yaml
from qkv.data.gguf_vocabulary import write_vocabulary
from qkv.errors import ConfigError, FileError
from qkv.fetch import write_atomic
from qkv.loaded import Loaded

Layout = Literal["hf", "gguf", "qkv", "peft"]
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}
"""Types of weights, and what GGUF calls them."""


def convert(source: str | Path, target: Path, *, to: Layout, dtype: str | None = None, certify: bool = True) -> Path:
    """Write a model in another layout.

    Args:
        source: As for `qkv.load`.
        target: A folder (hf, qkv) or a file (gguf), which must not be there yet.
        to: `hf`: what `transformers` and the servers built on it load. `gguf`: one file, for llama.cpp. `qkv`: our own.
            `peft`: only the adapters of a run, for `peft` and vLLM.
        dtype: Of the weights: float32, bfloat16, float16; in GGUF also q8_0, q4_0, q4_1. None: that of the source;
            blocks of a GGUF file stay as they are in GGUF, and become float32 elsewhere. Adapters keep theirs.
        certify: Compare with `transformers`, where it is installed, and write `certificate.json` (hf, qkv).

    Returns:
        The target.

    Raises:
        ConfigError: The layout cannot express the model, or the dtype is none of these.
        FileError: The source cannot be read or has no adapters for `peft`, or the target cannot be written.
    """
    known = KINDS if to == "gguf" else DTYPES
    if dtype is not None and to == "peft":
        raise ConfigError(f"--dtype {dtype}: adapters keep their type; leave it out")
    if dtype is not None and dtype not in known:
        raise ConfigError(f"--dtype {dtype}: {to} takes {', '.join(known)}")
    if target.exists() and (not target.is_dir() or to == "gguf" or any(target.iterdir())):
        raise ConfigError(f"{target}: is there already; choose another place, or remove it")
    found = find(source)
    if to == "peft":
        export_adapter(found, target)
        return target
    opened = open_gguf(found) if found.is_file() else None
    if to == "gguf":
        _to_gguf(found, opened, target, dtype)
        return target
    asked = DTYPES[dtype] if dtype else torch.float32 if opened is not None and opened.has_blocks else None
    loaded = _load(found, opened, torch.float32 if certify and asked is not None else asked)
    files = {} if loaded.tokenizer is None else loaded.tokenizer.files()
    if certify:
        wide = all(p.dtype == torch.float32 for p in loaded.model.parameters())
        model = loaded.model if wide else copy.deepcopy(loaded.model).float()
        files[NAME] = encode_certificate(certificate(found, model))
        del model
    loaded.model.to(dtype=asked)
    if to == "hf":
        ids = {"stop_ids": loaded.stop_ids, "begin_id": loaded.begin_id}
        save_model(loaded.model, target, files=files, **ids)
    else:
        _to_qkv(loaded, target, files)
    return target


def _load(source: Path, opened: Opened | None, dtype: torch.dtype | None) -> Loaded:
    return load_language_model(source, dtype=dtype) if opened is None else load_opened(opened, dtype)


def _to_gguf(source: Path, opened: Opened | None, target: Path, dtype: str | None) -> None:
    if opened is None:
        loaded = load_language_model(source, dtype=None if dtype is None else DTYPES.get(dtype, torch.float32))
        words = _words(loaded, source)
    else:  # its vocabulary is carried over as it stands there
        words = {key: value for key, value in opened.metadata.items() if key.startswith("tokenizer.")}
        if dtype is None:
            metadata, tensors = from_huggingface(opened.huggingface, source=str(source))
            names = ("general.name", "general.file_type")
            kept = {key: opened.metadata[key] for key in names if key in opened.metadata}
            write_gguf(target, metadata | kept | words, tensors)
            return
        loaded = load_opened(opened, DTYPES.get(dtype, torch.float32))
    family = family_of(loaded.config)
    state = family.keys(loaded.config).to_theirs({k: v.detach() for k, v in loaded.model.state_dict().items()})
    metadata, tensors = from_huggingface(HuggingFace(family.write(loaded.config), state, {}), source=str(source))
    kind = KINDS[dtype] if dtype is not None else max(tensors.values(), key=lambda tensor: tensor.data.nbytes).kind
    write_gguf(target, metadata | file_type(kind) | words, encode(tensors, kind))


def _words(loaded: Loaded, source: Path) -> dict[str, Any]:
    """The vocabulary as metadata."""
    if loaded.tokenizer is None:
        raise ConfigError(f"{source}: has no tokenizer, and a GGUF file without one is of no use; put one there")
    made = write_vocabulary(loaded.tokenizer, begin_id=loaded.begin_id)
    made["tokenizer.ggml.add_bos_token"] = loaded.add_begin
    if loaded.tokenizer.chat_template is not None:
        made["tokenizer.chat_template"] = loaded.tokenizer.chat_template
    return made


def _to_qkv(loaded: Loaded, target: Path, files: dict[str, bytes]) -> None:
    text = {"model": loaded.config.to_dict(), "stop_ids": list(loaded.stop_ids), "begin_id": loaded.begin_id}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            partial = Path(folder) / "whole"
            partial.mkdir()
            write_tensors(partial / "model.safetensors", loaded.model.state_dict(), {"format": "pt"})
            for name, data in {MODEL: dump_yaml(text).encode(), **files}.items():
                write_atomic(partial / name, data)
            if target.exists():
                target.rmdir()
            sync_folder(partial)
            partial.replace(target)
            sync_folder(target.parent)
    except OSError as error:
        raise FileError(f"{target}: cannot be written ({error.strerror}); choose another place") from None
