"""Charts: the same bytes for the same numbers, text that stays text, nothing around them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from toolchain.report.charts import Series, house_style, inline_svg, write_svg

SVG = "{http://www.w3.org/2000/svg}"


def test_a_chart_within_a_page() -> None:
    from matplotlib.figure import Figure

    def draw() -> str:
        with house_style():
            figure = Figure(figsize=(3, 2))
            figure.add_subplot().plot([1, 2], [3, 4], label="a line")
            figure.axes[0].set_xlabel("across")
            return inline_svg(figure, 'what "it" is')

    root = ElementTree.fromstring(draw())
    assert draw() == draw()
    assert root.tag == f"{SVG}svg"
    assert (root.get("role"), root.get("aria-label")) == ("img", 'what "it" is')
    assert "across" in [text.text for text in root.iter(f"{SVG}text")]


def test_lines_as_a_file(tmp_path: Path) -> None:
    lines = [Series("one", ((0, 1.0), (1, 2.0))), Series("other", ((0, 2.0), (1, 1.0)))]
    write_svg(tmp_path / "new" / "curve.svg", lines, "step", "loss")
    text = [t.text for t in ElementTree.parse(tmp_path / "new" / "curve.svg").iter(f"{SVG}text")]
    assert {"one", "other", "step", "loss"} <= set(text)
