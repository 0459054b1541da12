import dataclasses
import json
import time

import pytest
import tokenizers
import torch

import qkv
from chats import write_chat_run
from qkv.checkpoints import Store, write_tensors
from qkv.checkpoints.families import FAMILIES
from qkv.data import CharacterTokenizerConfig, Tokenizer
from qkv.errors import ConfigError, FileError
from qkv.generation import SamplingConfig, generate
from qkv.loading.loaded import Loaded
from qkv.presets import gpt2
from qkv.yaml_files import dump_yaml, read_yaml
from tolerances import FLOAT32

DOCUMENT = "abcdefghij .\n"
GREEDY = SamplingConfig(temperature=0)


def make_run(folder, *, tokenizer=True, **model):
    torch.manual_seed(0)
    trained = CharacterTokenizerConfig().train([DOCUMENT])
    sizes = {"d_model": 8, "n_layers": 2, "n_heads": 2, "vocab_size": trained.vocab_size, "context": 32}
    config = gpt2(**sizes | model)
    built = config.build()
    for p in built.parameters():
        torch.nn.init.normal_(p, std=0.5)
    folder.mkdir()
    if tokenizer:
        trained.save(folder)
    (folder / "recipe.yaml").write_text(dump_yaml({"model": config.to_dict(), "steps": 3}))
    Store(folder / "checkpoints").save(3, {"model": built.state_dict()}, {})
    return built


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "run"
    make_run(folder)
    return qkv.load(folder)


# --- load -----------------------------------------------------------------------------------------------------------


def test_a_run_is_the_model_that_was_saved(tmp_path):
    built = make_run(tmp_path / "run")
    loaded = qkv.load(str(tmp_path / "run"))
    ids = torch.tensor([[1, 2, 3]])
    for name, p in built.state_dict().items():
        assert torch.equal(p, loaded.model.state_dict()[name]), name
    torch.testing.assert_close(loaded.model(ids), built.eval()(ids), rtol=FLOAT32, atol=FLOAT32)
    assert not loaded.model.training
    assert loaded.config == built.config
    assert loaded.tokenizer.encode("ab") == loaded.tokenizer.encode("a") + loaded.tokenizer.encode("b")
    assert loaded.facts.stop_ids == (loaded.tokenizer.end_of_text,)


def test_the_weights_can_be_trained_on(run):
    loaded = qkv.load(run)
    loss, _ = loaded.model.loss(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))
    loss.backward()
    assert all(p.grad is not None for p in loaded.model.parameters())


def test_another_type_on_request(run):
    assert {p.dtype for p in qkv.load(run, dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}


def test_a_damaged_checkpoint_falls_back_with_a_warning(run):
    store = Store(run / "checkpoints")
    path = store.save(4, {"model": {"x": torch.zeros(1)}}, {})
    (path / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step-00000004.*0 bytes"):
        assert qkv.load(run).config.d_model == 8


def hugging_face(folder, config=(), generation=None):
    """A folder in the layout of Hugging Face, made of our own model."""
    folder.mkdir()
    model = gpt2(d_model=8, n_layers=1, n_heads=2, vocab_size=17, context=16).build()
    write_tensors(folder / "model.safetensors", FAMILIES["gpt2"].keys(model.config).to_theirs(model.state_dict()))
    data = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 17, "n_positions": 16}
    (folder / "config.json").write_text(json.dumps(data | dict(config)))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "stop", "begin"),
    [
        ({}, None, (), None),
        ({"eos_token_id": 3, "bos_token_id": 5}, None, (3,), 5),
        ({"eos_token_id": 3}, {"eos_token_id": [6, 7], "bos_token_id": 1}, (6, 7), 1),
        ({"eos_token_id": 3}, {"eos_token_id": None}, (3,), None),
    ],
)
def test_hugging_faces_special_ids(tmp_path, config, generation, stop, begin):
    loaded = qkv.load(hugging_face(tmp_path / "hf", config, generation))
    assert (loaded.facts.stop_ids, loaded.facts.begin_id, loaded.tokenizer) == (stop, begin, None)
    with pytest.raises(ConfigError, match=r"the model has no tokenizer; generate ids with qkv\.generation\.generate"):
        loaded.generate("x")


