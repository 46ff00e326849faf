"""Chats of other formats: the dialogues that come of them, and what is said of the rest."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py.loop.errors import LoopError
from runtime_py.loop.stream import read_dialogues
from tests.toolchain.conftest import Attune
from toolchain.streams.convert import IDS, Conversion, convert
from toolchain.streams.convert_formats import FORMATS, TOOLS, Speakers
from toolchain.streams.convert_turns import AFTER, BEFORE, EMPTY, FOREIGN, JOINED, SYSTEM

Said = list[tuple[str, ...]]  # the contents of each dialogue, user and assistant by turns
Converted = Callable[..., tuple[Conversion, Said]]


@pytest.fixture
def converted(tmp_path: Path) -> Converted:
    """``data``: the file's bytes, or a value for JSON."""

    def run(data: object, **options: Any) -> tuple[Conversion, Said]:
        source, out = tmp_path / "in", tmp_path / "out.jsonl"
        source.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        result = convert(source, out, force=True, **options)
        dialogues = read_dialogues(out)
        assert len(dialogues) == result.written
        assert sum(len(one.turns) for one in dialogues) == result.turns
        assert result.read == result.written + sum(one.count for one in result.dropped.values())
        return result, [tuple(turn.content for turn in one.turns) for one in dialogues]

    return run


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def said(*texts: tuple[str, object], role: str = "role", text: str = "content") -> list[dict]:
    return [{role: who, text: what} for who, what in texts]


HI: Said = [("hi", "ho")]
TWO: Said = [*HI, ("a", "b")]
CHAT = said(("user", "hi"), ("assistant", "ho"))
SHARE = said(("human", "hi"), ("gpt", "ho"), role="from", text="value")


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"id": "a", "turns": CHAT}, "attune"),
        ({"conversations": SHARE}, "sharegpt"),
        ({"conversations": CHAT}, "sharegpt"),
        ({"conversations": SHARE, "system": "Be kind."}, "sharegpt"),
        ({"messages": CHAT}, "messages"),
        ({"Messages": CHAT, "prompt": "hi", "prompt_id": "p"}, "messages"),
        ({"dialog": said(("User", "hi"), ("Bot", "ho"), role="speaker", text="text")}, "messages"),
        ({"instruction": "hi", "input": "", "output": "ho"}, "alpaca"),
        ({"instruction": "hi", "input": None, "output": "ho"}, "alpaca"),
        ({"instruction": "hi", "context": "", "response": "ho"}, "alpaca"),
        ({"prompt": "hi", "response": "ho"}, "pairs"),
        ({"prompt": "hi", "completion": "ho"}, "pairs"),
        ({"question": "hi", "answer": "ho"}, "pairs"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "pairs"),
    ],
)
def test_every_format_alone_in_an_array_and_in_lines(
    row: object, form: str, converted: Converted
) -> None:
    for data in ([row], lines(row), {"data": [row]}, json.dumps([row], indent=2).encode()):
        result, dialogues = converted(data)
        assert (result.format, dialogues, result.dropped) == (form, HI, {})
    if isinstance(row, dict):
        assert converted(json.dumps(row, indent=2).encode())[1] == HI
    assert converted([row], form=form)[1] == HI
    other = "alpaca" if form != "alpaca" else "table"
    with pytest.raises(LoopError, match=f"no row of .* is {other} .*It looks like {form}"):
        converted([row], form=other)


def test_containers(converted: Converted) -> None:
    row = {"prompt": "hi", "response": "ho"}
    text = json.dumps([row])
    expected = [
        (lines(row, row | {"prompt": "2"}), "JSON lines"),
        (b"\n\n" + lines(row), "JSON lines"),
        (codecs.BOM_UTF8 + lines(row), "JSON lines"),
        (lines(row).replace(b"\n", b"\r\n"), "JSON lines"),
        (lines(CHAT, CHAT[:0]), "JSON lines"),
        (b'{"prompt": \n' + lines(row), "JSON lines"),
        (text.encode("utf-16"), "a JSON array"),
        (text.encode("utf-32"), "a JSON array"),
        (gzip.compress(lines(row)), "JSON lines"),
        ({"data": [row], "version": 3}, "the JSON array 'data'"),
        (row, "JSON lines"),
        (b"prompt,response\nhi,ho\n", "CSV"),
        (b"Prompt;Response;n\r\nhi;ho;1,2\r\n", "CSV with semicolons"),
        ("Question\tAnswer\nhi\tho".encode("utf-16"), "TSV"),
        (b"\xef\xbb\xbfquestion|answer\nhi|ho", "CSV with bars"),
    ]
    for data, container in expected:
        result, dialogues = converted(data)
        assert (result.container, dialogues[:1]) == (container, HI), data


