"""The recurrent translators of the package transly: `model.h5`, which Keras 2 wrote, and vocabularies in `config.pkl`.

They are a bidirectional LSTM encoder and an LSTM decoder with Luong's dot attention, without input feeding. Two things
are Keras's: masked places repeat the last output, and the attention, which is not masked, sees them (`encoder.rests`).
"""

import importlib.util
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, final

import torch

from qkv.checkpoints.families.family import ConfigReader
from qkv.checkpoints.maps import KeyMap, Rule, Transpose, check_fit
from qkv.errors import ConfigError, FileError
from qkv.models.decoders import LuongConfig
from qkv.models.recurrent_encoder import RecurrentEncoderConfig
from qkv.models.seq2seq import Seq2Seq, Seq2SeqConfig
from qkv.nn.additive import DotScoreConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.recurrent import LSTMConfig
from qkv.shapes import Tensor

WEIGHTS, VOCABULARIES = "model.h5", "config.pkl"
_MAX_LENGTH = 1 << 12
_MAX_PICKLE = 1 << 26  # bytes
_GATES = ("kernel", "recurrent_kernel", "bias")

Unit = Literal["character", "word"]


@final
@dataclass(frozen=True)
class TranslyModel:
    """A model with its vocabularies.

    Attributes:
        model: In evaluation mode.
        source: Ids of the source's units.
        target: Ids of the target's units.
        units: What the units of source and target are.
        begin: The id that a target begins with.
        end: The id that ends it, and fills sources.
        longest: Tokens of the longest target, its end included.
    """

    model: Seq2Seq
    source: dict[str, int]
    target: dict[str, int]
    units: tuple[Unit, Unit]
    begin: int
    end: int
    longest: int


