"""The documents of a batch, one per row: what recurrent layers and convolutions run over."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qkv.shapes import Bool, Int, Tensor
from qkv.tokens import Layout, Tokens


class Documents(NamedTuple):
    """Where the documents of a batch lie, however they were padded or packed; N documents of at most L tokens.

    Attributes:
        place: For each token its place among the B·T of the batch; behind the end of a document any place.
        lengths: Tokens of each document.
        row: The row of the batch in which each document lies; rising.
        shape: (B, T) of the batch.
        full: Whether it is known, without looking, that the documents are the rows and all of them are full.
    """

    place: Int[Tensor, "N L"]
    lengths: Int[Tensor, " N"]
    row: Int[Tensor, " N"]
    shape: tuple[int, int]
    full: bool = False

    @staticmethod
    def of(tokens: Tokens) -> "Documents":
        """The documents in the order of their rows, and within a row of their numbers; padding belongs to none."""
        batch, length = tokens.shape
        device = tokens.index.device
        if tokens.layout is Layout.FULL:
            place = torch.arange(batch * length, device=device).view(batch, length)
            rows = torch.arange(batch, device=device)
            return Documents(place, place.new_full((batch,), length), rows, tokens.shape, full=True)
        place = tokens.valid.flatten().nonzero()[:, 0]
        if not len(place):
            return Documents(place.view(0, 0), place, place, tokens.shape)
        document = place // length * (int(tokens.segment.max()) + 1) + tokens.segment.flatten()[place]
        if tokens.layout is Layout.GENERAL:  # elsewhere the tokens of a document lie in a run
            place = place[torch.argsort(document * int(tokens.index.max() + 1) + tokens.index.flatten()[place])]
            document = document.sort().values
        _, number, lengths = torch.unique_consecutive(document, return_inverse=True, return_counts=True)
        start = lengths.cumsum(0) - lengths
        within = torch.arange(len(place), device=device) - start[number]
        found = place.new_zeros(len(lengths), int(lengths.max()))
        found[number, within] = place
        return Documents(found, lengths, place[start] // length, tokens.shape)

    @property
    def valid(self) -> Bool[Tensor, "N L"]:
        """True where there is a token of the document."""
        return torch.arange(self.place.shape[1], device=self.place.device) < self.lengths[:, None]

    @property
    def tokens(self) -> Tokens:
        """The documents as a batch of its own, padded on the right."""
        if self.full:
            return Tokens.full(*self.shape, device=self.place.device)
        return Tokens.padded(self.lengths.tolist(), self.place.shape[1], device=self.place.device)

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, …) to (N, L, …), with zeros behind the ends, whatever lies in the padding of `x`."""
        if self.full:
            return x
        found = x.flatten(0, 1)[self.place]
        valid = self.valid.view(*self.place.shape, *(1,) * (x.dim() - 2))
        return torch.where(valid, found, torch.zeros((), dtype=x.dtype, device=x.device))

    def scatter(self, y: Tensor) -> Tensor:
        """(N, L, …) back to (B, T, …), with zeros in the padding."""
        if self.full:
            return y
        valid = self.valid
        flat = y.new_zeros(self.shape[0] * self.shape[1], *y.shape[2:])
        return flat.index_put((self.place[valid],), y[valid]).unflatten(0, self.shape)


@torch.library.custom_op("qkv::document_bounds", mutates_args=())
def document_bounds(documents: Tensor) -> Tensor:
    """(row, start, stop) of every document, from ids (B, T) in which 0 is padding and a document is one unbroken run.

    On the CPU, and always B·T of them, so that a compiled model sees one shape: behind the last one come zeros.
    """
    ids = documents.cpu()
    edge, valid = ids[:, 1:] != ids[:, :-1], ids > 0
    first = (F.pad(edge, (1, 0), value=True) & valid).nonzero()
    last = (F.pad(edge, (0, 1), value=True) & valid).nonzero()
    bounds = ids.new_zeros(ids.numel(), 3, dtype=torch.long)
    bounds[: len(first)] = torch.cat([first, last[:, 1:] + 1], dim=1)
    return bounds


@document_bounds.register_fake
def _(documents: Tensor) -> Tensor:
    return documents.new_empty(documents.numel(), 3, dtype=torch.long, device="cpu")
