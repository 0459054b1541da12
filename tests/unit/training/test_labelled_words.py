"""Classes of the words of a text: sources, the tokens that carry them, training, use; and what is refused."""

import json

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, processors

import qkv
from qkv.cli import main
from qkv.data import Tokenizer
from qkv.data.labelled_words import LabelledWordsConfig
from qkv.errors import ConfigError, FileError
from qkv.loading.facts import Facts
from qkv.masks import Full
from qkv.ops.loss import IGNORE
from qkv.tasks.reading import WordReading
from qkv.tasks.targets import WordClassesConfig
from qkv.training.recipe import RecipeConfig
from tiny import tiny_config

NAMES, OTHERS = ["Anna", "Bert", "Cleo"], ["sees", "a", "dog", "and"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("words") / "words.jsonl"
    with path.open("w") as file:
        for i in range(40):
            words = random.choice(NAMES + OTHERS, size=2 + i % 4).tolist()
            file.write(json.dumps({"tokens": words, "labels": ["name" if w in NAMES else "O" for w in words]}) + "\n")
    return path


def recipe(path, **data):
    model = tiny_config(mask=Full(), layers=1).replace(head=None).to_dict()
    model["embed"]["vocab_size"] = None
    source = {"type": "LabelledWords", "path": str(path)}
    data = {
        "type": "ClassData",
        "source": source,
        "validation": 0.2,
        "tokenizer": {"type": "CharacterTokenizer"},
    } | data
    data = {"targets": {"type": "WordClasses"}} | data
    made = {"model": model, "data": data, "steps": 40, "context": 32, "batch_size": 16, "precision": "float32"}
    return made | {"optimizer": {"lr": 1e-2}, "evaluate_every": 40}


def test_words_are_learned_measured_and_tagged(corpus, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(corpus)))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy"] > 0.9
    loaded = qkv.load(tmp_path / "run")
    (tags,) = loaded.tag("Anna sees a dog")
    assert [(tag.word, tag.label) for tag in tags] == [("Anna", "name"), ("sees", "O"), ("a", "O"), ("dog", "O")]
    several = loaded.tag([["Anna", "sees", "a", "dog"], ["Bert"]])
    assert [[tag.label for tag in each] for each in several] == [["name", "O", "O", "O"], ["name"]]
    assert several[0][2].probability == pytest.approx(tags[2].probability, rel=1e-4)
    with pytest.raises(ConfigError, match="gives no classes of its inputs"):
        loaded.classify("Anna")
    capsys.readouterr()
    assert main(["classify", str(tmp_path / "run"), "Cleo and a dog", "--json"]) == 0
    words = json.loads(capsys.readouterr().out)["words"]
    assert [each["label"] for each in words] == ["name", "O", "O", "O"]
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loss"] == pytest.approx(last["validation_loss"], rel=1e-4)
    assert report["accuracy"] == last["accuracy"]
    (tmp_path / "more.conll").write_text("-DOCSTART- -X- O\n\nAnna NNP name\nsees VB O\n\nBert NNP name\n")
    assert main(["eval", str(tmp_path / "run"), str(tmp_path / "more.conll"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["texts"], report["classes"]["name"]["items"], report["accuracy"]) == (2, 2, 1)


def test_the_first_token_of_a_word_carries_its_class():
    vocabulary = {
        w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", "un", "##happ", "##y", "cat", ",", "do", "##g"])
    }
    inner = Inner(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = Tokenizer(inner)
    words = ["unhappy", "cat,", "zebra", "dog"]
    framed, firsts = tokenizer.encode_words(words)
    theirs = inner.encode(words, is_pretokenized=True)
    assert framed.ids == theirs.ids == [1, 3, 4, 5, 6, 7, 0, 8, 9, 2]
    assert firsts == [theirs.word_ids.index(n) for n in range(4)] == [1, 4, 6, 7]
    reading = WordReading(tokenizer)
    encoded = reading.encoded(words)
    (placed,) = reading.placed([encoded], [torch.tensor([2, 0, 1, 2])])
    n = IGNORE
    assert placed.tolist() == [n, 2, n, n, 0, n, 1, 2, n, n]


def test_a_word_without_a_token_has_no_class():
    inner = Inner(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("x", "removed")
    _, firsts = Tokenizer(inner).encode_words(["a", "x"])
    assert firsts == [0, None]


def test_padding_and_special_tokens_have_no_part_in_what_is_found():
    targets = WordClassesConfig(labels=("O", "name"))
    found = targets.findings(torch.tensor([1, IGNORE, 0]), torch.tensor([[0.0, 1], [1, 0], [0, 1]]))
    assert found.counts.tolist() == [[0, 1], [0, 1]]
    assert targets.of_facts(Facts(labels=("b", "a"))).labels == ("b", "a")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"tokens": ["a", "b"], "labels": ["O"]}', "line 1: 2 words and 1 labels"),
        ("a.jsonl", '{"tokens": [], "labels": []}', "line 1: 0 words"),
        ("a.jsonl", '{"tokens": ["a", " "], "labels": ["O", "O"]}', "give each word, which is a text, its own"),
        (
            "a.jsonl",
            '{"tokens": "a b", "labels": ["O"]}',
            "'tokens' is 'a b' and must be a list, an entry",
        ),
        ("a.jsonl", '{"tokens": ["a"]}', "needs an object with the key 'labels'"),
        ("a.conll", "Anna\n", "line 1: 'Anna' has no class behind its word"),
    ],
)
def test_words_that_cannot_be_read(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(FileError, match=message):
        list(LabelledWordsConfig(path=str(tmp_path / name)).items())


def test_columns_are_texts_between_blank_lines(tmp_path):
    (tmp_path / "a.conll").write_text("-DOCSTART- O\n\nA x I\nb O\n\n\nC I\n")
    found = list(LabelledWordsConfig(path=str(tmp_path)).items())
    assert [(item.item, item.label) for item in found] == [(("A", "b"), ("I", "O")), (("C",), ("I",))]
    assert found[0].where.endswith("a.conll, from line 3: a class")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": {"type": "OneClass"}}, "holds words and data.targets are OneClass; the targets of words"),
        ({"cut": True}, "data.cut is for texts and the source holds words"),
        (
            {"head": {"type": "ClassHead", "pool": {"type": "MeanPool"}}},
            "data.head has a pool, and each word",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_words(corpus, changes, message):
    with pytest.raises(ConfigError, match=message):
        RecipeConfig.from_dict(recipe(corpus, **changes))
