"""Encoders that learn from masked texts: from nothing and from others' weights, resumed, measured, used."""

import json
import shutil

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

import qkv
from qkv.cli import main
from qkv.data import IGNORE
from qkv.errors import ConfigError
from qkv.loading.encoder import Encoder
from qkv.loading.layouts import load_plain
from qkv.masks import Full
from qkv.tasks import Start, evaluate
from qkv.training import session, train
from qkv.training.recipe import RecipeConfig
from runs import fast, recipe_data, write_corpus  # noqa: F401 - a fixture
from tiny import tiny_config
from tolerances import FLOAT32

pytestmark = pytest.mark.usefixtures("fast")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    *SPECIAL,
    *"abcdefghijklmnopqrstuvwxyz",
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "and",
    "saw",
    "two",
    "birds",
    "fly",
    "over",
    "old",
    ".",
]


def masked(corpus, **changes):
    """A recipe of 12 steps; characters are tokens."""
    model = tiny_config(mask=Full(), layers=1).replace(head=None).to_dict()
    model["embed"]["vocab_size"] = None
    made = recipe_data(corpus, model=model, steps=12, save_every=6, evaluate_every=6)
    return made | {"data": {"type": "MaskedData"} | made["data"]} | changes


def from_start(corpus, folder, **changes):
    made = masked(corpus, start={"path": str(folder)}, **changes)
    del made["model"], made["data"]["tokenizer"]
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QKV_CACHE", str(folder / "cache"))
        patch.setattr(session, "matmul_peak", lambda *_: 1e12)
        assert train(masked(corpus, sample={"prompt": "the [MASK]at", "tokens": 9}), out=folder / "run") == 0
    return folder / "run"


