"""The recurrent translator: the equations written out, and what padding, packing and the batch must not change."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from qkv.errors import ConfigError
from qkv.models.decoders import BahdanauConfig, FixedVectorConfig, LuongConfig
from qkv.models.pairs import Pair
from qkv.models.recurrent_encoder import RecurrentEncoderConfig
from qkv.models.seq2seq import Seq2SeqConfig
from qkv.nn.additive import AdditiveScoreConfig, DotScoreConfig, GeneralScoreConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.positions import LearnedPositionsConfig, SinusoidalPositionsConfig
from qkv.nn.recurrent import GRUConfig, LSTMConfig
from qkv.recorder import Recorder
from qkv.tokens import Tokens
from tolerances import FLOAT64

SOURCE, TARGET = 13, 11
DECODERS = {
    "bahdanau": BahdanauConfig(),
    "bahdanau lstm deep": BahdanauConfig(cell=LSTMConfig(), layers=2),
    "luong": LuongConfig(),
    "luong general": LuongConfig(score=GeneralScoreConfig(), cell=LSTMConfig()),
    "luong dot": LuongConfig(score=DotScoreConfig(), d_hidden=16, bridge="copy"),
    "luong without feeding": LuongConfig(score=GeneralScoreConfig(), input_feeding=False, layers=2),
    "fixed vector": FixedVectorConfig(cell=LSTMConfig()),
}
ATTENTIVE = [name for name in DECODERS if name != "fixed vector"]


def make(name, **encoder):
    torch.manual_seed(0)
    decoder = DECODERS[name]
    config = Seq2SeqConfig(
        d_model=8,
        source=TokenEmbedderConfig(vocab_size=SOURCE),
        target=TokenEmbedderConfig(vocab_size=TARGET),
        encoder=RecurrentEncoderConfig(cell=decoder.cell, layers=2, **encoder),
        decoder=decoder,
    )
    model = config.build().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def draw(lengths, vocab, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=g) for n in lengths]


def padded(texts, side="right", fill=0, width=None):
    lengths = [len(text) for text in texts]
    width = width or max(lengths)
    rows = [F.pad(t, (width - len(t), 0) if side == "left" else (0, width - len(t)), value=fill) for t in texts]
    return torch.stack(rows), Tokens.padded(lengths, width, side=side)


class Alignments(Recorder):
    def __init__(self):
        self.weights = []

    def attention(self, name, problem, out):
        raise AssertionError

    def alignment(self, weights):
        self.weights.append(weights)


SOURCES, TARGETS = draw((5, 2, 7), SOURCE, 1), draw((4, 6, 3), TARGET, 2)


@pytest.fixture(params=DECODERS)
def model(request):
    return make(request.param)


def alone(model):
    return [model(Pair(s[None], Tokens.full(1, len(s)), t[None]))[0] for s, t in zip(SOURCES, TARGETS, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_is_the_row_alone(model, side):
    (source, there), (target, here) = padded(SOURCES, side, fill=99, width=9), padded(TARGETS, side, fill=-7, width=8)
    logits = model(Pair(source, there, target), here)
    for want, row, valid in zip(alone(model), logits, here.valid, strict=True):
        torch.testing.assert_close(row[valid], want, rtol=0, atol=FLOAT64)


def test_packed_is_padded(model):
    source, target = torch.cat(SOURCES)[None], torch.cat(TARGETS)[None]
    there = Tokens.packed([[len(s) for s in SOURCES]])
    here = Tokens.packed([[len(t) for t in TARGETS]])
    logits = model(Pair(source, there, target), here)[0]
    torch.testing.assert_close(logits, torch.cat(alone(model)), rtol=0, atol=FLOAT64)


def test_teacher_forcing_is_the_step_loop(model):
    (source, there), (target, here) = padded(SOURCES), padded(TARGETS)
    decoding = model.start(source, there, target[:, :1].tolist(), capacity=8)
    steps = torch.stack([decoding.logits, *(decoding.advance(ids) for ids in target[:, 1:].unbind(1))], dim=1)
    logits = model(Pair(source, there, target), here)
    torch.testing.assert_close(steps[here.valid], logits[here.valid], rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("position", [SinusoidalPositionsConfig(), LearnedPositionsConfig(length=9)])
def test_teacher_forcing_is_the_step_loop_where_the_target_has_positions(position):
    torch.manual_seed(0)
    config = make("bahdanau").config
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, position=position))
    test_teacher_forcing_is_the_step_loop(config.build().double().eval())
    assert config.longest == getattr(position, "length", None)


@pytest.mark.parametrize("name", ATTENTIVE)
@pytest.mark.parametrize("sides", [("left", "right"), ("right", "left"), ("left", "left")], ids="-".join)
def test_the_alignment_stands_where_the_tokens_do(name, sides):
    model = make(name)
    (source, there), (target, here) = padded(SOURCES, sides[0], width=9), padded(TARGETS, sides[1], width=8)
    weights = model.align(Pair(source, there, target), here)
    assert weights.shape == (3, 8, 9)
    for row, (s, t) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        alone = model.align(Pair(s[None], Tokens.full(1, len(s)), t[None]))[0]
        torch.testing.assert_close(weights[row][here.valid[row]][:, there.valid[row]], alone, rtol=0, atol=FLOAT64)
    assert weights[:, :, ~there.valid.any(0)].sum() == weights[~here.valid].sum() == 0
    torch.testing.assert_close(weights.sum(), torch.tensor(13.0).double(), rtol=0, atol=FLOAT64)


def test_reordered_rows_go_on_as_they_were(model):
    source, there = padded(SOURCES)
    first, second = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    decoding, other = (model.start(source, there, first[:, None].tolist(), capacity=8) for _ in range(2))
    want = other.advance(second)
    rows = torch.tensor([2, 0, 0])
    decoding.reorder(rows)
    torch.testing.assert_close(decoding.advance(second[rows]), want[rows], rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("name", ATTENTIVE)
def test_the_weights_of_a_token_sum_to_one_and_padding_has_none(name):
    model, recorder = make(name), Alignments()
    (source, there), (target, here) = padded(SOURCES), padded(TARGETS)
    with_recorder = model(Pair(source, there, target), here, recorder=recorder)
    assert torch.equal(with_recorder, model(Pair(source, there, target), here))
    (weights,) = recorder.weights
    assert weights.shape == (3, 6, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 6).double(), rtol=0, atol=FLOAT64)
    assert (weights[~there.valid[:, None].expand_as(weights)] == 0).all()
    assert (weights[there.valid[:, None].expand_as(weights)] > 0).all()


def test_the_loss_is_cross_entropy_and_its_gradient_that_of_the_rows(model):
    (source, there), (target, here) = padded(SOURCES, fill=99), padded(TARGETS, fill=-7)
    targets = target.roll(-1, 1)
    pair = Pair(source, there, target)
    want = F.cross_entropy(model(pair, here)[here.valid], targets[here.valid].clamp(min=0), reduction="sum") / 10
    loss, aux = model.loss(pair, targets.clamp(min=0), here, scale=0.1)
    assert aux is None
    torch.testing.assert_close(loss, want, rtol=0, atol=FLOAT64)
    ours, theirs = (torch.autograd.grad(x, list(model.parameters()), allow_unused=True) for x in (loss, want))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)


def test_bahdanau_is_its_equations():
    """Section A.1.2 and A.2 of the paper, a token at a time; the cell with PyTorch's own."""
    model = make("bahdanau")
    s_ids, t_ids = SOURCES[0], TARGETS[0]
    h, final = model.encoder.net.net(model.source.weight[s_ids][None])
    h, d = h[0], model.decoder
    s = torch.tanh(d.bridge[0](torch.cat([final[-2], final[-1]], -1)))[0]
    cell = torch.nn.GRUCell(8 + 16, 8).double()
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, part, getattr(d.net.net, f"{part}_l0"))
    logits = []
    for token in t_ids:
        e = torch.stack([d.score.v @ torch.tanh(d.score.q_proj.weight @ s + d.score.k_proj.weight @ row) for row in h])
        c = e.softmax(0) @ h
        y = model.target.weight[token]
        s = cell(torch.cat([y, c]), s)
        logits.append(model.head.weight @ torch.tanh(d.readout(torch.cat([s, c, y]))))
    torch.testing.assert_close(alone(model)[0], torch.stack(logits), rtol=0, atol=FLOAT64)


