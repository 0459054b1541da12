"""Compiled models: no recompilation for ragged batches, no graph break in decoding, the same numbers.

These run in a session of their own, in which signatures are not checked: the checks cannot be traced.
"""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs
from torch._dynamo.utils import counters

from lowering import once_for_six_layers
from qkv.config import config
from qkv.masks import Causal, Window
from qkv.models.transformer import TransformerConfig
from qkv.nn.adapters import LoRAConfig, add_adapters
from qkv.nn.blocks import PreNormConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.sublayer import Aux, Sublayer, SublayerConfig
from qkv.ops.attentive_gru import AttentiveGRU, attentive_gru
from qkv.tokens import Tokens
from tiny import tiny_config, tiny_model, token_ids
from tolerances import FLOAT32


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def ragged_batches(n, rows=2, width=16):
    """Batches with other documents, and another number of them, every time."""
    rng = random.Random(0)
    for seed in range(n):
        lengths = []
        for _ in range(rows):
            cuts = sorted(rng.sample(range(1, width), rng.randint(0, 6)))
            sizes = [b - a for a, b in zip([0, *cuts], [*cuts, width], strict=True)]
            lengths.append(sizes[: rng.randint(1, len(sizes))])
        yield token_ids(rows, width, seed=seed), Tokens.packed(lengths, width)


def gradients(model, ids, tokens):
    model.zero_grad()
    loss, aux = model.loss(ids, ids.roll(-1, 1), tokens)
    (loss + sum(aux.losses.values()) if aux else loss).backward()
    return loss.detach(), aux, [p.grad.clone() for p in model.parameters()]


def test_twenty_ragged_batches_do_not_recompile():
    model, plain = tiny_model(torch.float32).train(), tiny_model(torch.float32).train()
    compiled = CompileCounter()
    for block in model.blocks:
        block.compile(backend=compiled, fullgraph=True)
    for ids, tokens in ragged_batches(20):
        loss, _, grads = gradients(model, ids, tokens)
        want, _, want_grads = gradients(plain, ids, tokens)
        torch.testing.assert_close(loss, want, rtol=0, atol=FLOAT32)
        for a, b in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=FLOAT32)
    assert compiled.frame_count == 1, "both blocks and all batches share one graph"
    assert not counters["recompiles"]


@config
class NoisyAuxConfig(SublayerConfig):
    """A sublayer with a loss of its own, to follow it through the stack."""

    name = "ffn"

    def build(self, d_model):
        return NoisyAux(self, d_model)


class NoisyAux(Sublayer):
    def __init__(self, config, d_model):
        super().__init__(config)
        self.proj = torch.nn.Linear(d_model, d_model)

    def update(self, x, ctx):
        y = self.proj(x)
        return y, Aux({"size": y.square().mean()}, {"all": y.detach().sum((0, 1))})

    def residual_weights(self):
        return [self.proj.weight]

    def flops(self, n_keys):
        return 0


@pytest.mark.parametrize("way", ["checkpointed", "compiled", "compiled and checkpointed"])
def test_aux_and_gradients_are_the_same(way):
    from dataclasses import replace

    base = tiny_config(dropout=0.0)
    block = PreNormConfig(norm=RMSNormConfig(), sublayers=(base.blocks.pattern.sublayers[0], NoisyAuxConfig()))
    config = replace(base, blocks=replace(base.blocks, pattern=block, n=2))
    plain, model = (tiny_model(torch.float32, config=config).train() for _ in range(2))
    model.checkpoint_blocks = "checkpointed" in way
    if "compiled" in way:
        for part in model.blocks:
            part.compile(fullgraph=True)
    ids, tokens = next(ragged_batches(1))
    want, got = gradients(plain, ids, tokens), gradients(model, ids, tokens)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=FLOAT32)
    torch.testing.assert_close(got[1].losses, want[1].losses, rtol=1e-5, atol=0)  # a sum of 2 terms of order 10
    torch.testing.assert_close(got[1].loads, want[1].loads, rtol=1e-4, atol=1e-4)
    for a, b in zip(got[2], want[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=FLOAT32)


def test_checkpointing_with_dropout_draws_the_same_numbers():
    config = tiny_config(dropout=0.4, weight_dropout=0.2)
    results = []
    for checkpointed in (False, True):
        model = tiny_model(config=config).train()
        model.checkpoint_blocks = checkpointed
        torch.manual_seed(3)
        results.append(gradients(model, *next(ragged_batches(1)))[2])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_decode_step_compiles_without_graph_breaks():
    model, ids = tiny_model(torch.float32, layers=1), token_ids(2, 12)
    step = torch.compile(lambda new, cache: model(new, cache=cache), fullgraph=True)
    with torch.no_grad():
        want, cache = model(ids), model.make_cache(2, 12)
        got = [model(ids[:, :4], cache=cache)]
        got += [step(ids[:, i : i + 1], cache) for i in range(4, 12)]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=0, atol=FLOAT32)
    # The first step, and one more in which dynamo learns that the length changes.
    assert counters["stats"]["unique_graphs"] <= 2


