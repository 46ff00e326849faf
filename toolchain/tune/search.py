"""The search itself: Optuna's tree of Parzen estimators, resumable and the same every time.

J. Bergstra, R. Bardenet, Y. Bengio and B. Kégl, "Algorithms for hyper-parameter optimization",
NeurIPS 2011; T. Akiba et al., "Optuna: a next-generation hyperparameter optimization framework",
KDD 2019. Each trial has a sampler with a seed of its own, so that a search that was cut off goes on
as if it had not been. The best few and the policy that is there already are measured once more, on
orderings that the search has not seen: the winner there is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime_py.loop.errors import LoopError
from runtime_py.loop.files import write_bytes
from toolchain.streams.chance import chance
from toolchain.tune.measuring import Bench, Limits, Measured
from toolchain.tune.space import Value, suggest

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

POLICY, JOURNAL = "policy.json", "trials.journal"
_STARTUP = 10  # trials that are drawn before the estimators are used, or a third of all


@dataclass(frozen=True)
class TuneOptions:
    """``trials`` in all; ``hours``: after so many no trial begins, None for no end; ``orderings``
    of each stream that the search sees, and ``confirm`` others for the ``finalists``."""

    groups: tuple[str, ...]
    trials: int
    hours: float | None
    orderings: int
    confirm: int
    finalists: int
    seed: int


@dataclass(frozen=True)
class TrialRow:
    """``measured`` is None where the trial failed, and ``sentence`` says why."""

    number: int
    policy: dict[str, Value]
    measured: Measured | None
    fits: bool
    sentence: str


@dataclass(frozen=True)
class Finalist:
    """``number``: of the trial, None for the policy that is there already. ``seen`` and ``fresh``:
    on the search's orderings and on others; ``fresh`` is None where that failed, and ``sentence``
    says why."""

    number: int | None
    policy: dict[str, Value]
    seen: Measured
    fresh: Measured | None
    sentence: str = ""

    @property
    def gain(self) -> float:
        """On fresh orderings."""
        return float("-inf") if self.fresh is None else self.fresh.gain


@dataclass(frozen=True)
class TuneOutcome:
    """``finalists``: the policy that is there already first. ``winner`` has the highest gain on
    fresh orderings of those that fit the limits."""

    limits: Limits
    trials: tuple[TrialRow, ...]
    finalists: tuple[Finalist, ...]
    winner: Finalist

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_options(options: TuneOptions) -> None:
    """Raises ``LoopError`` with all misfits."""
    wrong = [
        f"--{name} is {getattr(options, name)}, expected at least 1"
        for name in ("trials", "orderings", "confirm", "finalists")
        if getattr(options, name) < 1
    ]
    if options.hours is not None and not options.hours > 0:
        wrong.append(f"--hours is {options.hours:g}, expected more than 0")
    if wrong:
        raise LoopError(f"{'; '.join(wrong)}.")


def tune(
    options: TuneOptions,
    bench: Bench,
    limits: Limits,
    out: Path,
    told: Callable[[TrialRow], None] = lambda row: None,
) -> TuneOutcome:
    """Writes the winner's fields to ``out``/policy.json. Raises ``LoopError`` where Optuna is not
    installed, or the policy that is there already cannot be measured."""
    seen = range(options.orderings)
    fresh = range(options.orderings, options.orderings + options.confirm)
    own = Finalist(None, {}, bench.measure({}, seen), bench.measure({}, fresh))
    study = _opened(out / JOURNAL)
    begun = time.monotonic()
    while _count(study) < options.trials:
        if options.hours is not None and time.monotonic() - begun > 3600 * options.hours:
            break
        told(_try_one(study, options, bench, limits, seen))
    rows = trial_rows(study, limits)
    finalists = [own]
    for row in best_rows(rows, options.finalists):
        if row.measured is not None:
            finalists.append(_finalist(row, row.measured, bench, fresh))
    outcome = TuneOutcome(limits, tuple(rows), tuple(finalists), winner_of(finalists, limits))
    text = json.dumps(outcome.winner.policy, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_bytes(out / POLICY, text.encode())
    return outcome


def best_rows(rows: Sequence[TrialRow], count: int) -> list[TrialRow]:
    """Those that fit, the highest gain first, the earlier of equals; no policy twice."""
    fitting = [row for row in rows if row.measured is not None and row.fits]
    ranked = sorted(fitting, key=lambda row: (-_gain(row), row.number))
    found: dict[str, TrialRow] = {}
    for row in ranked:
        found.setdefault(json.dumps(row.policy, sort_keys=True), row)
    return list(found.values())[:count]


def winner_of(finalists: Sequence[Finalist], limits: Limits) -> Finalist:
    """The first is the policy that is there already: it stays where none that fits gains more."""
    fitting = [one for one in finalists[1:] if one.fresh is not None and one.fresh.fits(limits)]
    best = max(fitting, key=lambda one: one.gain, default=finalists[0])
    return best if best.gain > finalists[0].gain else finalists[0]


def _finalist(row: TrialRow, seen: Measured, bench: Bench, fresh: Sequence[int]) -> Finalist:
    try:
        return Finalist(row.number, row.policy, seen, bench.measure(row.policy, fresh))
    except LoopError as error:
        return Finalist(row.number, row.policy, seen, None, str(error))


def trial_rows(study: Study, limits: Limits) -> list[TrialRow]:
    """All that ended, in order."""
    rows = []
    for trial in study.trials:
        if (policy := trial.user_attrs.get("policy")) is None:
            continue  # it was cut off
        raw = trial.user_attrs.get("measured")
        measured = None if raw is None else Measured.from_json(raw)
        fits = measured is not None and measured.fits(limits)
        sentence = trial.user_attrs.get("sentence", "")
        rows.append(TrialRow(trial.number, policy, measured, fits, sentence))
    return rows


def _opened(journal: Path) -> Study:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise LoopError(
            "attune tune needs Optuna, which is not installed: pip install 'attune-mobile[tune]'."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(
        storage=storage, study_name="tune", direction="maximize", load_if_exists=True
    )
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # cut off: tried anew
    return study


def _count(study: Study) -> int:
    """Trials that ended by themselves."""
    return sum(_ended(trial) for trial in study.get_trials(deepcopy=False))


def _ended(trial: FrozenTrial) -> bool:
    return "policy" in trial.user_attrs and trial.state.is_finished()


def _try_one(
    study: Study, options: TuneOptions, bench: Bench, limits: Limits, orderings: Sequence[int]
) -> TrialRow:
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    seed = chance(options.seed, "trial", _count(study)).below(1 << 32)
    startup = max(1, min(_STARTUP, options.trials // 3))
    study.sampler = TPESampler(seed=seed, n_startup_trials=startup)
    trial = study.ask()
    policy = suggest(trial, options.groups)
    try:
        measured = bench.measure(policy, orderings)
    except LoopError as error:
        trial.set_user_attr("sentence", str(error))
        trial.set_user_attr("policy", policy)
        study.tell(trial, state=TrialState.FAIL)
        return TrialRow(trial.number, policy, None, False, str(error))
    for name, value in measured.excess(limits).items():
        trial.set_constraint(name, value)
    trial.set_user_attr("measured", measured.as_json())
    trial.set_user_attr("policy", policy)
    study.tell(trial, measured.gain)
    return TrialRow(trial.number, policy, measured, measured.fits(limits), "")


def _gain(row: TrialRow) -> float:
    return row.measured.gain if row.measured is not None else float("-inf")
