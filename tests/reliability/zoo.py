"""Hostile files: a table of some five hundred, each written by plain Python and nothing of qkv.

A case begins with a small model that loads, and does one thing to it. `python -m reliability.zoo` tries cases in forks
of one process; `test_zoo.py` says how, and what must come of them.
"""

import contextlib
import gc
import hashlib
import io
import json
import math
import os
import pickle
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PASSES, OPTION, FILE = 0, 2, 3  # exit codes; what passes is hostile and does no harm
GENERATE = ("generate", "{}", "a", "--max-new-tokens", "3")
CHAT = ("chat", "{}", "--max-new-tokens", "3")
SHOW = ("show", "{}")
CONVERT = ("convert", "{}", "{}-made", "--to", "hf", "--no-certificate")
GGUF = ("generate", "{}/x.gguf", "a", "--max-new-tokens", "3")
CANARY = "canary"  # whatever writes a file, writes one of this name


class Case(NamedTuple):
    """One hostile file or folder.

    Attributes:
        make: Writes it into an empty folder.
        says: A part of the one line that must come of it.
        command: What is done with it; `{}` stands for the folder.
        code: The exit code.
    """

    make: Callable[[Path], object]
    says: str = ""
    command: tuple[str, ...] = GENERATE
    code: int = FILE


# --- a model that loads, in each layout -----------------------------------------------------------------------------

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 7,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "eos_token_id": 6,
}  # fmt: skip
LAYER = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
         "self_attn.o_proj": (32, 32), "mlp.gate_proj": (32, 32), "mlp.up_proj": (32, 32), "mlp.down_proj": (32, 32),
         "input_layernorm": (32,), "post_attention_layernorm": (32,)}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (7, 32),
    "model.norm.weight": (32,),
    **{f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()},
}
VOCABULARY = {"<unk>": 0, "a": 1, "b": 2, "hi": 3, "c": 4, "d": 5, "</s>": 6}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 6, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": True}],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<unk>"},
}  # fmt: skip
SETTINGS = {"eos_token": "</s>", "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"}
ATTENTION = "{type: Attention, n_heads: 2, n_kv_heads: 1, mask: {type: Causal}, position: {type: RoPE}}"
MODEL = f"""model:
  d_model: 32
  embed: {{type: TokenEmbedder, vocab_size: 7}}
  blocks:
    type: Repeat
    n: 1
    pattern:
      type: PreNorm
      norm: {{type: RMSNorm, eps: 1.0e-05}}
      sublayers: [{ATTENTION}, {{type: GLU, d_ff: 32}}]
  final_norm: {{type: RMSNorm, eps: 1.0e-05}}
  head: {{type: LMHead, tied: true}}
  context: 64
stop_ids: [6]
begin_id: null
"""
OURS = {
    "embed.weight": (7, 32), "final_norm.weight": (32,), "blocks.0.norms.attention.weight": (32,),
    "blocks.0.norms.ffn.weight": (32,), "blocks.0.sublayers.attention.qkv_proj.weight": (64, 32),
    "blocks.0.sublayers.attention.o_proj.weight": (32, 32), "blocks.0.sublayers.ffn.gate_up_proj.weight": (64, 32),
    "blocks.0.sublayers.ffn.down_proj.weight": (32, 32),
}  # fmt: skip


def write(path, content):
    """Bytes, a text, or data as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)


def sparse(path, size=1 << 40):
    """A file that takes no room on the disk and would take all of the memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(size)


def numbers(count):
    """As many float32, none of them special."""
    return b"".join(struct.pack("<f", math.sin(i)) for i in range(count))


def entries(shapes):
    """A safetensors header, and the size of its data."""
    made, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * math.prod(shape)
        made[name], at = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}, end
    return made, at


def safetensors(header, data=b""):
    """A file with this header: data, or a text as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def weights(shapes):
    header, size = entries(shapes)
    return safetensors(header, numbers(size // 4))


def hugging_face(folder, *, config=None, tensors=None, tokenizer=None, settings=None, **files):
    """A Hugging Face folder, with one part replaced."""
    write(folder / "config.json", CONFIG if config is None else config)
    write(folder / "model.safetensors", weights(SHAPES) if tensors is None else tensors)
    write(folder / "tokenizer.json", TOKENIZER if tokenizer is None else tokenizer)
    write(folder / "tokenizer_config.json", SETTINGS if settings is None else settings)
    for name, content in files.items():
        write(folder / name.replace("__", "."), content)


def own(folder, model=MODEL, tensors=None):
    """A folder of our own."""
    hugging_face(folder, tensors=weights(OURS) if tensors is None else tensors)
    (folder / "config.json").unlink()
    write(folder / "model.yaml", model)


def run_folder(folder, recipe=None, state='{"step": 1}', manifest=None, tensors=None):
    """A run of `qkv train`."""
    hugging_face(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    write(folder / "recipe.yaml", MODEL.split("stop_ids")[0] if recipe is None else recipe)
    place = folder / "checkpoints" / "step-00000001"
    contents = {"state.json": state.encode(), "model.safetensors": weights(OURS) if tensors is None else tensors}
    files = {}
    for name, content in contents.items():
        write(place / name, content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    made = {"format": 1, "step": 1, "files": files}
    write(place / "manifest.json", made if manifest is None else manifest(made))


# --- safetensors ----------------------------------------------------------------------------------------------------


def tensors_of(change):
    """A folder whose header was changed in place by a function."""

    def make(folder):
        header, size = entries(SHAPES)
        change(header)
        hugging_face(folder, tensors=safetensors(header, numbers(size // 4)))

    return make


def raw(content):
    return lambda folder: hugging_face(folder, tensors=content)


def entry(**changes):
    """The header with other values for the first tensor."""
    return tensors_of(lambda header: header["model.embed_tokens.weight"].update(changes))


def renamed(name):
    return tensors_of(lambda header: header.update({name: header.pop("model.norm.weight")}))


def twice_in_header(folder):
    header, size = entries(SHAPES)
    text = json.dumps(header)
    first = json.dumps(header["model.embed_tokens.weight"])
    text = f'{{"model.embed_tokens.weight": {first}, ' + text[1:]
    hugging_face(folder, tensors=safetensors(text.encode(), numbers(size // 4)))


def huge_tensors(folder):
    hugging_face(folder)
    sparse(folder / "model.safetensors")


def pipe(name):
    def make(folder):
        hugging_face(folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def linked(name, target):
    def make(folder):
        hugging_face(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def million_tensors(folder):
    names = ",".join(f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(200_000))
    hugging_face(folder, tensors=safetensors(f"{{{names}}}".encode()))


GIVEN = "model.embed_tokens.weight"
WHOLE = weights(SHAPES)
SAFETENSORS = {
    "a key twice": Case(twice_in_header, "is given twice"),
    "a name that leaves the folder": Case(renamed(f"../../{CANARY}"), "must not look like a path"),
    "an absolute name": Case(renamed(f"/tmp/{CANARY}"), "must not look like a path"),
    "a name with a line end": Case(renamed("a\nTraceback (most recent call last)"), "printable characters"),
    "a name of 1 MB": Case(renamed("a" * 1_000_000), "a name has 1 to 500"),
    "an empty name": Case(renamed(""), "a name has 1 to 500"),
    "an overlap": Case(entry(data_offsets=[4, 900]), "overlap the tensor before|leave a hole"),
    "an overlap of all": Case(
        tensors_of(lambda header: [value.update(data_offsets=[0, 896], shape=[7, 32]) for value in header.values()]),
        "overlap the tensor before",
    ),
    "a hole": Case(tensors_of(lambda header: header.pop("model.norm.weight")), "leave a hole before"),
    "bytes behind the data": Case(raw(WHOLE + bytes(64)), "the data has"),
    "header length 2^64 - 1": Case(raw(b"\xff" * 8 + WHOLE[8:]), "header length 18446744073709551615"),
    "header length 2^40": Case(raw(struct.pack("<Q", 2**40) + WHOLE[8:]), "header length 1099511627776"),
    "header length 0": Case(raw(bytes(8)), "not valid JSON"),
    "an empty file": Case(raw(b""), "the file is empty"),
    "five bytes": Case(raw(b"\x01\0\0\0\0"), "does not fit"),
    "cut in the header": Case(raw(WHOLE[:100]), "does not fit"),
    "cut in the data": Case(raw(WHOLE[:-1]), "data_offsets end at"),
    "deep JSON": Case(raw(safetensors(b"[" * 100_000)), "not valid JSON"),
    "deep objects": Case(raw(safetensors(b'{"a":' * 60_000)), "not valid JSON"),
    "a list": Case(raw(safetensors([])), "not a JSON object"),
    "not UTF-8": Case(raw(safetensors(b"\xff\xfe{}")), "not valid JSON"),
    "another dtype": Case(entry(dtype="F128"), "dtype 'F128' is not one of"),
    "a dtype that is a list": Case(entry(dtype=["F32"]), "is not one of"),
    "a wider dtype": Case(entry(dtype="F64"), "data_offsets give 896"),
    "a narrow dtype": Case(entry(dtype="U8"), "data_offsets give 896"),
    "integers as weights": Case(entry(dtype="I32")),
    "a shape that overflows": Case(entry(shape=[2**32, 2**32]), "not a list of possible sizes"),
    "a shape that wraps to the size": Case(entry(shape=[2**62 + 7, 32]), "not a list of possible sizes"),
    "a negative shape": Case(entry(shape=[-7, -32]), "not a list of possible sizes"),
    "NaN in a shape": Case(entry(shape=[math.nan, 32]), "not a list of possible sizes"),
    "infinity in a shape": Case(entry(shape=[math.inf, 0]), "not a list of possible sizes"),
    "a fraction in a shape": Case(entry(shape=[7.0, 32]), "not a list of possible sizes"),
    "true in a shape": Case(entry(shape=[True, 224]), "not a list of possible sizes"),
    "1000 axes": Case(entry(shape=[1] * 1000), "not a list of possible sizes"),
    "offsets backwards": Case(entry(data_offsets=[896, 0]), "data_offsets give -896"),
    "negative offsets": Case(entry(data_offsets=[-896, 0]), "not a pair of byte positions"),
    "offsets beyond the file": Case(entry(data_offsets=[2**50, 2**50 + 896])),
    "offsets as text": Case(entry(data_offsets="0-896"), "not a pair of byte positions"),
    "a digit of 10,000 figures": Case(
        raw(safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,0]}}')), ""
    ),
    "one key too many": Case(entry(strides=[1, 1]), "needs exactly dtype, shape and data_offsets"),
    "an entry that is null": Case(tensors_of(lambda h: h.update({GIVEN: None})), "needs exactly"),
    "metadata of lists": Case(tensors_of(lambda h: h.update(__metadata__={"a": []})), "must hold text only"),
    "200,000 tensors": Case(million_tensors, ""),
    "1 TiB of zeros": Case(huge_tensors, ""),
    "a pipe": Case(pipe("model.safetensors"), "not a regular file"),
    "a folder": Case(lambda f: (hugging_face(f), (f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir())),
    "a device": Case(linked("model.safetensors", "/dev/zero"), "not a regular file"),
    "a link to itself": Case(linked("model.safetensors", "model.safetensors"), ""),
    "other shapes than the config": Case(raw(weights(SHAPES | {"model.norm.weight": (33,)})), "model.norm.weight"),
    "a tensor too many": Case(raw(weights(SHAPES | {"model.layers.7.x": (1,)})), "model.layers.7.x"),
    "through convert": Case(raw(WHOLE[:-1]), "data_offsets end at", CONVERT),
    "through show": Case(raw(WHOLE[:-1]), "data_offsets end at", SHOW),
}  # fmt: skip


# --- shards ---------------------------------------------------------------------------------------------------------

SHARD = "model-00001-of-00001.safetensors"


def sharded(index, name="model.safetensors.index.json"):
    def make(folder):
        hugging_face(folder)
        (folder / "model.safetensors").rename(folder / SHARD)
        write(folder.parent / "outside.safetensors", WHOLE)
        write(folder / name, index)

    return make


def mapped(shard):
    """Every tensor in the shard, but for changes to the first."""
    return sharded({"weight_map": dict.fromkeys(SHAPES, SHARD) | {GIVEN: shard}})


ALL = dict.fromkeys(SHAPES, SHARD)
INDEX = {
    "a shard outside the folder": Case(mapped("../outside.safetensors"), "not a .safetensors file of this folder"),
    "an absolute shard": Case(mapped("/etc/passwd"), "not a .safetensors file of this folder"),
    "a shard in a folder below": Case(mapped("a/b.safetensors"), "not a .safetensors file"),
    "a shard by backslashes": Case(mapped("..\\b.safetensors"), "not a .safetensors file"),
    "a shard with a NUL": Case(mapped("b\0.safetensors"), "not a .safetensors file"),
    "a shard that is a number": Case(mapped(1), "not a .safetensors file"),
    "a shard that is a list": Case(mapped([SHARD]), "not a .safetensors file"),
    "a shard that is null": Case(mapped(None), "not a .safetensors file"),
    "a pickle as a shard": Case(mapped("pytorch_model.bin"), "not a .safetensors file"),
    "the index as a shard": Case(mapped("model.safetensors.index.json"), "not a .safetensors file"),
    "a shard that is missing": Case(mapped("none.safetensors"), "unlike model.safetensors.index.json says"),
    "a tensor twice": Case(
        sharded(json.dumps({"weight_map": ALL})[:-2] + f', "{GIVEN}": "other.safetensors"}}}}'), "is given twice"
    ),
    "a tensor that no shard has": Case(sharded({"weight_map": ALL | {"x": SHARD}}), "lacks 'x'"),
    "a tensor that it does not list": Case(sharded({"weight_map": {GIVEN: SHARD}}), "unlike"),
    "an empty map": Case(sharded({"weight_map": {}}), "weight_map is missing or empty"),
    "no map": Case(sharded({"metadata": {}}), "weight_map is missing or empty"),
    "a list as the map": Case(sharded({"weight_map": [SHARD]}), "weight_map is missing or empty"),
    "a list": Case(sharded([]), "must hold an object"),
    "deep nesting": Case(sharded(b'{"weight_map":' * 50_000), "not valid JSON"),
    "1 TiB": Case(lambda f: (sharded("{")(f), sparse(f / "model.safetensors.index.json")), "bytes, more than"),
    "nothing": Case(sharded(b""), "not valid JSON"),
}


# --- pickle ---------------------------------------------------------------------------------------------------------


class Payload:
    """What runs code when it is unpickled: a canary is written."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def pickled(folder, content, *, name="pytorch_model.bin", compress=zipfile.ZIP_STORED):
    hugging_face(folder)
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / name, "w", compress) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")


