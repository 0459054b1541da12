import pytest
import torch

from qkv.errors import ConfigError, QkvError
from qkv.generation import Finish, SamplingConfig, generate
from qkv.models.transformer import TransformerConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import VectorEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.heads import VectorHeadConfig
from qkv.nn.norms import RMSNormConfig
from qkv.presets import gpt2, llama

VOCAB, CONTEXT = 31, 14
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        sizes = {"d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 32}
        config = llama(**sizes, vocab_size=VOCAB, theta=100.0, context=CONTEXT)
    else:
        config = gpt2(d_model=24, n_layers=2, n_heads=4, vocab_size=VOCAB, context=CONTEXT)
    built = config.build().double()  # float64: no two logits are so close that another order of sums could swap them
    for p in built.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return built


def texts(model, prompts, sampling, **options):
    """The new tokens of each row, and why it ended."""
    steps = list(generate(model, prompts, sampling=sampling, **options))
    rows = [[step.ids[row] for step in steps if step.ids[row] is not None] for row in range(len(prompts))]
    return list(zip(rows, steps[-1].finish, strict=True))


def greedy_without_cache(model, prompt, n):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_cache_changes_nothing(model):
    for prompt in PROMPTS:
        want = greedy_without_cache(model, prompt, 7)
        assert texts(model, [prompt], GREEDY, max_new_tokens=7) == [(want, Finish.LENGTH)]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(seed=3), SamplingConfig(seed=3, repetition_penalty=2.0)])
def test_each_row_of_a_ragged_batch_is_as_if_alone(model, sampling):
    # Up to the context: the rows fill it one after the other, and the shorter ones go on.
    together = texts(model, PROMPTS, sampling, max_new_tokens=12, stop_ids=(7, 8))
    assert len({end for _, end in together}) > 1, "all rows ended alike, so this shows too little"
    for row, prompt in enumerate(PROMPTS):
        prompts = [*([[1]] * row), prompt]  # other rows above it, for the same place in the batch
        assert texts(model, prompts, sampling, max_new_tokens=12, stop_ids=(7, 8))[row] == together[row]


def test_the_three_ends(model):
    prompt = PROMPTS[2]
    ids = greedy_without_cache(model, prompt, CONTEXT - len(prompt))
    assert texts(model, [prompt], GREEDY, max_new_tokens=99) == [(ids, Finish.CONTEXT)]
    assert texts(model, [prompt], GREEDY, max_new_tokens=2, context=99) == [(ids[:2], Finish.LENGTH)]
    assert texts(model, [prompt], GREEDY, max_new_tokens=99, context=8) == [(ids[:2], Finish.CONTEXT)]
    before = ids.index(ids[3])
    assert texts(model, [prompt], GREEDY, max_new_tokens=99, stop_ids=(ids[3],)) == [(ids[:before], Finish.STOP)]


def test_the_seed_decides(model):
    def run(seed):
        return texts(model, PROMPTS, SamplingConfig(seed=seed), max_new_tokens=8)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_copies_of_a_prompt_are_different_samples(model):
    first, second = texts(model, [[1, 2]] * 2, SamplingConfig(seed=0), max_new_tokens=10)
    assert first != second


def test_the_mode_of_the_model_and_of_torch_are_as_before(model):
    model.train()
    for step in generate(model, [[1]], max_new_tokens=3, sampling=GREEDY):
        assert not model.training
        assert not torch.is_inference_mode_enabled()
        assert step.ids[0] is not None
    assert model.training
    stream = generate(model, [[1]], max_new_tokens=3, sampling=GREEDY)
    next(stream)
    stream.close()
    assert model.training
    model.eval()


def test_no_logits_of_all_tokens(model, monkeypatch):
    seen = []
    readout = type(model).readout
    monkeypatch.setattr(type(model), "readout", lambda self, x: seen.append(tuple(x.shape)) or readout(self, x))
    list(generate(model, PROMPTS, max_new_tokens=3, sampling=GREEDY))
    assert seen == [(4, 1, 24)] * 3


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts; give at least one"),
        ([[1], []], {}, "prompt 1 is empty; begin it with a token"),
        ([[1] * CONTEXT], {}, "prompt 0 has 14 tokens and the context 14; cut it to 13 or fewer"),
        ([[1] * 5], {"context": 4}, "prompt 0 has 5 tokens and the context 4; cut it to 3"),
        ([[1, 31]], {}, "prompt 0 has ids from 1 to 31 and the model's vocabulary 31 tokens"),
        ([[-1]], {}, "prompt 0 has ids from -1 to -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ],
)
def test_what_is_refused_before_anything_runs(model, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, prompts, **{"max_new_tokens": 3, "sampling": GREEDY} | options)


def test_a_position_table_is_a_limit_whatever_the_context(model):
    if model.config.embed.max_length is not None:
        ((ids, end),) = texts(model, [[1] * 10], GREEDY, max_new_tokens=99, context=99)
        assert (len(ids), end) == (CONTEXT - 10, Finish.CONTEXT)


def test_a_model_without_a_vocabulary_is_refused():
    block = PreNormConfig(norm=RMSNormConfig(), sublayers=(FFNConfig(),))
    config = TransformerConfig(
        d_model=4, embed=VectorEmbedderConfig(n_features=3), blocks=block, head=VectorHeadConfig()
    )
    with pytest.raises(ConfigError, match="only a model with an LMHead can generate text"):
        generate(config.build(), [[1]], max_new_tokens=1, sampling=GREEDY)


def test_damaged_weights_are_named():
    config = gpt2(d_model=8, n_layers=1, n_heads=2, vocab_size=5, context=8)
    model = config.build()
    torch.nn.init.constant_(model.embed.weight, torch.nan)
    with pytest.raises(QkvError, match="logits are not finite"):
        next(generate(model, [[1]], max_new_tokens=1, sampling=GREEDY))
