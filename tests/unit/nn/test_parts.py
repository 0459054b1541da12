"""Norms, FFNs, blocks, heads and initialisation against small answers by hand and PyTorch's own parts."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qkv.errors import ConfigError
from qkv.masks import Causal
from qkv.models.init import InitConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import (
    OutputNormConfig,
    ParallelConfig,
    ParallelPreNormConfig,
    PostNormConfig,
    PreNormConfig,
    SandwichConfig,
)
from qkv.nn.embedders import TokenEmbedderConfig, VectorEmbedderConfig
from qkv.nn.ffn import FFNConfig, GLUConfig
from qkv.nn.heads import LMHeadConfig, VectorHeadConfig
from qkv.nn.norms import LayerNormConfig, RMSNormConfig
from qkv.nn.positions import LearnedPositionsConfig, LongRoPEScalingConfig, RoPEConfig, SinusoidalPositionsConfig
from qkv.nn.sublayer import Aux, merge
from qkv.ops import attend, rotate
from qkv.presets import preset
from qkv.tokens import Layout, Tokens
from tiny import NORM, tiny_config, tiny_model, token_ids
from tolerances import FLOAT64


def close(got, want, atol=FLOAT64):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# --- norms (law 10) -------------------------------------------------------------------------------------------------


def test_norms_by_hand():
    """ε stands inside the root: large enough here to tell it from outside."""
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    rms = RMSNormConfig(eps=3.5).build(2).double()
    close(rms(x), x / 4.0)  # mean square 12.5, plus 3.5, root 4
    layer = LayerNormConfig(eps=0.75).build(2).double()
    close(layer(x), torch.tensor([[-0.5, 0.5]], dtype=torch.float64))  # variance 0.25, plus 0.75, root 1


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_norms_equal_torch(eps):
    x, weight = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    ours, theirs = RMSNormConfig(eps=eps).build(8).double(), nn.RMSNorm(8, eps=eps).double()
    ours.weight.data, theirs.weight.data = weight, weight
    close(ours(x), theirs(x))
    ours, theirs = LayerNormConfig(eps=eps, bias=False).build(8).double(), nn.LayerNorm(8, eps=eps, bias=False).double()
    ours.weight.data, theirs.weight.data = weight, weight
    close(ours(x), theirs(x))


def test_the_offset_of_a_norms_weight():
    norm, x = RMSNormConfig(eps=0.0, offset=1.0).build(2), torch.tensor([[3.0, 4.0]])
    close(norm.double()(x.double()), x.double() / 12.5**0.5)  # fresh weights do nothing
    norm.weight.data.fill_(0.001953125)
    want = x / 12.5**0.5 * 1.001953125
    torch.testing.assert_close(norm.float()(x), want, rtol=1e-6, atol=0)
    # In bfloat16 1 + 2^-9 is 1: the sum is taken in float32, so only the result is rounded.
    many = torch.rand(1, 4096).bfloat16() + 1
    norm = RMSNormConfig(offset=1.0).build(4096).bfloat16()
    norm.weight.data.fill_(0.001953125)
    with_weight = norm(many).double().mean().item()
    norm.weight.data.fill_(0.0)
    assert with_weight / norm(many).double().mean().item() == pytest.approx(1.001953125, abs=2e-4)


@pytest.mark.parametrize("norm", [RMSNormConfig(), LayerNormConfig()])
def test_norms_of_bfloat16_are_computed_in_float32(norm):
    x = (torch.randn(4, 512) * 3 + 50).bfloat16()
    got, exact = norm.build(512).bfloat16()(x).double(), norm.build(512).double()(x.double())
    assert got.dtype == torch.float64
    # One rounding of the result to bfloat16, half a unit in the 8th bit, and nothing more.
    assert ((got - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


# --- feed-forward ---------------------------------------------------------------------------------------------------


def test_ffn_is_its_formula():
    ffn, x = FFNConfig(d_ff=7, activation="relu", bias=True).build(4), torch.randn(2, 3, 4)
    want = F.linear(F.relu(F.linear(x, ffn.up_proj.weight, ffn.up_proj.bias)), ffn.down_proj.weight, ffn.down_proj.bias)
    close(ffn(x)[0], want, 1e-6)  # the same products in the same order, in float32


@pytest.mark.parametrize(
    ("name", "gate"),
    [("sigmoid", torch.sigmoid), ("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", nn.GELU(approximate="tanh"))],
)
@pytest.mark.parametrize(("d_ff", "group"), [(24, 8), (96, 32), (5, 5), (4, 4), (12, 12)])  # else one group
def test_glu_is_its_formula(name, gate, d_ff, group):
    glu, x = GLUConfig(d_ff=d_ff, activation=name).build(4), torch.randn(2, 3, 4)
    first, second = (part.flatten(0, 1) for part in glu.gate_up_proj.weight.view(-1, 2, group, 4).unbind(1))
    close(glu(x)[0], (gate(x @ first.T) * (x @ second.T)) @ glu.down_proj.weight.T, 1e-6)  # as above


@pytest.mark.parametrize(
    ("d_model", "multiple", "width"),
    [(768, 1, 2048), (512, 1, 1365), (512, 64, 1344), (512, 256, 1280), (4096, 256, 11008)],
)
def test_the_width_of_a_glu(d_model, multiple, width):
    config = GLUConfig(multiple_of=multiple)
    assert config.width(d_model) == width
    if d_model < 1000:
        glu, ffn = config.build(d_model), FFNConfig().build(d_model)
        n, m = (sum(p.numel() for p in part.parameters()) for part in (glu, ffn))
        assert abs(n - m) <= 3 * d_model * multiple / 2  # to the nearest multiple


# --- blocks ---------------------------------------------------------------------------------------------------------

EQUATIONS = {
    PreNormConfig: lambda x, f, n, m: x + f(n(x)),
    PostNormConfig: lambda x, f, n, m: n(x + f(x)),
    OutputNormConfig: lambda x, f, n, m: x + n(f(x)),
    SandwichConfig: lambda x, f, n, m: x + m(f(n(x))),
}


@pytest.mark.parametrize("kind", EQUATIONS)
def test_a_block_is_its_equation(kind):
    model = tiny_model(block=kind, layers=1)
    block, x = model.blocks[0], torch.randn(2, 5, 16, dtype=torch.float64)
    want = x
    for name, f in block.sublayers.items():
        out = block.out_norms[name] if kind is SandwichConfig else None
        want = EQUATIONS[kind](want, lambda h, f=f: f(h)[0], block.norms[name], out)
    ctx = model.context(x, Tokens.full(2, 5))
    close(block(x, ctx)[0], want)


def test_a_parallel_block_is_its_equation():
    model = tiny_model(block=ParallelConfig, layers=1)
    block, x = model.blocks[0], torch.randn(2, 5, 16, dtype=torch.float64)
    h = block.norm(x)
    want = x + sum(f(h)[0] for f in block.sublayers.values())
    close(block(x, model.context(x, Tokens.full(2, 5)))[0], want)


def test_parallel_with_a_norm_for_each():
    model = tiny_model(block=ParallelPreNormConfig, layers=1)
    block, x = model.blocks[0], torch.randn(2, 5, 16, dtype=torch.float64)
    want = x + sum(f(block.norms[name](x))[0] for name, f in block.sublayers.items())
    close(block(x, model.context(x, Tokens.full(2, 5)))[0], want)


@pytest.mark.parametrize("kind", [PreNormConfig, ParallelConfig])
def test_updates_may_be_scaled_by_channel(kind):
    """As if each sublayer gave its update times trained factors, which begin as the config says."""
    plain = kind(norm=NORM, sublayers=(FFNConfig(), GLUConfig()))
    block, x = plain.replace(layer_scale=0.125).build(8).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    assert {name: p.tolist() for name, p in block.factors.items()} == {name: [0.125] * 8 for name in block.sublayers}
    with torch.no_grad():
        for p in block.factors.values():
            p.normal_()
    bare = plain.build(8).double()
    bare.load_state_dict({name: p for name, p in block.state_dict().items() if not name.startswith("factors")})
    with torch.no_grad():
        bare.sublayers["ffn"].down_proj.weight.mul_(block.factors["ffn"][:, None])
        bare.sublayers["ffn_2"].down_proj.weight.mul_(block.factors["ffn_2"][:, None])
    close(block(x)[0], bare(x)[0])


@pytest.mark.parametrize(
    ("tokens", "n"),
    [(None, 2), (Tokens.packed([[3, 2], [1, 4]]), 4), (Tokens.padded([3, 5]), 2)],
    ids=["full", "packed", "padded"],
)
def test_whole_documents_go_past_a_sublayer(tokens, n):
    """In training, each for itself; the update of those that do not is larger by as much as there are fewer."""
    block = PreNormConfig(norm=NORM, sublayers=(FFNConfig(),), drop_path=0.75).build(8).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    whole, seen = block.eval()(x, tokens)[0] - x, set()
    block.train()
    there = Tokens.full(2, 5) if tokens is None else tokens
    places = [(row, own) for row in range(2) for own in {*there.segment[row].tolist()} - {0}]
    for _ in range(150):
        update = block(x, tokens)[0] - x
        parts = [(update[row][there.segment[row] == own], whole[row][there.segment[row] == own]) for row, own in places]
        kept = tuple(bool(part.any()) for part, _ in parts)
        for (part, all_of_it), is_kept in zip(parts, kept, strict=True):
            close(part, all_of_it * 4 * is_kept)
        seen.add(kept)
    assert len(places) == n
    assert len(seen) > 2 ** (n - 1)  # more than half of what there can be


def test_the_mean_of_what_goes_past_is_the_update():
    block = PreNormConfig(norm=NORM, sublayers=(FFNConfig(),), drop_path=0.25).build(8).double()
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(4000, 1, 8)
    whole = block.eval()(x)[0] - x
    # 0.05: of 4000 draws the standard deviation of the mean is 0.01 of the update
    torch.testing.assert_close((block.train()(x)[0] - x).mean(0), whole[0], rtol=0.05, atol=0)


def test_equal_sublayers_get_names_of_their_own():
    block = PreNormConfig(norm=NORM, sublayers=(FFNConfig(), FFNConfig(), GLUConfig())).build(8)
    assert list(block.sublayers) == list(block.norms) == ["ffn", "ffn_2", "ffn_3"]


def test_reports_are_summed():
    one = Aux({"a": torch.tensor(1.0)}, {"blocks.0.moe": torch.ones(2), "blocks.1.moe": torch.ones(3)})
    two = Aux({"a": torch.tensor(2.0), "b": torch.tensor(5.0)}, {"blocks.1.moe": torch.ones(3)})
    both = merge(merge(None, one), two)
    assert {name: loss.item() for name, loss in both.losses.items()} == {"a": 3.0, "b": 5.0}
    assert {name: load.tolist() for name, load in both.loads.items()} == {
        "blocks.0.moe": [1, 1],
        "blocks.1.moe": [2, 2, 2],
    }
    assert merge(None, None) is None


def test_self_attention_is_four_products():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    layer = AttentionConfig(n_heads=4, n_kv_heads=2, mask=Causal(), position=RoPEConfig()).build(16)
    with torch.no_grad(), Products() as seen:
        layer(torch.randn(1, 6, 16))
    products = [name for name in seen.names if name in ("mm", "addmm", "bmm", "linear", "matmul")]
    kernels = [name for name in seen.names if "attention" in name]
    assert len(products) == 2  # qkv and output; the other two are inside the kernel
    assert len(kernels) == 1


def test_queries_and_keys_are_normed_before_the_rotation():
    norm = RMSNormConfig(eps=0.1)
    layer = AttentionConfig(n_heads=2, mask=Causal(), position=RoPEConfig(), qk_norm=norm).build(8).double()
    for part in (layer.q_norm, layer.k_norm):
        part.weight.data.normal_()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = layer.qkv_proj(x).view(1, 5, 2, 3, 4).unbind(3)
    by = RoPEConfig().rotation(Tokens.full(1, 5), 4, torch.float64)
    q, k = rotate(layer.q_norm(q), by), rotate(layer.k_norm(k), by)
    out = attend(*(part.transpose(1, 2) for part in (q, k, v)), mask=Causal(), backend="reference")
    close(layer(x)[0], layer.o_proj(out.transpose(1, 2).flatten(2)))


def test_queries_and_keys_may_be_normed_over_all_heads():
    norm = RMSNormConfig(eps=0.1)
    settings = {"n_heads": 4, "n_kv_heads": 2, "mask": Causal(), "qk_norm": norm, "qk_norm_over": "heads"}
    layer = AttentionConfig(**settings).build(8).double()
    assert (layer.q_norm.weight.numel(), layer.k_norm.weight.numel()) == (8, 4)
    for part in (layer.q_norm, layer.k_norm):
        part.weight.data.normal_()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = layer.qkv_proj(x).view(1, 5, 2, 8).split([4, 2, 2], -1)
    q, k = layer.q_norm(q.reshape(1, 5, 8)).view(1, 5, 4, 2), layer.k_norm(k.reshape(1, 5, 4)).view(1, 5, 2, 2)
    out = attend(*(part.transpose(1, 2) for part in (q, k, v)), mask=Causal(), backend="reference")
    close(layer(x)[0], layer.o_proj(out.transpose(1, 2).flatten(2)))


# --- embedders and heads --------------------------------------------------------------------------------------------


def test_rope_refuses_tokens_with_several_coordinates():
    tokens = dataclasses.replace(Tokens.full(1, 4), coords=torch.zeros(1, 4, 2, dtype=torch.long))
    with pytest.raises(ConfigError, match="RoPE turns by 1 coordinate and the tokens have 2 each"):
        RoPEConfig().rotation(tokens, 8, torch.float32)


def test_sinusoidal_positions_are_those_of_the_paper():
    table = SinusoidalPositionsConfig().build(6)
    got = table(Tokens.full(1, 4), torch.float64)[0, 3]
    want = [f(3 / 10_000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
    close(got, torch.tensor(want, dtype=torch.float64))


def test_vectors_are_projected_and_checked():
    embedder = VectorEmbedderConfig(n_features=3).build(4)
    x = torch.randn(2, 5, 3)
    close(embedder(x, Tokens.full(2, 5)), x @ embedder.proj.weight.T + embedder.proj.bias, 1e-6)
    with pytest.raises(ConfigError, match="4 features and the model takes 3"):
        embedder(torch.randn(2, 5, 4), Tokens.full(2, 5))


def test_the_loss_of_vectors_counts_tokens_only():
    model, tokens = tiny_model(vectors=True), Tokens.padded([3, 2])
    x, y = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    error = (model(x, tokens) - y).square().mean(-1)
    close(model.loss(x, y, tokens)[0], error[tokens.valid].mean())


def test_embeddings_may_be_scaled():
    for scale, factor in ((None, 4.0), (3.0, 3.0), (1.0, 1.0)):
        embed = TokenEmbedderConfig(vocab_size=7, scale=scale).build(16).double()
        embed.weight.data.normal_()
        close(embed(token_ids(1, 3) % 7, Tokens.full(1, 3)), embed.weight[token_ids(1, 3) % 7] * factor)


def test_the_scale_is_rounded_to_the_type_of_the_weights():
    """As in Gemma's code: √2304 is 48, but √3072 is 55.43, and 55.5 in bfloat16."""
    embed = TokenEmbedderConfig(vocab_size=2, scale=None).build(3072).bfloat16()
    embed.weight.data.fill_(1.125)
    assert embed(torch.tensor([[1]]), Tokens.full(1, 1)).unique().item() == 62.5  # 1.125 · 55.4256 would be 62.25