def test_cells(converted: Converted) -> None:
    """Line breaks, quotes and long texts; chats as JSON and as Python writes them."""
    long = "x" * 300_000
    text = io.StringIO()
    csv.writer(text).writerows([("question", "answer"), ('a "q",\nb', long), ("a",)])
    result, dialogues = converted(text.getvalue().encode())
    assert dialogues == [('a "q",\nb', long)]
    assert result.dropped.keys() == {f"not {FORMATS['pairs'].what}"}
    for cell in (json.dumps(CHAT), repr(CHAT)):
        text = io.StringIO()
        csv.writer(text).writerows([("n", "messages"), (1, cell)])
        assert converted(text.getvalue().encode())[1] == HI
    result, dialogues = converted(b"hi,ho\nmore,texts\n", form="pairs")
    assert (result.container, dialogues) == ("CSV without a header", [*HI, ("more", "texts")])
    result, _ = converted(b"question,answer\nhi,ho\na,b,c\n")
    assert result.dropped["more fields than the header names"].first == "line 3"


@pytest.mark.parametrize(
    ("data", "dialogues"),
    [
        ("Conversation ID,Sender,Text\n1,user,hi\n2,user,a\n1,bot,ho\n2,agent,b", TWO),
        ("role,content\nuser,hi\nassistant,ho", HI),
        ("id,role,content\n1,user,hi\n2,assistant,ho", HI),
        ("id,role,content\n7,user,hi\n7,assistant,ho\n8,user,a\n8,assistant,b", TWO),
        ("chat,turn,role,text\nx,10,assistant,ho\nx,9,user,hi", HI),
        ("chat,timestamp,role,text\nx,2024-01-02T10:00,bot,ho\nx,2024-01-02T09:59,user,hi", HI),
        ("chat,time,role,text\nx,,user,hi\nx,1,bot,ho", HI),
        ("chat,date,role,text\nx,1/2/24 10:05 PM,bot,ho\nx,1/2/24 9:05 AM,user,hi", HI),
        ("chat,date,role,text\nx,\"Jan 2, 2024\",bot,ho\nx,\"Dec 31, 2023\",user,hi", HI),
        ("chat,date,time,role,text\nx,2024-01-02,10:05,bot,ho\nx,2024-01-02,10:04,user,hi", HI),
        ("sender,senderid,text\nuser,7,hi\nbot,8,ho\nuser,7,hi\nbot,8,ho", [("hi", "ho") * 2]),
        ("role, content\nuser, \"h, i\"\nbot, ho", [("h, i", "ho")]),
    ],
)  # fmt: skip
def test_a_message_a_row(data: str, dialogues: Said, converted: Converted) -> None:
    result, found = converted(data.encode())
    assert (result.format, found, result.dropped) == ("table", dialogues, {})


@pytest.mark.parametrize(
    "times",
    [("soon", "now"), ("2/1/2024", "1/3/2024"), ("09:05", "10:05"), ("nan", "1")],
    ids=str,
)
def test_a_table_in_no_order(times: tuple[str, str], converted: Converted) -> None:
    """Newest first is as frequent as oldest first: what cannot be read is not guessed."""
    rows = "".join(
        f"x,{time},{role},a\n" for time, role in zip(times, ("user", "bot"), strict=True)
    )
    sound = "y,1,user,hi\ny,2,bot,ho\n"
    result, dialogues = converted(f"chat,time,role,text\n{rows}{sound}".encode())
    assert dialogues == HI
    (reason,) = result.dropped
    assert "times that cannot be read, or in two orders" in reason


@pytest.fixture
def summer_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose clock leaves out an hour on 31 March 2024."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("summer_time")
@pytest.mark.parametrize("day", ["2024-03-31", "31.03.2024"])
def test_no_clock_of_this_machine_decides_an_order(day: str, converted: Converted) -> None:
    data = f"chat,time,role,text\nx,{day} 03:15,bot,ho\nx,{day} 02:30,user,hi"
    assert converted(data.encode())[1] == HI


@pytest.mark.parametrize("column", ["case_number", "user_id", "message_tree_id"])
def test_a_table_of_conversations_by_another_name(column: str, converted: Converted) -> None:
    data = f"{column},role,text\n1,user,hi\n1,bot,ho\n2,user,a\n2,bot,b\n"
    with pytest.raises(LoopError) as caught:
        converted(data.encode())
    assert f"told apart by {column.replace('_', '')}" in str(caught.value)
    assert "call the one that does conversation_id" in str(caught.value)
    assert converted(data.replace(column, "Conversation ID").encode())[1] == TWO


