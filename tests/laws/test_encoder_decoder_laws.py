"""The Transformer of pairs: PyTorch's layers as the witness, and what padding, packing and a cache must not change."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qkv.errors import ConfigError
from qkv.generation import BeamConfig, beam_search
from qkv.masks import Full
from qkv.models.decoding import Decoding
from qkv.models.pairs import Pair
from qkv.models.stack import Repeat
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PostNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.latent import LatentAttentionConfig
from qkv.nn.norms import LayerNormConfig
from qkv.presets.translators import attention_is_all_you_need
from qkv.tokens import Tokens
from tolerances import FLOAT64

SOURCE, TARGET, WIDTH, HEADS, LAYERS = 13, 11, 8, 2, 2
SOURCES = [torch.tensor(ids) for ids in ([1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 1, 2])]
TARGETS = [torch.tensor(ids) for ids in ([1, 2, 3, 4], [5, 6, 7, 8, 9, 10], [1, 3, 5])]


def make(*, shared=False):
    torch.manual_seed(0)
    config = attention_is_all_you_need(WIDTH, LAYERS, HEADS, 16, shared=shared)
    sizes = (TARGET, TARGET) if shared else (SOURCE, TARGET)
    model = config.with_vocabularies(*sizes, shared=shared).build().double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.4).add_(1.0 if "norm" in name and "weight" in name else 0.0)
    return model


def padded(texts, side="right", fill=0):
    lengths = [len(text) for text in texts]
    width = max(lengths) + 1
    rows = [F.pad(t, (width - len(t), 0) if side == "left" else (0, width - len(t)), value=fill) for t in texts]
    return torch.stack(rows), Tokens.padded(lengths, width, side=side)


def alone(model):
    return [model(Pair(s[None], Tokens.full(1, len(s)), t[None]))[0] for s, t in zip(SOURCES, TARGETS, strict=True)]


def torch_layers(model):
    """The same stacks out of PyTorch's layers, with our weights."""
    sizes = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), LAYERS, enable_nested_tensor=False).double()
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), LAYERS).double()

    def attention(theirs, q, k, v, out):
        theirs.in_proj_weight.data = torch.cat([q, k, v])
        theirs.in_proj_bias.data.zero_()
        theirs.out_proj.weight.data = out.weight.data
        theirs.out_proj.bias.data.zero_()

    def heads(weight, parts):  # our rows go head by head
        return weight.data.view(HEADS, parts, -1, WIDTH).transpose(0, 1).flatten(1, 2)

    def block(theirs, ours):
        parts, norms = ours.sublayers, ours.norms
        attention(theirs.self_attn, *heads(parts["attention"].qkv_proj.weight, 3), parts["attention"].o_proj)
        names = [("attention", theirs.norm1)]
        if "cross_attention" in parts:
            cross = parts["cross_attention"]
            attention(theirs.multihead_attn, cross.q_proj.weight.data, *heads(cross.kv_proj.weight, 2), cross.o_proj)
            names += [("cross_attention", theirs.norm2), ("ffn", theirs.norm3)]
        else:
            names += [("ffn", theirs.norm2)]
        for name, norm in names:
            norm.load_state_dict(norms[name].state_dict())
            norm.eps = norms[name].eps
        theirs.linear1.load_state_dict(parts["ffn"].up_proj.state_dict())
        theirs.linear2.load_state_dict(parts["ffn"].down_proj.state_dict())

    for theirs, ours in zip(encoder.layers, model.encoder.blocks, strict=True):
        block(theirs, ours)
    for theirs, ours in zip(decoder.layers, model.decoder.blocks, strict=True):
        block(theirs, ours)
    return encoder.eval(), decoder.eval()


