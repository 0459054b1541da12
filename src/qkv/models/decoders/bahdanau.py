"""A decoder whose attention asks with the last state, before the token is read."""

from dataclasses import replace
from typing import final

import torch
from torch import nn

from qkv.config import config
from qkv.models.decoders.decoder import Decoder, DecoderConfig, DecoderState
from qkv.models.recurrent_encoder import Encoded, RecurrentEncoder
from qkv.nn.additive import AdditiveScoreConfig, ScoreConfig
from qkv.ops.scores import normalised
from qkv.recorder import Recorder
from qkv.shapes import Float, Tensor


@final
@config
class BahdanauConfig(DecoderConfig):
    """A decoder that looks back *before* it reads: c = Σ α h with α from its last state; s' = cell(s, [y; c]).

    Source: Bahdanau et al. 2015, sections 3.1 and A.2.2. Differs from the paper in the readout, tanh(W [s'; c; y])
    instead of a maxout layer.

    Attributes:
        score: How well the last state matches each place of the memory.
    """

    score: ScoreConfig = AdditiveScoreConfig()

    def build(self, d_model: int, encoder: RecurrentEncoder) -> "Bahdanau":
        """See `DecoderConfig`."""
        return Bahdanau(self, d_model, encoder)


@final
class Bahdanau(Decoder):
    """See `BahdanauConfig`."""

    def __init__(self, config: BahdanauConfig, d_model: int, encoder: RecurrentEncoder) -> None:
        d_memory = encoder.net.d_out
        super().__init__(config, d_model, encoder, d_memory)
        self.score = config.score.build(self.net.d_hidden, d_memory)
        self.readout = nn.Linear(self.net.d_hidden + d_memory + self.d_embed, self.d_readout)

    def begin(self, encoded: Encoded) -> DecoderState:
        """See `Decoder`."""
        return DecoderState(encoded, self.score.keys(encoded.memory), self.first(encoded))

    def forward(
        self, y: Float[Tensor, "N T E"], state: DecoderState, recorder: Recorder | None = None
    ) -> tuple[Float[Tensor, "N T R"], DecoderState]:
        """See `Decoder`. Only what needs the last state is in the loop."""
        assert state.keys is not None
        memory, valid, _ = state.encoded
        hidden = state.hidden
        from_y, to_gates = self.split_gates(y)
        tops: list[Tensor] = []
        contexts: list[Tensor] = []
        alignment: list[Tensor] = []
        for gates in from_y.unbind(1):
            weights = normalised(self.score(hidden[-1][0][:, None], state.keys), valid)
            context = (weights @ memory.to(weights.dtype))[:, 0]
            hidden = self.net.step(gates + context @ to_gates, hidden)
            tops.append(hidden[-1][0])
            contexts.append(context)
            if recorder is not None:
                alignment.append(weights)
        if recorder is not None:
            recorder.alignment(0, torch.cat(alignment, dim=1))
        seen = torch.cat([torch.stack(tops, 1), torch.stack(contexts, 1), y], dim=-1)
        return self.drop(torch.tanh(self.readout(seen))), replace(state, hidden=hidden)