def test_a_table_of_trees(converted: Converted) -> None:
    """Two answers to one message are no two turns."""
    rows = "t,a,,user,q\nt,b,a,bot,one\nt,c,a,bot,other\nu,d,,user,hi\nu,e,d,bot,ho\n"
    result, dialogues = converted(f"thread,message_id,parent_id,role,text\n{rows}".encode())
    assert dialogues == HI
    assert result.dropped.keys() == {"a tree: several messages answer the same one"}
    chain = "t,a,,,user,hi\nt,b,a,a,bot,ho\n"  # two columns that say the same
    head = "thread,message_id,parent_id,parent,role,text\n"
    assert converted(f"{head}{chain}".encode())[1] == HI


def test_a_table_with_names(converted: Converted) -> None:
    data = b"chat,sender,message\n1,Ann,hi\n1,Bo,ho\n,Ann,lost\n"
    speakers = Speakers(frozenset({"Ann"}), frozenset({"Bo"}))
    result, dialogues = converted(data, speakers=speakers)
    assert dialogues == HI
    assert result.dropped["no conversation is named"].first == "line 4"
    with pytest.raises(LoopError) as caught:
        converted(data)
    assert "1 × the role 'Ann' is not known (first line 2)" in str(caught.value)
    assert "--user-name and --assistant-name say whose turns are whose" in str(caught.value)


def test_a_reply_not_to_be_learned(converted: Converted) -> None:
    """As OpenAI's fine-tuning has it: a weight of 0."""
    weighed = [[CHAT[0], CHAT[1] | {"weight": weight}] for weight in (0, 1)]
    result, dialogues = converted([{"messages": one} for one in weighed])
    assert dialogues == HI
    assert result.dropped.keys() == {"a reply that its weight of 0 says not to learn"}


def part(text: str, kind: str = "text") -> list[dict]:
    return [{"type": kind, kind: text}]


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}


@pytest.mark.parametrize(
    ("messages", "turns", "changed"),
    [
        ([{"role": "system", "content": "Be kind."}, *CHAT], ("hi", "ho"), {SYSTEM: 1}),
        ([{"role": "developer", "content": "Be kind."}, *CHAT], ("hi", "ho"), {SYSTEM: 1}),
        ([CHAT[1], *CHAT, CHAT[0]], ("hi", "ho"), {BEFORE: 1, AFTER: 1}),
        ([CHAT[0], *CHAT], ("hi\n\nhi", "ho"), {JOINED: 1}),
        ([CHAT[0], {"role": "assistant", "content": " "}, CHAT[1]], ("hi", "ho"), {EMPTY: 1}),
        ([CHAT[0], CALL, {"role": "tool", "content": "5"}, CHAT[1]], ("hi", "ho"), {TOOLS: 2}),
        (said(("user", [*part("h"), "i"]), ("assistant", part("ho"))), ("h\ni", "ho"), {}),
        ([*CHAT, *said(("user", [*part("?"), IMAGE])), CHAT[1], *CHAT], ("hi", "ho"), {FOREIGN: 2}),
        ([*CHAT, CHAT[0], *said(("assistant", [IMAGE]))], ("hi", "ho"), {FOREIGN: 1}),
        (
            [CHAT[0], *said(("assistant", [*part("why", "thinking"), *part("ho")]))],
            ("hi", "ho"),
            {"reasoning": 1},
        ),
        ([CHAT[0], *said(("assistant", part("no", "refusal")))], ("hi", "no"), {}),
        (
            said(("user", [{"type": "text", "text": {"value": "hi"}}]), ("bot", part("ho"))),
            ("hi", "ho"),
            {},
        ),
        (
            said(("user", [*part("hi"), {"type": "text", "text": None}]), ("bot", part("ho"))),
            ("hi", "ho"),
            {},
        ),
    ],
)  # fmt: skip
def test_rules_for_turns(
    messages: list, turns: tuple[str, ...], changed: dict, converted: Converted
) -> None:
    result, dialogues = converted([{"id": "a", "messages": messages}])
    assert dialogues == [turns]
    assert result.changed == changed


