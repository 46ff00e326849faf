"""What a study's results say: values, differences to a baseline and to the own row, contrasts.

A score of a row is, over its orderings and test dialogues: ``loss``, nats a label (all nats over
all labels); ``rouge1`` and ``rougeL``, the mean F1; ``words``, the mean of a reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from toolchain.report.statistics import RESAMPLES, Contrast, Floats, Paired, compare, holm
from toolchain.study.cells import CellResult, CellScores, Value
from toolchain.study.plan import Score
from toolchain.study.study_run import Study

SCORES: tuple[Score, ...] = ("loss", "rouge1", "rougeL", "words")
COMPARED: tuple[Score, ...] = ("loss", "rouge1", "rougeL")

Orderings = Mapping[int, CellResult]  # of one line on one stream


@dataclass(frozen=True)
class Line:
    """One row, or a variation of ``row``, on one stream. ``to_baseline`` and ``to_row`` (of a
    variation): by score. ``facts``: means over the orderings that have them."""

    label: str
    row: str
    varied: tuple[tuple[str, Value], ...]
    stream: str
    orderings: int
    values: Mapping[Score, float]
    to_baseline: Mapping[Score, Contrast]
    to_row: Mapping[Score, Contrast]
    facts: Mapping[str, float]


@dataclass(frozen=True)
class Tested:
    """A contrast of the plan. ``corrected``: p by Holm, None of the primary one and where there is
    no p."""

    label: str
    against: str
    streams: tuple[str, ...]
    score: Score
    contrast: Contrast
    corrected: float | None


@dataclass(frozen=True)
class Summary:
    """``missing``: names of cells; ``primary``: None where it is not planned, or not there yet."""

    study: Study
    streams: tuple[str, ...]
    lines: tuple[Line, ...]
    primary: Tested | None
    secondary: tuple[Tested, ...]
    cells: int
    missing: int

    def as_json(self) -> dict:
        """For ``--json``: plain numbers; a value that is not there yet is absent or None."""
        return {
            "plan": self.study.plan.name,
            "cells": self.cells,
            "missing": self.missing,
            "primary": None if self.primary is None else asdict(self.primary),
            "secondary": [asdict(one) for one in self.secondary],
            "lines": [asdict(line) | {"varied": dict(line.varied)} for line in self.lines],
        }


def summarize(study: Study) -> Summary:
    """Of whatever results there are."""
    found = _by_line(study)
    lines = tuple(_line(study, label, stream, found) for label, stream in found)
    return Summary(
        study=study,
        streams=tuple(dict.fromkeys(line.stream for line in lines)),
        lines=lines,
        primary=_primary(study, found),
        secondary=_secondary(study, found),
        cells=len(study.cells),
        missing=len(study.missing),
    )


_Found = dict[tuple[str, str], dict[int, CellResult]]  # (label, stream): by ordering


def _by_line(study: Study) -> _Found:
    """In the plan's order: rows as they stand there, then variations."""
    found: _Found = {}
    order = {name: index for index, name in enumerate(study.plan.rows)}
    ordered = sorted(study.planned, key=lambda one: (bool(one.varied), order[one.row]))
    for one in ordered:
        if (result := study.done.get(one.cell.key)) is not None:
            found.setdefault((one.label, one.cell.stream), {})[one.cell.ordering] = result
    return found


def _line(study: Study, label: str, stream: str, found: _Found) -> Line:
    results = found[label, stream]
    planned = next(one for one in study.planned if one.label == label)
    baseline = found.get((study.plan.baseline, stream), {})
    own = found.get((planned.row, stream), {}) if planned.varied else {}
    return Line(
        label=label,
        row=planned.row,
        varied=planned.varied,
        stream=stream,
        orderings=len(results),
        values={score: _mean(results.values(), score) for score in SCORES},
        to_baseline={} if label == study.plan.baseline else _contrasts(results, baseline),
        to_row=_contrasts(results, own),
        facts=_facts(results.values()),
    )


def _contrasts(results: Orderings, others: Orderings) -> dict[Score, Contrast]:
    pairs = {score: paired(results, others, score) for score in COMPARED}
    return {score: compare([pair]) for score, pair in pairs.items() if pair is not None}


