"""Files that are there whole or not at all, and what they are known by: the SHA-256.

Everything that attune keeps is written through ``replacing``, so there is one rule: whatever stops
it (an exception, a kill, a loss of power), the path has what it had before, or all of the new. Only
a folder that is replaced can be missing after a kill; it lies beside, and the next writer of that
path puts it back.

What is being written lies in a folder beside the path that nothing had the name of, and whose lock
the writer holds. The system lets go of the lock when the writer ends, however it ends: so what was
left behind is told from what is being written without the number of a process, which containers
give to every process alike.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime_py.loop.errors import DiskFull, WriteError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # some file systems sync no folder
_UNLOCKED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # and some lock no file
_NEW, _OLD, _LOCK = "new", "old", "lock"  # in a folder beside a path


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
    writer left behind when it was killed is removed first; a folder that stood aside then comes
    back. Where the file system knows no locks, it stays. Raises ``DiskFull`` and ``WriteError`` for
    a disk that is full or cannot be written; any other exception is the block's own.
    """
    with writing(path):
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        _check(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        with _beside(path) as folder:
            new = folder / _NEW
            yield new
            if not os.path.lexists(new):
                raise ValueError(f"nothing was written at {new}, so {path} stays as it is.")
            _sync(new)
            _put(new, path, folder / _OLD)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that is this writer's alone, and gone afterwards."""
    lock = None
    while lock is None:  # else another writer's ``_clear`` met it before it was locked
        folder = Path(tempfile.mkdtemp(".part", f".{path.name}.", path.parent))
        try:
            lock = _lock(folder)
        except BaseException:
            remove(folder)
            raise
    try:
        yield folder
    finally:
        remove(folder)
        os.close(lock)


def _lock(folder: Path, required: bool = False) -> int | None:
    """The descriptor that holds the lock of ``folder``; None where another holds it, or has removed
    the folder, or, if it is ``required``, where the file system knows no locks."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    try:
        if _locked(descriptor, required) and (folder / _LOCK).exists():
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _locked(descriptor: int, required: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNLOCKED:
            raise
        return not required
    return True


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


def _put(new: Path, path: Path, aside: Path) -> None:
    """Renames. A folder cannot be replaced in one step: it stands aside for that moment."""
    _check_kind(path, new.is_dir())
    try:
        if path.is_dir():
            path.rename(aside)
        new.rename(path)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    _sync_folder(path.parent)


def _clear(path: Path) -> None:
    """What writers that are gone left beside ``path``: a folder that stood aside comes back."""
    left = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}\.part")
    try:
        names = sorted(path.parent.iterdir())
    except PermissionError:  # a folder may be written that may not be listed
        return
    for folder in names:
        if left.fullmatch(folder.name) is None or not folder.is_dir():
            continue
        try:
            lock = _lock(folder, required=True)
        except PermissionError:  # another user's
            continue
        if lock is None:
            continue
        try:
            if (folder / _OLD).exists() and not os.path.lexists(path):
                (folder / _OLD).rename(path)
            remove(folder)
        finally:
            os.close(lock)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it; nothing where there is none."""
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
