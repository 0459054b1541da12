"""What attention is worth: spelling to phonemes, and sentences by their length.

    python benchmarks/translation.py phonemes --json phonemes.json
    python benchmarks/translation.py lengths PATH/fra-eng.zip --json lengths.json --plot lengths.png
    python benchmarks/translation.py dates --json dates.json

`phonemes`: the recipe of that name with attention, without, and as a Transformer of about as many parameters, each
trained for the same number of seconds; phoneme error rate and word accuracy on the held-out tenth, with 4 beams.

`lengths`: English to French, with and without attention, each for the same number of seconds. The pairs of the zip
(tab-separated, in `fra.txt`) are short, so some are joined, several to a text, in training and in the test. Trained on:
each sentence once, and texts of 10 to 60 words, as many words in each span of lengths. Tested by BLEU on others,
by the words of the source. No sentence of the test is trained on.

`dates`: the recipe of that name; exact matches of 1,000 held-out dates, and for how many of the fields of the output
(year, month, day) the attention, summed over the digits of the field, lies most on that field of the input.

To try something else: `--models` takes those whose name holds one of the words, `--dropout` sets every dropout, and
`--set` changes a key of the recipe, as in `--models Transformer --dropout 0 --set optimizer.lr=4e-3`.
"""

import argparse
import dataclasses
import json
import random
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from date_fields import fields_looked_at
from qkv.data import BPETokenizerConfig, TSVConfig
from qkv.generation import BeamConfig
from qkv.loading.facts import Facts
from qkv.loading.translator import Translator
from qkv.models.pairs import PairModelConfig
from qkv.presets.translators import attention_is_all_you_need, bahdanau, fixed_vector
from qkv.tasks import PairDataConfig
from qkv.training import AdamWConfig, RecipeConfig, WSDConfig, read_recipe
from qkv.training.memory import keep_pages
from qkv.training.trainer import Trainer
from qkv.yaml_files import assign

SPANS = ((1, 4), (5, 10), (10, 20), (20, 40), (40, 60))


def trained(recipe: RecipeConfig, seconds: float) -> tuple[Translator, dict[str, Any], list[tuple[str, str]]]:
    """A model after so many seconds of updates; the clock is what its schedule goes by, whatever a step takes."""
    dataset = recipe.data.prepare()
    trainer = Trainer(recipe.resolved(dataset), dataset)
    began, spent = time.monotonic(), 0.0
    while spent < seconds:
        steps = max(trainer.step + 1, int(trainer.step * seconds / spent) if spent else 0)
        trainer.recipe = dataclasses.replace(trainer.recipe, steps=steps)
        trainer.update()
        spent = time.monotonic() - began
    tokens = dataset.tokenizer
    translator = Translator(
        trainer.model.eval(), tokens.source, tokens.target, Facts.of_pairs(tokens.target, recipe.context)
    )
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return translator, {"parameters": parameters, "steps": trainer.step, "seconds": spent}, dataset.held_out


def contestants(arguments: argparse.Namespace, recipes: dict[str, RecipeConfig]) -> dict[str, RecipeConfig]:
    """Those that were asked for, with what was asked to be changed."""
    chosen = {}
    for name, recipe in recipes.items():
        if arguments.models and not any(word in name for word in arguments.models):
            continue
        data = recipe.to_dict()
        for change in arguments.set:
            assign(data, change)
        changed = RecipeConfig.from_dict(data)
        if arguments.dropout is not None:
            assert changed.model is not None
            changed = dataclasses.replace(changed, model=changed.model.with_dropout(arguments.dropout))
        chosen[name] = changed
    return chosen


def edits(a: list[str], b: list[str]) -> int:
    from qkv.tasks.pairs import edit_distance

    return edit_distance(a, b)


# --- phonemes -------------------------------------------------------------------------------------------------------


def equal_transformer(parameters: int) -> PairModelConfig:
    """The Transformer of two layers whose size is nearest."""

    def size(width: int) -> int:
        config = attention_is_all_you_need(width, 2, 4, 4 * width).with_vocabularies(30, 75, shared=False)
        with torch.device("meta"):
            return sum(p.numel() for p in config.build().parameters())

    width = min(range(32, 513, 16), key=lambda width: abs(size(width) - parameters))
    return attention_is_all_you_need(width, 2, 4, 4 * width)


