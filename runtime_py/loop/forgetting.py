"""Forgetting a dialogue set, and saying what cannot be forgotten at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runtime_py.loop.adapter_versions import Versions
from runtime_py.loop.buffer import Buffer
from runtime_py.loop.errors import LoopError
from runtime_py.loop.jobs import Jobs
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.records import observed_as
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import Store
from runtime_py.loop.tallies import count_direction


@dataclass(frozen=True)
class Forgotten:
    """What ``forget`` removed, and in ``note`` what it could not."""

    id: str
    stored: bool
    synthetic: int
    job_abandoned: bool
    adapters: tuple[int, ...]  # that have learnt from it, in themselves or through an ancestor
    note: str


def forget(
    id: str,
    store: Store,
    buffer: Buffer,
    lexicons: Lexicons,
    versions: Versions,
    jobs: Jobs,
    clock: Callable[[], Moment],
) -> Forgotten:
    """One transaction; the text is then overwritten in the file."""
    if observed_as(store, id) is None:
        raise LoopError(f"no dialogue {id!r} was ever observed; there is nothing to forget.")
    count = "SELECT count(*) FROM synthetic WHERE source = ?"
    synthetic = store.rows(count, id)[0][0]
    touched = versions.learnt_from(id)
    begun = store.rows("SELECT DISTINCT job FROM job_sets WHERE source = ?", id)
    note = "nothing of it is left but its id and scores in the log."
    if touched:
        note = (
            f"the adapters {', '.join(map(str, touched))} have learnt from it and stay; the next "
            f"fine-tuning starts from before them, and rollback goes back at once."
        )
    bin = buffer.bin_of(id)
    with store.transaction(durable=True):
        if bin is not None:
            domain = lexicons.names[buffer.domains[bin]]
            count_direction(store, "observed", domain, buffer.directions[bin], -1)
            if buffer.was_asked[bin]:
                count_direction(store, "asked", domain, buffer.directions[bin], -1)
        stored = store.execute("DELETE FROM sets WHERE id = ?", id) > 0
        for (job,) in begun:
            jobs.end(job)
            store.set_count("fine_tune_from", 0)  # its other sets wait, so it is due again
        store.execute("UPDATE learnt SET forgotten = 1 WHERE id = ?", id)
        data = {"stored": stored, "synthetic": synthetic, "job_abandoned": bool(begun)}
        store.append(clock(), "forgotten", id, data)
    if bin is not None:
        buffer.unsee(bin)
        buffer.clear(bin)
    store.scrub()
    jobs.sweep()
    return Forgotten(id, stored, synthetic, bool(begun), touched, note)
