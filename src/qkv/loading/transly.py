"""Trained models of the package transly."""

from pathlib import Path

from qkv.data import Tokenizer, unit_tokenizer
from qkv.loading.facts import Facts
from qkv.loading.layout import Options
from qkv.loading.translator import Translator


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
