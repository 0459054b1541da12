"""The recurrent translator: an encoder reads, a decoder writes and looks back at what was read; or cannot look back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, config
from qkv.documents import Documents
from qkv.errors import ConfigError
from qkv.models.init import InitConfig
from qkv.models.pairs import Decoding, Pair, PairModel, PairModelConfig
from qkv.nn.additive import AdditiveScoreConfig, ScoreConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.embedders.embedder import Table
from qkv.nn.heads import LMHeadConfig
from qkv.nn.recurrent import CellConfig, GRUConfig, LayerState, Recurrent, State
from qkv.nn.sublayer import Aux
from qkv.ops.backend import Problem
from qkv.ops.scores import normalised
from qkv.recorder import Recorder
from qkv.shapes import Bool, Float, Int, Tensor
from qkv.tokens import Tokens

# --- encoder --------------------------------------------------------------------------------------------------------


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
    d_embed: int | None = None
    d_hidden: int | None = None
    layers: int = 1
    bidirectional: bool = True
    dropout: float = 0.0
    rests: int | None = None

    def __post_init__(self) -> None:
        _check_network(self.layers, self.dropout, d_embed=self.d_embed, d_hidden=self.d_hidden, rests=self.rests)

    def build(self, d_model: int) -> "RecurrentEncoder":
        """The encoder of a model of width `d_model`."""
        return RecurrentEncoder(self, d_model)


@final
class RecurrentEncoder(nn.Module):
    """See `RecurrentEncoderConfig`."""

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


# --- decoders -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderState:
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
        memory, valid, final = self.encoded
        return DecoderState(
            Encoded(memory[rows], None if valid is None else valid[rows], tuple(part[rows] for part in final)),
            None if self.keys is None else self.keys[rows],
            tuple(tuple(part[rows] for part in layer) for layer in self.hidden),
            None if self.feed is None else self.feed[rows],
        )


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
    d_embed: int | None = None
    d_hidden: int | None = None
    d_readout: int | None = None
    layers: int = 1
    bridge: Literal["linear", "copy"] = "linear"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = {"d_embed": self.d_embed, "d_hidden": self.d_hidden, "d_readout": self.d_readout}
        _check_network(self.layers, self.dropout, **sizes)

    @abstractmethod
    def build(self, d_model: int, encoder: RecurrentEncoder) -> "Decoder":
        """The decoder of a model of width `d_model` behind that encoder."""


class Decoder(nn.Module, ABC):
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
        self.bridge = _bridge(config, encoder.net, self.net)

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

    def build(self, d_model: int, encoder: RecurrentEncoder) -> "Luong":
        """See `DecoderConfig`."""
        return Luong(self, d_model, encoder)


@final
class Luong(Decoder):
    """See `LuongConfig`."""

    def __init__(self, config: LuongConfig, d_model: int, encoder: RecurrentEncoder) -> None:
        d_memory = encoder.net.d_out
        super().__init__(config, d_model, encoder, (config.d_readout or d_model) if config.input_feeding else 0)
        self.input_feeding = config.input_feeding
        self.score = config.score.build(self.net.d_hidden, d_memory)
        self.readout = nn.Linear(d_memory + self.net.d_hidden, self.d_readout)

    def begin(self, encoded: Encoded) -> DecoderState:
        """See `Decoder`; what is fed first is 0."""
        feed = encoded.memory.new_zeros(len(encoded.memory), self.d_readout) if self.input_feeding else None
        return DecoderState(encoded, self.score.keys(encoded.memory), self.first(encoded), feed)

    def forward(
        self, y: Float[Tensor, "N T E"], state: DecoderState, recorder: Recorder | None = None
    ) -> tuple[Float[Tensor, "N T R"], DecoderState]:
        """See `Decoder`."""
        if not self.input_feeding:
            top, hidden = self.net(y, state=state.hidden)
            vectors, weights = self._look_back(top, state)
            if recorder is not None:
                recorder.alignment(0, weights)
            return self.drop(vectors), replace(state, hidden=hidden)
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
        return torch.stack(fed, 1), replace(state, hidden=hidden, feed=feed)

    def _look_back(self, top: Float[Tensor, "N T D"], state: DecoderState) -> tuple[Tensor, Tensor]:
        """The attentional vectors, (N, T, R), and the weights, (N, T, S)."""
        assert state.keys is not None
        memory, valid, _ = state.encoded
        weights = normalised(self.score(top, state.keys), valid)
        context = weights @ memory.to(weights.dtype)
        return torch.tanh(self.readout(torch.cat([context, top.to(context.dtype)], dim=-1))), weights


@final
@config
class FixedVectorConfig(DecoderConfig):
    """A decoder that cannot look back: it reads the encoder's last state with every token, s' = cell(s, [y; c]).

    Source: Cho et al. 2014, section 2.1; the readout is tanh(W [s'; c; y]), as in `BahdanauConfig`.
    """

    def build(self, d_model: int, encoder: RecurrentEncoder) -> "FixedVector":
        """See `DecoderConfig`."""
        return FixedVector(self, d_model, encoder)


@final
class FixedVector(Decoder):
    """See `FixedVectorConfig`."""

    def __init__(self, config: FixedVectorConfig, d_model: int, encoder: RecurrentEncoder) -> None:
        d_memory = encoder.net.d_out
        super().__init__(config, d_model, encoder, d_memory)
        self.readout = nn.Linear(self.net.d_hidden + d_memory + self.d_embed, self.d_readout)

    def begin(self, encoded: Encoded) -> DecoderState:
        """See `Decoder`."""
        return DecoderState(encoded, None, self.first(encoded))

    def forward(
        self, y: Float[Tensor, "N T E"], state: DecoderState, recorder: Recorder | None = None
    ) -> tuple[Float[Tensor, "N T R"], DecoderState]:
        """See `Decoder`. There is no attention to record."""
        context = state.encoded.final[0][:, None].expand(-1, y.shape[1], -1)
        top, hidden = self.net(torch.cat([y, context], dim=-1), state=state.hidden)
        readout = torch.tanh(self.readout(torch.cat([top, context, y], dim=-1)))
        return self.drop(readout), replace(state, hidden=hidden)


def _bridge(config: DecoderConfig, encoder: Recurrent, decoder: Recurrent) -> nn.ModuleList | None:
    kept, needed = encoder.cell.n_states, decoder.cell.n_states
    if kept != needed:
        raise ConfigError(
            f"the encoder's cell keeps {kept} states, the decoder's {config.cell.tag()} {needed}; give both the same"
        )
    if config.bridge == "linear":
        return nn.ModuleList(nn.Linear(encoder.d_out, decoder.d_hidden) for _ in range(needed))
    if encoder.d_out != decoder.d_hidden:
        raise ConfigError(
            f"bridge=copy needs a decoder as wide as the encoder's last state, {encoder.d_out}, and it has "
            f"d_hidden={decoder.d_hidden}; set decoder.d_hidden={encoder.d_out}, or use bridge=linear"
        )
    return None


def _check_network(layers: int, dropout: float, **sizes: int | None) -> None:
    for name, size in {"layers": layers, **sizes}.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name}={size} must be at least 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout} must be at least 0 and below 1")


# --- the model ------------------------------------------------------------------------------------------------------


@final
@config
class Seq2SeqConfig(PairModelConfig):
    """A recurrent model of pairs as data.

    Attributes:
        d_model: Width of whatever is not said otherwise.
        source: Vectors of the source's tokens.
        target: Vectors of the target's tokens.
        encoder: What reads the source.
        decoder: What writes the target.
        head: The target's vocabulary; tied to `target` only where d_readout is d_embed.
        init: How weights are drawn; biases of cells keep PyTorch's.
    """

    d_model: int
    source: TokenEmbedderConfig = TokenEmbedderConfig()
    target: TokenEmbedderConfig = TokenEmbedderConfig()
    encoder: RecurrentEncoderConfig = RecurrentEncoderConfig()
    decoder: DecoderConfig = BahdanauConfig()
    head: LMHeadConfig = LMHeadConfig(tied=False)
    init: InitConfig = InitConfig(std=None, embed_std=0.1)

    def __post_init__(self) -> None:
        if self.d_model < 1:
            raise ConfigError(f"d_model={self.d_model} must be at least 1")

    def with_vocabularies(self, source: int, target: int, *, shared: bool) -> "Seq2SeqConfig":
        """See `PairModelConfig`."""
        return replace(
            self,
            source=open_vocabulary(self.source, source, "source"),
            target=open_vocabulary(self.target, target, "target"),
        )

    @property
    def vocabularies(self) -> tuple[int | None, int | None]:
        """See `PairModelConfig`."""
        return self.source.vocab_size, self.target.vocab_size

    def build(self) -> "Seq2Seq":
        """See `PairModelConfig`."""
        return Seq2Seq(self)


def open_vocabulary(embed: TokenEmbedderConfig, n: int, what: str) -> TokenEmbedderConfig:
    """The embedder for a vocabulary of `n` tokens.

    Raises:
        ConfigError: It has a smaller one.
    """
    if embed.vocab_size is not None and embed.vocab_size < n:
        raise ConfigError(
            f"the tokenizer of the {what} has {n} tokens and model.{what}.vocab_size is {embed.vocab_size}; leave it "
            f"out, or set it to {n} or more"
        )
    return replace(embed, vocab_size=embed.vocab_size or n)


@final
class Seq2Seq(PairModel):
    """See `Seq2SeqConfig`. Everything outside the decoder's own loop is computed for all tokens at once."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        d_model = config.d_model
        self.encoder = config.encoder.build(d_model)
        self.decoder = config.decoder.build(d_model, self.encoder)
        self.source = config.source.build(config.encoder.d_embed or d_model)
        self.target = config.target.build(self.decoder.d_embed)
        if config.head.tied and self.decoder.d_readout != self.decoder.d_embed:
            raise ConfigError(
                f"a tied head needs d_readout={self.decoder.d_readout} to be d_embed={self.decoder.d_embed}; set "
                "decoder.d_readout, or head.tied to false"
            )
        self.head = config.head.build(self.decoder.d_readout, config.target)
        if not next(self.parameters()).is_meta:
            self.config.init.apply(self, [], 1)

    @property
    def table(self) -> Table | None:
        """What the head shares with the embeddings of the target; None: nothing."""
        return self.target.table if self.head.weight is None else None

    def forward(
        self, inputs: Pair, tokens: Tokens | None = None, *, recorder: Recorder | None = None
    ) -> Float[Tensor, "B T V"]:
        """See `PairModel`."""
        readout, documents = self._read(inputs, tokens, recorder)
        return documents.scatter(self.head(readout, self.table))

    def loss(
        self, inputs: Pair, targets: Int[Tensor, "B T"], tokens: Tokens | None = None, *, scale: float | None = None
    ) -> tuple[Float[Tensor, ""], Aux | None]:
        """See `PairModel`."""
        readout, documents = self._read(inputs, tokens, None)
        if not documents.full:  # what is behind the ends never reaches the vocabulary
            valid = documents.valid
            readout, targets = readout[valid][None], documents.gather(targets)[valid][None]
        valid = torch.ones_like(targets, dtype=torch.bool)
        if scale is None:
            scale = 1 / max(1, self.head.count(targets, valid))
        return self.head.loss(readout, self.table, targets, valid, scale), None

    def _read(self, inputs: Pair, tokens: Tokens | None, recorder: Recorder | None) -> tuple[Tensor, Documents]:
        """What the head reads for each token of each target."""
        if tokens is None:
            tokens = Tokens.full(*inputs.target.shape, device=inputs.target.device)
        sources, documents = Documents.of(inputs.tokens), Documents.of(tokens)
        if len(sources.lengths) != len(documents.lengths):
            raise ConfigError(
                f"there are {len(sources.lengths)} sources and {len(documents.lengths)} targets that hold a token; "
                "give each target its source"
            )
        state = self.decoder.begin(self._encode(inputs.source, sources))
        y = self.target(documents.gather(inputs.target), documents.tokens)
        readout, _ = self.decoder(y, state, recorder)
        return readout, documents

    def _encode(self, source: Int[Tensor, "B S"], documents: Documents) -> Encoded:
        return self.encoder(self.source(documents.gather(source), documents.tokens), documents)

    def align(self, inputs: Pair, tokens: Tokens | None = None) -> Float[Tensor, "B T S"]:
        """See `PairModel`. Behind the tokens stand what `encoder.rests` adds."""
        if isinstance(self.decoder, FixedVector):
            raise ConfigError("this model has no attention: its decoder is a FixedVector, which cannot look back")
        kept = _Kept()
        with torch.no_grad():
            self(inputs, tokens, recorder=kept)
        return kept.weights

    def start(self, source: Int[Tensor, "B S"], tokens: Tokens, *, capacity: int) -> "Seq2SeqDecoding":
        """See `PairModel`; a recurrent decoder has room for any number of tokens.

        Raises:
            ConfigError: A row has no token, or several documents.
        """
        documents = Documents.of(tokens)
        if len(documents.row) != len(source) or len(documents.row) != len(documents.row.unique()):
            raise ConfigError("each row needs one source with at least one token; leave empty ones out")
        return Seq2SeqDecoding(self, self.decoder.begin(self._encode(source, documents)))


@final
class _Kept(Recorder):
    """Keeps what it is shown."""

    weights: Tensor

    def attention(self, slot: int, problem: Problem, out: Float[Tensor, "B H T v"]) -> None:
        """There is none in a recurrent model."""
        raise AssertionError

    def alignment(self, slot: int, weights: Float[Tensor, "B T S"]) -> None:
        """See `Recorder`."""
        self.weights = weights


@final
class Seq2SeqDecoding(Decoding):
    """Targets of a `Seq2Seq` on their way."""

    def __init__(self, model: Seq2Seq, state: DecoderState) -> None:
        self._model, self._state = model, state

    def advance(self, ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """See `Decoding`."""
        ids = ids.to(self._state.encoded.memory.device)
        y = self._model.target(ids[:, None], Tokens.full(len(ids), 1, device=ids.device))
        readout, self._state = self._model.decoder(y, self._state)
        return self._model.head(readout, self._model.table)[:, 0]

    def reorder(self, rows: Int[Tensor, " r"]) -> None:
        """See `Decoding`."""
        self._state = self._state.take(rows)
