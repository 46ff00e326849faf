"""The store: one SQLite file, its transactions, and what can be wrong with it, in sentences."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime_py.loop.errors import DiskFull, LoopError, StoreBusy, StoreDamaged
from runtime_py.loop.log import Event, LogLine
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store_schema import APPLICATION_ID, MIGRATIONS

PATIENCE_S = 1.0  # how long to wait for a process that is just ending
_DAMAGED = {"SQLITE_CORRUPT", "SQLITE_NOTADB"}


class Store:
    """An open store. Everything that changes it runs inside ``with store.transaction():``."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self, durable: bool = False) -> Iterator[None]:
        """All of it is written, or nothing.

        ``durable``: not even a loss of power can take it back. Else only a loss of power can, and
        then whole transactions, the latest first.
        """
        with translated(self.path):
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:  # something above was raised
                    self._connection.execute("ROLLBACK")

    def execute(self, sql: str, *values: object) -> int:
        """The number of rows that it changed."""
        with translated(self.path):
            return self._connection.execute(sql, values).rowcount

    def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with translated(self.path):
            return self._connection.execute(sql, values).fetchall()

    def meta(self, key: str) -> str | None:
        rows = self.rows("SELECT value FROM meta WHERE key = ?", key)
        return rows[0][0] if rows else None

    def set_meta(self, key: str, value: str) -> None:
        self.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)

    def count(self, name: str) -> int:
        """A counter, 0 where it was never set."""
        rows = self.rows("SELECT value FROM counters WHERE name = ?", name)
        return rows[0][0] if rows else 0

    def counts(self) -> dict[str, int]:
        return dict(self.rows("SELECT name, value FROM counters"))

    def set_count(self, name: str, value: int) -> None:
        self.execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", name, value)

    def add(self, name: str, amount: int = 1) -> None:
        self.set_count(name, self.count(name) + amount)

    def stream(self, name: str) -> SplitMix64:
        """A copy of a stored random stream, to draw from; ``save_stream`` makes it count."""
        rows = self.rows("SELECT state FROM streams WHERE name = ?", name)
        if not rows:
            raise StoreDamaged(
                f"the store {self.path} has no random stream {name!r}; it is left as it is. "
                f"Recover it with attune store recover."
            )
        return SplitMix64(int(rows[0][0], 16))

    def save_stream(self, name: str, stream: SplitMix64) -> None:
        self.execute("INSERT OR REPLACE INTO streams VALUES (?, ?)", name, f"{stream.state:016x}")

    def append(self, now: Moment, event: Event, id: str | None, data: dict[str, Any]) -> None:
        """One line of the log."""
        text = json.dumps(data, ensure_ascii=False, sort_keys=True)
        self.execute(
            "INSERT INTO log (seconds, day, event, id, data) VALUES (?, ?, ?, ?, ?)",
            now.seconds,
            now.day,
            event,
            id,
            text,
        )

    def log(self, after: int = 0) -> list[LogLine]:
        """The log's lines with a number greater than ``after``, in order."""
        rows = self.rows("SELECT * FROM log WHERE seq > ? ORDER BY seq", after)
        return [
            LogLine(seq, seconds, day, event, id, json.loads(data))
            for seq, seconds, day, event, id, data in rows
        ]

    def scrub(self) -> None:
        """Takes deleted text out of the write-ahead log too; the file itself has it zeroed."""
        self.rows("PRAGMA wal_checkpoint (TRUNCATE)")


def open_store(path: Path) -> Store:
    """Opens or makes a store, brings it to the newest schema, and holds it for this process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoopError(f"the folder {path.parent} cannot be made: {error.strerror}.") from None
    with translated(path):
        connection = sqlite3.connect(path, timeout=PATIENCE_S, isolation_level=None)
    try:
        with translated(path):
            _prepare(path, connection)
    except LoopError:
        connection.close()
        raise
    return Store(path, connection)


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    # Exclusive mode before the first access: the lock is then held until the process ends, by
    # whatever signal, and no file for shared memory is needed.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if (version or tables) and application != APPLICATION_ID:
        raise LoopError(
            f"{path} is a SQLite file, but not one of attune's; choose another path for the store."
        )
    if version > len(MIGRATIONS):
        raise LoopError(
            f"the store {path} has schema version {version}, this attune reads up to "
            f"{len(MIGRATIONS)}; use the attune that made it, or a newer one."
        )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten
    for step in range(version, len(MIGRATIONS)):
        connection.execute("BEGIN EXCLUSIVE")
        for statement in MIGRATIONS[step]:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {step + 1}")
        connection.execute("COMMIT")
    connection.execute("BEGIN EXCLUSIVE")  # takes the lock, also where nothing is written
    connection.execute("COMMIT")
    problems = [row[0] for row in connection.execute("PRAGMA quick_check (3)")]
    if problems != ["ok"]:
        raise _damaged(path, "; ".join(line.replace("\n", " ") for line in problems))


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as sentences about the store at ``path``."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.split("_")[1:2] == ["BUSY"] or name.startswith("SQLITE_LOCKED"):
            raise StoreBusy(
                f"the store {path} is open in another process; one at a time can use it. End the "
                f"other one, or choose another store."
            ) from None
        if name == "SQLITE_FULL":
            raise DiskFull(
                f"no space is left for the store {path}; the last change was not made, and nothing "
                f"before it is lost. Free some space and try again."
            ) from None
        if any(name.startswith(damage) for damage in _DAMAGED):
            raise _damaged(path, str(error)) from None
        raise LoopError(f"the store {path} cannot be used: {error} ({name}).") from error


def _damaged(path: Path, reason: str) -> StoreDamaged:
    return StoreDamaged(
        f"the store {path} is damaged ({reason}); it is left as it is. Recover what can be read "
        f"with attune store recover {path}."
    )