def test_it_is_that_of_pytorch():
    model = make()
    encoder, decoder = torch_layers(model)
    (source, there), (target, here) = padded(SOURCES), padded(TARGETS)

    def embedded(embedder, ids):
        x = embedder.weight[ids] * WIDTH**0.5
        return x + embedder.position(Tokens.full(*ids.shape), x.dtype)

    with torch.no_grad():
        memory = encoder(embedded(model.source, source), src_key_padding_mask=~there.valid)
        future = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        x = decoder(
            embedded(model.decoder.embed, target), memory, tgt_mask=future, memory_key_padding_mask=~there.valid
        )
        want = x @ model.decoder.embed.weight.T
        got = model(Pair(source, there, target), here)
    torch.testing.assert_close(got[here.valid], want[here.valid], rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_is_the_row_alone(side):
    model = make()
    (source, there), (target, here) = padded(SOURCES, side, fill=99), padded(TARGETS, side, fill=-7)
    for want, row, valid in zip(alone(model), model(Pair(source, there, target), here), here.valid, strict=True):
        torch.testing.assert_close(row[valid], want, rtol=0, atol=FLOAT64)


def test_the_alignment_stands_where_the_tokens_do():
    model = make()
    (source, there), (target, here) = padded(SOURCES, "left"), padded(TARGETS)
    weights = model.align(Pair(source, there, target), here)
    assert weights.shape == (3, 7, 8)
    for row, (s, t) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        want = model.align(Pair(s[None], Tokens.full(1, len(s)), t[None]))[0]
        torch.testing.assert_close(weights[row][here.valid[row]][:, there.valid[row]], want, rtol=0, atol=FLOAT64)


def test_packed_is_padded():
    model = make()
    there, here = (Tokens.packed([[len(t) for t in texts]]) for texts in (SOURCES, TARGETS))
    logits = model(Pair(torch.cat(SOURCES)[None], there, torch.cat(TARGETS)[None]), here)[0]
    torch.testing.assert_close(logits, torch.cat(alone(model)), rtol=0, atol=FLOAT64)


def test_the_loss_is_cross_entropy_with_smoothing_in_training_alone():
    model = make()
    (source, there), (target, here) = padded(SOURCES), padded(TARGETS)
    pair, targets = Pair(source, there, target), target.roll(-1, 1)
    logits = model(pair, here)[here.valid]
    for mode, smoothing in ((False, 0.0), (True, 0.1)):
        for part in model.modules():
            part.dropout = 0.0 if isinstance(getattr(part, "dropout", None), float) else getattr(part, "dropout", None)
        model.train(mode)
        want = F.cross_entropy(logits, targets[here.valid], label_smoothing=smoothing)
        torch.testing.assert_close(model.loss(pair, targets, here)[0], want, rtol=0, atol=FLOAT64)


def test_shared_vectors_are_one_parameter_with_one_name():
    model = make(shared=True)
    tables = [name for name, p in model.state_dict().items() if p.shape == (TARGET, WIDTH)]
    assert tables == ["decoder.embed.weight"]
    pair = Pair(torch.tensor([[1, 2]]), Tokens.full(1, 2), torch.tensor([[3, 4]]))
    model.loss(pair, torch.tensor([[5, 6]]))[0].backward()
    used = model.decoder.embed.weight.grad.abs().sum(1)
    assert (used > 0).all()  # read in the source and in the target, and everywhere in the head


def test_the_weights_of_a_token_sum_to_one_and_padding_has_none():
    model = make()
    (source, there), (target, here) = padded(SOURCES), padded(TARGETS)
    weights = model.align(Pair(source, there, target), here)
    torch.testing.assert_close(weights.sum(-1)[here.valid], torch.ones(13).double(), rtol=0, atol=FLOAT64)
    assert (weights[~there.valid[:, None].expand_as(weights)] == 0).all()


class Rereading(Decoding):
    """Without a cache."""

    def __init__(self, model):
        self.model, self.rows, self.texts = model, list(range(3)), [[] for _ in range(3)]
        self.advance(torch.zeros(3, dtype=torch.long))

    def advance(self, ids):
        self.texts = [[*text, token] for text, token in zip(self.texts, ids.tolist(), strict=True)]
        rows = [SOURCES[row][None] for row in self.rows]
        pairs = [Pair(s, Tokens.full(*s.shape), torch.tensor([t])) for s, t in zip(rows, self.texts, strict=True)]
        self.logits = torch.cat([self.model(pair)[:, -1] for pair in pairs])
        return self.logits

    def join(self, other):
        raise NotImplementedError

    def reorder(self, rows):
        super().reorder(rows)
        self.texts = [self.texts[i] for i in rows.tolist()]
        self.rows = [self.rows[i] for i in rows.tolist()]


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_beam_search_over_ragged_sources_with_a_cache_and_without(beams):
    """Laws 25 and 26: keys of the memory and the mask of each row's source go where the row goes."""
    model = make()
    search = BeamConfig(beams=beams, max_new_tokens=6)
    source, there = padded(SOURCES, fill=5)
    found = [
        beam_search(decoding, end_ids=[0], search=search)
        for decoding in (model.start(source, there, [[0]] * 3, capacity=6), Rereading(model))
    ]
    for a, b in zip(*found, strict=True):
        assert [x.ids for x in a] == [x.ids for x in b]
        for x, y in zip(a, b, strict=True):
            assert abs(x.score - y.score) < FLOAT64


def test_mistakes():
    config = make().config
    block = PostNormConfig(norm=LayerNormConfig(), sublayers=(AttentionConfig(n_heads=2, mask=Full()),))
    with pytest.raises(ConfigError, match="decoder has no CrossAttention"):
        dataclasses.replace(config, decoder=Repeat(n=1, pattern=block))
    ahead = dataclasses.replace(
        config.decoder.pattern, sublayers=(*block.sublayers, config.decoder.pattern.sublayers[1])
    )
    with pytest.raises(ConfigError, match="the mask Full of the decoder's attention lets a token see"):
        dataclasses.replace(config, decoder=Repeat(n=1, pattern=ahead))
    latent = LatentAttentionConfig(
        n_heads=2, mask=Full(), norm=LayerNormConfig(), kv_rank=4, plain_dim=4, rotary_dim=2, value_dim=4
    )
    ahead = dataclasses.replace(ahead, sublayers=(latent, ahead.sublayers[1]))
    with pytest.raises(ConfigError, match="the mask Full of the decoder's attention lets a token see"):
        dataclasses.replace(config, decoder=Repeat(n=1, pattern=ahead))
    with pytest.raises(ConfigError, match="encoder has CrossAttention and there is nothing before it to read"):
        dataclasses.replace(config, encoder=config.decoder)
    model, (source, there) = make(), padded(SOURCES)
    with pytest.raises(ConfigError, match="each row needs one source with at least one token"):
        model.start(source, Tokens.padded([5, 0, 7], 8), [[0]] * 3, capacity=4)
    with pytest.raises(ConfigError, match="row 1 has 0 sources and 1 targets"):
        model(Pair(source, Tokens.padded([5, 0, 7], 8), torch.ones(3, 2).long()))
    with pytest.raises(ConfigError, match=r"tokens of the source are \(3, 8\) and its ids \(3, 7\)"):
        model(Pair(source[:, 1:], there, torch.ones(3, 2).long()))
    # There is memory for what comes, not for what might.
    decoding = model.start(source, there, [[1]] * 3, capacity=10**12)
    assert decoding.advance(torch.ones(3).long()).shape == (3, TARGET)
    with pytest.raises(ConfigError, match="the data have two tokenizers"):
        dataclasses.replace(config, source=None).with_vocabularies(5, 5, shared=False)
    with pytest.raises(ConfigError, match=r"source has 30 tokens and model\.source\.vocab_size is 13"):
        config.with_vocabularies(30, 5, shared=False)
    assert TokenEmbedderConfig() != config.source
