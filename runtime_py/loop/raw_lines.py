"""The lines of a file, plain or gzip, as bytes: told by its first bytes, not by its name alone."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime_py.loop.errors import LoopError
from runtime_py.loop.lfs import refuse_pointers

_GZIP = b"\x1f\x8b"


def raw_lines(path: Path, told: Callable[[int], None] | None = None) -> Iterator[tuple[int, bytes]]:
    """Number, from 1 on, and bytes of each line, its end included. ``told`` gets how many bytes of
    the file are read.

    Raises ``LoopError`` where there is no such file, it cannot be read, or its gzip is damaged.
    """
    refuse_pointers([path], LoopError)
    number = 0
    try:
        with path.open("rb") as file:
            packed = path.suffix == ".gz" or file.peek(2).startswith(_GZIP)
            for line in gzip.GzipFile(fileobj=file) if packed else file:
                number += 1
                yield number, line
                if told is not None:
                    told(file.tell())
    except FileNotFoundError:
        raise LoopError(f"there is no stream at {path}; expected a JSONL file.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        why = "because its name ends in .gz" if path.suffix == ".gz" else "as it begins like it"
        raise LoopError(
            f"{path} is damaged after line {number} ({error}); expected gzip, {why}. Copy it again."
        ) from None
    except OSError as error:
        raise LoopError(f"{path} cannot be read: {error.strerror or error}.") from None