def make_bert(folder, kind="BertForMaskedLM"):
    """A tiny BERT as transformers writes it, with a tokenizer of words."""
    inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.add_special_tokens(SPECIAL)
    inner.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=20,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def test_a_run_learns_and_guesses(run, capsys):
    loaded = qkv.load(run)
    assert isinstance(loaded, Encoder)
    (guesses,) = loaded.fill("the [MASK]at", top=3)
    assert len(guesses) == 3
    assert sum(guess.probability for guess in guesses) <= 1
    assert loaded.embed(["the cat", "a"]).shape == (2, 16)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["validation_loss"] < lines[0]["loss"] - 0.15
    assert lines[-1]["perplexity"] == pytest.approx(torch.tensor(lines[-1]["validation_loss"]).exp().item(), rel=1e-5)
    assert 0 < lines[-1]["accuracy"] < 1
    assert "the [" in (run / "samples.txt").read_text()
    assert main(["eval", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loss"] == pytest.approx(lines[-1]["validation_loss"], rel=1e-5)
    assert report["accuracy"] == lines[-1]["accuracy"]
    assert main(["fill", str(run), "the [MASK]at"]) == 0
    assert guesses[0].label in capsys.readouterr().out


def test_it_is_measured_on_other_texts(run, corpus, capsys, tmp_path):
    for data in (corpus, corpus):
        assert main(["eval", str(run), str(data), "--json"]) == 0
    first, again = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == again
    assert 0.14 < first["tokens"] / len(corpus.read_text()) < 0.16
    (tmp_path / "empty.txt").write_text("")
    assert main(["eval", str(run), str(tmp_path / "empty.txt")]) == 3
    assert "there is no text in it" in capsys.readouterr().err


def test_a_stopped_run_goes_on_bit_for_bit(run, corpus, tmp_path):
    again, made = tmp_path / "again", masked(corpus, sample={"prompt": "the [MASK]at", "tokens": 9})
    shutil.copytree(run, again)
    shutil.rmtree(max((again / "checkpoints").iterdir()))  # as if it had been stopped after step 6
    train(made, out=again, resume=True)
    for a, b in zip(qkv.load(again).model.parameters(), qkv.load(run).model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_loss_is_that_of_transformers(corpus, tmp_path):
    theirs = make_bert(tmp_path)
    recipe = RecipeConfig.from_dict(from_start(corpus, tmp_path, context=20))
    base = load_plain(tmp_path, print)
    task = recipe.data.prepare(Start(str(tmp_path), base))
    _, held_out = task.batches(recipe.resolved(task, base.config))
    total, count = 0.0, 0
    for i in range(len(held_out)):
        batch = held_out.batch(0, i)
        for ids, targets, segments in zip(batch.inputs, batch.targets, batch.tokens.segment, strict=True):
            for number in range(1, int(segments.max()) + 1):  # they know no packed rows
                own = segments == number
                if (n := int((targets[own] != IGNORE).sum())) > 0:
                    total += theirs(ids[None, own], labels=targets[None, own]).loss.item() * n
                    count += n
    found = evaluate(base.model, held_out)
    assert (found.tokens, found.loss) == (count, pytest.approx(total / count, abs=10 * FLOAT32))
    assert count > 5


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel"])
def test_others_weights_are_trained_on(kind, corpus, tmp_path, capsys):
    theirs = make_bert(tmp_path, kind)
    made = from_start(corpus, tmp_path, steps=1, optimizer={"lr": 1e-30}, sample={"tokens": 9})
    assert train(made, out=tmp_path / "run") == 0
    tuned = qkv.load(tmp_path / "run")
    assert tuned.tokenizer.mask == 4
    kept = "head." if kind == "BertModel" else "nothing"  # a model without a head is given one
    before = {name: p for name, p in qkv.load(tmp_path).model.named_parameters() if not name.startswith("head.")}
    for name, p in tuned.model.named_parameters():
        assert name.startswith(kept) or name not in before or torch.equal(p, before[name]), name
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert main(["eval", str(tmp_path / "hf"), str(corpus)]) == 0  # it is known by its head
    assert main(["eval", str(tmp_path / "hf")]) == 2
    assert "DATA is missing: give a text file" in capsys.readouterr().err
    back = transformers.BertForMaskedLM.from_pretrained(tmp_path / "hf")
    if kind == "BertForMaskedLM":
        ids = torch.tensor([[2, 31, 4, 33, 3]])
        torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=0, atol=10 * FLOAT32)
    assert "[" in (tmp_path / "run" / "samples.txt").read_text()


def test_adapters_beside_frozen_weights(corpus, tmp_path):
    make_bert(tmp_path)
    adapter = {"rank": 2, "targets": ["q", "v"]}
    assert train(from_start(corpus, tmp_path, adapter=adapter), out=tmp_path / "run") == 0
    tuned, base = qkv.load(tmp_path / "run"), qkv.load(tmp_path)
    assert isinstance(tuned, Encoder)
    pairs = zip(tuned.model.named_parameters(), base.model.parameters(), strict=True)
    assert {name for (name, p), q in pairs if not torch.equal(p, q)} == {"blocks.0.sublayers.attention.qkv_proj.weight"}
    assert main(["eval", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.share": 0.0}, "share=0 leaves nothing to guess"),
        ({"data.share": 1.0}, "share"),
        ({"data.hidden": 0.95}, "hidden=0.95 and random=0.1 are shares of the same tokens"),
        ({"data.tokenizer": None}, "there is no tokenizer; add data.tokenizer"),
        ({"data.source": {"type": "VectorFiles", "path": "x.npy"}}, "the source VectorFiles is vectors and masked are"),
        ({"model": tiny_config().to_dict()}, "no attention of the model sees what comes after a token"),
        ({"model.head": {"type": "ClassHead"}}, "model.head is ClassHead, which guesses no tokens"),
        ({"context": 2}, "context=2 leaves no room between 2 special tokens"),
        ({"sample": {"prompt": "the"}}, r"sample.prompt holds no [MASK] to be filled"),
        ({"sample": {"prompt": "the [MASK]" * 9}}, "sample.prompt has 47 tokens and there is room for 16"),
        ({"start": {"path": "x"}}, "with start the tokenizer is the checkpoint's"),
    ],
)
def test_what_cannot_be_trained_is_one_line(changes, message, corpus, tmp_path):
    made = masked(corpus)
    for key, value in changes.items():
        part, _, name = key.rpartition(".")
        (made[part] if part else made)[name] = value
    with pytest.raises(ConfigError) as error:
        train(made, out=tmp_path / "run")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_start_must_be_an_encoder_with_a_mask(run, corpus, tmp_path):
    data = recipe_data(corpus, steps=1)
    train(data, out=tmp_path / "language")
    with pytest.raises(ConfigError, match="is a language model and masked tokens are guessed by an encoder"):
        train(from_start(corpus, tmp_path / "language"), out=tmp_path / "run")
    make_bert(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text().replace("[MASK]", "[ELSE]")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="has no tokenizer with a mask token; name it as 'mask_token'"):
        train(from_start(corpus, tmp_path), out=tmp_path / "run")
