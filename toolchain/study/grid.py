"""The cells of a plan, each with its place in the report; all that does not exist is one error."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from runtime_py.loop.asking import ASKING
from runtime_py.loop.errors import LoopError
from runtime_py.loop.exchanges import EXCHANGE_RULES
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.presets import PRESETS
from runtime_py.loop.replacement import POLICIES
from toolchain.study.cells import (
    ESTIMATORS,
    OPTIONS,
    ROW_SETS,
    ROWS,
    USERS,
    Cell,
    Value,
)
from toolchain.study.plan import RowPlan, StudyPlan, VaryPlan

CHOICES: dict[str, Sequence[str]] = {  # of options whose values are names
    "user": tuple(USERS),
    "estimator": tuple(ESTIMATORS),
    "rows": ("", *ROW_SETS),
}
_NAMED: dict[str, tuple[str, Collection[str]]] = {  # of a policy: fields that name what there is
    "selection": ("selection policy", POLICIES),
    "asking": ("asking rule", ASKING),
    "ask_exchange": ("exchange rule", EXCHANGE_RULES),
}
_KINDS: dict[type, str] = {int: "an int", float: "a float", str: "a str", bool: "a bool"}
_LEAST: dict[str, float] = {
    "observed": 1,
    "tests": 1,
    "nights": 1,
    "examples": 1,
    "reply_tokens": 1,
}


@dataclass(frozen=True)
class Planned:
    """A cell as a plan has it. ``label``: its line of the table; ``row``: the row that it is or
    varies; ``varied``: the values that it differs from that row by, empty for the row itself."""

    label: str
    row: str
    varied: tuple[tuple[str, Value], ...]
    cell: Cell


def cells_of(plan: StudyPlan) -> list[Planned]:
    """All cells, ordering by ordering, so that an interrupted study has whole orderings.

    Raises ``LoopError`` that names everything in the plan that does not exist.
    """
    wrong = list(dict.fromkeys([*_row_misfits(plan), *_name_misfits(plan)]))
    if wrong:
        raise LoopError(f"the plan {plan.name} cannot be used: {'; '.join(wrong)}. Correct it.")
    planned: list[Planned] = []
    for row, options in _lines(plan):
        planned += _cells(plan, row, *options)
    labels: dict[tuple[str, str, int], Planned] = {}
    for one in planned:
        place = (one.label, one.cell.stream, one.cell.ordering)
        if place in labels and labels[place].cell != one.cell:
            raise LoopError(
                f"the plan {plan.name} cannot be used: {one.label!r} stands for two different "
                f"cells of {one.cell.stream}. Vary it in one place only."
            )
        labels[place] = one
    order = {stream: index for index, stream in enumerate(_streams(plan))}
    return sorted(labels.values(), key=lambda one: (one.cell.ordering, order[one.cell.stream]))


def _lines(plan: StudyPlan) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each row and each variation: name, and what ``_cells`` needs of it."""
    for name, row in plan.rows.items():
        yield name, (row.streams, row.orderings, {}, {})
    for vary in plan.vary:
        for name in vary.rows:
            row = plan.rows[name]
            for policy, options in _combinations(vary):
                yield name, (
                    vary.streams or row.streams, vary.orderings or row.orderings, policy, options,
                )  # fmt: skip


def _combinations(vary: VaryPlan) -> Iterator[tuple[dict[str, Value], dict[str, Value]]]:
    names = [*vary.policy, *vary.options]
    for values in product(*vary.policy.values(), *vary.options.values()):
        whole = dict(zip(names, values, strict=True))
        yield (
            {name: whole[name] for name in vary.policy},
            {name: whole[name] for name in vary.options},
        )


def _cells(
    plan: StudyPlan,
    name: str,
    streams: Sequence[str] | None,
    orderings: int | None,
    policy: Mapping[str, Value],
    options: Mapping[str, Value],
) -> Iterator[Planned]:
    row = plan.rows[name]
    varied = (*policy.items(), *options.items())
    label = ", ".join([name, *(f"{key} {value}" for key, value in varied)])
    fields = _typed({**plan.policy, **row.policy, **policy}, _policy_kinds())
    for stream, ordering in product(streams or plan.streams, range(orderings or plan.orderings)):
        of_stream = plan.stream_options.get(stream, {})
        chosen = _typed({**plan.options, **of_stream, **row.options, **options}, OPTIONS)
        yield Planned(label, name, varied, Cell(stream, ordering, row.row, fields, chosen))


