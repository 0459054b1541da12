"""The harness finds planted leaks, says which law they break, and where."""

import pytest
import torch
from torch import nn

from qkv.cli import main
from qkv.errors import ConfigError
from qkv.laws import ModelSubject, ModuleSubject, assert_laws, check
from qkv.laws.check import TOLERANCES
from qkv.masks import Causal, Full, Window
from qkv.models.pairs import Pair
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import PatchEmbedderConfig, TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.heads import ClassHeadConfig, Head
from qkv.nn.norms import LayerNormConfig
from qkv.nn.pooling import MeanPoolConfig
from qkv.nn.positions import LearnedGridConfig, LearnedPositionsConfig, SinusoidalGridConfig
from qkv.presets.translators import attention_is_all_you_need, bahdanau, fixed_vector, luong
from qkv.tokens import Layout, Tokens
from tiny import VOCAB, tiny_model


def broken(report):
    return {v.law.name: v.layer for v in report.verdicts if not v.holds}


@pytest.mark.parametrize("options", [{}, {"mask": Full()}, {"mask": Causal() & Window(size=4)}, {"vectors": True}])
def test_our_models_keep_them(options):
    model = tiny_model(**options)
    model.train()
    report = check(model)
    assert report.holds
    assert model.training  # it is handed back as it came
    asked = {verdict.law.name for verdict in report.verdicts}
    assert ("cache" in asked) == ("future" in asked) == (options.get("mask") != Full())


def module(**how):
    """A model of ours as anybody's module."""
    model = tiny_model(**how.pop("options", {}))
    ways = {
        "padded": lambda ids, valid: model(ids, Tokens.from_padding(valid)),
        "packed": lambda ids, lengths: model(ids, Tokens.packed(lengths, ids.shape[1])),
        "permuted": lambda ids, order: model(ids[:, order], Tokens.full(*ids.shape).reordered(order)),
        "steps": lambda ids, cuts: ModelSubject(model).steps(ids, cuts),
    }
    return model, {"vocab_size": VOCAB} | ways | how


def test_a_module_that_is_right():
    model, how = module()
    assert check(ModuleSubject(model, **how)).holds


def test_a_look_ahead():
    model, how = module(options={"mask": Full()}, padded=None, packed=None, steps=None)
    found = broken(check(ModuleSubject(model, **how)))
    assert found == dict.fromkeys(("future", "beginning"), "blocks.0.sublayers.attention.o_proj")


def test_documents_that_see_each_other():
    model, how = module(packed=lambda ids, lengths: model(ids))
    assert set(broken(check(ModuleSubject(model, **how)))) == {"packing", "neighbours"}


def test_padding_that_is_read():
    model, how = module(padded=lambda ids, valid: model(ids))
    assert set(broken(check(ModuleSubject(model, **how)))) == {"padding", "poison"}


def test_a_cache_that_is_off_by_one():
    def steps(ids, cuts):
        cache, starts = model.make_cache(len(ids), ids.shape[1] + 1), [0, *cuts[:-1]]
        outs = []
        for a, b in zip(starts, cuts, strict=True):
            tokens = Tokens.full(len(ids), b - a, start=a + (a > 0))
            outs.append(model(ids[:, a:b], tokens if a == 0 else shifted(tokens, cache), cache=cache))
        return torch.cat(outs, 1)

    def shifted(tokens, cache):
        return tokens.shifted(-cache.length)

    model, how = module(steps=steps)
    assert set(broken(check(ModuleSubject(model, **how)))) == {"cache"}


class Mean(nn.Module):
    """Takes the mean of the batch away, or lets dropout live, or puts NaN out."""

    def __init__(self, fault):
        super().__init__()
        self.embed, self.fault = nn.Embedding(VOCAB, 8), fault

    def forward(self, ids):
        x = self.embed(ids)
        if self.fault == "batch":
            return x - x.mean(0)
        return nn.functional.dropout(x, 0.5) if self.fault == "dropout" else x / 0


def test_other_faults():
    assert set(broken(check(Mean("batch"), vocab_size=VOCAB))) == {"rows"}
    assert "evaluation" in broken(check(Mean("dropout"), vocab_size=VOCAB))
    assert "evaluation" in broken(check(Mean("nan"), vocab_size=VOCAB))
    with pytest.raises(AssertionError, match=r"rows .* BROKEN"):
        assert_laws(Mean("batch"), vocab_size=VOCAB)


