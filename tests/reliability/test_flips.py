"""Every truncation and every flipped bit of a small file of each format: one of our own errors, or another good file.

Never another exception, never a long time, never more memory than `MEMORY`. The zoo (`zoo.py`) holds what a person
would think of; this holds what a disk or a cable does. Where all flips of a format take more than some ten seconds,
they are drawn with a seed (`Format.rest`), but for those of bytes that carry structure, of which every one is tried.
GGUF has its own such tests in `test_gguf.py`, checkpoints in `test_store.py`.
"""

import contextlib
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import qkv
import transly
from qkv.checkpoints import Store, read_folder, read_tensors
from qkv.checkpoints.huggingface import load_model
from qkv.checkpoints.pickled import read_pickled
from qkv.checkpoints.transly import load_transly
from qkv.data import END_OF_TEXT, Tokenizer, template_of, unit_tokenizer
from qkv.errors import FileError, QkvError
from qkv.loading.certificate import read_certificate
from qkv.models.pairs import PairModelConfig
from qkv.yaml_files import parse_yaml
from reliability import zoo

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SECONDS = 2.0  # for one file: a second, and as much again for the checking of signatures
MEMORY = 256 << 20  # bytes of address space beyond what the process has when it begins
SEED = 0


class Format(NamedTuple):
    """A file that is read without an error, and how it is read.

    Attributes:
        make: Writes a folder with the file in it.
        file: Which one is damaged.
        use: All that happens to it, given the folder.
        structure: The places in its content of which every bit is flipped, and up to whose end it is cut everywhere.
        rest: So many bits of the rest, and so many cuts, are drawn with a seed.
    """

    make: Callable[[Path], object]
    file: str
    use: Callable[[Path], object]
    structure: Callable[[bytes], Iterable[int]] = lambda content: range(len(content))
    rest: int = 0


def header_of_safetensors(content):
    return range(8 + int.from_bytes(content[:8], "little"))


def of_pickle(content):
    """The pickle in the zip file; what is around it is of the zip, and zeros to align the data."""
    start = content.index(b"\x80\x02")
    return range(start, content.index(b".PK", start))


def none(content):
    return []


# --- what is read, and how ------------------------------------------------------------------------------------------


def shards(folder):
    zoo.write(folder / "a.safetensors", zoo.weights({"x": (2,), "y": (3,)}))
    zoo.write(folder / "b.safetensors", zoo.weights({"z": (1,)}))
    index = {
        "metadata": {"total_size": 24},
        "weight_map": dict.fromkeys("xy", "a.safetensors") | {"z": "b.safetensors"},
    }
    zoo.write(folder / "model.safetensors.index.json", index)


def pickled(folder):
    torch.save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, folder / "x.bin")


def read_words(folder):
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.encode("ab hi"))
    return tokenizer


BYTES = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": 0, "content": "<s>", "special": True, "lstrip": True, "rstrip": False, "single_word": False,
                      "normalized": False}],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "a"},
                   {"type": "Replace", "pattern": {"String": " "}, "content": "b"}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\w+|\\s"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                       "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "h": 4, "i": 5, "aa": 6}, "merges": ["a b"],
              "byte_fallback": False, "unk_token": None},
}  # fmt: skip


def bytes_level(folder):
    zoo.write(folder / "tokenizer.json", json.dumps(BYTES, separators=(",", ":")))


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>' + m.content|trim + '</s>' }}{% else %}"
    "{% generation %}{{ m['content'][0:3] * 2 }}{% endgeneration %}{% endif %}{% endfor %}"
    "{%- set x = [1, 2] %}{{ x|join('.') ~ x[-1] }}"
)
SHORT = f"""model:
  d_model: 32
  embed: {{type: TokenEmbedder, vocab_size: 7}}
  blocks: [{{type: PreNorm, norm: {{type: RMSNorm}}, sublayers: [{zoo.ATTENTION}, {{type: GLU, d_ff: 32}}]}}]
  final_norm: {{type: RMSNorm}}
  head: {{type: LMHead, tied: true}}
"""
CHAT = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "a hat"}]


def chatty(folder):
    zoo.hugging_face(folder, chat_template__jinja=TEMPLATE)


def render(folder):
    template = template_of(Tokenizer.load(folder))
    return template and template.render_with_spans(CHAT)


def settings(folder):
    source = "{% for m in messages %}{% generation %}{{ m.role }}{{ m.content }}{% endgeneration %}{% endfor %}"
    token = {"content": "</s>", "special": True}
    zoo.hugging_face(folder, settings={"eos_token": token, "bos_token": "a", "chat_template": source})


TABLE = "{type: TokenEmbedder, vocab_size: 3}"
RECURRENT = "encoder: {cell: {type: GRU}, layers: 1}, decoder: {type: Bahdanau}, head: {type: LMHead, tied: false}"
NORMED = "[{{type: PreNorm, norm: {{type: RMSNorm}}, sublayers: [{}]}}]".format
READS = "{type: CrossAttention, n_heads: 1, mask: {type: Full}}"
ATTENDING = f"encoder: {NORMED('{type: FFN}')}, decoder: {NORMED(READS)}"


