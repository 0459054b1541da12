"""Adapters of the `peft` library: read, the logits are its own; written, it reads them with the same logits."""

import json
import warnings
from shutil import rmtree

import pytest
import torch
import transformers

import qkv
from qkv.checkpoints.families import FAMILIES
from qkv.checkpoints.huggingface import load_model
from qkv.checkpoints.peft import read_adapter, write_adapter
from qkv.checkpoints.tensors import read_tensors, write_tensors
from qkv.cli import main
from qkv.data import CharacterTokenizerConfig
from qkv.errors import ConfigError, FileError
from qkv.loading.convert import convert
from qkv.nn.adapters import LoRAConfig, adapter_state, add_adapters, load_adapters, merge_adapters
from qkv.yaml_files import dump_yaml
from runs import fast, recipe_data, write_corpus  # noqa: F401 - `fast` is a fixture
from tolerances import FLOAT32, FLOAT64, HF_FLOAT32_INSIDE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it uses what transformers has renamed
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft==0.21.2")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

VOCAB = 61
IDS = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(2))


def wide(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.25, generator=generator).add_(1.0 if "norm" in name or "ln_" in name else 0.0)
    return model


def llama(folder):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=41, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=2,
    )  # fmt: skip
    wide(transformers.LlamaForCausalLM(config).double().eval()).save_pretrained(folder)
    return "llama"


def gpt2(folder):
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=30, n_layer=2, n_head=5, eos_token_id=2, bos_token_id=1
    )
    wide(transformers.GPT2LMHeadModel(config).double().eval()).save_pretrained(folder)
    return "gpt2"


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def logits(model):
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


CASES = {
    "all": (llama, {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                                               "up_proj", "down_proj"]}),
    "some": (llama, {"r": 2, "lora_alpha": 5, "target_modules": ["k_proj", "up_proj"]}),
    "by the root of the rank": (llama, {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj"], "use_rslora": True}),
    "other ranks": (llama, {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"],
                            "rank_pattern": {"v_proj": 4, "layers.1.mlp.down_proj": 1},
                            "alpha_pattern": {"q_proj": 9}}),
    "some layers": (llama, {"r": 2, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]}),
    "gpt2": (gpt2, {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "attn.c_proj", "c_fc"]}),
    "gpt2, mlp alone": (gpt2, {"r": 3, "lora_alpha": 2, "target_modules": ["mlp.c_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_theirs_in(tmp_path, case):
    make, settings = CASES[case]
    kind = make(tmp_path / "base")
    theirs = wide(peft.get_peft_model(reference(tmp_path / "base"), peft.LoraConfig(**settings, task_type="CAUSAL_LM")))
    theirs.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference(tmp_path / "base"), tmp_path / "adapter").eval()
    model = load_model(tmp_path / "base")
    without = logits(model)
    adapter = read_adapter(tmp_path / "adapter", FAMILIES[kind], model.config)
    add_adapters(model, adapter.config)
    load_adapters(model, adapter.state)
    want = logits(theirs)
    assert (want - without).abs().max() > 0.2, "the adapter is too tame to show a wrong convention"
    tolerance = HF_FLOAT32_INSIDE if kind == "llama" else FLOAT64
    torch.testing.assert_close(logits(model), want, rtol=0, atol=tolerance)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("targets", [None, ("q", "k", "v"), ("v",), ("o", "up"), ("down",)])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_ours_out(tmp_path, make, targets):
    kind = make(tmp_path / "base")
    model = load_model(tmp_path / "base")
    without, config = logits(model), LoRAConfig(rank=2, alpha=5.0, targets=targets)
    add_adapters(model, config)
    for i, p in enumerate(adapter_state(model).values()):
        p.normal_(std=0.25, generator=torch.Generator().manual_seed(i))
    adapter = qkv.checkpoints.peft.Adapter(config, adapter_state(model))
    write_adapter(tmp_path / "adapter", adapter, FAMILIES[kind], model.config, base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(reference(tmp_path / "base"), tmp_path / "adapter").eval()
    assert not {name for name in theirs.state_dict() if "lora_" in name} ^ {
        name.replace(".weight", ".default.weight")
        for name in read_tensors(tmp_path / "adapter/adapter_model.safetensors")
    }
    want = logits(model)
    assert (want - without).abs().max() > 0.1
    tolerance = HF_FLOAT32_INSIDE if kind == "llama" else FLOAT64
    torch.testing.assert_close(logits(theirs), want, rtol=0, atol=tolerance)
    again = read_adapter(tmp_path / "adapter", FAMILIES[kind], model.config)
    other = load_model(tmp_path / "base")
    add_adapters(other, again.config)
    load_adapters(other, again.state)
    torch.testing.assert_close(logits(other), want, rtol=0, atol=FLOAT64)


@pytest.mark.usefixtures("fast")
def test_a_run_is_exported_and_read_by_both(tmp_path):
    llama(tmp_path / "base")
    data = recipe_data(write_corpus(tmp_path), steps=3, optimizer={"lr": 0.05})
    del data["model"], data["data"]["tokenizer"]
    CharacterTokenizerConfig().train([(tmp_path / "corpus.txt").read_text()]).save(tmp_path / "base")
    data |= {"start": {"path": str(tmp_path / "base")}, "adapter": {"rank": 2}}
    (tmp_path / "tune.yaml").write_text(dump_yaml(data))
    assert qkv.train(tmp_path / "tune.yaml", out=tmp_path / "run").exit_code == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "adapter"), "--to", "peft"]) == 0
    run, back = qkv.load(tmp_path / "run"), qkv.load(tmp_path / "adapter")
    for name, p in run.model.state_dict().items():
        assert torch.equal(p, back.model.state_dict()[name]), name
    torch.testing.assert_close(logits(back.model), logits(run.model), rtol=FLOAT32, atol=FLOAT32)
    assert (logits(run.model) - logits(load_model(tmp_path / "base").float())).abs().max() > 0.1
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(run.model), logits(theirs), rtol=0, atol=HF_FLOAT32_INSIDE)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "x/y"}))
    with pytest.raises(FileError, match=r"'base_model_name_or_path' is 'x/y' and must be the folder of the model"):
        qkv.load(tmp_path / "adapter")


