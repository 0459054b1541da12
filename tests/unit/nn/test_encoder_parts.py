"""What encoders have besides: types of tokens, embeddings of a width of their own, transforms of heads, pools."""

import pytest
import torch
import torch.nn.functional as F

from qkv.errors import ConfigError
from qkv.masks import Full
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PostNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.heads import (
    BinaryCrossEntropyConfig,
    ClassHeadConfig,
    LMHeadConfig,
    SquaredErrorConfig,
    TransformConfig,
    lm,
)
from qkv.nn.norms import LayerNormConfig, NoNormConfig
from qkv.nn.pooling import POOLS, FirstTokenConfig, MeanPoolConfig
from qkv.nn.positions import LearnedPositionsConfig
from qkv.tokens import Tokens
from tiny import VOCAB, tiny_model, token_ids
from tolerances import FLOAT64

NORM = LayerNormConfig()


def config(head=None, **embed):
    parts = (AttentionConfig(n_heads=4, mask=Full(), bias=True), FFNConfig(d_ff=24, bias=True))
    return TransformerConfig(
        d_model=16,
        embed=TokenEmbedderConfig(vocab_size=VOCAB, **embed),
        blocks=Repeat(n=2, pattern=PostNormConfig(norm=NORM, sublayers=parts)),
        head=head,
    )


def test_an_embedder_is_its_formula():
    position = LearnedPositionsConfig(length=9, unused=2)
    embed = tiny_model(config=config(position=position, types=3, norm=NORM, width=10)).embed
    ids, tokens = token_ids(2, 7), Tokens.padded([7, 4])
    types = torch.randint(0, 3, (2, 7), generator=torch.Generator().manual_seed(0))
    x = embed.weight[ids] + embed.position.weight[2:][tokens.index] + embed.types[types]
    x = F.layer_norm(x, (10,), embed.norm.weight, embed.norm.bias, NORM.eps)
    wanted = x @ embed.widen.weight.T + embed.widen.bias
    torch.testing.assert_close(embed(ids, tokens.with_types(types)), wanted, rtol=0, atol=FLOAT64)
    zeros = torch.zeros_like(types)
    assert torch.equal(embed(ids, tokens), embed(ids, tokens.with_types(zeros)))


def test_types_that_there_are_not_are_refused():
    ids, two = token_ids(1, 3), torch.tensor([[0, 1, 2]])
    with pytest.raises(ConfigError, match="types from 0 to 2 do not fit an embedder that tells 2 apart"):
        tiny_model(config=config(types=2))(ids, Tokens.full(1, 3).with_types(two))
    with pytest.raises(ConfigError, match="the tokens have types and the embedder does not tell them apart"):
        tiny_model(config=config())(ids, Tokens.full(1, 3).with_types(two))
    with pytest.raises(ConfigError, match=r"types are \(1, 3\) and the tokens \(1, 4\)"):
        Tokens.full(1, 4).with_types(two)


def test_types_travel_with_their_tokens():
    a = Tokens.full(2, 3).with_types(torch.tensor([[0, 1, 1], [1, 0, 0]]))
    b = Tokens.full(1, 2)
    assert a.take(torch.tensor([1])).types.tolist() == [[1, 0, 0]]
    assert a.join(b).types.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert b.followed_by(a.take(torch.tensor([0]))).types.tolist() == [[0, 0, 0, 1, 1]]
    assert a.shifted(torch.tensor([1, 2])).types is a.types
    assert b.join(b).types is None


def test_a_narrow_table_needs_a_transform():
    with pytest.raises(ConfigError, match="vectors of the vocabulary are 10 wide and the stream 16; give LMHead"):
        config(LMHeadConfig(), width=10).build()