def run_on_pairs(kind, parts):
    """A run that writes texts for texts."""

    def make(folder):
        recipe = f"model: {{type: {kind}, d_model: 4, source: {TABLE}, target: {TABLE}, {parts}}}"
        model = PairModelConfig.from_dict(parse_yaml(recipe)["model"]).build()
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        zoo.run_folder(folder, recipe, tensors=zoo.weights(shapes))
        words = unit_tokenizer({END_OF_TEXT: 0, "a": 1, "b": 2}, words=False)
        for side in ("source", "target"):
            (folder / side).mkdir()
            words.save(folder / side)

    return make


def write_safetensors(folder):
    header, size = zoo.entries({"a": (2, 3), "b.c": (4,), "d": (0, 5)})
    zoo.write(folder / "x", zoo.safetensors({"__metadata__": {"format": "pt"}} | header, zoo.numbers(size // 4)))


def latest(folder):
    found = Store(folder / "checkpoints").latest()
    return found and found.tensors("model")


STEP = "checkpoints/step-00000001"
FORMATS = {
    "safetensors": Format(write_safetensors, "x", lambda f: read_tensors(f / "x"), header_of_safetensors),
    "safetensors index": Format(shards, "model.safetensors.index.json", read_folder),
    "pickle": Format(pickled, "x.bin", lambda f: read_pickled(f / "x.bin"), of_pickle, 300),
    "tokenizer.json of words": Format(zoo.hugging_face, "tokenizer.json", read_words),
    "tokenizer.json of bytes": Format(bytes_level, "tokenizer.json", read_words),
    "tokenizer_config.json": Format(settings, "tokenizer_config.json", render),
    "chat template": Format(chatty, "chat_template.jinja", render),
    "config.json": Format(zoo.hugging_face, "config.json", load_model),
    "certificate.json": Format(
        lambda f: zoo.write(f / "certificate.json", zoo.PROOF), "certificate.json", read_certificate
    ),
    "adapter_config.json": Format(zoo.adapter, "adapter_config.json", qkv.load),
    "model.yaml": Format(lambda f: zoo.own(f, SHORT), "model.yaml", qkv.load),
    "recipe.yaml": Format(lambda f: zoo.run_folder(f, SHORT), "recipe.yaml", qkv.load, none, 300),
    "recurrent pairs": Format(run_on_pairs("Seq2Seq", RECURRENT), "recipe.yaml", qkv.load, none, 150),
    "attending pairs": Format(run_on_pairs("EncoderDecoder", ATTENDING), "recipe.yaml", qkv.load, none, 150),
    "manifest.json": Format(zoo.run_folder, f"{STEP}/manifest.json", latest),
    "state.json": Format(zoo.run_folder, f"{STEP}/state.json", latest),
    "config.pkl": Format(transly.write_tiny, "config.pkl", load_transly, none, 200),
}  # fmt: skip


# --- damage ---------------------------------------------------------------------------------------------------------


def damaged(content, structure, rest):
    """All truncations, and the flips."""
    draw = random.Random(SEED)
    places = set(structure)
    others = [place for place in range(len(content)) if place not in places]
    cuts = [*places, *draw.sample(others, min(rest, len(others)))]
    flips = [8 * place + bit for place in structure for bit in range(8)]
    flips += draw.sample([8 * place + bit for place in others for bit in range(8)], min(rest, 8 * len(others)))
    for size in cuts:
        yield f"cut to {size}", content[:size]
    for bit in flips:
        made = bytearray(content)
        made[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(made)


@contextlib.contextmanager
def bounded():
    """A cap on the address space, so that an allocation beyond it fails in this process."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", FORMATS)
def test_every_damage_is_refused_or_another_good_file(tmp_path, name):
    kind = FORMATS[name]
    kind.make(tmp_path)
    path = tmp_path / kind.file
    content = path.read_bytes()
    kind.use(tmp_path)
    n, refused, lines = 0, 0, set()
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged checkpoint is passed over with one
        for what, data in damaged(content, list(kind.structure(content)), kind.rest):
            path.write_bytes(data)
            start = time.process_time()
            n += 1
            try:
                kind.use(tmp_path)
            except QkvError as error:
                refused += 1
                lines.add(len(str(error).splitlines()))
            except BaseException as error:
                error.add_note(f"{kind.file}, {what} of {len(content)} bytes")
                raise
            assert time.process_time() - start < SECONDS, what
    assert lines == {1}
    assert refused > n / 3  # most bits matter; another letter in a name does not


ROUNDS = f"encoder: {{type: Repeat, n: 1000000000, pattern: {NORMED('{type: FFN}')}}}, decoder: {NORMED(READS)}"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("Seq2Seq", RECURRENT, RECURRENT.replace("layers: 1", "layers: 1000000000")),
        ("EncoderDecoder", ATTENDING, ROUNDS),
    ],
)
def test_a_run_on_pairs_that_asks_for_a_billion_layers_is_refused_at_once(tmp_path, kind, good, bad):
    run_on_pairs(kind, good)(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace(good, bad))
    start = time.process_time()
    with bounded(), pytest.raises(FileError, match=r"must be from 0 to|asks for 1000000001 layers"):
        qkv.load(tmp_path)
    assert time.process_time() - start < SECONDS
