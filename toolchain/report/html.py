"""Pages that need nothing from anywhere else. Text is escaped where it enters markup."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from runtime_py.loop.files import write_bytes
from toolchain.report import palette

_STYLE = f"""
:root {{ color-scheme: light; --ink: {palette.INK}; --quiet: {palette.QUIET};
  --line: {palette.LINE}; --accent: {palette.ACCENT}; --good: {palette.GOOD};
  --bad: {palette.BAD}; --warning: {palette.WARNING}; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1120px; padding: 2rem 1.2rem 4rem; color: var(--ink);
  background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }}
h1 {{ font-size: 1.7rem; margin: 0; }} h2 {{ font-size: 1.2rem; margin: 2.4rem 0 .6rem; }}
h3 {{ font-size: 1rem; margin: 0 0 .4rem; }} p {{ max-width: 48rem; }}
.quiet, p.lead, figcaption {{ color: var(--quiet); }} p.lead {{ margin: .2rem 0 1.4rem; }}
.good {{ color: var(--good); }} .bad {{ color: var(--bad); font-weight: 600; }}
.note {{ border-left: 4px solid var(--warning); background: #fdf6ea; padding: .6rem .9rem; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; }}
.card {{ border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem;
  overflow-wrap: anywhere; }}
.card p {{ margin: .3rem 0; white-space: pre-wrap; }}
.card .reply {{ border-left: 3px solid var(--accent); padding-left: .6rem; }}
.tiles b {{ display: block; font-size: 1.35rem; font-weight: 600; }}
.columns {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }}
.stack {{ display: grid; gap: 1rem; }}
.columns .card {{ margin: 0 0 .7rem; }}
.figures {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }}
svg {{ max-width: 100%; height: auto; }} .figures svg {{ width: 100%; }}
figure {{ margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }}
figure h3 {{ margin: 0; }} figcaption {{ font-size: .85rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
td, th {{ text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }}
th {{ font-weight: 600; color: var(--quiet); }}
.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
details {{ border-bottom: 1px solid var(--line); padding: .45rem 0; }}
summary {{ cursor: pointer; }}
blockquote {{ margin: .2rem 0 0; color: var(--quiet); font-size: .84rem; }}
"""


class Markup(str):
    """HTML as it stands in a page."""

    __slots__ = ()


@dataclass(frozen=True)
class TableCell:
    """Of a table: ``kind``, a class of the style beside its column's; ``span``: columns."""

    content: object
    kind: str = ""
    span: int = 1


def join(*content: object) -> Markup:
    """One after the other: markup as it is, anything else as its escaped text."""
    return Markup(
        "".join(part if isinstance(part, Markup) else escape(str(part)) for part in content)
    )


def element(tag: str, *content: object, kind: str = "") -> Markup:
    """``content`` within a tag; ``kind``: its class, one or several of the style."""
    named = f' class="{escape(kind)}"' if kind else ""
    return Markup(f"<{tag}{named}>{join(*content)}</{tag}>")


def paragraph(*content: object, kind: str = "") -> Markup:
    return element("p", *content, kind=kind)


def section(title: str, *content: object) -> Markup:
    """Content below a heading."""
    return join(element("h2", title), *content)


def tile(value: str, name: str, bad: bool = False) -> Markup:
    """A figure in large, with its name; ``bad``: in the color of an alarm."""
    return element("div", element("b", value, kind="bad" if bad else ""), name, kind="card")


def figure(title: str, svg: Markup, note: str) -> Markup:
    """A picture with a heading, and a sentence below it."""
    return element("figure", element("h3", title), svg, element("figcaption", note))


def details(summary: Markup, *content: object) -> Markup:
    """Content that opens at a click on its summary."""
    return element("details", element("summary", summary), *content)


def table(
    heads: Sequence[str], rows: Sequence[Sequence[object]], numbers: Collection[str] = ()
) -> Markup:
    """``numbers``: the heads of columns that are aligned as numbers are. A cell is a ``TableCell``,
    markup, or text."""
    kinds = ["number" if head in numbers else "" for head in heads]
    first = [element("th", head, kind=kind) for head, kind in zip(heads, kinds, strict=True)]
    body = [element("tr", *_cells(row, kinds)) for row in rows]
    return element("div", element("table", element("tr", *first), *body), kind="scroll")


def _cells(row: Sequence[object], kinds: Sequence[str]) -> list[Markup]:
    cells, column = [], 0
    for value in row:
        cell = value if isinstance(value, TableCell) else TableCell(value)
        kind = " ".join(filter(None, (kinds[column] if cell.span == 1 else "", cell.kind)))
        if cell.span == 1:
            cells.append(element("td", cell.content, kind=kind))
        else:
            attributes = f' colspan="{cell.span}"' + (f' class="{escape(kind)}"' if kind else "")
            cells.append(Markup(f"<td{attributes}>{join(cell.content)}</td>"))
        column += cell.span
    return cells


def page(title: str, lead: Markup, *content: Markup) -> str:
    """A whole page, with its title as a heading and ``lead`` below it."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{element('h1', title)}{paragraph(lead, kind='lead')}"
        + "\n".join(content)
        + "</body></html>\n"
    )


def write_page(path: Path, text: str) -> None:
    """There whole, or not at all."""
    write_bytes(path, text.encode())