def phonemes(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = read_recipe(Path("phonemes"))
    with torch.device("meta"):
        size = sum(p.numel() for p in bahdanau().with_vocabularies(30, 75, shared=False).build().parameters())
    models = {"with attention": bahdanau(), "one fixed vector": fixed_vector(), "Transformer": equal_transformer(size)}
    recipes = {name: dataclasses.replace(recipe, model=model) for name, model in models.items()}
    results = {}
    print(f"{'':<18}{'parameters':>12}{'steps':>8}{'seconds':>9}{'phoneme errors':>16}{'words right':>13}")
    for name, each in contestants(arguments, recipes).items():
        translator, facts, held_out = trained(each, arguments.seconds)
        pairs = held_out[: arguments.test]
        found = translator.translations([a for a, _ in pairs], search=BeamConfig(beams=4, max_new_tokens=40))
        texts = [best[0].text for best in found]
        wrong = sum(edits(text.split(), target.split()) for text, (_, target) in zip(texts, pairs, strict=True))
        total = sum(len(target.split()) for _, target in pairs)
        right = sum(text == target for text, (_, target) in zip(texts, pairs, strict=True)) / len(pairs)
        results[name] = facts | {"phoneme_error_rate": wrong / total, "word_accuracy": right, "test": len(pairs)}
        size, seconds = facts["parameters"], facts["seconds"]
        print(
            f"{name:<18}{size:>12,}{facts['steps']:>8}{seconds:>9.0f}{wrong / total:>16.2%}{right:>13.2%}", flush=True
        )
    return results


# --- lengths --------------------------------------------------------------------------------------------------------


def sentences(path: Path) -> list[tuple[str, str]]:
    """The pairs, each English sentence once."""
    with zipfile.ZipFile(path) as archive:
        text = archive.read("fra.txt").decode("utf-8").replace("\u202f", " ").replace("\xa0", " ")
    rows = (line.split("\t") for line in text.splitlines())
    return list({row[0]: row[1] for row in rows}.items())


def joined(pairs: list[tuple[str, str]], n: int, low: int, high: int, draw: random.Random) -> list[tuple[str, str]]:
    """`n` texts of `low` to `high` English words, of one sentence or several."""
    texts = []
    while len(texts) < n:
        words, parts, aim = 0, [], draw.randint(low, high)
        while words < aim:
            pair = draw.choice(pairs)
            parts.append(pair)
            words += len(pair[0].split())
        if words <= high:
            texts.append((" ".join(a for a, _ in parts), " ".join(b for _, b in parts)))
    return texts


def lengths(arguments: argparse.Namespace) -> dict[str, Any]:
    from sacrebleu import corpus_bleu

    draw = random.Random(0)
    pairs = sentences(arguments.zip)
    draw.shuffle(pairs)
    test, train = pairs[: len(pairs) // 20], pairs[len(pairs) // 20 :]
    texts = list(train)
    for low, high in SPANS[2:]:
        texts += joined(train, 2 * arguments.words // (low + high), low, high, draw)
    tests = {span: joined(test, arguments.test, *span, draw) for span in SPANS}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.tsv"
        path.write_text("".join(f"{a}\t{b}\n" for a, b in texts), encoding="utf-8")
        data = PairDataConfig(
            source=TSVConfig(path=str(path)),
            tokenizer=BPETokenizerConfig(vocab_size=4000),
            validation=0.01,
            longest=120,
        )
        recipe = RecipeConfig(
            model=bahdanau(256), data=data, steps=10_000, context=121, batch_size=64, precision="float32",
            optimizer=AdamWConfig(lr=4e-3, betas=(0.9, 0.99), weight_decay=0.01), schedule=WSDConfig(decay=0.4),
        )  # fmt: skip
        recipes = {"with attention": recipe, "one fixed vector": dataclasses.replace(recipe, model=fixed_vector(256))}
        for name, recipe in contestants(arguments, recipes).items():
            translator, facts, _ = trained(recipe, arguments.seconds)
            scores = {}
            for (low, high), some in tests.items():
                fits = [pair for pair in some if len(translator.source.encode(pair[0])) <= 121]
                found = translator.translations([a for a, _ in fits], search=BeamConfig(beams=4, max_new_tokens=121))
                hypotheses = [best[0].text for best in found]
                scores[f"{low}-{high}"] = corpus_bleu(hypotheses, [[b for _, b in fits]]).score
            results[name] = facts | {"bleu": scores}
            print(f"{name:<18}", {span: round(score, 1) for span, score in scores.items()}, flush=True)
    if arguments.plot:
        plot(results, arguments.plot)
    return results


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, result in results.items():
        axes.plot(list(result["bleu"]), list(result["bleu"].values()), "o-", label=name)
    axes.set(xlabel="words of the source", ylabel="BLEU", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


# --- dates ----------------------------------------------------------------------------------------------------------


def dates(arguments: argparse.Namespace) -> dict[str, Any]:
    (recipe,) = contestants(arguments, {"dates": read_recipe(Path("dates"))}).values()
    translator, facts, held_out = trained(recipe, arguments.seconds)
    pairs = held_out[: arguments.test]
    found = translator.translations([a for a, _ in pairs])
    exact = sum(best[0].text == b for best, (_, b) in zip(found, pairs, strict=True)) / len(pairs)
    right = {"year": 0, "month": 0, "day": 0}
    for source, target in pairs:
        looked_at = fields_looked_at(translator.align(source, target).weights, source, target)
        for name, found_there in looked_at.items():
            right[name] += found_there == name
    shares = {name: n / len(pairs) for name, n in right.items()}
    print(f"{len(pairs)} held-out dates: {exact:.2%} exact after {facts['seconds']:.0f} s ({facts['steps']} steps)")
    print("the attention lies on the right field:", {name: f"{share:.2%}" for name, share in shares.items()})
    return facts | {"exact": exact, "test": len(pairs), "alignment": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for run, seconds, test in ((phonemes, 300, 11_394), (lengths, 1200, 500), (dates, 30, 1000)):
        verb = verbs.add_parser(run.__name__)
        verb.set_defaults(run=run, models=[])
        if run is not dates:
            verb.add_argument("--models", nargs="+", metavar="WORD")
        if run is lengths:
            verb.add_argument("zip", type=Path)
            verb.add_argument("--plot", type=Path)
            verb.add_argument("--words", type=int, default=300_000, help="to train on in each span of joined texts")
        verb.add_argument("--seconds", type=float, default=seconds, help="of training, for each model")
        verb.add_argument("--test", type=int, default=test, help="texts to measure on")
        verb.add_argument("--json", type=Path)
        verb.add_argument("--dropout", type=float)
        verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    keep_pages()
    results = arguments.run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
