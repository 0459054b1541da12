"""Beam search against all texts there are, and against transformers; cache on and off, ragged rows, any beam."""

import itertools
import math

import pytest
import torch
import transformers

import qkv
from qkv.errors import ConfigError, QkvError
from qkv.generation import BeamConfig, beam_search
from qkv.models.decoders import LuongConfig
from qkv.models.decoding import Decoding
from qkv.models.pairs import Pair
from qkv.models.recurrent_encoder import RecurrentEncoderConfig
from qkv.models.seq2seq import Seq2SeqConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.tokens import Tokens
from tiny import tiny_model
from tolerances import FLOAT64, HF_FLOAT32_INSIDE

VOCAB, END, LONGEST = 5, 0, 3
EVERYTHING = VOCAB**LONGEST


def exhaustive(log_p_after, n, penalty):
    """Every text of at most `n` tokens that ends, or is cut off there; `log_p_after(ids)` is of the next token."""
    found = []

    def extend(ids, total):
        log_p = log_p_after(ids)
        for token, more in enumerate(log_p.tolist()):
            if token == END:
                found.append((ids, (total + more) / (len(ids) + 1) ** penalty))
            elif len(ids) + 1 == n:
                found.append(((*ids, token), (total + more) / n**penalty))
            else:
                extend((*ids, token), total + more)

    extend((), 0.0)
    return sorted(found, key=lambda text: -text[1])


class Rereading(Decoding):
    """Without a cache: every text is read again from its beginning."""

    def __init__(self, run, first):
        self._run, self._texts, self._rows = run, [[] for _ in first], list(range(len(first)))
        self.logits = torch.zeros(0, VOCAB)
        if first:
            self.advance(torch.tensor(first))

    def advance(self, ids):
        self._texts = [[*text, token] for text, token in zip(self._texts, ids.tolist(), strict=True)]
        rows = zip(self._rows, self._texts, strict=True)
        self.logits = torch.stack([self._run(row, text) for row, text in rows])
        return self.logits

    def reorder(self, rows):
        super().reorder(rows)
        self._texts = [self._texts[i] for i in rows.tolist()]
        self._rows = [self._rows[i] for i in rows.tolist()]

    def join(self, other):
        raise NotImplementedError


SOURCES = [[1, 2, 3, 4, 2], [4], [3, 1]]
PROMPTS = [[3, 1, 4, 2], [2], [1, 1, 3]]


def recurrent():
    torch.manual_seed(2)
    embed = TokenEmbedderConfig(vocab_size=VOCAB)
    model = Seq2SeqConfig(
        d_model=6, source=embed, target=embed, encoder=RecurrentEncoderConfig(), decoder=LuongConfig()
    )
    model = model.build().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.9)
    ids = torch.tensor([[*s, *[9] * (5 - len(s))] for s in SOURCES])
    there = Tokens.padded([len(s) for s in SOURCES])

    def run(row, text):
        source = torch.tensor([SOURCES[row]])
        return model(Pair(source, Tokens.full(*source.shape), torch.tensor([text])))[0, -1]

    return [END] * 3, run, lambda: model.start(ids, there, [[END]] * 3, capacity=LONGEST)


def decoder_only():
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.embed.weight[VOCAB:] = 0
        model.embed.weight[:VOCAB] *= 3

    def logits(ids):
        return model(torch.tensor([ids]))[0, -1, :VOCAB]

    class First(Decoding):  # the first tokens of a larger vocabulary
        def __init__(self):
            self._inner = model.start(PROMPTS, capacity=9)
            self.logits = self._inner.logits[:, :VOCAB]

        def advance(self, ids):
            self.logits = self._inner.advance(ids)[:, :VOCAB]
            return self.logits

        def reorder(self, rows):
            super().reorder(rows)
            self._inner.reorder(rows)

        def join(self, other):
            raise NotImplementedError

    return [p[-1] for p in PROMPTS], lambda row, text: logits(PROMPTS[row][:-1] + text), First


KINDS = {"recurrent": recurrent, "decoder only": decoder_only}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]()


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_with_as_many_beams_as_texts_it_finds_the_best_of_all(kind, penalty):
    first, run, start = kind
    search = BeamConfig(beams=EVERYTHING, length_penalty=penalty, max_new_tokens=LONGEST)
    for row, texts in enumerate(beam_search(start(), end_ids=[END], search=search)):
        want = exhaustive(lambda ids, row=row: run(row, [first[row], *ids]).log_softmax(-1), LONGEST, penalty)
        assert [text.ids for text in texts[:9]] == [ids for ids, _ in want[:9]]
        for ours, (_, score) in zip(texts, want, strict=True):
            assert abs(ours.score - score) < FLOAT64
        assert all(text.ended == (len(text.ids) < LONGEST) for text in texts)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_a_cache_changes_nothing_and_rows_do_not_meet(kind, beams):
    first, run, start = kind
    search = BeamConfig(beams=beams, max_new_tokens=LONGEST)
    with_cache = beam_search(start(), end_ids=[END], search=search)
    without = beam_search(Rereading(run, first), end_ids=[END], search=search)
    for row, (a, b) in enumerate(zip(with_cache, without, strict=True)):
        (alone,) = beam_search(
            Rereading(lambda _, t, r=row: run(r, t), first[row : row + 1]), end_ids=[END], search=search
        )
        assert [x.ids for x in a] == [x.ids for x in b] == [x.ids for x in alone]
        for x, y in zip(a, b, strict=True):
            assert abs(x.score - y.score) < FLOAT64