def test_luong_is_its_equations():
    model = make("luong general")
    s_ids, t_ids = SOURCES[0], TARGETS[0]
    h, (final, memory) = model.encoder.net.net(model.source.weight[s_ids][None])
    h, d = h[0], model.decoder
    state = [torch.tanh(b(torch.cat([x[-2], x[-1]], -1)))[0] for b, x in zip(d.bridge, (final, memory), strict=True)]
    cell = torch.nn.LSTMCell(16, 8).double()
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, part, getattr(d.net.net, f"{part}_l0"))
    feed, logits = torch.zeros(8).double(), []
    for token in t_ids:
        state = cell(torch.cat([model.target.weight[token], feed]), state)
        c = torch.stack([state[0] @ d.score.weight @ row for row in h]).softmax(0) @ h
        feed = torch.tanh(d.readout(torch.cat([c, state[0]])))
        logits.append(model.head.weight @ feed)
    torch.testing.assert_close(alone(model)[0], torch.stack(logits), rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("cell", [GRUConfig(), LSTMConfig()], ids=["gru", "lstm"])
def test_a_step_is_that_of_the_fused_layers(cell):
    from qkv.nn.recurrent import Recurrent

    torch.manual_seed(0)
    net = Recurrent(cell, 5, 4, layers=3).double()
    x = torch.randn(2, 6, 5).double()
    want, last = net(x)
    state = net.zeros(2, x)
    for t in range(6):
        state = net.step(F.linear(x[:, t], *net.weights("ih", 0)), state)
        torch.testing.assert_close(state[-1][0], want[:, t], rtol=0, atol=FLOAT64)
    for ours, theirs in zip(state, last, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)


def test_the_loop_at_once_is_the_loop_step_by_step(monkeypatch):
    """Loss and gradients, with dropout, for ragged and padded pairs."""
    model = make("bahdanau").train()
    model.decoder.dropout = 0.3
    (source, there), (target, here) = padded(SOURCES, width=9), padded(TARGETS, "left", width=8)
    pair = Pair(source, there, target)

    def run():
        torch.manual_seed(1)
        loss, _ = model.loss(pair, target, here)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]

    at_once = run()
    monkeypatch.setattr(model.decoder, "_attentive_gru", lambda *_: None)
    for a, b in zip(at_once, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)


