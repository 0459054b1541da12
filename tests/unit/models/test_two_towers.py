"""Two towers: pools that attend, what is compared, both losses, and pairs that belong together without being one."""

import pytest
import torch
import torch.nn.functional as F

import qkv
from qkv.errors import ConfigError
from qkv.nn.heads import EmbeddingHeadConfig
from qkv.nn.pooling import AttentionPoolConfig, LastTokenConfig
from qkv.tokens import Tokens
from tiny import VOCAB, tiny_model, token_ids
from tolerances import FLOAT64

GRIDS = [(2, 3), (1, 1), (3, 2)]


def tower(embed, pool=None, width=6):
    norm = qkv.LayerNormConfig()
    parts = (qkv.AttentionConfig(n_heads=2, mask=qkv.Full(), bias=True), qkv.FFNConfig(d_ff=24, bias=True))
    return qkv.TransformerConfig(
        d_model=16,
        embed=embed,
        blocks=qkv.PreNormConfig(norm=norm, sublayers=parts),
        final_norm=norm,
        head=EmbeddingHeadConfig(pool=pool or qkv.MeanPoolConfig(), width=width, bias=True),
    )


def towers(contrast=None, **changes):
    position = qkv.LearnedPositionsConfig(length=20)
    text = tower(qkv.TokenEmbedderConfig(vocab_size=VOCAB, position=position), LastTokenConfig())
    patches = qkv.PatchEmbedderConfig(patch=2, channels=3, position=qkv.SinusoidalGridConfig())
    picture = tower(patches, AttentionPoolConfig(n_heads=4))
    made = qkv.TwoTowersConfig(text=text, picture=picture, contrast=contrast or qkv.SigmoidContrastConfig())
    return made.replace(**changes)


def batch(sizes=(4, 1, 7)):
    """Three texts and three pictures, side by side in one row each."""
    ids, patches = token_ids(1, sum(sizes)), torch.randn(1, 13, 12, dtype=torch.float64)
    return qkv.Captioned(ids, Tokens.packed([list(sizes)]), patches), Tokens.pictures([GRIDS])


