"""Runs that begin with trained weights: all of them trained on, or adapters beside them."""

import hashlib
import json
import re
import shutil

import pytest
import torch

import qkv
import qkv.cli
from chats import write_chat_run
from qkv.checkpoints import digest, read_tensors, write_tensors
from qkv.errors import ConfigError, FileError
from qkv.loading.convert import convert
from qkv.nn.adapters import LoRAConfig, add_adapters, load_adapters
from qkv.tasks import Asked, Start
from qkv.training import evaluate_model, read_recipe, train, trainer
from qkv.yaml_files import dump_yaml, read_yaml
from runs import (
    assert_same_run,
    fast,  # noqa: F401 - a fixture
    kill_at,
    last_manifest,
    metrics,
    recipe_data,
    terminate_at,
    write_corpus,
    write_recipe,
)
from tolerances import FLOAT32

pytestmark = pytest.mark.usefixtures("fast")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def base(tmp_path):
    """A run to begin with."""
    folder = tmp_path / "first"
    folder.mkdir()
    assert train(write_recipe(folder, steps=10), out=tmp_path / "base") == 0
    return tmp_path / "base"


def write_fine_tune(base, *, adapter=None, dropout=None, **changes):
    """A recipe that goes on from `base` with other text."""
    corpus = base.parent / "other.txt"
    corpus.write_text(write_corpus(base.parent).read_text()[::-1])
    data = recipe_data(corpus, **{"steps": 12, "save_every": 4, "optimizer": {"lr": 0.02}} | changes)
    del data["model"], data["data"]["tokenizer"]
    data["start"] = {"path": str(base), "dropout": dropout}
    data["adapter"] = adapter
    path = base.parent / "tune.yaml"
    path.write_text(dump_yaml(data))
    return path


LORA = {"rank": 2, "alpha": 8.0, "dropout": 0.1, "targets": ["q", "v", "down"]}


def files_of(run):
    return set(last_manifest(run)["files"])


@pytest.mark.parametrize("adapter", [None, LORA])
def test_a_run_begins_with_the_weights_of_its_start(tmp_path, base, adapter):
    """Its first loss is that of the base on the new text, not that of fresh weights."""
    recipe = write_fine_tune(base, adapter=adapter, dropout=0.0, steps=1, optimizer={"lr": 1e-9})
    assert train(recipe, out=tmp_path / "tuned") == 0
    before, after = qkv.load(base).model, qkv.load(tmp_path / "tuned").model
    torch.testing.assert_close(after(IDS), before(IDS), rtol=0, atol=1e-4)
    fresh = before.config.build()
    assert (fresh(IDS) - before(IDS)).abs().max() > 0.1


def test_all_weights(tmp_path, base):
    assert train(write_fine_tune(base), out=tmp_path / "tuned") == 0
    assert files_of(tmp_path / "tuned") == {
        "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json",
    }  # fmt: skip
    before, after = qkv.load(base).model.state_dict(), qkv.load(tmp_path / "tuned").model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    losses = [entry["validation_loss"] for entry in metrics(tmp_path / "tuned") if "validation_loss" in entry]
    assert losses[-1] < metrics(tmp_path / "tuned")[0]["loss"]
    shutil.rmtree(base)  # it holds all that it needs
    assert qkv.load(tmp_path / "tuned").generate("the", max_new_tokens=3)


def test_adapters_alone_are_trained_and_saved(tmp_path, base):
    assert train(write_fine_tune(base, adapter=LORA), out=tmp_path / "tuned") == 0
    assert files_of(tmp_path / "tuned") == {
        "adapter.safetensors", "optimizer.safetensors", "random.safetensors", "state.json",
    }  # fmt: skip
    checkpoint = max((tmp_path / "tuned" / "checkpoints").iterdir())
    adapters = read_tensors(checkpoint / "adapter.safetensors")
    assert {name.rsplit(".", 1)[1] for name in adapters} == {"q", "v", "down"}
    moments = read_tensors(checkpoint / "optimizer.safetensors")
    assert {name.split(".", 1)[1] for name in moments} == set(adapters)
    before, after = qkv.load(base).model.state_dict(), qkv.load(tmp_path / "tuned").model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"blocks.0.sublayers.{name}_proj.weight" for name in ("attention.qkv", "ffn.down")}