def test_an_input_follows_its_instruction_and_a_history_comes_first(converted: Converted) -> None:
    row = {"instruction": "Sum.", "input": "1 2", "output": "3", "history": [["hi", "ho"]]}
    assert converted([row])[1] == [("hi", "ho", "Sum.\n\n1 2", "3")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (5, "neither an object nor a list of messages"),
        ({"messages": []}, "no reply to a user's turn is left"),
        ({"messages": CHAT[:1]}, "no reply to a user's turn is left"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}, CHAT[1]]},
            "no reply to a user's turn of those without an image, a sound or a file is left",
        ),
        ({"messages": said(("user", "a"), ("alien", "b"))}, "the role 'alien' is not known"),
        ({"messages": [{"content": "a"}]}, "a message has no role"),
        ({"messages": said(("user", 5), ("assistant", "b"))}, "a content that is no text"),
        ({"messages": said(("user", [5]), ("assistant", "b"))}, "a content that is no text"),
        (
            {"messages": said(("user", "\ud800"), ("assistant", "b"))},
            "a lone surrogate, which is not Unicode text",
        ),
        ({"messages": said(("user", "\0"), ("assistant", "b"))}, "the control character U+0000"),
        ({"prompt": "a", "response": "b"}, f"not {FORMATS['messages'].what}"),
        ({"messages": CHAT}, "the same dialogue once more"),
    ],
)
def test_what_is_dropped_and_why(row: object, reason: str, converted: Converted) -> None:
    rows = [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}, row, row]
    result, dialogues = converted(rows)
    assert len(dialogues) == 2
    assert [(one, found.count, found.first) for one, found in result.dropped.items()] == [
        (reason, 2, "row 3")
    ]


def test_lines_that_are_no_json_are_dropped(converted: Converted) -> None:
    bad = b"{\n\n" + b"[" * 100_000 + b'\n{"prompt": ' + b"9" * 5000 + b', "response": "x"}\n'
    row = {"prompt": "hi", "response": "ho", "score": float("nan")}
    result, dialogues = converted(lines(row) + bad)
    assert dialogues == HI
    assert result.dropped["no JSON"].count == 3
    assert result.dropped["no JSON"].first == "line 2"


def test_ids_are_kept_or_made_of_what_was_said(tmp_path: Path, converted: Converted) -> None:
    def row(answer: str, **more: object) -> dict:
        return {"prompt": "hi", "response": answer, **more}

    rows = [row("a", id="x"), row("b", id="x"), row("c"), row("d", id=7), row("e", id="y" * 300)]
    result, _ = converted(rows)
    ids = [dialogue.id for dialogue in read_dialogues(tmp_path / "out.jsonl")]
    assert (ids[0], ids[3], result.changed[IDS]) == ("x", "7", 3)
    converted(rows[::-1])
    again = [dialogue.id for dialogue in read_dialogues(tmp_path / "out.jsonl")]
    assert again[::-1][2:] == ids[2:]
    made = ids[2]
    assert len(made) == 16
    converted([row("z", id=made), row("c")])
    again = [dialogue.id for dialogue in read_dialogues(tmp_path / "out.jsonl")]
    assert again == [made, again[1]]
    assert again[1].startswith(made)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"[]", "has no rows"),
        (b"[1, 2]", "has no row that can be read; row 1 is neither an object"),
        (b"[{", "is no JSON (line 1, column 3"),
        (b'[{"prompt": "a", "response": "b"}', "is no JSON (line 1, column"),
        (b'{"a": 1, "b": [2]}', "is an object of 'a', 'b'; expected a list"),
        (b'{"a": 1}\n{"a": 2}', "is of no format that is known: line 1 has a."),
        (b'{"a": \n1, "b": [2]}', "is an object of 'a', 'b'; expected a list"),
        (b'[{"x": 1}]', "is of no format that is known: row 1 has x. Expected attune's own"),
        (b"x,y\n1,2", "line 2 has x, y."),
        (b'question,answer\n"a,b\nc,d', "is no CSV (unexpected end of data)"),
        (b'question,answer\n"a"b,c', "is no CSV"),
        (b"question,answer\n\xff,b", "line 2 of"),
        ("[1]".encode("utf-16-le"), "has a NUL"),
        (codecs.BOM_UTF16_LE + b"x", "is not UTF-16"),
        (gzip.compress(b"x" * 100)[:-9], "is damaged after line"),
        (b'[{"messages": []}]', "can be used, read as messages: 1 × no reply to a user's turn"),
    ],
)
def test_files_that_cannot_be_read(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(data)
    with pytest.raises(LoopError) as caught:
        convert(tmp_path / "in", tmp_path / "out.jsonl")
    assert words in str(caught.value)
    assert str(tmp_path / "in") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


TEXT = st.sampled_from(["hi", "", " ", "\ud800", "é\n", "\0"]) | st.text(max_size=5)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "gpt", "x", 5])
PART = st.sampled_from([IMAGE, {"type": "text", "text": "a"}, "b", 7])
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": TEXT | st.lists(PART, max_size=3)})
ROW = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=8)}, optional={"id": TEXT | st.integers()}
)


