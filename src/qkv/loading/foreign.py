"""Models of others: folders in Hugging Face's layout, PEFT's adapters, GGUF files, models of transly."""

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from qkv.checkpoints import check_fit, peft
from qkv.checkpoints.files import read_json
from qkv.checkpoints.gguf import load_gguf, open_gguf
from qkv.checkpoints.huggingface import family_of_folder, load_model
from qkv.data import Tokenizer, unit_tokenizer
from qkv.data.gguf_vocabulary import read_vocabulary
from qkv.errors import ConfigError, FileError
from qkv.generation import SamplingConfig
from qkv.loading.encoder import Encoder
from qkv.loading.facts import Facts
from qkv.loading.loaded import Loaded
from qkv.loading.matcher import Matcher
from qkv.loading.processor import read_processor
from qkv.loading.reader import Reader
from qkv.loading.ready import Options, tokenizer_in
from qkv.loading.translator import Translator
from qkv.models.transformer import TransformerConfig
from qkv.models.two_towers import TwoTowers, TwoTowersConfig
from qkv.nn.adapters import adapter_state, add_adapters, load_adapters, merge_adapters
from qkv.nn.embedders import PatchEmbedderConfig
from qkv.yaml_files import expand_home

R = TypeVar("R", bound=Reader)


def open_hugging_face(folder: Path, options: Options) -> Loaded | Encoder | Matcher:
    """The model of a folder in Hugging Face's layout, and its tokenizer.

    Raises:
        FileError: The folder does not fit together, or holds what qkv does not know.
    """
    model, tokenizer = load_model(folder, allow_pickle=options.allow_pickle), tokenizer_in(folder)
    begin, pad = (_special_ids(folder, f"{name}_token_id")[:1] for name in ("bos", "pad"))
    before, after = ((), ()) if tokenizer is None else tokenizer.frame
    begins = len(before) == 1 and not after
    begin = before if begins else begin  # where two files differ, the tokenizer's decides
    words, drawn = (_settings(folder / name) for name in ("tokenizer_config.json", "generation_config.json"))
    side = words.get("padding_side")
    facts = Facts(
        begin_id=begin[0] if begin else None,
        begins=begins,
        stop_ids=_special_ids(folder, "eos_token_id"),
        pad_id=pad[0] if pad else None,
        pad_side=side if side in ("left", "right") else None,
        sampling=_sampling(drawn, folder / "generation_config.json"),
    )
    if isinstance(model, TwoTowers):
        return Matcher(model, tokenizer, replace(facts, **_of_two_towers(folder, model.config, tokenizer, words)))
    if model.config.mask_ahead is None:
        return Loaded.of(model, tokenizer, facts)
    facts = replace(facts, **_of_encoder(folder))
    if isinstance(embed := model.config.embed, PatchEmbedderConfig) and embed.channels in (1, 3):
        facts = replace(facts, pictures=read_processor(folder, embed.channels))
    return Encoder(model, tokenizer, facts)


def _of_encoder(folder: Path) -> dict[str, Any]:
    """What the files of an encoder say of classes, and (sentence-transformers') of one vector for a text."""
    names = read_json(folder / "config.json").get("id2label")
    labels = names if isinstance(names, dict) and set(names) == set(map(str, range(len(names)))) else {}
    pooling = _settings(folder / "1_Pooling" / "config.json")
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
    chosen = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) > 1 or not set(chosen) <= set(modes):
        raise FileError(f"{folder / '1_Pooling'}: pools by {', '.join(chosen)}; qkv knows {' or '.join(modes)}, alone")
    return {
        "labels": tuple(str(labels[str(i)]) for i in range(len(labels))),
        "pool": modes[chosen[0]] if chosen else None,
        "unit": (folder / "modules.json").is_file() and "models.Normalize" in (folder / "modules.json").read_text(),
    }


