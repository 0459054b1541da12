"""The Transformer of pairs: a stack reads the source, another writes the target and attends to what was read."""

from collections.abc import Iterable, Iterator, Sequence
from typing import final

import torch
from torch import nn

from qkv.config import Count, config
from qkv.context import Memory
from qkv.errors import ConfigError
from qkv.models.decoding import ROOM, CachedDecoding
from qkv.models.init import InitConfig, draw_seed
from qkv.models.pairs import Pair, PairModel, PairModelConfig, check_pair, check_sources
from qkv.models.stack import Blocks, Stack, depth, mask_ahead, sublayers
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.mixer import AttentionLayer
from qkv.nn.norms import NormConfig
from qkv.nn.quantised import Table
from qkv.nn.sublayer import Aux, SublayerConfig, merge
from qkv.recorder import AttentionWeights, Recorder
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Tokens


@final
@config
class EncoderDecoderConfig(PairModelConfig):
    """A Transformer of pairs as data.

    Source: Vaswani et al. 2017, section 3.

    Attributes:
        d_model: Width of both streams.
        target: Vectors of the target's tokens, and positions.
        source: Those of the source's. None: the same, weights included; source and target then have one tokenizer.
        encoder: The blocks that read; their attention sees all of the source.
        decoder: The blocks that write: causal attention and cross-attention.
        encoder_norm: After the last block (pre-norm stacks need it, post-norm ones do not).
        decoder_norm: Likewise.
        head: The target's vocabulary.
        init: How weights are drawn.
    """

    d_model: Count
    target: TokenEmbedderConfig = TokenEmbedderConfig()
    source: TokenEmbedderConfig | None = TokenEmbedderConfig()
    encoder: Blocks
    decoder: Blocks
    encoder_norm: NormConfig | None = None
    decoder_norm: NormConfig | None = None
    head: LMHeadConfig = LMHeadConfig()
    init: InitConfig = InitConfig()

    def __post_init__(self) -> None:
        if not any(part.reads_memory for part in sublayers(self.decoder)):
            raise ConfigError("decoder has no CrossAttention, so it cannot read the source; give its blocks one")
        if any(part.reads_memory for part in sublayers(self.encoder)):
            raise ConfigError("encoder has CrossAttention and there is nothing before it to read; use Attention")
        if (mask := mask_ahead(self.decoder)) is not None:
            raise ConfigError(
                f"the mask {mask.tag()} of the decoder's attention lets a token see what it is to predict; "
                "use Causal, alone or as one side of And"
            )

    def layers(self) -> Iterator[SublayerConfig]:
        """The sublayers' configs of both stacks from the input up, each pattern of blocks once."""
        yield from sublayers(self.encoder)
        yield from sublayers(self.decoder)

    def with_vocabularies(self, source: int, target: int, *, shared: bool) -> "EncoderDecoderConfig":
        if self.source is None and not shared:
            raise ConfigError(
                "model.source is null, so source and target share their vectors, and the data have two tokenizers; "
                "leave data.target_tokenizer out, or give model.source a TokenEmbedder"
            )
        reader = None if self.source is None else self.source.for_vocabulary(source, " of the source", "source")
        return self.replace(source=reader, target=self.target.for_vocabulary(target, " of the target", "target"))

    @property
    def vocabularies(self) -> tuple[int | None, int | None]:
        source = self.target if self.source is None else self.source
        return source.vocab_size, self.target.vocab_size

    @property
    def sentence(self) -> str:
        return f"a Transformer of pairs, {self.d_model:,} wide: an encoder reads, a decoder writes and attends to it"

    @property
    def depth(self) -> int:
        return depth(self.encoder) + depth(self.decoder)

    @property
    def longest(self) -> int | None:
        lengths = [each.max_length for each in (self.source, self.target) if each is not None]
        return min((n for n in lengths if n is not None), default=None)


@final
class EncoderDecoder(PairModel, config=EncoderDecoderConfig):
    """See `EncoderDecoderConfig`. Where the vectors are shared they are the decoder's, one parameter with one name."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        seed, width, init = draw_seed(), config.d_model, config.init
        self.source = None if config.source is None else config.source.build(width)
        self.encoder = Stack(width, config.encoder, config.encoder_norm)
        self.decoder = Transformer(
            TransformerConfig(
                d_model=width, embed=config.target, blocks=config.decoder, final_norm=config.decoder_norm, init=init
            )
        )
        self.head = config.head.build(width, config.target)
        if seed is not None:
            self.encoder.draw(init, seed, "encoder.")
            self.decoder.draw(init, seed, "decoder.")
            for name, part in {"source.": self.source, "head.": self.head}.items():
                if part is not None:
                    init.apply(part, [], 1, seed, name)

    @property
    def blocks(self) -> Iterable[nn.Module]:
        return (*self.encoder.blocks, *self.decoder.blocks)

    @property
    def checkpoint_blocks(self) -> bool:
        return self.decoder.checkpoint_blocks

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, value: bool) -> None:
        self.encoder.checkpoint_blocks = self.decoder.checkpoint_blocks = value

    def forward(
        self,
        inputs: Pair,
        tokens: Tokens | None = None,
        *,
        targets: Int[Tensor, "B T"] | None = None,
        scale: float | None = None,
        recorder: Recorder | None = None,
    ) -> Float[Tensor, "B T V"] | tuple[Tensor, Aux | None]:
        tokens = check_pair(inputs, tokens)
        memory, read = self.encode(inputs.source, inputs.tokens)
        x, written = self.decoder.encode(inputs.target, tokens, memory=memory, recorder=recorder)
        if targets is None:
            return self.head(x, tokens, self.table)
        aux = merge(read and read.under("encoder"), written and written.under("decoder"))
        return self.head_loss(x, tokens, targets, scale), aux

    def encode(self, source: Int[Tensor, "B S"], tokens: Tokens) -> tuple[Memory, Aux | None]:
        """What cross-attention reads of sources, and what the encoder's sublayers report."""
        embed = self.decoder.embed if self.source is None else self.source
        x, aux = self.encoder.run(embed(torch.where(tokens.valid, source, 0), tokens), tokens)
        return Memory(x, tokens), aux

    @property
    def table(self) -> Table | None:
        return self.decoder.table

    def align(self, inputs: Pair, tokens: Tokens | None = None) -> Float[Tensor, "B T S"]:
        """See `PairModel`: the mean over the heads of all cross-attention."""
        check_sources(inputs.source, inputs.tokens)
        parts = self.decoder.keepers()
        kept = AttentionWeights(
            {name for name, part in parts if isinstance(part, AttentionLayer) and part.reads_memory}
        )
        with torch.no_grad():
            self(inputs, tokens, recorder=kept)
        return torch.stack([weights.mean(1) for of_layer in kept.weights.values() for weights in of_layer]).mean(0)

    def start(
        self, source: Int[Tensor, "B S"], tokens: Tokens, prompts: Sequence[Sequence[int]], *, capacity: int
    ) -> CachedDecoding:
        """Keys and values of the source are computed once, in the cache."""
        check_sources(source, tokens)
        cache = self.decoder.make_cache(len(source), capacity, room=max(map(len, prompts)) + ROOM)
        with torch.inference_mode():
            memory, _ = self.encode(source, tokens)
        decoding = CachedDecoding(self.decoder.encode, self.readout, self.decoder, cache, memory)
        decoding.read(prompts)
        return decoding
