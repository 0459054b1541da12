"""Texts of language models that are searched for, and how tokens are drawn where nobody says."""

import dataclasses
import itertools
import json

import pytest
import torch
import transformers

import qkv
from chats import chat_tokenizer, write_chat_run
from qkv.cli import main
from qkv.errors import ConfigError
from qkv.generation import USUAL, Finish
from tolerances import HF_FLOAT32_INSIDE

CONTEXT = 24
PROMPTS = ["Hello", "x", "a longer one, é", "b" * (CONTEXT - 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 of bytes, whose table of positions ends with its context."""
    folder = tmp_path_factory.mktemp("searched")
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "initializer_range": 0.5}
    config = transformers.GPT2Config(vocab_size=tokenizer.vocab_size, bos_token_id=257, eos_token_id=2, **shape)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return qkv.load(folder)


@pytest.mark.parametrize(("beams", "penalty"), [(2, 0.5), (4, 2.0)])
def test_a_search_is_that_of_transformers(folder, loaded, beams, penalty):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt = loaded.encode_prompts(["Hello"])
    want = theirs.generate(
        torch.tensor(prompt), attention_mask=torch.ones(1, 5).long(), num_beams=beams, num_return_sequences=beams,
        do_sample=False, early_stopping="never", length_penalty=penalty, max_new_tokens=9, pad_token_id=2,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    found = loaded.complete("Hello", n=beams, beams=beams, length_penalty=penalty, max_new_tokens=9)
    for ours, ids, score in zip(found, want.sequences.tolist(), want.sequences_scores.tolist(), strict=True):
        ids = list(itertools.takewhile(lambda token: token != 2, ids[len(prompt[0]) :]))
        assert ours.text == loaded.tokenizer.decode(ids)
        assert ours.finish == (Finish.LENGTH if len(ids) == 9 else Finish.STOP)
        assert abs(ours.score.total / len(ours.score.tokens) ** penalty - score) < HF_FLOAT32_INSIDE
    assert loaded.generate("Hello", beams=beams, length_penalty=penalty, max_new_tokens=9) == found[0].text


def test_each_of_several_prompts_is_searched_for_as_if_alone(loaded):
    """Up to the end of the context, which they reach one after the other."""
    together = loaded.complete(PROMPTS, beams=3, max_new_tokens=15)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = loaded.complete([prompt], beams=3, max_new_tokens=15)
        assert (found.text, found.finish, found.score.tokens) == (alone.text, alone.finish, alone.score.tokens)
    assert together[3].finish is Finish.CONTEXT
    assert together[1].finish is not Finish.CONTEXT
    assert "".join(loaded.stream("Hello", beams=3, max_new_tokens=15)) == together[0].text


def test_one_beam_is_the_likeliest_token_each_time(loaded):
    assert loaded.generate(PROMPTS, beams=1) == loaded.generate(PROMPTS, temperature=0)


def test_a_search_ends_before_a_stop_string_and_answers_questions(tmp_path, loaded):
    whole = loaded.generate("x", beams=2, max_new_tokens=12)
    (cut,) = loaded.complete(["x"], beams=2, max_new_tokens=12, stop=whole[3:5])
    assert (cut.text, cut.finish) == (whole[: whole.index(whole[3:5])], Finish.STOP)
    talker = qkv.load(write_chat_run(tmp_path / "run"))
    assert talker.chat("Hello", beams=1, max_new_tokens=9) == talker.chat("Hello", temperature=0, max_new_tokens=9)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"beams": 0}, "beams=0 must be from 1 to 1000"),
        ({"beams": 2, "temperature": 0.5, "seed": 1}, "beams=2 searches, and seed, temperature is for tokens drawn"),
        ({"beams": 2, "sampling": {}}, "beams=2 searches, and sampling is for tokens drawn by chance; leave one out"),
        ({"length_penalty": 1.0}, r"length_penalty=1\.0 is of a search; give beams too, such as beams=4"),
        ({"beams": 2, "n": 3}, "3 texts are asked for and beams=2; raise beams"),
        ({"beams": 1000, "n": 800, "max_new_tokens": 1}, "800 texts are asked for and the search found 259; ask for"),
        ({"beams": 2, "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ],
)
def test_mistakes(loaded, how, message):
    with pytest.raises(ConfigError, match=message):
        loaded.generate("a", **how)


def test_on_the_command_line(folder, loaded, capsys):
    want = loaded.complete("x", n=2, beams=3, length_penalty=0.5, max_new_tokens=8)
    options = ["--beams", "3", "--length-penalty", "0.5", "--samples", "2", "--max-new-tokens", "8", "--json"]
    assert main(["generate", str(folder), "x", *options]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == [one.text for one in want]
    assert main(["generate", str(folder), "x", "--beams", "3", "--top-p", "0.5"]) == 2
    assert "beams=3 searches, and top_p is for tokens drawn by chance" in capsys.readouterr().err


# --- how tokens are drawn where nobody says ---------------------------------------------------------------------------


def test_the_defaults_of_python_and_of_the_command_line_are_one(folder, loaded, capsys):
    assert loaded.sampling == USUAL
    want = loaded.generate("x", seed=1, max_new_tokens=15)
    assert want == loaded.generate("x", sampling=USUAL, seed=1, max_new_tokens=15)
    assert want != loaded.generate("x", temperature=1.0, seed=1, max_new_tokens=15)
    assert main(["generate", str(folder), "x", "--seed", "1", "--max-new-tokens", "15"]) == 0
    assert capsys.readouterr().out == f"x{want}\n"
    assert qkv.SampleConfig().temperature == USUAL.temperature
    for verb in ("generate", "chat"):
        assert main([verb, "--help"]) == 0
        words = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"By default as the makers of the model say, else {USUAL.temperature}." in words


def test_what_the_makers_say_comes_before_the_usual(tmp_path, folder, capsys):
    made = qkv.load(folder)
    makers = qkv.SamplingConfig(temperature=1.7, top_k=5)
    made = dataclasses.replace(made, facts=dataclasses.replace(made.facts, sampling=makers))
    assert made.sampling == makers
    want = made.generate("x", seed=1, max_new_tokens=15)
    assert want == made.generate("x", sampling=makers, seed=1, max_new_tokens=15)
    qkv.save(made, tmp_path / "saved")
    assert main(["generate", str(tmp_path / "saved"), "x", "--seed", "1", "--max-new-tokens", "15"]) == 0
    assert capsys.readouterr().out == f"x{want}\n"
    colder = made.generate("x", seed=1, top_k=2, max_new_tokens=15)
    assert colder == made.generate("x", sampling=makers.replace(top_k=2), seed=1, max_new_tokens=15)
    assert (
        main(["generate", str(tmp_path / "saved"), "x", "--seed", "1", "--top-k", "2", "--max-new-tokens", "15"]) == 0
    )
    assert capsys.readouterr().out == f"x{colder}\n"
