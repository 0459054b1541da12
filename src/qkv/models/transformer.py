"""The Transformer: an embedder, a stack of blocks, a norm and a head."""

from collections.abc import Iterator, Sequence
from typing import final

import torch

from qkv.caches import Cache
from qkv.config import Count, config
from qkv.context import Memory
from qkv.errors import ConfigError
from qkv.masks import Mask
from qkv.models.decoding import ROOM, CachedDecoding
from qkv.models.init import InitConfig, draw_seed
from qkv.models.model import Model, ModelConfig
from qkv.models.stack import Blocks, Stack, depth, mask_ahead, sublayers
from qkv.nn.embedders import Embedder, EmbedderConfig
from qkv.nn.heads import Head, HeadConfig
from qkv.nn.norms import NormConfig
from qkv.nn.quantised import Table
from qkv.nn.sublayer import Aux, SublayerConfig
from qkv.recorder import Recorder
from qkv.shapes import Float, Tensor
from qkv.tokens import Layout, Tokens, placed


@final
@config
class TransformerConfig(ModelConfig):
    """A whole model as data.

    Attributes:
        d_model: Width of the stream.
        embed: What turns input into the stream.
        blocks: The stack, from the input up.
        final_norm: Norm after the last block (pre-norm stacks need it, post-norm ones do not).
        head: What the model puts out; None: the stream itself.
        init: How weights are drawn.
        context: Tokens of the longest document it is meant for; None: not known.
    """

    d_model: Count
    embed: EmbedderConfig
    blocks: Blocks
    final_norm: NormConfig | None = None
    head: HeadConfig | None = None
    init: InitConfig = InitConfig()
    context: Count | None = None

    def layers(self) -> Iterator[SublayerConfig]:
        """The sublayers' configs from the input up, each pattern of blocks once."""
        return sublayers(self.blocks)

    @property
    def depth(self) -> int:
        return depth(self.blocks)

    @property
    def single_stack(self) -> "TransformerConfig":
        return self

    @property
    def longest(self) -> int | None:
        return self.embed.max_length

    @property
    def limit(self) -> int | None:
        """The smaller of the context and the table of positions; None: neither is known."""
        return min((n for n in (self.context, self.longest) if n is not None), default=None)

    @property
    def mask_ahead(self) -> Mask | None:
        """The first mask that lets a token see one after it: such a model learns to look up what it is to predict."""
        return mask_ahead(self.blocks)

    def closed(self) -> "TransformerConfig":
        return self.replace(embed=self.embed.closed())

    def build(self) -> "Transformer":
        return Transformer(self)


@final
class Transformer(Stack, Model):
    """An embedder, a stack of blocks, a head.

    It *is* a stack, so that block 3 is `blocks.3` in every checkpoint.

    Attributes:
        config: What it was built from.
        embed: What turns input into the stream.
        head: What it puts out; None: the stream itself.
    """

    config: TransformerConfig
    embed: Embedder
    head: Head | None

    def __init__(self, config: TransformerConfig) -> None:
        seed = draw_seed()
        embed = config.embed.build(config.d_model)
        super().__init__(config.d_model, config.blocks, config.final_norm, embed=embed)
        self.config = config
        self.head = config.head.build(config.d_model, config.embed) if config.head else None
        if seed is not None:
            self.draw(config.init, seed)

    def reset_parameters(self) -> None:
        """Draw all weights anew, as `config.init` says."""
        seed = draw_seed()
        assert seed is not None
        self.draw(self.config.init, seed)

    def forward(
        self,
        inputs: Tensor,
        tokens: Tokens | None = None,
        *,
        targets: Tensor | None = None,
        scale: float | None = None,
        stream: bool = False,
        cache: Cache | None = None,
        recorder: Recorder | None = None,
        memory: Memory | Float[Tensor, "B S M"] | None = None,
    ) -> Float[Tensor, "..."] | tuple[Tensor, Aux | None]:
        """The outputs of the head for every token: logits (B, T, V) for a language model.

        Args:
            inputs: Token ids (B, T), or what else the embedder takes.
            tokens: Where they stand; None: one full sequence per row, after what the cache holds.
            targets: Given: what `loss` gives, instead of outputs.
            scale: As in `loss`.
            stream: What `encode` gives, instead of outputs.
            cache: From `make_cache`; the new tokens are added to it.
            recorder: Handed queries, keys and outputs of every attention.
            memory: What cross-attention reads; vectors alone are one full sequence per row.

        Raises:
            ConfigError: The input is longer than the position table or the cache.
        """
        tokens = _place(inputs, tokens, cache)
        self._check_length(tokens, cache)
        if tokens.layout is not Layout.FULL:  # whatever the padding holds: NaN, or an id that is none
            inputs = torch.where(tokens.valid.view(*tokens.shape, *(1,) * (inputs.dim() - 2)), inputs, 0)
        x, aux = self.run(self.embed(inputs, tokens), tokens, cache=cache, recorder=recorder, memory=memory)
        if targets is not None:
            return self.head_loss(x, tokens, targets, scale), aux
        return (x, aux) if stream else self.readout(x, tokens)

    def encode(
        self,
        inputs: Tensor,
        tokens: Tokens | None = None,
        *,
        cache: Cache | None = None,
        recorder: Recorder | None = None,
        memory: Memory | Float[Tensor, "B S M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        """The stream after the final norm, and what the sublayers report. Arguments as in `forward`."""
        return self(inputs, tokens, stream=True, cache=cache, recorder=recorder, memory=memory)

    @property
    def table(self) -> Table | None:
        return self.embed.table

    def start(
        self, prompts: Sequence[Sequence[int]], *, capacity: int, recorder: Recorder | None = None
    ) -> CachedDecoding:
        """Read prompts, one for each row, and be ready to write on.

        Args:
            prompts: Token ids, at least one each; the lengths may differ.
            capacity: Tokens of the longest text that will be read.
            recorder: Handed queries, keys and outputs of every attention, at each step.

        Raises:
            ConfigError: The model cannot work on texts of that length.
        """
        cache = self.make_cache(len(prompts), capacity, room=max(map(len, prompts)) + ROOM)
        decoding = CachedDecoding(self.encode, self.readout, self, cache, recorder=recorder)
        decoding.read(prompts)
        return decoding

    def make_cache(self, batch: int, capacity: int, *, rollback: int = 0, room: int | None = None) -> Cache:
        longest = self.config.embed.max_length
        if longest is not None and capacity > longest:
            raise ConfigError(
                f"a cache for {capacity} tokens is longer than the position table of {longest}; make it smaller"
            )
        return super().make_cache(batch, capacity, rollback=rollback, room=room)

    def _check_length(self, tokens: Tokens, cache: Cache | None) -> None:
        longest = self.config.embed.max_length
        n = tokens.shape[1] + (0 if cache is None else cache.bound)
        if longest is None or n <= longest:
            return
        if tokens.layout is Layout.RAGGED:  # documents may be shorter than the row
            n = int(tokens.index.max()) + 1
        if n > longest:
            raise ConfigError(f"the input has {n} tokens and the position table {longest}; give it at most {longest}")


def _place(inputs: Tensor, tokens: Tokens | None, cache: Cache | None) -> Tokens:
    """Where the inputs stand: after what the cache holds, if there is one."""
    there = placed(inputs, tokens)
    if cache is None or cache.bound == 0:
        return there
    if tokens is None:
        return Tokens.full(*there.shape, start=cache.bound if cache.even else cache.length, device=inputs.device)
    return there.shifted(cache.length)
