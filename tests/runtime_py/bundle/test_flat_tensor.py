"""A .ptd file is laid out as docs/bundle.md says, read here by its table alone."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from runtime_py.bundle.flat_tensor import locate, write_ptd


def test_the_layout_that_the_docs_state(tmp_path: Path) -> None:
    arrays = {
        "b": np.arange(33, dtype=np.float32),
        "a": np.full((1, 1, 1), 2.0, np.float32),
        "c": np.frombuffer(b"text", np.uint8),
    }
    write_ptd(tmp_path / "some.ptd", arrays)
    file = (tmp_path / "some.ptd").read_bytes()
    root, format, magic, short, long, size, base, length = struct.unpack_from("<I4s4sI4Q", file)
    assert (format, magic, short, long, file[48:56]) == (b"FT01", b"FH01", 40, 48, bytes(8))
    assert 56 <= root < 48 + size <= base
    assert (base % 128, base + length) == (0, len(file))
    places = locate(tmp_path / "some.ptd")
    assert list(places) == ["b", "a", "c"]
    ends = [base]
    for name, place in places.items():
        assert place % 128 == 0
        assert not any(file[ends[-1] : place])
        ends.append(place + arrays[name].nbytes)
        assert file[place : ends[-1]] == arrays[name].tobytes()
    assert ends[-1] == len(file)
