"""A comparison's numbers and its verdict; rungs and the ladder made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from toolchain.compile.tolerances import ABOVE, Tolerance

Status = Literal["passed", "failed", "not run"]
RUNGS = ("eager", "captured", "quantized", "executorch", "arm64", "coreml", "decisions")
NOT_ASKED = "it was not asked for (--rung)."
_BINS = np.arange(-9.0, 0.5, 0.5)  # log10 of relative differences, for histograms


@dataclass(frozen=True)
class Check:
    """One output of one program on one case.

    ``max_abs`` largest difference; ``max_rel`` the same as a part of the largest value expected;
    ``cosine`` of all numbers; ``likeness`` the correlation, for logits the smallest of the rows;
    ``same_token``, ``kl`` (nats, mean) for logits only. ``layer`` for a block's programs.
    ``histogram``: how many differences lie in each half decade from 1e-9 to 1.
    """

    program: str
    case: str
    output: str
    max_abs: float
    max_rel: float
    tolerance: float | None
    bound: str
    passed: bool
    cosine: float = 1.0
    likeness: float = 1.0
    likeness_tolerance: float | None = None
    same_token: float | None = None
    kl: float | None = None
    layer: int | None = None
    note: str = ""
    histogram: tuple[int, ...] = ()

    @property
    def margin(self) -> float | None:
        """Measured as a part of allowed: above 1 it fails. None where nothing is measured."""
        plain = self.bound == "exact" or not (self.tolerance or self.likeness_tolerance is not None)
        return None if plain else self.strain

    @property
    def strain(self) -> float:
        """How much of its tolerance a check takes: above 1 it fails."""
        parts = [0.0 if self.passed else math.inf]
        if self.tolerance:
            parts.append(self.max_rel / self.tolerance)
        if self.likeness_tolerance is not None:
            parts.append((1.0 - self.likeness) / max(1.0 - self.likeness_tolerance, 1e-30))
        finite = [part for part in parts if math.isfinite(part)]
        return max(finite, default=0.0) if self.passed else max([1.0, *finite])


@dataclass(frozen=True)
class FirstDifference:
    """The first place where two rungs differ: a layer (None outside of the blocks), an operator,
    and a sentence with both and the size of the difference."""

    layer: int | None
    operator: str
    sentence: str


@dataclass(frozen=True)
class Rung:
    """``against``: what it was compared with. ``layers``: (place, difference) in the order of
    computation, where the rung was looked into."""

    rung: str
    status: Status
    reason: str = ""
    against: str = ""
    checks: tuple[Check, ...] = ()
    found: FirstDifference | None = None
    layers: tuple[tuple[str, float], ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """``texts``: what each case says, for people."""

    bundle: str
    model: str
    precisions: dict[str, str]
    rungs: tuple[Rung, ...]
    texts: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return any(rung.status == "failed" for rung in self.rungs)


def _likeness(measured: np.ndarray, expected: np.ndarray, rows: bool) -> float:
    """Correlation; of each row the smallest where ``rows``. Constant rows count as alike where
    they are equal."""
    pairs = zip(measured, expected, strict=True) if rows else [(measured.ravel(), expected.ravel())]
    least = 1.0
    for a, b in pairs:
        a, b = a - a.mean(), b - b.mean()
        size = float(np.linalg.norm(a) * np.linalg.norm(b))
        value = float(a @ b) / size if size > 0 else (1.0 if np.allclose(a, b) else 0.0)
        least = min(least, value)
    return least


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _histogram(gap: np.ndarray, scale: float) -> tuple[int, ...]:
    with np.errstate(divide="ignore"):
        places = np.log10(np.maximum(gap.ravel() / scale, 1e-9))
    return tuple(int(n) for n in np.histogram(places, [*_BINS, np.inf])[0])


def _misfit(measured: np.ndarray, expected: np.ndarray) -> str:
    """Why no difference can be taken of the two; empty where one can."""
    if measured.shape != expected.shape:
        return f"shape {list(measured.shape)} instead of {list(expected.shape)}"
    if not np.isfinite(expected).all():
        return "the reference's values are NaN or infinite"
    return "" if np.isfinite(measured).all() else "the program's values are NaN or infinite"


def _within(
    tolerance: Tolerance,
    off: float,
    expected: np.ndarray,
    size: float,
    wide: Callable[[], np.ndarray] | None,
    limit: float,
) -> Tolerance:
    """The tolerance of a difference ``off``, a part of ``size``; the others as in ``compare``."""
    most = tolerance.most
    if wide is not None and most < off <= limit:
        most = max(most, ABOVE * float(np.abs(wide() - expected).max()) / size)
    most = min(most, limit)
    return replace(tolerance, max_rel=most if math.isfinite(most) else None)


def compare(
    program: str,
    case: str,
    output: str,
    measured: np.ndarray,
    expected: np.ndarray,
    tolerance: Tolerance,
    *,
    logits: bool = False,
    layer: int | None = None,
    scale: float | None = None,
    wide: Callable[[], np.ndarray] | None = None,
    limit: float = math.inf,
) -> Check:
    """``logits``: [rows, vocab]. ``scale``: what differences are measured by, where that is not the
    largest value expected. ``wide``: the expected values in float64, asked for where the format
    alone does not explain a difference: terms that cancel lose more than that, in PyTorch too.
    ``limit``: what ``max_rel`` may never be above, a limit on power. Raises ``ValueError`` where
    the tolerance bounds nothing."""
    if tolerance.max_rel is None and tolerance.likeness is None:
        raise ValueError(
            f"{program}: {output} on '{case}' has no bound ({tolerance.name}); give it one."
        )
    measured, expected = (np.asarray(values, np.float64) for values in (measured, expected))
    if note := _misfit(measured, expected):
        return Check(
            program, case, output, math.inf, math.inf, tolerance.max_rel, tolerance.name, False,
            layer=layer, note=note,
        )  # fmt: skip
    gap = np.abs(measured - expected)
    largest = float(gap.max()) if gap.size else 0.0
    size = scale if scale is not None else float(np.abs(expected).max()) if expected.size else 0.0
    size = max(size, 1e-30)
    norms = float(np.linalg.norm(measured) * np.linalg.norm(expected))
    cosine = 1.0 if largest == 0 else 0.0
    if norms > 0:
        cosine = float((measured * expected).sum() / norms)
    bounded = logits or tolerance.likeness is not None
    likeness = _likeness(measured, expected, logits) if bounded else cosine
    tolerance = _within(tolerance, largest / size, expected, size, wide, limit)
    passed = largest / size <= tolerance.most
    if tolerance.likeness is not None and expected.size > 1:
        passed &= likeness >= tolerance.likeness
    kl = same = None
    if logits:
        p, q = _log_softmax(expected), _log_softmax(measured)
        kl = float((np.exp(p) * (p - q)).sum(-1).mean())
        same = float((measured.argmax(-1) == expected.argmax(-1)).mean())
    return Check(
        program=program,
        case=case,
        output=output,
        max_abs=largest,
        max_rel=largest / size,
        tolerance=tolerance.max_rel,
        bound=tolerance.name,
        passed=passed,
        cosine=cosine,
        likeness=likeness,
        likeness_tolerance=tolerance.likeness,
        same_token=same,
        kl=kl,
        layer=layer,
        histogram=_histogram(gap, size),
    )


def worst(checks: Sequence[Check]) -> list[Check]:
    """Of each program and case the check that strains its tolerance most; all that fail stay."""
    kept: dict[tuple[str, str], Check] = {}
    for check in checks:
        key = (check.program, check.case)
        if key not in kept or check.strain > kept[key].strain:
            kept[key] = check
    return [c for c in checks if not c.passed or kept[c.program, c.case] is c]


def stated(program: str, case: str, output: str, passed: bool, note: str) -> Check:
    """A check that is a yes or a no."""
    gap = 0.0 if passed else 1.0
    return Check(program, case, output, gap, gap, 0.0, "exact", passed, note=note)


def rung(
    name: str,
    against: str,
    checks: Sequence[Check],
    first: FirstDifference | None = None,
    layers: Sequence[tuple[str, float]] = (),
    reason: str = "",
) -> Rung:
    """Passed if every check is."""
    failed = [check for check in checks if not check.passed]
    if failed and not reason:
        reason = first.sentence if first else _sentence(failed)
    return Rung(
        name, "failed" if failed else "passed", reason, against, tuple(checks), first, tuple(layers)
    )


def _sentence(failed: Sequence[Check]) -> str:
    first = failed[0]
    place = f" of layer {first.layer}" if first.layer is not None else ""
    what = first.note or f"off by {first.max_rel:.2g} of its range, likeness {first.likeness:.4f}"
    return f"{first.program}: {first.output}{place} on '{first.case}' is {what}."


def not_run(name: str, reason: str) -> Rung:
    return Rung(name, "not run", reason)
