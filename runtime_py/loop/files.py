"""Files that are there whole or not at all, and what they are known by: the SHA-256.

Everything that attune keeps is written through ``replacing``, so there is one rule: whatever stops
it (an exception, a kill, a loss of power), the path has what it had before, or all of the new. Only
a folder that is replaced can be missing after a kill; it lies beside, and the next writer of that
path puts it back.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime_py.loop.errors import DiskFull, WriteError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # some file systems sync no folder


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path`` at which the block writes a file or a folder.

    When the block ends, what it wrote is synced to the disk and takes the place of ``path``: a file
    that of a file, a folder that of a folder, neither that of anything else; a link is followed.
    When the block raises, what it wrote is removed and ``path`` is as it was. What an earlier
    process left behind when it was killed is removed first; a folder that stood aside then comes
    back. At most one at a time for a path and process. Raises ``DiskFull`` and ``WriteError`` for a
    disk that is full or cannot be written; any other exception is the block's own.
    """
    with writing(path):
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        _check(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        try:
            yield beside
            if not os.path.lexists(beside):
                raise ValueError(f"nothing was written at {beside}, so {path} stays as it is.")
            _sync(beside)
            _put(beside, path)
        finally:
            _remove(beside)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The system's refusals to write ``path`` as sentences: ``DiskFull`` and ``WriteError``.

    Where one encloses another, the disk that is full is told of the outer's path: what is written
    inside it has a name of its own only for a moment.
    """
    try:
        yield
    except DiskFull as error:
        raise _disk_full(path) from error
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(path) from error
        if not _is_about(error, path):
            raise
        raise WriteError(
            f"{path} cannot be written: {error.strerror or error}. What was there before is whole; "
            f"choose another place, or change its permissions."
        ) from error


def _is_about(error: OSError, path: Path) -> bool:
    """Whether ``path``, what is written beside it, or a folder above was refused: not what a block
    reads elsewhere. An open file's error has no name: what a block has open, it writes."""
    if error.filename is None:
        return True
    place, here = Path(os.path.abspath(error.filename)), Path(os.path.abspath(path))
    return place in here.parents or here.parent in place.parents or place == here


def _check(path: Path) -> None:
    if not path.name:
        raise WriteError(f"{path} is no name for a file or folder: give one.")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise WriteError(f"{path} is neither a file nor a folder: choose another place.")


def _disk_full(path: Path) -> DiskFull:
    return DiskFull(
        f"{path} cannot be written: no space is left. What was there before is whole; free some "
        f"space and do it again."
    )


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    with writing(path):
        _check_kind(path, folder=False)
    with replacing(path) as beside:
        beside.write_bytes(data)


def _check_kind(path: Path, folder: bool) -> None:
    if path.exists() and path.is_dir() != folder:
        one, other = ("file", "folder") if folder else ("folder", "file")
        raise WriteError(
            f"{path} is a {one}, and a {other} is to be written: choose another name, or remove it."
        )


def _put(beside: Path, path: Path) -> None:
    """Renames. A folder cannot be replaced in one step: it stands aside for that moment."""
    _check_kind(path, beside.is_dir())
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        if path.is_dir():
            path.rename(aside)
        beside.rename(path)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    _sync_folder(path.parent)
    _remove(aside)


def _clear(path: Path) -> None:
    """What processes that are gone left beside ``path``: a folder that stood aside comes back.
    What has this process's number is an earlier one's: this one has not begun yet."""
    left = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.(part|old)")
    try:
        names = sorted(path.parent.iterdir())
    except PermissionError:  # a folder may be written that may not be listed
        return
    for other in names:
        match = left.fullmatch(other.name)
        if match is None or (int(match[1]) != os.getpid() and _alive(int(match[1]))):
            continue
        if match[2] == "old" and not os.path.lexists(path):
            with suppress(FileNotFoundError):  # another process was faster
                other.rename(path)
        else:
            _remove(other)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # the second: no system has such a number
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Everything of a file or folder to the disk."""
    for each in (*path.rglob("*"), path) if path.is_dir() else (path,):
        if each.is_dir():
            _sync_folder(each)
        elif each.is_file():
            _sync_entry(each)


def _sync_folder(path: Path) -> None:
    try:
        _sync_entry(path)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
