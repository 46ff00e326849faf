"""Files and folders are there whole or not at all, whatever stops their writer and wherever."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime_py.loop.adapter_versions import Versions
from runtime_py.loop.errors import DiskFull, WriteError
from runtime_py.loop.files import replacing, sha256, write_bytes

ROOT = Path(__file__).parents[3]
Write = Callable[[Path, str], None]


def write_file(path: Path, content: str) -> None:
    with replacing(path) as beside:
        beside.write_text(content)


def write_folder(path: Path, content: str) -> None:
    with replacing(path) as beside:
        beside.mkdir()
        (beside / "a").write_text(content)
        (beside / "inner").mkdir()
        (beside / "inner" / "b").write_text(content)


def content_of(path: Path) -> str | None:
    """What was written last; None where there is nothing. Halves of two are no content."""
    if path.is_file():
        return path.read_text()
    if not path.exists():
        return None
    one, other = (path / "a").read_text(), (path / "inner" / "b").read_text()
    assert one == other
    return one


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


both = pytest.mark.parametrize("write", [write_file, write_folder])


@both
def test_written_and_replaced(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "new" / "x"
    for content in ("one", "two", "three"):
        write(path, content)
        assert content_of(path) == content
        assert names(path.parent) == ["x"]


@both
@pytest.mark.parametrize("before", [None, "old"])
def test_a_block_that_raises_changes_nothing(
    write: Write, before: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    if before is not None:
        write(path, before)

    def fails() -> None:
        with replacing(path) as beside:
            write(beside, "half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert content_of(path) == before
    assert names(tmp_path) == ([] if before is None else ["x"])


@both
def test_a_block_that_writes_nothing_changes_nothing(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, "old")
    with pytest.raises(ValueError, match="nothing was written"), replacing(path):
        pass
    assert content_of(path) == "old"
    assert names(tmp_path) == ["x"]


@both
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk(
    write: Write, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noticed as late as it can be: when what was written is synced."""
    path = tmp_path / "x"
    write(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DiskFull, match="x cannot be written: no space is left"):
            write(path, "new")
    assert content_of(path) == "old"
    assert names(tmp_path) == ["x"]
    write(path, "new")
    assert content_of(path) == "new"


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written") as caught:
        write_file(tmp_path / "file" / "x", "new")
    assert not isinstance(caught.value, DiskFull)
    assert "\n" not in str(caught.value)
    with pytest.raises(WriteError, match="is a file, and a folder is to be written"):
        write_folder(tmp_path / "file", "new")
    assert content_of(tmp_path / "file") == ""
    with pytest.raises(WriteError, match="cannot be written"):
        write_file(tmp_path / ("x" * 250), "new")
    assert names(tmp_path) == ["file"]


