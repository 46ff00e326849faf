"""A search as one HTML page, and in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from toolchain.report import html
from toolchain.report.charts import house_style, inline_svg
from toolchain.report.html import Markup, TableCell, element, join, section, table
from toolchain.report.palette import ACCENT, FAINT, INK
from toolchain.report.tables import plain_table
from toolchain.tune.measuring import Measured
from toolchain.tune.search import Finalist, TuneOutcome
from toolchain.tune.space import Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN = "as it is"  # the policy that is there already
_HEADS = ("policy", "gain, searched", "gain, fresh", "minutes", "MB", "forgetting")


def finalist_rows(outcome: TuneOutcome) -> list[list[str]]:
    """The policy that is there already first, then the best of the search."""
    return [
        [
            _name(one.number),
            f"{one.seen.gain:+.2%}",
            "failed" if one.fresh is None else f"{one.fresh.gain:+.2%}",
            *_figures(one.fresh or one.seen),
        ]
        for one in outcome.finalists
    ]


def print_table(output: Console, outcome: TuneOutcome) -> None:
    """The finalists, and what was written."""
    shown = plain_table(_HEADS, texts=["policy"])
    for row in finalist_rows(outcome):
        shown.add_row(*row)
    output.print(shown)
    output.print(verdict(outcome), soft_wrap=True)


def verdict(outcome: TuneOutcome) -> str:
    """One sentence."""
    winner = outcome.winner
    if winner.number is None:
        return "nothing that was tried gains more on fresh orderings: the policy stays as it is."
    before = outcome.finalists[0]
    return (
        f"trial {winner.number} is written: {winner.gain:+.2%} of the loss on fresh orderings, "
        f"where the policy as it is has {before.gain:+.2%}."
    )


def write_page(path: Path, outcome: TuneOutcome, model: str) -> None:
    """``model``: its name."""
    html.write_page(path, page(outcome, model))


def page(outcome: TuneOutcome, model: str) -> str:
    """The whole text of the file."""
    limits = outcome.limits
    lead = join(
        f"Gain: the part of the untouched model's loss on unseen dialogues of the development "
        f"streams that is gone. A policy fits where a night takes at most {limits.minutes:,.0f} "
        f"minutes and {limits.memory_mb:,.0f} MB on {limits.phone} (modelled), and the general "
        f"text's perplexity grows by at most {limits.forgetting:.1%}. What is chosen is chosen on "
        f"orderings that the search has not seen."
    )
    figure = html.figure("Trials", _trials(outcome), "Dots: trials that fit, and in grey those "
                         "that do not. Line: the best so far.")  # fmt: skip
    return html.page(
        f"Tuning {model}",
        lead,
        element("p", verdict(outcome)),
        element("div", figure, kind="figures"),
        section("Finalists", table(_HEADS, finalist_rows(outcome), numbers=_HEADS[1:])),
        section("What was written", _fields(outcome.winner)),
        section("All trials", _all(outcome)),
    )


def _fields(winner: Finalist) -> Markup:
    if not winner.policy:
        return element("p", "No field: the bundle's own policy.", kind="quiet")
    rows = [[name, _told(value)] for name, value in sorted(winner.policy.items())]
    return table(("field", "value"), rows, numbers=["value"])


def _all(outcome: TuneOutcome) -> Markup:
    rows: list[list[object]] = []
    for row in outcome.trials:
        fields = ", ".join(f"{name} {_told(value)}" for name, value in row.policy.items())
        if row.measured is None:
            rows.append(
                [row.number, TableCell("failed", "bad"), "—", "—", "—", row.sentence or fields]
            )
            continue
        gain = f"{row.measured.gain:+.2%}"
        shown = TableCell(gain) if row.fits else TableCell(f"{gain}, does not fit", "bad")
        rows.append([row.number, shown, *_figures(row.measured), fields])
    heads = ("trial", "gain", "minutes", "MB", "forgetting", "policy")
    return table(heads, rows, numbers=heads[:-1])


def _figures(measured: Measured) -> list[str]:
    minutes, memory, forgetting = measured.minutes, measured.memory_mb, measured.forgetting
    return [
        "not told" if minutes is None else f"{minutes:,.1f}",
        "not told" if memory is None else f"{memory:,.0f}",
        "not told" if forgetting is None else f"{forgetting:+.1%}",
    ]


def _told(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name(number: int | None) -> str:
    return OWN if number is None else f"trial {number}"


@house_style()
def _trials(outcome: TuneOutcome) -> Markup:
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(6.4, 3.1), layout="constrained")
    axes = figure.add_subplot()
    known = [(row.number, row.measured.gain, row.fits) for row in outcome.trials if row.measured]
    for fits, color in ((False, FAINT), (True, ACCENT)):
        across = [number for number, _, ok in known if ok is fits]
        up = [gain for _, gain, ok in known if ok is fits]
        axes.scatter(across, up, s=14, color=color)
    best: list[tuple[int, float]] = []
    for number, gain, ok in known:
        if ok and (not best or gain > best[-1][1]):
            best.append((number, gain))
    axes.step([n for n, _ in best], [g for _, g in best], where="post", color=ACCENT)
    axes.axhline(outcome.finalists[0].seen.gain, color=INK, linewidth=1, linestyle=":", label=OWN)
    axes.set(xlabel="trial", ylabel="gain")
    axes.legend()
    return inline_svg(figure, "gain of each trial")
