"""How often what is known of a mask is computed, for the tests with checked signatures and for the compiled ones."""

import dataclasses
from collections import Counter

import torch

from qkv import lowered
from qkv.tokens import Tokens
from tiny import tiny_config, tiny_model, token_ids


def model_of(mask, length):
    """Six layers with one mask."""
    config = tiny_config(dropout=0.0)
    block = config.blocks.pattern
    attention = dataclasses.replace(block.sublayers[0], mask=mask)
    block = dataclasses.replace(block, sublayers=(attention, *block.sublayers[1:]))
    return tiny_model(
        torch.float32, config=dataclasses.replace(config, blocks=dataclasses.replace(config.blocks, pattern=block, n=6))
    )


def once_for_six_layers(monkeypatch, mask, computed, way):
    """`computed` is called once in a forward and a backward pass, whichever `way` the blocks are run."""
    counts = Counter()

    def counted(name):
        function = getattr(lowered, name)

        def call(*args):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(lowered, name, call)

    for name in ("document_bounds", "tile_kinds", "allowed"):
        counted(name)
    monkeypatch.setattr(lowered, "DENSE_PAIRS", 0)
    model = model_of(mask, 80).train()
    model.checkpoint_blocks = way == "checkpointed"
    if way == "compiled":
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
    ids, tokens = token_ids(2, 80), Tokens.packed([[30, 45], [50, 10, 20]], 80)
    model.loss(ids, ids.roll(-1, 1), tokens)[0].backward()
    assert counts == {computed: 1}
    assert all(p.grad is not None for p in model.parameters())
