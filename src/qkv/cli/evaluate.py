"""`qkv eval`."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def evaluate(run: Path, data: Path, /, *, as_json: Annotated[bool, Parameter("--json")] = False) -> None:
    """Measure a trained model on a text.

    Args:
        run: A run folder, or a Hugging Face folder.
        data: A text file, a folder of them, or a JSONL file.
        as_json: Print one line of JSON.
    """
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