def payload(folder):
    return pickle.dumps(Payload(folder.parent / CANARY), protocol=2)


def bare_pickle(folder):
    pickled(folder, b"")
    write(folder / "pytorch_model.bin", payload(folder))


def pickled_shards(folder):
    pickled(folder, payload(folder), name="pytorch_model-00001-of-00001.bin")
    write(folder / "pytorch_model.bin.index.json", {"weight_map": {GIVEN: "pytorch_model-00001-of-00001.bin"}})


def disguised(folder):
    hugging_face(folder, tensors=payload(folder))


def disguised_zip(folder):
    pickled(folder, payload(folder), name="model.safetensors")


def in_tokenizer(folder):
    hugging_face(folder, tokenizer=payload(folder))


def in_checkpoint(folder):
    run_folder(folder, tensors=payload(folder))


def pickled_training(folder):
    run_folder(folder)
    place = folder / "checkpoints" / "step-00000001"
    (place / "model.safetensors").unlink()
    write(place / "model.bin", payload(folder))


ALLOWED = ("pickle", "{}")  # no verb gives `allow_pickle`; the worker calls `qkv.load` with it
PICKLE = {
    "code": Case(lambda f: pickled(f, payload(f)), "a pickle, and a pickle can run code"),
    "code without a zip": Case(bare_pickle, "a pickle, and a pickle can run code"),
    "code in a shard": Case(pickled_shards, "a pickle, and a pickle can run code"),
    "code through convert": Case(lambda f: pickled(f, payload(f)), "can run code", CONVERT),
    "code through show": Case(lambda f: pickled(f, payload(f)), "can run code", SHOW),
    "code through chat": Case(lambda f: pickled(f, payload(f)), "can run code", CHAT),
    "code as safetensors": Case(disguised, "does not fit"),
    "code as a zip as safetensors": Case(disguised_zip, "does not fit"),
    "code as a tokenizer": Case(in_tokenizer, "tokenizer.json"),
    "code in a run": Case(in_checkpoint, "does not fit"),
    "code beside a run": Case(pickled_training, "none of its 1 checkpoints is whole"),
    "code as GGUF": Case(lambda f: write(f / "x.gguf", payload(f)), "GGUF", GGUF),
    "allowed: code": Case(lambda f: pickled(f, payload(f)), "not readable as weights only", ALLOWED),
    "allowed: code in a shard": Case(pickled_shards, "not readable as weights only", ALLOWED),
    "allowed: no zip": Case(bare_pickle, "not a zip file", ALLOWED),
    "allowed: a list": Case(lambda f: pickled(f, pickle.dumps([1], protocol=2)), "holds a list", ALLOWED),
    "allowed: numbers": Case(lambda f: pickled(f, pickle.dumps({"a": 1}, protocol=2)), "not a named tensor", ALLOWED),
    "allowed: cut": Case(lambda f: pickled(f, b"\x80\x02}q\0("), "not readable as weights only", ALLOWED),
    "allowed: a bomb of references": Case(
        lambda f: pickled(f, b"\x80\x02]q\0" + b"".join(b"](h%ch%ce" % (i, i) for i in range(40)) + b"."),
        "", ALLOWED,
    ),
    "allowed: 4 GiB of length": Case(
        lambda f: pickled(f, b"\x80\x04\x8e" + struct.pack("<Q", 1 << 32) + b"."), "not readable as weights", ALLOWED
    ),
    "allowed: a compressed zip": Case(
        lambda f: pickled(f, bytes(1 << 20), compress=zipfile.ZIP_DEFLATED), "a compressed zip file", ALLOWED
    ),
}  # fmt: skip


# --- config.json ----------------------------------------------------------------------------------------------------


def config(**changes):
    """The good one with other values; `...` takes a key away."""
    made = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    return lambda folder: hugging_face(folder, config=made)


def config_text(text):
    return lambda folder: hugging_face(folder, config=text)


def windowed(**changes):
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    return config(model_type="qwen2", **windows | changes)


