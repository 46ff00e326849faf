"""One measurement of a study, what decides it, and what comes out of it.

A ``Cell`` holds everything that decides its result beside the study's own configuration (bundle,
data, device, threads: ``StudyPlace``); its key is the SHA-256 of its canonical JSON. That has
sorted keys, no blanks and no NaN, so that equal results are equal bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from runtime_py.loop.errors import LoopError

Value = bool | int | float | str

# What can be measured, and what it is. All but `base`, `instruction` and `base_cut` observe the
# stream first, under the cell's policy.
ROWS: dict[str, str] = {
    "trained": "the loop: select, ask, synthesize, train as the policy says",
    "base": "the untouched model",
    "everything_steps": "trained on all that was observed, all answered, with the loop's steps",
    "everything_epochs": "trained on all that was observed, all answered, with the loop's epochs",
    "retrieval": "the untouched model, the most similar answered sets in its prompt",
    "retrieval_trained": "the loop's adapter, and the most similar answered sets in its prompt",
    "random_examples": "the untouched model, answered sets drawn at random in its prompt",
    "instruction": "the untouched model, told the length and the tone that the user wants",
    "base_cut": "the untouched model's reply, cut to the mean length of the references",
}
UNTRAINED = ("base", "instruction", "base_cut")  # no dialogue is observed for them

# Of the experiment, not of the policy, with what holds where a plan says nothing.
OPTIONS: dict[str, Value] = {
    "observed": 0,  # dialogues of the stream; 0: as many as its recipe has, 800 of a dataset alone
    "tests": 0,  # that nothing has seen and the scores are of; 0: as the recipe, 200 of a dataset
    "rows": "",  # of the datasets: a name in ROW_SETS, empty: the recipe's own
    "answers": 0,  # the user gives at most; 0: as many as the policy's questions get
    "answer_tokens": 0,  # of all answers together at most; 0: no bound
    "steps": 0,  # of training, the same for every row; 0: what the policy's budget gives
    "nights": 1,  # of fine-tuning, spread evenly over what is observed
    "user": "ideal",  # a name in USERS
    "answer_rate": 1.0,  # the probability that a question gets an answer
    "estimator": "norm",  # of EOE: a name in ESTIMATORS
    "preset": "",  # of the policy: a name in PRESETS; empty: the bundle's own policy
    "general_tokens": 4096,  # of the general text that forgetting is measured on
    "examples": 4,  # answered sets in the prompt: retrieval, retrieval_trained, random_examples
    "reply_tokens": 64,  # of a reply at most, greedy
}
USERS: dict[str, str] = {
    "ideal": "answers with the reference",
    "adequate": "accepts a draft that is near the reference, else answers with it",
    "short": "answers with the beginning of the reference",
    "errs": "answers now and then with the reference of another dialogue",
}
ESTIMATORS: dict[str, str] = {
    "norm": "entropy of the token vectors' norms",
    "renyi2": "Rényi-2 entropy of centred unit token vectors of the middle layer",
    "surprisal": "mean surprisal under the base model",
    "surprisal_band": "how near that is to a middle that is neither easy nor hard",
    "nuclear": "nuclear norm of the predictions",
}
ROW_SETS = ("development", "judging", "all")  # what is tuned on, and what never is
MEASURED = frozenset({"seconds", "peak_memory_mb"})  # facts of a machine, not of the cell


@dataclass(frozen=True)
class StudyPlace:
    """Where and on what cells are measured; a worker opens its world once from it.

    ``threads``: of the engine within one worker. It decides the last bits of a sum, so it belongs
    to the configuration; more workers are asked for by the number of jobs.
    """

    bundle: Path
    data: Path  # a folder with datasets, <name>.jsonl.gz or .jsonl, and recipes, <name>.toml
    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True)
class Cell:
    """One measurement.

    ``stream``: the name of a dataset or of a stream's recipe. ``ordering``: which order of the
    stream and which split into observed and test dialogues; rows share it. ``row``: a name in
    ``ROWS``. ``policy``: the fields of ``LoopPolicy`` that differ from the bundle's or the
    preset's. ``options``: all of ``OPTIONS``; what is left out is filled in.
    """

    stream: str
    ordering: int
    row: str
    policy: Mapping[str, Value] = field(default_factory=dict)
    options: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.row not in ROWS:
            raise LoopError(f"there is no row {self.row!r}; there are {', '.join(ROWS)}.")
        if unknown := sorted(set(self.options) - set(OPTIONS)):
            raise LoopError(
                f"a cell has unknown options: {', '.join(unknown)}; it knows {', '.join(OPTIONS)}."
            )
        object.__setattr__(self, "options", dict(OPTIONS) | dict(self.options))
        object.__setattr__(self, "policy", dict(self.policy))

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> str:
        """Of a cell's file: 24 hexadecimal digits."""
        return hashlib.sha256(canonical(asdict(self))).hexdigest()[:24]


