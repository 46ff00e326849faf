"""Streams of dialogues from JSONL: what is read, and which line is named when it is bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import DuplicateDialogue, LoopError
from runtime_py.loop.stream import read_dialogues, read_stream


def good(id: str = "a") -> dict[str, object]:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    return {"id": id, "turns": turns}


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz"])
def test_streams_are_read(tmp_path: Path, name: str) -> None:
    text = json.dumps({**good(), "group": "x"}) + "\n\n" + json.dumps(good("b"))
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    records = list(read_stream(tmp_path / name))
    assert [(r.line, r.dialogue.id, r.extra) for r in records] == [
        (1, "a", {"group": "x"}),
        (3, "b", {}),
    ]
    assert records[0].dialogue == Dialogue("a", (Turn("user", "hi"), Turn("assistant", "ho")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "x"', "line 2 of .* is not JSON .column"),
        (b'{"id": "\xff"}', "line 2 of .* is not UTF-8"),
        (b"[1]", "line 2 .* holds a list"),
        (b'{"id": "x"}', "line 2 .* has no turns"),
        (b'{"turns": []}', "has no id"),
        (b'{"id": "x", "turns": [1]}', "turns that are not a list of objects"),
        (b'{"id": "x", "turns": [{"role": "user"}]}', "turn 1 has no content"),
        (b'{"id": "x", "turns": []}', "line 2 of .*: dialogue 'x' has no turns"),
        (json.dumps(good()).encode(), "line 2 of .* has the id 'a' of line 1"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(
        json.dumps(good()).encode() + b"\n" + line + b"\n" + json.dumps(good("z")).encode()
    )
    with pytest.raises(LoopError, match=message):
        list(read_stream(path))
    refused: list[LoopError] = []
    assert [r.dialogue.id for r in read_stream(path, refused.append)] == ["a", "z"]
    assert len(refused) == 1


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match="there is no stream at"):
        list(read_stream(tmp_path / "none.jsonl"))
    with pytest.raises(LoopError, match="cannot be read"):
        list(read_stream(tmp_path))
    damaged = tmp_path / "s.jsonl.gz"
    damaged.write_bytes(gzip.compress(json.dumps(good()).encode() * 50)[:40])
    with pytest.raises(LoopError, match="is damaged after line 0"):
        list(read_stream(damaged))
    damaged.write_bytes(b"plain")
    with pytest.raises(LoopError, match=r"expected gzip, because its name\s+ends in .gz"):
        list(read_stream(damaged))


def test_a_duplicate_can_be_told_from_other_errors(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(good()) + "\n" + json.dumps(good()))
    with pytest.raises(DuplicateDialogue):
        list(read_stream(path))


def test_all_dialogues_or_the_first_ones(tmp_path: Path) -> None:
    """Those that are not asked for are not read."""
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join([json.dumps(good("a")), json.dumps(good("b")), "{"]))
    assert [dialogue.id for dialogue in read_dialogues(path, 2)] == ["a", "b"]
    with pytest.raises(LoopError, match=r"line 3 of .* is not JSON"):
        read_dialogues(path)
    path.write_text("\n")
    with pytest.raises(LoopError, match="has no dialogue: give one JSON object a line"):
        read_dialogues(path)
