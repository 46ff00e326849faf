"""A study's plan: a TOML file with rows, streams, orderings and what is varied, made into cells.

The keys of a plan:
- ``about``: one sentence; ``streams``: names of datasets and of streams' recipes; ``orderings``:
  how many;
- ``[policy]`` and ``[options]``: of every cell; ``[stream_options.NAME]``: of that stream's;
- ``[rows.NAME]``: one line of the table: ``row`` (a name in ``ROWS``), its own ``policy`` and
  ``options``, and where they differ, its ``streams`` and ``orderings`` (the first so many);
- ``[[vary]]``: the named ``rows`` again with each combination of the listed values;
- ``baseline``: the row that the table shows differences from;
- ``[primary]``: the one contrast that is fixed beforehand; ``[[secondary]]``: others, which are
  corrected for their number.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime_py.loop.errors import LoopError

FOLDER = Path(__file__).resolve().parent / "plans"

Score = Literal["loss", "rouge1", "rougeL", "words"]
_Strict = ConfigDict(extra="forbid", frozen=True)
_Value = Annotated[bool, Field(strict=True)] | Annotated[int, Field(strict=True)] | float | str
_Orderings = Annotated[int, Field(ge=1, le=1000)]
_Names = Annotated[tuple[str, ...], Field(min_length=1)]


class RowPlan(BaseModel):
    """One line of the table."""

    model_config = _Strict

    row: str = "trained"
    policy: dict[str, _Value] = {}
    options: dict[str, _Value] = {}
    streams: _Names | None = None
    orderings: _Orderings | None = None


class VaryPlan(BaseModel):
    """Rows again, with every combination of the values."""

    model_config = _Strict

    rows: _Names
    policy: dict[str, Annotated[tuple[_Value, ...], Field(min_length=1)]] = {}
    options: dict[str, Annotated[tuple[_Value, ...], Field(min_length=1)]] = {}
    streams: _Names | None = None
    orderings: _Orderings | None = None


class PrimaryPlan(BaseModel):
    """``row`` − ``against``, the mean over ``streams``."""

    model_config = _Strict

    row: str
    against: str
    streams: _Names
    score: Score = "loss"


class SecondaryPlan(BaseModel):
    """Every row that is measured beside ``against`` − ``against``, on each stream; ``rows``:
    only these."""

    model_config = _Strict

    against: str
    rows: _Names | None = None
    scores: Annotated[tuple[Score, ...], Field(min_length=1)] = ("loss", "rouge1")


class StudyPlan(BaseModel):
    """The whole file; ``name``: that of the plan or the file."""

    model_config = _Strict

    name: str
    about: str
    streams: _Names
    orderings: _Orderings
    baseline: str = "base"
    policy: dict[str, _Value] = {}
    options: dict[str, _Value] = {}
    stream_options: dict[str, dict[str, _Value]] = {}
    rows: Annotated[dict[str, RowPlan], Field(min_length=1)]
    vary: tuple[VaryPlan, ...] = ()
    primary: PrimaryPlan | None = None
    secondary: tuple[SecondaryPlan, ...] = ()


def plan_names() -> list[str]:
    """Of the plans that ship with attune."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_plan(name: str) -> StudyPlan:
    """A shipped plan by its name, or a TOML file. Raises ``LoopError`` with all misfits."""
    shipped = name in plan_names()
    path = FOLDER / f"{name}.toml" if shipped else Path(name)
    if not path.is_file():
        raise LoopError(
            f"there is no plan {name!r}: give one of {', '.join(plan_names())}, or a TOML file."
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoopError(f"the plan {path} cannot be read: {error.strerror or error}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LoopError(f"the plan {path} is not TOML: {error}.") from None
    return checked_plan({"name": path.stem, **raw}, str(path))


def checked_plan(raw: dict[str, Any], where: str) -> StudyPlan:
    """Raises ``LoopError`` with all misfits; what does not exist is told by ``cells_of``."""
    try:
        return StudyPlan.model_validate(raw)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise LoopError(
            f"the plan {where} cannot be used: {'; '.join(dict.fromkeys(wrong))}. Correct it."
        ) from None
