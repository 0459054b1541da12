"""What is known of a mask is computed once per forward pass, for all layers and for the backward pass."""

import pytest

from lowering import once_for_six_layers
from qkv.masks import Causal, Window


@pytest.mark.parametrize("way", ["plain", "checkpointed"])
@pytest.mark.parametrize(
    ("mask", "computed"),
    [(Causal(), "document_bounds"), (Causal() & Window(size=99), "tile_kinds")],
    ids=["documents", "tiles"],
)
def test_once_for_six_layers_forward_and_backward(monkeypatch, mask, computed, way):
    once_for_six_layers(monkeypatch, mask, computed, way)