@pytest.mark.parametrize("softcap", [None, 0.8])
def test_the_loss_of_tokens_is_torch_cross_entropy(softcap):
    config = tiny_config()
    config = dataclasses.replace(config, head=dataclasses.replace(config.head, softcap=softcap))
    model, ids = tiny_model(config=config), token_ids(2, 6)
    targets = token_ids(2, 6, seed=4)
    targets[0, 2:4] = -100
    tokens = Tokens.padded([6, 4])
    logits = model(ids, tokens)
    assert softcap is None or 0.5 < logits.abs().max() < softcap
    want = F.cross_entropy(logits.flatten(0, 1), targets.where(tokens.valid, -100).flatten())
    close(model.loss(ids, targets, tokens)[0], want)


def test_initialisation_is_what_the_config_says():
    import dataclasses

    config = dataclasses.replace(preset("small"), d_model=256)
    config = dataclasses.replace(
        config, embed=TokenEmbedderConfig(vocab_size=3000), init=InitConfig(std=0.05, embed_std=0.01)
    )
    torch.manual_seed(0)
    parts = dict(config.build().named_parameters())
    for name, std in {
        "embed.weight": 0.01,
        "blocks.1.sublayers.attention.qkv_proj.weight": 0.05,
        "blocks.1.sublayers.attention.o_proj.weight": 0.05 / math.sqrt(8),
        "blocks.3.sublayers.ffn.down_proj.weight": 0.05 / math.sqrt(8),
    }.items():
        # 65,536 draws or more: the standard deviation is known to 0.3 %; ten times that.
        assert parts[name].std().item() == pytest.approx(std, rel=0.03), name
    assert (parts["final_norm.weight"] == 1).all()
    by_width = InitConfig(std=None)
    model = dataclasses.replace(config, init=by_width).build()
    assert model.blocks[0].sublayers["attention"].qkv_proj.weight.std().item() == pytest.approx(1 / 16, rel=0.03)