def test_the_loop_goes_at_once_where_it_can(monkeypatch):
    """One layer of a GRU, additive scores, one type of at least float32."""
    from qkv.models import decoders as bahdanau
    from qkv.nn.quantised import quantise

    calls = []
    operation = bahdanau.attentive_gru
    monkeypatch.setattr(bahdanau, "attentive_gru", lambda p: calls.append(1) or operation(p))

    def at_once(model, tokens=4):
        calls.clear()
        model(Pair(SOURCES[0][None], Tokens.full(1, 5), TARGETS[0][None, :tokens]))
        return bool(calls)

    assert at_once(make("bahdanau"))
    assert not at_once(make("bahdanau"), tokens=1)
    assert at_once(make("bahdanau").float())
    assert not at_once(make("bahdanau").bfloat16())
    assert not at_once(make("bahdanau lstm deep"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not at_once(make("bahdanau").float())
    packed = make("bahdanau")
    quantise(packed, "int8")
    assert not at_once(packed)


def test_keys_are_computed_once_per_sentence(monkeypatch):
    model = make("bahdanau")
    calls = []
    project = model.decoder.score.keys
    monkeypatch.setattr(model.decoder.score, "keys", lambda memory: calls.append(1) or project(memory))
    source, there = padded(SOURCES)
    decoding = model.start(source, there, [[1]] * 3, capacity=8)
    for token in (2, 3):
        decoding.advance(torch.tensor([token] * 3))
    model(Pair(source, there, padded(TARGETS)[0]), padded(TARGETS)[1])
    assert len(calls) == 2


def test_mistakes():
    with pytest.raises(ConfigError, match=r"DotScore needs states as wide as the memory, and they are 8 and 16 wide"):
        dataclasses.replace(make("luong dot").config, decoder=LuongConfig(score=DotScoreConfig())).build()
    with pytest.raises(ConfigError, match="bridge=copy needs a decoder as wide as the encoder's last state, 16"):
        dataclasses.replace(make("luong").config, decoder=LuongConfig(bridge="copy")).build()
    with pytest.raises(ConfigError, match="keeps 1 states, the decoder's LSTM 2"):
        dataclasses.replace(make("luong").config, decoder=LuongConfig(cell=LSTMConfig())).build()
    with pytest.raises(ConfigError, match="layers=0 must be at least 1"):
        LuongConfig(layers=0)
    model = make("bahdanau")
    source, there = padded(SOURCES)
    with pytest.raises(ConfigError, match="row 1 has 1 sources and 0 targets; give each target its source"):
        model(Pair(source, there, torch.ones(3, 2).long()), Tokens.padded([2, 0, 2]))
    ones = torch.ones(3, 2).long()
    with pytest.raises(ConfigError, match="row 0 has 1 sources and 2 targets"):
        model.loss(Pair(source, there, ones), ones, Tokens.packed([[1, 1], [2], [2]]))
    with pytest.raises(ConfigError, match=r"tokens of the source are \(3, 7\) and its ids \(3, 8\); make them equal"):
        model(Pair(F.pad(source, (0, 1)), there, torch.ones(3, 2).long()))
    with pytest.raises(ConfigError, match=r"tokens of the target are \(3, 4\) and its ids \(3, 2\)"):
        model(Pair(source, there, torch.ones(3, 2).long()), Tokens.full(3, 4))
    with pytest.raises(ConfigError, match="a recurrent decoder reads prompts of one length"):
        model.start(source, there, [[1], [1, 2], [1]], capacity=4)
    with pytest.raises(ConfigError, match="tokens of the source are"):
        model.start(source[:, 1:], there, [[1]] * 3, capacity=4)
    with pytest.raises(ConfigError, match="each row needs one source"):
        model.start(torch.zeros(2, 0).long(), Tokens.full(2, 0), [[1]] * 2, capacity=4)
    with pytest.raises(ConfigError, match="each row needs one source"):
        model.align(Pair(source, Tokens.packed([[3, 4], [7], [7]]), ones), Tokens.packed([[1, 1], [2], [2]]))
    with pytest.raises(ConfigError, match="width=0 must be at least 1"):
        AdditiveScoreConfig(width=0)
    with pytest.raises(ConfigError, match=r"dropout=0\.3 is between the encoder's layers and there is one"):
        RecurrentEncoderConfig(dropout=0.3)
    assert dataclasses.replace(model.config, encoder=RecurrentEncoderConfig(rests=18)).longest == 18
    with pytest.raises(ConfigError, match="each row needs one source"):
        model.start(source, Tokens.padded([5, 0, 7]), [[1]] * 3, capacity=4)
    assert AdditiveScoreConfig(width=3).build(8, 16).v.shape == (3,)