def test_what_is_loaded_is_what_was_trained(tmp_path, base):
    """The merged model equals the one in training."""
    assert train(write_fine_tune(base, adapter=LORA), out=tmp_path / "tuned") == 0
    checkpoint = max((tmp_path / "tuned" / "checkpoints").iterdir())
    model = qkv.load(base).model
    add_adapters(model, LoRAConfig.from_dict(LORA))
    without = model(IDS)
    load_adapters(model, read_tensors(checkpoint / "adapter.safetensors"))
    assert (model(IDS) - without).abs().max() > 0.01
    loaded = qkv.load(tmp_path / "tuned")
    torch.testing.assert_close(loaded.model(IDS), model(IDS), rtol=0, atol=FLOAT32)
    assert not loaded.model.training
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert loaded.facts == qkv.load(base).facts


def test_loading_draws_no_random_numbers(tmp_path, base):
    assert train(write_fine_tune(base, adapter=LORA, steps=2), out=tmp_path / "tuned") == 0
    torch.manual_seed(0)
    qkv.load(tmp_path / "tuned")
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert drawn == torch.rand(())


KINDS = {
    "all weights": {},
    "adapters": {"adapter": LORA},
    "adapters, bfloat16": {"adapter": LORA, "precision": "bfloat16"},
    "adapters, recomputed blocks": {"adapter": LORA, "checkpoint_blocks": True, "accumulation": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(tmp_path, base, kind):
    recipe, run = write_fine_tune(base, dropout=0.2, **KINDS[kind]), tmp_path / "stopped"
    assert train(recipe, out=tmp_path / "straight") == 0
    assert terminate_at(3, recipe, run) == 143
    kill_at(7, recipe, run, resume=True)
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")


@pytest.mark.parametrize("adapter", [None, LORA])
def test_the_resolved_recipe_repeats_the_run(tmp_path, base, monkeypatch, adapter):
    monkeypatch.chdir(tmp_path)
    recipe = write_fine_tune(base, adapter=adapter, dropout=0.3)
    recipe.write_text(recipe.read_text().replace(str(base), "base"))
    assert "path: base" in recipe.read_text()
    assert train(recipe, out=tmp_path / "one") == 0
    resolved = read_yaml(tmp_path / "one" / "recipe.yaml")
    assert resolved["start"]["path"] == str(base)
    assert resolved["model"]["blocks"]["pattern"]["sublayers"][0]["dropout"] == 0.3
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(tmp_path / "one" / "recipe.yaml", out=tmp_path / "two") == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_the_verbs(tmp_path, base, capsys):
    run = tmp_path / "tuned"
    recipe = write_fine_tune(base, adapter=LORA)
    assert qkv.cli.main(["show", str(recipe)]) == 0
    assert qkv.cli.main(["train", str(recipe), "--out", str(run), "--set", "sample.tokens=5"]) == 0
    assert "adapter" not in capsys.readouterr().err
    assert qkv.cli.main(["generate", str(run), "the", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the")
    assert qkv.cli.main(["eval", str(run), str(base.parent / "other.txt")]) == 0
    assert qkv.cli.main(["show", str(run)]) == 0
    assert (run / "samples.txt").exists()


def test_adapters_on_a_gguf_file(tmp_path):
    """Such a file is no folder, and what sits on it is loaded again all the same."""
    path = convert(
        write_chat_run(tmp_path / "base", texts=["what is this and that " * 20]), tmp_path / "base.gguf", to="gguf"
    )
    recipe = write_fine_tune(path, adapter=LORA)
    assert train(recipe, out=tmp_path / "tuned") == 0
    before, after = qkv.load(path).model, qkv.load(tmp_path / "tuned").model
    assert (after(IDS) - before(IDS)).abs().max() > 1e-3


def test_adapters_on_adapters(tmp_path, base):
    """A run may begin with a run of adapters: they are merged."""
    assert train(write_fine_tune(base, adapter=LORA), out=tmp_path / "second") == 0
    recipe = write_fine_tune(tmp_path / "second", adapter={"rank": 1}, dropout=0.0, optimizer={"lr": 1e-9})
    assert train(recipe, out=tmp_path / "third") == 0
    second, third = (qkv.load(tmp_path / name).model for name in ("second", "third"))
    torch.testing.assert_close(third(IDS), second(IDS), rtol=0, atol=1e-4)


def test_a_base_in_bfloat16_is_trained_in_float32(tmp_path, base):
    """Small steps would be lost in the rounding of bfloat16."""
    for path in (base / "checkpoints").glob("*/model.safetensors"):
        state = {name: p.bfloat16() for name, p in read_tensors(path).items()}
    shutil.rmtree(base / "checkpoints")
    qkv.checkpoints.Store(base / "checkpoints").save(1, {"model": state}, {})
    for name, adapter in (("all", None), ("some", LORA)):
        assert train(write_fine_tune(base, adapter=adapter), out=tmp_path / name) == 0
        assert {p.dtype for p in qkv.load(tmp_path / name).model.parameters()} == {torch.float32}


# --- conversations --------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ '<|endoftext|>' + m.role + ' ' + m.content + '<|endoftext|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|endoftext|>assistant ' }}{% endif %}"
)


@pytest.fixture
def speaker(tmp_path):
    """A run to begin with whose tokenizer knows every character, and a chat template beside it."""
    folder = tmp_path / "first"
    folder.mkdir()
    data = recipe_data(write_corpus(folder), steps=3, context=48)
    data["data"]["tokenizer"] = {"type": "BPETokenizer", "vocab_size": 257}
    (folder / "tiny.yaml").write_text(dump_yaml(data))
    assert train(folder / "tiny.yaml", out=tmp_path / "base") == 0
    (tmp_path / "base" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "base"


ANSWERS = {"the cat": "on a mat", "two birds": "fly over", "old grey": "hills"}


def write_chat(base, answers=None, **changes):
    """A recipe that teaches the base to answer; each four times, so that one may be held out."""
    turns = [{"prompt": q, "response": a} for q, a in (answers or ANSWERS).items() for _ in range(4)]
    (base.parent / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    path = write_fine_tune(base, **{"steps": 60, "context": 48, "batch_size": 4, "optimizer": {"lr": 0.02}} | changes)
    data = read_yaml(path)
    data["data"] = {"source": {"type": "Conversations", "path": str(base.parent / "chat.jsonl")}, "validation": 0.1}
    path.write_text(dump_yaml(data))
    return path


def answer(loaded, question):
    messages = [{"role": "user", "content": question}]
    return loaded.chat(messages, max_new_tokens=12, sampling=qkv.SamplingConfig(temperature=0))


@pytest.mark.slow
def test_it_learns_the_answers_and_adapters_change_them(tmp_path, speaker, capsys):
    """First with all weights; then adapters beside these teach others. They end where they end."""
    first, second = tmp_path / "taught", tmp_path / "tuned"
    assert train(write_chat(speaker, dropout=0.0, steps=150), out=first) == 0
    assert {question: answer(qkv.load(first), question) for question in ANSWERS} == ANSWERS
    others = dict(zip(ANSWERS, reversed(ANSWERS.values()), strict=True)) | {"two birds": "sat on"}
    sample = {"prompt": "the cat", "tokens": 12, "temperature": 0.0}
    adapter = {"rank": 8, "alpha": 16.0}
    assert train(write_chat(first, others, adapter=adapter, dropout=0.0, steps=120, sample=sample), out=second) == 0
    assert {question: answer(qkv.load(second), question) for question in ANSWERS} == others
    assert "the cat\nhills" in capsys.readouterr().out
    lines = metrics(second)
    assert lines[0]["tokens"] < 4 * 48 / 2, "only what the assistant says counts"
    assert lines[-1]["bits_per_byte"] > 0


def test_eval_of_conversations_is_the_loss_of_what_the_assistant_says(tmp_path, speaker, capsys):
    loaded, path = qkv.load(speaker), tmp_path / "more.jsonl"
    turns = [("the cat", "on a mat"), ("two birds", "fly")]
    path.write_text("".join(json.dumps({"prompt": q, "response": a}) + "\n" for q, a in turns))
    total, count = 0.0, 0
    for question, said in turns:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
        text = loaded.template.render(messages, add_generation_prompt=False)
        ids = torch.tensor([loaded.tokenizer.encode_rendered(text).ids])
        after = len(loaded.tokenizer.encode(said)) + 1  # and the end of its turn; a line end is behind
        losses = torch.nn.functional.cross_entropy(loaded.model(ids)[0, :-1], ids[0, 1:], reduction="none")
        total, count = total + losses[-1 - after : -1].sum().item(), count + after
    assert qkv.cli.main(["eval", str(speaker), str(path), "--conversations", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=FLOAT32)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 3, "found prompt, response; it is a conversation: take the source Conversations, or eval --conversations"),
        (["--field", "answer"], 3, "needs an object with the key 'answer'"),
        (["--field", "prompt", "--conversations"], 2, "--conversations reads no texts; leave one out"),
    ],
)
def test_mistakes_of_eval(tmp_path, speaker, capsys, arguments, code, message):
    (tmp_path / "more.jsonl").write_text('{"prompt": "the cat", "response": "on a mat"}\n')
    assert qkv.cli.main(["eval", str(speaker), str(tmp_path / "more.jsonl"), *arguments]) == code
    assert message in capsys.readouterr().err


def test_eval_of_another_field(tmp_path, speaker, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "the cat", "response": "on a mat"}\n')
    (tmp_path / "b.txt").write_text("on a mat")
    assert qkv.cli.main(["eval", str(speaker), str(tmp_path / "a.jsonl"), "--field", "response", "--json"]) == 0
    found = capsys.readouterr().out
    assert qkv.cli.main(["eval", str(speaker), str(tmp_path / "b.txt"), "--json"]) == 0
    assert found == capsys.readouterr().out


def test_a_run_of_conversations_resumes_exactly_and_keeps_its_template(tmp_path, speaker):
    recipe, run = write_chat(speaker, dropout=0.1, steps=30), tmp_path / "tuned"
    assert train(recipe, out=tmp_path / "straight") == 0
    assert terminate_at(11, recipe, run) == 143
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")
    shutil.rmtree(speaker)
    assert qkv.load(run).template is not None
    (tmp_path / "more.jsonl").write_text('{"prompt": "the cat", "response": "on a mat"}\n')
    said, unsaid = (
        evaluate_model(Asked(path=run, data=tmp_path / "more.jsonl", conversations=said)) for said in (True, False)
    )
    assert said == unsaid  # a run knows what it was trained on


def test_long_conversations_are_reported(tmp_path, speaker, capsys):
    assert train(write_chat(speaker, steps=2, context=30), out=tmp_path / "tuned") == 0
    assert re.search(
        r"warning: \d+ of 11 conversations are longer than context=30 and are cut into pieces .*; the longest takes "
        r"context=\d+", capsys.readouterr().out,
    )  # fmt: skip


def test_a_base_without_a_template(tmp_path, speaker):
    recipe = write_chat(speaker)
    (speaker / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"the source is conversations and the model has no chat template"):
        train(recipe, out=tmp_path / "tuned")


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_a_base_that_changed_or_moved(tmp_path, base):
    run, recipe = tmp_path / "tuned", write_fine_tune(base, adapter=LORA)
    assert terminate_at(5, recipe, run) == 143
    store = base / "checkpoints"
    shutil.copytree(store, tmp_path / "kept")
    latest = max(store.iterdir())
    state = read_tensors(latest / "model.safetensors")
    state["final_norm.weight"] = state["final_norm.weight"] + 1e-3
    qkv.checkpoints.Store(store).save(11, {"model": state}, {})
    with pytest.raises(
        FileError, match=r"tuned: its adapters belong to the weights that .*base had when the run began"
    ):
        qkv.load(run)
    with pytest.raises(FileError, match=r"its adapters belong to the weights that .*; put them back, or begin a new"):
        train(recipe, out=run, resume=True)
    shutil.rmtree(base)
    with pytest.raises(FileError, match=r"tuned: what its adapters sit on cannot be loaded: .*base: there is no such"):
        qkv.load(run)


def test_adapters_that_sit_on_themselves(tmp_path, base):
    run = tmp_path / "tuned"
    assert train(write_fine_tune(base, adapter=LORA, steps=2), out=run) == 0
    data = read_yaml(run / "recipe.yaml")
    data["start"]["path"] = str(run)
    (run / "recipe.yaml").write_text(dump_yaml(data))
    with pytest.raises(FileError, match=r"its adapters sit on .*tuned, which sits on them; fix 'start'"):
        qkv.load(run)
    data["start"] = None
    (run / "recipe.yaml").write_text(dump_yaml(data))
    with pytest.raises(FileError, match=r"not the recipe of a run: it has an 'adapter' and no 'start' with a path"):
        qkv.load(run)


def test_adapters_of_another_shape(tmp_path, base):
    run = tmp_path / "tuned"
    assert train(write_fine_tune(base, adapter=LORA, steps=2), out=run) == 0
    data = read_yaml(run / "recipe.yaml")
    data["adapter"]["rank"] = 3
    (run / "recipe.yaml").write_text(dump_yaml(data))
    with pytest.raises(FileError, match=r"lora_a\.q' has shape \(2, 16\), the model needs \(3, 16\)"):
        qkv.load(run)


def test_recipes_that_do_not_fit_their_start(tmp_path, base):
    path = write_fine_tune(base, adapter=LORA)
    data = read_yaml(path)

    def refused(message, **changes):
        path.write_text(dump_yaml(data | changes))
        with pytest.raises(ConfigError, match=message):
            train(path, out=tmp_path / "never")
        assert not (tmp_path / "never").exists()

    refused(r"the recipe has neither model nor start; give one of them", start=None, adapter=None)
    refused(r"adapter needs trained weights to sit on; add start", start=None, model="small")
    refused(r"model is another one than that of start\.path=.*; leave model out", model="small")
    refused(r"start: dropout=1\.0 must be at least 0 and below 1", start={"path": str(base), "dropout": 1.0})
    tokenizer = {"tokenizer": {"type": "CharacterTokenizer"}}
    refused(r"with start the tokenizer is the checkpoint's; leave data\.tokenizer out", data=data["data"] | tokenizer)
    refused(r"no slice 'k'|targets", adapter={"targets": []})
    (base / "tokenizer.json").unlink()
    refused(r"the source Files is text, but there is no tokenizer")


@pytest.fixture
def packed(tmp_path):
    words = ["what is this and that Hello " * 20]
    run = write_chat_run(tmp_path / "chat", d_model=64, d_ff=96, texts=words)
    return convert(run, tmp_path / "packed.gguf", to="gguf", dtype="q4_1")


@pytest.mark.parametrize("adapter", [None, LORA | {"dropout": 0.0}])
def test_packed_weights_are_expanded(tmp_path, packed, adapter, capsys):
    recipe = write_fine_tune(packed, adapter=adapter, dropout=0.0, steps=1, optimizer={"lr": 1e-9})
    assert qkv.cli.main(["train", str(recipe), "--out", str(tmp_path / "tuned")]) == 0
    assert "its packed weights are expanded to float32" in "".join(capsys.readouterr())
    before, after = qkv.load(packed, dtype=torch.float32).model, qkv.load(tmp_path / "tuned").model
    torch.testing.assert_close(after(IDS), before(IDS), rtol=0, atol=1e-4)


def test_packed_weights_are_measured(tmp_path, packed):
    plain, text = convert(packed, tmp_path / "plain", to="hf", certify=False), write_corpus(tmp_path)
    with pytest.warns(UserWarning, match="expanded to float32"):
        found = evaluate_model(Asked(path=packed, data=text))
    assert found.to_dict() == evaluate_model(Asked(path=plain, data=text)).to_dict()


def test_frozen_weights_are_not_copied(base):
    """They stay where the file is mapped."""
    recipe = read_recipe(write_fine_tune(base, adapter=LORA))
    loaded = qkv.load(base)
    task = recipe.data.prepare(Start(str(base), loaded))
    made = trainer.Trainer(recipe.resolved(task, loaded.config), task, loaded.model)
    assert made.model.embed.weight.data_ptr() == loaded.model.embed.weight.data_ptr()


def test_the_dropout_of_the_checkpoint_is_kept_or_set(base):
    before = qkv.load(base).config
    assert read_recipe(write_fine_tune(base)).start.model(before) is before
    for want in (0.0, 0.4):
        config = read_recipe(write_fine_tune(base, dropout=want)).start.model(before)
        assert {part.dropout for part in config.layers()} == {config.embed.dropout} == {want}
        assert isinstance(config.blocks, qkv.Repeat)


def test_the_identity_of_weights(tmp_path):
    """It is the hash of the file that they make: any bit, name, type or shape gives another."""
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 3)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    assert digest(tensors) == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    others = [{"a": tensors["a"], "c": tensors["b"]}, tensors | {"a": torch.tensor([1.0, -2.0])},
              tensors | {"b": torch.zeros(3, 2)}, tensors | {"a": tensors["a"].double()}]  # fmt: skip
    assert len({digest(other) for other in [tensors, *others]}) == 5
