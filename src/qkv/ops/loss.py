# pyright: reportUnknownMemberType=false
"""The head and its cross-entropy as one function, so that the logits of all tokens never exist at once."""

from typing import Any

import torch

from qkv.shapes import Float, Int, Tensor

IGNORE = -100
"""The target of a token that has none: padding, or the last token of a document."""

_CHUNK_BYTES = 128 * 2**20
"""Most logits held at once. Larger chunks mean larger products and fewer sums into the weight's gradient."""

_CACHE_BYTES = 2 * 2**20
"""The softmax goes through a chunk in rows of so many bytes in float32, so that its steps find them in the cache."""


def linear_cross_entropy(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """`scale` times the sum over tokens of -log softmax(x Wᵀ)[target], in nats; targets of -100 count nothing.

    With a `bias` b the logits are x Wᵀ + b, and with a `softcap` c they are bounded to c · tanh(logits / c). With a
    `smoothing` ε the loss of a token is 1 - ε times that, plus ε times the mean of -log softmax over the vocabulary.

    The gradients are computed together with the loss, chunk by chunk over the tokens: memory is one chunk of logits
    instead of N x V. The softmax runs in at least float32. Pass the normaliser as `scale` (1 / number of tokens) rather
    than dividing the result: the gradients then need no second pass.

    Differs from `torch.nn.functional.cross_entropy` only in memory, and in having no second derivative.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, bias, scale, softcap, smoothing)  # type: ignore[no-any-return]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        smoothing: float,
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        vocab = weight.shape[0]
        size = _chunk_size(len(x), max(1, _CHUNK_BYTES // (vocab * x.element_size())))
        logits = x.new_empty(size, vocab)  # one buffer for all chunks: fresh memory costs a fault per page
        total = torch.zeros((), dtype=torch.float64 if x.device.type == "cpu" else torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = (torch.empty_like if len(x) else torch.zeros_like)(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            chunk = torch.mm(x[rows], weight.T, out=logits[: len(x) - start])
            if bias is not None:
                chunk += bias
            total += _loss_and_gradient(chunk, targets[rows], scale, softcap, smoothing)
            if grad_x is not None:
                torch.mm(chunk, weight, out=grad_x[rows])
            if grad_weight is not None:
                grad_weight.addmm_(chunk.T, x[rows], beta=0 if start == 0 else 1)  # 0: what is there is not read
            if grad_bias is not None:
                grad_bias += chunk.sum(0)
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return (total * scale).to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grads: tuple[Tensor | None, ...] = ctx.saved_tensors
        if grad.device.type != "cpu" or grad.item() != 1.0:  # reading the number would stop a GPU
            grads = tuple(None if g is None else g * grad.to(g.dtype) for g in grads)
        grad_x, grad_weight, grad_bias = grads
        return grad_x, grad_weight, None, grad_bias, None, None, None


def _chunk_size(n: int, most: int) -> int:
    """Tokens in a chunk: equal parts, as each product reads the whole weight, however few tokens it is for."""
    return max(1, -(-n // max(1, -(-n // most))))


@torch.library.custom_op("qkv::loss_and_gradient", mutates_args=("logits",))
def _loss_and_gradient(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, smoothing: float
) -> Tensor:
    """The summed loss of some tokens; their `logits` (n, V) are overwritten with the gradient of `scale` times it.

    A custom op, so that a compiled model sees one node: a compiler would write out the rows, and copy what is in place.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, _CACHE_BYTES // (logits.shape[1] * wide.itemsize))
    total = torch.zeros((), dtype=wide, device=logits.device)
    for start in range(0, len(logits), rows):
        part, target = logits[start : start + rows], targets[start : start + rows]
        counted = target != IGNORE
        target = target.where(counted, 0)[:, None]
        share = counted.to(wide)[:, None] * scale  # of each token in the gradient
        numbers = part.to(wide)  # `part` itself, unless it is narrow: every step is in place
        slope = None
        if softcap is not None:
            bounded = numbers.div_(softcap).tanh_()
            slope = 1 - bounded.square()
            bounded *= softcap
        numbers -= numbers.amax(-1, keepdim=True)
        at_target, mean = numbers.gather(1, target), numbers.mean(-1, keepdim=True) if smoothing else 0.0
        sums = numbers.exp_().sum(-1, keepdim=True)
        loss = sums.log() - (1 - smoothing) * at_target - smoothing * mean
        total += (loss[:, 0] * counted).sum()
        numbers *= share / sums
        numbers.scatter_add_(1, target, share * (smoothing - 1))
        if smoothing:
            numbers -= share * (smoothing / logits.shape[1])
        if slope is not None:
            numbers *= slope
        if numbers is not part:
            part.copy_(numbers)
    return total


@_loss_and_gradient.register_fake
def _(logits: Tensor, targets: Tensor, scale: float, softcap: float | None, smoothing: float) -> Tensor:
    return logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))
