"""Certificates: how far what qkv computes from a checkpoint is from what `transformers` computes from it."""

import hashlib
import json
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, Final

import torch

from qkv.checkpoints.files import read_json
from qkv.checkpoints.huggingface import save_model
from qkv.data.reads import side_by_side
from qkv.errors import FileError
from qkv.loading.encoder import pixels_of
from qkv.models.model import Model
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.models.two_towers import Captioned, TwoTowers
from qkv.nn.embedders import PatchEmbedderConfig
from qkv.nn.positions import LearnedGridConfig
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Tokens

NAME: Final = "certificate.json"
_TOKENS = 64
_FORMULA: Final = "(7919 i² + 104729 i + 1) modulo"
_GRID = (4, 6)  # patches of a picture where the model has no size of its own
_LONGEST = 500  # characters of a text in it
_MOST = 1_500_000_000  # parameters of a model that is computed twice in float32


def certificate(source: Path, model: Model) -> dict[str, Any]:
    """What is known of a model that was read from `source`.

    Args:
        source: Of any layout. A Hugging Face folder is read by `transformers` itself, and of any other it reads what
            qkv writes for it: from a GGUF file it leaves out much, such as scaled rotations.
        model: What qkv made of it, in float32.

    Returns:
        The source and its SHA-256; and, where `transformers` is installed and knows the model, the largest difference
        of the stream after each block and of the logits, on fixed inputs, in float32; else why there is none.
    """
    made: dict[str, Any] = {"source": source.name, "sha256": digest_of(source)}
    n = sum(p.numel() for p in model.parameters())
    if n > _MOST:
        return made | {"reference": None, "reason": f"{n:,} parameters are too many to compute them twice"}
    with tempfile.TemporaryDirectory() as scratch:
        reference = _reference(source, model, Path(scratch) / "it")
        return made | (
            {"reference": None, "reason": reference} if isinstance(reference, str) else _compared(model, reference)
        )


def _compared(model: Model, reference: Any) -> dict[str, Any]:
    if isinstance(model, TwoTowers):
        rule, theirs, their_logits, ours, our_logits = _of_towers(model, reference)
    else:
        assert isinstance(model, Transformer)
        inputs, rule = _fixed(model.config)
        theirs, their_logits = _their_stream(reference, inputs, headless=model.head is None)
        ours, our_logits = _our_stream(model, inputs)
    layers = [float((a - b).abs().max()) for a, b in zip(ours[-len(theirs) :], theirs, strict=True)]
    import transformers

    return {
        "reference": f"transformers {transformers.__version__}",
        "inputs": {"tokens": ours[0].shape[1], "rule": rule},
        "largest_difference": {"layers": layers, "logits": float((our_logits - their_logits).abs().max())},
        "largest": {"layers": [float(x.abs().max()) for x in theirs], "logits": float(their_logits.abs().max())},
    }


def digest_of(source: Path) -> str:
    """The SHA-256 of a file, or of the names and SHA-256s of the files of a folder.

    Raises:
        FileError: A file cannot be read.
    """
    try:
        if source.is_file():
            with source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        lines = [f"{path.name} {digest_of(path)}\n" for path in sorted(source.iterdir()) if path.is_file()]
    except OSError as error:
        raise FileError(f"{source}: cannot be read ({error.strerror}); check its permissions") from None
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_certificate(folder: Path) -> dict[str, Any] | None:
    """The certificate of a folder; None where it has none.

    Raises:
        FileError: It is damaged.
    """
    if not (folder / NAME).is_file():
        return None
    made = read_json(folder / NAME)
    if not _is_certificate(made):
        raise FileError(f"{folder / NAME}: is no certificate; convert the model again, or remove the file")
    return made


def _is_certificate(made: Any) -> bool:
    """Whether all that is shown of it is there: short printable texts, and numbers."""
    match made:
        case {"source": source, "sha256": digest, "reference": None, "reason": reason}:
            return all(map(_is_text, (source, digest, reason)))
        case {
            "source": source,
            "sha256": digest,
            "reference": reference,
            "inputs": {"tokens": tokens},
            "largest_difference": {"layers": [_, *_] as layers, "logits": logits},
            "largest": {"layers": list(sizes), "logits": size},
        }:
            values = (tokens, logits, size, *layers, *sizes)
            texts = (source, digest, reference)
            return len(layers) == len(sizes) and all(map(_is_text, texts)) and all(map(_is_number, values))
    return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def encode(made: dict[str, Any]) -> bytes:
    """The bytes of its file."""
    return (json.dumps(made, indent=2) + "\n").encode()


