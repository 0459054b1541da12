# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A GRU that looks back before each step, over all tokens of a text: the loop of Bahdanau's decoder.

Step by step, autograd adds to the gradient of every weight, of the keys and of the memory after each token. Here only
what the next step waits for is in the loops, forward and backward; each gradient is one product over all tokens behind
them. The hyperbolic tangents of the scores, by far the most numbers, are computed again in the backward pass instead
of kept: N·S·A of memory instead of T·N·S·A, for the time that reading them would take. A custom op, so that a compiled
model sees one node instead of every step.
"""

from typing import NamedTuple

import torch

from qkv.ops.operator import Tensors, operator
from qkv.ops.scores import normalised
from qkv.shapes import Bool, Float, Tensor

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class AttentiveGRU(NamedTuple):
    """What the loop reads; all numbers are of one type, float32 or float64.

    Attributes:
        inputs: What the tokens add to the gates r, z, n, side by side.
        start: The state before the first token.
        keys: U h of the scores v · tanh(W s + U h).
        memory: What is looked at, h.
        query_weight: W of the scores.
        v: Of the scores.
        to_gates: What a context is multiplied with to add to the gates.
        weight: Of the recurrence.
        bias: Of the recurrence.
        valid: False at padding; None: there is none.
    """

    inputs: Float[Tensor, "T N gates"]
    start: Float[Tensor, "N H"]
    keys: Float[Tensor, "N S A"]
    memory: Float[Tensor, "N S M"]
    query_weight: Float[Tensor, "A H"]
    v: Float[Tensor, " A"]
    to_gates: Float[Tensor, "M gates"]
    weight: Float[Tensor, "gates H"]
    bias: Float[Tensor, " gates"]
    valid: Bool[Tensor, "N S"] | None = None


class Looked(NamedTuple):
    """What comes of it.

    Attributes:
        states: After each token; the first is `start`.
        contexts: What each token read of the memory.
        weights: Over the memory; each row sums to 1.
    """

    states: Float[Tensor, "T+1 N H"]
    contexts: Float[Tensor, "T N M"]
    weights: Float[Tensor, "T N S"]


def attentive_gru(p: AttentiveGRU) -> Looked:
    """c = Σ α h with α from the last state; s' = GRU(s, [y; c]), token by token.

    Source: Bahdanau et al. 2015, sections A.1.2 and A.2.2, with the cell of `qkv.nn.recurrent.GRUConfig`.
    """
    *numbers, valid = p
    numbers.append(p.start.new_empty(0, dtype=torch.bool) if valid is None else valid)
    return Looked(*_operator(numbers, [])[:3])


def _problem(tensors: Tensors) -> AttentiveGRU:
    *numbers, valid = tensors
    return AttentiveGRU(*numbers, valid=valid if valid.numel() else None)  # pyright: ignore


def _room(tensors: Tensors) -> Tensors:
    """For states, contexts, weights; and for the queries, the recurrent part of the gates, and r, z, n."""
    p = _problem(tensors)
    (n_tokens, n, width), d_hidden = p.inputs.shape, p.start.shape[-1]
    widths = p.memory.shape[-1], p.keys.shape[1], p.keys.shape[-1], width, width
    return [p.start.new_empty(n_tokens + 1, n, d_hidden), *(p.start.new_empty(n_tokens, n, w) for w in widths)]


def _forward(tensors: Tensors, _: list[float]) -> Tensors:
    p = _problem(tensors)
    states, contexts, looks, queries, recurrent, gates = results = _room(tensors)
    states[0] = p.start
    tanh, cut = torch.empty_like(p.keys), 2 * p.start.shape[-1]
    for t, x in enumerate(p.inputs.unbind(0)):
        h, (r, z, n) = states[t], gates[t].chunk(3, dim=-1)
        torch.mm(h, p.query_weight.T, out=queries[t])
        torch.addmm(p.bias, h, p.weight.T, out=recurrent[t])
        scores = torch.add(queries[t, :, None], p.keys, out=tanh).tanh_() @ p.v
        looks[t] = normalised(scores[:, None], p.valid)[:, 0]
        torch.bmm(looks[t, :, None], p.memory, out=contexts[t, :, None])
        torch.addmm(x, contexts[t], p.to_gates, out=gates[t])
        gates[t, :, :cut].add_(recurrent[t, :, :cut]).sigmoid_()
        n.addcmul_(r, recurrent[t, :, cut:]).tanh_()
        torch.lerp(n, h, z, out=states[t + 1])
    return results


def _backward(tensors: Tensors, _: list[float], results: Tensors, grads: Tensors) -> Tensors:
    """With u = tanh(query + key) and the gradient e of a score, those of query and key are sums of e · v · (1 - u²).

    The loop adds up e · u² and e, and the rest is done once.
    """
    p = _problem(tensors)
    states, contexts, looks, queries, recurrent, gates = results
    grad_states, grad_contexts, grad_looks = grads[0], grads[1].clone(memory_format=torch.contiguous_format), grads[2]
    grad_inputs, grad_recurrent, grad_queries = (torch.empty_like(x) for x in (gates, recurrent, queries))
    grad_keys, grad_v, tanh = torch.zeros_like(p.keys), torch.zeros_like(p.v), torch.empty_like(p.keys)
    score_sums = torch.zeros_like(p.keys[..., 0])
    grad_h, cut = grad_states[-1].clone(), 2 * p.start.shape[-1]
    for t in range(len(gates) - 1, -1, -1):
        # The cell.
        h, (r, z, n) = states[t], gates[t].chunk(3, dim=-1)
        grad_r, grad_z, grad_n = grad_inputs[t].chunk(3, dim=-1)
        kept = grad_h * z
        _tanh_backward(grad_h - kept, n, grad_input=grad_n)
        _sigmoid_backward(grad_h * (h - n), z, grad_input=grad_z)
        _sigmoid_backward(grad_n * recurrent[t, :, cut:], r, grad_input=grad_r)
        grad_recurrent[t] = grad_inputs[t]
        grad_recurrent[t, :, cut:] *= r
        # The context, its weights and their scores.
        grad_context = grad_contexts[t].addmm_(grad_inputs[t], p.to_gates.T)
        grad_look = torch.bmm(grad_context[:, None], p.memory.mT)[:, 0].add_(grad_looks[t])
        grad_score = looks[t] * (grad_look - (looks[t] * grad_look).sum(-1, keepdim=True))
        torch.add(queries[t, :, None], p.keys, out=tanh).tanh_()
        grad_v.addmv_(tanh.flatten(0, 1).T, grad_score.flatten())
        tanh.square_()
        grad_keys.addcmul_(tanh, grad_score[..., None])
        score_sums += grad_score
        seen = torch.bmm(grad_score[:, None], tanh)[:, 0]
        torch.mul(grad_score.sum(-1, keepdim=True) - seen, p.v, out=grad_queries[t])
        # The state before.
        grad_h = kept.add_(grad_states[t]).addmm_(grad_recurrent[t], p.weight)
        grad_h.addmm_(grad_queries[t], p.query_weight)
    before = states[:-1].flatten(0, 1)
    return [
        grad_inputs,
        grad_h,
        torch.sub(score_sums[..., None], grad_keys, out=grad_keys).mul_(p.v),
        torch.bmm(looks.permute(1, 2, 0), grad_contexts.transpose(0, 1)),
        grad_queries.flatten(0, 1).T @ before,  # of the query's weight
        grad_v,
        contexts.flatten(0, 1).T @ grad_inputs.flatten(0, 1),  # of the way to the gates
        grad_recurrent.flatten(0, 1).T @ before,
        grad_recurrent.sum((0, 1)),
    ]


_operator = operator(
    "attentive_gru",
    _forward,
    _backward,
    outputs=_room,
    gradients=lambda tensors: [x.new_empty(x.shape) for x in tensors[:-1]],
)