def rope(**values):
    return config(rope_scaling=values)


HUGE = 2**31 - 1
CONFIGS = {
    "unknown family": Case(config(model_type="lama"), "did you mean 'llama'"),
    "no family": Case(config(model_type=...), "'model_type' is None"),
    "a family that is a list": Case(config(model_type=["llama"]), "'model_type' is"),
    "a family that is an object": Case(config(model_type={"a": 1}), "'model_type' is"),
    "a family with lines": Case(config(model_type="a\nb\r\x1b[2Jc" * 1000), "'model_type' is"),
    "unknown key": Case(config(attention_sinks=4), "'attention_sinks' is not known to qkv"),
    "code of its own": Case(config(auto_map={"AutoConfig": "x.X"}, model_type="own"), "'model_type' is 'own'"),
    "text for a number": Case(config(hidden_size="32"), "'hidden_size' is '32'"),
    "a list for a number": Case(config(hidden_size=[32]), "'hidden_size' is"),
    "a long list for a number": Case(config(hidden_size=[1] * 90_000), "'hidden_size' is"),
    "a long text for a number": Case(config(hidden_size="9" * 1_000_000), "'hidden_size' is"),
    "true for a number": Case(config(num_hidden_layers=True), "'num_hidden_layers' is True"),
    "a fraction for a count": Case(config(num_attention_heads=2.0), "'num_attention_heads' is 2.0"),
    "NaN for a count": Case(config(vocab_size=math.nan), "'vocab_size' is nan"),
    "NaN for eps": Case(config(rms_norm_eps=math.nan), "eps"),
    "infinite eps": Case(config(rms_norm_eps=math.inf), "eps"),
    "negative eps": Case(config(rms_norm_eps=-1.0), "eps"),
    "an eps of 10^400": Case(config_text(json.dumps(CONFIG).replace("1e-05", "1" + "0" * 400)), "eps"),
    "negative width": Case(config(hidden_size=-32), "'hidden_size' is -32"),
    "no heads": Case(config(num_attention_heads=0), "'num_attention_heads' is 0"),
    "negative kv heads": Case(config(num_key_value_heads=-1), "num_key_value_heads' is -1"),
    "no kv heads": Case(config(num_key_value_heads=0), "num_key_value_heads' is 0"),
    "kv heads that do not divide": Case(config(num_key_value_heads=3), "n_kv_heads"),
    "2^31 - 1 layers": Case(config(num_hidden_layers=HUGE), "must be from 1 to 10000"),
    "10,000 layers": Case(config(num_hidden_layers=10_000), "asks for 10000 layers"),
    "2^31 - 1 wide": Case(config(hidden_size=HUGE), ""),
    "2^31 - 1 everywhere": Case(config(hidden_size=HUGE, intermediate_size=HUGE, vocab_size=HUGE, head_dim=HUGE)),
    "2^31 - 1 of context": Case(config(max_position_embeddings=2**63), "'max_position_embeddings' is"),
    "2^31 - 1 heads": Case(config(num_attention_heads=HUGE, num_key_value_heads=HUGE), ""),
    "2^31 - 1 per head": Case(config(head_dim=HUGE - 1), ""),
    "an odd head": Case(config(head_dim=15), ""),
    "a vocabulary of 2^31 - 1": Case(config(vocab_size=HUGE), ""),
    "a number of 4000 digits": Case(config_text(json.dumps(CONFIG).replace("64", "9" * 4000)), "max_position"),
    "a number of 100,000 digits": Case(config_text(json.dumps(CONFIG).replace("64", "9" * 100_000)), "not valid JSON"),
    "layer_types too short": Case(windowed(layer_types=[]), "sliding|layer_types|model"),
    "layer_types too long": Case(windowed(layer_types=["full_attention"] * 50_000), "'layer_types' must say"),
    "layer_types of numbers": Case(windowed(layer_types=[1]), "'layer_types' must say"),
    "layer_types of lists": Case(windowed(layer_types=[[]]), "'layer_types' must say"),
    "a negative window": Case(windowed(sliding_window=-1), "size"),
    "a pattern of 0": Case(
        config(model_type="gemma3_text", sliding_window_pattern=0, head_dim=16, query_pre_attn_scalar=16), "pattern"
    ),
    "rope theta 0": Case(config(rope_theta=0.0), "theta"),
    "rope theta NaN": Case(config(rope_theta=math.nan), "theta"),
    "rope factor 0": Case(rope(rope_type="linear", factor=0.0), "factor"),
    "rope factor infinite": Case(rope(rope_type="linear", factor=math.inf), "factor"),
    "rope of lists": Case(rope(rope_type=[], factor=2.0), "rope"),
    "rope unknown": Case(rope(rope_type="spiral", factor=2.0), "spiral"),
    "rope as a list": Case(config(rope_scaling=[1, 2]), "'rope_scaling' is"),
    "rope key unknown": Case(rope(rope_type="linear", factor=2.0, twist=1), "twist"),
    "rope by long factors": Case(
        config(model_type="phi3", original_max_position_embeddings=32, pad_token_id=0,
               rope_scaling={"type": "longrope", "long_factor": [1.0] * 3, "short_factor": [1.0] * 90_000}),
        "factor",
    ),
    "an activation unknown": Case(config(hidden_act="exec"), "'hidden_act' is 'exec'"),
    "an activation that is a list": Case(config(hidden_act=["silu"]), "'hidden_act' is"),
    "a dropout of 7": Case(config(attention_dropout=7.0), "dropout"),
    "a dropout of NaN": Case(config(attention_dropout=math.nan), "dropout"),
    "eos as a text": Case(config(eos_token_id="6"), "'eos_token_id' is '6'"),
    "eos as a fraction": Case(config(eos_token_id=6.5), "'eos_token_id' is 6.5"),
    "eos that is no id": Case(config(eos_token_id=10**12), "", code=PASSES),
    "eos negative": Case(config(eos_token_id=-1), "", code=PASSES),
    "bos that is no id": Case(config(bos_token_id=10**12), "", ("generate", "{}", "", "--max-new-tokens", "3")),
    "bos as 90,000 numbers": Case(config(bos_token_id=[99] * 90_000), "", ("generate", "{}", "", "--max-new-tokens", "3")),
    "a key twice": Case(config_text('{"hidden_size": 1, ' + json.dumps(CONFIG)[1:]), "is given twice"),
    "deep nesting": Case(config_text('{"a":' * 90_000), "not valid JSON"),
    "deep and whole": Case(config_text('{"a":' * 5_000 + "1" + "}" * 5_000), ""),
    "a list": Case(config_text("[]"), "must hold an object"),
    "null": Case(config_text("null"), "must hold an object"),
    "nothing": Case(config_text(""), "not valid JSON"),
    "UTF-16": Case(config_text(json.dumps(CONFIG).encode("utf-16")), "not valid JSON"),
    "half a surrogate pair": Case(config(model_type="\ud800"), "'model_type' is"),
    "1 TiB": Case(lambda f: (hugging_face(f), sparse(f / "config.json")), "more than the"),
    "a pipe": Case(pipe("config.json"), ""),
    "many values": Case(config_text(b'{"a":[' + b"0," * 900_000 + b"0]}"), "values in its JSON"),
    "generation_config as a list": Case(lambda f: hugging_face(f, generation_config__json=[]), "must hold an object"),
    "generation_config deep": Case(lambda f: hugging_face(f, generation_config__json="[" * 90_000), "not valid JSON"),
    "through show": Case(config(hidden_size=HUGE), "", SHOW),
    "through convert": Case(config(hidden_size=HUGE), "", CONVERT),
    "as YAML through show": Case(config(), "", ("show", "{}/config.json"), OPTION),
}  # fmt: skip


# --- tokenizer.json -------------------------------------------------------------------------------------------------


def tokenizer(**changes):
    return lambda folder: hugging_face(folder, tokenizer=TOKENIZER | changes)


def model_of(**changes):
    return tokenizer(model=TOKENIZER["model"] | changes)


def tokenizer_text(text):
    return lambda folder: hugging_face(folder, tokenizer=text)


