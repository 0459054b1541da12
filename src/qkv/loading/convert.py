"""Checkpoints from one layout to another."""

from pathlib import Path
from typing import Any, Final, Literal

import torch

from qkv.checkpoints.families.family import parts_of
from qkv.checkpoints.gguf import (
    HuggingFace,
    encode,
    family_for_gguf,
    file_type,
    from_huggingface,
    open_gguf,
    write_gguf,
)
from qkv.checkpoints.huggingface import save_model
from qkv.data.gguf_vocabulary import write_vocabulary
from qkv.errors import ConfigError
from qkv.loading.building import to_type
from qkv.loading.certificate import NAME, certificate
from qkv.loading.certificate import encode as encode_certificate
from qkv.loading.encoder import Encoder
from qkv.loading.layouts import load_as
from qkv.loading.names import find
from qkv.loading.reader import Reader
from qkv.loading.ready import Embeds, Ready
from qkv.loading.run import export_adapter
from qkv.loading.saved import write

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
    if target.suffix == ".gguf" and to != "gguf":
        raise ConfigError(
            f"{target} is the name of a GGUF file, and --to {to} writes a folder; take --to gguf, or another name"
        )
    if target.exists() and (not target.is_dir() or to == "gguf" or any(target.iterdir())):
        raise ConfigError(f"{target}: is there already, and nothing is overwritten; choose another place, or remove it")
    found = find(source)
    if to == "peft":
        export_adapter(found, target)
        return target
    if to == "gguf":
        _to_gguf(found, target, dtype)
        return target
    blocks = found.is_file() and open_gguf(found).has_blocks
    asked = DTYPES[dtype] if dtype else torch.float32 if blocks else None
    wide = torch.float32 if certify and asked is not None else asked
    ready = load_as(Ready if to == "qkv" else Embeds, found, dtype=wide)
    if to == "hf" and isinstance(ready, Encoder):
        ready = ready.in_units()
    files = dict[str, bytes]()
    if certify and isinstance(ready, Embeds):
        dtypes = [(p, p.dtype) for p in ready.model.parameters()]
        files[NAME] = encode_certificate(certificate(found, ready.model.float()))
        for p, kept in dtypes:
            p.data = p.data.to(kept)
    to_type(ready.model, asked)
    if to == "qkv":
        write(ready, target, files)
        return target
    assert ready.facts is not None
    facts = ready.facts
    sampling = {} if facts.sampling is None else facts.sampling.to_dict()
    drawn = {key: value for key, value in sampling.items() if value is not None and key not in ("type", "seed")}
    save_model(
        ready.model,
        target,
        files=ready.files() | files,
        labels=facts.labels,
        stop_ids=facts.stop_ids,
        begin_id=facts.begin_id,
        pad_id=facts.pad_id,
        sampling={"do_sample": False} if drawn.get("temperature") == 0 else drawn and {"do_sample": True} | drawn,
    )
    return target


def _to_gguf(source: Path, target: Path, dtype: str | None) -> None:
    opened = open_gguf(source) if source.is_file() else None
    kept = {} if opened is None else {k: v for k, v in opened.metadata.items() if k.startswith("tokenizer.")}
    if opened is not None and dtype is None:
        metadata, tensors = from_huggingface(opened.huggingface, source=str(source))
        names = ("general.name", "general.file_type")
        kept |= {key: opened.metadata[key] for key in names if key in opened.metadata}
        write_gguf(target, metadata | kept, tensors)
        return
    loaded = load_as(Reader, source, dtype=None if dtype is None else DTYPES.get(dtype, torch.float32))
    family = family_for_gguf(loaded.config, str(source))
    state = family.keys(loaded.config).to_theirs({k: v.detach() for k, v in loaded.model.state_dict().items()})
    metadata, tensors = from_huggingface(HuggingFace(family.write(loaded.config), state, {}), source=str(source))
    kind = KINDS[dtype] if dtype is not None else max(tensors.values(), key=lambda tensor: tensor.data.nbytes).kind
    write_gguf(
        target, metadata | file_type(kind) | (_words(loaded, source) if opened is None else kept), encode(tensors, kind)
    )


def _words(loaded: Reader, source: Path) -> dict[str, Any]:
    """The vocabulary as metadata."""
    if loaded.tokenizer is None:
        raise ConfigError(f"{source}: has no tokenizer, and a GGUF file without one is of no use; put one there")
    size = parts_of(loaded.config).embed.vocab_size or 0
    made = write_vocabulary(loaded.tokenizer, begin_id=loaded.facts.begin_id, size=size)
    made["tokenizer.ggml.add_bos_token"] = loaded.facts.begins
    if loaded.tokenizer.chat_template is not None:
        made["tokenizer.chat_template"] = loaded.tokenizer.chat_template
    return made
