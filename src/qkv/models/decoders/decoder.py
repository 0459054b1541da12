"""What the decoders of the recurrent translator have in common: where they stand, and how they begin."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from qkv.config import Config, Configured, Count, Share, config
from qkv.errors import ConfigError
from qkv.models.recurrent_encoder import Encoded, RecurrentEncoder
from qkv.nn.recurrent import CellConfig, GRUConfig, Recurrent, State
from qkv.recorder import Recorder
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import join_rows


class DecoderState(NamedTuple):
    """Where a decoder stands in its texts.

    Attributes:
        encoded: What it reads.
        keys: What the scores need of the memory, computed once; None where nothing is scored.
        hidden: Its own state.
        feed: The last attentional vector, where it is fed back; else None.
    """

    encoded: Encoded
    keys: Float[Tensor, "N S A"] | None
    hidden: State
    feed: Float[Tensor, "N R"] | None = None

    def take(self, rows: Int[Tensor, " r"]) -> "DecoderState":
        """The same for some of the rows, in this order."""
        return tree_map(lambda x: x if x is None else x[rows], self)

    def join(self, other: "DecoderState") -> "DecoderState":
        """The rows of both; shorter sources are padded."""
        a, b = self, other
        if a.encoded.valid is not None or b.encoded.valid is not None or a.width != b.width:
            a, b = a._masked(), b._masked()
        return tree_map(lambda x, y: x if x is None else join_rows(x, y), a, b)

    @property
    def width(self) -> int:
        """Vectors of the memory in each row."""
        return self.encoded.memory.shape[1]

    def _masked(self) -> "DecoderState":
        memory, valid, _ = self.encoded
        valid = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device) if valid is None else valid
        return self._replace(encoded=self.encoded._replace(valid=valid))


@config
class DecoderConfig(Config, ABC):
    """Base of the configs of decoders.

    Attributes:
        cell: GRU or LSTM.
        d_embed: Width of the embeddings. None: d_model.
        d_hidden: Width of the state. None: d_model.
        d_readout: Width of what the head reads. None: d_model.
        layers: How many, one on the other.
        bridge: How the state begins: `linear`, tanh(W final) of the encoder's last state (Bahdanau et al. 2015,
            section A.2.2, from the backward one alone), or `copy`, that state itself.
        dropout: Probability that an element is dropped between layers and in the readout in training.
    """

    cell: CellConfig = GRUConfig()
    d_embed: Count | None = None
    d_hidden: Count | None = None
    d_readout: Count | None = None
    layers: Count = 1
    bridge: Literal["linear", "copy"] = "linear"
    dropout: Share = 0.0

    def build(self, d_model: int, encoder: RecurrentEncoder) -> "Decoder":
        """The decoder of a model of width `d_model` behind that encoder."""
        return self._build(d_model, encoder)


class Decoder(Configured, nn.Module, ABC):
    """Base of the decoders. One call reads any number of tokens of the target: all in training, one in a search."""

    def __init__(self, config: DecoderConfig, d_model: int, encoder: RecurrentEncoder, d_extra: int) -> None:
        """`d_extra` is the width of what the network reads beside the embedding."""
        super().__init__()
        self.d_embed = config.d_embed or d_model
        self.d_readout = config.d_readout or d_model
        self.dropout = config.dropout
        d_hidden = config.d_hidden or d_model
        self.net = Recurrent(
            config.cell, self.d_embed + d_extra, d_hidden, layers=config.layers, dropout=config.dropout
        )
        kept, needed, d_final = encoder.net.cell.n_states, self.net.cell.n_states, encoder.net.d_out
        if kept != needed:
            raise ConfigError(
                f"the encoder's cell keeps {kept} states, the decoder's {config.cell.tag()} {needed}; give both one cell"
            )
        if config.bridge == "copy" and d_final != d_hidden:
            raise ConfigError(
                f"bridge=copy needs a decoder as wide as the encoder's last state, {d_final}, and it has "
                f"d_hidden={d_hidden}; set decoder.d_hidden={d_final}, or use bridge=linear"
            )
        linear = config.bridge == "linear"
        self.bridge = nn.ModuleList(nn.Linear(d_final, d_hidden) for _ in range(needed)) if linear else None

    @abstractmethod
    def begin(self, encoded: Encoded) -> DecoderState:
        """The state before the first token."""

    @abstractmethod
    def forward(
        self, y: Float[Tensor, "N T E"], state: DecoderState, recorder: Recorder | None = None
    ) -> tuple[Float[Tensor, "N T R"], DecoderState]:
        """What the head reads after each of some tokens of the target, and the state behind them."""

    def first(self, encoded: Encoded) -> State:
        """How its network begins: all layers alike."""
        layer = encoded.final
        if self.bridge is not None:
            layer = tuple(torch.tanh(linear(part)) for linear, part in zip(self.bridge, encoded.final, strict=True))
        return (layer,) * self.net.layers

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the readout."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def split_gates(self, y: Float[Tensor, "N T E"]) -> tuple[Float[Tensor, "N T gates"], Float[Tensor, "extra gates"]]:
        """What the embeddings add to the gates, for all tokens at once; and the weight of the rest of the input."""
        weight = self.net.input_weight
        return F.linear(y, weight[:, : self.d_embed], self.net.input_bias), weight[:, self.d_embed :].T
