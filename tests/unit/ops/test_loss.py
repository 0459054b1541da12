"""The head's loss in chunks: torch's cross-entropy, with less memory."""

import functools

import pytest
import torch
import torch.nn.functional as F

import qkv.ops.loss as module
from qkv.ops.loss import linear_cross_entropy
from tolerances import FLOAT64


def plain(x, weight, targets, softcap=None):
    logits = x @ weight.T if softcap is None else torch.tanh(x @ weight.T / softcap) * softcap
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets, reduction="sum")


def draw(n, width, vocab, dtype, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64) / width**0.5
    targets = torch.randint(0, vocab, (n,), generator=g)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_it_is_cross_entropy_in_any_chunks(monkeypatch, chunk, softcap):
    x, weight, targets = draw(7, 5, 11, torch.float64)
    targets[[1, 4]] = -100
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 11 * chunk)
    got = torch.autograd.grad(loss := linear_cross_entropy(x, weight, targets, scale=0.2, softcap=softcap), (x, weight))
    want = torch.autograd.grad(truth := 0.2 * plain(x, weight, targets, softcap), (x, weight))
    for a, b in zip((loss, *got), (truth, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)
    assert (got[0][[1, 4]] == 0).all()


def test_the_gradient_is_scaled_by_what_comes_down():
    x, weight, targets = draw(7, 5, 11, torch.float64)
    once, thrice = (torch.autograd.grad(k * linear_cross_entropy(x, weight, targets), (x, weight)) for k in (1, 3))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_gradcheck(softcap):
    x, weight, targets = draw(4, 3, 6, torch.float64)
    loss = functools.partial(linear_cross_entropy, targets=targets, scale=0.5, softcap=softcap)
    assert torch.autograd.gradcheck(loss, (x, weight))


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 5.0)])
def test_its_error_is_at_most_twice_that_of_the_plain_formula(dtype, softcap, monkeypatch):
    """Law 31, at a large vocabulary and confident logits, in several chunks; every element, forward and backward."""
    vocab = 50_000
    x, weight, targets = draw(96, 64, vocab, dtype, scale=4.0)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * vocab * 24)  # four chunks

    def run(function, dtype):
        a, b = (z.detach().to(dtype).requires_grad_() for z in (x, weight))
        loss = function(a, b, targets, softcap=softcap) / 96
        return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, (a, b)))]

    exact = run(plain, torch.float64)
    for truth, ours, theirs in zip(exact, run(linear_cross_entropy, dtype), run(plain, dtype), strict=True):
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-9


def test_the_softmax_of_bfloat16_logits_is_not_bfloat16():
    """What is lost in the logits is lost; the softmax over 50,000 of them adds nothing that shows."""
    x, weight, targets = draw(24, 64, 50_000, torch.bfloat16, scale=4.0)
    logits = (x @ weight.T).detach().double()
    truth = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    # float32: a sum of 50,000 terms and a logarithm, a few roundings of 6e-8. bfloat16 would be off by 1e-3.
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets).double(), truth, rtol=1e-5, atol=0)


def test_the_logits_never_exist_at_once():
    """Counts the bytes of the largest tensor that is made: a chunk of logits, far below all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
            return out

    x, weight, targets = draw(4096, 8, 32_000, torch.float32)
    with Largest() as seen:
        linear_cross_entropy(x, weight, targets).backward()
    assert seen.bytes <= module._CHUNK_BYTES < 4096 * 32_000 * 4 / 3


def test_evaluation_keeps_no_gradients():
    x, weight, targets = draw(7, 5, 11, torch.float32)
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets).grad_fn is None


def test_no_tokens_give_no_loss_and_no_gradient():
    x, weight, targets = draw(0, 5, 11, torch.float32)
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss == 0
    assert (weight.grad == 0).all()


def test_chunks_are_equal_parts():
    """A last chunk of a few tokens would read the whole weight for them."""
    assert module._chunk_size(2048, 682) == 512
    assert module._chunk_size(100, 1000) == 100


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [2, 100])
def test_smoothing_and_bias_with_padding_are_those_of_torch(monkeypatch, chunk, softcap):
    """Law 24: a padded token adds nothing, neither to the target's part nor to the part that is spread."""
    x, weight, targets = draw(7, 5, 11, torch.float64)
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()
    targets[[1, 4]] = -100
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 11 * chunk)
    loss = linear_cross_entropy(x, weight, targets, bias=bias, scale=0.2, smoothing=0.1, softcap=softcap)
    logits = F.linear(x, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    truth = 0.2 * F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    leaves = (x, weight, bias)
    got, want = (torch.autograd.grad(value, leaves) for value in (loss, truth))
    for a, b in zip((loss, *got), (truth, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)
