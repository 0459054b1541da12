"""Configs of families: what is read is written back; what no family can say, or a file must not say, is refused."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qkv
from drawn import DECODERS
from qkv.checkpoints.families import FAMILIES, family_of
from qkv.checkpoints.families.config_reader import ConfigReader
from qkv.checkpoints.families.family import layers_of, stack
from qkv.errors import ConfigError, FileError
from qkv.presets import PRESETS
from tiny import tiny_config

numbers = st.integers(1, 9)
fractions = st.floats(0.01, 9.0)
dropouts = st.floats(0, 0.9)
activations = st.sampled_from(["gelu", "gelu_new", "relu", "relu2", "silu", "tanh", "sigmoid"])


@st.composite
def ropes(draw):
    """`rope_parameters` of every kind that all families share."""
    original = {"original_max_position_embeddings": draw(st.integers(16, 99))}
    return draw(
        st.sampled_from(
            [
                {"rope_type": "default"},
                {"rope_type": "linear", "factor": draw(fractions)},
                {"rope_type": "dynamic", "factor": draw(fractions)},
                {"rope_type": "yarn", "factor": draw(fractions), "beta_slow": draw(fractions)} | original,
                {"rope_type": "yarn", "factor": 4.0, "mscale": draw(fractions), "mscale_all_dim": 2.0} | original,
                {"rope_type": "llama3", "factor": draw(fractions), "low_freq_factor": 1.0, "high_freq_factor": 3.0},
            ]
        )
    ) | {"rope_theta": draw(st.floats(2, 1e7))}


@st.composite
def decoders(draw, kind):
    """A config of a family like Llama, with the keys that it has."""
    heads, kv = draw(numbers), draw(numbers)
    data = {
        "model_type": kind, "hidden_size": heads * kv * 2 * draw(numbers), "num_attention_heads": heads * kv,
        "num_key_value_heads": kv, "num_hidden_layers": draw(st.integers(1, 30)), "intermediate_size": draw(numbers),
        "vocab_size": draw(numbers), "max_position_embeddings": draw(st.integers(8, 99)),
        "rms_norm_eps": draw(fractions), "tie_word_embeddings": draw(st.booleans()),
        "attention_dropout": draw(dropouts), "head_dim": 2 * draw(numbers),
    }  # fmt: skip
    key = "hidden_activation" if kind in ("gemma2", "gemma3_text") else "hidden_act"
    data[key] = draw(activations)
    if kind not in ("gemma3_text", "olmo3"):
        data["rope_parameters"] = draw(ropes())
    if kind not in ("mistral", "phi3", "qwen2"):
        data["attention_bias"] = draw(st.booleans())
    if kind == "llama":
        data["mlp_bias"] = draw(st.booleans())
    if kind not in ("llama", "olmo2", "gemma"):
        data["sliding_window"] = draw(numbers)
    if kind.startswith("qwen"):
        data |= {"use_sliding_window": draw(st.booleans()), "max_window_layers": draw(st.integers(0, 30))}
    if kind in ("gemma2", "gemma3_text"):
        data["layer_types"] = draw(st.sampled_from([None, ["sliding_attention"] * data["num_hidden_layers"]]))
        data["query_pre_attn_scalar"] = draw(st.integers(1, 999))
        data["attn_logit_softcapping"] = draw(st.none() | fractions) if kind == "gemma2" else None
        data["final_logit_softcapping"] = draw(st.none() | fractions)
    if kind == "gemma3_text":
        local, full = ({"rope_type": "default", "rope_theta": draw(st.floats(2, 1e7))} for _ in range(2))
        data["rope_parameters"] = {"sliding_attention": local, "full_attention": draw(st.sampled_from([full, {}]))}
    if kind == "olmo3":
        local = {"rope_type": "default", "rope_theta": draw(st.floats(2, 1e7))}
        data["rope_parameters"] = draw(
            st.sampled_from([None, {"full_attention": draw(ropes()), "sliding_attention": local}])
        )
    if kind == "phi3":
        data |= {"resid_pdrop": draw(dropouts), "embd_pdrop": draw(dropouts)}
        del data["head_dim"]
        data["rope_parameters"] = {
            "rope_theta": draw(st.floats(2, 1e7)),
            "partial_rotary_factor": draw(st.floats(0.1, 1)),
        }
        data["sliding_window"] = draw(st.none() | numbers)
    return data


@st.composite
def older(draw, kind):
    """A config of GPT-2 or GPT-NeoX."""
    heads = draw(numbers)
    if kind == "gpt2":
        return {
            "n_embd": heads * draw(numbers), "n_head": heads, "n_layer": draw(st.integers(1, 30)),
            "n_inner": draw(st.none() | numbers), "n_positions": draw(numbers), "vocab_size": draw(numbers),
            "activation_function": draw(activations), "resid_pdrop": draw(dropouts), "embd_pdrop": draw(dropouts),
            "attn_pdrop": draw(dropouts), "layer_norm_epsilon": draw(fractions),
            "scale_attn_weights": draw(st.booleans()), "tie_word_embeddings": draw(st.booleans()),
        }  # fmt: skip
    return {
        "hidden_size": 2 * heads * draw(numbers), "num_attention_heads": heads, "intermediate_size": draw(numbers),
        "num_hidden_layers": draw(st.integers(1, 30)), "hidden_act": draw(activations), "vocab_size": draw(numbers),
        "hidden_dropout": draw(dropouts), "attention_dropout": draw(dropouts), "layer_norm_eps": draw(fractions),
        "rotary_pct": draw(st.floats(0.1, 1.0)), "rotary_emb_base": draw(st.floats(2, 1e7)),
        "use_parallel_residual": draw(st.booleans()), "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_is_read_is_written_back(kind, data):
    found = data.draw(older(kind) if kind in ("gpt2", "gpt_neox") else decoders(kind))
    config = read(kind, found)
    written = FAMILIES[kind].write(config)
    assert written["model_type"] == kind
    assert read(kind, written) == config


def read(kind, data):
    return FAMILIES[kind].read(ConfigReader(data, "x"))


SMALL = {
    "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 5, "vocab_size": 7,
    "num_hidden_layers": 4, "max_position_embeddings": 32,
}  # fmt: skip


# --- layers ---------------------------------------------------------------------------------------------------------

A, B = (qkv.PreNormConfig(norm=qkv.RMSNormConfig(), sublayers=(qkv.FFNConfig(d_ff=n),)) for n in (1, 2))


@pytest.mark.parametrize(
    ("layers", "made"),
    [
        ("a", qkv.Repeat(n=1, pattern=A)),
        ("aaa", qkv.Repeat(n=3, pattern=A)),
        ("abab", qkv.Repeat(n=2, pattern=(A, B))),
        ("ababa", (qkv.Repeat(n=2, pattern=(A, B)), A)),
        ("aabaabaa", (qkv.Repeat(n=2, pattern=(A, A, B)), qkv.Repeat(n=2, pattern=A))),
        ("aaab", (qkv.Repeat(n=3, pattern=A), B)),
        ("ab", (A, B)),
    ],
)
def test_layers_are_said_in_few_words(layers, made):
    assert stack([{"a": A, "b": B}[x] for x in layers]) == made


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_layers_are_those_of_the_stack(which):
    layers = [A if a else B for a in which]
    config = qkv.TransformerConfig(d_model=8, embed=qkv.VectorEmbedderConfig(n_features=1), blocks=stack(layers))
    assert layers_of(config) == layers


def test_windows_where_the_config_has_them():
    def windows(kind, **more):
        masks = [block.sublayers[0].mask for block in layers_of(read(kind, SMALL | more))]
        assert all(isinstance(mask, (qkv.Causal, qkv.And)) for mask in masks)
        return [mask.reach for mask in masks]

    assert windows("mistral") == [4096] * 4  # what Hugging Face takes where nothing is said
    assert windows("mistral", sliding_window=None) == [None] * 4
    assert windows("mistral", sliding_window=3) == [3] * 4
    assert windows("phi3") == [None] * 4
    assert windows("qwen2", sliding_window=3, max_window_layers=1) == [None] * 4
    assert windows("qwen2", sliding_window=3, max_window_layers=1, use_sliding_window=True) == [None, 3, 3, 3]
    assert windows("gemma2", sliding_window=3) == [3, None, 3, None]
    assert windows("gemma3_text", sliding_window=3, num_hidden_layers=7) == [3, 3, 3, 3, 3, None, 3]
    assert windows("gemma3_text", sliding_window=3, sliding_window_pattern=2) == [3, None, 3, None]
    assert windows("olmo3", sliding_window=3) == [3, 3, 3, None]
    names = {"s": "sliding_attention", "f": "full_attention"}
    assert windows("gemma2", sliding_window=3, layer_types=[names[x] for x in "ffsf"]) == [None, None, 3, None]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (
            "llama",
            {"num_hidden_layers": 10**9},
            "'num_hidden_layers' is 1000000000 and must be from 1 to 10000",
        ),
        ("llama", {"clip_qkv": 5.0}, "'clip_qkv' is not known to qkv, and it might change what the model computes"),
        ("llama", {"sliding_window": 8}, "'sliding_window' is not known to qkv"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "hyper"}},
            "the scaling 'hyper' is not implemented; qkv knows default",
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "x, rope: 'x' is not known"),
        ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is not known"),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "'partial_rotary_factor' is 0.5, which qkv does",
        ),
        ("mistral", {"attention_bias": True}, "'attention_bias' is True, which qkv does not implement for this family"),
        ("qwen2", {"use_mrope": True}, "'use_mrope' is True, which qkv does not implement"),
        ("olmo3", {"rope_theta": 1e4}, "'rope_theta' is 10000.0, which qkv does not implement for this family; only 5"),
        ("gemma", {"hidden_activation": "gelu"}, "'hidden_activation' is 'gelu', which qkv does not implement"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "'layer_types' must say .* for each of 4 layers"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "'layer_types' must say 'full_attention' or 'sliding"),
        ("gemma2", {"sliding_window": None}, "layers have windows and 'sliding_window' gives no size"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' is 0.0 and must be above 0"),
        ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0, which qkv does not impl"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {}, "other": {"rope_theta": 2.0}}},
            "x, rope_parameters: 'other' is not",
        ),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": ["1"]}}, "'short_factor' must be a list of num"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "lacks 'long_factor'"),
        ("gpt_neox", {"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "'rotary_pct' is 0.5 and 'partial_rotary_f"),
    ],
)
def test_what_a_file_must_not_say(kind, more, message):
    with pytest.raises(FileError, match=message):
        read(kind, {key: value for key, value in SMALL.items() if kind != "gpt_neox" or "kv" not in key} | more)


CONTEXT = {"context": 32}


@pytest.mark.parametrize(
    ("change", "family", "message"),
    [
        ({"position": qkv.ALiBiConfig()}, "llama", "llama cannot express this model: attention's position is ALiBi"),
        ({"position": None}, "gpt2", "gpt2 cannot express this model: sublayer 2 of a block is GLU"),
        ({"sinks": True}, "llama", r"layers\.0\.sublayers\.0\.sinks is True, and there it could only be False"),
        ({"softcap": 3.0}, "llama", r"sublayers\.0\.softcap is 3\.0, and there it could only be None"),
        ({"bias": True}, "qwen2", r"sublayers\.0\.out_bias is True, and there it could only be False"),
        ({"value_dim": 6}, "llama", r"value_dim is 6, and there it could only be 4"),
        ({"scale": 1.0}, "llama", r"scale is 1\.0, and there it could only be 0\.5"),
        ({"mask": qkv.Full()}, "mistral", r"mask is Full, and there it could only be Causal"),
        ({"mask": qkv.Causal() & qkv.Window(size=3)}, "llama", "mask is And, and there it could only be Causal"),
        ({"block": qkv.ParallelConfig}, "llama", r"layers\.0 is Parallel, and there it could only be PreNorm"),
        ({"vectors": True}, "llama", "embed is VectorEmbedder, and families of language models read tokens"),
        (
            {"position": qkv.RoPEConfig(scaling=qkv.NTKScalingConfig(factor=2.0))},
            "llama",
            "no config of Hugging Face says NTKScaling",
        ),
        ({"n_heads": 3, "n_kv_heads": 3, "head_dim": 4}, "llama", "d_model=16 is no multiple of n_heads=3, and there"),
        ({"head_dim": 6}, "phi3", "d_model=16 is not n_heads=4 times head_dim=6, and there it must be"),
        (
            {"position": qkv.RoPEConfig(scaling=qkv.LinearScalingConfig(factor=2.0))},
            "phi3",
            "the scaling 'linear' is not implemented; qkv knows default, longrope, su",
        ),
        (
            {"position": qkv.RoPEConfig(fraction=0.5)},
            "llama",
            r"position\.fraction is 0\.5, and there it could only be 1\.0",
        ),
    ],
)
def test_what_no_config_of_a_family_says(change, family, message):
    config = dataclasses.replace(tiny_config(**change), **CONTEXT)
    with pytest.raises(ConfigError, match=message):
        FAMILIES[family].write(config)


def test_the_first_family_that_can():
    config = dataclasses.replace(tiny_config(), **CONTEXT)
    norm = qkv.RMSNormConfig()
    for change, kind in (
        ({}, "llama"),
        ({"mask": qkv.Causal() & qkv.Window(size=3)}, "mistral"),
        ({"bias": True, "out_bias": False}, "qwen2"),
        ({"qk_norm": norm}, "qwen3"),
        ({"qk_norm": norm, "qk_norm_over": "heads", "block": qkv.OutputNormConfig}, "olmo2"),
        ({"position": qkv.RoPEConfig(fraction=0.5)}, "phi3"),
    ):
        config = dataclasses.replace(tiny_config(**change), **CONTEXT)
        assert family_of(config).name == kind
    assert family_of(config, "phi3").name == "phi3"
    with pytest.raises(ConfigError, match="no family 'lama'; did you mean 'llama'"):
        family_of(config, "lama")
    with pytest.raises(
        ConfigError, match=r"gpt2 cannot express this model: .*; llama, mistral, .* cannot express this model"
    ):
        family_of(tiny_config(position=qkv.ALiBiConfig()))


def test_a_reason_is_said_once_for_all_families():
    with pytest.raises(ConfigError, match=r"llama, mistral, .* phi3 cannot express this model: its context is") as told:
        family_of(tiny_config())
    assert str(told.value).count("context is not known") == 1


def test_what_a_model_needs_to_be_written():
    with pytest.raises(ConfigError, match="its context is not known; set `context` in its config to"):
        FAMILIES["llama"].write(tiny_config())
    shared = dataclasses.replace(tiny_config(), blocks=dataclasses.replace(tiny_config().blocks, shared=True))
    with pytest.raises(ConfigError, match="its layers share weights"):
        FAMILIES["llama"].write(shared)
    with pytest.raises(ConfigError, match="it has no layers"):
        FAMILIES["llama"].write(tiny_config(layers=0))
    with pytest.raises(ConfigError, match="head is None, and families of language models have LMHead"):
        FAMILIES["llama"].write(dataclasses.replace(tiny_config(), head=None))


def test_dropout_in_training_does_not_stand_in_the_way():
    config = dataclasses.replace(tiny_config(dropout=0.1, weight_dropout=0.2), **CONTEXT)
    assert FAMILIES["llama"].write(config)["attention_dropout"] == 0.2
    assert FAMILIES["phi3"].write(config)["resid_pdrop"] == 0.1


def test_every_preset_with_a_context_has_a_family():
    for make in PRESETS.values():
        config = make()
        if config.context is not None:
            assert family_of(config).write(config)["vocab_size"] == config.embed.vocab_size


def test_keys_that_change_nothing():
    more = {"unk_token_id": 0, "temperature": 0.7, "transformers_version": "4.9", "use_cache": False, "top_k": None}
    assert read("llama", SMALL | more) == read("llama", SMALL)


def test_gemmas_first_files_have_two_activations():
    data = SMALL | {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
    assert layers_of(FAMILIES["gemma2"].read(ConfigReader(data, "x")))[0].sublayers[1].activation == "gelu_tanh"


def test_gemmas_first_files_say_gelu_and_mean_its_approximation():
    config = read("gemma", SMALL | {"hidden_act": "gelu", "hidden_activation": None})
    attention, glu = layers_of(config)[0].sublayers
    assert glu.activation == "gelu_tanh"
    block = layers_of(config)[0].replace(sublayers=(attention, glu.replace(activation="gelu")))
    with pytest.raises(ConfigError, match="activation is 'gelu', and there it could only be 'gelu_tanh'"):
        FAMILIES["gemma"].write(config.replace(blocks=stack([block] * 4)))


@pytest.mark.parametrize("kind", DECODERS)
def test_what_is_null_or_empty_says_nothing(kind):
    """distilgpt2's `_num_labels`, GPT-2 XL's `output_past`, LLaMA's `max_sequence_length`; any key without a value."""
    absent = {"gpt2": SMALL.keys(), "gpt_neox": {"num_key_value_heads"}}.get(kind, ())
    plain = {key: value for key, value in SMALL.items() if key not in absent}
    more = {
        "_num_labels": 1, "output_past": True, "is_decoder": True, "max_sequence_length": 2048, "pruned_heads": {},
        "add_cross_attention": False, "tie_encoder_decoder": False, "something_new": None, "others": [],
    }  # fmt: skip
    assert read(kind, plain | more) == read(kind, plain)
    with pytest.raises(FileError, match="'add_cross_attention' is True"):
        read(kind, plain | {"add_cross_attention": True})
    with pytest.raises(FileError, match="'new' is not known"):
        read(kind, plain | {"new": 0})


@pytest.mark.parametrize(
    ("kind", "scaling", "longest"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}, 128),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}, 128),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32),  # counted already
        ("gemma3_text", {"rope_type": "linear", "factor": 8.0}, 32),
        (
            "llama",
            {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8},
            32,
        ),
    ],
)  # fmt: skip
def test_the_longest_text_is_that_under_the_scaling(kind, scaling, longest):
    """As vLLM derives it (`_get_and_verify_max_len`): times the factor, but for files that have counted it in."""
    config = read(kind, SMALL | {"rope_scaling": scaling})
    assert config.limit == longest
    written = FAMILIES[kind].write(config)
    assert written["max_position_embeddings"] == (longest if scaling["rope_type"] == "yarn" else 32)
    assert read(kind, written) == config
