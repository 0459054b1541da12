"""The reader of the recurrent translator: a GRU or an LSTM over the source, in one direction or both."""

from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, Count, Share, config
from qkv.documents import Documents
from qkv.errors import ConfigError
from qkv.nn.recurrent import CellConfig, GRUConfig, LayerState, Recurrent
from qkv.shapes import Bool, Float, Tensor


class Encoded(NamedTuple):
    """What an encoder has read.

    Attributes:
        memory: The outputs of its highest layer.
        valid: False at padding; None: there is none.
        final: The last state of that layer, directions side by side.
    """

    memory: Float[Tensor, "N S M"]
    valid: Bool[Tensor, "N S"] | None
    final: LayerState


@final
@config
class RecurrentEncoderConfig(Config):
    """A recurrent network over the source.

    Source: Bahdanau et al. 2015, section 3.2.

    Attributes:
        cell: GRU or LSTM.
        d_embed: Width of the embeddings. None: d_model.
        d_hidden: Width of the state in each direction. None: d_model.
        layers: How many, one on the other.
        bidirectional: Whether each layer also reads from the end.
        dropout: Probability that an element is dropped between layers in training.
        rests: The memory is filled up to so many places with what a forward layer holds after the last token, beside
            zeros for the backward one, and the decoder sees them: models trained in Keras with masked, padded batches
            and unmasked attention rely on it. None: the decoder sees the tokens and nothing else.
    """

    cell: CellConfig = GRUConfig()
    d_embed: Count | None = None
    d_hidden: Count | None = None
    layers: Count = 1
    bidirectional: bool = True
    dropout: Share = 0.0
    rests: Count | None = None

    def __post_init__(self) -> None:
        if self.dropout and self.layers == 1:
            raise ConfigError(
                f"dropout={self.dropout} is between the encoder's layers and there is one; set source.dropout"
            )


@final
class RecurrentEncoder(nn.Module):
    """The memory is the output of a recurrent network, and the final state starts the decoder."""

    def __init__(self, config: RecurrentEncoderConfig, d_model: int) -> None:
        super().__init__()
        self.rests = config.rests
        self.net = Recurrent(
            config.cell,
            config.d_embed or d_model,
            config.d_hidden or d_model,
            layers=config.layers,
            bidirectional=config.bidirectional,
            dropout=config.dropout,
        )

    def forward(self, x: Float[Tensor, "N S E"], documents: Documents) -> Encoded:
        """Read documents that begin at the left."""
        memory, states = self.net(x, None if documents.full else documents.lengths)
        top = states[-self.net.directions :]
        final = tuple(torch.cat(parts, dim=-1) for parts in zip(*top, strict=True))
        if self.rests is None:
            return Encoded(memory, None if documents.full else documents.valid, final)
        return self._rested(memory, documents, top[0][0], final)

    def _rested(self, memory: Tensor, documents: Documents, held: Tensor, final: LayerState) -> Encoded:
        assert self.rests is not None
        if memory.shape[1] > self.rests:
            raise ConfigError(
                f"the source has {memory.shape[1]} tokens and this model takes at most {self.rests} (encoder.rests); "
                "make it shorter"
            )
        rest = F.pad(held, (0, memory.shape[-1] - held.shape[-1]))[:, None]
        memory = torch.where(documents.valid[..., None], memory, rest)
        rests = rest.expand(-1, self.rests - memory.shape[1], -1)
        memory = torch.cat([memory, rests], dim=1)
        return Encoded(memory, None, final)
