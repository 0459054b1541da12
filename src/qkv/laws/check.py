"""Running the laws, and finding the first layer that breaks one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from qkv.laws.laws import LAWS, Law, Pair, Run
from qkv.laws.subject import ModelSubject, ModuleSubject, PairSubject, Subject
from qkv.models.pairs import PairModel
from qkv.models.transformer import Transformer
from qkv.nn.part import watching
from qkv.shapes import Tensor

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference that sums in another order may make, as a share of the largest output: a few hundred roundings."""


@final
@dataclass(frozen=True)
class Verdict:
    """What was found about one law.

    Attributes:
        law: The law.
        difference: The largest, as a share of the largest output (or of 1, where that is more).
        tolerance: What it may be.
        layer: The first module whose outputs differ, where the law is broken.
    """

    law: Law
    difference: float
    tolerance: float
    layer: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the law holds; a difference that is no number breaks it."""
        return self.difference <= self.tolerance


@final
@dataclass(frozen=True)
class Report:
    """All verdicts, and the laws that could not be asked about.

    Attributes:
        verdicts: In the order of `LAWS`.
        left_out: Laws whose `needs` the subject does not meet.
    """

    verdicts: tuple[Verdict, ...]
    left_out: tuple[Law, ...]

    @property
    def holds(self) -> bool:
        """Whether every law holds that was asked about."""
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def legend(self) -> str:
        """What each law says, a line each."""
        laws = [*(verdict.law for verdict in self.verdicts), *self.left_out]
        width = max(len(law.name) for law in laws)
        return "\n".join(f"{law.name:<{width}}  {law.says}" for law in laws)

    def __str__(self) -> str:
        rows = [("law", "difference", "allowed", "", "")]
        for v in self.verdicts:
            where = "" if v.holds else f"first in {v.layer or 'the outputs'}: {v.law.says}"
            rows.append(
                (v.law.name, f"{v.difference:.1e}", f"{v.tolerance:.0e}", "holds" if v.holds else "BROKEN", where)
            )
        rows += [(law.name, "-", "-", "not asked", f"needs {', '.join(sorted(law.needs))}") for law in self.left_out]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join((*(f"{row[i]:<{widths[i]}}" for i in range(4)), row[4])).rstrip() for row in rows)


def check(subject: Subject | nn.Module, **how: Any) -> Report:
    """Ask a model about every law that applies to it.

    Args:
        subject: A `Transformer` or `PairModel` of ours, a `Subject`, or any module.
        how: For any module, how it is called: the keywords of `ModuleSubject`.

    Raises:
        ConfigError: It cannot be called in this way.
    """
    if isinstance(subject, PairModel):
        subject = PairSubject(subject)
    elif not isinstance(subject, Subject):
        subject = ModelSubject(subject) if isinstance(subject, Transformer) else ModuleSubject(subject, **how)
    dtypes = {p.dtype for p in subject.module.parameters() if p.is_floating_point()} or {torch.float32}
    tolerance = max(TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in dtypes)
    modes = {part: part.training for part in subject.module.modules()}
    subject.module.eval()
    try:
        with torch.no_grad():
            verdicts = tuple(_verdict(law, subject, tolerance) for law in LAWS if law.applies(subject))
    finally:
        for part, mode in modes.items():
            part.training = mode
    return Report(verdicts, tuple(law for law in LAWS if not law.applies(subject)))


def assert_laws(subject: Subject | nn.Module, **how: Any) -> None:
    """For a test: raise an AssertionError with the table where `check` finds a broken law."""
    report = check(subject, **how)
    assert report.holds, f"\n{report}"


def _verdict(law: Law, subject: Subject, tolerance: float) -> Verdict:
    worst = Verdict(law, 0.0, tolerance)
    for pair in law.pairs(subject):
        with _mode(subject.module, training=False):
            want = pair.a.compute()
        with _mode(subject.module, training=pair.training):
            got = pair.b.compute()
        difference = _difference(pair.a.part(want), pair.b.part(got))
        if not difference <= worst.difference:
            layer = None if difference <= tolerance else _first_layer(subject.module, pair, tolerance)
            worst = Verdict(law, difference, tolerance, layer)
    return worst


def _difference(want: Tensor, got: Tensor) -> float:
    if want.shape != got.shape or not want.numel():
        return 0.0 if want.shape == got.shape else float("inf")
    want, got = want.double(), got.double()
    return ((want - got).abs().max() / want.abs().max().clamp(min=1.0)).item()


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Evaluation mode; or training mode with every dropout at 0."""
    if not training:
        yield
        return
    before = [(part, name, getattr(part, name)) for part in module.modules() for name in _dropouts(part)]
    module.train()
    for part, name, _ in before:
        setattr(part, name, 0.0)
    try:
        yield
    finally:
        module.eval()
        for part, name, value in before:
            setattr(part, name, value)


def _dropouts(part: nn.Module) -> list[str]:
    """The attributes of a module that are probabilities of dropping."""
    own = ["p"] if isinstance(part, nn.modules.dropout._DropoutNd) else []
    return own + [name for name, value in vars(part).items() if "dropout" in name and isinstance(value, float)]


def _first_layer(module: nn.Module, pair: Pair, tolerance: float) -> str | None:
    """The innermost of the first modules whose outputs differ."""
    want = _outputs_of(module, pair.a, training=False)
    got = _outputs_of(module, pair.b, training=pair.training)
    for name, ours in want.items():
        theirs = got.get(name)
        if theirs is None:
            continue
        try:
            a, b = pair.a.part(ours), pair.b.part(theirs)
        except (IndexError, RuntimeError):  # no outputs (B, T, …)
            continue
        if a.shape == b.shape and not _difference(a, b) <= tolerance:  # another shape: of a source, padded in one
            return name
    return None


def _outputs_of(module: nn.Module, run: Run, *, training: bool) -> dict[str, Tensor]:
    """What each module put out, in the order in which they ended; pieces of a text side by side."""
    found: dict[str, list[Tensor]] = {}

    def see(name: str, _: nn.Module, output: Tensor) -> None:
        if output.dim() >= 3:
            found.setdefault(name, []).append(output)

    with watching(module, see), _mode(module, training=training):
        run.compute()
    return {name: torch.cat(pieces, 1) for name, pieces in found.items() if len({p.shape[2:] for p in pieces}) == 1}
