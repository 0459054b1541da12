"""`qkv.load` of an encoder: vectors, classes and masked words of texts; and on the command line."""

import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import qkv
from qkv.cli import main
from qkv.errors import ConfigError
from qkv.loading.encoder import Encoder
from tolerances import FLOAT32

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "."]
TEXTS = ["the cat sat on the mat .", "cat", "a mat sat on a cat on a mat .", "the the"]


@pytest.fixture(scope="module", params=["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def any_folder(request, tmp_path_factory):
    return make_folder(request.param, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    kinds = {"masked": "BertForMaskedLM", "classes": "BertForSequenceClassification"}
    return {name: make_folder(kind, tmp_path_factory.mktemp(name)) for name, kind in kinds.items()}


def make_folder(kind, folder):
    """A tiny BERT as transformers writes it, with a tokenizer of words."""
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.add_special_tokens(WORDS[:5])
    inner.enable_truncation(4)  # which qkv does not do in silence
    inner.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names))
    torch.manual_seed(0)
    labels = {0: "bad", 1: "fair", 2: "good"} if "Class" in kind else {}
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=14, id2label=labels or None, label2id={v: k for k, v in labels.items()} or None,
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def test_vectors_of_ragged_texts_are_those_of_each_alone(any_folder):
    loaded = qkv.load(any_folder)
    assert isinstance(loaded, Encoder)
    together = loaded.embed(TEXTS, pool=None)
    for text, stream in zip(TEXTS, together, strict=True):
        (alone,) = loaded.embed(text, pool=None)
        torch.testing.assert_close(stream, alone, rtol=0, atol=FLOAT32)
    assert torch.equal(loaded.embed(TEXTS), torch.stack([row.mean(0) for row in together]))
    first = loaded.embed([row.values for row in loaded.read(TEXTS)], pool="first", unit=True)
    wanted = torch.nn.functional.normalize(torch.stack([row[0] for row in together]), dim=-1)
    assert torch.equal(first, wanted)
    assert loaded.embed([]).shape == (0, 16)


def test_many_texts_go_through_in_several_rows(folders, monkeypatch):
    loaded = qkv.load(folders["masked"])
    whole = loaded.embed(TEXTS * 3)
    monkeypatch.setattr("qkv.loading.reader._ROW", 12)
    torch.testing.assert_close(loaded.embed(TEXTS * 3), whole, rtol=0, atol=FLOAT32)


def test_what_cannot_be_read_is_said(folders):
    loaded = qkv.load(folders["masked"])
    with pytest.raises(ConfigError, match="input 2 of 2 has 15 tokens and the model reads 14; cut it, or split it"):
        loaded.embed(["the", "cat " * 13])
    with pytest.raises(ConfigError, match="input 1 of 1 has no tokens"):
        loaded.embed([[]])
    with pytest.raises(ConfigError, match="some inputs are texts and others are not"):
        loaded.embed(["the", [5]])
    with pytest.raises(ConfigError, match="the model's head is LMHead and gives no classes of its inputs"):
        loaded.classify("the")
    with pytest.raises(ConfigError, match=r"there is no \[MASK\] in the text"):
        loaded.fill("the cat")
    with pytest.raises(ConfigError, match="the model has no head over its vocabulary"):
        qkv.load(folders["classes"]).fill("the [MASK]")


def test_masked_words_and_classes_are_those_of_transformers(folders):
    for kind, text in (("masked", "the [MASK] sat on [MASK] ."), ("classes", "a cat sat .")):
        masked = kind == "masked"
        reference = transformers.BertForMaskedLM if masked else transformers.BertForSequenceClassification
        tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            chances = reference.from_pretrained(folders[kind]).eval()(**encoded).logits.softmax(-1)
        loaded = qkv.load(folders[kind])
        if masked:
            rows = chances[encoded["input_ids"] == 4]
            found, names = loaded.fill(text, top=len(WORDS)), WORDS
        else:
            rows, found, names = chances, loaded.classify(text), ["bad", "fair", "good"]
        for row, guesses in zip(rows.tolist(), found, strict=True):
            assert [guess.label for guess in guesses] == [names[i] for i in np.argsort(row)[::-1]]
            assert np.allclose([guess.probability for guess in guesses], sorted(row, reverse=True), atol=1e-5)


def test_saved_and_converted_it_stays_what_it_was(folders, tmp_path):
    loaded = qkv.load(folders["classes"])
    qkv.save(loaded, tmp_path / "ours")
    again = qkv.load(tmp_path / "ours")
    assert (again.facts, again.classify(TEXTS)) == (loaded.facts, loaded.classify(TEXTS))
    assert main(["convert", str(folders["classes"]), str(tmp_path / "hf"), "--to", "hf"]) == 0
    back = qkv.load(tmp_path / "hf")
    assert back.facts == loaded.facts
    assert back.classify(TEXTS) == loaded.classify(TEXTS)
    certificate = json.loads((tmp_path / "hf" / "certificate.json").read_text())
    assert certificate["largest_difference"]["logits"] < FLOAT32
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token) == ("[CLS]", "[SEP]", "[MASK]")


def test_pooling_goes_out_as_sentence_transformers_keeps_it(folders, tmp_path):
    loaded = qkv.load(folders["masked"])
    made = Encoder(loaded.model, loaded.tokenizer, loaded.facts.replace(pool="first", unit=True))
    qkv.save(made, tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    again = qkv.load(tmp_path / "hf")
    assert (again.facts.pool, again.facts.unit) == ("first", True)
    assert torch.equal(again.embed(TEXTS), made.embed(TEXTS))


def test_a_language_model_gives_vectors_too(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    loaded = qkv.load(tmp_path)
    made = loaded.embed([[5, 6, 7], [8]])
    torch.testing.assert_close(made[0], loaded.model.encode(torch.tensor([[5, 6, 7]]))[0][0].mean(0), rtol=0, atol=1e-6)


def test_on_the_command_line(folders, tmp_path, capsys):
    masked, classes = str(folders["masked"]), str(folders["classes"])
    assert main(["embed", masked, "the cat", "a mat", "-o", str(tmp_path / "v.npy")]) == 0
    assert np.load(tmp_path / "v.npy").shape == (2, 16)
    assert main(["embed", masked, "the cat", "--against", "the cat"]) == 0
    assert capsys.readouterr().out == " 1.000  the cat\n"
    assert main(["embed", masked, "the cat"]) == 0
    assert len(json.loads(capsys.readouterr().out)["vector"]) == 16
    (tmp_path / "texts").write_text("the cat\n\na mat\n")
    assert main(["classify", classes, "-f", str(tmp_path / "texts"), "--top", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert main(["classify", classes, "the cat", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["classes"]) == {"bad", "fair", "good"}
    assert main(["fill", masked, "the [MASK] .", "--top", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "mask 1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embed", "masked"], "there is no text; give one or several, or a --file"),
        (["embed", "masked", "the", "-o", "v.csv"], "--out v.csv must end in .npy"),
        (["embed", "masked", "the", "-o", "v.npy", "--against", "a"], "give one of the two"),
        (["classify", "masked", "the"], "gives no classes of"),
        (["classify", "classes", "the", "--top", "0"], "top=0 must be at least 1"),
        (["fill", "masked", "the"], "there is no [MASK] in the text"),
        (["generate", "masked", "the"], "is an encoder and this is for a language model; use qkv embed"),
        (["convert", "masked", "x.gguf", "--to", "gguf"], "no family that llama.cpp has can express this model"),
    ],
)
def test_mistakes_are_one_line(words, message, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([str(folders.get(word, word)) for word in words]) in (2, 3)
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
