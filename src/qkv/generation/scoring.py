"""How likely texts are under a model."""

from collections.abc import Sequence

import torch

from qkv.errors import ConfigError
from qkv.generation.generate import check_prompts
from qkv.generation.sampling import check_finite, log_probabilities
from qkv.models.model import evaluating
from qkv.models.transformer import Transformer
from qkv.tokens import pad_ids

_CHUNK = 256
"""Tokens whose logits are held at once: at 128,000 tokens of vocabulary they are 125 MiB in float32."""


@torch.inference_mode()
def score(
    model: Transformer, texts: Sequence[Sequence[int]], *, context: int | None = None, batch_size: int = 8
) -> list[list[float]]:
    """The log-probability of each token of each text after the first, given those before it, in nats.

    It is what the model alone says: no temperature or filter of a sampling has a part in it.

    Args:
        model: A language model with causal masks. It is in evaluation mode while this runs.
        texts: Token ids, at least one each; the lengths may differ, and the texts have no influence on each other.
        context: Tokens of the longest text; None: what the model's config says, or no limit.
        batch_size: Texts that are read at once.

    Raises:
        ConfigError: The model has no vocabulary or sees ahead; a text is empty, too long, or holds an unknown id.
        QkvError: The logits are not finite.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    check_prompts(model, texts, context, more=0, what="text")
    if (mask := model.config.mask_ahead) is not None:
        raise ConfigError(f"the mask {mask.tag()} lets a token see what it is to predict; score with a causal model")
    device, found = next(model.parameters()).device, list[list[float]]()
    with evaluating(model):
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            ids, tokens = pad_ids(some, device)
            x, _ = model.encode(ids, tokens)
            scored = tokens.valid[:, 1:]  # those that have one before them
            before, after = x[:, :-1][scored], ids[:, 1:][scored]  # (N, D), (N,)
            parts = [_each(model, *part) for part in zip(before.split(_CHUNK), after.split(_CHUNK), strict=True)]
            flat = iter([number for part in parts for number in part])
            found += [[next(flat) for _ in text[1:]] for text in some]
    return found


def _each(model: Transformer, x: torch.Tensor, ids: torch.Tensor) -> list[float]:
    logits = model.readout(x[None])[0]
    check_finite(logits)
    return log_probabilities(logits).gather(1, ids[:, None])[:, 0].tolist()