def test_hugging_face():
    """Somebody else's model, told of padding its own way."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)

    def padded(ids, valid):
        position = (valid.long().cumsum(1) - 1).clamp(min=0)
        return model(ids, attention_mask=valid.long(), position_ids=position)

    assert_laws(model, vocab_size=VOCAB, padded=padded)
    forgotten = check(model, vocab_size=VOCAB, padded=lambda ids, valid: model(ids))
    assert set(broken(forgotten)) == {"padding", "poison"}


def encoder(kind, **embedding):
    """A reader of texts of two types, or of pictures, with classes of whole inputs."""
    norm, attention = LayerNormConfig(), AttentionConfig(n_heads=4, mask=Full(), bias=True)
    if kind == "texts":
        embed = TokenEmbedderConfig(vocab_size=VOCAB, types=2, position=LearnedPositionsConfig(length=24))
    else:
        embed = PatchEmbedderConfig(patch=2, channels=1, **{"position": SinusoidalGridConfig()} | embedding)
    return tiny_model(
        config=TransformerConfig(
            d_model=16,
            embed=embed,
            blocks=PreNormConfig(norm=norm, sublayers=(attention, FFNConfig(d_ff=24))),
            head=ClassHeadConfig(n_classes=3, pool=MeanPoolConfig()),
        )
    )


ENCODERS = {
    "texts": ("texts", {}),
    "pictures": ("pictures", {}),
    "grid, class token": ("pictures", {"position": LearnedGridConfig(rows=7, columns=4), "prefix": 2}),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_keep_them(name):
    kind, embedding = ENCODERS[name]
    report = check(encoder(kind, **embedding))
    assert report.holds, report
    assert [law.name for law in report.left_out] == ["future", "beginning", "cache", "alignment"]


@pytest.mark.parametrize("kind", ["texts", "pictures"])
def test_planted_faults_of_encoders(kind, monkeypatch):
    model = encoder(kind)
    with monkeypatch.context() as patch:  # the padding is counted
        patch.setattr(model.head.pool, "pool", lambda x, documents: x.mean(1))
        assert broken(check(model)).keys() == {"pooling", "pooling together"}
    with monkeypatch.context() as patch:  # several documents are one
        patch.setattr(model.head.pool, "pool", lambda x, documents: x.mean((0, 1)).expand(len(x), -1))
        assert {"pooling", "pooling together"} <= broken(check(model)).keys()
    with monkeypatch.context() as patch:  # a token stands where it is stored
        there = model.embed.position.forward
        patch.setattr(model.embed.position, "forward", lambda t, dtype: there(stored(model, t), dtype))
        found = broken(check(model))
        assert {"order", "padding", "packing"} <= found.keys()
        assert found["order"] == "embed.position"


def stored(model, tokens):
    return model.embed.example_tokens(Tokens.full(*tokens.shape))


def test_types_that_are_lost(monkeypatch):
    model = encoder("texts")
    by_kind = model.embed.by_kind
    lost = lambda x, t: by_kind(x, t if t.layout is Layout.FULL else t.with_types(torch.zeros_like(t.index)))  # noqa: E731
    monkeypatch.setattr(model.embed, "by_kind", lost)
    assert {"padding", "packing"} <= broken(check(model)).keys()


def test_a_head_of_rows():
    """A head of one's own with an answer for each row is asked of rows alone."""

    class OfRows(Head):
        def forward(self, x, tokens, table):
            own = tokens.valid[..., None]
            return (x * own).sum(1) / own.sum(1)

        def loss(self, x, tokens, table, targets, scale):
            return self(x, tokens, table).sum()

        def count(self, targets, tokens):
            return 1

    model = encoder("texts")
    model.head = OfRows()
    report = check(model)
    assert report.holds
    assert "pooling together" in {law.name for law in report.left_out}


TRANSLATORS = {
    "bahdanau": bahdanau(16),
    "luong": luong(16),
    "fixed-vector": fixed_vector(16),
    "translator": attention_is_all_you_need(16, 2, 2, 32),
}


def translator(name):
    torch.manual_seed(0)
    model = TRANSLATORS[name].with_vocabularies(13, 11, shared=False).build().double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model


@pytest.mark.parametrize("name", TRANSLATORS)
def test_models_of_pairs_keep_them(name):
    report = check(translator(name))
    assert report.holds, report
    left_out = ["order", "pooling", "pooling together"] + (["alignment"] if name == "fixed-vector" else [])
    assert [law.name for law in report.left_out] == left_out


@pytest.mark.parametrize("name", ["bahdanau", "translator"])
def test_planted_faults_of_models_of_pairs(name, monkeypatch):
    model = translator(name)
    forward, start, align = model.forward, model.start, model.align

    def read_padding(inputs, tokens=None, **rest):
        if inputs.source.shape[1] != 10:  # 7 and 3 of padding
            return forward(inputs, tokens, **rest)
        source = inputs.source.clamp(min=0)
        return forward(Pair(source, Tokens.full(*source.shape), inputs.target), tokens, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", read_padding)
        assert "padding" in broken(check(model))
    with monkeypatch.context() as patch:
        patch.setattr(model, "start", lambda source, *how, **rest: start(source.flip(1), *how, **rest))
        assert set(broken(check(model))) == {"cache"}
    for fault in (lambda w: w.roll(1, -1), lambda w: w.transpose(1, 2).softmax(-1).transpose(1, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(model, "align", lambda *how, fault=fault: fault(align(*how)))
            assert set(broken(check(model))) == {"alignment"}


def test_what_cannot_be_checked():
    with pytest.raises(ConfigError, match="either vocab_size"):
        check(Mean("batch"))
    with pytest.raises(ConfigError, match=r"returned \(2, 19\); the laws need a vector for each token"):
        check(Summed(), vocab_size=5)


class Summed(nn.Module):
    def forward(self, ids):
        return ids.float()


def test_the_verb(capsys, monkeypatch, tmp_path):
    (tmp_path / "tiny.yaml").write_text(
        "d_model: 16\nembed: {type: TokenEmbedder, vocab_size: 9}\nhead: {type: LMHead}\n"
        "blocks: {type: PreNorm, norm: {type: RMSNorm}, sublayers: [{type: FFN}, "
        "{type: Attention, n_heads: 2, mask: {type: Causal}}]}\n"
    )
    assert main(["check", str(tmp_path / "tiny.yaml")]) == 0
    out = capsys.readouterr().out
    assert out.count("holds") == 11
    assert main(["check", "vit-small"]) == 0
    assert "pooling together" in capsys.readouterr().out
    monkeypatch.setitem(TOLERANCES, torch.float32, -1.0)
    assert main(["check", str(tmp_path / "tiny.yaml")]) == 1
    assert "BROKEN" in capsys.readouterr().out
    assert main(["check", "small"]) == 1  # its vocabulary is open, and one is made up
    capsys.readouterr()
    assert main(["check", "llama3-8b"]) == 2
    assert "llama3-8b has 8,030,261,248 parameters" in capsys.readouterr().err
