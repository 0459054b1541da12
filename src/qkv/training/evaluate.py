"""Loss on held-out data."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from qkv.api import load_language_model
from qkv.data import Batch, Batches, ConversationsConfig, FilesConfig, PairBatch, PairBatches, Split
from qkv.errors import ConfigError
from qkv.models.pairs import Pair, PairModel
from qkv.models.transformer import Transformer
from qkv.nn.sublayer import Aux
from qkv.shapes import Tensor
from qkv.tokens import Tokens
from qkv.training.precision import products_in


def tokens_of(batch: Batch | PairBatch, device: torch.device) -> Tokens:
    """Where the tokens of a batch stand; FULL where no row has a boundary or padding, which has faster kernels."""
    rows, width = batch.inputs.shape[:2]
    if all(lengths == (width,) for lengths in batch.lengths):
        return Tokens.full(rows, width, device=device)
    return Tokens.packed(batch.lengths, width, device=device)


def loss_of(
    model: Transformer | PairModel, batch: Batch | PairBatch, device: torch.device, scale: float | None
) -> tuple[Tensor, Aux | None]:
    """`model.loss` of a batch."""
    tokens, targets, inputs = tokens_of(batch, device), batch.targets.to(device), batch.inputs.to(device)
    if isinstance(batch, PairBatch):
        assert isinstance(model, PairModel)
        there = Tokens.padded(batch.source_lengths, batch.source.shape[1], device=device)
        return model.loss(Pair(batch.source.to(device), there, inputs), targets, tokens, scale=scale)
    assert isinstance(model, Transformer)
    return model.loss(inputs, targets, tokens, scale=scale)


def count_of(model: Transformer | PairModel, batch: Batch | PairBatch) -> int:
    """How many tokens of a batch have a target."""
    assert model.head is not None
    cpu = torch.device("cpu")
    return model.head.count(batch.targets, tokens_of(batch, cpu).valid)


class Evaluation(NamedTuple):
    """What was measured: the sum of the losses (nats, or squared errors) and over how many tokens."""

    total: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean loss per token."""
        return self.total / max(1, self.tokens)


def evaluate(
    model: Transformer | PairModel, batches: Batches | PairBatches, *, precision: str, limit: int | None = None
) -> Evaluation:
    """The loss over the batches of a split, the first `limit` of them, or all."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad(), products_in(precision, device):
        for i in range(len(batches) if limit is None else min(limit, len(batches))):
            batch = batches.batch(0, i)
            loss, _ = loss_of(model, batch, device, 1.0)
            total += loss.item()
            count += count_of(model, batch)
    model.train(training)
    return Evaluation(total, count)


def evaluate_run(run: Path, data: FilesConfig | ConversationsConfig, *, batch_size: int = 8) -> dict[str, float]:
    """Loss (nats per token), perplexity and bits per byte of a model on texts, or on what the assistant says.

    Args:
        run: A run folder, or a Hugging Face folder with a tokenizer.
        data: Texts, all of whose tokens count; or conversations, of which the assistant's turns do.
        batch_size: Rows computed at once.

    Raises:
        FileError: The folder or the data cannot be read.
        ConfigError: The model has no tokenizer, or no chat template for conversations.
    """
    loaded = load_language_model(run)
    if loaded.tokenizer is None:
        raise ConfigError(f"{run} has no tokenizer, so it cannot read text; evaluate it from Python with model.loss")
    if isinstance(data, ConversationsConfig):
        split = Split.from_conversations(loaded.tokenizer, data.documents())
    else:
        split = Split.from_text(loaded.tokenizer, data.documents())
    context = loaded.config.context or loaded.config.embed.max_length or 1024
    batches = Batches(split, context=context, batch_size=batch_size, seed=0, shuffle=False)
    result = evaluate(loaded.model, batches, precision="float32")
    assert split.n_bytes is not None
    return {
        "loss": result.loss,
        "perplexity": math.exp(min(result.loss, 700.0)),
        "bits_per_byte": result.total / math.log(2) / split.n_bytes,
        "tokens": result.tokens,
        "bytes": split.n_bytes,
    }
