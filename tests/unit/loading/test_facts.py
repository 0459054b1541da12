"""What is known of a model besides its weights goes through load, training, evaluation and export unchanged."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers.processors import TemplateProcessing

import qkv
from qkv.data import Dataset, Split
from qkv.errors import ConfigError
from qkv.loading.convert import convert
from qkv.presets import llama
from qkv.tasks.documents import DataConfig
from qkv.tasks.text import Text

WORDS = {"<s>": 0, "</s>": 1, "<pad>": 2, "<eot>": 3, "the": 4, "boat": 5, "is": 6, "here": 7}


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder whose config names another begin token than its tokenizer puts there."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="the"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>", "<pad>", "<eot>"])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    torch.manual_seed(0)
    config = llama(
        d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8, vocab_size=8, theta=1e4, context=32, tied=False
    )
    qkv.save(config.build(), tmp_path / "own")
    made = convert(tmp_path / "own", tmp_path / "hf", to="hf", certify=False)
    inner.save(str(made / "tokenizer.json"))
    words = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "padding_side": "left"}
    drawn = {"eos_token_id": [1, 3], "pad_token_id": 2, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (made / "tokenizer_config.json").write_text(json.dumps(words))
    (made / "generation_config.json").write_text(json.dumps(drawn | {"bos_token_id": 1}))
    return made


FACTS = qkv.Facts(
    begin_id=0, begins=True, stop_ids=(1, 3), pad_id=2, pad_side="left",
    sampling=qkv.SamplingConfig(temperature=0.6, top_p=0.9),
)  # fmt: skip


def test_a_folder_of_hugging_face_and_its_export(folder, tmp_path):
    loaded = qkv.load(folder)
    assert loaded.facts == FACTS
    assert qkv.load(convert(folder, tmp_path / "again", to="hf", certify=False)).facts == FACTS
    assert qkv.load(convert(folder, tmp_path / "ours", to="qkv", certify=False)).facts == FACTS


@pytest.mark.parametrize(
    ("said", "want"),
    [({}, None), ({"temperature": 0.6}, None), ({"temperature": 0.6, "do_sample": False}, {"temperature": 0})],
)
def test_makers_who_do_not_draw_by_chance(folder, tmp_path, said, want):
    """`transformers` has no chance by default, so only a file that says so means it."""
    (folder / "generation_config.json").write_text(json.dumps(said))
    loaded = qkv.load(folder)
    assert loaded.facts.sampling == (want and qkv.SamplingConfig(**want))
    made = convert(folder, tmp_path / "again", to="hf", certify=False)
    assert qkv.load(made).facts.sampling == loaded.facts.sampling
    assert json.loads((made / "generation_config.json").read_text()).get("do_sample") is said.get("do_sample")


def test_transformers_pads_what_was_exported(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    made = convert(folder, tmp_path / "again", to="hf", certify=False)
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    assert (theirs.pad_token, theirs.padding_side, theirs.model_max_length) == ("<pad>", "left", 32)
    assert theirs(["the boat is", "boat"], padding=True)["input_ids"][1] == [2, 2, 0, 5]
    drawn = transformers.GenerationConfig.from_pretrained(made)
    assert (drawn.temperature, drawn.top_p, drawn.do_sample, drawn.pad_token_id) == (0.6, 0.9, True, 2)


def test_training_all_weights_keeps_them(folder, tmp_path):
    start = qkv.load(folder)
    (tmp_path / "run").mkdir()
    nothing = Split(np.zeros(2, np.uint16), np.array([0, 2]), 0)
    Text(Dataset(nothing, nothing, start.tokenizer), start).save(tmp_path / "run")
    assert DataConfig.open(tmp_path / "run", start.model).facts == FACTS


def test_an_evaluation_begins_as_a_prompt_does(folder, tmp_path):
    """The loss by hand, with `<s>` before the text and its end counted."""
    (tmp_path / "x.txt").write_text("the boat is here")
    run = subprocess.run(
        [sys.executable, "-m", "qkv", "eval", str(folder), str(tmp_path / "x.txt"), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = qkv.load(folder)
    logits = loaded.model(torch.tensor([[0, 4, 5, 6, 7]]))[0].log_softmax(-1)
    want = -sum(logits[i, token].item() for i, token in enumerate((4, 5, 6, 7, 1))) / 5
    assert math.isclose(json.loads(run.stdout)["loss"], want, rel_tol=1e-4)
    split = Split.from_text(loaded.tokenizer, ["the boat"], 0)
    assert split.values.tolist() == [0, 4, 5, 1]


def test_ways_to_say_how_tokens_are_drawn(folder):
    loaded = qkv.load(folder)
    want = loaded.generate("the boat", max_new_tokens=6, sampling=qkv.SamplingConfig(temperature=0))
    assert loaded.generate("the boat", max_new_tokens=6, temperature=0) == want
    assert loaded.generate("the boat", max_new_tokens=6, sampling={"temperature": 0}) == want
    assert loaded.to("cpu") is loaded
    with pytest.raises(ConfigError, match="SamplingConfig has no 'temprature'; did you mean 'temperature'"):
        loaded.generate("the boat", temprature=0)


def test_a_text_is_what_the_user_says(folder):
    template = qkv.ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    loaded = qkv.load(folder)
    chatty = qkv.Loaded(loaded.model, loaded.tokenizer, loaded.facts, template)
    assert chatty.encode_chat("the boat") == chatty.encode_chat([{"role": "user", "content": "the boat"}])