def _policy_kinds() -> dict[str, Value]:
    """A value of each field's kind."""
    return dict(vars(LoopPolicy()))


def _typed(values: Mapping[str, Value], kinds: Mapping[str, Value]) -> dict[str, Value]:
    """A whole number where a fraction is meant is one: 1 and 1.0 are the same cell."""
    return {
        name: float(value) if type(kinds[name]) is float and type(value) is int else value
        for name, value in values.items()
    }


def _streams(plan: StudyPlan) -> list[str]:
    """In the order in which the plan names them."""
    own = [row.streams or () for row in plan.rows.values()]
    own += [vary.streams or () for vary in plan.vary]
    primary = plan.primary.streams if plan.primary else ()
    return list(
        dict.fromkeys([*plan.streams, *(name for names in own for name in names), *primary])
    )


def _row_misfits(plan: StudyPlan) -> Iterator[str]:
    for stream, options in plan.stream_options.items():
        if stream not in _streams(plan):
            yield f"stream_options names {stream!r}; the plan has {', '.join(_streams(plan))}"
        yield from _option_misfits(options)
    for name, row in plan.rows.items():
        if row.row not in ROWS:
            yield f"{name} is a row {row.row!r}; there are {', '.join(ROWS)}"
        yield from _setting_misfits(plan, row, {}, {})
    for vary in plan.vary:
        for name in vary.rows:
            if name in plan.rows:
                for policy, options in _combinations(vary):
                    yield from _setting_misfits(plan, plan.rows[name], policy, options)


def _setting_misfits(
    plan: StudyPlan, row: RowPlan, policy: Mapping[str, Value], options: Mapping[str, Value]
) -> Iterator[str]:
    yield from _option_misfits({**plan.options, **row.options, **options})
    fields = {**plan.policy, **row.policy, **policy}
    known = _policy_kinds()
    if unknown := sorted(set(fields) - set(known)):
        yield f"unknown policy fields {', '.join(unknown)}; there are {', '.join(known)}"
        return
    try:
        whole = LoopPolicy.from_fields(dict(fields))
    except LoopError as error:
        yield str(error).removesuffix(". Correct it.")
        return
    for name, (what, there) in _NAMED.items():
        if (value := getattr(whole, name)) not in there:
            yield f"there is no {what} {value!r}; there are {', '.join(there)}"


def _option_misfits(options: Mapping[str, Value]) -> Iterator[str]:
    choices = {**CHOICES, "preset": ("", *PRESETS)}
    for name, value in options.items():
        if name not in OPTIONS:
            yield f"unknown option {name}; there are {', '.join(OPTIONS)}"
        elif type(value) is not type(OPTIONS[name]) and not (
            type(OPTIONS[name]) is float and type(value) is int
        ):
            yield f"the option {name} is {value!r}, expected {_KINDS[type(OPTIONS[name])]}"
        elif name in choices and value not in choices[name]:
            there = ", ".join(filter(None, choices[name]))
            yield f"there is no {name} {value!r}; there are {there}"
        elif isinstance(value, int | float) and not _LEAST.get(name, 0) <= value:
            yield f"the option {name} is {value!r}, expected at least {_LEAST.get(name, 0)}"
        elif name == "answer_rate" and isinstance(value, float) and value > 1.0:
            yield f"the option {name} is {value!r}, expected a part, 0 to 1"


def _name_misfits(plan: StudyPlan) -> Iterator[str]:
    """Of rows that are named somewhere and are not there."""
    named: list[tuple[str, str]] = [("baseline", plan.baseline)]
    named += [("vary", name) for vary in plan.vary for name in vary.rows]
    if plan.primary:
        named += [("primary", plan.primary.row), ("primary", plan.primary.against)]
    for secondary in plan.secondary:
        named += [("secondary", name) for name in (secondary.against, *(secondary.rows or ()))]
    for place, name in named:
        if name not in plan.rows:
            yield f"{place} names the row {name!r}; the plan has {', '.join(plan.rows)}"
