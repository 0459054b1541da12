"""How good translations are, against those that people made."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkv.config import expand_home
from qkv.data import PairDataConfig, PairTokenizer, TSVConfig, prepare_pairs
from qkv.data.pairs import TextPair
from qkv.errors import ConfigError, FileError
from qkv.generation import BeamConfig
from qkv.training.run import RECIPE, Run
from qkv.training.trainer import fingerprint
from qkv.translator import Translator, load_translator

LENGTHS = ((1, 5), (6, 10), (11, 20), (21, 40), (41, None))
"""Tokens of a source, in ranges for which the numbers are given apart."""


def evaluate_pairs(run: Path, data: Path | None, *, search: BeamConfig, batch_size: int = 64) -> dict[str, Any]:
    """Exact matches, token error rate, BLEU and chrF of the best translations, and all that by source length.

    Args:
        run: A run folder, or a model of the package transly.
        data: Pairs, as for `TSVConfig`; None: those that the run held out.
        search: How to translate.
        batch_size: Texts that are read at once.

    Returns:
        `pairs`, `exact` (the share without an edit), `error_rate` (edits of target tokens by tokens of the references:
        characters, phonemes or what the tokenizer makes; one that it does not know is an edit), `bleu` and `chrf` (0 to
        100; left out where sacrebleu is not installed), and `by_length`, a list of the same with `from` and `to`.

    Raises:
        FileError: The folder or the pairs cannot be read.
        ConfigError: There is no data and the run held out none.
    """
    run = expand_home(run)
    translator = load_translator(run)
    pairs = _held_out(run, translator) if data is None else list(TSVConfig(path=str(data)).pairs())
    if not pairs:
        raise FileError(f"{data}: holds no pair; give a file with a source, a tab and a target in each line")
    found = translator.translations([source for source, _ in pairs], search=search, batch_size=batch_size)
    texts = [best[0].text for best in found]
    references = [target for _, target in pairs]
    units = translator.target.units(references)
    edits = [edit_distance(a, b) for a, b in zip(translator.target.units(texts), units, strict=True)]
    sizes = [len(ids) for ids in translator.source.encode_batch([source for source, _ in pairs])]
    lengths = list(map(len, units))

    def measured(rows: Sequence[int]) -> dict[str, Any]:
        some, wanted = [texts[i] for i in rows], [references[i] for i in rows]
        return {
            "pairs": len(rows),
            "exact": sum(edits[i] == 0 for i in rows) / len(rows),
            "error_rate": sum(edits[i] for i in rows) / max(1, sum(lengths[i] for i in rows)),
        } | _corpus_scores(some, wanted)

    by_length = []
    for low, high in LENGTHS:
        if rows := [i for i, n in enumerate(sizes) if low <= n <= (math.inf if high is None else high)]:
            by_length.append({"from": low, "to": high} | measured(rows))
    return measured(range(len(pairs))) | {"by_length": by_length}


def _held_out(run: Path, translator: Translator) -> list[TextPair]:
    """The pairs that a run held out and did not leave out for their length."""
    if not (run / RECIPE).exists():
        raise ConfigError(
            f"{run}: is no run and held out nothing; give DATA, a file with a source, a tab and a target a line"
        )
    data = Run.saved_recipe(run).data
    if not isinstance(data, PairDataConfig):
        raise ConfigError(
            f"{run}: was not trained on pairs; give DATA, a file with a source, a tab and a target a line"
        )
    dataset = prepare_pairs(data, PairTokenizer(translator.source, translator.target))
    checkpoint = Run(run, keep=1).store.latest()
    if checkpoint is None or checkpoint.state.get("data") != fingerprint(dataset.train):
        raise FileError(
            f"{run}: its corpus is another one than it was trained on, so that nothing is known to be held out; put it "
            "back as it was, or give DATA"
        )
    return dataset.held_out


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """How many tokens must be put in, taken out or changed to make one of the other (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _corpus_scores(texts: list[str], references: list[str]) -> dict[str, float]:
    try:
        from sacrebleu import corpus_bleu, corpus_chrf
    except ImportError:
        warnings.warn('no BLEU and chrF: sacrebleu is not installed; pip install "qkv[translation]"', stacklevel=3)
        return {}
    # Short targets have no four words in a row; effective order counts what there is.
    bleu = corpus_bleu(texts, [references], use_effective_order=True)
    return {"bleu": bleu.score, "chrf": corpus_chrf(texts, [references]).score}