@pytest.mark.usefixtures("fast")
def test_what_has_no_adapters_for_peft(tmp_path):
    data = recipe_data(write_corpus(tmp_path), steps=1)
    (tmp_path / "plain.yaml").write_text(dump_yaml(data))
    assert qkv.train(tmp_path / "plain.yaml", out=tmp_path / "plain").exit_code == 0
    tune = {key: value for key, value in data.items() if key != "model"}
    tune |= {"data": {"source": data["data"]["source"]}, "start": {"path": str(tmp_path / "plain")}, "adapter": {}}
    (tmp_path / "tune.yaml").write_text(dump_yaml(tune))
    assert qkv.train(tmp_path / "tune.yaml", out=tmp_path / "tuned").exit_code == 0
    llama(tmp_path / "base")
    for source, message in (
        ("base", "base: is no run, and only runs have adapters to write; give one whose recipe has 'adapter'"),
        ("plain", "plain: trained all weights and has no adapters; give a run"),
        ("tuned", r"tuned: its adapters sit on .*plain, and PEFT knows .* use qkv convert --to hf, which merges them"),
    ):
        with pytest.raises(FileError, match=message):
            convert(tmp_path / source, tmp_path / "no", to="peft")
        assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match="--dtype float16: adapters keep their type; leave it out"):
        convert(tmp_path / "tuned", tmp_path / "no", to="peft", dtype="float16")
    rmtree(tmp_path / "tuned" / "checkpoints")
    with pytest.raises(FileError, match="tuned: the run has no checkpoint yet"):
        convert(tmp_path / "tuned", tmp_path / "no", to="peft")


# --- files that do not fit --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    kind = llama(folder / "base")
    model = load_model(folder / "base")
    add_adapters(model, LoRAConfig(rank=2, targets=("q",)))
    adapter = qkv.checkpoints.peft.Adapter(LoRAConfig(rank=2, targets=("q",)), adapter_state(model))
    write_adapter(folder / "adapter", adapter, FAMILIES[kind], model.config, base="x")
    return folder / "adapter", model.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"'use_dora' is True, which qkv does not implement for this family; only False"),
        ({"bias": "all"}, r"'bias' is 'all'"),
        ({"modules_to_save": "lm_head"}, r"'modules_to_save' is 'lm_head' and must be of type list"),
        ({"init_lora_weights": "pissa"}, r"'init_lora_weights' is 'pissa', which also changed the base"),
        ({"sparse": True}, r"'sparse' is not known to qkv, and it might change what the model computes"),
        ({"rank_pattern": {"(a+)+": 2}}, r"the pattern '\(a\+\)\+': 2 is not the end of a name and a number"),
        ({"rank_pattern": {"q_proj": 0}}, r"the pattern 'q_proj': 0 is not the end"),
        ({"lora_alpha": 0.0}, r"'lora_alpha' is 0.0 and must be above 0"),
        ({"r": 3}, r"q_proj\.lora_A\.weight' has shape \(2, 36\) of torch\.float64, the model needs floats \(3, 36\)"),
        ({"r": 0}, r"'r' is 0 and must be from 1"),
        ({"target_modules": ["v_proj"]}, r"q_proj' has an adapter and is not in 'target_modules'"),
        (
            {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "o_proj"]},
            r"has no adapter and is in 'target_",
        ),
    ],
)
def test_settings_that_are_refused(tmp_path, written, change, message):
    folder, config = written
    data = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(data | change))
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(FileError, match=message):
        read_adapter(tmp_path, FAMILIES["llama"], config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_proj", "lm_head"]},
            r"'base_model.model.lm_head.* adapts the head or the em",
        ),
        (
            {"target_modules": ["lm_head"]},
            r"lm_head.*' adapts the head or the embedding table, which qkv re",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            r"embed_tokens.*' adapts the head or the embedding table",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
            r"'modules_to_save' is .*'lm_head'.*, whole weights beside the adapters, which .* merge it",
        ),
    ],
)
def test_adapters_beyond_the_layers_are_refused_and_what_to_do_works(tmp_path, settings, message):
    llama(tmp_path / "base")
    theirs = peft.get_peft_model(reference(tmp_path / "base"), peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    wide(theirs).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileError, match=message):
        qkv.load(tmp_path / "adapter")
    want = logits(theirs.eval())
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), want, rtol=0, atol=HF_FLOAT32_INSIDE)


def test_tensors_that_are_refused(tmp_path, written):
    folder, config = written
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    good = read_tensors(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for tensors, message in (
        ({key: value for key, value in good.items() if key != name}, r"q_proj\.lora_B\.weight' is missing"),
        (
            good | {name.replace("layers.0", "layers.9"): good[name]},
            r"layers\.9.*is no adapter of a projection of this",
        ),
        (good | {name: good[name].int()}, r"of torch\.int32, the model needs floats"),
        ({}, r"holds no adapters"),
    ):
        write_tensors(tmp_path / "adapter_model.safetensors", tensors)
        with pytest.raises(FileError, match=message):
            read_adapter(tmp_path, FAMILIES["llama"], config)
