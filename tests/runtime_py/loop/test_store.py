"""The store: one owner, whole transactions, migrations, damage, a full disk, recovery."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from runtime_py.loop import store_schema
from runtime_py.loop.errors import DiskFull, LoopError, StoreBusy, StoreDamaged
from runtime_py.loop.log import replay
from runtime_py.loop.personalizer import STORE
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.records import annotated_sets
from runtime_py.loop.recovery import recover
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import open_store
from runtime_py.loop.store_schema import MIGRATIONS, TABLES, tables_of
from tests.runtime_py.loop.toy import NIGHT, ToyTuner, dialogue, open_toy, small_policy

NOW = Moment(1.0, 0)


def test_a_transaction_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    store = open_store(path)
    with store.transaction():
        store.set_count("a", 1)

    def fail() -> None:
        with store.transaction():
            store.set_count("a", 2)
            store.append(NOW, "x", None, {})
            store.execute("INSERT INTO counters VALUES ('b', NULL)")

    with pytest.raises(LoopError, match="NOT NULL"):
        fail()
    assert (store.count("a"), store.log()) == (1, [])
    store.close()
    again = open_store(path)
    assert again.counts() == {"a": 1}
    again.close()


def test_streams_go_on_where_they_were(tmp_path: Path) -> None:
    store = open_store(tmp_path / "a.sqlite")
    top = SplitMix64(2**64 - 1)
    with store.transaction():
        store.save_stream("s", top)
    assert store.stream("s") == top
    with pytest.raises(StoreDamaged, match="no random stream 'none'"):
        store.stream("none")
    store.close()


def test_the_log_is_append_only(tmp_path: Path) -> None:
    store = open_store(tmp_path / "a.sqlite")
    with store.transaction():
        store.append(NOW, "x", "id", {"a": 0.1})
    assert store.log()[0].data == {"a": 0.1}
    for sql in ("DELETE FROM log", "UPDATE log SET event = 'y'"):
        with pytest.raises(LoopError, match="append-only"), store.transaction():
            store.execute(sql)
    store.close()


def test_a_second_process_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    store = open_store(path)
    with pytest.raises(StoreBusy, match="open in another process; one at a time"):
        open_store(path)
    code = (
        "from pathlib import Path; from runtime_py.loop.store import open_store\n"
        f"open_store(Path({str(path)!r}))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "StoreBusy" in child.stderr
    store.close()
    open_store(path).close()


def test_a_killed_process_frees_the_store(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    code = (
        "import os, signal; from pathlib import Path\n"
        "from runtime_py.loop.store import open_store\n"
        f"store = open_store(Path({str(path)!r}))\n"
        "with store.transaction(): store.set_count('a', 5)\n"
        "with store.transaction():\n store.set_count('a', 6); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    store = open_store(path)
    assert store.count("a") == 5
    store.close()


def test_a_newer_store_is_refused_and_left(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    open_store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LoopError, match="schema version 99, this attune reads up to 2; use the"):
        open_store(path)
    assert path.read_bytes() == before


def test_another_applications_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (a)")
    connection.close()
    with pytest.raises(LoopError, match="not one of attune's"):
        open_store(path)


def test_migrations_run_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.sqlite"
    store = open_store(path)
    with store.transaction():
        store.set_count("kept", 3)
    store.close()
    steps = (
        *MIGRATIONS,
        ("ALTER TABLE questions ADD COLUMN note TEXT", "UPDATE counters SET value = value + 1"),
    )
    monkeypatch.setattr("runtime_py.loop.store.MIGRATIONS", steps)
    for _ in range(2):
        store = open_store(path)
        assert store.rows("PRAGMA user_version") == [(len(steps),)]
        assert store.count("kept") == 4
        store.rows("SELECT note FROM questions")
        store.close()


def test_a_migration_that_fails_leaves_the_old_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.sqlite"
    open_store(path).close()
    steps = (*MIGRATIONS, ("CREATE TABLE extra (a)", "nonsense"))
    with monkeypatch.context() as patch:
        patch.setattr("runtime_py.loop.store.MIGRATIONS", steps)
        with pytest.raises(LoopError, match="cannot be used"):
            open_store(path)
    store = open_store(path)
    assert store.rows("SELECT name FROM sqlite_schema WHERE name = 'extra'") == []
    store.close()


def test_every_table_is_listed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "a.sqlite")
    made = {row[0] for row in store.rows("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    assert made - {"sqlite_sequence"} == set(TABLES) == set(store_schema.TABLES)
    store.close()


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A store with a history: sets, answers, synthetic pairs, an adapter, an unfinished job."""
    tuner = ToyTuner()
    with open_toy(tmp_path, small_policy(bins=16, every=15), tuner=tuner) as app:
        for number in range(40):
            app.observe(dialogue(number, exchanges=1 + number % 3))
            for question in app.pending_questions():
                app.answer(question.id, f"walk to {question.dialogue.answer}")
            tuner.halt = number == 29
            if number in (14, 29):
                app.fine_tune(NIGHT)
        assert app.status().job is not None
        assert app.status().adapter == 1
        assert app.lost() == ()
    return tmp_path / "state" / STORE


