import math

import pytest
import torch
import transformers

from qkv.errors import ConfigError
from qkv.generation import SamplingConfig, next_ids, row_generators
from qkv.generation.sampling import filtered
from tolerances import FLOAT32

CPU = torch.device("cpu")
LOGITS = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()


def kept(**fields):
    return [i for i, x in enumerate(filtered(LOGITS, SamplingConfig(**fields))[0].tolist()) if x > -math.inf]


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.4}, [0]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"min_p": 0.25}, [0, 1, 2]),
        ({"min_p": 0.5}, [0]),
        ({"min_p": 1.0}, [0]),
        # Temperature acts before top-p: halved, the square roots of the probabilities count, and the first has 0.35.
        ({"top_p": 0.4, "temperature": 2.0}, [0, 1]),
        # top-p acts on what top-k has left: 0.5 / 0.7 of it is the first token.
        ({"top_k": 2, "top_p": 0.7}, [0]),
        ({"top_k": 5, "top_p": 0.7}, [0, 1]),
    ],
)
def test_which_tokens_stay(fields, tokens):
    assert kept(**fields) == tokens


def test_equally_likely_tokens_share_the_last_place_of_top_k():
    logits = torch.tensor([[1.0, 3.0, 1.0, 0.0]])
    assert filtered(logits, SamplingConfig(top_k=2)).isfinite().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("fields", [{}, {"top_k": 5}, {"top_k": 99}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_filters_that_keep_everything_change_nothing(fields):
    torch.manual_seed(0)
    logits = torch.randn(64, 5) * 4
    assert torch.equal(filtered(logits, SamplingConfig(**fields)), logits - logits.amax(-1, keepdim=True))


PROCESSORS = {
    "temperature": ({"temperature": 0.7}, [transformers.TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 9}, [transformers.TopKLogitsWarper(9)]),
    "top_p": ({"top_p": 0.6}, [transformers.TopPLogitsWarper(0.6)]),
    "min_p": ({"min_p": 0.1}, [transformers.MinPLogitsWarper(0.1)]),
    "all": (
        {"temperature": 1.6, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
        [
            transformers.TemperatureLogitsWarper(1.6),
            transformers.TopKLogitsWarper(30),
            transformers.TopPLogitsWarper(0.8),
            transformers.MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("case", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_the_same_distribution_as_transformers(case):
    fields, processors = case
    torch.manual_seed(1)
    logits = torch.randn(200, 50) * 3
    want = transformers.LogitsProcessorList(processors)(torch.zeros(200, 1, dtype=torch.long), logits)
    got = filtered(logits, SamplingConfig(**fields))
    assert torch.equal(got.isfinite(), want.isfinite())
    torch.testing.assert_close(got.softmax(-1), want.softmax(-1), rtol=0, atol=FLOAT32)


def test_the_same_repetition_penalty_as_transformers():
    torch.manual_seed(2)
    logits = torch.randn(300, 12) - 1.5  # the largest of a row is as often below 0 as above
    history = torch.randint(0, 12, (300, 7))
    want = transformers.RepetitionPenaltyLogitsProcessor(1.8)(history, logits).argmax(-1)
    sampling = SamplingConfig(repetition_penalty=1.8, temperature=0)
    got = next_ids(logits, history.tolist(), sampling, [])
    assert torch.equal(got, want)
    assert not torch.equal(got, logits.argmax(-1)), "the penalty changed nothing, so this shows nothing"


def test_draws_follow_the_distribution():
    # 20 000 draws; the 99.9 % quantile of chi-square with 4 degrees of freedom is 18.5. The seed makes it one outcome.
    n, p = 20_000, LOGITS[0].exp()
    ids = next_ids(LOGITS.expand(n, 5), [[0]] * n, SamplingConfig(), row_generators(3, range(n), CPU))
    counts = ids.bincount(minlength=5)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 18.5


def test_a_row_draws_the_same_in_any_batch():
    torch.manual_seed(4)
    logits = torch.randn(6, 500)
    sampling = SamplingConfig(seed=5)
    together = next_ids(logits, [[0]] * 6, sampling, row_generators(5, range(6), CPU))
    assert together[:2].tolist() == next_ids(logits[:2], [[0]] * 2, sampling, row_generators(5, range(2), CPU)).tolist()


def test_rows_seeds_and_unseeded_runs_differ():
    def draws(seed, rows):
        return [torch.rand(1, generator=g).item() for g in row_generators(seed, range(rows), CPU)]

    assert len({*draws(0, 3), *draws(1, 3), *draws(None, 3), *draws(None, 3)}) == 12


def test_a_tiny_temperature_is_greedy_and_half_precision_does_not_overflow():
    logits = torch.tensor([[60_000.0, -60_000.0, 59_000.0]], dtype=torch.float16)
    assert next_ids(logits, [[0]], SamplingConfig(temperature=1e-38), row_generators(0, range(1), CPU)).tolist() == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1 must be at least 0; 0 takes"),
        ({"temperature": math.nan}, r"temperature=nan must be a finite number"),
        ({"top_k": 0}, r"top_k=0 must be at least 1; leave it out"),
        ({"top_p": 0.0}, r"top_p=0.0 must be above 0 and at most 1; leave it out"),
        ({"top_p": 1.1}, r"top_p=1.1 must be above 0 and at most 1"),
        ({"top_p": 1e-46}, r"top_p=1e-46 is too small to draw by; give 1e-20 or more"),
        ({"temperature": 1e-300}, r"temperature=1e-300 is too small to draw by"),
        ({"repetition_penalty": 1e-46}, r"repetition_penalty=1e-46 is too small to draw by"),
        ({"min_p": -0.1}, r"min_p=-0.1 must be between 0 and 1; leave it out"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0 must be above 0; 1 is none"),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**fields)