def _fixed(config: TransformerConfig) -> tuple[Tensor, str]:
    """The inputs, as `transformers` takes them, and how they are made: ids, or a picture (1, C, H, W)."""
    embed, formula = config.embed, _FORMULA
    if not isinstance(embed, PatchEmbedderConfig):
        ids = fixed_ids(embed.to_dict()["vocab_size"], min(_TOKENS, config.context or _TOKENS))
        return ids, f"token i is {formula} the vocabulary"
    grid = embed.position
    rows, columns = (grid.rows, grid.columns) if isinstance(grid, LearnedGridConfig) else _GRID
    shape = 1, embed.channels or 0, rows * embed.patch, columns * embed.patch
    return fixed_ids(256, math.prod(shape)).view(shape) / 128 - 1, f"value i is {formula} 256, / 128 - 1"


def fixed_ids(vocab_size: int, n: int) -> Int[Tensor, "1 n"]:
    """The inputs of a certificate."""
    i = torch.arange(n)
    return ((7919 * i * i + 104_729 * i + 1) % vocab_size)[None]


def _reference(source: Path, model: Model, scratch: Path) -> Any:
    """The model as `transformers` reads it; a text: why it does not."""
    try:
        import transformers
    except ImportError:
        return "transformers is not installed; pip install transformers"
    try:
        place = source if (source / "config.json").is_file() else scratch
        if place is scratch:
            save_model(model, scratch)
        with _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (
                _class_for(place, transformers)
                .from_pretrained(place, dtype=torch.float32, local_files_only=True, attn_implementation="eager")
                .eval()
            )
    except Exception as error:  # another library, on a file that may be of a kind it does not know
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return f"transformers does not read it ({reason})"


def _class_for(place: Path, transformers: Any) -> Any:
    """That of the architecture which a folder names, so that the head is the same; else a language model's."""
    path = place / "config.json"
    names = read_json(path).get("architectures") if path.is_file() else None
    named = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    return named or transformers.AutoModelForCausalLM


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of `transformers`, and its progress bars, of which one cannot be turned off."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _their_stream(model: Any, inputs: Tensor, *, headless: bool) -> tuple[list[Tensor], Float[Tensor, "..."]]:
    """The stream after each block, and what the head makes of it.

    After the last block that of a text is behind the final norm, that of a picture before it.
    """
    with torch.inference_mode():
        out = model(inputs, output_hidden_states=True)
    pooled = out.get("last_hidden_state" if headless else "pooler_output")
    return list(out.hidden_states[1:]), out.get("logits", pooled)


def _our_stream(model: Transformer, inputs: Tensor) -> tuple[list[Tensor], Float[Tensor, "..."]]:
    """The same of ours; a block that is the half of a layer of theirs counts with the other half."""
    embed, tokens = model.config.embed, None
    if isinstance(embed, PatchEmbedderConfig):
        inputs, tokens = side_by_side([pixels_of(inputs[0], embed)])
    with _outputs(model.blocks) as seen, torch.inference_mode():
        x, _ = model.encode(inputs, tokens)
        return seen if isinstance(embed, PatchEmbedderConfig) else [*seen[:-1], x], model.readout(x, tokens)


@contextmanager
def _outputs(blocks: Iterable[Any]) -> Iterator[list[Tensor]]:
    """The streams after blocks, ours or theirs, as they run."""
    seen: list[Tensor] = []

    def see(_: Any, __: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    hooks = [block.register_forward_hook(see) for block in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _of_towers(model: TwoTowers, reference: Any) -> tuple[str, list[Tensor], Tensor, list[Tensor], Tensor]:
    """What both make of a text and a picture: how these are made, then the streams and logits of theirs, and of ours.

    The text ends with the highest id. Streams are those after each block, of texts before those of pictures.
    """
    (pixels, rule), config, embed = _fixed(model.config.picture), model.config.text, model.config.picture.embed
    assert isinstance(embed, PatchEmbedderConfig)
    last = config.embed.to_dict()["vocab_size"] - 1
    ids = fixed_ids(last, config.longest or _TOKENS)
    ids[0, -1] = last
    read = pixels_of(pixels[0], embed)
    told: dict[str, Any] = {"pixel_values": pixels}
    if hasattr(reference.config.vision_config, "num_patches"):  # NaFlex is given patches, pixel by pixel
        values = read.values.unflatten(1, (embed.channels, -1)).transpose(1, 2).flatten(1)[None]
        shapes = torch.tensor([read.grid])
        told = {"pixel_values": values, "pixel_attention_mask": torch.ones(values.shape[:2]), "spatial_shapes": shapes}
    patches, places = side_by_side([read])
    towers = (tower.encoder.layers for tower in (reference.text_model, reference.vision_model))  # it reads either first
    with torch.inference_mode(), _outputs(next(towers)) as of_text, _outputs(next(towers)) as of_picture:
        out = reference(input_ids=ids, **told)
    with torch.inference_mode(), _outputs(model.blocks) as ours:
        logits = model(Captioned(ids, Tokens.full(*ids.shape), patches), places)
    rule = f"{rule}; of the text {_FORMULA} the last id, which comes last"
    return rule, of_text + of_picture, out.logits_per_image, ours, logits
