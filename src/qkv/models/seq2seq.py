"""The recurrent translator: an encoder reads, a decoder writes and looks back at what was read; or cannot look back."""

from collections.abc import Sequence
from typing import final

import torch

from qkv.config import Count, config
from qkv.documents import Documents
from qkv.errors import ConfigError
from qkv.models.decoders import BahdanauConfig, DecoderConfig, DecoderState, FixedVector
from qkv.models.decoding import Decoding
from qkv.models.init import InitConfig, draw_seed
from qkv.models.pairs import Pair, PairModel, PairModelConfig, check_pair, check_sources
from qkv.models.recurrent_encoder import Encoded, RecurrentEncoder, RecurrentEncoderConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.embedders.embedder import Table
from qkv.nn.heads import LMHeadConfig
from qkv.nn.sublayer import Aux
from qkv.recorder import Recorder
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Tokens, join_rows


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

    d_model: Count
    source: TokenEmbedderConfig = TokenEmbedderConfig()
    target: TokenEmbedderConfig = TokenEmbedderConfig()
    encoder: RecurrentEncoderConfig = RecurrentEncoderConfig()
    decoder: DecoderConfig = BahdanauConfig()
    head: LMHeadConfig = LMHeadConfig(tied=False)
    init: InitConfig = InitConfig(std=None, embed_std=0.1)

    def with_vocabularies(self, source: int, target: int, *, shared: bool) -> "Seq2SeqConfig":
        return self.replace(
            source=self.source.for_vocabulary(source, " of the source", "source"),
            target=self.target.for_vocabulary(target, " of the target", "target"),
        )

    def with_dropout(self, p: float) -> "Seq2SeqConfig":
        return self.replace(
            source=self.source.replace(dropout=p),
            target=self.target.replace(dropout=p),
            encoder=self.encoder.replace(dropout=p if self.encoder.layers > 1 else 0.0),
            decoder=self.decoder.replace(dropout=p),
        )

    @property
    def sentence(self) -> str:
        encoder, decoder = self.encoder, self.decoder
        reads = f"{encoder.layers} × {encoder.cell.tag()}{' in both directions' if encoder.bidirectional else ''}"
        return f"a recurrent translator: reads with {reads}, writes with {decoder.layers} × {decoder.tag()}"

    @property
    def depth(self) -> int:
        return self.encoder.layers + self.decoder.layers

    @property
    def longest(self) -> int | None:
        lengths = (self.source.max_length, self.target.max_length, self.encoder.rests)
        return min((n for n in lengths if n is not None), default=None)

    @property
    def vocabularies(self) -> tuple[int | None, int | None]:
        return self.source.vocab_size, self.target.vocab_size


