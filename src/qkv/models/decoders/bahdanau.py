"""A decoder whose attention asks with the last state, before the token is read."""

from typing import final

import torch
from torch import nn

from qkv.config import config
from qkv.models.decoders.decoder import Decoder, DecoderConfig, DecoderState
from qkv.models.recurrent_encoder import Encoded, RecurrentEncoder
from qkv.nn.additive import AdditiveScore, AdditiveScoreConfig, ScoreConfig
from qkv.nn.recurrent import GRUConfig, State
from qkv.ops.attentive_gru import AttentiveGRU, attentive_gru
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


@final
class Bahdanau(Decoder, config=BahdanauConfig):
    """Attends with its last state."""

    def __init__(self, config: BahdanauConfig, d_model: int, encoder: RecurrentEncoder) -> None:
        d_memory = encoder.net.d_out
        super().__init__(config, d_model, encoder, d_memory)
        self.score = config.score.build(self.net.d_hidden, d_memory)
        self.readout = nn.Linear(self.net.d_hidden + d_memory + self.d_embed, self.d_readout)

    def begin(self, encoded: Encoded) -> DecoderState:
        return DecoderState(encoded, self.score.keys(encoded.memory), self.first(encoded))

    def forward(
        self, y: Float[Tensor, "N T E"], state: DecoderState, recorder: Recorder | None = None
    ) -> tuple[Float[Tensor, "N T R"], DecoderState]:
        """See `Decoder`. Only what needs the last state is in the loop."""
        from_y, to_gates = self.split_gates(y.transpose(0, 1))
        p = self._attentive_gru(from_y, to_gates, state)
        if p is None:
            tops, contexts, weights, hidden = self._step_by_step(from_y, to_gates, state)
        else:
            states, contexts, weights = attentive_gru(p)
            tops, hidden = states[1:], ((states[-1],),)
        if recorder is not None:
            recorder.alignment(0, weights.transpose(0, 1))
        seen = torch.cat([tops.transpose(0, 1), contexts.transpose(0, 1), y], dim=-1)
        return self.drop(torch.tanh(self.readout(seen))), state._replace(hidden=hidden)

    def _attentive_gru(
        self, from_y: Float[Tensor, "T N gates"], to_gates: Float[Tensor, "M gates"], state: DecoderState
    ) -> AttentiveGRU | None:
        """The loop as one operation: for one layer of a GRU and additive scores, in float32 or float64; else None.

        A token alone, as in a search, is none for it either: to call it takes longer than a step.
        """
        score, valid = self.score, state.encoded.valid
        if len(from_y) == 1:
            return None
        if not (isinstance(score, AdditiveScore) and isinstance(self.net.cell, GRUConfig) and self.net.layers == 1):
            return None
        if not isinstance(score.q_proj, nn.Linear):  # packed
            return None
        assert state.keys is not None
        ((start,),) = state.hidden
        numbers = start, state.keys, state.encoded.memory
        weights = score.q_proj.weight, score.v, to_gates, *self.net.weights("hh", 0)
        one_type = {x.dtype for x in (from_y, *numbers, *weights)} in ({torch.float32}, {torch.float64})
        if not one_type or torch.is_autocast_enabled(from_y.device.type):
            return None
        return AttentiveGRU(from_y, *numbers, *weights, valid)

    def _step_by_step(
        self, from_y: Float[Tensor, "T N gates"], to_gates: Float[Tensor, "M gates"], state: DecoderState
    ) -> tuple[Float[Tensor, "T N D"], Float[Tensor, "T N M"], Float[Tensor, "T N S"], State]:
        """States of the highest layer, contexts, weights, and the states of all layers behind the last token."""
        assert state.keys is not None
        memory, valid, _ = state.encoded
        hidden = state.hidden
        tops, contexts, looks = list[Tensor](), list[Tensor](), list[Tensor]()
        for gates in from_y.unbind(0):
            weights = normalised(self.score(hidden[-1][0][:, None], state.keys), valid)
            context = (weights @ memory.to(weights.dtype))[:, 0]
            hidden = self.net.step(gates + context @ to_gates, hidden)
            tops.append(hidden[-1][0])
            contexts.append(context)
            looks.append(weights[:, 0])
        return torch.stack(tops), torch.stack(contexts), torch.stack(looks), hidden
