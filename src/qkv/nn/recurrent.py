"""Recurrent layers: GRU and LSTM over documents, and as a sublayer of a stack."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from qkv.config import Config, Count, config
from qkv.documents import Documents
from qkv.nn.mixer import Kept, Stateful
from qkv.nn.sublayer import SublayerConfig
from qkv.shapes import Float, Int, Tensor

LayerState = tuple[Tensor, ...]
"""What one layer keeps in one direction: (h,) of a GRU, (h, c) of an LSTM; each (N, hidden)."""

State = tuple[LayerState, ...]
"""Of all layers, from the input up; of a layer with two directions the forward one first."""


@config
class CellConfig(Config, ABC):
    """Base of the cells: the equation of one step, with PyTorch's layout of the weights.

    The network is PyTorch's fused layers of this cell.
    """

    n_states: ClassVar[int]
    network: ClassVar[type[nn.GRU] | type[nn.LSTM]]

    @abstractmethod
    def step(self, gates: Float[Tensor, "N gates"], state: LayerState, weight: Tensor, bias: Tensor) -> LayerState:
        """The next state.

        Args:
            gates: What the input adds to the gates, W x + b.
            state: The last state.
            weight: Of the recurrence, (gates · hidden, hidden).
            bias: Of the recurrence.
        """


@final
@config
class GRUConfig(CellConfig):
    """Gated recurrent units: h' = (1 - z) n + z h; r, z = σ(W x + U h), n = tanh(W x + r (U h)).

    Source: Cho et al. 2014, section 2.3, with r behind the product with U, as in PyTorch. Rows of the weights: r, z, n.
    """

    n_states, network = 1, nn.GRU

    def step(self, gates: Float[Tensor, "N gates"], state: LayerState, weight: Tensor, bias: Tensor) -> LayerState:
        (h,) = state
        cut = 2 * h.shape[-1]
        recurrent = F.linear(h, weight, bias)
        r, z = (gates[:, :cut] + recurrent[:, :cut]).sigmoid().chunk(2, dim=-1)
        n = torch.addcmul(gates[:, cut:], r, recurrent[:, cut:]).tanh()
        return (torch.lerp(n, h, z.to(h.dtype)),) if n.dtype == h.dtype else ((1 - z) * n + z * h,)


@final
@config
class LSTMConfig(CellConfig):
    """Long short-term memory: c' = σ(f) c + σ(i) tanh(g); h' = σ(o) tanh(c').

    Source: Gers et al. 2000. Rows of the weights: i, f, g, o, as in PyTorch and Keras.
    """

    n_states, network = 2, nn.LSTM

    def step(self, gates: Float[Tensor, "N gates"], state: LayerState, weight: Tensor, bias: Tensor) -> LayerState:
        h, c = state
        i, f, g, o = (gates + F.linear(h, weight, bias)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


@final
class Recurrent(nn.Module):
    """Layers of one cell, by PyTorch's fused kernels over whole documents, or one step at a time.

    Args:
        cell: Which.
        d_in: Width of the input.
        d_hidden: Width of the state, in each direction.
        layers: How many, one on the other.
        bidirectional: Whether each layer also reads from the end; its output is forward and backward side by side.
        dropout: Probability that an element is dropped between layers in training.

    Attributes:
        d_out: Width of the output.
    """

    def __init__(
        self,
        cell: CellConfig,
        d_in: int,
        d_hidden: int,
        *,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.cell, self.d_hidden, self.layers, self.dropout = cell, d_hidden, layers, dropout
        self.directions = 2 if bidirectional else 1
        self.d_out = self.directions * d_hidden
        between = dropout if layers > 1 else 0.0
        self.net = cell.network(d_in, d_hidden, layers, batch_first=True, bidirectional=bidirectional, dropout=between)

    def zeros(self, n: int, like: Tensor) -> State:
        """The state before anything was read."""
        one = tuple(like.new_zeros(n, self.d_hidden) for _ in range(self.cell.n_states))
        return (one,) * (self.layers * self.directions)

    def forward(
        self, x: Float[Tensor, "N L d_in"], lengths: Int[Tensor, " N"] | None = None, state: State | None = None
    ) -> tuple[Float[Tensor, "N L d_out"], State]:
        """Read documents that begin at the left; None for `lengths`: all are as long as `x`.

        Returns:
            The outputs, 0 behind the ends; and the states after the last tokens (backward ones: after the first).
        """
        x = x.to(self.weights("ih", 0)[0].dtype)
        given: Any = None
        if state is not None:
            stacked: LayerState = tuple(torch.stack(part) for part in zip(*state, strict=True))
            given = stacked[0] if len(stacked) == 1 else stacked
        if lengths is None or not len(lengths):
            out, last = self.net(x, given)
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            packed, last = self.net(packed, given)
            out, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        states = (last,) if isinstance(last, Tensor) else last
        return out, tuple(zip(*(part.unbind(0) for part in states), strict=True))

    def weights(self, kind: str, layer: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the input (`ih`) or of the recurrence (`hh`)."""
        net = self.net
        return net.get_parameter(f"weight_{kind}_l{layer}"), net.get_parameter(f"bias_{kind}_l{layer}")

    def step(self, gates: Float[Tensor, "N gates"], state: State) -> State:
        """One token: the next states of all layers, from what the input adds to the gates of the lowest one."""
        assert self.directions == 1
        states: list[LayerState] = []
        for layer, before in enumerate(state):
            if layer:
                below = F.dropout(states[-1][0], self.dropout, self.training and self.dropout > 0)
                gates = F.linear(below, *self.weights("ih", layer))
            states.append(self.cell.step(gates, before, *self.weights("hh", layer)))
        return tuple(states)


@final
@config
class RecurrentConfig(SublayerConfig):
    """project(h), where h is the output of a recurrent network over the document so far.

    Attributes:
        cell: GRU or LSTM.
        d_hidden: Width of its state. None: that of the stream.
        layers: How many, one on the other.
    """

    name: ClassVar[str] = "recurrent"

    cell: CellConfig = GRUConfig()
    d_hidden: Count | None = None
    layers: Count = 1

    def notes(self, d_model: int) -> list[str]:
        return [f"{self.layers} × {self.cell.tag()}, {self.d_hidden or d_model:,} wide"]


@final
class RecurrentSublayer(Stateful, config=RecurrentConfig):
    """A recurrent network and a projection of its output to the stream."""

    def __init__(self, config: RecurrentConfig, d_model: int) -> None:
        super().__init__(config)
        self.net = Recurrent(config.cell, d_model, config.d_hidden or d_model, layers=config.layers)
        self.o_proj = nn.Linear(self.net.d_out, d_model, bias=False)

    def run(self, x: Float[Tensor, "N L D"], documents: Documents, state: Kept) -> tuple[Float[Tensor, "N L D"], Kept]:
        """See `Stateful`; carried on are the states of all layers, side by side."""
        n = self.net.cell.n_states
        layers = tuple(state[at : at + n] for at in range(0, len(state), n))
        out, after = self.net(x, None if documents.full else documents.lengths, layers)
        return self.o_proj(out), tuple(part for layer in after for part in layer)

    def fresh(self, n: int, like: Tensor) -> Kept:
        zeros = self.net.zeros(n, self.net.weights("ih", 0)[0])
        return tuple(part for layer in zeros for part in layer)