def test_one_beam_takes_the_likeliest_token(kind):
    first, run, start = kind
    found = beam_search(start(), end_ids=[END], search=BeamConfig(max_new_tokens=LONGEST))
    for row, (text,) in enumerate(found):
        ids = [first[row]]
        for _ in range(LONGEST):
            ids.append(int(run(row, ids).argmax()))
            if ids[-1] == END:
                break
        assert text.ids == tuple(token for token in ids[1:] if token != END)


@pytest.mark.parametrize(("beams", "penalty"), list(itertools.product([2, 4], [0.5, 1.0, 2.0])))
def test_it_is_that_of_transformers(tmp_path, beams, penalty):
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 23, "n_positions": 32, "initializer_range": 0.5}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=1, eos_token_id=2, **shape)).eval()
    theirs.save_pretrained(tmp_path)
    prompt = [5, 7, 11]
    want = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 3).long(), num_beams=beams, num_return_sequences=beams,
        do_sample=False, early_stopping="never", length_penalty=penalty, max_new_tokens=9, pad_token_id=2,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    decoding = qkv.load(tmp_path).model.start([prompt], capacity=12)
    search = BeamConfig(beams=beams, length_penalty=penalty, max_new_tokens=9)
    (found,) = beam_search(decoding, end_ids=[2], search=search)
    for ours, ids, score in zip(found, want.sequences.tolist(), want.sequences_scores.tolist(), strict=True):
        assert list(ours.ids) == list(itertools.takewhile(lambda token: token != 2, ids[3:]))
        assert abs(ours.score - score) < HF_FLOAT32_INSIDE


def test_as_many_texts_as_beams_however_good_the_first_is():
    likely = torch.tensor([0.9, 0.04, 0.03, 0.02, 0.01]).log()
    (found,) = beam_search(
        Rereading(lambda *_: likely, [1]), end_ids=[END], search=BeamConfig(beams=2, max_new_tokens=5)
    )
    assert [text.ids for text in found] == [(), (1,)]


def test_a_longer_text_may_still_win():
    first = torch.tensor([0.5, 0.4, 0.05, 0.03, 0.02]).log()
    later = torch.tensor([-40.0, 0.0, -40.0, -40.0, -40.0])
    run = Rereading(lambda _, text: first if len(text) == 1 else later, [1])
    search = BeamConfig(beams=2, length_penalty=0.2, max_new_tokens=5)
    ((best, _),) = beam_search(run, end_ids=[END], search=search)
    assert best.ids == (1,) * 5  # log 0.4 / 5^0.2 is above log 0.5


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
def test_one_beam_is_greedy_however_long_the_texts(penalty):
    """The first end that is the likeliest token is the end, also where another text would score higher."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(200, 8, 8, generator=g).log_softmax(-1)  # of each row, what follows each token
    run = Rereading(lambda row, text: table[row, text[-1]], [1] * 200)
    search = BeamConfig(length_penalty=penalty, max_new_tokens=60)
    lengths = set()
    for row, (text,) in enumerate(beam_search(run, end_ids=[END], search=search)):
        ids = [1]
        while ids[-1] != END and len(ids) <= 60:
            ids.append(int(table[row, ids[-1]].argmax()))
        assert text.ids == tuple(token for token in ids[1:] if token != END)
        lengths.add(len(text.ids))
    assert {0, 1, 2, 3, 60} <= lengths


def test_a_text_with_two_ends_is_found_once():
    after = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1]).log()
    search = BeamConfig(beams=4, max_new_tokens=3)
    (found,) = beam_search(Rereading(lambda *_: after, [2]), end_ids=[0, 1], search=search)
    assert len({text.ids for text in found}) == len(found) == 4
    assert found[0].ids == ()
    assert abs(found[0].log_probability - math.log(0.3)) < 1e-6  # the likelier of its ends


def test_mistakes():
    with pytest.raises(ConfigError, match="beams=0 must be from 1 to 1000"):
        BeamConfig(beams=0)
    with pytest.raises(ConfigError, match="length_penalty=inf must be a finite number"):
        BeamConfig(length_penalty=float("inf"))
    with pytest.raises(ConfigError, match=r"length_penalty=11\.0 must be from -10 to 10"):
        BeamConfig(length_penalty=11)
    with pytest.raises(ConfigError, match="give at least one row"):
        beam_search(Rereading(None, []), end_ids=[0], search=BeamConfig())
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = Rereading(lambda *_, value=value: torch.full((VOCAB,), value), [1])
        with pytest.raises(QkvError, match="not finite"):
            beam_search(broken, end_ids=[0], search=BeamConfig())
