"""The report as one HTML page that needs nothing from anywhere else."""

from __future__ import annotations

from html import escape
from pathlib import Path

from toolchain.simulate.life_pictures import pictures
from toolchain.simulate.life_table import duration, facts
from toolchain.simulate.outcome import Outcome

_LONGEST = 600  # characters of an example
_CSS = """
:root { color-scheme: light; --ink: #1f2933; --quiet: #616e7c; --line: #e4e7eb; --own: #1f7a8c; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 2rem 1.2rem 4rem; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p.lead, figcaption, .quiet { color: var(--quiet); } p.lead { margin: .2rem 0 1.4rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600; }
.tile.bad b { color: #c8553d; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
figure h3 { margin: 0; font-size: 1rem; } figure svg { width: 100%; height: auto; }
figcaption { font-size: .85rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .6rem;
  border-bottom: 1px solid var(--line); vertical-align: top; } td.n, th.n { text-align: right; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1rem; }
.text { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; margin: 0 0 .7rem;
  overflow-wrap: anywhere; }
.text p { margin: .3rem 0; white-space: pre-wrap; }
.text p.said { border-left: 3px solid var(--own); padding-left: .6rem; }
.note { border-left: 4px solid #e9a23b; background: #fdf6ea; padding: .6rem .9rem; }
"""


def write_page(path: Path, outcome: Outcome) -> None:
    path.write_text(page(outcome), encoding="utf-8")


def page(outcome: Outcome) -> str:
    model, device = outcome.manifest.model, outcome.device
    stream, watched = outcome.stream, outcome.watched
    parts = [
        f"<h1>{_t(model.name)} on {_t(device.name)}</h1>",
        f"<p class='lead'>{len(outcome.scored):,} dialogues of {_t(stream.path.name)}, "
        f"seed {outcome.life.seed}, policy {_t(outcome.life.policy['selection'])}. Memory, cores "
        f"and storage were enforced on this machine; hours and watt-hours are <b>modelled</b> "
        f"from counted operations and bytes.</p>",
    ]
    if watched.ended:
        parts.append(f"<p class='note'>The run ended early: {_t(watched.ended)}</p>")
    if stream.bad:
        parts.append(
            f"<p class='note'>{len(stream.bad):,} lines of the stream were left out; the first: "
            f"{_t(stream.bad[0])}</p>"
        )
    tiles = "".join(
        f"<div class='tile{' bad' * fact.bad}'><b>{_t(fact.value)}</b>{_t(fact.name)}</div>"
        for fact in facts(outcome)
    )
    parts.append(f"<div class='tiles'>{tiles}</div>")
    figures = "".join(
        f"<figure><h3>{_t(one.title)}</h3>{one.svg}<figcaption>{_t(one.note)}</figcaption></figure>"
        for one in pictures(outcome)
    )
    parts.append(f"<h2>Over the stream</h2><div class='pictures'>{figures}</div>")
    parts += [_blocks(outcome), _faults(outcome), _nights(outcome), _texts(outcome)]
    parts.append(_device(outcome))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_t(model.name)} on {_t(device.name)}</title><style>{_CSS}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _t(text: object) -> str:
    return escape(str(text))


def _rows(head: list[str], rows: list[list[str]], numbers: set[int]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numbers else ''}>{_t(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{line(head, 'th')}</tr>{body}</table>"


def _blocks(outcome: Outcome) -> str:
    rows = [
        [b.name or "—", f"{b.first}", f"{b.observed}", f"{b.kept}", f"{b.kept / b.observed:.0%}"]
        for b in outcome.blocks
    ]
    head = ["block", "from", "observed", "kept", "acceptance"]
    return f"<h2>Acceptance by block</h2>{_rows(head, rows, {1, 2, 3, 4})}"


def _faults(outcome: Outcome) -> str:
    if not outcome.watched.faults:
        return "<h2>Faults</h2><p class='quiet'>None were made.</p>"
    rows = [
        [
            fault.kind.replace("_", " "),
            f"{fault.place}",
            f"{fault.seconds:.1f}",
            fault.how or "not got over",
        ]
        for fault in outcome.watched.faults
    ]
    head = ["fault", "after dialogue", "second", "recovery"]
    return f"<h2>Faults and recoveries</h2>{_rows(head, rows, {1, 2})}"


def _nights(outcome: Outcome) -> str:
    worked = [night for night in outcome.nights if night.hours > 0 or night.state != "not_due"]
    if not worked:
        return "<h2>Nights</h2><p class='quiet'>No fine-tuning was due.</p>"
    rows = [
        [
            f"{night.day + 1}",
            night.state.replace("_", " "),
            duration(night.hours),
            f"{night.watt_hours:.3g}",
            f"{100 * night.battery:.2g} %",
        ]
        for night in worked
    ]
    head = ["day", "fine-tuning", "work", "Wh", "of a full battery"]
    return f"<h2>Nights (modelled)</h2>{_rows(head, rows, {2, 3, 4})}"


def _texts(outcome: Outcome) -> str:
    columns = []
    for kind in ("kept", "refused", "synthesized"):
        cards = "".join(
            f"<div class='text'><span class='quiet'>{_t(one.title)}</span>"
            f"<p>{_t(_short(one.question))}</p><p class='said'>{_t(_short(one.answer))}</p></div>"
            for one in outcome.examples
            if one.kind == kind
        )
        columns.append(f"<div><h3>{kind}</h3>{cards or '<p class=quiet>none</p>'}</div>")
    return f"<h2>Examples</h2><div class='texts'>{''.join(columns)}</div>"


def _device(outcome: Outcome) -> str:
    rows = [
        [
            place,
            f"{getattr(getattr(outcome.device, place.split('.')[0]), place.split('.')[1]):g}",
            source,
        ]
        for place, source in outcome.device.sources.items()
    ]
    head = ["figure", "value", "source"]
    return f"<h2>{_t(outcome.device.name)}: the profile</h2>{_rows(head, rows, {1})}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + " …"