@dataclass(frozen=True)
class CellScores:
    """Of the test dialogues, one entry each, in the order of ``ids``.

    ``loss``: nats, summed over the last reply's labels; ``labels``: their number; ``rouge1`` and
    ``rougeL``: F1 of the reply with the reference, 0 to 1; ``words``: of the reply.
    """

    ids: tuple[str, ...]
    loss: tuple[float, ...]
    labels: tuple[int, ...]
    rouge1: tuple[float, ...]
    rougeL: tuple[float, ...]  # noqa: N815 - the measure's own name
    words: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {one.name: len(getattr(self, one.name)) for one in fields(self)}
        if len(set(lengths.values())) != 1 or not self.ids:
            raise LoopError(f"scores have {lengths} entries; expected equal numbers, at least 1.")
        if len(set(self.ids)) != len(self.ids):
            raise LoopError("scores name a test dialogue twice; expected each id once.")
        finite = all(map(math.isfinite, (*self.loss, *self.rouge1, *self.rougeL)))
        if not finite or min(self.labels) < 1:
            raise LoopError(
                "scores have a loss or ROUGE that is no number, or a dialogue without labels; a "
                "dialogue that cannot be scored does not belong to the tests."
            )


@dataclass(frozen=True)
class CellResult:
    """``facts``: what else is to be told: ``kept``, ``asked``, ``answered``,
    ``answer_tokens`` (of all answers), ``steps``, ``accepted`` and ``rejected`` (nights),
    ``forgetting`` (perplexity on general text over the base's, minus 1), ``kl``, ``mean_eoe``,
    ``mean_dss``, ``mean_idd`` (of what was kept), ``minutes.<phone>`` and ``memory_mb.<phone>``
    (modelled), and the ``MEASURED`` ones. None: does not apply."""

    cell: Cell
    scores: CellScores
    facts: Mapping[str, float | int | str | None]

    def __post_init__(self) -> None:
        try:
            canonical([asdict(self.scores), dict(self.facts)])
        except (TypeError, ValueError) as error:
            raise LoopError(
                f"a cell's result cannot be written ({error}): expected plain, finite numbers, "
                f"text and None."
            ) from None

    def to_json(self) -> bytes:
        """Canonical, without what was measured of the machine: equal results, equal bytes."""
        return canonical(asdict(self.settled())) + b"\n"

    def settled(self) -> CellResult:
        """Without the facts of the machine: what ``from_json`` gives of ``to_json``."""
        told = {name: fact for name, fact in self.facts.items() if name not in MEASURED}
        return replace(self, facts=told)

    def measured(self) -> dict[str, float | int | str | None]:
        """The facts of the machine it ran on."""
        return {name: fact for name, fact in self.facts.items() if name in MEASURED}

    @staticmethod
    def from_json(text: bytes) -> CellResult:
        """Raises ``LoopError`` for anything but what ``to_json`` wrote."""
        try:
            raw: Any = json.loads(text)
            cell = Cell(**raw["cell"])
            scores = CellScores(**{name: tuple(values) for name, values in raw["scores"].items()})
            return CellResult(cell, scores, dict(raw["facts"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LoopError(
                f"this is no cell's result ({type(error).__name__}: {error})."
            ) from None


def canonical(raw: object) -> bytes:
    """UTF-8 JSON with sorted keys and no blanks. Raises ``ValueError`` for NaN and infinities."""
    text = json.dumps(
        raw, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return text.encode()
