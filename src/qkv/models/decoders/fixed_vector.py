"""A decoder without attention: all it knows of the source is one vector."""

from typing import final

import torch
from torch import nn

from qkv.config import config
from qkv.models.decoders.decoder import Decoder, DecoderConfig, DecoderState
from qkv.models.recurrent_encoder import Encoded, RecurrentEncoder
from qkv.recorder import Recorder
from qkv.shapes import Float, Tensor


@final
@config
class FixedVectorConfig(DecoderConfig):
    """A decoder that cannot look back: it reads the encoder's last state with every token, s' = cell(s, [y; c]).

    Source: Cho et al. 2014, section 2.1; the readout is tanh(W [s'; c; y]), as in `BahdanauConfig`.
    """


@final
class FixedVector(Decoder, config=FixedVectorConfig):
    """Reads the same vector with every token, so training needs no loop."""

    def __init__(self, config: FixedVectorConfig, d_model: int, encoder: RecurrentEncoder) -> None:
        d_memory = encoder.net.d_out
        super().__init__(config, d_model, encoder, d_memory)
        self.readout = nn.Linear(self.net.d_hidden + d_memory + self.d_embed, self.d_readout)

    def begin(self, encoded: Encoded) -> DecoderState:
        return DecoderState(encoded, None, self.first(encoded))

    def forward(
        self, y: Float[Tensor, "N T E"], state: DecoderState, recorder: Recorder | None = None
    ) -> tuple[Float[Tensor, "N T R"], DecoderState]:
        context = state.encoded.final[0][:, None].expand(-1, y.shape[1], -1)
        top, hidden = self.net(torch.cat([y, context], dim=-1), state=state.hidden)
        readout = torch.tanh(self.readout(torch.cat([top, context, y], dim=-1)))
        return self.drop(readout), state._replace(hidden=hidden)