def test_the_whole_model_compiles():
    model, ids = tiny_model(torch.float32, layers=1), token_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(ids), model(ids), rtol=0, atol=FLOAT32)


def test_adapters_compile_without_a_break_and_train_the_same():
    """Two graphs at most: the stream that enters the first block needs no gradient, as the table is frozen."""
    models = [tiny_model(torch.float32).train() for _ in range(2)]
    for model in models:
        torch.manual_seed(4)
        add_adapters(model, LoRAConfig(rank=2))
    compiled = CompileCounter()
    for block in models[0].blocks:
        block.compile(backend=compiled, fullgraph=True)
    for ids, tokens in ragged_batches(5):
        losses = [model.loss(ids, ids.roll(-1, 1), tokens)[0] for model in models]
        for loss, model in zip(losses, models, strict=True):
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(0.1 * p.grad)
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=FLOAT32)
    assert compiled.frame_count <= 2


def test_windows_scaled_embeddings_and_bounded_logits_are_one_graph():
    from qkv.presets import gemma2

    sizes = {"d_model": 16, "n_rounds": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 24}
    data = gemma2(**sizes, vocab_size=41, window=4).to_dict()
    for block in data["blocks"]["pattern"]:
        block["sublayers"][0]["softcap"] = None  # the tiled kernel, which bounds scores, is not traced in one graph
    model, ids = tiny_model(dtype=torch.float32, config=TransformerConfig.from_dict(data)), token_ids(2, 9)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
        torch.testing.assert_close(got, model(ids), rtol=0, atol=FLOAT32)


def test_the_loop_of_a_decoder_is_one_node():
    """Forward and backward, whatever the number of tokens; with the same numbers."""
    n, h, a, m, s = 2, 3, 4, 5, 6
    for tokens in (3, 9):
        shapes = (tokens, n, 3 * h), (n, h), (n, s, a), (n, s, m), (a, h), (a,), (m, 3 * h), (3 * h, h), (3 * h,)
        numbers = [torch.randn(shape, requires_grad=True) for shape in shapes]
        p = AttentiveGRU(*numbers)
        graphs = EagerAndRecordGraphs()
        torch.compile(attentive_gru, fullgraph=True, backend=graphs, dynamic=False)(p)
        (graph,) = graphs.graphs
        assert sum("qkv" in str(node.target) for node in graph.graph.nodes) == 1
        out, want = torch.compile(attentive_gru, fullgraph=True, backend="aot_eager")(p), attentive_gru(p)
        grads, truth = (torch.autograd.grad(x.states.sum() + x.contexts.square().sum(), numbers) for x in (out, want))
        for got, true in zip((*out, *grads), (*want, *truth), strict=True):
            torch.testing.assert_close(got, true, rtol=0, atol=10 * FLOAT32)  # sums over tokens and rows


@pytest.mark.parametrize(
    ("mask", "computed"),
    [(Causal(), "document_bounds"), (Causal() & Window(size=99), "tile_kinds")],
    ids=["documents", "tiles"],
)
def test_masks_are_lowered_once_for_six_layers(monkeypatch, mask, computed):
    once_for_six_layers(monkeypatch, mask, computed, "compiled")