@pytest.mark.parametrize("wrong", ["end", True, [1, None]])
def test_a_wrong_stop_id_is_named(tmp_path, wrong):
    with pytest.raises(FileError, match=r"config\.json: 'eos_token_id' is .* and must be an integer or a list of them"):
        qkv.load(hugging_face(tmp_path / "hf", {"eos_token_id": wrong}))


def test_a_tokenizer_that_is_too_large_for_the_model(tmp_path):
    make_run(tmp_path / "run", vocab_size=5)
    with pytest.raises(FileError, match=r"run: the tokenizer has 14 tokens and the model 5; put the tokenizer there"):
        qkv.load(tmp_path / "run")


def test_a_folder_that_is_neither(tmp_path):
    with pytest.raises(
        FileError, match=r"has neither .* nor config\.json \(Hugging Face\) .* nor recipe\.yaml \(a run\)"
    ):
        qkv.load(tmp_path)
    with pytest.raises(FileError, match=r"nothing: there is no such file or folder; give a run"):
        qkv.load(tmp_path / "nothing")


def test_a_run_without_a_checkpoint(run):
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(FileError, match="is a recipe and no run, which has a folder checkpoints; train it"):
        qkv.load(run)
    (run / "checkpoints").mkdir()
    with pytest.raises(FileError, match="the run has no checkpoint yet"):
        qkv.load(run)


def shared(blocks, n):
    return {"type": "Repeat", "n": n, "shared": True, "pattern": blocks["pattern"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.pop("d_model"), "not the recipe of a run: model: TransformerConfig needs 'd_model'"),
        (lambda model: model["blocks"].update(n=10**9), "n=1000000000 must be from 0 to"),
        (lambda model: model.update(blocks=shared(model["blocks"], 10**9)), "n=1000000000 must be from 0 to"),
        (lambda model: model.update(d_model=2**62), "must be at least 1 and below"),
        (lambda model: model.update(d_model=2**80), "has more than 63 bits"),
        (lambda model: model.update(d_model=9), "the model cannot be built: d_model=9 must be a multiple of n_heads=2"),
        (lambda model: model.update(d_model=16), r"has shape \(14, 8\), the model needs \(14, 16\)"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_at_once(run, change, message):
    data = read_yaml(run / "recipe.yaml")
    change(data["model"])
    (run / "recipe.yaml").write_text(dump_yaml(data))
    start = time.process_time()
    with pytest.raises(FileError, match=message):
        qkv.load(run)
    assert time.process_time() - start < 1


def test_a_recipe_without_a_model(run):
    (run / "recipe.yaml").write_text("steps: 3\n")
    with pytest.raises(FileError, match=r"recipe\.yaml: not the recipe of a run: it has no 'model'"):
        qkv.load(run)


# --- generate and stream --------------------------------------------------------------------------------------------


def test_the_text_is_what_the_ids_say(loaded):
    ids = loaded.tokenizer.encode("abc")
    want = []
    for _ in range(8):
        want.append(int(loaded.model(torch.tensor([ids + want]))[0, -1].argmax()))
    assert loaded.generate("abc", max_new_tokens=8, sampling=GREEDY) == loaded.tokenizer.decode(want)


def test_several_samples_and_one_seed(loaded):
    sampling = SamplingConfig(seed=3)
    texts = loaded.generate("a", n=3, max_new_tokens=20, sampling=sampling)
    assert len(set(texts)) == 3
    assert loaded.generate("a", max_new_tokens=20, sampling=sampling) == texts[0]
    with pytest.raises(ConfigError, match="n=0 samples: must be at least 1"):
        loaded.generate("a", n=0)


def test_the_stream_is_the_text_in_pieces(loaded):
    sampling = SamplingConfig(seed=4)
    pieces = list(loaded.stream("ab", max_new_tokens=15, sampling=sampling))
    assert len(pieces) > 5
    assert "".join(pieces) == loaded.generate("ab", max_new_tokens=15, sampling=sampling)


@pytest.mark.parametrize("many", [False, True])
def test_stop_strings_end_the_text(loaded, many):
    loaded = dataclasses.replace(loaded, facts=qkv.Facts())  # so that the text is long enough
    sampling = SamplingConfig(seed=5)
    whole = loaded.generate("ab", max_new_tokens=25, sampling=sampling)
    stop = whole[6:9]
    assert len(stop) == 3
    want = whole[: whole.index(stop)]
    stops = ["never this", stop] if many else stop
    assert loaded.generate("ab", max_new_tokens=25, sampling=sampling, stop=stops) == want
    assert "".join(loaded.stream("ab", max_new_tokens=25, sampling=sampling, stop=stops)) == want


def test_a_word_keeps_the_space_before_it(loaded):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁one": 0, "▁two": 1, "▁three": 2}, unk_token="▁one"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    spaced = Loaded(model=loaded.model, tokenizer=Tokenizer(inner))
    text = spaced.generate("one two", max_new_tokens=20, sampling=SamplingConfig(seed=0))
    assert text.split()
    assert ("one two" + text).split() == ["one", "two", *text.split()]


def test_a_character_of_several_tokens_at_the_end_of_the_prompt(loaded):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate("aÃ©")}, []))  # é is two bytes
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    single = Loaded(model=loaded.model, tokenizer=Tokenizer(inner))
    assert len(single.tokenizer.encode("aé")) == 3
    text = single.generate("aé", max_new_tokens=9, sampling=SamplingConfig(seed=1))
    ids = [
        step.ids[0] for step in generate(single.model, [[0, 1, 2]], max_new_tokens=9, sampling=SamplingConfig(seed=1))
    ]
    assert "aé" + text == single.tokenizer.decode([0, 1, 2, *ids])


