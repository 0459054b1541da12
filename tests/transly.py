"""The package transly: trained translators and the pairs they were trained on, and their forward pass in NumPy."""

import csv
import io
import json
import pickle

import h5py
import numpy as np
import pytest

from qkv.errors import FileError
from qkv.fetch import fetch, read_archive

NAME, VERSION = "transly", "0.1.3"
SHA256 = "1865b0564cdeaa91306763208d13d35dd533dc5a8a077cd9b3be4d7712d01929"
MODELS = {
    "en2hi": "transly/transliteration/trained_models/en2hi",
    "hi2en": "transly/transliteration/trained_models/hi2en",
    "cmu": "transly/pronunciation/trained_models/cmu",
}


def unpack(folder):
    """The three models, each in a folder of its name; skips the test where there is no package."""
    try:
        archive = fetch(NAME, VERSION, SHA256)
    except FileError as error:
        pytest.skip(f"{NAME} {VERSION} cannot be had: {error}")
    for name, inside in MODELS.items():
        (folder / name).mkdir()
        for path, data in read_archive(archive, f"{inside}/*"):
            (folder / name / path.rpartition("/")[2]).write_bytes(data)
    return folder


def pairs(file):
    """The pairs of `hi2en.csv` or `cmu.csv`."""
    ((_, data),) = read_archive(fetch(NAME, VERSION, SHA256), file)
    return [tuple(row) for row in csv.reader(io.StringIO(data.decode()))][1:]


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _lstm(x, kernel, recurrent, bias, h, c, valid):
    """Keras: gates i, f, c, o; a masked step keeps the state and repeats the last output, at first 0."""
    out, last = [], np.zeros_like(h)
    for row, counts in zip(x, valid, strict=True):
        if counts:
            i, f, g, o = np.split(row @ kernel + h @ recurrent + bias, 4)
            c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
            h = last = _sigmoid(o) * np.tanh(c)
        out.append(last)
    return np.array(out), h, c


def numpy_logits(file, source, target, length):
    """The logits after each id of `target`, for ids `source` padded with 0 to `length`; float64.

    `file` is an open HDF5 file. Written from the package's `version0.py` and Keras's rules of masking.
    """
    weights = file["model_weights"]

    def at(layer, *names):
        group = weights[layer][layer]
        return [group[f"{name}:0"][()].astype(np.float64) for name in names]

    gates = ("kernel", "recurrent_kernel", "bias")
    ids = np.array([*source, *[0] * (length - len(source))])
    x, valid = at("embedding_1", "embeddings")[0][ids], ids != 0
    forward, backward = (at("bidirectional_1", *(f"{d}_lstm_1/{g}" for g in gates)) for d in ("forward", "backward"))
    zero = np.zeros(forward[1].shape[0])
    ahead, h1, c1 = _lstm(x, *forward, zero, zero, valid)
    behind, h2, c2 = _lstm(x[::-1], *backward, zero, zero, valid[::-1])
    memory = np.concatenate([ahead, behind[::-1]], axis=1)
    y = at("embedding_2", "embeddings")[0][np.array(target)]
    states, _, _ = _lstm(y, *at("lstm_2", *gates), np.concatenate([h1, h2]), np.concatenate([c1, c2]), [True] * len(y))
    scores = np.exp(states @ memory.T)
    context = scores / scores.sum(1, keepdims=True) @ memory
    (w1, b1), (w2, b2) = (at(f"time_distributed_{i}", "kernel", "bias") for i in (1, 2))
    return np.tanh(np.concatenate([context, states], axis=1) @ w1 + b1) @ w2 + b2


TINY = {"source": ["", "<", "a", "b"], "target": ["", "<", "c"]}


def write_tiny(folder, d=2):
    """A model of the package's layout with drawn weights and vocabularies of a few characters."""
    n, m = len(TINY["source"]), len(TINY["target"])
    cell = {"units": d, "activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": True,
            "return_sequences": True, "go_backwards": False, "stateful": False}  # fmt: skip

    def dense(units, activation):
        return {"layer": {"config": {"name": "dense", "units": units, "activation": activation, "use_bias": True}}}

    layers = {
        "input_1": ("InputLayer", {"batch_input_shape": [None, 4]}),
        "embedding_1": ("Embedding", {"input_dim": n, "output_dim": d, "mask_zero": True}),
        "input_2": ("InputLayer", {"batch_input_shape": [None, 4]}),
        "bidirectional_1": ("Bidirectional", {"merge_mode": "concat", "layer": {"config": cell | {"name": "lstm_1"}}}),
        "embedding_2": ("Embedding", {"input_dim": m, "output_dim": d, "mask_zero": True}),
        "concatenate_1": ("Concatenate", {}),
        "concatenate_2": ("Concatenate", {}),
        "lstm_2": ("LSTM", cell | {"units": 2 * d}),
        "dot_1": ("Dot", {"axes": [2, 2], "normalize": False}),
        "attention": ("Activation", {"activation": "softmax"}),
        "dot_2": ("Dot", {"axes": [2, 1], "normalize": False}),
        "concatenate_3": ("Concatenate", {}),
        "time_distributed_1": ("TimeDistributed", dense(d, "tanh")),
        "time_distributed_2": ("TimeDistributed", dense(m, "softmax")),
    }
    config = [{"class_name": kind, "name": name, "config": {"name": name} | c} for name, (kind, c) in layers.items()]
    arrays = {"embedding_1/embedding_1/embeddings:0": (n, d), "embedding_2/embedding_2/embeddings:0": (m, d)}
    for net, h in (("bidirectional_1/bidirectional_1/forward_lstm_1", d), ("lstm_2/lstm_2", 2 * d),
                   ("bidirectional_1/bidirectional_1/backward_lstm_1", d)):  # fmt: skip
        arrays |= {f"{net}/kernel:0": (d, 4 * h), f"{net}/recurrent_kernel:0": (h, 4 * h), f"{net}/bias:0": (4 * h,)}
    for i, (inner, outer) in enumerate([(4 * d, d), (d, m)], start=1):
        name = f"time_distributed_{i}/time_distributed_{i}"
        arrays |= {f"{name}/kernel:0": (inner, outer), f"{name}/bias:0": (outer,)}
    numbers = np.random.default_rng(0)
    with h5py.File(folder / "model.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"config": {"layers": config}}).encode()
        for name, shape in arrays.items():
            file[f"model_weights/{name}"] = numbers.normal(size=shape).astype(np.float32)
    facts = {"PAD_INDEX": 0, "GO_INDEX": 1, "max_length_output": 4, "input_mode": "character_level",
             "output_mode": "character_level", "train_input": np.zeros((1, 2))}  # fmt: skip
    for key, side in (("input", "source"), ("output", "target")):
        facts[f"{key}_char2ix"] = {c: i for i, c in enumerate(TINY[side])}
        facts[f"{key}_ix2char"] = dict(enumerate(TINY[side]))
    (folder / "config.pkl").write_bytes(pickle.dumps(facts, protocol=2))