@settings(max_examples=60)
@given(st.lists(ROW | st.integers(), min_size=1, max_size=6))
def test_all_that_is_read_is_written_or_dropped(rows: list) -> None:
    """And what is written goes through the loop's reader."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in"), Path(folder, "out.jsonl.gz")
        source.write_text(json.dumps(rows))
        try:
            result = convert(source, out)
        except LoopError as error:
            assert str(source) in str(error)  # noqa: PT017
            assert not out.exists()
            return
        assert result.read == len(rows)
        assert result.written + sum(one.count for one in result.dropped.values()) == len(rows)
        assert len(read_dialogues(out)) == result.written
        first = out.read_bytes()
        convert(source, out, force=True)
        assert out.read_bytes() == first


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,;\t\n ab\\', max_size=60).map(str.encode))
def test_any_file_is_converted_or_refused_by_a_sentence(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in"), Path(folder, "out.jsonl")
        source.write_bytes(data)
        try:
            convert(source, out)
        except LoopError as error:
            assert str(source) in str(error)  # noqa: PT017
            assert not out.exists()


def test_the_command(attune: Attune, tmp_path: Path) -> None:
    source, out = tmp_path / "chats[v1].json", tmp_path / "out.jsonl"
    rows = [{"conversations": SHARE}, {"conversations": [{"from": "[/b]", "value": "x"}]}]
    source.write_text(json.dumps(rows))
    done = attune("data", "convert", source, out)
    assert done.code == 0
    assert f"{source}: sharegpt (ShareGPT: conversations of from and value), a" in done.out
    assert "read 2, written 1 (2 turns" in done.out
    assert "the role '[/b]' is not known" in done.out
    assert f"next: attune train BUNDLE --data {out}" in done.err
    said = attune("data", "convert", source, out, "--json", "--force").json()
    assert said["format"] == "sharegpt"
    assert (said["read"], said["written"], said["turns"]) == (2, 1, 2)
    assert said["dropped"] == [
        {"reason": "the role '[/b]' is not known", "count": 1, "first": "row 2"}
    ]
    assert said["changed"] == {IDS: 1}
    assert said["bytes"] == out.stat().st_size
    named = attune("data", "convert", source, out, "--json", "--force", "--assistant-name", "[/b]")
    assert "no reply to a user's turn is left" in named.json()["dropped"][0]["reason"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.json", "out.jsonl"], "there is no file none.json"),
        (["in.json", "out.json"], "out.json is no name for a stream"),
        (["in.json", "there.jsonl"], "there.jsonl exists already"),
        (["same.jsonl", "same.jsonl"], "same.jsonl is what is read"),
        (["same.jsonl", "link.jsonl", "--force"], "link.jsonl is what is read"),
        (["in.json", "out.jsonl", "--from", "alpaca"], "It looks like pairs"),
        (["folder", "out.jsonl"], "folder cannot be read"),
    ],
)
def test_the_command_refuses(
    arguments: list[str],
    words: str,
    attune: Attune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.json").write_text('[{"prompt": "hi", "response": "ho"}]')
    Path("same.jsonl").write_text('{"prompt": "hi", "response": "ho"}')
    Path("link.jsonl").symlink_to("same.jsonl")
    Path("there.jsonl").write_text("mine")
    Path("folder").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    done = attune("data", "convert", *arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert Path("there.jsonl").read_text() == "mine"


def test_the_reader_of_streams_names_the_command(attune: Attune, tmp_path: Path) -> None:
    source, out = tmp_path / "in.json", tmp_path / "out.jsonl"
    for data in (
        json.dumps([{"messages": CHAT}]),
        json.dumps({"messages": CHAT}),
        "question,answer\nhi,ho\n",
        json.dumps({"id": "a", "turns": [{"role": "system", "content": "x"}, *CHAT]}),
        json.dumps({"prompt": "hi", "response": "ho"}, indent=1),
    ):
        source.write_text(data)
        with pytest.raises(LoopError, match=r"attune data convert writes such a file"):
            read_dialogues(source)
        convert(source, out, force=True)
        assert [turn.content for turn in read_dialogues(out)[0].turns] == ["hi", "ho"]