def test_a_disk_that_fails_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="Input/output error"), replacing(tmp_path / "x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_a_block_reads_elsewhere_is_not_blamed_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name, error in (("in", IsADirectoryError), ("in/none", FileNotFoundError)):
        with pytest.raises(error), replacing(tmp_path / "out" / "x"):
            (tmp_path / name).read_bytes()
    assert names(tmp_path / "out") == []


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", "old")
    with pytest.raises(WriteError, match="is a folder, and a file is to be written"):
        write_file(tmp_path / "x", "new")
    with (
        pytest.raises(WriteError, match="is a folder, and a file is to be written"),
        replacing(tmp_path / "x") as beside,
    ):
        beside.write_text("new")
    assert content_of(tmp_path / "x") == "old"
    with pytest.raises(WriteError, match="is no name for a file"):
        write_file(Path("."), "new")
    with pytest.raises(WriteError, match="neither a file nor a folder"):
        write_file(Path("/dev/null"), "new")
    for write in (write_file, lambda path, text: write_bytes(path, text.encode())):
        with pytest.raises(WriteError, match="File name too long"):
            write(tmp_path / ("x" * 300), "new")


def test_a_link_is_followed(tmp_path: Path) -> None:
    write_file(tmp_path / "x", "old")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content_of(tmp_path / "x") == "new"


def test_an_interrupt_between_two_renames_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "x", Path.rename
    write_folder(path, "old")

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(path, "new")
    assert content_of(path) == "old"
    assert names(tmp_path) == ["x"]


def test_a_folder_that_stood_aside_in_vain_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "x", Path.rename
    write_folder(path, "old")

    def refuses(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(WriteError):
        write_folder(path, "new")
    assert content_of(path) == "old"
    assert names(tmp_path) == ["x"]


_NUMBERED = """
import os, sys
from pathlib import Path
os.getpid = lambda: 7
from tests.runtime_py.loop.test_files import write_file, write_folder
from runtime_py.loop.files import replacing
kind, path, end = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
with replacing(path) as beside:
    {"write_file": write_file, "write_folder": write_folder}[kind](beside, "half")
    print("there", flush=True)
    os._exit(9) if end == "now" else sys.stdin.read()
"""


def writer(write: Write, path: Path, end: str) -> subprocess.Popen[str]:
    """A process with the number 7 that has begun to write ``path``. ``end``: ``now`` as if it were
    killed, ``later`` when its input ends."""
    arguments = [sys.executable, "-c", _NUMBERED, write.__name__, str(path), end]
    pipe = subprocess.PIPE
    child = subprocess.Popen(arguments, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "there\n"
    return child


@both
def test_what_a_killed_process_left_is_removed(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all processes have one number, as in containers."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    write(tmp_path / "x", "old")
    with writer(write, tmp_path / "x", "now") as child:
        assert child.wait() == 9
    assert len(names(tmp_path)) == 2
    write(tmp_path / "x", "new")
    assert content_of(tmp_path / "x") == "new"
    assert names(tmp_path) == ["x"]


@both
def test_two_processes_of_one_number_do_not_meet(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two containers that share a disk: who ends last has the path."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    with writer(write, tmp_path / "x", "later") as child:
        write(tmp_path / "x", "new")
        assert content_of(tmp_path / "x") == "new"
        assert len(names(tmp_path)) == 2
        child.communicate("")
        assert child.returncode == 0
    assert content_of(tmp_path / "x") == "half"
    assert names(tmp_path) == ["x"]


def test_a_path_within_a_path_and_twice_in_a_process(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as one, replacing(tmp_path / "x") as other:
        write_folder(one, "one")
        write_folder(other, "other")
    assert content_of(tmp_path / "x") == "one"
    assert names(tmp_path) == ["x"]


def test_a_folder_that_stood_aside_for_a_killed_process_comes_back(tmp_path: Path) -> None:
    left = tmp_path / ".x.ab_cd012.part"
    write_folder(left / "old", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x"):
        raise ZeroDivisionError
    assert content_of(tmp_path / "x") == "old"
    assert names(tmp_path) == ["x"]


def test_without_locks_nothing_is_taken_for_a_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have none."""

    def unknown(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", unknown)
    (tmp_path / ".x.abcdefgh.part").mkdir()
    write_file(tmp_path / "x", "new")
    assert content_of(tmp_path / "x") == "new"
    assert names(tmp_path) == [".x.abcdefgh.part", "x"]


def test_what_belongs_to_others_is_not_touched(tmp_path: Path) -> None:
    """To another path, or to nobody here."""
    others = [".x.1.part", ".y.abcdefgh.part", ".x.1.abcdefgh.part", ".x.part", "x.1.old"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".x.abcdefgh.part").write_text("a file")
    write_file(tmp_path / "x", "new")
    assert names(tmp_path) == sorted([*others, ".x.abcdefgh.part", "x"])


_KILLED = """
import fcntl, os, shutil, sys, tempfile
from pathlib import Path
from tests.runtime_py.loop.test_files import write_file, write_folder

left = int(sys.argv[3])

def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return function(*arguments, **options)
    return call

for name in ("rename", "unlink", "mkdir", "write_text"):
    setattr(Path, name, counted(getattr(Path, name)))
tempfile.mkdtemp, fcntl.flock = counted(tempfile.mkdtemp), counted(fcntl.flock)
os.fsync, shutil.rmtree = counted(os.fsync), counted(shutil.rmtree)
{"write_file": write_file, "write_folder": write_folder}[sys.argv[1]](Path(sys.argv[2]), "new")
"""


@both
@pytest.mark.parametrize("before", [None, "old"])
def test_killed_before_any_of_its_steps(write: Write, before: str | None, tmp_path: Path) -> None:
    """The next writer finds the old or the new, and leaves nothing else behind."""
    for steps in range(100):
        path = tmp_path / str(steps) / "x"
        path.parent.mkdir()
        if before is not None:
            write(path, before)
        done = subprocess.run(
            [sys.executable, "-c", _KILLED, write.__name__, str(path), str(steps)], cwd=ROOT
        )
        if write is write_file or before is None:
            assert content_of(path) in (before, "new")
        with pytest.raises(ZeroDivisionError), replacing(path):
            raise ZeroDivisionError
        assert content_of(path) in (before, "new")
        assert names(path.parent) == ([] if content_of(path) is None else ["x"])
        if done.returncode == 0:
            break
    assert content_of(path) == "new"
    assert steps > 3


def test_write_bytes_and_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 999
    write_bytes(tmp_path / "x", data)
    assert (tmp_path / "x").read_bytes() == data
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_sweep_takes_what_a_killed_writer_left_of_an_adapter(tmp_path: Path) -> None:
    """It is a folder by then."""
    (tmp_path / "own.ptd").write_text("")
    folder = tmp_path / "adapters"
    write_file(folder / "00001.ptd", "kept")
    write_file(folder / "00002.ptd", "no row names it")
    (folder / ".00003.ptd.abcdefgh.part").mkdir()
    (folder / ".00003.ptd.abcdefgh.part" / "new").write_text("half")
    store = SimpleNamespace(rows=lambda query: [("00001.ptd",)])
    bundle = SimpleNamespace(adapter_file=tmp_path / "own.ptd")
    Versions(store, folder, bundle).sweep()  # type: ignore[arg-type]
    assert names(folder) == ["00001.ptd"]
