"""Log-probabilities of texts: those of transformers, of a text alone, and of what was written."""

import dataclasses

import pytest
import torch
import transformers

import qkv
from chats import chat_tokenizer, write_chat_run
from qkv.errors import ConfigError, QkvError
from qkv.generation import score
from qkv.loading.loaded import Loaded
from qkv.masks import Full
from tiny import VOCAB, tiny_model, token_ids
from tolerances import FLOAT32, FLOAT64

TEXTS = ["Hello", "é", "a longer one, 你好", "a", "xyz" * 20]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return qkv.load(write_chat_run(tmp_path_factory.mktemp("score") / "run"))


@pytest.fixture(scope="module")
def begun(loaded):
    """The same, of which every text begins with a token."""
    return dataclasses.replace(loaded, facts=qkv.Facts(begin_id=257, begins=True))


def test_they_are_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    config = transformers.GPT2Config(vocab_size=tokenizer.vocab_size, bos_token_id=257, eos_token_id=0, **shape)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    ids = torch.tensor([[257, *tokenizer.encode("Héllo")]])
    with torch.no_grad():
        want = theirs(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    begun = dataclasses.replace(qkv.load(tmp_path), facts=qkv.Facts(begin_id=257, begins=True))
    found = begun.score("Héllo")
    torch.testing.assert_close(torch.tensor(found.log_probabilities), want, rtol=0, atol=FLOAT32)
    assert found.total == pytest.approx(want.sum().item(), abs=10 * FLOAT32)
    assert found.tokens == ("H", "", "é", "l", "l", "o")  # é is two tokens
    bare = dataclasses.replace(begun, facts=qkv.Facts()).score("Héllo")  # nothing is before the first token
    assert (bare.tokens, len(bare.log_probabilities)) == (("", "é", "l", "l", "o"), 5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_text_among_others_is_as_it_is_alone(loaded, begun, batch_size):
    for model in (loaded, begun):
        together = model.score(TEXTS, batch_size=batch_size)
        for text, found in zip(TEXTS, together, strict=True):
            alone = model.score(text)
            assert found.tokens == alone.tokens
            assert found.log_probabilities == pytest.approx(alone.log_probabilities, abs=FLOAT32)
        assert model.score([]) == []
    assert ["".join(found.tokens) for found in begun.score(TEXTS)] == TEXTS


def test_logits_are_read_in_parts(monkeypatch):
    model, texts = tiny_model(), [token_ids(n).tolist() for n in (9, 1, 5)]
    want = score(model, texts)
    assert [len(row) for row in want] == [8, 0, 4]
    monkeypatch.setattr("qkv.generation.scoring._CHUNK", 3)
    for row, again in zip(want, score(model.train(), texts), strict=True):
        assert again == pytest.approx(row, abs=FLOAT64)
    assert model.training


@pytest.mark.parametrize("stop", [(), ("\n", "a", "e", "\x00")])
def test_what_was_written_says_how_likely_it_was(loaded, stop):
    ids, sampling = loaded.encode_prompts(["Hello", "x"]), qkv.SamplingConfig(seed=1, temperature=0.9)
    found = loaded.complete(["Hello", "x"], max_new_tokens=15, sampling=sampling, stop=stop)
    for prompt, done in zip(ids, found, strict=True):
        assert "".join(done.score.tokens).startswith(done.text)
        assert len(done.score.tokens) == len(done.score.log_probabilities) > 0
        # Bytes that are no UTF-8 do not come back as they were, so the ids are drawn once more.
        steps = qkv.generate(loaded.model, [prompt], max_new_tokens=15, sampling=sampling)
        written = [step.ids[0] for step in steps][: len(done.score.tokens)]
        (again,) = score(loaded.model, [[*prompt, *[0 if token is None else token for token in written]]])
        assert done.score.log_probabilities == pytest.approx(again[len(prompt) - 1 :], abs=FLOAT32)


def test_mistakes(loaded):
    assert len(loaded.score("a" * 400).tokens) == 399  # the context
    with pytest.raises(ConfigError, match="text 1 has 401 tokens and the context 400; cut it to 400 or fewer"):
        loaded.score(["b", "a" * 401])
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        loaded.score("a", batch_size=0)
    with pytest.raises(ConfigError, match="the model has no tokenizer"):
        Loaded(model=loaded.model).score("a")
    with pytest.raises(ConfigError, match="the mask Full lets a token see what it is to predict"):
        score(tiny_model(mask=Full()), [[1, 2]])
    with pytest.raises(ConfigError, match=f"ids from 1 to {VOCAB}"):
        score(tiny_model(), [[1, VOCAB]])
    broken = tiny_model()
    torch.nn.init.constant_(broken.embed.weight, torch.nan)
    with pytest.raises(QkvError, match="not finite"):
        score(broken, [[1, 2]])
