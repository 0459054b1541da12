"""Scores of the recurrent translators, as functions; attention with them is `normalised(scores, …) @ values`."""

import torch

from qkv.shapes import Bool, Float, Tensor


def additive_scores(
    queries: Float[Tensor, "B T A"], keys: Float[Tensor, "B S A"], v: Float[Tensor, " A"]
) -> Float[Tensor, "B T S"]:
    """v · tanh(query + key), for queries W s and keys U h that are projected already: the keys once per sentence.

    Source: Bahdanau et al. 2015, appendix A.1.2, equation for a(s, h). Memory is B·T·S·A: in a loop over the decoder's
    steps T is 1.
    """
    return torch.tanh(queries[:, :, None] + keys[:, None]) @ v


def dot_scores(queries: Float[Tensor, "B T D"], keys: Float[Tensor, "B S D"]) -> Float[Tensor, "B T S"]:
    """query · key, not scaled (Luong et al. 2015, section 3.1, "dot")."""
    return queries @ keys.mT


def general_scores(
    queries: Float[Tensor, "B T D"], keys: Float[Tensor, "B S M"], weight: Float[Tensor, "D M"]
) -> Float[Tensor, "B T S"]:
    """query · W key (Luong et al. 2015, section 3.1, "general"); W goes to the queries, of which there are fewer."""
    return (queries @ weight) @ keys.mT


def normalised(scores: Float[Tensor, "B T S"], valid: Bool[Tensor, "B S"] | None = None) -> Float[Tensor, "B T S"]:
    """The weights: softmax over the keys that are `valid`; 0 everywhere where there is nothing but padding."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if valid is None:
        return wide.softmax(-1).to(scores.dtype)
    allowed = valid[:, None]
    weights = wide.masked_fill(~allowed, torch.finfo(wide.dtype).min).softmax(-1)
    return torch.where(allowed, weights, 0.0).to(scores.dtype)
