"""Attention layers against those of Hugging Face: one layer each, with weights large enough for a fault to show."""

import pytest
import torch

from qkv import (
    ALiBiConfig,
    AttentionConfig,
    Causal,
    Full,
    LatentAttentionConfig,
    RMSNormConfig,
    RoPEConfig,
    T5BiasConfig,
    Window,
)
from qkv.ops import kernels_used
from tolerances import HF_FLOAT32_INSIDE

transformers = pytest.importorskip("transformers")

T, D, H, G, K = 11, 24, 4, 2, 6
THETA = 100.0


def wide(layer):
    torch.manual_seed(0)
    layer.double().eval()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.normal_(std=0.5).add_(1.0 if "norm" in name else 0.0)
    return layer


def fused(q, k, v, heads=H, groups=G):
    """Rows of q, k and v, kv group by kv group."""
    return torch.cat([x.unflatten(0, (groups, -1)) for x in (q, k, v)], 1).flatten(0, 1)


def angles(width=K, theta=THETA):
    """Cosines and sines as Hugging Face's models hand them to their layers."""
    rate = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.cat([torch.arange(T)[:, None] * rate] * 2, -1)[None]
    return angle.cos(), angle.sin()


def masked(mask):
    from qkv import Tokens
    from qkv.masks import dense

    allowed = dense(mask, Tokens.full(1, T), Tokens.full(1, T))
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)


def like(theirs, config, d_model=D, heads=H, groups=G):
    """Our layer with their q_proj, k_proj, v_proj and o_proj."""
    ours = config.build(d_model).double().eval()
    with torch.no_grad():
        for part in ("weight", "bias") if config.bias else ("weight",):
            rows = [getattr(getattr(theirs, f"{name}_proj"), part) for name in "qkv"]
            getattr(ours.qkv_proj, part).copy_(fused(*rows, heads, groups))
        ours.o_proj.load_state_dict(theirs.o_proj.state_dict())
        if config.sinks:
            ours.sinks.copy_(theirs.sinks)
        if config.qk_norm:
            ours.q_norm.weight.copy_(theirs.q_norm.weight)
            ours.k_norm.weight.copy_(theirs.k_norm.weight)
    return ours


def agree(ours, want, x, tolerance=HF_FLOAT32_INSIDE):
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], want, rtol=0, atol=tolerance)


