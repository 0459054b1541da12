"""What is checked: a model of ours, or anybody's module."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import torch
from torch import nn

from qkv.caches import Cache
from qkv.errors import ConfigError
from qkv.masks import sees_ahead
from qkv.models.decoders import FixedVectorConfig
from qkv.models.pairs import Pair, PairModel
from qkv.models.seq2seq import Seq2SeqConfig
from qkv.models.transformer import Transformer
from qkv.shapes import Tensor
from qkv.tokens import Tokens

Side = Literal["left", "right"]
_SOURCE, _PADDING, _POISON = 7, 3, -7  # tokens of a source and of its padding, and an id that is none


class Subject(ABC):
    """Base of what can be checked. Outputs are (B, T, any), one vector for each token.

    Attributes:
        module: The module, in evaluation mode while a law looks at it.
        causal: Whether a token must not see what comes after it.
        can: What it can be asked for besides plain batches: "padded", "packed", "permuted", "steps", "pooled", "pooled
            together", "aligned".
        longest: Tokens of the longest input; None: any.
    """

    module: nn.Module
    causal: bool
    can: frozenset[str]
    longest: int | None = None

    @abstractmethod
    def draw(self, batch: int, length: int, seed: int) -> Tensor:
        """Random input: ids (B, T), or vectors (B, T, features)."""

    def poisoned(self, inputs: Tensor, valid: Tensor) -> Tensor:
        """The same with an id that is none, or NaN, where `valid` (B, T) is False."""
        poison = float("nan") if inputs.is_floating_point() else _POISON
        return inputs.masked_fill(~_over(valid, inputs), poison)

    @abstractmethod
    def run(self, inputs: Tensor) -> Tensor:
        """One full sequence per row."""

    @abstractmethod
    def padded(self, inputs: Tensor, lengths: Sequence[int], side: Side) -> Tensor:
        """Rows of different lengths, padded on a side."""

    @abstractmethod
    def packed(self, inputs: Tensor, lengths: Sequence[Sequence[int]]) -> Tensor:
        """Several documents in each row."""

    @abstractmethod
    def steps(self, inputs: Tensor, cuts: Sequence[int]) -> Tensor:
        """Read in pieces that end at `cuts`, with a cache; the outputs side by side."""

    def permuted(self, inputs: Tensor, order: Tensor) -> Tensor:
        """One sequence per row, whose tokens are stored in this order and stand where they stood."""
        raise NotImplementedError

    def pooled(self, inputs: Tensor, tokens: Tokens) -> Tensor:
        """The outputs (N, any) of a head that pools, one for each document."""
        raise NotImplementedError

    def aligned(self, inputs: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The weights (B, T, S) of padded rows over their sources, and whether each place of a source is a token."""
        raise NotImplementedError


