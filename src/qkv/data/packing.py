"""Which items share a batch: as many in each, and nearly as many tokens."""

from typing import Final

import numpy as np

WINDOW: Final = 1024
"""Items among which the tokens are evened out: so few that batches stay random, so many that it works."""


def even_batches(lengths: np.ndarray, batch_size: int, random: np.random.Generator) -> list[np.ndarray]:
    """The numbers of the items of each batch, so that each item is in one of them.

    The items come in a random order. In each window of about `WINDOW` of them the longest go to one batch each, then
    the next longest, the longest of them to the batch that has fewest tokens, and so on. So batches have up to
    `batch_size` items, those of a window equally many or one less, and of two batches of a window one has at most as
    many tokens more as the longest item has.

    Args:
        lengths: Tokens of each item.
        batch_size: Items of a batch.
        random: Chooses the order.
    """
    order = random.permutation(len(lengths))
    window = batch_size * max(1, WINDOW // batch_size)
    parts = [_evened(order[at : at + window], lengths, batch_size) for at in range(0, len(order), window)]
    batches = [batch for part in parts for batch in part]
    return [batches[i] for i in random.permutation(len(batches))]


def _evened(items: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Those of one window."""
    n = -(-len(items) // batch_size)
    falling = items[np.argsort(-lengths[items], kind="stable")]
    tokens, chosen = np.zeros(n, dtype=np.int64), [[] for _ in range(n)]
    for at in range(0, len(falling), n):
        batches = np.argsort(tokens, kind="stable")
        for batch, item in zip(batches.tolist(), falling[at : at + n].tolist(), strict=False):
            chosen[batch].append(item)
            tokens[batch] += lengths[item]
    return [np.array(batch) for batch in chosen]