def test_a_text_that_ends_like_a_stop_string_begins_is_whole(loaded):
    sampling = SamplingConfig(seed=5)
    whole = loaded.generate("ab", max_new_tokens=6, sampling=sampling)
    assert whole
    assert loaded.generate("ab", max_new_tokens=6, sampling=sampling, stop=whole[-1] + "!") == whole


def test_nothing_is_computed_after_the_last_stop_string(loaded, monkeypatch):
    taken = []

    def counted(*arguments, **options):
        for step in generate(*arguments, **options):
            taken.append(step)
            yield step

    monkeypatch.setattr("qkv.loading.loaded.generate", counted)
    loaded = dataclasses.replace(loaded, facts=qkv.Facts())
    texts = loaded.generate("a", n=2, max_new_tokens=25, stop=list(DOCUMENT), sampling=SamplingConfig(seed=0))
    assert texts == ["", ""]
    assert len(taken) < 5


def test_an_empty_prompt_begins_with_the_end_of_a_text(loaded):
    begin = loaded.tokenizer.end_of_text
    first = int(loaded.model(torch.tensor([[begin]]))[0, -1].argmax())
    want = "" if first == begin else loaded.tokenizer.decode([first])
    assert loaded.generate("", max_new_tokens=1, sampling=GREEDY) == want


def test_an_empty_prompt_and_no_token_to_begin_with(loaded):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    bare = Loaded(model=loaded.model, tokenizer=Tokenizer(inner))
    with pytest.raises(ConfigError, match="the prompt is empty and the tokenizer has no token to begin a text with"):
        bare.generate("")


def test_mistakes_show_when_the_stream_is_made(loaded):
    with pytest.raises(ConfigError, match="prompt 0 has 40 tokens and the context 32"):
        loaded.stream("a" * 40)
    with pytest.raises(ConfigError, match="a stop string is empty"):
        loaded.stream("a", stop=[""])


@pytest.mark.parametrize("how", [{"dtype": torch.int32}, {"device": "gpu"}, {"device": "cuda:99"}])
def test_a_type_or_device_that_there_is_not(tmp_path, how):
    write_chat_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"the weights cannot become dtype=.* on device=.*; give a type such as"):
        qkv.load(tmp_path / "run", **how)
