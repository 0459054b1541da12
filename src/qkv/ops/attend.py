"""One signature for attention, and the choice of what runs behind it."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple

from torch.compiler import is_exporting

from qkv.errors import ConfigError, suggest
from qkv.lowered import Form, LoweredMask, lower
from qkv.masks import Full, Mask
from qkv.ops import sdpa
from qkv.ops.backend import Backend, Problem
from qkv.ops.documents import DOCUMENTS
from qkv.ops.reference import REFERENCE, weights_of
from qkv.ops.tiled import TILED
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens

FASTEST_FIRST: tuple[tuple[Backend, Callable[[Problem], bool]], ...] = (
    # Where a flag says it all, or there is a square that all layers share.
    (sdpa.SDPA, lambda p: p.mask.at_hand or (p.mask.plain and p.bias is None)),
    (DOCUMENTS, lambda p: p.mask.form is Form.DOCUMENTS and p.q.device.type == "cpu" and not is_exporting()),
    (TILED, lambda _: not is_exporting()),  # an operator that nobody else knows
    (sdpa.SDPA, lambda _: True),
    (REFERENCE, lambda _: True),
)
"""Each backend with the masks and devices for which it is meant, as `benchmarks/attention.py` measured them."""

BACKENDS: dict[str, Backend] = {backend.name: backend for backend, _ in reversed(FASTEST_FIRST)}

_logs: list[list[str]] = []  # of each `kernels_used` that lasts


@contextmanager
def kernels_used() -> Generator[list[str]]:
    """Collects which kernel each call of `attend` ran, while a `with` statement lasts.

    For SDPA the name says what PyTorch chose behind it: `sdpa:flash`, `sdpa:efficient` or `sdpa:math` (quadratic).
    """
    _logs.append([])
    try:
        yield _logs[-1]
    finally:
        _logs.pop()


class Choice(NamedTuple):
    """The backend that runs, and those that would be faster, each with the reason why it cannot."""

    name: str
    passed: tuple[tuple[str, str], ...]


def choose(problem: Problem) -> Choice:
    """The fastest backend that honours all that is asked."""
    passed: dict[str, str] = {}
    for backend, meant_for in FASTEST_FIRST:
        if backend.name in passed or not meant_for(problem):
            continue
        why = backend.refuses(problem)
        if not why:
            return Choice(backend.name, tuple(passed.items()))
        passed[backend.name] = why
    raise AssertionError("the reference refuses nothing")


def attend(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S v"],
    *,
    mask: Mask | LoweredMask,
    scale: float | None = None,
    dropout: float = 0.0,
    bias: Float[Tensor, "heads distances"] | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> Float[Tensor, "B H T v"]:
    """Scaled dot-product attention: softmax(scale · q kᵀ) v over what `mask` allows.

    Args:
        q: Queries.
        k: Keys; G divides H, and query head h reads kv head h // (H / G).
        v: Values.
        mask: Who may attend to whom. A `Mask` is taken over one full sequence per row, the queries being its last T
            tokens; a `LoweredMask` has seen the tokens already.
        scale: 1/√K when None.
        dropout: Probability that a weight is dropped.
        bias: Added to the scores, after the soft-cap: for each head a number for every distance `k.index - q.index`
            from -R to R (2 R + 1 columns); pairs that are farther apart take the end.
        sinks: For each head the logit of a key that every query sees and that has no value.
        softcap: c in c · tanh(score / c); None: no cap.
        backend: A name in `BACKENDS`; "auto" takes the fastest that honours all of the above.
        strict: With "auto", raise where an option keeps the fastest backend for this mask from running.

    Raises:
        ConfigError: The shapes do not fit, or the backend cannot honour what is asked.

    Source: Vaswani et al. 2017, section 3.2.1. Differs in that a query that may see nothing returns 0.
    """
    return solve(_problem(q, k, v, mask, scale, dropout, bias, sinks, softcap), backend=backend, strict=strict)


def attention_weights(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    *,
    mask: Mask | LoweredMask,
    scale: float | None = None,
    bias: Float[Tensor, "heads distances"] | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """The weights with which `attend` averages the values; arguments and errors as there.

    They take memory that grows with the square, so no kernel but the readable one computes them. Those of a query sum
    to 1, to less with sinks, and to 0 where it sees nothing.
    """
    return weights_of(_problem(q, k, k, mask, scale, 0.0, bias, sinks, softcap).without_padding())


def solve(problem: Problem, *, backend: str = "auto", strict: bool = False) -> Float[Tensor, "B H T v"]:
    """`attend` for a problem whose shapes are known to fit."""
    if backend == "auto":
        name, passed = choose(problem)
        if strict and passed:
            fastest, why = passed[0]
            raise ConfigError(
                f"strict: {fastest!r} is the fastest backend here and {why}; change that, or let {name!r} run"
            )
    elif (name := backend) not in BACKENDS:
        raise ConfigError(f"there is no backend {name!r}; {suggest(name, BACKENDS)}")
    elif why := BACKENDS[name].refuses(problem):
        raise ConfigError(f"backend {name!r} {why}; use {choose(problem).name!r}, or 'auto'")
    out = BACKENDS[name].run(problem)
    if _logs:
        _logs[-1].append(f"sdpa:{sdpa.kernel(problem)}" if name == "sdpa" else name)
    return out


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | LoweredMask,
    scale: float | None,
    dropout: float,
    bias: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
) -> Problem:
    """Checked, and with its mask lowered."""
    if q.shape[1] % k.shape[1] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ConfigError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together; they must be "
            "(B, H, T, K), (B, G, S, K) and (B, G, S, any), with H a multiple of G"
        )
    if bias is not None and (bias.shape[0] != q.shape[1] or bias.shape[1] % 2 == 0):
        raise ConfigError(
            f"bias {tuple(bias.shape)} must have {q.shape[1]} rows, one a head, and an odd number of distances"
        )
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ConfigError(f"sinks {tuple(sinks.shape)} must be {q.shape[1]} numbers, one a head")
    if softcap is not None and softcap <= 0:
        raise ConfigError(f"softcap={softcap} must be above 0; leave it out for none")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return Problem(q, k, v, _lowered(mask, q, k), scale, dropout, bias, sinks, softcap)


def _lowered(mask: Mask | LoweredMask, q: Tensor, k: Tensor) -> LoweredMask:
    if isinstance(mask, LoweredMask):
        if mask.size != (q.shape[2], k.shape[2]):
            queries, keys = mask.size
            raise ConfigError(
                f"the mask is for {queries} queries and {keys} keys, and there are {q.shape[2]} and {k.shape[2]}; "
                "lower it for these tokens"
            )
        return mask
    if not isinstance(mask, Mask):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"the class {mask.__name__}" if isinstance(mask, type) else type(mask).__name__
        raise ConfigError(
            f"mask is {given} and must be a mask such as Causal() or Full(); what a tensor would say of padding and "
            "documents is said by Tokens: lower(mask, tokens, tokens)"
        )
    before = k.shape[2] - q.shape[2]
    if before < 0 and not isinstance(mask, Full):
        raise ConfigError(
            f"there are {q.shape[2]} queries and {k.shape[2]} keys, of which queries are the last; where they are not, "
            "lower the mask for the tokens of both"
        )
    keys = Tokens.full(k.shape[0], k.shape[2], device=k.device)
    if q.shape[2] == k.shape[2]:
        return lower(mask, keys, keys)
    queries = Tokens.full(q.shape[0], q.shape[2], start=max(0, before), device=q.device)
    return lower(mask, queries, keys, past=True)