def _of_two_towers(
    folder: Path, config: TwoTowersConfig, tokenizer: Tokenizer | None, words: Mapping[str, Any]
) -> dict[str, Any]:
    """How pictures are read, and how far texts are filled up: those whose vector is a last token that sees all."""
    embed = config.picture.embed
    channels = embed.channels if isinstance(embed, PatchEmbedderConfig) else None
    known: dict[str, Any] = {"pictures": read_processor(folder, channels) if channels in (1, 3) else None}
    if config.text.mask_ahead is None:
        return known
    pad = words.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    found = tokenizer.inner.token_to_id(pad) if tokenizer is not None and isinstance(pad, str) else None
    said = read_json(folder / "config.json").get("text_config")
    said = said.get("pad_token_id", 1) if isinstance(said, dict) else 1
    return known | {"fill": config.text.longest, "pad_id": said if found is None else found}


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _sampling(drawn: dict[str, Any], path: Path) -> SamplingConfig | None:
    """What a file says about sampling; None where it says nothing, or, with a warning, what nobody can draw by."""
    names = {field.name for field in fields(SamplingConfig)} - {"seed"}
    if drawn.get("do_sample") is False:
        return SamplingConfig(temperature=0)
    if drawn.get("do_sample") is not True:
        return None
    try:
        return SamplingConfig(**{key: drawn[key] for key in names if drawn.get(key) not in (None, 0)})
    except ConfigError as error:
        warnings.warn(f"{path}: nobody can draw tokens in this way ({error}); they are drawn as usual", stacklevel=2)
        return None


def _special_ids(folder: Path, key: str) -> tuple[int, ...]:
    """Ids that the folder names: one, a list, or none. What is said about generation comes first."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file() and (found := _ids(read_json(path), key, path)):
            return found
    return ()


def _ids(data: Mapping[str, Any], key: str, path: Path) -> tuple[int, ...]:
    match data.get(key):
        case None:
            return ()
        case bool():
            pass
        case int(value):
            return (value,)
        case list(values) if all(type(item) is int for item in values):
            return tuple(values)
    raise FileError(f"{path}: {key!r} is {data[key]!r} and must be an integer or a list of them; fix the file")


def open_peft(folder: Path, options: Options) -> Loaded:
    """The model that a folder of PEFT's adapters belongs to, with them merged into its weights.

    Raises:
        FileError: The model is not there, or the adapters do not fit it.
    """
    start = read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    if not isinstance(start, str) or not (expand_home(start) / "config.json").is_file():
        raise FileError(
            f"{folder / peft.CONFIG}: 'base_model_name_or_path' is {start!r} and must be the folder of the model that "
            "the adapters belong to, in Hugging Face's layout; fix it"
        )
    base = open_hugging_face(expand_home(start), Options(options.open))
    if not isinstance(base, Loaded):
        raise FileError(f"{folder}: belongs to {base.what}, {start}, and qkv reads adapters of language models")
    family, _ = family_of_folder(expand_home(start))
    return merged(base, peft.read_adapter(folder, family, base.config), str(folder))


def merged(base: R, adapter: peft.Adapter, source: str) -> R:
    """The same model with adapters merged into its weights, in float32.

    Raises:
        FileError: They do not fit it.
    """
    model = base.model.float()
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        add_adapters(model, adapter.config)
    check_fit(adapter.state, adapter_state(model), source=source)
    load_adapters(model, adapter.state)
    merge_adapters(model)
    return base


def open_gguf_file(path: Path, options: Options) -> Loaded:
    """The model of a GGUF file, and its tokenizer.

    Raises:
        FileError: The file breaks a rule of the format, or holds what qkv does not know.
    """
    opened = open_gguf(path)
    words = read_vocabulary(opened.metadata, source=str(path))  # first: much of what it takes is free again then
    opened.metadata.clear()
    facts = Facts(begin_id=words.begin_id, begins=words.add_begin, stop_ids=words.stop_ids)
    return Loaded.of(load_gguf(opened, dtype=options.dtype), words.tokenizer, facts)


def read_gguf_config(path: Path) -> TransformerConfig:
    """The config of a GGUF file's model. Errors as for `open_gguf_file`."""
    return open_gguf(path).config


def open_transly(folder: Path, options: Options) -> Translator:
    """The translator of a folder of transly's `trained_models`.

    Raises:
        FileError: A file is missing or damaged, or of another model; or h5py is not installed.
    """
    from qkv.checkpoints.transly import load_transly  # nothing else needs it

    found = load_transly(folder)

    def tokenizer(vocabulary: dict[str, int], unit: str) -> Tokenizer:
        names = {token: name for name, token in vocabulary.items()}
        return unit_tokenizer(vocabulary, words=unit == "word", special=(names[found.end], names[found.begin]))

    source, target = tokenizer(found.source, found.units[0]), tokenizer(found.target, found.units[1])
    longest = found.model.config.longest
    facts = Facts(begin_id=found.begin, stop_ids=(found.end,), longest=longest, longest_target=found.longest)
    return Translator(found.model, source, target, facts)
