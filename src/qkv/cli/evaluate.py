"""`qkv eval`."""

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from qkv.errors import ConfigError


def evaluate(
    run: Path,
    data: Path | None = None,
    /,
    *,
    beams: int = 1,
    length_penalty: float = 1.0,
    as_json: Annotated[bool, Parameter("--json")] = False,
) -> None:
    """Measure a trained model: its loss on a text, or its translations of pairs.

    Args:
        run: A run folder, a Hugging Face folder, or a model of the package transly.
        data: A text file, a folder of them, or a JSONL file. For a model of pairs a file with a source, a tab and a
            target in each line; by default the pairs that its run held out.
        beams: For pairs, as in translate.
        length_penalty: For pairs, as in translate.
        as_json: Print one line of JSON.
    """
    from qkv.translator import is_translator

    if is_translator(run):
        _pairs(run, data, beams, length_penalty, as_json)
        return
    if data is None:
        raise ConfigError("DATA is missing: give a text file, a folder of them, or a JSONL file")
    if beams != 1 or length_penalty != 1:
        raise ConfigError("--beams and --length-penalty are for models of pairs; leave them out")
    _text(run, data, as_json)


def _text(run: Path, data: Path, as_json: bool) -> None:
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
