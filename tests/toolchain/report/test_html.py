"""Pages: text is escaped once, markup is left, and nothing is loaded."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from toolchain.report import html
from toolchain.report.html import Markup, TableCell, element, join, section, table

EVIL = '<script src="x">&"'


class Reader(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_text_is_escaped_and_markup_is_not() -> None:
    inner = element("b", EVIL)
    assert join(inner, EVIL) == join(inner) + join(EVIL)
    page = html.page(
        EVIL,
        join(EVIL),
        section(EVIL, html.paragraph(EVIL), html.tile(EVIL, EVIL), element("p", inner)),
        html.figure(EVIL, Markup("<svg></svg>"), EVIL),
        html.details(join(EVIL), EVIL),
        table([EVIL], [[EVIL], [TableCell(EVIL, "bad")], [inner]]),
    )
    reader = Reader(page)
    assert not reader.of("script")
    assert len(reader.of("svg")) == 1
    # title, heading, lead, section, paragraph, two of the tile, inner, two of the figure, two of
    # the details, the table's head and three cells
    assert reader.text.count(EVIL) == 16
    assert "&amp;amp;" not in page


def test_a_table_s_columns_and_wide_cells() -> None:
    rows = [
        ["a", 1, 2.5],
        ["b", TableCell("all of it", "bad", span=2)],
        ["c", "", TableCell(7, "bad")],
    ]
    reader = Reader(table(("name", "one", "two"), rows, numbers=["one", "two"]))
    assert [cell.get("class") for cell in reader.of("th")] == [None, "number", "number"]
    kinds = [(cell.get("class"), cell.get("colspan")) for cell in reader.of("td")]
    assert kinds[:3] == [(None, None), ("number", None), ("number", None)]
    assert kinds[3:5] == [(None, None), ("bad", "2")]
    assert kinds[5:] == [(None, None), ("number", None), ("number bad", None)]


def test_a_page_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    for title in ("first", "second"):
        html.write_page(path, html.page(title, join()))
    assert "second" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