def test_an_attention_pool_is_that_of_pytorch():
    pool = AttentionPoolConfig(n_heads=4).build(16).double()
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for p in pool.parameters():
            p.normal_(std=0.4)
        k, v = pool.attention.kv_proj.weight.view(4, 2, 4, 16).unbind(1)
        bias = pool.attention.kv_proj.bias.view(4, 2, 4)
        weights = (pool.attention.q_proj.weight, k.flatten(0, 1), v.flatten(0, 1))
        theirs.in_proj_weight.copy_(torch.cat(weights))
        theirs.in_proj_bias.copy_(torch.cat([pool.attention.q_proj.bias, bias[:, 0].flatten(), bias[:, 1].flatten()]))
        theirs.out_proj.load_state_dict(pool.attention.o_proj.state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y, _ = theirs(pool.probe.expand(2, 1, 16), x, x)
    y = y[:, 0]
    h = F.layer_norm(y, (16,), pool.norm.weight, pool.norm.bias, 1e-6)
    y = y + F.linear(
        F.gelu(F.linear(h, pool.ffn.up_proj.weight, pool.ffn.up_proj.bias), approximate="tanh"),
        pool.ffn.down_proj.weight,
        pool.ffn.down_proj.bias,
    )
    torch.testing.assert_close(pool(x, Tokens.full(2, 5)), y, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("pool", [AttentionPoolConfig(n_heads=4), LastTokenConfig()], ids=["attention", "last"])
def test_a_pool_reads_each_document_alone(pool):
    made = pool.build(16).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.4)
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    tokens = Tokens.packed([[3, 4], [8]], 8)
    x[0, 7] = torch.nan  # padding
    alone = [made(part, Tokens.full(1, part.shape[1])) for part in (x[:1, :3], x[:1, 3:7], x[1:])]
    torch.testing.assert_close(made(x, tokens), torch.cat(alone), rtol=0, atol=FLOAT64)
    if isinstance(pool, LastTokenConfig):
        assert torch.equal(made(x, tokens), torch.stack([x[0, 2], x[0, 6], x[1, 7]]))


def test_texts_and_pictures_side_by_side_are_those_alone():
    model = tiny_model(config=towers())
    inputs, tokens = batch()
    logits = model(inputs, tokens)
    assert logits.shape == (3, 3)
    texts, pictures = inputs.texts.split([4, 1, 7], 1), inputs.pictures.split([6, 1, 6], 1)
    for i, (patches, grid) in enumerate(zip(pictures, GRIDS, strict=True)):
        for j, ids in enumerate(texts):
            one = qkv.Captioned(ids, Tokens.full(*ids.shape), patches)
            alone = model(one, Tokens.pictures([[grid]]))
            torch.testing.assert_close(alone, logits[i : i + 1, j : j + 1], rtol=0, atol=FLOAT64)


def test_the_sigmoid_loss_is_equation_1():
    model = tiny_model(config=towers())
    inputs, tokens = batch()
    logits, targets = model(inputs, tokens), torch.tensor([[0, 0], [1, 1], [2, 2]])
    loss, _ = model.loss(inputs, targets, tokens)
    z = 2 * torch.eye(3, dtype=torch.float64) - 1
    torch.testing.assert_close(loss, (1 + (-z * logits).exp()).log().sum() / 3, rtol=0, atol=FLOAT64)
    vectors = [F.normalize(tower(x, t), dim=-1) for tower, x, t in
               ((model.picture, inputs.pictures, tokens), (model.text, inputs.texts, inputs.tokens))]  # fmt: skip
    wanted = model.head.log_scale.exp() * vectors[0] @ vectors[1].T + model.head.bias
    torch.testing.assert_close(logits, wanted, rtol=0, atol=FLOAT64)


def test_the_softmax_loss_is_that_of_clip():
    transformers = pytest.importorskip("transformers.models.clip.modeling_clip")
    model = tiny_model(config=towers(qkv.SoftmaxContrastConfig()))
    inputs, tokens = batch()
    loss, _ = model.loss(inputs, torch.tensor([[0, 0], [1, 1], [2, 2]]), tokens)
    theirs = transformers.image_text_contrastive_loss(model(inputs, tokens).T)
    torch.testing.assert_close(loss, theirs, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("targets", [[[0, 0], [0, 1], [2, 2]], [[0, 0], [1, 0], [2, 2]]], ids=["thing", "text"])
def test_what_shows_the_same_is_not_learned_as_different(targets):
    inputs, tokens = batch()
    targets = torch.tensor(targets)
    sigmoid = tiny_model(config=towers())
    logits = sigmoid(inputs, tokens)
    z = torch.tensor([[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    loss, _ = sigmoid.loss(inputs, targets, tokens, scale=1.0)
    torch.testing.assert_close(loss, -F.logsigmoid(z * logits).sum(), rtol=0, atol=FLOAT64)
    softmax = tiny_model(config=towers(qkv.SoftmaxContrastConfig()))
    logits = softmax(inputs, tokens)
    loss, _ = softmax.loss(inputs, targets, tokens, scale=1.0)
    total = 0.0
    for sums in (logits, logits.T):
        total += sums[0, [0, 2]].logsumexp(0) + sums[1, [1, 2]].logsumexp(0) + sums[2].logsumexp(0) - sums.trace()
    torch.testing.assert_close(loss, total / 2, rtol=0, atol=FLOAT64)
    assert torch.stack([p.grad.isfinite().all() for p in gradients(softmax, loss)]).all()


def gradients(model, loss):
    loss.backward()
    return [p for p in model.parameters() if p.grad is not None]


def test_what_does_not_fit_is_refused():
    config = towers()
    with pytest.raises(ConfigError, match=r"vectors of texts are 5 wide and those of pictures 6; set text.head.width"):
        config.replace(text=config.text.replace(head=config.text.head.replace(width=5)))
    with pytest.raises(ConfigError, match=r"picture.head is ClassHead, and a tower gives one vector"):
        config.replace(picture=config.picture.replace(head=qkv.ClassHeadConfig()))
    model = tiny_model(config=config)
    inputs, tokens = batch((5, 7))
    with pytest.raises(ConfigError, match="there are 3 pictures, 2 texts and 3 targets"):
        model.loss(inputs, torch.zeros(3, 2, dtype=torch.long), tokens)
    with pytest.raises(ConfigError, match="the head gives vectors and has no loss"):
        model.text.loss(inputs.texts, torch.zeros(1, 12), inputs.tokens)