def _mean(results: Iterable[CellResult], score: Score) -> float:
    sums = [
        (amount.sum(), unit.sum()) for amount, unit in (_amounts(r.scores, score) for r in results)
    ]
    return float(sum(amount for amount, _ in sums) / sum(unit for _, unit in sums))


def _amounts(scores: CellScores, score: Score) -> tuple[Floats, Floats]:
    """What is summed and what it is divided by, [dialogues] each."""
    amounts = np.array(getattr(scores, score), dtype=np.float64)
    labels = np.array(scores.labels, dtype=np.float64)
    return amounts, labels if score == "loss" else np.ones_like(labels)


def paired(results: Orderings, others: Orderings, score: Score) -> Paired | None:
    """Both on the dialogues and in the orderings that both have; None where there is none.

    A loss counts a dialogue by the labels that it has in ``others``.
    """
    shared = [
        (ordering, sorted(set(results[ordering].scores.ids) & set(others[ordering].scores.ids)))
        for ordering in sorted(set(results) & set(others))
    ]
    shared = [(ordering, ids) for ordering, ids in shared if ids]
    if not shared:
        return None
    columns = {id: i for i, id in enumerate(sorted({id for _, ids in shared for id in ids}))}
    row, against, unit = np.zeros((3, len(shared), len(columns)))
    for line, (ordering, ids) in enumerate(shared):
        at = [columns[id] for id in ids]
        other, other_unit = _at(others[ordering].scores, score, ids)
        own, own_unit = _at(results[ordering].scores, score, ids)
        against[line, at], unit[line, at] = other, other_unit
        row[line, at] = own / own_unit * other_unit
    return Paired(row, against, unit)


def _at(scores: CellScores, score: Score, ids: Sequence[str]) -> tuple[Floats, Floats]:
    places = {id: place for place, id in enumerate(scores.ids)}
    amounts, unit = _amounts(scores, score)
    chosen = [places[id] for id in ids]
    return amounts[chosen], unit[chosen]


def _facts(results: Iterable[CellResult]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for result in results:
        for name, fact in sorted(result.facts.items()):
            if isinstance(fact, int | float):
                values.setdefault(name, []).append(float(fact))
    return {name: float(np.mean(numbers)) for name, numbers in values.items()}


def _primary(study: Study, found: _Found) -> Tested | None:
    """None until every stream of it has been measured."""
    plan = study.plan.primary
    if plan is None:
        return None
    pairs = [
        paired(found.get((plan.row, stream), {}), found.get((plan.against, stream), {}), plan.score)
        for stream in plan.streams
    ]
    there = [pair for pair in pairs if pair is not None]
    if len(there) < len(pairs):
        return None
    return Tested(plan.row, plan.against, plan.streams, plan.score, compare(there), None)


def _secondary(study: Study, found: _Found) -> tuple[Tested, ...]:
    """With p corrected over all of them that have one. The resamples are so many that the smallest
    p they can show stays below 0.05 when it is corrected."""
    pairs: dict[tuple[str, str, str, Score], Paired] = {}
    for plan in study.plan.secondary:
        for label, stream in found:
            if label == plan.against or label not in (plan.rows or study.plan.rows):
                continue
            others = found.get((plan.against, stream), {})
            for score in plan.scores:
                pair = paired(found[label, stream], others, score)
                if pair is not None and not _is_primary(study, label, plan.against, stream, score):
                    pairs[label, plan.against, stream, score] = pair
    resamples = max(RESAMPLES, 80 * len(pairs))
    contrasts = {key: compare([pair], resamples) for key, pair in pairs.items()}
    values = {key: one.p for key, one in contrasts.items() if one.p is not None}
    corrected = dict(zip(values, holm(list(values.values())), strict=True))
    return tuple(
        Tested(label, against, (stream,), score, contrast, corrected.get(key))
        for key, contrast in contrasts.items()
        for label, against, stream, score in [key]
    )


def _is_primary(study: Study, label: str, against: str, stream: str, score: Score) -> bool:
    plan = study.plan.primary
    return plan is not None and (label, against, (stream,), score) == (
        plan.row, plan.against, plan.streams, plan.score,
    )  # fmt: skip
