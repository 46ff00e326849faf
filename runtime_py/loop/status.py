"""The state of the loop in numbers, and whether the store has all that its log promises."""

from __future__ import annotations

from dataclasses import dataclass

from runtime_py.loop.buffer import Buffer
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.log import replay
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.store import Store


@dataclass(frozen=True)
class Status:
    """``stored`` of ``bins`` are filled, by domain in ``domains``. ``due_in``: sets still to be
    observed before the next fine-tuning. ``job``: an unfinished fine-tuning."""

    observed: int
    kept: int
    refused: int
    bins: int
    stored: int
    domains: dict[str, int]
    questions_asked: int
    questions_pending: int
    questions_lapsed: int
    answered: int
    synthesized: int
    fine_tunes: int
    adapters_accepted: int
    adapter: int
    due_in: int
    job: int | None


def status(store: Store, buffer: Buffer, policy: LoopPolicy, lexicons: Lexicons) -> Status:
    """The store's counters and rows, and what the buffer holds of which domain."""
    count = store.counts()
    observed = count.get("observed", 0)
    due = count.get("fine_tune_from", 0) + policy.fine_tune_every_sets
    names, counts = lexicons.names, buffer.counts
    jobs = store.rows("SELECT number FROM jobs")
    return Status(
        observed=observed,
        kept=count.get("kept", 0),
        refused=count.get("refused", 0),
        bins=buffer.bins,
        stored=len(buffer),
        domains={name: int(n) for name, n in zip(names, counts, strict=True) if n},
        questions_asked=count.get("asked", 0),
        questions_pending=store.rows("SELECT count(*) FROM questions")[0][0],
        questions_lapsed=count.get("lapsed", 0),
        answered=count.get("answered", 0),
        synthesized=count.get("synthesized", 0),
        fine_tunes=count.get("fine_tunes", 0),
        adapters_accepted=count.get("adapters_accepted", 0),
        adapter=count.get("active_adapter", 0),
        due_in=max(0, due - observed),
        job=jobs[0][0] if jobs else None,
    )


def lost(store: Store) -> tuple[str, ...]:
    """Ids of sets and answers that the log says are here and the store has not: none, ever."""
    log = store.log()
    stored = {row[0] for row in store.rows("SELECT id FROM sets")}
    answers = {row[0] for row in store.rows("SELECT id FROM annotations")}
    here = {bin.id for bin in replay(log).values()}
    answered = {line.id for line in log if line.event == "answered" and line.id in here}
    return tuple(sorted((here - stored) | {str(id) for id in answered - answers}))
