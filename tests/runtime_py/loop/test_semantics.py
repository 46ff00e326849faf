"""docs/semantics.md states every module of the loop, each after those that it needs, and its tables
have all that the code has: fields of the policy, rules, reasons, events."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest

from runtime_py.loop.asking import ASKING
from runtime_py.loop.errors import LoopError
from runtime_py.loop.exchanges import EXCHANGE_RULES, NotAsked
from runtime_py.loop.log import Event, LogLine
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.presets import PRESETS
from runtime_py.loop.replacement import ASKED_ABOUT, POLICIES
from tests.runtime_py.loop.event_life import life

ROOT = Path(__file__).parents[3]
LOOP = ROOT / "runtime_py" / "loop"
MODULES = {path.stem: path for path in LOOP.glob("*.py") if path.stem != "__init__"}
TEXT = (ROOT / "docs/semantics.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## .+ \(`(\w+)\.py`\)$", TEXT, re.M)
KINDS: dict[str, type] = {
    "string": str, "int": int, "float": float, "bool": bool, "object": dict, "[string]": list,
}  # fmt: skip


def needed(module: str) -> set[str]:
    """The modules of the loop that it imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("runtime_py.loop"):
            inner = str(node.module).removeprefix("runtime_py.loop").lstrip(".")
            names |= {inner} if inner else {alias.name for alias in node.names}
    return names


def section(module: str) -> str:
    return re.split(rf"^## .+ \(`{module}\.py`\)$", TEXT, flags=re.M)[1].split("\n## ")[0]


