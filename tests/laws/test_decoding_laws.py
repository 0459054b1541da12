"""The laws of decoding: rows that join and leave at random are what each prompt alone gives, in every model."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qkv
from qkv.errors import ConfigError
from qkv.generation import BeamConfig, Engine, Finish, Kept, Row, SamplingConfig, beam_search, generate
from qkv.masks import Causal, Window
from qkv.models.decoders import LuongConfig
from qkv.models.recurrent_encoder import RecurrentEncoderConfig
from qkv.models.seq2seq import Seq2SeqConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.convolution import ConvolutionConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.positions import LearnedPositionsConfig
from qkv.nn.recurrent import RecurrentConfig
from qkv.presets.translators import attention_is_all_you_need
from qkv.recorder import AttentionWeights, Recorder
from qkv.tokens import Tokens, pad_ids
from tiny import NORM, tiny_config, tiny_model, token_ids
from tolerances import FLOAT64

CAPACITY, VOCAB = 24, 7


def with_sublayers(*sublayers):
    config = tiny_config()
    block = PreNormConfig(norm=NORM, sublayers=sublayers)
    return tiny_model(config=dataclasses.replace(config, blocks=dataclasses.replace(config.blocks, pattern=block)))


def language_model(model):
    return lambda prompts: model.start(prompts, capacity=CAPACITY)


def of_pairs(config):
    torch.manual_seed(0)
    model = config.build().double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.5).add_(1.0 if "norm" in name and "weight" in name else 0.0)

    def start(prompts):
        """The prompts are sources."""
        ids, tokens = pad_ids(prompts, torch.device("cpu"))
        return model.start(ids, tokens, [[1]] * len(prompts), capacity=CAPACITY)

    return start


EMBED = TokenEmbedderConfig(vocab_size=VOCAB)
RECURRENT = Seq2SeqConfig(
    d_model=6, source=EMBED, target=dataclasses.replace(EMBED, position=LearnedPositionsConfig(length=CAPACITY)),
    encoder=RecurrentEncoderConfig(), decoder=LuongConfig(),
)  # fmt: skip
ATTENTIVE = attention_is_all_you_need(8, 2, 2, 16).with_vocabularies(VOCAB, VOCAB, shared=False)
STARTS = {
    "full": lambda: language_model(tiny_model()),
    "position table": lambda: language_model(tiny_model(position=None, table=LearnedPositionsConfig(length=CAPACITY))),
    "ring": lambda: language_model(tiny_model(mask=Causal() & Window(size=3))),
    "stateful": lambda: language_model(
        with_sublayers(RecurrentConfig(), *tiny_config().blocks.pattern.sublayers, ConvolutionConfig())
    ),
    "encoder-decoder": lambda: of_pairs(ATTENTIVE),
    "recurrent pairs": lambda: of_pairs(RECURRENT),
    "without attention": lambda: of_pairs(dataclasses.replace(RECURRENT, decoder=qkv.FixedVectorConfig())),
}


@pytest.fixture(scope="module", params=STARTS)
def start(request):
    return STARTS[request.param]()


TOKEN = st.integers(0, VOCAB - 1)
PROMPT = st.lists(TOKEN, min_size=1, max_size=6)
PROMPTS = st.lists(PROMPT, min_size=1, max_size=3)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_rows_join_leave_and_change_places_as_if_alone(start, data):
    new = data.draw(PROMPTS)
    decoding, rows = start(new), [(prompt, ()) for prompt in new]
    for _ in range(data.draw(st.integers(1, 6))):
        action = data.draw(st.sampled_from(["advance", "join", "leave", "reorder"]))
        if action == "join":
            new = data.draw(PROMPTS)
            decoding.join(start(new))
            rows += [(prompt, ()) for prompt in new]
        elif action == "leave" and len(rows) > 1:
            row = data.draw(st.integers(0, len(rows) - 1))
            decoding.leave([row])
            del rows[row]
        elif action == "reorder":
            order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
            decoding.reorder(torch.tensor(order))
            rows = [rows[row] for row in order]
        ids = [data.draw(TOKEN) for _ in rows]
        decoding.advance(torch.tensor(ids))
        rows = [(prompt, (*text, token)) for (prompt, text), token in zip(rows, ids, strict=True)]
    for got, (prompt, text) in zip(decoding.logits, rows, strict=True):
        alone = start([prompt])
        for token in text:
            alone.advance(torch.tensor([token]))
        torch.testing.assert_close(got, alone.logits[0], rtol=0, atol=FLOAT64)


GREEDY = SamplingConfig(temperature=0)
SAMPLINGS = [GREEDY, SamplingConfig(seed=3), SamplingConfig(seed=3, repetition_penalty=2, top_k=4)]
REQUEST = st.builds(
    dict,
    prompt=PROMPT,
    sampling=st.sampled_from(SAMPLINGS),
    max_new_tokens=st.integers(1, 8),
    stop_ids=st.frozensets(TOKEN, max_size=2),
    context=st.sampled_from([None, 8]),
    stream=st.integers(0, 2),
)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_an_engine_writes_each_text_as_if_alone(start, data):
    requests = data.draw(st.lists(REQUEST, min_size=1, max_size=4))
    rows = [Row(**request) for request in requests]
    engine, waiting = Engine(start, rows[:1], log_probabilities=True), rows[1:]
    while engine.rows or waiting:
        while waiting and (not engine.rows or data.draw(st.booleans())):
            engine.join(waiting.pop(0))
        drawn = engine.step()
        assert engine.rows == [row for row in drawn if row.finish is None]
    for request, row in zip(requests, rows, strict=True):
        want = Row(**request)
        alone = Engine(start, [want], log_probabilities=True)
        while alone.rows:
            alone.step()
        assert (row.text, row.finish) == (want.text, want.finish)
        got, wanted = (torch.tensor(each.log_probabilities, dtype=torch.float64) for each in (row, want))
        torch.testing.assert_close(got, wanted, rtol=0, atol=FLOAT64)
        new = len(row.text) - len(row.prompt)
        assert len(got) == new + (row.finish is Finish.STOP)
        assert new <= row.max_new_tokens
        assert not row.stop_ids.intersection(row.text[len(row.prompt) :])


def test_a_text_is_given_up(start):
    row, other = (Row([n, 2], GREEDY, 5) for n in (1, 3))
    engine = Engine(start, [row, other])
    engine.step()
    engine.leave(row)
    while engine.rows:
        engine.step()
    assert (len(row.text), row.finish) == (3, None)
    assert (len(other.text), other.finish) == (7, Finish.LENGTH)


@pytest.mark.parametrize("seed", range(3))
def test_the_log_probabilities_of_a_text_sum_to_its_loss(seed):
    model, sampling = tiny_model(), SamplingConfig(seed=seed, temperature=0.8, top_k=9)
    prompts = [token_ids(n, seed=seed).tolist() for n in (1, 4, 6)]
    options = {"max_new_tokens": 8, "sampling": sampling, "stop_ids": range(4)}
    steps = list(generate(model, prompts, log_probabilities=True, **options))
    for row, prompt in enumerate(prompts):
        ids = [step.ids[row] for step in steps if step.ids[row] is not None]
        scores = [step.log_probabilities[row] for step in steps if step.log_probabilities[row] is not None]
        assert len(scores) == len(ids) + (steps[-1].finish[row] is Finish.STOP)
        text = torch.tensor([[*prompt, *ids]])
        targets = text[:, 1:].clone()
        targets[:, : len(prompt) - 1] = -100
        loss, _ = model.loss(text[:, :-1], targets, scale=1.0)
        assert abs(sum(scores[: len(ids)]) + loss.item()) < FLOAT64
    quiet = list(generate(model, prompts, **options))
    assert [(step.ids, step.finish) for step in quiet] == [(step.ids, step.finish) for step in steps]
    assert {score for step in quiet for score in step.log_probabilities} == {None}


def test_when_the_longest_row_ends_the_others_are_not_read_anew(monkeypatch):
    model, read = tiny_model(), []
    encode = type(model).encode

    def counted(self, inputs, *arguments, **options):
        read.append(tuple(inputs.shape))
        return encode(self, inputs, *arguments, **options)

    monkeypatch.setattr(type(model), "encode", counted)
    steps = list(generate(model, [[1] * 9, [2, 3], [4]], max_new_tokens=20, context=12, sampling=GREEDY))
    assert read == [(3, 9), (3, 1), (3, 1), *[(2, 1)] * 7, (1, 1)]
    assert steps[-1].finish == (Finish.CONTEXT,) * 3


@pytest.mark.parametrize("beams", [1, 3])
def test_a_search_of_a_language_model(beams):
    model, search, prompts = tiny_model(), BeamConfig(beams=beams, max_new_tokens=4), [[1, 2, 3], [4]]
    together = beam_search(model.start(prompts, capacity=8), end_ids=[0], search=search)
    for prompt, texts in zip(prompts, together, strict=True):
        (alone,) = beam_search(model.start([prompt], capacity=8), end_ids=[0], search=search)
        assert [text.ids for text in texts] == [text.ids for text in alone]


@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(size=3)], ids=["dense", "ring"])
def test_a_row_is_taken_out_and_put_back(mask):
    model, ids = tiny_model(mask=mask), token_ids(3, 9)
    cache = model.make_cache(3, 20, room=4)
    with torch.no_grad():
        model(ids[:, :7], Tokens.padded([7, 4, 6]), cache=cache)
        taken = cache.take(torch.tensor([1]))
        cache.reorder(torch.tensor([2]))
        cache.tighten()
        assert (cache.bound, cache.even) == (6, True)
        model(ids[2:, 6:7], cache=cache)
        cache.extend(taken)
        got = model(torch.stack([ids[2, 7], ids[1, 4]])[:, None], cache=cache)[:, 0]
        for row, text in enumerate((ids[2:, :8], ids[1:2, :5])):
            torch.testing.assert_close(got[row], model(text)[0, -1], rtol=0, atol=FLOAT64)


def test_caches_that_do_not_fit_together():
    model = tiny_model()
    with pytest.raises(ConfigError, match="the caches have room for 5 and 6 tokens"):
        model.make_cache(1, 5).extend(model.make_cache(1, 6))
    model = with_sublayers(RecurrentConfig())
    cache = model.make_cache(1, 5)
    model(token_ids(1, 2), cache=cache)
    with pytest.raises(ConfigError, match="one cache has read something and the other has not"):
        cache.extend(model.make_cache(1, 5))


class Shapes(Recorder):
    def __init__(self):
        self.seen = []

    def attention(self, name, problem, out):
        self.seen.append((name, tuple(problem.q.shape), problem.k.shape[2]))


def test_generation_is_recorded():
    model, recorder = tiny_model(), Shapes()
    options = {"max_new_tokens": 3, "sampling": GREEDY}
    steps = [step.ids for step in generate(model, [[1, 2]], recorder=recorder, **options)]
    assert steps == [step.ids for step in generate(model, [[1, 2]], **options)]
    assert [seen[1:] for seen in recorder.seen[::2]] == [((1, 4, 2, 4), 2), ((1, 4, 1, 4), 3), ((1, 4, 1, 4), 4)]


def test_a_generation_from_what_was_kept_is_recorded_each_time():
    model, kept = tiny_model(), Kept()
    for prompt, read in (([1, 2], 2), ([1, 2, 3], 1)):
        recorder = Shapes()
        list(generate(model, [prompt], max_new_tokens=1, sampling=GREEDY, kept=kept, recorder=recorder))
        assert recorder.seen == [(f"blocks.{i}.attention", (1, 4, read, 4), len(prompt)) for i in range(2)]


def test_weights_of_attention_are_found_by_name():
    """Those that make of the values what each layer put out, of a shared block in the order of its rounds."""
    model, recorder = tiny_model(layers=3), AttentionWeights()
    with torch.no_grad():
        model(token_ids(2, 5), recorder=recorder)
    assert list(recorder.weights) == [f"blocks.{i}.attention" for i in range(3)]
    for (weights,) in recorder.weights.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=FLOAT64)
        assert (weights.triu(1) == 0).all()
    few = AttentionWeights(only={"blocks.1.attention"})
    list(generate(model, [[1, 2]], max_new_tokens=2, sampling=GREEDY, recorder=few))
    assert [w.shape for w in few.weights.pop("blocks.1.attention")] == [(1, 4, 2, 2), (1, 4, 1, 3)]
    assert not few.weights