def opened(path: Path, root: Path) -> tuple[dict[int, str], tuple[str, ...], int]:
    """The store at ``path`` in use: what it holds, what it lost, and how many it observed."""
    target = root / "state" / STORE
    target.unlink(missing_ok=True)
    path.rename(target)
    with open_toy(root, small_policy(bins=16, every=15)) as app:
        app.observe(dialogue(1000))
        held = {bin: entry.id for bin, entry in replay(app.store.log()).items()}
        rows = dict(app.store.rows("SELECT bin, id FROM sets"))
        assert held == rows
        return held, app.lost(), app.status().observed


def test_recovering_a_sound_store_changes_nothing(used: Path, tmp_path: Path) -> None:
    before = used.read_bytes()
    report = recover(used, tmp_path / "new.sqlite", NOW)
    assert report.problems == ()
    assert used.read_bytes() == before
    for table in set(TABLES) - {"log"}:
        paths = (used, tmp_path / "new.sqlite")
        with closing(sqlite3.connect(paths[0])) as old, closing(sqlite3.connect(paths[1])) as new:
            sql = f"SELECT * FROM {table} ORDER BY 1, 2"
            assert old.execute(sql).fetchall() == new.execute(sql).fetchall()
    _, lost, observed = opened(tmp_path / "new.sqlite", tmp_path)
    assert (lost, observed) == ((), 41)


def test_a_destroyed_first_page_loses_nothing(used: Path, tmp_path: Path) -> None:
    raw = bytearray(used.read_bytes())
    raw[:4096] = b"\xaa" * 4096
    used.write_bytes(raw)
    with pytest.raises(StoreDamaged, match=r"left as it is. Recover what can be read with attune"):
        open_store(used)
    assert used.read_bytes() == raw
    report = recover(used, tmp_path / "new.sqlite", NOW)
    assert "first page" in report.problems[0]
    _, lost, observed = opened(tmp_path / "new.sqlite", tmp_path)
    assert (lost, observed) == ((), 41)


def test_any_destroyed_page_leaves_the_rest(used: Path, tmp_path: Path) -> None:
    whole = used.read_bytes()
    pages = len(whole) // 4096
    saved = 0
    for page in range(1, pages):
        raw = bytearray(whole)
        raw[page * 4096 : (page + 1) * 4096] = b"\xaa" * 4096
        used.write_bytes(raw)
        out = tmp_path / "new.sqlite"
        try:
            recover(used, out, NOW)
        except StoreDamaged:  # a page of the list of tables
            continue
        saved += 1
        root = tmp_path / f"page{page}"
        (root / "state").mkdir(parents=True)
        opened(out, root)
    assert saved >= pages - 4


def test_recover_refuses_what_it_cannot_do(used: Path, tmp_path: Path) -> None:
    with pytest.raises(LoopError, match="there is no store"):
        recover(tmp_path / "none", tmp_path / "new", NOW)
    with pytest.raises(LoopError, match="exists already"):
        recover(used, used, NOW)
    junk = tmp_path / "junk"
    junk.write_bytes(os.urandom(20_000))
    with pytest.raises(StoreDamaged, match="nothing can be read"):
        recover(junk, tmp_path / "new", NOW)
    with pytest.raises(StoreDamaged):
        open_store(junk)


