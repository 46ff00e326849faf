"""What a stream is made of: which datasets, how many of each, in what order, and what junk."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime_py.loop.errors import LoopError
from toolchain.streams.chance import apportioned
from toolchain.streams.dataset import Rows

FOLDER = Path(__file__).resolve().parent / "recipes"
ENDINGS = (".jsonl.gz", ".jsonl")
KINDS = ("greetings", "acknowledgements", "gibberish", "near_duplicates")

_Count = Annotated[int, Field(ge=0, strict=True)]
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StreamSource(BaseModel):
    """A dataset: ``file`` within the data folder; ``observed`` of its dialogues are in the stream,
    and ``test`` others are kept for tests. ``weights``: with the order ``drift``, in place of
    ``observed``, how often it is drawn at points that are spaced evenly along the stream, linear
    between two of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    observed: _Count = 0
    test: _Count = 0
    weights: tuple[_Weight, ...] = ()

    @property
    def name(self) -> str:
        return dataset_name(self.file)


class Junk(BaseModel):
    """How many dialogues of each kind are strewn into the stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    greetings: _Count = 0
    acknowledgements: _Count = 0
    gibberish: _Count = 0
    near_duplicates: _Count = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """In the order of ``KINDS``."""
        return tuple(getattr(self, kind) for kind in KINDS)


class Recipe(BaseModel):
    """``order``: ``blocks``, one source after the other or, with ``block_length``, each cut into
    blocks of so many whose order is drawn; ``mixed``, in an order that is drawn; ``drift``,
    ``observed`` dialogues by the sources' weights. ``rows``: those of the datasets that may be
    taken. ``seed``: where the caller has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    order: Literal["blocks", "mixed", "drift"]
    sources: Annotated[tuple[StreamSource, ...], Field(min_length=1)]
    junk: Junk = Junk()
    rows: Rows = "all"
    seed: Annotated[int, Field(ge=0, lt=1 << 64, strict=True)] = 0
    observed: _Count = 0
    block_length: _Count = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        files = [source.file for source in self.sources]
        wrong = [f"{file} stands twice" for file in dict.fromkeys(files) if files.count(file) > 1]
        if self.block_length and self.order != "blocks":
            wrong.append(f"block_length belongs to the order blocks, not {self.order}")
        wrong += self._drift_misfits() if self.order == "drift" else self._count_misfits()
        if not wrong and not self.total:
            wrong.append("the stream has no dialogue")
        if self.junk.near_duplicates and self.total == sum(self.junk.counts):
            wrong.append("near_duplicates needs dialogues to be made from")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _count_misfits(self) -> list[str]:
        wrong = [f"{s.file} has weights, which only drift has" for s in self.sources if s.weights]
        if self.observed:
            wrong.append("observed stands with each source, unless the order is drift")
        return wrong

    def _drift_misfits(self) -> list[str]:
        wrong = [
            f"{s.file} has observed, which drift takes from the weights"
            for s in self.sources
            if s.observed
        ]
        points = {len(source.weights) for source in self.sources}
        if len(points) != 1 or min(points) < 1:
            wrong.append("every source of a drift needs as many weights, at least one")
        elif empty := [
            str(place + 1)
            for place in range(min(points))
            if not any(source.weights[place] for source in self.sources)
        ]:
            wrong.append(f"all weights are 0 at point {', '.join(empty)}")
        return wrong

    @property
    def total(self) -> int:
        """Dialogues of the stream, junk included."""
        real = self.observed if self.order == "drift" else sum(s.observed for s in self.sources)
        return real + sum(self.junk.counts)

    @property
    def tests(self) -> int:
        return sum(source.test for source in self.sources)

    def scaled(self, observed: int | None = None, tests: int | None = None) -> Recipe:
        """With so many dialogues in all, junk included, and so many tests, every part in
        proportion; None: as they are."""
        drift = self.order == "drift"
        parts = [self.observed] if drift else [source.observed for source in self.sources]
        wanted = self.total if observed is None else observed
        counts = apportioned(wanted, [*parts, *self.junk.counts])
        junk = Junk(**dict(zip(KINDS, counts[len(parts) :], strict=True)))
        shares = apportioned(self.tests if tests is None else tests, [s.test for s in self.sources])
        sources = tuple(
            source.model_copy(
                update={"test": share} if drift else {"test": share, "observed": count}
            )
            for source, share, count in zip(
                self.sources, shares, [0] * len(shares) if drift else counts[: len(parts)],
                strict=True,
            )
        )  # fmt: skip
        whole = {"sources": sources, "junk": junk, "observed": counts[0] if drift else 0}
        return checked({**dict(self), **whole}, f"{self.title}, scaled,")


def dataset_name(file: str) -> str:
    """``dolly`` of ``dev/dolly.jsonl.gz``."""
    name = Path(file).name
    return next((name.removesuffix(end) for end in ENDINGS if name.endswith(end)), name)


def checked(fields: Mapping[str, object], where: str) -> Recipe:
    """Raises ``LoopError`` with all misfits."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".lstrip(": ")
            for e in error.errors()
        )
        raise LoopError(f"the recipe {where} cannot be used: {wrong}. Correct it.") from None


def recipe_names() -> list[str]:
    """Of those that ship with attune."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_recipe(name: str, data: Path) -> Recipe:
    """A recipe that ships with attune, or a single dataset of the folder ``data`` by its name: 800
    dialogues and 200 tests. Raises ``LoopError``."""
    if name in recipe_names():
        return read_recipe(FOLDER / f"{name}.toml")
    files = dataset_files(data)
    if name in files:
        return single(files[name])
    raise LoopError(
        f"there is no recipe {name!r}; known are {', '.join(recipe_names())}, and the single "
        f"datasets of {data}: {', '.join(files) or 'none'}. Or give a file by --recipe."
    )


def dataset_files(data: Path) -> dict[str, str]:
    """The datasets in a folder and the folders in it, by name: their files within it."""
    found: dict[str, str] = {}
    for path in sorted(data.rglob("*")):
        if path.name.endswith(ENDINGS) and path.is_file():
            file = path.relative_to(data).as_posix()
            found.setdefault(dataset_name(file), file)
    return found


def single(file: str, observed: int = 800, test: int = 200, rows: Rows = "judging") -> Recipe:
    """One dataset alone."""
    name = dataset_name(file)
    source = {"file": file, "observed": observed, "test": test}
    fields = {"title": name, "order": "blocks", "rows": rows, "sources": [source]}
    return checked(fields, f"of {file}")


def read_recipe(path: Path) -> Recipe:
    """From a TOML file. Raises ``LoopError``."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoopError(f"there is no recipe {path}; expected a TOML file.") from None
    except OSError as error:
        raise LoopError(f"the recipe {path} cannot be read: {error.strerror or error}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LoopError(f"the recipe {path} is not TOML: {error}.") from None
    return checked(fields, str(path))