@pytest.mark.parametrize("width", [None, 10])
@pytest.mark.parametrize("tied", [True, False])
def test_a_transformed_head_and_its_loss(width, tied):
    transform = TransformConfig(activation="tanh", norm=NORM)
    model = tiny_model(config=config(LMHeadConfig(tied=tied, bias=True, transform=transform), width=width))
    ids, tokens = token_ids(2, 6), Tokens.padded([6, 3])
    targets = token_ids(2, 6, seed=3)
    targets[0, 1:4] = -100
    logits = model(ids, tokens)
    head, x = model.head, model.encode(ids, tokens)[0]
    inner = torch.tanh(x @ head.transform.proj.weight.T + head.transform.proj.bias)
    inner = F.layer_norm(inner, inner.shape[-1:], head.transform.norm.weight, head.transform.norm.bias, NORM.eps)
    table = model.embed.weight if tied else head.weight
    torch.testing.assert_close(logits, inner @ table.T + head.bias, rtol=0, atol=FLOAT64)
    loss, _ = model.loss(ids, targets, tokens)
    wanted = F.cross_entropy(logits.flatten(0, 1), torch.where(tokens.valid, targets, -100).flatten())
    torch.testing.assert_close(loss, wanted, rtol=0, atol=FLOAT64)
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("transform", [None, TransformConfig()])
def test_tokens_without_a_target_cost_no_logits(transform, monkeypatch):
    model, ids = tiny_model(config=config(LMHeadConfig(transform=transform))), token_ids(2, 10)
    targets = torch.where(torch.arange(20).view(2, 10) % 7 == 0, ids, -100)
    wanted = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    rows, plain = [], lm.linear_cross_entropy
    monkeypatch.setattr(
        lm, "linear_cross_entropy", lambda x, *more, **how: rows.append(len(x)) or plain(x, *more, **how)
    )
    loss, _ = model.loss(ids, targets)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=FLOAT64)
    assert rows == [3]
    grads = [torch.autograd.grad(each, model.embed.weight)[0] for each in (loss, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=FLOAT64)
    assert model.loss(ids, torch.full_like(ids, -100))[0] == 0


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_takes_documents_as_they_are(pool):
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    tokens = Tokens.packed([[2, 3], [4]], 6)
    x[~tokens.valid] = float("nan")
    made = POOLS[pool].build(4)(x, tokens)
    pick = {"mean": lambda part: part.mean(0), "first": lambda part: part[0]}[pool]
    wanted = torch.stack([pick(x[0, :2]), pick(x[0, 2:5]), pick(x[1, :4])])
    torch.testing.assert_close(made, wanted, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("pool", [None, FirstTokenConfig(), MeanPoolConfig()])
def test_classes_and_their_loss(pool):
    model = tiny_model(config=config(ClassHeadConfig(n_classes=3, pool=pool)))
    ids, tokens = token_ids(2, 6), Tokens.padded([6, 3])
    outputs = model(ids, tokens)
    targets = torch.tensor([2, -100]) if pool else torch.arange(12).view(2, 6) % 3
    kept = outputs[:1] if pool else outputs[tokens.valid]
    wanted = F.cross_entropy(kept, targets[:1] if pool else targets[tokens.valid])
    torch.testing.assert_close(model.loss(ids, targets, tokens)[0], wanted, rtol=0, atol=FLOAT64)
    with pytest.raises(ConfigError, match="targets are"):
        model.loss(ids, targets[:, None], tokens)


@pytest.mark.parametrize("objective", [SquaredErrorConfig(), BinaryCrossEntropyConfig()])
def test_an_objective_of_whole_documents(objective):
    model = tiny_model(config=config(ClassHeadConfig(n_classes=3, objective=objective, pool=MeanPoolConfig())))
    ids, tokens = token_ids(2, 6), Tokens.padded([6, 3])
    outputs, targets = model(ids, tokens), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    p = outputs.sigmoid()
    wanted = {
        "SquaredError": (outputs - targets).square().mean(),
        "BinaryCrossEntropy": -torch.where(targets > 0, p, 1 - p).log().mean(),
    }[objective.tag()]
    torch.testing.assert_close(model.loss(ids, targets, tokens)[0], wanted, rtol=0, atol=FLOAT64)
    assert model.head.count(targets, tokens) == 2
    with pytest.raises(ConfigError, match=r"targets are \(2,\) and the outputs \(2, 3\)"):
        model.loss(ids, torch.tensor([0, 1]), tokens)
    with pytest.raises(ConfigError, match="is of whole inputs and pool is None; set pool"):
        ClassHeadConfig(n_classes=3, objective=objective)


def test_a_head_without_classes_has_no_loss():
    model = tiny_model(config=config(ClassHeadConfig(pool=MeanPoolConfig())))
    with pytest.raises(ConfigError, match="the head has no classes and so no loss; set n_classes"):
        model.loss(token_ids(1, 3), torch.tensor([0]))


def test_no_norm_is_nothing():
    x = torch.randn(2, 3)
    assert NoNormConfig().build(3)(x) is x