def make_older(used: Path) -> None:
    """The store as the first schema had it."""
    old = used.with_name("old.sqlite")
    with closing(sqlite3.connect(used)) as new, closing(sqlite3.connect(old)) as connection:
        for statement in MIGRATIONS[0]:
            connection.execute(statement)
        for table in tables_of(1):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info ({table})")]
            names, marks = ", ".join(columns), ", ".join("?" * len(columns))
            for row in new.execute(f"SELECT {names} FROM {table}").fetchall():
                connection.execute(f"INSERT INTO {table} VALUES ({marks})", row)
        connection.execute("DELETE FROM meta WHERE key = 'directions'")
        connection.execute("DELETE FROM streams WHERE name = 'asking'")
        connection.execute("DELETE FROM counters WHERE name = 'asking_day'")
        connection.execute(f"PRAGMA application_id = {store_schema.APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
        connection.commit()
    for path in used.parent.glob(f"{used.name}*"):
        path.unlink()
    old.rename(used)


def test_a_store_of_the_first_schema_opens(used: Path, tmp_path: Path) -> None:
    def later() -> Moment:
        return Moment(1000.0, 9)

    with open_toy(tmp_path, small_policy("fifo", bins=16, every=15), clock=later) as app:
        app.observe(dialogue(500))
        before = annotated_sets(app.store)
        stored = app.status().stored
        asked = [question.id for question in app.pending_questions()]
    assert asked
    make_older(used)
    with open_toy(tmp_path, small_policy("fifo", bins=16, every=15), clock=later) as app:
        assert app.store.rows("PRAGMA user_version") == [(len(MIGRATIONS),)]
        assert app.lost() == ()
        assert annotated_sets(app.store) == before
        events = [line.event for line in app.store.log()]
        assert events[-2:] == ["streams_restarted", "tallies_restarted"]
        assert app.store.stream("asking").state == small_policy().seed + 3
        assert app.store.rows("SELECT sum (sets) FROM tallies WHERE kind = 'observed'") == [
            (stored,)
        ]
        questions = app.pending_questions()
        assert [question.id for question in questions] == asked
        assert all(q.exchange == q.dialogue.exchanges - 1 for q in questions)
        app.answer(asked[0], "walk")
        assert app.observe(dialogue(501)).number == 42


@pytest.mark.parametrize("opened_since", [False, True])
def test_a_damaged_store_of_the_first_schema_is_recovered(
    used: Path, tmp_path: Path, opened_since: bool
) -> None:
    make_older(used)
    if opened_since:  # its new tables lie behind its rows
        open_toy(tmp_path, small_policy(bins=16, every=15)).close()
    whole = used.read_bytes()
    assert recover(used, tmp_path / "new.sqlite", NOW).problems == ()
    raw = bytearray(whole)
    raw[:4096] = b"\xaa" * 4096
    used.write_bytes(raw)
    report = recover(used, tmp_path / "newer.sqlite", NOW)
    assert report.problems == ("the first page was damaged and was taken from an empty store.",)
    _, lost, observed = opened(tmp_path / "newer.sqlite", tmp_path)
    assert (lost, observed) == ((), 41)


def test_lost_tallies_begin_anew(used: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(used)) as connection:
        connection.execute("DELETE FROM tallies WHERE domain = 'food'")
        connection.commit()
    with open_toy(tmp_path, small_policy(bins=16, every=15)) as app:
        assert app.store.log()[-1].event == "tallies_restarted"
        stored = app.status().domains
        rows = dict(
            app.store.rows("SELECT domain, sets FROM tallies WHERE kind = 'observed' AND sets > 0")
        )
        assert rows == stored


@pytest.mark.parametrize("value", ["7", "'text'", "x'0102'"])
def test_damaged_tallies_begin_anew(used: Path, tmp_path: Path, value: str) -> None:
    with closing(sqlite3.connect(used)) as connection:
        connection.execute(f"UPDATE tallies SET sum = {value} WHERE domain = 'food'")
        connection.commit()
    report = recover(used, tmp_path / "new.sqlite", NOW)
    assert report.problems == ("a row of the table tallies was damaged and is left out.",) * 2
    assert opened(tmp_path / "new.sqlite", tmp_path)[1:] == ((), 41)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this system does not let a small disk be mounted")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_told_and_nothing_is_lost(small_disk: Path) -> None:
    with open_toy(small_disk) as app:
        seen = 0
        full = ""
        while not full:
            try:
                app.observe(dialogue(seen))
                seen += 1
            except DiskFull as error:
                full = str(error)
        assert "nothing before it is lost. Free some space and try again" in full
        assert app.status().observed == seen
        assert app.lost() == ()
        held = {bin: entry.id for bin, entry in replay(app.store.log()).items()}
        assert held == dict(app.store.rows("SELECT bin, id FROM sets"))
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    with open_toy(small_disk) as app:
        assert app.status().observed == seen
        assert app.observe(dialogue(seen)).number == seen + 1
