"""A decoder whose attention asks with the current state, after the token was read."""

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
class LuongConfig(DecoderConfig):
    """A decoder that looks back *after* it has read: s' = cell(s, [y; a]); a' = tanh(W [c; s']), c = Σ α h, α from s'.

    Source: Luong et al. 2015, sections 3.1 and 3.3.

    Attributes:
        score: How well the current state matches each place of the memory.
        input_feeding: Whether the last attentional vector a is read with the next token; without it no step waits for
            the attention of the last one, and training needs no loop.
    """

    score: ScoreConfig = AdditiveScoreConfig()
    input_feeding: bool = True


@final
class Luong(Decoder, config=LuongConfig):
    """Attends with its new state."""

    def __init__(self, config: LuongConfig, d_model: int, encoder: RecurrentEncoder) -> None:
        d_memory = encoder.net.d_out
        super().__init__(config, d_model, encoder, (config.d_readout or d_model) if config.input_feeding else 0)
        self.input_feeding = config.input_feeding
        self.score = config.score.build(self.net.d_hidden, d_memory)
        self.readout = nn.Linear(d_memory + self.net.d_hidden, self.d_readout)

    def begin(self, encoded: Encoded) -> DecoderState:
        feed = encoded.memory.new_zeros(len(encoded.memory), self.d_readout) if self.input_feeding else None
        return DecoderState(encoded, self.score.keys(encoded.memory), self.first(encoded), feed)

    def forward(
        self, y: Float[Tensor, "N T E"], state: DecoderState, recorder: Recorder | None = None
    ) -> tuple[Float[Tensor, "N T R"], DecoderState]:
        if not self.input_feeding:
            top, hidden = self.net(y, state=state.hidden)
            vectors, weights = self._look_back(top, state)
            if recorder is not None:
                recorder.alignment(0, weights)
            return self.drop(vectors), state._replace(hidden=hidden)
        hidden, feed = state.hidden, state.feed
        assert feed is not None
        from_y, to_gates = self.split_gates(y)
        fed: list[Tensor] = []
        alignment: list[Tensor] = []
        for gates in from_y.unbind(1):
            hidden = self.net.step(gates + feed @ to_gates, hidden)
            vectors, weights = self._look_back(hidden[-1][0][:, None], state)
            feed = self.drop(vectors[:, 0])
            fed.append(feed)
            if recorder is not None:
                alignment.append(weights)
        if recorder is not None:
            recorder.alignment(0, torch.cat(alignment, dim=1))
        return torch.stack(fed, 1), state._replace(hidden=hidden, feed=feed)

    def _look_back(self, top: Float[Tensor, "N T D"], state: DecoderState) -> tuple[Tensor, Tensor]:
        """The attentional vectors, (N, T, R), and the weights, (N, T, S)."""
        assert state.keys is not None
        memory, valid, _ = state.encoded
        weights = normalised(self.score(top, state.keys), valid)
        context = weights @ memory.to(weights.dtype)
        return torch.tanh(self.readout(torch.cat([context, top.to(context.dtype)], dim=-1))), weights
