"""Files and folders are there whole or not at all, whatever stops their writer and wherever."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


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
        if self.name.endswith(".part"):
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
        if self.name.endswith(".part"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(WriteError):
        write_folder(path, "new")
    assert content_of(path) == "old"
    assert names(tmp_path) == ["x"]


@both
@pytest.mark.parametrize("own", [False, True], ids=["another", "same number"])
def test_what_a_killed_process_left_is_removed(
    write: Write, own: bool, gone: int, tmp_path: Path
) -> None:
    """Also where the system has given its number to this process since."""
    pid = os.getpid() if own else gone
    write(tmp_path / "x", "old")
    (tmp_path / f".x.{pid}.part").mkdir()
    (tmp_path / f".x.{pid}.part" / "a").write_text("half")
    (tmp_path / f".x.{pid}.old").write_text("replaced")
    (tmp_path / f".x.{10**30}.part").write_text("half")
    write(tmp_path / "x", "new")
    assert content_of(tmp_path / "x") == "new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("own", [False, True], ids=["another", "same number"])
def test_a_folder_that_stood_aside_for_a_killed_process_comes_back(
    own: bool, gone: int, tmp_path: Path
) -> None:
    write_folder(tmp_path / "x", "old")
    (tmp_path / "x").rename(tmp_path / f".x.{os.getpid() if own else gone}.old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x"):
        raise ZeroDivisionError
    assert content_of(tmp_path / "x") == "old"
    assert names(tmp_path) == ["x"]


def test_what_belongs_to_others_is_not_touched(tmp_path: Path) -> None:
    """To a process that is still writing, or to another path."""
    others = [
        f".x.{os.getppid()}.part",
        f".x.{os.getppid()}.old",
        ".y.1.part",
        ".x.part",
        "x.1.old",
    ]
    for name in others:
        (tmp_path / name).write_text(name)
    write_file(tmp_path / "x", "new")
    assert names(tmp_path) == sorted([*others, "x"])
    assert all((tmp_path / name).read_text() == name for name in others)


_KILLED = """
import os, shutil, sys
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