@final
class ModelSubject(Subject):
    """A model of qkv; where its head pools, and so has no output for each token, the stream before it, and its pool.

    Raises:
        ConfigError: The model reads a memory, or takes what nobody can draw.
    """

    def __init__(self, model: Transformer) -> None:
        if model.reads_memory:
            raise ConfigError("the model has cross-attention; check it with a memory of yours, as a ModuleSubject")
        self.module = self.model = model
        self.causal = not any(sees_ahead(mask) for mask in model.masks)
        self.longest = model.config.longest
        length = min(2, self.longest or 2)
        with torch.no_grad():  # raises where the embedder cannot say what it takes
            outputs = self.pooled(self.draw(1, length, seed=0), Tokens.full(1, length))
            self._pools = outputs.dim() < 3 or outputs.shape[1] != length
            together = self._pools and len(self.pooled(self.draw(1, 2, seed=0), Tokens.packed([[1, 1]]))) == 2
        also = {"steps": self.causal, "pooled": self._pools, "pooled together": together}
        self.can = frozenset({"padded", "packed", "permuted"} | {name for name, there in also.items() if there})

    def draw(self, batch: int, length: int, seed: int) -> Tensor:
        x = self.model.embed.example(batch, length, torch.Generator().manual_seed(seed))
        return x.to(next(self.model.parameters()).dtype) if x.is_floating_point() else x

    def run(self, inputs: Tensor) -> Tensor:
        return self._outputs(inputs, self.model.embed.example_tokens(Tokens.full(*inputs.shape[:2])))

    def padded(self, inputs: Tensor, lengths: Sequence[int], side: Side) -> Tensor:
        return self._outputs(
            inputs, self.model.embed.example_tokens(Tokens.padded(lengths, inputs.shape[1], side=side))
        )

    def packed(self, inputs: Tensor, lengths: Sequence[Sequence[int]]) -> Tensor:
        return self._outputs(inputs, self.model.embed.example_tokens(Tokens.packed(lengths, inputs.shape[1])))

    def permuted(self, inputs: Tensor, order: Tensor) -> Tensor:
        tokens = self.model.embed.example_tokens(Tokens.full(*inputs.shape[:2]))
        return self._outputs(inputs[:, order], tokens.reordered(order))

    def pooled(self, inputs: Tensor, tokens: Tokens) -> Tensor:
        return self.model(inputs, self.model.embed.example_tokens(tokens))

    def steps(self, inputs: Tensor, cuts: Sequence[int]) -> Tensor:
        cache = self.model.make_cache(inputs.shape[0], inputs.shape[1])
        types, outputs = self.model.embed.example_tokens(Tokens.full(*inputs.shape[:2])).types, list[Tensor]()
        for a, b in zip([0, *cuts[:-1]], cuts, strict=True):
            tokens = Tokens.full(len(inputs), b - a)
            tokens = tokens if types is None else tokens.with_types(types[:, a:b])
            outputs.append(self._outputs(inputs[:, a:b], tokens, cache=cache))
        return torch.cat(outputs, 1)

    def _outputs(self, inputs: Tensor, tokens: Tokens, cache: Cache | None = None) -> Tensor:
        """For each token."""
        if self._pools:
            return self.model.encode(inputs, tokens, cache=cache)[0]
        return self.model(inputs, tokens, cache=cache)


