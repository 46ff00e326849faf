"""What may enter the loop, what may not, and that every refusal is a sentence that helps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from runtime_py.loop.dialogue import (
    Dialogue,
    Turn,
    check,
    cut,
    turns_from_json,
    turns_to_json,
)
from runtime_py.loop.errors import DuplicateDialogue, LoopError
from runtime_py.loop.stream import read_stream


def made(*contents: str, id: str = "a") -> Dialogue:
    roles = ("user", "assistant")
    return Dialogue(id, tuple(Turn(roles[n % 2], c) for n, c in enumerate(contents)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["Zażółć gęślą jaźń", "我喜欢面包。", "مرحبا\u200f بالعالم", "👩‍👩‍👧 ok\n\tyes", "x" * 100_000],
)
def test_any_language_passes(text: str) -> None:
    assert check(made(text, text)).text == f"{text}\n{text}"


@pytest.mark.parametrize(
    ("dialogue", "message"),
    [
        (made(), "has no turns"),
        (made("hi"), "ends with a user's turn"),
        (made("hi", " \n"), "turn 2 of dialogue 'a' is empty"),
        (made("hi", "a\ud800b"), "lone surrogate .U.D800. at character 2"),
        (made("hi\x00", "b"), "control character U.0000 at character 3"),
        (made("hi\x1b[0m", "b"), "U.001B"),
        (made("hi", "b", id=""), "id is ''"),
        (made("hi", "b", id="x" * 257), "1 to 256 characters"),
        (made("hi", "b", id="a\nb"), "the id of a dialogue has the control character"),
        (Dialogue(7, made("a", "b").turns), "id is 7"),  # type: ignore[arg-type]
        (Dialogue("a", made("a", "b").turns[::-1]), "turn 1 .* role 'assistant'; expected 'user'"),
        (Dialogue("a", (Turn("system", "a"),)), "role 'system'"),  # type: ignore[arg-type]
        (Dialogue("a", (Turn("user", None),)), "content None; expected a string"),  # type: ignore[arg-type]
    ],
)
def test_bad_dialogues(dialogue: Dialogue, message: str) -> None:
    with pytest.raises(LoopError, match=message):
        check(dialogue)


def test_cut_keeps_whole_exchanges() -> None:
    four = made("aa", "bb", "cc", "ź" * 10)  # 7 + 7 + 7 + 25 bytes
    assert four.bytes == 46
    assert cut(four, 46) is four
    assert cut(four, 45) == made("aa", "bb")
    assert cut(four, 14) == made("aa", "bb")
    assert cut(four, 13) is None
    assert cut(made("x" * 100_000, "b", "c", "d"), 22_000) is None


def test_turns_survive_json() -> None:
    turns = made('a"\\\n', "👍 ź").turns
    assert turns_from_json(turns_to_json(turns)) == turns


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
    assert records[0].dialogue == made("hi", "ho")


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