def load_transly(folder: Path) -> TranslyModel:
    """Read a folder of the package's `trained_models`. Nothing in it is run.

    Raises:
        FileError: A file is missing, damaged, or of another model; or h5py is not installed.
    """
    path = folder / WEIGHTS
    state, layers = _read(path)
    facts = ConfigReader(_facts(folder / VOCABULARIES), str(folder / VOCABULARIES))
    try:
        config = _config(layers, path)
        names = _keys(layers)
        with torch.device("meta"):
            model = Seq2Seq(config)
    except (ConfigError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise FileError(f"{path}: its layers are none of a transly model ({reason}); get it again") from None
    ours = names.to_ours(state, source=str(path))
    for name, p in model.state_dict().items():
        if ".bias_hh_" in name:  # Keras has one bias, PyTorch two whose sum counts
            ours[name] = torch.zeros(p.shape)
    check_fit(ours, model.state_dict(), source=str(path))
    model.load_state_dict(ours, assign=True)
    source, target = (
        _vocabulary(facts, f"{side}_char2ix", n)
        for side, n in zip(("input", "output"), config.vocabularies, strict=True)
    )
    ends = {key: facts.take(key, int) for key in ("GO_INDEX", "PAD_INDEX")}
    for key, token in ends.items():
        if token not in target.values():
            raise FileError(f"{facts.source}: {key!r} is {token} and the targets have no such id; get the model again")
    return TranslyModel(
        model=model.requires_grad_().eval(),
        source=source,
        target=target,
        units=(_unit(facts, "input_mode"), _unit(facts, "output_mode")),
        begin=ends["GO_INDEX"],
        end=ends["PAD_INDEX"],
        longest=facts.take_positive("max_length_output"),
    )


def _unit(facts: ConfigReader, key: str) -> Unit:
    mode = facts.take(key, str, "character_level")
    if mode not in ("character_level", "word_level"):
        raise FileError(f"{facts.source}: {key!r} is {mode!r}; qkv knows character_level and word_level")
    return "word" if mode == "word_level" else "character"


def _vocabulary(facts: ConfigReader, key: str, n: int | None) -> dict[str, int]:
    found = facts.take(key, dict)
    if sorted(found.values(), key=str) != sorted(range(n or 0), key=str) or not all(type(k) is str for k in found):
        raise FileError(f"{facts.source}: {key!r} must give each of {n} ids to one text; get the model again")
    return found


# --- config.pkl -----------------------------------------------------------------------------------------------------


@final
class _Inert:
    """Stands for whatever the pickle names: it takes all that is handed to it, and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


@final
class _Unpickler(pickle._Unpickler):  # the one in Python: no index in the file makes it allocate
    """Imports and calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """Of every module."""
        return _Inert


def _facts(path: Path) -> dict[str, Any]:
    """The texts, numbers and vocabularies of the pickled dict."""
    try:
        if (size := path.stat().st_size) > _MAX_PICKLE:
            raise FileError(f"{path}: has {size} bytes, more than {_MAX_PICKLE}; give the model's own file")
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        return {key: value for key, value in found.items() if isinstance(value, str | int) or _is_vocabulary(value)}
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except FileError:
        raise
    except Exception as error:  # the unpickler has no fixed set for damage
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise FileError(f"{path}: no pickle of plain data ({reason}); get the model again") from None


def _is_vocabulary(value: Any) -> bool:
    return isinstance(value, dict) and all(type(k) is str and type(i) is int for k, i in value.items())


# --- model.h5 -------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The weights, as `layer/name`, and the configs of the layers."""
    if importlib.util.find_spec("h5py") is None:
        raise FileError(f'{path}: reading HDF5 needs h5py; pip install "qkv[keras]"')
    if not path.is_file():
        raise FileError(f"{path}: no such file; give a folder with {WEIGHTS} and {VOCABULARIES}")
    import h5py

    try:
        with h5py.File(path, "r") as file:
            weights = _arrays(file["model_weights"], path.stat().st_size)
            return weights, _layers(json.loads(cast(bytes, file.attrs["model_config"])))
    except Exception as error:  # h5py has no fixed set for damage
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise FileError(f"{path}: no model that Keras wrote ({reason}); get it again") from None


def _arrays(group: Any, size: int) -> dict[str, Tensor]:
    """All arrays below a group, by their paths; those of a file of `size` bytes, plain float32 that lies in it."""
    arrays = dict[str, Tensor]()
    left = size

    def keep(name: str, item: Any) -> None:
        nonlocal left
        if not hasattr(item, "dtype"):  # a group
            return
        left -= item.nbytes
        if item.is_virtual or item.external or item.chunks or item.dtype.str != "<f4" or left < 0:
            raise ValueError(f"{item.name} is not plain float32 within the file")
        arrays[name] = torch.from_numpy(item[()])

    group.visititems(keep)  # follows no link out of the file
    return arrays


def _layers(config: Any) -> dict[str, dict[str, Any]]:
    """The layers by name: their class and their config."""
    return {
        layer["name"]: {"class_name": layer["class_name"]} | layer["config"] for layer in config["config"]["layers"]
    }


# --- what the layers are --------------------------------------------------------------------------------------------


def _config(layers: dict[str, dict[str, Any]], path: Path) -> Seq2SeqConfig:
    """Our config, from a strict reading of theirs."""
    kinds = {"Embedding": 2, "Bidirectional": 1, "LSTM": 1, "Dot": 2, "TimeDistributed": 2, "Activation": 1}
    found = {kind: _of(layers, kind) for kind in kinds}
    if {kind: len(some) for kind, some in found.items()} != kinds or len(layers) != sum(kinds.values()) + 5:
        raise FileError(f"{path}: its layers are {', '.join(layers)}, not those of a transly model; give one of those")
    (source, target), (dense, out) = found["Embedding"], found["TimeDistributed"]
    pair = _reader(found["Bidirectional"][0], path)
    pair.require("merge_mode", "concat")
    units = _lstm(_reader(pair.take("layer", dict)["config"], path))
    hidden = _lstm(_reader(found["LSTM"][0], path))
    embeds = [_embedding(_reader(layer, path)) for layer in (source, target)]
    readout = _dense(_reader(dense["layer"]["config"], path), "tanh")
    n_target = _dense(_reader(out["layer"]["config"], path), "softmax")
    _require_dots(found["Dot"], path)
    if n_target != embeds[1][0]:
        raise FileError(f"{path}: {n_target} outputs and {embeds[1][0]} target embeddings; get the model again")
    length = layers["input_1"]["batch_input_shape"][1]
    if type(length) is not int or not 0 < length <= _MAX_LENGTH:  # of every source, however short
        raise FileError(f"{path}: its sources have {length!r:.50} places, at most {_MAX_LENGTH}; get the model again")
    cell = LSTMConfig()
    return Seq2SeqConfig(
        d_model=units,
        source=TokenEmbedderConfig(vocab_size=embeds[0][0]),
        target=TokenEmbedderConfig(vocab_size=embeds[1][0]),
        encoder=RecurrentEncoderConfig(cell=cell, d_embed=embeds[0][1], d_hidden=units, rests=length),
        decoder=LuongConfig(
            cell=cell,
            d_embed=embeds[1][1],
            d_hidden=hidden,
            d_readout=readout,
            bridge="copy",
            score=DotScoreConfig(),
            input_feeding=False,
        ),
        head=LMHeadConfig(tied=False, bias=True),
    )


def _of(layers: dict[str, dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [layer for layer in layers.values() if layer["class_name"] == kind]


def _reader(config: dict[str, Any], path: Path) -> ConfigReader:
    return ConfigReader(config, f"{path}: layer {config.get('name')}")


def _lstm(reader: ConfigReader) -> int:
    """Units of an LSTM as we know it."""
    settings = {"activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": True, "return_sequences": True}
    for key, value in (settings | {"go_backwards": False, "stateful": False}).items():
        reader.require(key, value)
    return reader.take_positive("units")


def _embedding(reader: ConfigReader) -> tuple[int, int]:
    reader.require("mask_zero", True)
    return reader.take_positive("input_dim"), reader.take_positive("output_dim")


def _dense(reader: ConfigReader, activation: str) -> int:
    reader.require("activation", activation)
    reader.require("use_bias", True)
    return reader.take_positive("units")


def _require_dots(dots: list[dict[str, Any]], path: Path) -> None:
    for layer, axes in zip(dots, ([2, 2], [2, 1]), strict=True):
        reader = _reader(layer, path)
        reader.require("axes", axes)
        reader.require("normalize", False)


def _keys(layers: dict[str, dict[str, Any]]) -> KeyMap:
    """Where each of their arrays goes. The gates' rows are i, f, g, o in both."""

    def at(layer: str, *names: str) -> tuple[str, ...]:
        return tuple(f"{layer}/{layer}/{name}:0" for name in names)

    def cell(theirs: tuple[str, ...], net: str, suffix: str) -> list[Rule]:
        ours = (f"{net}.weight_ih_{suffix}", f"{net}.weight_hh_{suffix}", f"{net}.bias_ih_{suffix}")
        transposed = [Rule(a, b, Transpose()) for a, b in zip(theirs[:2], ours[:2], strict=True)]
        return [*transposed, Rule(theirs[2], ours[2])]

    def names(kind: str) -> list[str]:
        return [name for name, layer in layers.items() if layer["class_name"] == kind]

    (source, target), (dense, out) = names("Embedding"), names("TimeDistributed")
    (both,), (decoder,) = names("Bidirectional"), names("LSTM")
    inner = layers[both]["layer"]["config"]["name"]
    rules = [
        Rule(at(source, "embeddings")[0], "source.weight"),
        Rule(at(target, "embeddings")[0], "target.weight"),
        *cell(at(both, *(f"forward_{inner}/{part}" for part in _GATES)), "encoder.net.net", "l0"),
        *cell(at(both, *(f"backward_{inner}/{part}" for part in _GATES)), "encoder.net.net", "l0_reverse"),
        *cell(at(decoder, *_GATES), "decoder.net.net", "l0"),
        Rule(at(dense, "kernel")[0], "decoder.readout.weight", Transpose()),
        Rule(at(dense, "bias")[0], "decoder.readout.bias"),
        Rule(at(out, "kernel")[0], "head.weight", Transpose()),
        Rule(at(out, "bias")[0], "head.bias"),
    ]
    return KeyMap(rules, 0)