@final
class PairSubject(Subject):
    """A model of pairs of qkv: the inputs are targets, and every one has the same source.

    Where targets are padded, so is the source, on the same side and with the same poison; where several are packed, so
    are as many sources.
    """

    def __init__(self, model: PairModel) -> None:
        n_source, self._vocab_size = (n or 1 for n in model.config.vocabularies)
        self.module = self.model = model
        self.causal, self.longest = True, model.config.longest
        self.can = frozenset({"padded", "packed", "steps"} | ({"aligned"} if _looks_at_tokens(model) else set()))
        n = _SOURCE if self.longest is None else min(_SOURCE, self.longest)
        self._source = _ids(n_source, 1, n, seed=100)

    def draw(self, batch: int, length: int, seed: int) -> Tensor:
        return _ids(self._vocab_size, batch, length, seed)

    def run(self, inputs: Tensor) -> Tensor:
        source = self._source.expand(len(inputs), -1)
        return self.model(Pair(source, Tokens.full(*source.shape), inputs))

    def padded(self, inputs: Tensor, lengths: Sequence[int], side: Side) -> Tensor:
        fill = _POISON if bool((inputs == _POISON).any()) else 0
        source, there = self._padded_sources(len(inputs), side, fill)
        return self.model(Pair(source, there, inputs), Tokens.padded(lengths, inputs.shape[1], side=side))

    def packed(self, inputs: Tensor, lengths: Sequence[Sequence[int]]) -> Tensor:
        n = self._source.shape[1]
        sources = self._source.repeat(len(inputs), max(map(len, lengths)))
        there = Tokens.packed([[n] * len(row) for row in lengths], sources.shape[1])
        return self.model(Pair(sources, there, inputs), Tokens.packed(lengths, inputs.shape[1]))

    def steps(self, inputs: Tensor, cuts: Sequence[int]) -> Tensor:
        """As a search does, token by token."""
        source, there = self._padded_sources(len(inputs), "right", 0)
        first, *others = inputs[:, : cuts[-1]].unbind(1)
        decoding = self.model.start(source, there, first[:, None].tolist(), capacity=cuts[-1])
        return torch.stack([decoding.logits, *(decoding.advance(ids) for ids in others)], dim=1)

    def aligned(self, inputs: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        n = self._source.shape[1]
        source = self._source.expand(len(inputs), -1)
        there = Tokens.padded([max(1, n - 2 * row) for row in range(len(inputs))], n)
        weights = self.model.align(Pair(source, there, inputs), Tokens.padded(lengths, inputs.shape[1]))
        return weights, there.valid

    def _padded_sources(self, batch: int, side: Side, fill: int) -> tuple[Tensor, Tokens]:
        n = self._source.shape[1]
        pad = (0, _PADDING) if side == "right" else (_PADDING, 0)
        source = nn.functional.pad(self._source.expand(batch, -1), pad, value=fill)
        return source, Tokens.padded([n] * batch, n + _PADDING, side=side)


def _looks_at_tokens(model: PairModel) -> bool:
    """Whether it has attention, over tokens alone."""
    config = model.config
    if not isinstance(config, Seq2SeqConfig):
        return True
    return not isinstance(config.decoder, FixedVectorConfig) and config.encoder.rests is None


@final
class ModuleSubject(Subject):
    """Anybody's module, and how it is called.

    Args:
        module: Maps inputs to outputs (B, T, any), or to something with `.logits`, or a tuple that begins with them.
        vocab_size: Of the ids that it takes; or else
        n_features: the width of the vectors that it takes.
        causal: Whether a token must not see what comes after it.
        padded: `padded(inputs, valid)`, where `valid` (B, T) is True at tokens: how it is told of padding.
        packed: `packed(inputs, lengths)`: how it is told of documents side by side; `lengths` as in `Tokens.packed`.
        permuted: `permuted(inputs, order)`: the outputs for `inputs[:, order]`, told that they stand where they stood.
        steps: `steps(inputs, cuts)`: the outputs of pieces that end at `cuts`, read with its cache, side by side.
        longest: Tokens of its longest input; None: any.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        vocab_size: int | None = None,
        n_features: int | None = None,
        causal: bool = True,
        padded: Callable[[Tensor, Tensor], Any] | None = None,
        packed: Callable[[Tensor, Sequence[Sequence[int]]], Any] | None = None,
        permuted: Callable[[Tensor, Tensor], Any] | None = None,
        steps: Callable[[Tensor, Sequence[int]], Any] | None = None,
        longest: int | None = None,
    ) -> None:
        if (vocab_size is None) == (n_features is None):
            raise ConfigError("say what the module takes: either vocab_size (ids) or n_features (vectors)")
        self.module, self.causal, self.longest = module, causal, longest
        self._vocab_size, self._n_features = vocab_size, n_features or 1
        self._ways: dict[str, Any] = {"padded": padded, "packed": packed, "permuted": permuted, "steps": steps}
        self.can = frozenset(name for name, way in self._ways.items() if way is not None)

    def draw(self, batch: int, length: int, seed: int) -> Tensor:
        if self._vocab_size is not None:
            return _ids(self._vocab_size, batch, length, seed)
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        return torch.randn(batch, length, self._n_features, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def poisoned(self, inputs: Tensor, valid: Tensor) -> Tensor:
        """With other ids, or huge vectors: a module need not be ready for ids that are none."""
        other = self.draw(*inputs.shape[:2], seed=99)
        return torch.where(_over(valid, inputs), inputs, other if inputs.dim() == 2 else other * 100)

    def run(self, inputs: Tensor) -> Tensor:
        return _outputs(self.module(inputs))

    def padded(self, inputs: Tensor, lengths: Sequence[int], side: Side) -> Tensor:
        return _outputs(self._ways["padded"](inputs, Tokens.padded(lengths, inputs.shape[1], side=side).valid))

    def packed(self, inputs: Tensor, lengths: Sequence[Sequence[int]]) -> Tensor:
        return _outputs(self._ways["packed"](inputs, lengths))

    def permuted(self, inputs: Tensor, order: Tensor) -> Tensor:
        return _outputs(self._ways["permuted"](inputs, order))

    def steps(self, inputs: Tensor, cuts: Sequence[int]) -> Tensor:
        return _outputs(self._ways["steps"](inputs, cuts))


def _ids(vocab_size: int, batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def _over(valid: Tensor, inputs: Tensor) -> Tensor:
    """(B, T) with an axis of 1 for each further one of the inputs."""
    return valid.view(*valid.shape, *(1,) * (inputs.dim() - 2))


def _outputs(found: Any) -> Tensor:
    """The outputs in what a module returned."""
    if isinstance(found, tuple | list):
        found = found[0]
    found = getattr(found, "logits", getattr(found, "last_hidden_state", found))
    if not isinstance(found, Tensor) or found.dim() != 3:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"the module returned {what}; the laws need a vector for each token, (B, T, any)")
    return found
