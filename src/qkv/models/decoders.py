"""The decoders of the recurrent translator: with attention on the last state, on the current one, and without."""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from qkv.config import Config, Configured, Count, Share, config
from qkv.errors import ConfigError
from qkv.models.recurrent_encoder import Encoded, RecurrentEncoder
from qkv.nn.additive import AdditiveScore, AdditiveScoreConfig, ScoreConfig
from qkv.nn.recurrent import CellConfig, GRUConfig, Recurrent, State
from qkv.ops.attentive_gru import AttentiveGRU, attentive_gru
from qkv.ops.scores import normalised
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
    """Base of the decoders. One call reads any number of tokens of the target: all in training, one in a search.

    Attributes:
        score: How well a state matches each place of the memory; None: it does not look back.
    """

    def __init__(self, config: DecoderConfig, d_model: int, encoder: RecurrentEncoder, d_extra: int) -> None:
        """`d_extra` is the width of what the network reads beside the embedding."""
        super().__init__()
        self.score: Any = None  # some decoders narrow it
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
                f"the encoder's cell keeps {kept} states, the decoder's {config.cell.tag()} {needed}; give both the "
                "same"
            )
        if config.bridge == "copy" and d_final != d_hidden:
            raise ConfigError(
                f"bridge=copy needs a decoder as wide as the encoder's last state, {d_final}, and it has "
                f"d_hidden={d_hidden}; set decoder.d_hidden={d_final}, or use bridge=linear"
            )
        linear = config.bridge == "linear"
        self.bridge = nn.ModuleList(nn.Linear(d_final, d_hidden) for _ in range(needed)) if linear else None

    def begin(self, encoded: Encoded) -> DecoderState:
        """The state before the first token: in the network all layers begin alike."""
        layer = encoded.final
        if self.bridge is not None:
            layer = tuple(torch.tanh(linear(part)) for linear, part in zip(self.bridge, encoded.final, strict=True))
        keys = None if self.score is None else self.score.keys(encoded.memory)
        return DecoderState(encoded, keys, (layer,) * self.net.layers)

    @abstractmethod
    def forward(
        self, y: Float[Tensor, "N T E"], state: DecoderState, recorder: Recorder | None = None
    ) -> tuple[Float[Tensor, "N T R"], DecoderState]:
        """What the head reads after each of some tokens of the target, and the state behind them."""

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of the readout."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def split_gates(self, y: Float[Tensor, "N T E"]) -> tuple[Float[Tensor, "N T gates"], Float[Tensor, "extra gates"]]:
        """What the embeddings add to the gates, for all tokens at once; and the weight of the rest of the input."""
        weight, bias = self.net.weights("ih", 0)
        return F.linear(y, weight[:, : self.d_embed], bias), weight[:, self.d_embed :].T


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

    def forward(
        self, y: Float[Tensor, "N T E"], state: DecoderState, recorder: Recorder | None = None
    ) -> tuple[Float[Tensor, "N T R"], DecoderState]:
        context = state.encoded.final[0][:, None].expand(-1, y.shape[1], -1)
        top, hidden = self.net(torch.cat([y, context], dim=-1), state=state.hidden)
        readout = torch.tanh(self.readout(torch.cat([top, context, y], dim=-1)))
        return self.drop(readout), state._replace(hidden=hidden)


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
            recorder.alignment(weights.transpose(0, 1))
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
        state = super().begin(encoded)
        if self.input_feeding:
            state = state._replace(feed=encoded.memory.new_zeros(len(encoded.memory), self.d_readout))
        return state

    def forward(
        self, y: Float[Tensor, "N T E"], state: DecoderState, recorder: Recorder | None = None
    ) -> tuple[Float[Tensor, "N T R"], DecoderState]:
        if not self.input_feeding:
            top, hidden = self.net(y, state=state.hidden)
            vectors, weights = self._look_back(top, state)
            if recorder is not None:
                recorder.alignment(weights)
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
            recorder.alignment(torch.cat(alignment, dim=1))
        return torch.stack(fed, 1), state._replace(hidden=hidden, feed=feed)

    def _look_back(self, top: Float[Tensor, "N T D"], state: DecoderState) -> tuple[Tensor, Tensor]:
        """The attentional vectors, (N, T, R), and the weights, (N, T, S)."""
        assert state.keys is not None
        memory, valid, _ = state.encoded
        weights = normalised(self.score(top, state.keys), valid)
        context = weights @ memory.to(weights.dtype)
        return torch.tanh(self.readout(torch.cat([context, top.to(context.dtype)], dim=-1))), weights
