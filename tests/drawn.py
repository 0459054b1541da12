"""Models drawn at random near each family: most are of it, and some differ from it in a place or two."""

import dataclasses
import random

import torch

import qkv
from qkv.checkpoints.families import FAMILIES
from qkv.checkpoints.families.family import layers_of, stack
from qkv.errors import ConfigError

VOCAB = 61
DECODERS = [kind for kind, family in FAMILIES.items() if family.table and "bert" not in kind]
BLOCKS = (qkv.PreNormConfig, qkv.OutputNormConfig, qkv.SandwichConfig, qkv.ParallelPreNormConfig, qkv.PostNormConfig)


def drawn_config(kind, seed, vocab=VOCAB):
    """The config of a model that can be built."""
    rng = random.Random(f"{kind} {seed}")
    while True:
        config = _family_config(kind, rng, vocab)
        for change in rng.sample(_CHANGES, rng.choice((0, 1, 1, 2))):
            config = change(rng, config)
        try:
            with torch.device("meta"):
                config.build()
        except ConfigError:
            continue
        return config


def wide_weights(model, seed):
    """The model with weights that are large enough for a wrong convention to show, which bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    offset = getattr(model.config.final_norm, "offset", 0.0)
    for name, p in model.named_parameters():
        around = 1.0 - offset if "norm" in name and name.endswith("weight") else 0.0
        p.data = torch.randn(p.shape, generator=generator).mul(0.25).add(around).bfloat16().to(p.dtype)
    return model.eval()


def _family_config(kind, rng, vocab):
    kv, per, head_dim = rng.choice((1, 2, 3)), rng.choice((1, 2)), rng.choice((4, 6, 8))
    heads, layers = kv * per, rng.choice((1, 2, 3, 7))
    data = {
        "vocab_size": vocab, "hidden_size": heads * rng.choice((head_dim, head_dim, 5, 7)), "intermediate_size": 41,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim,
        "max_position_embeddings": rng.choice((50, 64)), "rope_theta": rng.choice((700.0, 10_000.0, 500_000.0)),
    }  # fmt: skip
    if kind in ("gpt2", "gpt_neox", "phi3"):
        data["hidden_size"] = heads * head_dim
        data.pop("head_dim")
    if kind in ("mistral", "phi3"):
        data["sliding_window"] = rng.choice((None, 5))
    if kind.startswith(("gemma2", "gemma3", "qwen", "olmo3")):
        data["sliding_window"] = rng.choice((3, 5, 9))
    if kind.startswith(("gemma2", "gemma3")):
        data["query_pre_attn_scalar"] = rng.choice((head_dim, head_dim, 10))
    if kind.startswith("qwen"):
        data |= {"use_sliding_window": rng.random() < 0.5, "max_window_layers": 1}
    if kind == "gpt_neox":
        data |= {"rotary_pct": rng.choice((0.5, 1.0)), "use_parallel_residual": rng.random() < 0.5}
        data.pop("num_key_value_heads")
    if kind == "gpt2":
        data = {"vocab_size": vocab, "n_embd": heads * head_dim, "n_layer": layers, "n_head": heads, "n_positions": 64}
    if kind == "olmo3":
        data["rope_theta"] = 500_000.0
    return FAMILIES[kind].parse(data, "drawn")


# --- changes --------------------------------------------------------------------------------------------------------


def _scaling(rng, width):
    """Half of the texts of the tests are longer than some of these say that training's were."""
    factor, before = rng.choice((1.0, 2.0, 2.5, 4.0)), rng.choice((8, 16, 33))
    short, long = (tuple(first + 0.3 * i for i in range(width // 2)) for first in (1.0, 2.0))
    return rng.choice((
        qkv.LinearScalingConfig(factor=factor),
        qkv.DynamicNTKScalingConfig(factor=factor, original_length=before),
        qkv.YaRNScalingConfig(factor=factor, original_length=before, truncate=rng.random() < 0.5),
        qkv.YaRNScalingConfig(factor=factor, original_length=before, attention_factor=1.3),
        qkv.Llama3ScalingConfig(factor=factor, original_length=before),
        qkv.LongRoPEScalingConfig(original_length=before, short_factors=short, long_factors=long, attention_factor=1.2),
        qkv.NTKScalingConfig(factor=factor),
    ))  # fmt: skip


def _attentions(config, change, which=lambda i, attention: True):
    """The config with some of its layers' attention changed."""

    def changed(i, block):
        attention, ffn = block.sublayers
        attention = dataclasses.replace(attention, **change(attention)) if which(i, attention) else attention
        return dataclasses.replace(block, sublayers=(attention, ffn))

    return dataclasses.replace(config, blocks=stack([changed(i, block) for i, block in enumerate(layers_of(config))]))


def _always(**values):
    return lambda rng, config: _attentions(config, lambda attention: values)


def _rope(**values):
    """In all layers."""

    def change(rng, config):
        return _attentions(
            config, lambda one: {"position": dataclasses.replace(one.position or qkv.RoPEConfig(), **values)}
        )

    return change


def _scaled(rng, config):
    """Those without windows, those with, or all."""
    which = rng.choice((lambda reach: reach is None, lambda reach: reach is None, lambda reach: True))
    return _rescaled(rng, config, which)


def _rescaled(rng, config, which):
    first = layers_of(config)[0].sublayers[0]
    fraction = first.position.fraction if first.position else 1.0
    scaling = _scaling(rng, int((first.head_dim or config.d_model // first.n_heads) * fraction))
    return _attentions(
        config,
        lambda one: {"position": dataclasses.replace(one.position or qkv.RoPEConfig(), scaling=scaling)},
        lambda i, one: which(one.mask.reach),
    )


def _rewindowed(rng, config):
    size = rng.choice((3, 5))
    kinds = rng.choice((lambda i: True, lambda i: False, lambda i: rng.random() < 0.5))
    causal, window = qkv.Causal(), qkv.Causal() & qkv.Window(size=size)
    masks = [window if kinds(i) else causal for i in range(config.depth)]
    at = iter(masks)
    return _attentions(config, lambda one: {"mask": next(at)})


def _in_one_layer(rng, config):
    at = rng.randrange(config.depth)
    values = rng.choice(({"mask": qkv.Causal()}, {"position": qkv.RoPEConfig(theta=77.0)}, {"bias": True}))
    return _attentions(config, lambda one: values, lambda i, one: i == at)


def _another_norm(rng, config):
    norm = rng.choice((
        dataclasses.replace(config.final_norm, eps=1e-3), qkv.RMSNormConfig(offset=1.0), qkv.RMSNormConfig(),
        qkv.LayerNormConfig(bias=False),
    ))  # fmt: skip
    blocks = [dataclasses.replace(block, norm=norm) for block in layers_of(config)]
    return dataclasses.replace(config, blocks=stack(blocks), final_norm=norm)


def _another_block(rng, config):
    kind = rng.choice(BLOCKS)
    blocks = [kind(norm=block.norm, sublayers=block.sublayers) for block in layers_of(config)]
    return dataclasses.replace(config, blocks=stack(blocks))


def _another_ffn(rng, config):
    change = rng.choice(({"activation": rng.choice(("gelu", "gelu_tanh", "relu", "sigmoid"))}, {"bias": True}))
    blocks = [
        dataclasses.replace(block, sublayers=(block.sublayers[0], dataclasses.replace(block.sublayers[1], **change)))
        for block in layers_of(config)
    ]
    return dataclasses.replace(config, blocks=stack(blocks))


def _another_end(rng, config):
    change = rng.choice(({"tied": not config.head.tied}, {"softcap": 3.0}))
    return dataclasses.replace(config, head=dataclasses.replace(config.head, **change))


_CHANGES = (
    _scaled, _scaled, _scaled, _rewindowed, _rewindowed, _in_one_layer, _another_norm, _another_block, _another_ffn,
    _another_end, _another_end,
    lambda rng, config: dataclasses.replace(config, context=rng.choice((41, 65, 200))),
    lambda rng, config: dataclasses.replace(config, d_model=config.d_model + rng.choice((1, 2, 6))),
    lambda rng, config: dataclasses.replace(config, embed=dataclasses.replace(config.embed, scale=rng.choice((1, 3)))),
    _rope(theta=77.0), _rope(fraction=0.5), _rope(layout="interleaved"), _always(position=None), _always(bias=True),
    _always(bias=True, out_bias=False), _always(softcap=2.0), _always(scale=0.25), _always(scale=0.3),
    _always(sinks=True), _always(value_dim=6), _always(head_dim=10), _always(head_dim=5),
    _always(qk_norm=qkv.RMSNormConfig(), qk_norm_over="heads"), _always(qk_norm=qkv.RMSNormConfig()),
)  # fmt: skip
