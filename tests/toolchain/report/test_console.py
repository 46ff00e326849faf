"""What meets the terminal is text: no path, name or dialogue is markup, whatever it holds."""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toolchain
from exporters.model.spec import read_spec
from tests import tiny
from tests.toolchain.conftest import Attune, command
from tests.toolchain.streams.kit import row, write_dataset
from toolchain.report.console import (
    PlainConsole,
    Stages,
    bold,
    counted_progress,
    line,
    print_error,
    print_json,
    styled,
)
from toolchain.report.tables import plain_table

ODD = [
    "a[v1]",
    "[/b]",
    "[link=x]",
    "[bold]",
    "[",
    "]",
    "[/]",
    "x\\[y]",
    "\\",
    ":smile:",
    "[red",
    "{0}",
]


def shown(content: object, **options: object) -> str:
    """What a wide terminal without colors gets."""
    console = PlainConsole()
    console.file = io.StringIO()
    console.width = 10_000
    console.print(content, **options)
    return console.file.getvalue()


pieces = st.lists(st.sampled_from(ODD) | st.text("ab[]/=\\:{} é", max_size=8)).map("".join)


@given(pieces, pieces)
def test_text_is_shown_letter_by_letter(one: str, other: str) -> None:
    assert shown(one).removesuffix("\n") == one
    assert shown(bold(one)).removesuffix("\n") == one
    assert shown(line(styled("red", one), other)).removesuffix("\n") == one + other
    table = plain_table(["head", one], texts=["head", one], whole=["head", one])
    table.add_row(f"|{other}|", f"|{one}|")
    assert f"|{other}|" in shown(table)
    assert f"|{one}|" in shown(table)


@given(st.text())
def test_nothing_that_is_shown_is_a_command_or_cannot_be_encoded(text: str) -> None:
    seen = shown(text, soft_wrap=True)
    assert seen.encode()
    assert not set(seen.replace("\n", "")) & {chr(code) for code in (*range(32), *range(127, 160))}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("\x9b31m", "\\x9b31m"),
        ("caf\udce9", "caf\\udce9"),
        ("\U0001f600", "\U0001f600"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, seen: str) -> None:
    assert shown(text) == f"{seen}\n"


def test_a_terminal_that_is_not_unicode() -> None:
    console = PlainConsole()
    raw = io.BytesIO()
    console.file = io.TextIOWrapper(raw, encoding="ascii")
    console.print("Zażółć → ok")
    console.file.flush()
    assert raw.getvalue() == b"Za\\u017c\\xf3\\u0142\\u0107 \\u2192 ok\n"


def test_json_has_names_that_are_not_unicode(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_json({"é": "\udce9"})
    assert json.loads(capsys.readouterr().out) == {"é": "\udce9"}
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_json({"é": "\U0001f600"})
    sys.stdout.flush()
    assert json.loads(raw.getvalue()) == {"é": "\U0001f600"}


@pytest.mark.parametrize("text", ODD)
def test_stages_bars_and_errors(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Stages(text) as stages:
        stages(text)
    print_error(text)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.endswith(f" s  {text}\nerror: {text}\n")
    for progress in (counted_progress(False), stages._progress):
        console = progress.live.console = PlainConsole()
        console.file = io.StringIO()
        console.width = 200
        task = progress.add_task(text, total=3)
        progress.update(task, description=text)
        console.print(progress.get_renderable())
        assert text in console.file.getvalue()


def tree() -> Iterator[tuple[str, ast.Module]]:
    root = Path(str(toolchain.__file__)).parent
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_one_place_makes_consoles_and_none_reads_markup() -> None:
    """A console, a progress bar's text and Rich's own ``print`` read markup unless told not to."""
    found = {
        (name, node.func.id if isinstance(node.func, ast.Name) else node.func.attr)
        for name, module in tree()
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    }
    makers = {"Console", "PlainConsole", "TextColumn", "from_markup", "render_str", "escape"}
    assert {pair for pair in found if pair[1] in makers} == {
        ("report/console.py", "PlainConsole"),
        ("report/console.py", "TextColumn"),
        *((name, "escape") for name in ("report/html.py", "report/charts.py")),  # HTML's
    }
    modules = {
        node.module
        for _, module in tree()
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom)
    }
    assert not modules & {"rich", "rich.markup"}


@pytest.mark.parametrize("name", ["a[v1]", "[/b]", "[link=x]", ":smile:", "x[", "[bold red]"])
def test_names_on_the_command_line(name: str, attune: Attune, tmp_path: Path) -> None:
    """The real one: errors, tables, and what to do next."""
    folder = tmp_path / name  # a folder in a folder, where there is a slash
    said = attune("inspect", folder)
    assert (said.code, said.out) == (2, "")
    assert str(folder) in said.err
    spec = read_spec(tiny.config_of("llama"), tiny.CONTEXT)
    folder.parent.mkdir(exist_ok=True)
    bundle = tiny.paper_bundle(folder, spec, ["q_proj"], 2)
    said = attune("inspect", bundle)
    assert (said.code, said.err) == (0, "")
    assert str(folder) in said.out.replace("\n", "")
    write_dataset(folder, "d[v1]", [row(number, "d[v1]") for number in range(40)])
    out = folder / "s[x].jsonl"
    said = attune("stream", "d[v1]", "--data", folder, "--observed", 5, "--tests", 0, "--out", out)
    assert said.code == 0, said.err
    assert "d[v1]" in said.out
    assert f"--stream {out}" in said.err
    said = attune("stream", "[/b]", "--data", folder, "--out", out)
    assert said.code == 2
    assert "[/b]" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    "arguments", [["[/b]"], ["inspect", "x", "--[/b]"], ["stream", "--rows", "[/b]"]]
)
def test_what_is_not_a_command_is_named(arguments: list[str]) -> None:
    said = command(*arguments)
    assert said.code == 2
    assert "Traceback" not in said.err
    assert "[/b]" in said.err
