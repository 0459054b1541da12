"""`qkv eval`."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qkv.cli.opening import Whole


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
    """Measure a trained model: its loss on a text, conversations or vectors, or its translations of pairs.

    Args:
        run: A run folder, a Hugging Face folder, or a model of the package transly.
        data: A text file, a folder of them, or a JSONL file. For a model of pairs a file with a source, a tab and a
            target in each line; for one of vectors a .npy file or a folder of them. By default what the run held out.
        beams: For pairs, as in translate.
        length_penalty: For pairs, as in translate.
        conversations: The data are conversations in JSON Lines, of which what the assistant says is measured; of a run
            on conversations that need not be said.
        field: The key of the text in JSON Lines; by default "text".
        as_json: Print one line of JSON.
    """
    from qkv.tasks import Asked
    from qkv.training import evaluate_model

    report = evaluate_model(
        Asked(
            path=run,
            data=data,
            beams=beams,
            length_penalty=length_penalty,
            conversations=conversations,
            field=field,
        )
    )
    print(json.dumps(report.to_dict()) if as_json else report)
