"""`qkv eval`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from qkv.cli.opening import Whole
from qkv.config import expand_home
from qkv.errors import ConfigError, FileError

if TYPE_CHECKING:
    from qkv.data import ConversationsConfig, FilesConfig


def evaluate(
    run: Path,
    data: Path | None = None,
    /,
    *,
    beams: Whole = 1,
    length_penalty: float = 1.0,
    conversations: bool = False,
    field: str | None = None,
    as_json: Annotated[bool, Parameter("--json")] = False,
) -> None:
    """Measure a trained model: its loss on a text or on conversations, or its translations of pairs.

    Args:
        run: A run folder, a Hugging Face folder, or a model of the package transly.
        data: A text file, a folder of them, or a JSONL file. For a model of pairs a file with a source, a tab and a
            target in each line; by default the pairs that its run held out.
        beams: For pairs, as in translate.
        length_penalty: For pairs, as in translate.
        conversations: The data are conversations in JSON Lines; what the assistant says is measured.
        field: The key of the text in JSON Lines; by default "text".
        as_json: Print one line of JSON.
    """
    from qkv.translator import is_translator

    if is_translator(run):
        if conversations or field is not None:
            raise ConfigError("--conversations and --field are for language models; leave them out")
        _pairs(run, data, beams, length_penalty, as_json)
        return
    if data is None:
        if not expand_home(run).exists():
            raise FileError(f"{run}: no such folder; give a run")
        raise ConfigError("DATA is missing: give a text file, a folder of them, or a JSONL file")
    if beams != 1 or length_penalty != 1:
        raise ConfigError("--beams and --length-penalty are for models of pairs; leave them out")
    _loss(run, _source(data, conversations, field), as_json)


def _source(data: Path, conversations: bool, field: str | None) -> "FilesConfig | ConversationsConfig":
    from qkv.data import ConversationsConfig, FilesConfig

    if not conversations:
        return FilesConfig(path=str(data)) if field is None else FilesConfig(path=str(data), field=field)
    if field is not None:
        raise ConfigError("--field names the key of a text, and --conversations reads no texts; leave one out")
    return ConversationsConfig(path=str(data))


def _loss(run: Path, data: "FilesConfig | ConversationsConfig", as_json: bool) -> None:
    from qkv.training import evaluate_run

    result = evaluate_run(run, data)
    if as_json:
        print(json.dumps(result))
        return
    rows = [
        ("loss", f"{result['loss']:.4f}", "nats per token"),
        ("perplexity", f"{result['perplexity']:,.2f}", ""),
        ("bits per byte", f"{result['bits_per_byte']:.4f}", ""),
        ("tokens", f"{result['tokens']:,.0f}", ""),
        ("bytes", f"{result['bytes']:,.0f}", ""),
    ]
    for name, value, unit in rows:
        print(f"{name:<14}{value:>14}  {unit}".rstrip())


def _pairs(run: Path, data: Path | None, beams: int, length_penalty: float, as_json: bool) -> None:
    from qkv.generation import BeamConfig
    from qkv.training import evaluate_pairs

    search = BeamConfig(beams=beams, length_penalty=length_penalty, max_new_tokens=200)
    result = evaluate_pairs(run, data, search=search)
    if as_json:
        print(json.dumps(result))
        return
    print("source tokens     pairs     exact   token error rate    BLEU    chrF")
    for part in (result, *result["by_length"]):
        print(_row(part))


def _row(part: dict[str, Any]) -> str:
    span = "all" if "from" not in part else f"{part['from']}-{part['to'] or ''}"
    scores = "".join(f"{part[name]:8.1f}" if name in part else f"{'-':>8}" for name in ("bleu", "chrf"))
    return f"{span:<13}{part['pairs']:>10,}{part['exact']:>10.2%}{part['error_rate']:>19.2%}{scores}"