@final
class Seq2Seq(PairModel, config=Seq2SeqConfig):
    """A recurrent encoder and decoder. Everything outside the decoder's own loop is computed for all tokens at once."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        seed, d_model = draw_seed(), config.d_model
        self.encoder = RecurrentEncoder(config.encoder, d_model)
        self.decoder = config.decoder.build(d_model, self.encoder)
        self.source = config.source.build(config.encoder.d_embed or d_model)
        self.target = config.target.build(self.decoder.d_embed)
        if config.head.tied and self.decoder.d_readout != self.decoder.d_embed:
            raise ConfigError(
                f"a tied head needs d_readout={self.decoder.d_readout} to be d_embed={self.decoder.d_embed}; set "
                "decoder.d_readout, or head.tied to false"
            )
        self.head = config.head.build(self.decoder.d_readout, config.target)
        if seed is not None:
            config.init.apply(self, [], 1, seed)

    @property
    def table(self) -> Table | None:
        return self.target.table if self.head.weight is None else None

    def forward(
        self,
        inputs: Pair,
        tokens: Tokens | None = None,
        *,
        targets: Int[Tensor, "B T"] | None = None,
        scale: float | None = None,
        recorder: Recorder | None = None,
    ) -> Float[Tensor, "B T V"] | tuple[Tensor, Aux | None]:
        documents = Documents.of(check_pair(inputs, tokens))
        state = self.decoder.begin(self._encode(inputs.source, Documents.of(inputs.tokens)))
        y = self.target(documents.gather(inputs.target), documents.tokens)
        readout, _ = self.decoder(y, state, recorder)
        if targets is None:
            return documents.scatter(self.head(readout, documents.tokens, self.table))
        if not documents.full:  # what is behind the ends never reaches the vocabulary
            valid = documents.valid
            readout, targets = readout[valid][None], documents.gather(targets)[valid][None]
        return self.head_loss(readout, Tokens.full(*targets.shape, device=targets.device), targets, scale), None

    def _encode(self, source: Int[Tensor, "B S"], documents: Documents) -> Encoded:
        return self.encoder(self.source(documents.gather(source), documents.tokens), documents)

    def align(self, inputs: Pair, tokens: Tokens | None = None) -> Float[Tensor, "B T S"]:
        """See `PairModel`. Behind the tokens stands what `encoder.rests` adds, so that S is at least that."""
        if isinstance(self.decoder, FixedVector):
            raise ConfigError("this model has no attention: its decoder is a FixedVector, which cannot look back")
        tokens = check_pair(inputs, tokens)
        check_sources(inputs.source, inputs.tokens)
        kept, width = _Kept(), inputs.source.shape[1]
        with torch.no_grad():
            self(inputs, tokens, recorder=kept)
        weights = Documents.of(tokens).scatter(kept.weights)  # of each row's own text, from its first token on
        first = Documents.of(inputs.tokens).place[:, :1] % width
        columns = first + torch.arange(weights.shape[2], device=first.device)
        placed = weights.new_zeros(*weights.shape[:2], max(width, int(columns.max()) + 1))
        placed.scatter_(2, columns[:, None].expand_as(weights), weights)
        return placed[..., :width] if self.encoder.rests is None else placed

    def start(
        self, source: Int[Tensor, "B S"], tokens: Tokens, prompts: Sequence[Sequence[int]], *, capacity: int
    ) -> "Seq2SeqDecoding":
        """A recurrent decoder has room for any number of tokens; the prompts must be equally long."""
        check_sources(source, tokens)
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ConfigError("a recurrent decoder reads prompts of one length; give each target as many tokens")
        with torch.inference_mode():
            state = self.decoder.begin(self._encode(source, Documents.of(tokens)))
        decoding = Seq2SeqDecoding(self, state, len(source))
        for ids in zip(*prompts, strict=True):
            decoding.advance(torch.tensor(ids))
        return decoding


@final
class _Kept(Recorder):
    """Keeps what it is shown."""

    weights: Tensor

    def alignment(self, weights: Float[Tensor, "B T S"]) -> None:
        self.weights = weights


@final
class Seq2SeqDecoding(Decoding):
    """Targets of a `Seq2Seq`: the state of its decoder, and how many tokens each row has."""

    def __init__(self, model: Seq2Seq, state: DecoderState, rows: int) -> None:
        self._model, self._state = model, state
        self._length = torch.zeros(rows, dtype=torch.long, device=state.encoded.memory.device)

    @torch.inference_mode()
    def advance(self, ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        device = self._length.device
        tokens = Tokens.full(len(ids), 1, start=self._length, device=device)
        y = self._model.target(ids.to(device)[:, None], tokens)
        self._length = self._length + 1
        readout, self._state = self._model.decoder(y, self._state)
        self.logits = self._model.head(readout, tokens, self._model.table)[:, 0]
        return self.logits

    def reorder(self, rows: Int[Tensor, " r"]) -> None:
        super().reorder(rows)
        self._state, self._length = self._state.take(rows), self._length[rows]

    def join(self, other: Decoding) -> None:
        assert isinstance(other, Seq2SeqDecoding)
        super().join(other)
        self._state, self._length = self._state.join(other._state), join_rows(self._length, other._length)