def x_of(width=D):
    return torch.randn(2, T, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def common(**more):
    return {
        "hidden_size": D, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": K, "num_hidden_layers": 2,
        "attn_implementation": "eager",
    } | more  # fmt: skip


@torch.no_grad()
def test_qwen3():
    """Queries and keys are normed, before the rotation."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    theirs = wide(Qwen3Attention(transformers.Qwen3Config(**common(rms_norm_eps=1e-3)), 0))
    config = AttentionConfig(
        n_heads=H,
        n_kv_heads=G,
        head_dim=K,
        mask=Causal(),
        position=RoPEConfig(theta=THETA),
        qk_norm=RMSNormConfig(eps=1e-3),
    )
    want = theirs(x_of(), angles(), masked(Causal()))[0]
    agree(like(theirs, config), want, x_of())


@pytest.mark.parametrize("layer", [0, 1], ids=["window", "full"])
@torch.no_grad()
def test_gemma2(layer):
    """Soft-capped scores, a scale of its own, and windows in every other layer."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

    settings = common(attn_logit_softcapping=2.0, query_pre_attn_scalar=10, sliding_window=4)
    theirs = wide(Gemma2Attention(transformers.Gemma2Config(**settings), layer))
    mask = Causal() & Window(size=4) if theirs.sliding_window else Causal()
    assert (theirs.sliding_window == 4) == (layer == 0)
    config = AttentionConfig(
        n_heads=H, n_kv_heads=G, head_dim=K, mask=mask, position=RoPEConfig(theta=THETA), softcap=2.0, scale=10**-0.5
    )
    want = theirs(x_of(), angles(), masked(mask))[0]
    with kernels_used() as names:
        agree(like(theirs, config), want, x_of())
    assert names == ["tiled"]


def test_gemma2_windows_hold_as_many_tokens_as_ours():
    """Their own mask, which the layer above was handed by us: a window of 4 is 4 tokens, the query among them."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    theirs = sliding_window_causal_mask_function(4)
    ours = masked(Causal() & Window(size=4))[0, 0] == 0
    for i in range(T):
        assert [bool(theirs(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(T)] == ours[i].tolist()


@torch.no_grad()
def test_gpt_oss():
    """Sinks, and biases in every projection."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    theirs = wide(GptOssAttention(transformers.GptOssConfig(**common(attention_bias=True)), 1))
    config = AttentionConfig(
        n_heads=H, n_kv_heads=G, head_dim=K, mask=Causal(), position=RoPEConfig(theta=THETA), bias=True, sinks=True
    )
    cos, sin = angles()
    want = theirs(x_of(), (cos[..., : K // 2], sin[..., : K // 2]), masked(Causal()))[0]  # theirs takes half of each
    agree(like(theirs, config), want, x_of())


@pytest.mark.parametrize("q_rank", [10, None])
@torch.no_grad()
def test_deepseek(q_rank):
    """Latent attention of DeepSeek V3, expanded and absorbed."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    settings = common(q_lora_rank=q_rank, kv_lora_rank=14, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=5)
    settings |= {"num_key_value_heads": H, "rope_interleave": True}
    settings.pop("head_dim")
    theirs = wide(DeepseekV3Attention(transformers.DeepseekV3Config(**settings), 0))
    ours = latent(q_rank)
    copy_latent(ours, theirs, q_rank)
    want = theirs(x_of(), angles(4), masked(Causal()))[0]
    agree(ours, want, x_of())


def latent(q_rank):
    config = LatentAttentionConfig(
        n_heads=H, mask=Causal(), norm=RMSNormConfig(eps=1e-6), q_rank=q_rank, kv_rank=14, plain_dim=8, rotary_dim=4,
        value_dim=5, position=RoPEConfig(theta=THETA, layout="interleaved"),
    )  # fmt: skip
    return config.build(D).double().eval()


def copy_latent(ours, theirs, q_rank):
    pairs = {
        ours.kv_down_proj: theirs.kv_a_proj_with_mqa,
        ours.kv_norm: theirs.kv_a_layernorm,
        ours.kv_proj: theirs.kv_b_proj,
        ours.o_proj: theirs.o_proj,
        ours.q_proj: theirs.q_b_proj if q_rank else theirs.q_proj,
    }
    if q_rank:
        pairs |= {ours.q_down_proj: theirs.q_a_proj, ours.q_norm: theirs.q_a_layernorm}
    for part, other in pairs.items():
        part.load_state_dict(other.state_dict())


@pytest.mark.parametrize("q_rank", [10, None])
@torch.no_grad()
def test_deepseek_v2(q_rank):
    """The same of DeepSeek V2, whose code turns pairs as complex numbers."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as theirs_v2

    settings = common(q_lora_rank=q_rank, kv_lora_rank=14, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=5)
    settings |= {"num_key_value_heads": H, "head_dim": 4}
    theirs = wide(theirs_v2.DeepseekV2Attention(transformers.DeepseekV2Config(**settings), 0))
    turns = torch.complex(*(x[..., :2] for x in angles(4)))
    ours = latent(q_rank)
    copy_latent(ours, theirs, q_rank)
    want = theirs(x_of(), masked(Causal()), position_embeddings=turns)[0]
    agree(ours, want, x_of())


@pytest.mark.parametrize("decoder", [False, True])
@torch.no_grad()
def test_t5(decoder):
    """A trained bias by bucket of distance, and scores that are not scaled."""
    from transformers.models.t5.modeling_t5 import T5Attention

    settings = {"d_model": D, "d_kv": K, "num_heads": H, "relative_attention_num_buckets": 8}
    settings |= {"relative_attention_max_distance": 9, "is_decoder": decoder}
    theirs = wide(T5Attention(transformers.T5Config(**settings), has_relative_attention_bias=True, layer_idx=0))
    mask = Causal() if decoder else Full()
    position = T5BiasConfig(buckets=8, max_distance=9, two_sided=not decoder)
    ours = AttentionConfig(n_heads=H, head_dim=K, mask=mask, position=position, scale=1.0).build(D).double().eval()
    ours.qkv_proj.weight.copy_(fused(theirs.q.weight, theirs.k.weight, theirs.v.weight, groups=H))
    ours.o_proj.load_state_dict(theirs.o.state_dict())
    ours.score_bias.weight.copy_(theirs.relative_attention_bias.weight.T)
    want = theirs(x_of(), mask=masked(mask))[0]
    agree(ours, want, x_of())


@torch.no_grad()
def test_mpt():
    """ALiBi in a whole layer."""
    from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

    theirs = wide(MptAttention(transformers.MptConfig(d_model=D, n_heads=H, max_seq_len=64)))
    ours = AttentionConfig(n_heads=H, mask=Causal(), position=ALiBiConfig()).build(D).double().eval()
    ours.qkv_proj.weight.copy_(fused(*theirs.Wqkv.weight.chunk(3), groups=H))
    ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
    mask = masked(Causal()) < 0
    want = theirs(x_of(), position_bias=build_mpt_alibi_tensor(H, T).double(), attention_mask=mask)[0]
    agree(ours, want, x_of())


@pytest.mark.parametrize("heads", [1, 4, 6, 12])
def test_bloom(heads):
    """The slopes of any number of heads."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, T, dtype=torch.long), heads, torch.float64)[:, 0]  # (H, T), by key
    ours = ALiBiConfig().build(heads)(T, torch.zeros((), dtype=torch.float64))  # by key - query
    torch.testing.assert_close(ours[:, :T], theirs - theirs[:, -1:], rtol=0, atol=1e-6)  # theirs are float32 inside


@torch.no_grad()
def test_gpt_neox():
    """The first quarter of each head is rotated; one weight holds q, k and v of a head, one head after the other."""
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

    settings = {"hidden_size": 64, "num_attention_heads": H, "attn_implementation": "eager"}
    theirs = wide(GPTNeoXAttention(transformers.GPTNeoXConfig(**settings, rotary_pct=0.25), 0))
    position = RoPEConfig(theta=THETA, fraction=0.25)
    ours = AttentionConfig(n_heads=H, mask=Causal(), position=position, bias=True).build(64).double().eval()
    assert theirs.rotary_ndims == ours.rotated == 4
    ours.qkv_proj.load_state_dict(theirs.query_key_value.state_dict())
    ours.o_proj.load_state_dict(theirs.dense.state_dict())
    want = theirs(x_of(64), masked(Causal()), position_embeddings=angles(4))[0]
    agree(ours, want, x_of(64))
