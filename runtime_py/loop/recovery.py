"""Reads what can still be read of a damaged store into a new one; the damaged file is only read.

Each table is read forwards until it fails, then backwards until it fails, which leaves out what
lies between its first damaged page and its last. SQLite has no checksums: a changed letter inside
a text stays unseen.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_py.loop.errors import LoopError, StoreDamaged
from runtime_py.loop.random_stream import STREAMS
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import Store, open_store, translated
from runtime_py.loop.store_schema import APPLICATION_ID, MIGRATIONS, TABLES, tables_of

_JSON = {"sets": "turns", "job_sets": "turns", "log": "data"}
_NUMBERS = {"sets": ("vector", 4), "tallies": ("sum", 8)}  # bytes, and how many one takes
Row = dict[str, Any]


@dataclass(frozen=True)
class Recovered:
    """``rows`` saved, by table; ``problems``: sentences on what is not as it was."""

    rows: dict[str, int]
    problems: tuple[str, ...]


def recover(path: Path, out: Path, now: Moment) -> Recovered:
    """Writes a new store at ``out`` from what is readable at ``path``."""
    if not path.is_file():
        raise LoopError(f"there is no store at {path}.")
    if out.exists():
        raise LoopError(f"{out} exists already; choose another name for the recovered store.")
    with tempfile.TemporaryDirectory() as scratch:
        tables, problems = _read_all(path, Path(scratch))
    store = open_store(out)
    try:
        rows = _write_all(store, tables, problems, now)
    finally:
        store.close()
    return Recovered(rows, tuple(problems))


def _read_all(path: Path, scratch: Path) -> tuple[dict[str, list[Row]], list[str]]:
    copy = scratch / "copy.sqlite"
    shutil.copyfile(path, copy)
    log = path.with_name(f"{path.name}-wal")
    if log.is_file():
        shutil.copyfile(log, scratch / "copy.sqlite-wal")
    problems: list[str] = []
    if not _has_schema(copy):
        problems.append("the first page was damaged and was taken from an empty store.")
        if not _renew_first_page(copy, scratch):
            raise StoreDamaged(
                f"nothing can be read from {path}: its list of tables is destroyed. Start with a "
                f"new store; the file is left as it is."
            )
    connection = sqlite3.connect(copy)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    try:
        with translated(path):
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise LoopError(
                f"{path} has schema version {version}, this attune reads up to {len(MIGRATIONS)}; "
                f"recover it with the attune that made it, or a newer one."
            )
        tables: dict[str, list[Row]] = {table: [] for table in TABLES}
        for table in tables_of(version):
            tables[table], whole = _read_table(connection, table)
            if not whole:
                problems.append(f"some rows of the table {table} cannot be read.")
    finally:
        connection.close()
    return tables, problems


def _has_schema(copy: Path) -> bool:
    """Whether all tables are there that a store of its version has."""
    connection = sqlite3.connect(copy)
    try:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.DatabaseError:
        return False
    finally:
        connection.close()
    return version > 0 and set(tables_of(version)) <= names


def _renew_first_page(copy: Path, scratch: Path) -> bool:
    """Stores that were made with the same schema have their tables on the same pages, whatever is
    in them. False: it is like no store that was made with any schema."""
    pages = copy.stat().st_size // 4096
    for version in range(len(MIGRATIONS), 0, -1):
        page = bytearray(_empty_store(scratch / f"fresh{version}.sqlite", version)[:4096])
        page[28:32] = pages.to_bytes(4, "big")  # in the file
        page[32:40] = bytes(8)  # no free pages
        page[92:96] = page[24:28]  # so that SQLite trusts the number of pages
        with copy.open("r+b") as file:
            file.write(page)
        if _has_schema(copy):
            return True
    return False


def _empty_store(path: Path, version: int) -> bytes:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        for step, statements in enumerate(MIGRATIONS[:version], start=1):
            connection.execute("BEGIN")
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {step}")
            connection.execute("COMMIT")
    finally:
        connection.close()
    return path.read_bytes()


def _read_table(connection: sqlite3.Connection, table: str) -> tuple[list[Row], bool]:
    try:
        columns = list(connection.execute(f"PRAGMA table_info ({table})"))
        names = [column[1] for column in columns]
        key = [column[1] for column in sorted(columns, key=lambda c: c[5]) if column[5]]
        ordered = connection.execute(f"PRAGMA table_list ({table})").fetchone()[4] == 0
    except sqlite3.DatabaseError:
        return [], False
    order = ["rowid"] if ordered else key
    rows: dict[tuple[Any, ...], Row] = {}
    whole = True
    for direction in ("ASC", "DESC"):
        by = ", ".join(f"{column} {direction}" for column in order)
        reader = _until_damage(connection, f"SELECT * FROM {table} ORDER BY {by}")
        for values in reader:
            if values is None:
                whole = False
                break
            row = dict(zip(names, values, strict=True))
            rows[tuple(row[column] for column in key)] = row
        if whole:
            break
    return list(rows.values()), whole


def _until_damage(connection: sqlite3.Connection, sql: str) -> Iterator[tuple[Any, ...] | None]:
    """The rows of a query; None where it fails."""
    try:
        yield from connection.execute(sql)
    except sqlite3.DatabaseError:
        yield None


def _write_all(
    store: Store, tables: dict[str, list[Row]], problems: list[str], now: Moment
) -> dict[str, int]:
    store.execute("PRAGMA foreign_keys = OFF")  # what lost its parent is removed below
    with store.transaction(durable=True):
        for table in TABLES:
            for row in tables[table]:
                if not _is_sound(table, row):
                    problems.append(f"a row of the table {table} was damaged and is left out.")
                    continue
                names = ", ".join(row)
                marks = ", ".join("?" * len(row))
                sql = f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})"
                store.execute(sql, *row.values())
        store.execute("INSERT OR IGNORE INTO adapters (number, state) VALUES (0, 'kept')")
        while orphans := store.rows("PRAGMA foreign_key_check"):
            for table in sorted({row[0] for row in orphans}):
                problems.append(f"rows of the table {table} belonged to something lost.")
                _delete_orphans(store, table, orphans)
        _repair_counters(store, problems)
        snapshot = {
            str(bin): {"id": id, "number": n, "eoe": e, "dss": d, "idd": i, "domain": domain}
            for bin, id, e, d, i, domain, n in store.rows(
                "SELECT bin, id, eoe, dss, idd, domain, number FROM sets ORDER BY bin"
            )
        }
        store.append(now, "recovered", None, {"bins": snapshot, "problems": problems})
    store.execute("PRAGMA foreign_keys = ON")
    return {table: store.rows(f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}


def _delete_orphans(store: Store, table: str, orphans: list[tuple[Any, ...]]) -> None:
    if table in ("learnt", "job_sets"):  # WITHOUT ROWID: the check does not say which row
        parent, column = ("adapters", "adapter") if table == "learnt" else ("jobs", "job")
        store.execute(f"DELETE FROM {table} WHERE {column} NOT IN (SELECT number FROM {parent})")
        return
    for name, rowid, _, _ in orphans:
        if name == table:
            store.execute(f"DELETE FROM {table} WHERE rowid = ?", rowid)


def _is_sound(table: str, row: Row) -> bool:
    if table in _NUMBERS:
        column, size = _NUMBERS[table]
        if not isinstance(row[column], bytes) or len(row[column]) % size:
            return False
    if table in _JSON:
        try:
            json.loads(row[_JSON[table]])
        except (TypeError, json.JSONDecodeError):
            return False
    return True


def _repair_counters(store: Store, problems: list[str]) -> None:
    """Numbers that must never be given twice are at least what the rows show."""
    least = {
        "observed": "SELECT max (coalesce (json_extract (data, '$.number'), 0)) FROM log "
        "WHERE event IN ('kept', 'refused')",
        "answered": "SELECT max (number) FROM annotations",
        "jobs": "SELECT max (coalesce (json_extract (data, '$.job'), 0)) FROM log",
    }
    for name, sql in least.items():
        shown = max(
            store.rows(sql)[0][0] or 0,
            (store.rows("SELECT max (number) FROM sets")[0][0] or 0) if name == "observed" else 0,
        )
        if shown > store.count(name):
            problems.append(f"the counter {name} was behind, and is {shown} now.")
            store.set_count(name, shown)
    active = store.count("active_adapter")
    if not store.rows("SELECT 1 FROM adapters WHERE number = ?", active):
        problems.append(f"the active adapter {active} is lost; the bundle's own is active.")
        store.set_count("active_adapter", 0)
    lost = set(STREAMS) - {row[0] for row in store.rows("SELECT name FROM streams")}
    if lost - {"asking"} or (lost and store.counts().get("asking_day") is not None):
        problems.append("a random stream is lost; it starts anew from the policy's seed.")
