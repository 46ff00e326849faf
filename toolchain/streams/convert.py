"""Converts files of chats to attune's own: a dialogue a line, its id and the turns of two.

What is left out, and why, is counted: nothing is dropped in silence. docs/streams.md has the rules.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from runtime_py.loop.dialogue import Dialogue, Turn, check, check_id
from runtime_py.loop.errors import LoopError
from runtime_py.loop.files import replacing
from toolchain.streams.convert_formats import FORMATS, Format, Message, Speakers, Unusable, fitting
from toolchain.streams.convert_rows import Raw, named, read_rows_of
from toolchain.streams.convert_table import ROWS, conversations
from toolchain.streams.convert_turns import observed

AUTO = "auto"
ENDINGS = (".jsonl", ".jsonl.gz")
_SAMPLE = 1000  # rows that tell the format
_IDS = ("id", "conversationid", "dialogueid", "dialogid", "chatid", "promptid", "uuid")
_SAME = "the same dialogue once more"
IDS = "ids made, for there was none, or another dialogue has it"


@dataclass(frozen=True)
class Dropped:
    """How many rows or conversations for one reason; ``first``: the place of the first."""

    count: int
    first: str


@dataclass
class Conversion:
    """``read`` = ``written`` and all that is in ``dropped``; ``changed``: what was left out of, or
    done to, the dialogues that were written, and how often."""

    format: str
    container: str
    read: int = 0
    written: int = 0
    turns: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    changed: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, place: str) -> None:
        known = self.dropped.get(reason)
        self.dropped[reason] = Dropped(known.count + 1, known.first) if known else Dropped(1, place)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "container": self.container,
            "read": self.read,
            "written": self.written,
            "turns": self.turns,
            "dropped": [
                {"reason": reason, "count": one.count, "first": one.first}
                for reason, one in self.dropped.items()
            ],
            "changed": dict(self.changed),
        }


def convert(
    source: Path,
    out: Path,
    *,
    form: str = AUTO,
    force: bool = False,
    speakers: Speakers | None = None,
    told: Callable[[int], None] | None = None,
) -> Conversion:
    """Writes ``out`` whole or not at all. ``form``: one of ``FORMATS``, or ``AUTO``; ``force``:
    what is at ``out`` is replaced, but never ``source``; ``told``: gets how many bytes are read.

    Raises ``LoopError`` where ``source`` cannot be read, is of no known format, or has no dialogue.
    """
    _check_paths(source, out, force)
    read = read_rows_of(source, lambda fields: bool(fitting(fields)), form == "pairs", told)
    sample = list(islice(read.rows, _SAMPLE))
    name = _chosen(source, form, sample)
    result = Conversion(name, read.container)
    rows: Iterable[Raw] = chain(sample, read.rows)
    with replacing(out) as beside:
        with beside.open("wb") as file:
            lines = _lines(rows, FORMATS[name], speakers or Speakers(), result)
            if out.suffix == ".gz":
                with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                    packed.writelines(lines)
            else:
                file.writelines(lines)
        if not result.written:
            raise LoopError(_nothing(source, result))
    return result


def _check_paths(source: Path, out: Path, force: bool) -> None:
    if not source.exists():
        raise LoopError(f"there is no file {source}; expected chats in JSON, JSON lines or CSV.")
    if not out.name.endswith(ENDINGS):
        raise LoopError(f"{out} is no name for a stream: end it in .jsonl or .jsonl.gz.")
    if out.exists() and out.samefile(source):
        raise LoopError(f"{out} is what is read: choose another name for what is written.")
    if out.exists() and not force:
        raise LoopError(f"{out} exists already: choose another name, or replace it by --force.")


def _chosen(source: Path, form: str, sample: list[Raw]) -> str:
    """The format that most rows are of; of two, the one that stands first in ``FORMATS``."""
    counts = Counter(name for row in sample for name in fitting(row.fields)[:1])
    counts = Counter({name: counts[name] for name in FORMATS if counts[name]})
    if form == AUTO and counts:
        return counts.most_common(1)[0][0]
    if form != AUTO and any(FORMATS[form].fits(row.fields) for row in sample):
        return form
    sound = next((row for row in sample if not row.problem), None)
    if sound is None:
        raise LoopError(
            f"{source} has no row that can be read; {sample[0].place} is {sample[0].problem}."
            if sample
            else f"{source} has no rows; expected chats."
        )
    has = ", ".join(sound.fields) or "nothing"
    if form != AUTO:
        other = f" It looks like {counts.most_common(1)[0][0]}." if counts else ""
        raise LoopError(
            f"no row of {source} is {form} ({FORMATS[form].what}): {sound.place} has {has}.{other}"
        )
    raise LoopError(
        f"{source} is of no format that is known: {sound.place} has {has}. Expected "
        f"{'; '.join(f'{one.what} ({name})' for name, one in FORMATS.items())}. Rename the keys or "
        f"columns; two columns of questions and answers without a header are --from pairs."
    )


def _lines(
    rows: Iterable[Raw], form: Format, speakers: Speakers, result: Conversion
) -> Iterator[bytes]:
    """What is written, and counts it in ``result``."""
    seen: dict[str, bytes] = {}
    for row in conversations(rows, form.fits) if form.tabular else rows:
        result.read += 1
        try:
            turns, changed = observed(_messages(row, form, speakers))
            id = _id(row, turns, seen, changed)
        except Unusable as error:
            result.drop(str(error), row.place)
            continue
        dialogue = check(Dialogue(id, turns))
        seen[id] = _digest(turns)
        result.written += 1
        result.turns += len(turns)
        result.changed += changed
        said = [{"role": turn.role, "content": turn.content} for turn in dialogue.turns]
        yield json.dumps({"id": id, "turns": said}, ensure_ascii=False).encode() + b"\n"


def _messages(row: Raw, form: Format, speakers: Speakers) -> list[Message]:
    if row.problem:
        raise Unusable(row.problem)
    if ROWS in row.fields and form.tabular:
        return [one for each in row.fields[ROWS] for one in form.read(each, speakers)]
    if not form.fits(row.fields):
        raise Unusable(f"not {form.what}")
    return form.read(row.fields, speakers)


def _id(row: Raw, turns: tuple[Turn, ...], seen: dict[str, bytes], changed: Counter[str]) -> str:
    """The row's own, or one that is made of the turns: the same for the same turns."""
    digest = _digest(turns)
    own = next((row.fields[key] for key in _IDS if row.fields.get(key) not in (None, "")), None)
    try:
        id = check_id(str(own) if isinstance(own, str | int) else None)
    except LoopError:
        id = ""
    if id and seen.get(id) in (None, digest):
        made = id
    else:
        made = _made(digest, seen)
        changed[IDS] += 1
    if seen.get(made) == digest:
        raise Unusable(_SAME)
    return made


def _made(digest: bytes, seen: dict[str, bytes]) -> str:
    """As short as no other dialogue's."""
    lengths = range(16, 2 * len(digest) + 1)
    return next(id for id in (digest.hex()[:n] for n in lengths) if seen.get(id) in (None, digest))


def _digest(turns: tuple[Turn, ...]) -> bytes:
    said = json.dumps([[turn.role, turn.content] for turn in turns])
    return hashlib.sha256(said.encode()).digest()


def _nothing(source: Path, result: Conversion) -> str:
    reasons = sorted(result.dropped.items(), key=lambda item: -item[1].count)
    why = "; ".join(f"{one.count:,} × {reason} (first {one.first})" for reason, one in reasons[:20])
    names = any(named(reason).startswith("therole") for reason in result.dropped)
    help = " --user-name and --assistant-name say whose turns are whose." * names
    return f"no dialogue of {source} can be used, read as {result.format}: {why}.{help}"
