"""Streams of dialogues from JSONL: what is read, and which line is named when it is bad."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import DuplicateDialogue, LoopError
from runtime_py.loop.stream import read_dialogues, read_stream


def good(id: str = "a") -> dict[str, object]:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    return {"id": id, "turns": turns}


def turns(role: object, content: object) -> bytes:
    """A line whose first turn is these, and whose second is sound."""
    second = {"role": "assistant", "content": "ho"}
    return json.dumps({"id": "x", "turns": [{"role": role, "content": content}, second]}).encode()


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
        (b'{"id": "x", "turns": [], "n": ' + b"9" * 5000 + b"}", "line 2 of .* is not JSON .*4300"),
        (b'{"id": "x", "turns": [], "n": NaN}', "line 2 of .* is not JSON .NaN is no number"),
        (b'{"id": "x", "turns": [], "id": "y"}', "line 2 of .*the key 'id' stands twice"),
        (b'{"id": "x", "turns": [], "n": "\\udc00"}', "line 2 of .* lone surrogate in 'n'"),
        (b'{"id": "x\x00"}', "line 2 of .* has a NUL .byte 10"),
        ('{"id": "x"}'.encode("utf-16-le"), "line 2 of .* has a NUL .byte 2.*UTF-16"),
        (b'{"id": 5, "turns": []}', "line 2 of .*: a dialogue's id is 5; expected a string"),
        (b'{"id": ["x"], "turns": []}', "line 2 of .*: a dialogue's id is .'x'.; expected"),
        (b'{"id": "x", "turns": {"role": "user"}}', "turns that are not a list of objects"),
        (turns("user", 7), "line 2 of .*: turn 1 .* has the content 7; expected a string"),
        (turns("user", None), "line 2 of .*: turn 1 .* has the content None"),
        (turns("user", " \n"), "line 2 of .*: turn 1 .* is empty"),
        (turns("user", "\udc00"), "line 2 of .*: turn 1 .* lone surrogate .U.DC00"),
        (turns("user", "\0"), "line 2 of .*: turn 1 .* control character U.0000"),
        (turns("system", "Be kind."), "line 2 .*: turn 1 .* role 'system'; .* attune data convert"),
        (turns(["user"], "x"), "line 2 .*: turn 1 .* has the role ..user"),
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


def test_all_misfits_stand_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"\n".join([json.dumps(good()).encode(), b"{", b"", b"[]", turns("user", 1)]))
    with pytest.raises(LoopError) as caught:
        read_dialogues(path)
    said = str(caught.value)
    assert said.startswith(f"3 lines of {path} cannot be used. line 2 of {path} is not JSON")
    assert f"line 4 of {path} holds a list" in said
    assert f"line 5 of {path}: turn 1 of dialogue 'x' has the content 1" in said
    assert said.count("attune data convert") == 1
    path.write_bytes(b"{\n" * 30)
    with pytest.raises(LoopError, match=r"^30 lines .* line 20 of .* … and 10 more\. attune data"):
        read_dialogues(path)


@pytest.mark.parametrize("packed", [False, True])
def test_byte_order_marks(packed: bool, tmp_path: Path) -> None:
    """UTF-8's is skipped, also where files were joined; gzip is told by its first bytes."""
    path = tmp_path / "s.jsonl"
    text = b"".join("\ufeff".encode() + json.dumps(good(id)).encode() + b"\r\n" for id in "abc")
    text += "\ufeff\r\n".encode()
    path.write_bytes(gzip.compress(text) if packed else text)
    assert [dialogue.id for dialogue in read_dialogues(path)] == ["a", "b", "c"]
    for encoding in ("utf-16", "utf-32"):
        text = json.dumps(good()).encode(encoding)
        path.write_bytes(gzip.compress(text) if packed else text)
        with pytest.raises(LoopError, match=r"s\.jsonl is UTF-16 or UTF-32; expected UTF-8"):
            read_dialogues(path)


def test_every_flipped_byte_of_gzip_and_every_length(tmp_path: Path) -> None:
    """It is refused, or the dialogues are what they were."""
    path = tmp_path / "s.jsonl.gz"
    text = "".join(json.dumps(good(id)) + "\n" for id in "abcdef")
    path.write_bytes(gzip.compress(text.encode()))
    sound, whole = read_dialogues(path), path.read_bytes()
    broken = [whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :] for i in range(len(whole))]
    refused = 0
    for damaged in (*broken, *(whole[:size] for size in range(1, len(whole)))):
        path.write_bytes(damaged)
        try:
            assert read_dialogues(path) == sound
        except LoopError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017 - of each that is refused
    assert refused > 2 * len(whole) - 20  # the header has a time and more that nobody reads


keys = st.sampled_from(["id", "turns", "role", "content", "x"])
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner),
)


@given(st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_dialogue_or_a_sentence(line: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.jsonl"
        path.write_bytes(json.dumps(good("sound")).encode() + b"\n" + line)
        try:
            assert read_dialogues(path)[0].id == "sound"
        except LoopError as error:
            assert "line 2 of" in str(error) or "lines of" in str(error)  # noqa: PT017
