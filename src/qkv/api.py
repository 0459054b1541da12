"""A trained model from a folder, ready to write."""

import warnings
from pathlib import Path

import torch

from qkv.checkpoints import Store, check_fit
from qkv.checkpoints.huggingface import load_model, read_json
from qkv.config import read_yaml
from qkv.data import ChatTemplate, Tokenizer
from qkv.errors import ConfigError, FileError
from qkv.loaded import Loaded
from qkv.models.transformer import Repeat, Transformer, TransformerConfig
from qkv.nn.embedders import TokenEmbedderConfig

_RECIPE = "recipe.yaml"
_MAX_SHARED = 1000  # applications of blocks that share weights; the file of a stranger may ask for any number


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> Loaded:
    """A model from a folder: a run of `qkv train` (its newest whole checkpoint), or one in Hugging Face's layout.

    Args:
        path: The folder.
        device: Where the weights go.
        dtype: Type of the weights; None: that of the file.
        allow_pickle: Also read weights that are pickled (`pytorch_model.bin`), with `weights_only`.

    Raises:
        FileError: The folder is neither, has no checkpoint yet, or does not fit together.
    """
    folder = Path(path).expanduser()
    if (folder / _RECIPE).is_file():
        loaded = _load_run(folder)
    elif (folder / "config.json").is_file():
        loaded = _load_hugging_face(folder, allow_pickle)
    elif folder.is_dir():
        raise FileError(
            f"{folder}: has neither {_RECIPE} (a run) nor config.json (Hugging Face); give a folder with one"
        )
    else:
        raise FileError(f"{folder}: there is no such folder; give a run or a folder in Hugging Face's layout")
    _check_vocabulary(loaded, folder)
    loaded.model.to(device=device, dtype=dtype)
    return loaded


def _load_run(folder: Path) -> Loaded:
    config = _run_config(folder / _RECIPE)
    checkpoint = Store(folder / "checkpoints").latest()
    if checkpoint is None:
        raise FileError(f"{folder}: the run has no checkpoint yet; go on with it, or wait for its first one")
    for warning in checkpoint.warnings:
        warnings.warn(warning, stacklevel=3)
    state = checkpoint.tensors("model")
    with torch.device("meta"):
        model = _build(config, len(state), folder / _RECIPE)
    check_fit(state, model.state_dict(), source=str(checkpoint.path))
    model.load_state_dict(state, assign=True)
    tokenizer = _tokenizer(folder)
    stop = () if tokenizer is None or tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    return Loaded(model.requires_grad_().eval(), tokenizer, config, stop, template=_template(tokenizer))


def _run_config(path: Path) -> TransformerConfig:
    try:
        data = read_yaml(path)
        if not isinstance(data, dict) or "model" not in data:
            raise ConfigError("it has no 'model'")
        return TransformerConfig.from_dict(data["model"], path="model")
    except ConfigError as error:
        raise FileError(f"{path}: not the recipe of a run: {error}") from None


def _build(config: TransformerConfig, n_tensors: int, source: Path) -> Transformer:
    parts = config.blocks if isinstance(config.blocks, tuple) else (config.blocks,)
    depth = sum(
        part.n * (len(part.pattern) if isinstance(part.pattern, tuple) else 1) if isinstance(part, Repeat) else 1
        for part in parts
    )
    if depth > max(n_tensors, _MAX_SHARED):  # before anything of that size is built
        raise FileError(f"{source}: asks for {depth} blocks and there are {n_tensors} tensors of weights; mend 'model'")
    try:
        return config.build()
    except (ConfigError, RuntimeError, TypeError) as error:  # the latter two: sizes beyond what a tensor can have
        raise FileError(f"{source}: the model cannot be built: {str(error).splitlines()[0]}") from None


def _load_hugging_face(folder: Path, allow_pickle: bool) -> Loaded:
    model = load_model(folder, allow_pickle=allow_pickle)
    stop = _special_ids(folder, "eos_token_id")
    begin = _special_ids(folder, "bos_token_id")
    tokenizer = _tokenizer(folder)
    return Loaded(model, tokenizer, model.config, stop, begin[0] if begin else None, _template(tokenizer))


def _special_ids(folder: Path, key: str) -> tuple[int, ...]:
    """Ids that the folder names: one, a list, or none. What is said about generation comes first."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = read_json(path).get(key) if path.is_file() else None
        match value:
            case None:
                continue
            case bool():
                pass
            case int():
                return (value,)
            case list() if all(type(item) is int for item in value):
                return tuple(value)
        raise FileError(f"{path}: {key!r} is {value!r} and must be an integer or a list of them; mend the file")
    return ()


def _tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None


def _template(tokenizer: Tokenizer | None) -> ChatTemplate | None:
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    ids = (tokenizer.begin_of_text, tokenizer.end_of_text)
    bos, eos = ("" if token is None else tokenizer.name_of(token) for token in ids)
    return ChatTemplate(tokenizer.chat_template, bos=bos, eos=eos)


def _check_vocabulary(loaded: Loaded, folder: Path) -> None:
    embed = loaded.config.embed
    if loaded.tokenizer is None or not isinstance(embed, TokenEmbedderConfig) or embed.vocab_size is None:
        return
    if loaded.tokenizer.vocab_size > embed.vocab_size:
        raise FileError(
            f"{folder}: the tokenizer has {loaded.tokenizer.vocab_size} tokens and the model {embed.vocab_size}; "
            "put the tokenizer there that belongs to the model"
        )