def test_biases_begin_at_zero():
    model = preset("gpt2")
    import dataclasses

    small = dataclasses.replace(model, d_model=24, blocks=dataclasses.replace(model.blocks, n=1))
    small = dataclasses.replace(
        small, embed=TokenEmbedderConfig(vocab_size=9, position=LearnedPositionsConfig(length=4))
    )
    assert all((p == 0).all() for name, p in small.build().named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionConfig(n_heads=10, mask=Causal()).build(768), "d_model=768 must be a multiple of n_heads=10"),
        (lambda: AttentionConfig(n_heads=6, n_kv_heads=4, mask=Causal()), "n_heads=6 .* multiple of n_kv_heads=4"),
        (lambda: AttentionConfig(n_heads=6), "AttentionConfig needs 'mask'"),
        (lambda: AttentionConfig(n_heads=2, mask=Causal(), position=RoPEConfig()).build(6), "head_dim=3 is odd"),
        (lambda: AttentionConfig(n_heads=2, mask=Causal(), thta=3), "AttentionConfig has no 'thta'"),
        (lambda: RoPEConfig(theta=0.5), "theta=0.5 must be above 1"),
        (lambda: FFNConfig(dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
        (lambda: FFNConfig(d_ff=0), "d_ff=0 must be at least 1"),
        (lambda: GLUConfig(activation="swiglu"), "GLUConfig.activation = 'swiglu'"),
        (lambda: LMHeadConfig().build(8, VectorEmbedderConfig(n_features=2)), "LMHead needs a TokenEmbedder"),
        (lambda: VectorHeadConfig().build(8, TokenEmbedderConfig(vocab_size=5)), "set n_out"),
        (lambda: TokenEmbedderConfig().build(8), "vocab_size=None; set it"),
        (lambda: SinusoidalPositionsConfig().build(7), "d_model=7; make it even"),
        (lambda: PreNormConfig(norm=NORM, sublayers=()), "has no sublayers"),
        (lambda: preset("gtp2"), "no preset 'gtp2'; did you mean 'gpt2'"),
        (lambda: Tokens.padded([5], 3), "row 0 has 5 tokens and the batch has length 3"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_inputs_that_are_too_long_are_refused():
    model = tiny_model(position=None, table=LearnedPositionsConfig(length=6))
    with pytest.raises(ConfigError, match="input has 7 tokens and the position table 6"):
        model(token_ids(1, 7))
    with pytest.raises(ConfigError, match="cache for 9 tokens is longer than the position table of 6"):
        model.make_cache(1, 9)
    model(token_ids(1, 10), Tokens.packed([[5, 5]]))  # two documents that fit
    rope = tiny_model()
    cache = rope.make_cache(2, 4)
    with pytest.raises(ConfigError, match="room for 4 tokens: 0 tokens are held and 5 are to come"):
        rope(token_ids(2, 5), cache=cache)
    with pytest.raises(ConfigError, match="cache has 2 rows and the input has 1"):
        rope(token_ids(1, 2), cache=cache)
    with pytest.raises(ConfigError, match="one document per row"):
        rope(token_ids(2, 4), Tokens.packed([[2, 2], [4]]), cache=cache)
    with pytest.raises(ConfigError, match=r"tokens are \(1, 3\) and inputs \(2, 4\)"):
        rope(token_ids(2, 4), Tokens.full(1, 3))


def test_longrope_by_hand():
    scaling = LongRoPEScalingConfig(
        original_length=4, short_factors=(1.0, 2.0), long_factors=(4.0, 8.0), attention_factor=1.5
    )
    position = RoPEConfig(theta=100.0, scaling=scaling)
    for n, factors in ((4, (1.0, 2.0)), (5, (4.0, 8.0))):
        by = position.rotation(Tokens.full(1, n), 4, torch.float64)
        angle = torch.tensor([3 / factors[0], 3 * 0.1 / factors[1]], dtype=torch.float64)
        close(by.cos[0, 3, :2], 1.5 * angle.cos())
        close(by.sin[0, 3], 1.5 * torch.cat([-angle.sin(), angle.sin()]))
    with pytest.raises(ConfigError, match=r"2 short and 2 long factors, and a head has 3 pairs"):
        position.width(6)
    with pytest.raises(ConfigError, match="must be above 0"):
        dataclasses.replace(scaling, long_factors=(0.0, 1.0))


def test_an_index_or_id_that_there_is_not():
    """Negative numbers would be taken for places from the end."""
    model = tiny_model(position=None, table=LearnedPositionsConfig(length=6))
    with pytest.raises(ConfigError, match=r"ids from -1 to 3 do not fit a vocabulary of 41 tokens"):
        model(torch.tensor([[3, -1]]))
    tokens = Tokens.full(1, 3)
    index = tokens.index - 1
    wrong = Tokens(index, tokens.order, tokens.segment, tokens.coords, Layout.GENERAL)
    with pytest.raises(ConfigError, match="indices from -1 to 1 do not fit a table of 6 positions"):
        model(token_ids(1, 3), wrong)
