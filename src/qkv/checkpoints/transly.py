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

from qkv.checkpoints.families.config_reader import ConfigReader
from qkv.checkpoints.files import brief, file_size
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

Unit = Literal["character", "word"]


@final
@dataclass(frozen=True)
class TranslyModel:
    """A model in evaluation mode, with the ids of the units of source and target.

    A target begins with the id `begin` and ends with `end`, which also fills sources; the longest has `longest` tokens,
    its end included.
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
    state, length = _read(path)
    facts = ConfigReader(_facts(folder / VOCABULARIES), str(folder / VOCABULARIES))
    ours = _KEYS.to_ours(state, source=str(path))
    try:
        config = _config(ours, length)
        with torch.device("meta"):
            model = Seq2Seq(config)
    except (ConfigError, RuntimeError, IndexError, ValueError) as error:
        raise FileError(f"{path}: its weights are none of a transly model ({brief(error)}); get it again") from None
    for name, p in model.state_dict().items():
        if ".bias_hh_" in name:  # Keras has one bias, PyTorch two whose sum counts
            ours[name] = torch.zeros(p.shape)
    check_fit(ours, model.state_dict(), source=str(path))
    model.load_state_dict(ours, assign=True)
    source, target = (
        _vocabulary(facts, key, n)
        for key, n in zip(("input_char2ix", "output_char2ix"), config.vocabularies, strict=True)
    )
    begin, end = (facts.take(key, int) for key in ("GO_INDEX", "PAD_INDEX"))
    if not {begin, end} <= set(target.values()):
        raise FileError(f"{facts.source}: 'GO_INDEX' is {begin}, 'PAD_INDEX' {end}, and targets lack one; get it again")
    return TranslyModel(
        model=model.requires_grad_().eval(),
        source=source,
        target=target,
        units=(_unit(facts, "input_mode"), _unit(facts, "output_mode")),
        begin=begin,
        end=end,
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
    """What the pickle names becomes this: it takes all that is handed to it, and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


@final
class _Unpickler(pickle._Unpickler):  # the one in Python: no index in the file makes it allocate
    """Imports and calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert


def _facts(path: Path) -> dict[str, Any]:
    """The texts, numbers and vocabularies of the pickled dict."""
    if (size := file_size(path)) > _MAX_PICKLE:
        raise FileError(f"{path}: has {size} bytes, more than {_MAX_PICKLE}; give the model's own file")

    def is_plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(type(key) is str and type(item) is int for key, item in value.items())
        return isinstance(value, str | int)

    try:
        with path.open("rb") as file:
            return {key: value for key, value in _Unpickler(file).load().items() if is_plain(value)}
    except Exception as error:  # the unpickler has no fixed set for damage
        raise FileError(f"{path}: no pickle of plain data ({brief(error)}); get the model again") from None


# --- model.h5 -------------------------------------------------------------------------------------------------------


_LAYERS = ["Embedding", "Bidirectional", "Embedding", "LSTM", "Dot", "Activation", "Dot"] + ["TimeDistributed"] * 2


def _read(path: Path) -> tuple[dict[str, Tensor], int]:
    """The weights, as `layer/name:0`, and the places of every source."""
    if importlib.util.find_spec("h5py") is None:
        raise FileError(f'{path}: reading HDF5 needs h5py; pip install "qkv[keras]"')
    if not path.is_file():
        raise FileError(f"{path}: no such file; give a folder with {WEIGHTS} and {VOCABULARIES}")
    import h5py

    try:
        with h5py.File(path, "r") as file:
            weights = _arrays(file["model_weights"], path.stat().st_size)
            layers = json.loads(cast(bytes, file.attrs["model_config"]))["config"]["layers"]
            kinds = [layer["class_name"] for layer in layers]
            if [kind for kind in kinds if kind not in ("InputLayer", "Concatenate")] != _LAYERS:
                raise ValueError(f"its layers are {', '.join(kinds)}")
            length = next(layer for layer in layers if layer["name"] == "input_1")["config"]["batch_input_shape"][1]
            if type(length) is not int or not 0 < length <= _MAX_LENGTH:
                raise ValueError(f"its sources have {length!r:.50} places, at most {_MAX_LENGTH}")
            return weights, length
    except Exception as error:  # h5py has no fixed set for damage
        raise FileError(f"{path}: no model that Keras wrote ({brief(error)}); get it again") from None


def _arrays(group: Any, size: int) -> dict[str, Tensor]:
    """The arrays of the layers: plain float32 that lies in the file, which has `size` bytes."""
    items = dict[str, Any]()
    group.visititems(items.__setitem__)  # follows no link out of the file
    arrays = {name: item for name, item in items.items() if hasattr(item, "dtype")}  # the others are groups
    for item in arrays.values():
        if item.is_virtual or item.external or item.chunks or item.dtype.str != "<f4":
            raise ValueError(f"{item.name} is not plain float32 within the file")
    if (needed := sum(item.nbytes for item in arrays.values())) > size:
        raise ValueError(f"its arrays take {needed} bytes of {size}")
    return {name.partition("/")[2]: torch.from_numpy(item[()]) for name, item in arrays.items()}


# --- what the weights are -------------------------------------------------------------------------------------------


def _config(weights: dict[str, Tensor], length: int) -> Seq2SeqConfig:
    """Our config: what the package has built, in the sizes of our weights."""
    (n_source, d_source), (n_target, d_target) = (weights[f"{side}.weight"].shape for side in ("source", "target"))
    units, hidden = (weights[f"{part}.net.net.weight_hh_l0"].shape[1] for part in ("encoder", "decoder"))
    cell = LSTMConfig()
    return Seq2SeqConfig(
        d_model=units,
        source=TokenEmbedderConfig(vocab_size=n_source),
        target=TokenEmbedderConfig(vocab_size=n_target),
        encoder=RecurrentEncoderConfig(cell=cell, d_embed=d_source, d_hidden=units, rests=length),
        decoder=LuongConfig(
            cell=cell,
            d_embed=d_target,
            d_hidden=hidden,
            d_readout=len(weights["decoder.readout.bias"]),
            bridge="copy",
            score=DotScoreConfig(),
            input_feeding=False,
        ),
        head=LMHeadConfig(tied=False, bias=True),
    )


def _cell(theirs: str, net: str, suffix: str) -> list[Rule]:
    """The gates' rows are i, f, g, o in both."""
    return [
        Rule(f"{theirs}/kernel:0", f"{net}.net.net.weight_ih_{suffix}", Transpose()),
        Rule(f"{theirs}/recurrent_kernel:0", f"{net}.net.net.weight_hh_{suffix}", Transpose()),
        Rule(f"{theirs}/bias:0", f"{net}.net.net.bias_ih_{suffix}"),
    ]


def _dense(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}/kernel:0", f"{ours}.weight", Transpose()), Rule(f"{theirs}/bias:0", f"{ours}.bias")]


_KEYS = KeyMap(
    [
        Rule("embedding_1/embeddings:0", "source.weight"),
        Rule("embedding_2/embeddings:0", "target.weight"),
        *_cell("bidirectional_1/forward_lstm_1", "encoder", "l0"),
        *_cell("bidirectional_1/backward_lstm_1", "encoder", "l0_reverse"),
        *_cell("lstm_2", "decoder", "l0"),
        *_dense("time_distributed_1", "decoder.readout"),
        *_dense("time_distributed_2", "head"),
    ],
    n_layers=0,
)
"""Where each of their arrays goes."""