def rows(module: str, head: str) -> list[list[str]]:
    """The rows of the section's table that begins with ``head``, each its cells."""
    lines = section(module).split("\n")
    start = next(place for place, line in enumerate(lines) if line.startswith(f"| {head} |"))
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[start:] if line[:1] == "|"]
    return [[cell.strip() for cell in row] for row in cells[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_module_has_its_section() -> None:
    assert sorted(SECTIONS) == sorted(MODULES)


def test_each_needs_only_those_above_it() -> None:
    late = [
        f"{module} needs {other}"
        for place, module in enumerate(SECTIONS)
        for other in sorted(needed(module) - set(SECTIONS[:place]))
    ]
    assert not late, ", ".join(late)


def test_the_policys_table_has_every_field() -> None:
    names = {"str": "string"}
    expected = [
        [f"`{f.name}`", names.get(str(f.type), str(f.type)), f.default] for f in fields(LoopPolicy)
    ]
    stated = rows("policy", "field")
    found = [[name, kind, json.loads(quoted(default)[0])] for name, kind, default, *_ in stated]
    assert found == expected
    kinds = [type(json.loads(quoted(row[2])[0])).__name__ for row in stated]
    assert kinds == [str(f.type) for f in fields(LoopPolicy)]
    assert all(row[4] for row in stated)


def number(text: str) -> Fraction:
    """Such as ``2^64 − 1`` or ``10^−6``."""
    power, _, less = text.partition(" − ")
    base, _, exponent = power.replace("−", "-").partition("^")
    return Fraction(base) ** int(exponent or 1) - int(less or 0)


def bounded() -> Iterator[tuple[str, str, str, str]]:
    """Field, type, lowest and highest value."""
    for name, kind, _, allowed, _ in rows("policy", "field"):
        if kind in ("int", "float"):
            low, high = allowed.split(" to ")
            yield quoted(name)[0], kind, low, high


@pytest.mark.parametrize(("name", "kind", "low", "high"), bounded())
def test_the_policys_bounds(name: str, kind: str, low: str, high: str) -> None:
    """The bounds are allowed, and nothing beyond; ``high`` may be a field, at most which it is."""
    whole: type = int if kind == "int" else float
    limits = {other: top for other, _, _, top in bounded()}
    least = whole(number(low))
    most = getattr(LoopPolicy(), high.strip("`")) if high[0] == "`" else whole(number(high))
    below = [other for other, top in limits.items() if top == f"`{name}`"]
    for value in (least, most):
        LoopPolicy(**dict.fromkeys([name, *below], value))
    for value in (least - 1, most + 1):
        with pytest.raises(LoopError, match=f"{name} is"):
            LoopPolicy(**dict.fromkeys([name, *below], value))


def test_a_preset_differs_where_the_table_says() -> None:
    stated = {
        quoted(name)[0]: json.loads(quoted(value)[0]) for name, value in rows("presets", "field")
    }
    assert list(PRESETS) == ["dac2024"]
    assert asdict(LoopPolicy()) | stated == asdict(PRESETS["dac2024"])
    assert all(value != asdict(LoopPolicy())[name] for name, value in stated.items())


def test_every_rule_is_stated() -> None:
    assert [quoted(row[0])[0] for row in rows("replacement", "policy")] == list(POLICIES)
    assert {quoted(row[0])[0] for row in rows("asking", "rule")} == set(ASKING) - {"entry"}
    assert set(EXCHANGE_RULES) <= set(re.findall(r"^- `(\w+)`:", section("exchanges"), re.M))


def test_every_reason_is_stated() -> None:
    """Each string that ``replacement`` gives as a reason, and each of ``NotAsked``."""
    calls = [
        node
        for node in ast.walk(ast.parse(MODULES["replacement"].read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Placement", "_drawn")
    ]
    reasons = {
        inner.value
        for call in calls
        for argument in call.args
        for inner in ast.walk(argument)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    }
    assert len(reasons) > 10
    stated = {"replacement": reasons | {ASKED_ABOUT, "too_large"}, "log": get_args(NotAsked)}
    for module, some in stated.items():
        assert [one for one in some if f"`{one}`" not in section(module)] == []


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[LogLine]:
    return life(tmp_path_factory.mktemp("life"))


def events() -> dict[str, tuple[bool, dict[str, str]]]:
    """Of each event whether it is about a set, and the type of each key of its data."""
    stated: dict[str, tuple[bool, dict[str, str]]] = {}
    for names, id, data in rows("log", "event"):
        keys = dict(re.findall(r"`(\w+)` (\[?\w+\]?\??)", data))
        for name in quoted(names):
            about, known = stated.get(name, (id == "yes", {}))
            assert about == (id == "yes"), name
            stated[name] = about, known | keys
    return stated


def test_every_event_is_stated_and_happens(lines: list[LogLine]) -> None:
    assert list(events()) == list(get_args(Event))
    assert {line.event for line in lines} == set(get_args(Event))


@pytest.mark.parametrize("event", get_args(Event))
def test_an_events_data_is_what_the_table_says(event: str, lines: list[LogLine]) -> None:
    """Its keys, their types, and which of them are ever null."""
    about, keys = events()[event]
    data = [line.data for line in lines if line.event == event]
    assert all((line.id is not None) == about for line in lines if line.event == event)
    assert all(set(one) == set(keys) for one in data)
    for key, kind in keys.items():
        values = [one[key] for one in data]
        wrong = [v for v in values if v is not None and not _is(v, kind.rstrip("?"))]
        assert not wrong, f"{event}: {key} is {wrong[0]!r}, not {kind}"
        assert kind.endswith("?") or None not in values, f"{event}: {key} can be null"


def test_what_may_be_null_is(lines: list[LogLine]) -> None:
    """A key is marked where it is null in a line of one of the events of its row."""
    for names, _, data in rows("log", "event"):
        for key, kind in re.findall(r"`(\w+)` (\[?\w+\]?\??)", data):
            values = [line.data[key] for line in lines if line.event in quoted(names)]
            assert (None in values) == kind.endswith("?"), f"{names}: {key}"


def _is(value: Any, kind: str) -> bool:
    if kind != "bool" and isinstance(value, bool):
        return False
    if kind == "[string]" and not all(isinstance(one, str) for one in value):
        return False
    return isinstance(value, KINDS[kind])