def split_by(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def added(**changes):
    return tokenizer(added_tokens=[TOKENIZER["added_tokens"][0] | changes])


def nested(kind, inner, depth):
    made = {"type": "Lowercase"} if inner == "normalizers" else {"type": "Whitespace"}
    for _ in range(depth):
        made = {"type": "Sequence", inner: [made]}
    return tokenizer(**{kind: made})


BPE = {"type": "BPE", "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "c": 4, "d": 5}, "merges": ["a b"]}
BOMB = r"(a*)*(a*)*(a*)*(a*)*(a*)*(a*)*(a*)*(a*)*x"
LONG = ("generate", "{}", "a" * 3000, "--max-new-tokens", "3")
TEMPLATED = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": [],
             "special_tokens": {}}  # fmt: skip
TOKENIZERS = {
    "not JSON": Case(tokenizer_text("{"), "not a tokenizer.json that can be read"),
    "nothing": Case(tokenizer_text(""), "not a tokenizer.json that can be read"),
    "a list": Case(tokenizer_text("[]"), "not a tokenizer.json that can be read"),
    "not UTF-8": Case(tokenizer_text(b"\xff\xfe"), "not a tokenizer.json that can be read"),
    "another version": Case(tokenizer(version="9.9"), "not a tokenizer.json that can be read"),
    "another model": Case(model_of(type="Magic"), "not a tokenizer.json that can be read"),
    "no vocabulary": Case(model_of(vocab={}), "", code=OPTION),
    "a vocabulary of lists": Case(model_of(vocab=[["a", 1]]), "not a tokenizer.json"),
    "ids of text": Case(model_of(vocab={"a": "1"}), "not a tokenizer.json"),
    "a negative id": Case(model_of(vocab=VOCABULARY | {"a": -1}), "not a tokenizer.json"),
    "an id of 2^31": Case(model_of(vocab=VOCABULARY | {"x": 2**31}), "the largest id is 2147483648"),
    "an id of 2^32": Case(model_of(vocab=VOCABULARY | {"x": 2**32}), "not a tokenizer.json"),
    "an id of 2^32 - 1": Case(model_of(vocab=VOCABULARY | {"x": 2**32 - 1}), "the largest id is"),
    "an id beyond the model": Case(model_of(vocab=VOCABULARY | {"x": 7}), "the tokenizer has 8 tokens and the model 7"),
    "a fraction as an id": Case(model_of(vocab={"a": 1.5}), "not a tokenizer.json"),
    "two tokens with one id": Case(model_of(vocab=VOCABULARY | {"x": 1}), "", code=PASSES),
    "no unknown token": Case(model_of(unk_token="none"), "is not in the corpus", ("generate", "{}", "zz"), code=OPTION),
    "an added token with a huge id": Case(added(id=2**31), "", code=PASSES),
    "an added token that contradicts": Case(added(id=2), "", code=PASSES),
    "an added token without a text": Case(added(content=""), "", code=PASSES),
    "an added token of 1 MB": Case(added(content="x" * 1_000_000), ""),
    "an added token of numbers": Case(added(content=7), "not a tokenizer.json"),
    "BPE: a merge of what is not there": Case(tokenizer(model=BPE | {"merges": ["a z"]}), "not a tokenizer.json"),
    "BPE: merges without two parts": Case(tokenizer(model=BPE | {"merges": ["ab"]}), "not a tokenizer.json"),
    "BPE: merges of numbers": Case(tokenizer(model=BPE | {"merges": [[1, 2]]}), "not a tokenizer.json"),
    "BPE: a merge that shrinks": Case(tokenizer(model=BPE | {"merges": [["", ""]]}), ""),
    "BPE: a long prefix": Case(
        tokenizer(model=BPE | {"continuing_subword_prefix": "########", "merges": [["a", "b"]]}),
        "not a tokenizer.json that can be read",
    ),
    "BPE: a dropout of 2": Case(tokenizer(model=BPE | {"dropout": 2.0}), "tokenizer"),
    "BPE: no unknown token": Case(tokenizer(model=BPE | {"unk_token": "none"}), "tokenizer", ("generate", "{}", "zz")),
    "WordPiece: no unknown token": Case(
        tokenizer(model={"type": "WordPiece", "vocab": VOCABULARY, "unk_token": "none",
                         "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}),
        "tokenizer", ("generate", "{}", "zz"),
    ),
    "Unigram: nothing": Case(tokenizer(model={"type": "Unigram", "vocab": [], "unk_id": 0}), "tokenizer"),
    "Unigram: unknown beyond the end": Case(
        tokenizer(model={"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 9}), "tokenizer"
    ),
    "Unigram: no unknown": Case(
        tokenizer(model={"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}), "tokenizer",
        ("generate", "{}", "zz"),
    ),
    "Unigram: NaN scores": Case(
        tokenizer_text(json.dumps(TOKENIZER | {"model": {"type": "Unigram", "vocab": [["a", math.nan]], "unk_id": 0}})),
        "not a tokenizer.json",
    ),
    "pre-tokenizer unknown": Case(tokenizer(pre_tokenizer={"type": "Shell"}), "not a tokenizer.json"),
    "pre-tokenizer that is a list": Case(tokenizer(pre_tokenizer=[]), "not a tokenizer.json"),
    "pre-tokenizers 10,000 deep": Case(nested("pre_tokenizer", "pretokenizers", 300), ""),
    "normalizers 10,000 deep": Case(nested("normalizer", "normalizers", 300), ""),
    "text 100,000 deep": Case(tokenizer_text('{"pre_tokenizer":' * 100_000), "not a tokenizer.json"),
    "a regex that is none": Case(tokenizer(pre_tokenizer=split_by("(")), "not a tokenizer.json"),
    "a regex that explodes": Case(tokenizer(pre_tokenizer=split_by(BOMB)), "", LONG, code=PASSES),
    "a regex that repeats": Case(tokenizer(pre_tokenizer=split_by("((a{1,99}){1,99}){1,99}")), "", LONG, code=PASSES),
    "a regex that calls itself": Case(tokenizer(pre_tokenizer=split_by(r"(?<x>a\g<x>?b?)*")), "", LONG, code=PASSES),
    "a regex of 1 MB": Case(tokenizer(pre_tokenizer=split_by("(a|" * 90_000 + ")" * 90_000)), ""),
    "a normalizer that explodes": Case(
        tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": BOMB}, "content": "b"}), "", LONG, code=PASSES),
    "a normalizer that doubles": Case(
        tokenizer(normalizer={"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}), "",
    ),
    "a Precompiled without a map": Case(
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "tokenizer"
    ),
    "a Precompiled of noise": Case(
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}), "tokenizer"
    ),
    "a post-processor without its token": Case(tokenizer(post_processor=TEMPLATED), "failed on a short text"),
    "a decoder unknown": Case(tokenizer(decoder={"type": "Shell"}), "not a tokenizer.json"),
    "a decoder that doubles": Case(
        tokenizer(decoder={"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": x}, "content": x * 2} for x in "abcd" * 20]}), "",
    ),
    "truncation of nothing": Case(
        tokenizer(truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}), "", code=PASSES),
    "padding to 2^40": Case(
        tokenizer(padding={"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None,
                           "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}), "", code=PASSES),
    "1 TiB": Case(lambda f: (hugging_face(f), sparse(f / "tokenizer.json")), "more than 268435456 bytes"),
    "a pipe": Case(pipe("tokenizer.json"), "has no tokenizer", code=OPTION),
    "settings: a list": Case(lambda f: hugging_face(f, settings=[]), "tokenizer_config.json: not a JSON object"),
    "settings: deep": Case(lambda f: hugging_face(f, settings="[" * 90_000), "tokenizer_config.json"),
    "settings: deep and whole": Case(
        lambda f: hugging_face(f, settings='{"a":' * 5_000 + "1" + "}" * 5_000), "tokenizer_config.json"
    ),
    "settings: 1 TiB": Case(
        lambda f: (hugging_face(f), sparse(f / "tokenizer_config.json")), "more than 4194304 bytes"
    ),
    "settings: a key twice": Case(
        lambda f: hugging_face(f, settings='{"chat_template": "a", "chat_template": "b"}'), "is given twice"
    ),
    "settings: a template of numbers": Case(lambda f: hugging_face(f, settings={"chat_template": 7}), "neither a text"),
    "settings: no default template": Case(
        lambda f: hugging_face(f, settings={"chat_template": [{"name": "x", "template": ""}]}), "neither a text"
    ),
    "settings: template not UTF-8": Case(
        lambda f: hugging_face(f, chat_template__jinja=b"\xff"), "not UTF-8 text"
    ),
    "settings: template of 1 TiB": Case(
        lambda f: (hugging_face(f), sparse(f / "chat_template.jinja")), "more than 4194304 bytes"
    ),
}  # fmt: skip


# --- chat templates -------------------------------------------------------------------------------------------------


def template(source):
    return lambda folder: hugging_face(folder, settings={"eos_token": "</s>", "chat_template": source})


LOOP = "{% for i in range(100000) %}"
INSIDES = "{{ ().__class__.__base__.__subclasses__() }}"
TEMPLATES = {
    "a loop": LOOP + "x" * 100 + "{% endfor %}",
    "loops in loops": LOOP * 4 + "x" + "{% endfor %}" * 4,
    "silent loops": LOOP * 3 + "{% endfor %}" * 3,
    "a range of 10^12": "{% for i in range(1000000000000) %}{% endfor %}",
    "a text times 10^10": "{{ 'a' * 10000000000 }}",
    "a list times 10^10": "{{ [0] * 10000000000 }}",
    "a text doubled": "{% set x = namespace(a='a') %}{% for i in range(60) %}{% set x.a = x.a + x.a %}{% endfor %}",
    "a list doubled": "{% set x = namespace(a=[1]) %}{% for i in range(60) %}{% set x.a = [x.a, x.a] %}{% endfor %}"
                      "{{ x.a }}",
    "a text replaced": "{% set x = namespace(a='a') %}{% for i in range(60) %}{% set x.a = x.a.replace('a', 'aa') %}"
                       "{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
    "powers": "{{ 10 ** 100000000 }}",
    "a format": "{{ '%999999999d' % 1 }}",
    "a format of width": "{{ '%*d' % (999999999, 1) }}",
    "str.format": "{{ '{0.__class__}'.format(1) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "indent": "{{ 'a\nb' | indent(10000000000) }}",
    "join": "{{ range(100000) | join('a' * 100000) }}",
    "tojson": "{{ messages | tojson(indent=100000000) }}",
    "insides of Python": INSIDES,
    "insides by a filter": "{{ '' | attr('__class__') }}",
    "insides by a map": "{{ [''] | map(attribute='__class__') | list | tojson }}" + INSIDES,
    "insides of a function": "{{ raise_exception.__globals__['os'].system('touch canary') }}",
    "insides of a namespace": "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "insides of self": "{{ self._TemplateReference__context.environment }}",
    "insides of a loop": "{% for i in [1] %}{{ loop.__init__.__globals__.os.system('touch canary') }}{% endfor %}",
    "an item of a string": "{{ ''['__class__']['__mro__'].a }}",
    "an include": "{% include '/etc/passwd' %}",
    "an import": "{% import '/etc/passwd' as x %}",
    "an extension": "{% extends '/etc/passwd' %}",
    "autoescape": "{% autoescape true %}x{% endautoescape %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "a macro in loops": "{% macro m() %}" + LOOP + "x{% endfor %}{% endmacro %}" + LOOP + "{{ m() }}{% endfor %}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "brackets": "{{ " + "[" * 2000 + "]" * 2000 + " }}",
    "ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "a long sum": "{{ " + "+".join("1" * 4000) + " }}",
    "a long source": "x" * 3_000_000,
    "an end missing": "{% for i in [1] %}",
    "an unknown tag": "{% exec 'touch canary' %}",
    "an unknown filter": "{{ 'touch canary' | system }}",
    "an unknown function": "{{ open('canary', 'w') }}",
    "a comparison": "{% set x = 'a' * 900000 %}{% for i in range(90000) %}{% if x == x + '' %}{% endif %}{% endfor %}",
    "a sort": "{% for i in range(1000) %}{{ range(100000) | sort | length }}{% endfor %}",
    "a division by zero": "{{ 1 // 0 }}",
    "a number as a text": "{{ 'a' + 1 }}",
    "a huge number": "{{ " + "9" * 5000 + " }}",
    "a comment without end": "{#" * 1000,
    "output": LOOP + "{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
}  # fmt: skip
REFUSING = "{{ raise_exception('not\nfor\nyou') }}"
SAYS = "the chat template"


# --- GGUF -----------------------------------------------------------------------------------------------------------

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def text(value):
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def encoded(value):
    """A value with its type."""
    match value:
        case bytes():
            return value  # as it is
        case bool():
            return struct.pack("<IB", BOOL, value)
        case int() if value < 0:
            return struct.pack("<Ii", I32, value)
        case int() if value >= 2**32:
            return struct.pack("<IQ", 10, value)
        case int():
            return struct.pack("<II", U32, value)
        case float():
            return struct.pack("<If", F32, value)
        case str():
            return struct.pack("<I", STRING) + text(value)
        case list():
            kind, pack = (STRING, text) if isinstance(value[0], str) else (I32, lambda n: struct.pack("<i", n))
            if isinstance(value[0], float):
                kind, pack = F32, lambda n: struct.pack("<f", n)
            return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(map(pack, value))
    raise AssertionError(value)


WORDS = {"model": "gpt2", "pre": "gpt-2", "tokens": ["<s>", "a", "b", "ab", "Ġ", "c", "</s>"],
         "token_type": [3, 1, 1, 1, 1, 1, 3], "merges": ["a b"], "eos_token_id": 6}  # fmt: skip
METADATA = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 32,
    "llama.feed_forward_length": 32, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10_000.0, "llama.rope.dimension_count": 16,
    **{f"tokenizer.ggml.{key}": value for key, value in WORDS.items()},
}  # fmt: skip
TENSORS = {
    "token_embd.weight": (7, 32), "output_norm.weight": (32,), "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32), "blk.0.attn_v.weight": (16, 32), "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_gate.weight": (32, 32), "blk.0.ffn_up.weight": (32, 32), "blk.0.ffn_down.weight": (32, 32),
    "blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,),
}  # fmt: skip


def gguf_bytes(changes=None, *, tensors=None, kind=0, offset=None, n_tensors=None, n_keys=None, version=3):
    """A GGUF file; `...` takes a key away."""
    keys = {key: value for key, value in (METADATA | (changes or {})).items() if value is not ...}
    shapes = TENSORS if tensors is None else tensors
    infos, at = b"", 0
    for name, shape in shapes.items():
        place = at if offset is None else offset(at)
        infos += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos += struct.pack("<IQ", kind, place % 2**64)
        at += 4 * math.prod(shape) + -4 * math.prod(shape) % 32
    counts = (len(shapes) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    head += b"".join(text(key) + encoded(value) for key, value in keys.items()) + infos
    return head + bytes(-len(head) % 32) + numbers(min(at, 1 << 16) // 4)


def gguf(changes=None, **settings):
    return lambda folder: write(folder / "x.gguf", gguf_bytes(changes, **settings))


def llama(**changes):
    return gguf({f"llama.{key.replace('__', '.')}": value for key, value in changes.items()})


def words(**changes):
    return gguf({f"tokenizer.ggml.{key}": value for key, value in changes.items()})


def shape(name, value):
    return gguf(tensors=TENSORS | {name: value})


def cut(size):
    return lambda folder: write(folder / "x.gguf", gguf_bytes()[:size])


def as_text(kind, content):
    return lambda folder: write(folder / "x.gguf", b"GGUF" + struct.pack("<IQQ", 3, *kind) + content)


SCORES = {"model": "llama", "scores": [0.0] * 7, "pre": ..., "merges": ...}
LENGTH_1 = struct.pack("<Q", 1)
GGUFS = {
    "empty": Case(cut(0), "the file is empty"),
    "cut in the magic": Case(cut(3), "does not begin with"),
    "cut in the counts": Case(cut(20), "the number of tensors is"),
    "cut in the metadata": Case(cut(200)),
    "cut in the tensors": Case(cut(1000)),
    "cut in the data": Case(cut(-64), "of the data, which has"),
    "49 bytes that hang gguf": Case(
        as_text((0, 1), text("k") + struct.pack("<IIQ", ARRAY, 4, 2**60)), "the length of 'k'"
    ),
    "2^63 tensors": Case(gguf(n_tensors=2**63), "the number of tensors"),
    "2^40 keys": Case(gguf(n_keys=2**40), "the number of keys"),
    "one key too many": Case(gguf(n_keys=len(METADATA) + 1)),
    "version 1": Case(gguf(version=1), "has version 1"),
    "version 2^31": Case(gguf(version=2**31), "is big-endian"),
    "offsets that wrap": Case(gguf(offset=lambda at: at + 2**64 - 32), "of the data, which has"),
    "offsets all the same": Case(gguf(offset=lambda at: 0), "overlaps"),
    "offsets not aligned": Case(gguf(offset=lambda at: at + 4), "not a multiple of the alignment"),
    "offsets beyond the file": Case(gguf(offset=lambda at: at + 2**40), "of the data, which has"),
    "an unknown kind": Case(gguf(kind=99), "is of type 99"),
    "a kind that qkv does not read": Case(gguf(kind=10), "is of type Q2_K"),
    "a wider kind": Case(gguf(kind=28), "is of type F64"),
    "another kind": Case(gguf(kind=12), "not a multiple of its blocks of 256"),
    "a list of lists": Case(llama(x=struct.pack("<II", ARRAY, ARRAY) + LENGTH_1 * 999), "is a list of lists"),
    "a list of unknown things": Case(llama(x=struct.pack("<IIQ", ARRAY, 77, 1)), "unknown type 77"),
    "an unknown type": Case(llama(x=struct.pack("<I", 13)), "unknown type 13"),
    "a text of 2^62 bytes": Case(llama(x=struct.pack("<IQ", STRING, 2**62)), "would take 4611686018427387912 bytes"),
    "a key twice": Case(
        as_text((0, 2), (text("a.b") + encoded(1)) * 2), "is given twice"
    ),
    "an alignment of 0": Case(gguf({"general.alignment": 0}), "general.alignment is 0"),
    "an alignment of 3": Case(gguf({"general.alignment": 3}), "general.alignment is 3"),
    "an alignment of 2^31": Case(gguf({"general.alignment": 2**31}), "general.alignment is"),
    "an alignment of text": Case(gguf({"general.alignment": "32"}), "general.alignment is"),
    "no architecture": Case(gguf({"general.architecture": ...}), "architecture"),
    "an unknown architecture": Case(gguf({"general.architecture": "gptj"}), "gptj"),
    "an architecture of numbers": Case(gguf({"general.architecture": 7}), "architecture"),
    "an unknown key": Case(llama(twist=1), "'twist' is not known to qkv"),
    "no layers": Case(llama(block_count=0), "'block_count' is 0"),
    "2^31 - 1 layers": Case(llama(block_count=HUGE), "block_count' is"),
    "2^63 layers": Case(llama(block_count=2**63), "'block_count' is"),
    "negative heads": Case(llama(attention__head_count=-2), "head_count' is -2"),
    "no heads": Case(llama(attention__head_count=0), "head_count' is 0"),
    "huge heads": Case(llama(attention__head_count=HUGE)),
    "heads as a list": Case(llama(attention__head_count=[2, 2]), "head_count' is"),
    "no kv heads": Case(llama(attention__head_count_kv=0), "head_count_kv' is 0"),
    "kv heads that do not divide": Case(llama(attention__head_count_kv=3), ""),
    "rope dimension 0": Case(llama(rope__dimension_count=0)),
    "rope dimension 2^31 - 1": Case(llama(rope__dimension_count=HUGE), "must be from 1 to 65536"),
    "an odd rope dimension": Case(llama(rope__dimension_count=15)),
    "rope base 0": Case(llama(rope__freq_base=0.0)),
    "rope base NaN": Case(llama(rope__freq_base=math.nan), "not a finite number"),
    "rope base negative": Case(llama(rope__freq_base=-1.0)),
    "rope scaling unknown": Case(llama(rope__scaling__type="spiral"), "rope.scaling.type' is 'spiral'"),
    "rope scaling 0": Case(llama(rope__scaling__type="linear", rope__scaling__factor=0.0)),
    "key length 2^31 - 1": Case(llama(attention__key_length=HUGE), "must be from 1 to 65536"),
    "key length 0": Case(llama(attention__key_length=0)),
    "eps infinite": Case(llama(attention__layer_norm_rms_epsilon=math.inf), "not a finite number"),
    "eps negative": Case(llama(attention__layer_norm_rms_epsilon=-1.0)),
    "context 0": Case(llama(context_length=0), "'context_length' is 0"),
    "another width": Case(llama(embedding_length=64), "must have rows of 64"),
    "another inner width": Case(llama(feed_forward_length=HUGE)),
    "no table": Case(gguf(tensors={k: v for k, v in TENSORS.items() if "embd" not in k}), "'token_embd.weight' is None"),
    "a tensor too few": Case(gguf(tensors={k: v for k, v in TENSORS.items() if "ffn_up" not in k})),
    "a tensor too many": Case(shape("blk.0.twist.weight", (32,))),
    "a tensor that is a path": Case(shape(f"../{CANARY}", (32,)), "must not look like a path"),
    "another shape": Case(shape("blk.0.attn_q.weight", (32, 64))),
    "a shape that overflows": Case(shape("blk.0.attn_q.weight", (2**32, 2**32)), "impossible shape"),
    "a shape with 0": Case(shape("blk.0.attn_q.weight", (0, 32)), "impossible shape"),
    "a norm of two axes": Case(shape("output_norm.weight", (1, 32))),
    "a table of one axis": Case(shape("token_embd.weight", (224,)), "must have rows of 32"),
    "factors of frequencies": Case(shape("rope_freqs.weight", (8,)), "rope_freqs"),
    "words: another number": Case(words(tokens=WORDS["tokens"] + ["d"], token_type=[1] * 8), "the tokenizer has 8"),
    "words: none": Case(words(tokens=struct.pack("<IIQ", ARRAY, STRING, 0)), "must be a list of 1 to"),
    "words: missing": Case(words(tokens=...), "is missing"),
    "words: numbers": Case(words(tokens=[1, 2]), "must be a list of"),
    "words: twice": Case(words(tokens=["a"] * 7), "has a token twice"),
    "words: not UTF-8": Case(words(tokens=struct.pack("<IIQ", ARRAY, STRING, 1) + text(b"\xff")), "can't decode"),
    "words: types too few": Case(words(token_type=[1]), "must be a list of 7 numbers"),
    "words: types of text": Case(words(token_type=["a"] * 7), "must be a list of 7 numbers"),
    "words: unknown rule": Case(words(pre="shell"), "is 'shell'"),
    "words: unknown model": Case(words(model="shell"), "is 'shell'"),
    "words: merges of what is not there": Case(words(merges=["x y"]), "not a vocabulary that can be used"),
    "words: merges of one part": Case(words(merges=["ab"]), "must have two tokens"),
    "words: merges of nothing": Case(words(merges=["a  "])),
    "words: an id beyond the end": Case(words(eos_token_id=7), "is 7, and there are 7 tokens"),
    "words: a negative id": Case(words(eos_token_id=-1), "is -1"),
    "words: an id as a text": Case(words(bos_token_id="0"), "must be of type int"),
    "words: a flag as a number": Case(words(add_bos_token=1), "must be of type bool"),
    "words: scores missing": Case(words(**SCORES | {"scores": ...}), "is missing"),
    "words: scores too few": Case(words(**SCORES | {"scores": [0.0]}), "must be a list of 7 numbers"),
    "words: scores NaN": Case(words(**SCORES | {"scores": [math.nan] * 7}), "must be a list of 7 numbers"),
    "words: a token of 1 MB": Case(words(**SCORES | {"tokens": [*"abcdef", "a" * 1_000_000]}), "has more than 1000"),
    "words: all controls": Case(words(tokens=["", *"abcdef"], token_type=[3] * 7), ""),
    "template: a number": Case(gguf({"tokenizer.chat_template": 7}), "chat_template' must be of type str"),
    "template: a loop": Case(
        gguf({"tokenizer.chat_template": TEMPLATES["loops in loops"]}), SAYS, ("chat", "{}/x.gguf")
    ),
    "template: insides": Case(gguf({"tokenizer.chat_template": INSIDES}), SAYS, ("chat", "{}/x.gguf")),
    "1 TiB": Case(lambda f: (gguf()(f), sparse(f / "x.gguf"))),
    "a pipe": Case(lambda f: os.mkfifo(f / "x.gguf"), "there is no such folder"),
    "safetensors": Case(lambda f: write(f / "x.gguf", WHOLE), "GGUF"),
    "through convert": Case(cut(1000), "", ("convert", "{}/x.gguf", "{}-made", "--to", "hf", "--no-certificate")),
    "through convert to GGUF": Case(llama(attention__head_count=0), "", ("convert", "{}/x.gguf", "{}-made", "--to", "gguf")),
    "through show": Case(cut(1000), "", ("show", "{}/x.gguf")),
}  # fmt: skip


# --- our own YAML ---------------------------------------------------------------------------------------------------


def model(old="", new="", text=None):
    made = MODEL.replace(old, new, 1) if text is None else text
    return lambda folder: own(folder, made)


def recipe(old="", new="", text=None):
    made = MODEL.split("stop_ids")[0].replace(old, new, 1) if text is None else text
    return lambda folder: run_folder(folder, made)


BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))  # fmt: skip
CYCLE = "model: &a\n  d_model: 32\n  blocks: *a\n"
YAML = {
    "not YAML": Case(model(text="model: [1\n"), "not valid YAML"),
    "not UTF-8": Case(model(text=b"\xff\xfe"), "not UTF-8"),
    "nothing": Case(model(text=""), "model.yaml"),
    "a list": Case(model(text="[]"), "it is no mapping"),
    "no model": Case(model(text="stop_ids: []"), "model.yaml"),
    "a number": Case(model(text="model: 7"), "needs a mapping"),
    "a key twice": Case(model("d_model: 32", "d_model: 32\n  d_model: 64"), "is given twice"),
    "a billion laughs": Case(model(text=BILLION + "model: *m\n"), "model.yaml"),
    "a billion laughs as a key": Case(model(text=BILLION + "model: {d_model: *m}\n"), "model.yaml"),
    "a billion laughs beside": Case(model(text=BILLION + MODEL), "model.yaml"),
    "a billion merges": Case(model(text=MERGES + "model: *j\n"), "model.yaml"),
    "a cycle": Case(model(text=CYCLE), "model.yaml"),
    "a cycle of lists": Case(model(text="model: &a [*a]\n"), "model.yaml"),
    "a cycle as a key": Case(model(text="&a [*a]: 1\n"), "model.yaml"),
    "a list as a key": Case(model(text="[1, 2]: 1\n"), "model.yaml"),
    "a Python object": Case(
        model(text=f'model: !!python/object/apply:os.system ["touch {CANARY}"]\n'), "could not determine a constructor"
    ),
    "a date": Case(model("d_model: 32", "d_model: 2026-01-01"), "d_model"),
    "deep nesting": Case(model(text="model: " + "[" * 20_000), "not valid YAML"),
    "deep and whole": Case(model(text="model: " + "[" * 400 + "]" * 400), "model.yaml"),
    "1 MB of values": Case(model(text="model: [" + "1," * 500_000 + "1]"), "model.yaml"),
    "1 MB of one text": Case(model(text="model: " + "x" * 1_000_000), "model.yaml"),
    "1 TiB": Case(lambda f: (own(f), sparse(f / "model.yaml")), "model.yaml"),
    "a number in base 60": Case(model("d_model: 32", "d_model: " + "59:" * 20_000 + "59"), "model.yaml"),
    "a number of 100,000 digits": Case(model("d_model: 32", "d_model: " + "9" * 100_000), "model.yaml"),
    "an unknown class": Case(model("type: PreNorm", "type: Shell"), "no type 'Shell' fits here"),
    "a class that is a list": Case(model("type: PreNorm", "type: [PreNorm]"), "model.yaml"),
    "a class of another place": Case(model("type: PreNorm", "type: RMSNorm"), "no type 'RMSNorm' fits here"),
    "an abstract class": Case(model("type: PreNorm", "type: Block"), "no type 'Block' fits here"),
    "an unknown key": Case(model("n_heads: 2", "n_head: 2"), "did you mean 'n_heads'"),
    "a key that is a number": Case(model("n_heads: 2", "7: 2"), "model.yaml"),
    "10^9 blocks": Case(model("n: 1", "n: 1000000000"), "n=1000000000 must be from 0 to"),
    "10^9 shared blocks": Case(model("n: 1", "n: 1000000000\n    shared: true"), "n=1000000000 must be from 0 to"),
    "10^30 blocks": Case(model("n: 1", f"n: {10**30}"), ""),
    "no blocks": Case(model("n: 1", "n: 0"), ""),
    "negative blocks": Case(model("n: 1", "n: -1"), ""),
    "10^9 wide": Case(model("d_model: 32", "d_model: 1000000000"), "model.yaml|shape"),
    "10^18 wide": Case(model("d_model: 32", f"d_model: {10**18}"), "model.yaml"),
    "10^30 wide": Case(model("d_model: 32", f"d_model: {10**30}"), "model.yaml"),
    "negative width": Case(model("d_model: 32", "d_model: -32"), "model.yaml"),
    "no width": Case(model("d_model: 32", "d_model: 0"), "model.yaml"),
    "text for a width": Case(model("d_model: 32", "d_model: '32'"), "d_model"),
    "NaN for eps": Case(model("eps: 1.0e-05", "eps: .nan"), "eps"),
    "10^9 heads": Case(model("n_heads: 2", "n_heads: 1000000000"), "model.yaml"),
    "no heads": Case(model("n_heads: 2", "n_heads: 0"), "model.yaml"),
    "a vocabulary of 10^12": Case(model("vocab_size: 7", f"vocab_size: {10**12}"), ""),
    "no vocabulary": Case(model(", vocab_size: 7", ""), ""),
    "a context of -1": Case(model("context: 64", "context: -1"), "context"),
    "a window of 0": Case(model("{type: Causal}", "{type: Window, size: 0}"), "size"),
    "masks 500 deep": Case(
        model("{type: Causal}", "{type: And, a: {type: Causal}, b: " * 500 + "{type: Causal}" + "}" * 500), "model.yaml"
    ),
    "stop ids of text": Case(model("[6]", "[a]"), "Facts.stop_ids"),
    "stop ids of lists": Case(model("[6]", "[[6]]"), "Facts.stop_ids"),
    "begin id as a text": Case(model("begin_id: null", "begin_id: x"), "Facts.begin_id"),
    "begin id beyond the end": Case(model("begin_id: null", f"begin_id: {10**12}"), "", ("generate", "{}", "", "--max-new-tokens", "3")),
    "begin id negative": Case(model("begin_id: null", "begin_id: -5"), "", ("generate", "{}", "", "--max-new-tokens", "3")),
    "a pipe": Case(lambda f: (own(f), (f / "recipe.yaml").unlink(missing_ok=True), os.mkfifo(f / "recipe.yaml"))
                   , "", ("show", "{}/recipe.yaml")),
    "recipe: a billion laughs": Case(recipe(text=BILLION + "model: *m\n"), "recipe.yaml"),
    "recipe: a billion laughs, shown": Case(recipe(text=BILLION + "model: *m\n"), "recipe.yaml", SHOW),
    "recipe: a list": Case(recipe(text="[]"), "it has no 'model'"),
    "recipe: a list, shown": Case(recipe(text="[]"), "", SHOW),
    "recipe: 10^9 blocks": Case(recipe("n: 1", "n: 1000000000"), "n=1000000000 must be from 0 to"),
    "recipe: 10^9 blocks, shown": Case(recipe("n: 1", "n: 1000000000"), "n=1000000000 must be from 0 to", SHOW),
    "recipe: an adapter without a start": Case(
        recipe(text=MODEL.split("stop_ids")[0] + "adapter: {rank: 2}\n"), "no 'start' with a path"
    ),
    "recipe: adapters on themselves": Case(
        lambda f: run_folder(f, MODEL.split("stop_ids")[0] + f"adapter: {{rank: 2}}\nstart: {{path: '{f}'}}\n"),
        "which sits on them",
    ),
    "recipe: started from itself, shown": Case(
        lambda f: write(f / "recipe.yaml", f"start: {{path: '{f}'}}\n"), "", SHOW, FILE
    ),
    "recipe: a preset of lists": Case(recipe(text="model: {preset: [small]}\n"), "", SHOW),
    "run: manifest of lists": Case(lambda f: run_folder(f, manifest=lambda _: []), "none of its 1 checkpoints"),
    "run: manifest with a path": Case(
        lambda f: run_folder(f, manifest=lambda made: made | {"files": made["files"] | {
            "../../../outside": {"bytes": 1, "sha256": ""}}}), "none of its 1 checkpoints",
    ),
    "run: manifest of another step": Case(
        lambda f: run_folder(f, manifest=lambda made: made | {"step": 2}), "none of its 1 checkpoints"
    ),
    "run: manifest of 2^63 bytes": Case(
        lambda f: run_folder(f, manifest=lambda made: made | {"files": made["files"] | {
            "model.safetensors": {"bytes": 2**63, "sha256": "0"}}}), "none of its 1 checkpoints",
    ),
    "run: a state that is a list": Case(lambda f: run_folder(f, state="[]"), "none of its 1 checkpoints"),
    "run: a state that is deep": Case(lambda f: run_folder(f, state="[" * 90_000), "none of its 1 checkpoints"),
}  # fmt: skip


# --- certificates ---------------------------------------------------------------------------------------------------

PROOF = {
    "source": "x", "sha256": "0" * 64, "reference": "transformers 5", "inputs": {"tokens": 64, "rule": "r"},
    "largest_difference": {"layers": [0.1], "logits": 0.1}, "largest": {"layers": [1.0], "logits": 1.0},
}  # fmt: skip


def proof(content):
    return Case(lambda f: hugging_face(f, certificate__json=content), "certificate.json", SHOW)


def proved(**changes):
    return proof(PROOF | changes)


CERTIFICATES = {
    "a list": proof([]),
    "null": proof("null"),
    "nothing": proof(""),
    "not UTF-8": proof(b"\xff"),
    "deep": proof("[" * 90_000),
    "a key twice": proof('{"source": 1, "source": 2}'),
    "a reference and no numbers": proof({"source": "x", "sha256": "0", "reference": "transformers"}),
    "layers as a text": proved(largest_difference={"layers": "abc", "logits": 0.1}),
    "layers of text": proved(largest_difference={"layers": ["a"], "logits": 0.1}),
    "no layers": proved(largest_difference={"layers": [], "logits": 0.1}, largest={"layers": [], "logits": 1.0}),
    "layers of another number": proved(largest={"layers": [], "logits": 1.0}),
    "logits as a text": proved(largest_difference={"layers": [0.1], "logits": "small"}),
    "logits as null": proved(largest={"layers": [0.1], "logits": None}),
    "a number of 400 digits": proved(largest={"layers": [0.1], "logits": 10**400}),
    "NaN": proved(largest_difference={"layers": [math.nan], "logits": 0.1})._replace(code=PASSES),
    "inputs as a list": proved(inputs=[64]),
    "a reference of lines": proved(reference="a\nb\x1b[2J"),
    "a source of 1 MB": proved(source="x" * 1_000_000),
    "markup of the library that prints": proved(source="[/nosuch]")._replace(code=PASSES),
    "a SHA-256 that is a list": proved(sha256=[1] * 1000),
    "1 TiB": Case(lambda f: (hugging_face(f), sparse(f / "certificate.json")), "certificate.json", SHOW),
}


# --- PEFT's adapters ------------------------------------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
PAIR = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
LORA = {PAIR.format("A"): (2, 32), PAIR.format("B"): (32, 2)}


def adapter(folder, tensors=None, base=None, settings=None, **changes):
    hugging_face(folder / "base")
    made = ADAPTER | {"base_model_name_or_path": str(folder / "base") if base is None else base} | changes
    write(folder / "adapter_config.json", made if settings is None else settings)
    write(folder / "adapter_model.safetensors", weights(LORA if tensors is None else tensors))


def adapting(tensors=None, **changes):
    return lambda folder: adapter(folder, tensors, **changes)


def base_is_itself(folder):
    adapter(folder, base=str(folder))


def base_is_an_adapter(folder):
    adapter(folder)
    adapter(folder / "base", base=str(folder))


ADAPTERS = {
    "another rank": Case(adapting(r=3), "the model needs floats"),
    "rank 0": Case(adapting(r=0), "'r' is 0"),
    "rank 2^31 - 1": Case(adapting(r=HUGE), "the model needs floats"),
    "rank of an empty tensor": Case(
        adapting({PAIR.format("A"): (0, 32), PAIR.format("B"): (32, 0)}), "the model needs floats"
    ),
    "another width": Case(adapting(LORA | {PAIR.format("A"): (2, 33)}), "the model needs floats"),
    "half a pair": Case(adapting({PAIR.format("A"): (2, 32)}), "is missing"),
    "no pairs": Case(adapting({}), "holds no adapters"),
    "another layer": Case(adapting(LORA | {PAIR.replace("0", "7").format("A"): (2, 32)}), "is no adapter of"),
    "a base that is itself": Case(base_is_itself, "base_model_name_or_path"),
    "a base that is an adapter on it": Case(
        lambda f: (base_is_an_adapter(f), (f / "base" / "config.json").unlink()), "base_model_name_or_path"
    ),
    "a base on the hub": Case(adapting(base="owner/name"), "base_model_name_or_path"),
    "a base that is a list": Case(adapting(base=["a"]), "base_model_name_or_path"),
    "a base with a NUL": Case(adapting(base="a\0b"), "base_model_name_or_path"),
    "a base of 1 MB": Case(adapting(base="a" * 1_000_000), "File name too long"),
    "a base of a stranger": Case(adapting(base="~nobody-of-this-name/x"), "no home folder"),
    "an unknown key": Case(adapting(lora_twist=1), "'lora_twist' is not known"),
    "another method": Case(adapting(peft_type="IA3"), "'peft_type' is 'IA3'"),
    "DoRA": Case(adapting(use_dora=True), "'use_dora' is True"),
    "saved modules": Case(adapting(modules_to_save=["lm_head"]), "'modules_to_save' is"),
    "alpha NaN": Case(adapting(lora_alpha=math.nan), "'lora_alpha' is not a finite number"),
    "alpha as a text": Case(adapting(lora_alpha="4"), "'lora_alpha' is '4'"),
    "dropout 7": Case(adapting(lora_dropout=7.0), "must be from 0 to below 1"),
    "an init of objects": Case(adapting(init_lora_weights={"a": 1}), "'init_lora_weights' is"),
    "patterns of regexes": Case(adapting(rank_pattern={"(a*)*b": 2}), "is not the end of a name"),
    "patterns of text": Case(adapting(rank_pattern={"q_proj": "2"}), "is not the end of a name"),
    "patterns as a list": Case(adapting(rank_pattern=[2]), "'rank_pattern' is"),
    "settings as a list": Case(adapting(settings=[]), "must hold an object"),
    "settings deep": Case(adapting(settings="[" * 90_000), "not valid JSON"),
    "weights as a pickle": Case(
        lambda f: (adapter(f), (f / "adapter_model.safetensors").unlink(), write(f / "adapter_model.bin", payload(f))),
        "adapter_model.safetensors",
    ),
}  # fmt: skip


# --- mistakes in the command --------------------------------------------------------------------------------------------

COMMANDS = {
    "pull nosuch": Case(lambda f: None, "nosuch", ("pull", "nosuch"), OPTION),
    "pull a path": Case(lambda f: None, "", ("pull", f"../{CANARY}"), OPTION),
    "generate nothing": Case(lambda f: None, "there is no such file or folder", ("generate", "{}/none", "a")),
    "generate an empty folder": Case(lambda f: None, "has neither adapter_config.json"),
    "convert onto a folder": Case(
        lambda f: (hugging_face(f), write(f / "made" / "x", "")), "is there already",
        ("convert", "{}", "{}/made", "--to", "hf"), OPTION,
    ),
    "convert onto a file": Case(
        lambda f: (hugging_face(f), write(f / "made", "")), "is there already",
        ("convert", "{}", "{}/made", "--to", "gguf"), OPTION,
    ),
    "convert onto itself": Case(hugging_face, "is there already", ("convert", "{}", "{}", "--to", "qkv"), OPTION),
    "convert below a file": Case(
        hugging_face, "cannot be written", ("convert", "{}", "{}/config.json/x", "--to", "hf", "--no-certificate")
    ),
    "convert below a file, qkv": Case(
        hugging_face, "cannot be written", ("convert", "{}", "{}/config.json/x", "--to", "qkv", "--no-certificate")
    ),
    "convert to another layout": Case(hugging_face, "onnx", ("convert", "{}", "{}-made", "--to", "onnx"), OPTION),
    "convert words that GGUF has not": Case(
        hugging_face, "a GGUF file cannot hold this tokenizer", ("convert", "{}", "{}-made", "--to", "gguf"), OPTION
    ),
    "convert to q8_0 for Hugging Face": Case(
        hugging_face, "q8_0", ("convert", "{}", "{}-made", "--to", "hf", "--dtype", "q8_0"), OPTION
    ),
    "chat without a template": Case(
        lambda f: hugging_face(f, settings={}), "has no chat template and cannot chat", CHAT, OPTION
    ),
    "chat without a tokenizer": Case(
        lambda f: (hugging_face(f), (f / "tokenizer.json").unlink()), "has no tokenizer", CHAT, OPTION
    ),
    "chat with a template that refuses": Case(
        template(REFUSING), "the chat template does not take these messages: not", CHAT, OPTION
    ),
    "generate without a tokenizer": Case(
        lambda f: (hugging_face(f), (f / "tokenizer.json").unlink()), "has no tokenizer", code=OPTION
    ),
    "expand and quantize": Case(
        hugging_face, "exclude each other", (*GENERATE, "--expand", "float32", "--quantize", "int8"), OPTION
    ),
    "quantize to what there is not": Case(hugging_face, "int2", (*GENERATE, "--quantize", "int2"), OPTION),
    "prompts of nothing": Case(
        lambda f: (hugging_face(f), write(f / "p.txt", "\n\n")), "holds no text", ("generate", "{}", "-f", "{}/p.txt")
    ),
    "prompts that are not UTF-8": Case(
        lambda f: (hugging_face(f), write(f / "p.txt", b"\xff")), "not UTF-8", ("generate", "{}", "-f", "{}/p.txt")
    ),
    "a path with a NUL": Case(lambda f: None, "", ("generate", "a\0b", "a")),
    "a path of 1 MB": Case(lambda f: None, "", ("generate", "a" * 1_000_000, "a")),
    "a path of 1 MB, shown": Case(lambda f: None, "", ("show", "a/" * 500_000), FILE),
    "a path with a NUL, shown": Case(lambda f: None, "", ("show", "a\0/b"), FILE),
}  # fmt: skip

ZOO: dict[str, Case] = {
    f"{kind}: {name}": case
    for kind, cases in {
        "safetensors": SAFETENSORS, "index": INDEX, "pickle": PICKLE, "config": CONFIGS, "tokenizer": TOKENIZERS,
        "template": {name: Case(template(source), SAYS, CHAT) for name, source in TEMPLATES.items()},
        "GGUF": {n: c._replace(command=GGUF) if c.command is GENERATE else c for n, c in GGUFS.items()},
        "YAML": YAML, "certificate": CERTIFICATES, "adapter": ADAPTERS, "command": COMMANDS,
    }.items()
    for name, case in cases.items()
}  # fmt: skip

GOOD: dict[str, Case] = {
    "Hugging Face": Case(hugging_face),
    "Hugging Face, chat": Case(hugging_face, command=CHAT),
    "Hugging Face, shown": Case(lambda f: hugging_face(f, certificate__json=PROOF), command=SHOW),
    "Hugging Face, converted": Case(hugging_face, command=CONVERT),
    "shards": Case(sharded({"weight_map": ALL})),
    "qkv": Case(own),
    "run": Case(run_folder),
    "run, shown": Case(run_folder, command=SHOW),
    "GGUF": Case(gguf(), command=GGUF),
    "GGUF, shown": Case(gguf(), command=("show", "{}/x.gguf")),
    "GGUF with scores": Case(words(**SCORES), command=GGUF),
    "adapter": Case(adapter),
    "bos": Case(config(bos_token_id=1), command=("generate", "{}", "", "--max-new-tokens", "3")),
    "rope": Case(rope(rope_type="linear", factor=2.0)),
}
"""What must pass: otherwise all of the above could be refused for what every case has in common."""


# --- trying them ----------------------------------------------------------------------------------------------------

MEMORY = 256 << 20  # bytes beyond those of the process that has imported everything
SECONDS = 20  # until a case is killed


def preload():
    """Everything that a command imports, so that no case pays for it."""
    import torch

    import qkv.checkpoints.named
    import qkv.cli.chat
    import qkv.cli.convert
    import qkv.cli.drawing
    import qkv.cli.generate
    import qkv.cli.pull
    import qkv.cli.show
    import qkv.cost
    import qkv.loading.conversation
    import qkv.loading.convert
    import qkv.loading.layouts
    import qkv.training.recipe  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        hugging_face(Path(folder))
        for command in (GENERATE, SHOW):
            assert run([word.replace("{}", folder) for word in command]) == 0
    gc.freeze()  # what is there now is not touched again, so it need not be copied into each fork


def run(words):
    """The exit code of a command."""
    from qkv.cli import main

    if words[0] != "pickle":
        return main(words)
    import qkv
    from qkv.errors import FileError

    try:
        qkv.load(words[1], allow_pickle=True)
    except FileError as error:
        print(f"qkv: error: {error}", file=sys.stderr)  # noqa: T201 - what `main` would say
        return error.exit_code
    return 0


def child(words, place):
    """The command in a process of its own, with a cap on its memory; does not return."""
    code = 99
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number, name, flags in (
            (0, "stdin", os.O_RDONLY),
            (1, "stdout", os.O_WRONLY | os.O_CREAT),
            (2, "stderr", os.O_WRONLY | os.O_CREAT),
        ):
            os.dup2(os.open(place.with_name(f"{place.name}.{name}"), flags), number)
        os.chdir(place)
        code = run(words)
    except BaseException:  # as Python would end
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt(words, place):
    """Exit code (negative: a signal), seconds of computing, and what was written."""
    place.mkdir(parents=True)
    place.with_name(f"{place.name}.stdin").write_text("hi\n")
    end = time.monotonic() + SECONDS
    pid = os.fork()
    if pid == 0:
        child(words, place)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(pid, 9)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.002)
    shown, said = (place.with_name(f"{place.name}.{x}").read_text(errors="replace") for x in ("stdout", "stderr"))
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "seconds": usage.ru_utime + usage.ru_stime, "stdout": shown[:2000], "stderr": said}


def main():
    """`python -m reliability.zoo JOBS RESULTS`: tries {name: words}, in folders beside the results."""
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    preload()
    made = {name: attempt(command, results.parent / "tried" / str(i)) for i, (name, command) in enumerate(jobs.items())}
    results.write_text(json.dumps(made))


if __name__ == "__main__":
    main()
