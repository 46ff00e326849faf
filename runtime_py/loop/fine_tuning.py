"""One fine-tuning from due to accepted or rejected, in steps that can each be the last one.

Every step is a transaction: after an interruption the next call goes on with the first step that
is not in the store.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from runtime_py.loop.adapter_versions import Versions
from runtime_py.loop.buffer import Buffer
from runtime_py.loop.guard import accepts
from runtime_py.loop.jobs import Jobs
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Engine, FineTuneJob, FineTuner, FineTuneResult
from runtime_py.loop.records import annotated_sets, write_pair
from runtime_py.loop.schedule import Conditions, Moment, is_due, obstacles, sequence_tokens
from runtime_py.loop.store import Store
from runtime_py.loop.synthesis import synthesize

State = Literal["not_due", "too_few", "postponed", "stopped", "rejected", "accepted"]


@dataclass(frozen=True)
class FineTuneReport:
    """``reason`` is a sentence. ``synthesized``: pairs that this call wrote. ``adapter``: the
    active version afterwards. The rest is None or empty where no run ended."""

    state: State
    reason: str
    adapter: int
    synthesized: int = 0
    job: int | None = None
    heldout_loss_before: float | None = None
    heldout_loss_after: float | None = None
    losses: tuple[float, ...] = ()
    seconds: float = 0.0


class _Stopped(Exception):  # noqa: N818 - a signal between the methods here
    pass


class FineTuning:
    def __init__(
        self,
        store: Store,
        versions: Versions,
        jobs: Jobs,
        buffer: Buffer,
        loop: LoopPolicy,
        engine: Engine,
        tuner: FineTuner,
        clock: Callable[[], Moment],
    ) -> None:
        self._store, self._versions, self._jobs, self._buffer = store, versions, jobs, buffer
        self._loop, self._engine, self._tuner, self._clock = loop, engine, tuner, clock
        self._synthesized = 0

    def run(self, conditions: Conditions, stop: Callable[[], bool]) -> FineTuneReport:
        """Begins a job, or goes on with the one that is unfinished, as far as the policy, the
        device and ``stop`` let it; the report says how far. ``stop`` is asked between paraphrases
        and between micro-batches."""
        self._synthesized = 0
        job = self._jobs.unfinished()
        if job is None:
            since = self._store.count("observed") - self._store.count("fine_tune_from")
            if not is_due(since, 0, self._loop):
                every = self._loop.fine_tune_every_sets
                return self._report("not_due", f"{since} of {every} dialogue sets were observed.")
            held_out = {item.held_out for item in annotated_sets(self._store)}
            if held_out != {True, False}:
                return self._report(
                    "too_few", "fewer than two sets are answered: one to learn, one held out."
                )
        if reasons := obstacles(conditions, self._loop):
            return self._report("postponed", f"{', and '.join(reasons)}.", job)
        longest = job.max_sequence_tokens if job else self._loop.longest_sequence_tokens
        tokens = sequence_tokens(longest, conditions.free_memory_mb, self._loop)
        if tokens is None:
            return self._report("postponed", self._too_little_memory(conditions), job)
        try:
            if job is None:
                self._paraphrase(stop)
                job = self._begin(tokens)
            elif tokens < job.max_sequence_tokens:
                job = self._shorten(job, tokens)
            return self._train(job, conditions, stop)
        except _Stopped:
            return self._report("stopped", "it was stopped, and goes on when called again.", job)

    def _paraphrase(self, stop: Callable[[], bool]) -> None:
        """One transaction a pair: its text, that it was tried, and the random stream after it."""
        adapter = self._versions.active
        for item in annotated_sets(self._store):
            if item.held_out:
                continue
            for ordinal in range(item.paraphrased, self._loop.paraphrases):
                if stop():
                    raise _Stopped
                id = item.dialogue.id
                stream = self._store.stream("synthesis")
                pair = synthesize(item.dialogue, self._engine, stream, self._loop)
                with self._store.transaction():
                    write_pair(self._store, id, ordinal, pair, adapter)
                    self._store.save_stream("synthesis", stream)
                    if pair:
                        self._store.add("synthesized")
                    data: dict[str, Any] = {"ordinal": ordinal, "adapter": adapter}
                    if pair:
                        data["question_rouge1"] = pair.question.rouge1
                        data["answer_rouge1"] = pair.answer.rouge1
                    event = "synthesized" if pair else "not_synthesized"
                    self._store.append(self._clock(), event, id, data)
                self._synthesized += pair is not None

    def _begin(self, tokens: int) -> FineTuneJob:
        stream = self._store.stream("training")
        seed = stream.seed()
        with self._store.transaction(durable=True):
            parent = self._versions.untouched_parent()
            number = self._jobs.begin(parent, seed, tokens, self._loop)
            self._store.save_stream("training", stream)
            self._store.set_count("fine_tune_from", self._store.count("observed"))
            data: dict[str, Any] = {"job": number, "parent": parent, "sequence_tokens": tokens}
            data["sources"] = [source for source, _ in self._jobs.sources(number)]
            self._store.append(self._clock(), "job_begun", None, data)
        return self._jobs.read(number)

    def _shorten(self, job: FineTuneJob, tokens: int) -> FineTuneJob:
        with self._store.transaction():
            self._jobs.shorten(job.number, tokens)
            data = {"job": job.number, "sequence_tokens": tokens}
            self._store.append(self._clock(), "job_shortened", None, data)
        self._jobs.sweep()
        return replace(job, max_sequence_tokens=tokens)

    def _train(
        self, job: FineTuneJob, conditions: Conditions, stop: Callable[[], bool]
    ) -> FineTuneReport:
        while True:
            folder = self._jobs.folder(job)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                result = self._tuner.run(job, folder, stop)
            except MemoryError:
                tokens = job.max_sequence_tokens // 2
                if tokens < self._loop.shortest_sequence_tokens:
                    return self._report("postponed", self._too_little_memory(conditions), job)
                job = self._shorten(job, tokens)
                continue
            if result is None:
                reason = "it was stopped in training, and goes on when called again."
                return self._report("stopped", reason, job)
            return self._end(job, result)

    def _end(self, job: FineTuneJob, result: FineTuneResult) -> FineTuneReport:
        """Takes or refuses the adapter: one transaction, and the job is over."""
        accepted = accepts(result)
        number = self._store.rows("SELECT max (number) FROM adapters")[0][0] + 1
        kept = self._versions.keep(result, number) if accepted else None
        sources = self._jobs.sources(job.number)
        before, after = result.heldout_loss_before, result.heldout_loss_after
        with self._store.transaction(durable=True):
            if kept:
                self._store.execute(
                    "INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?, 'kept')",
                    number,
                    self._jobs.parent(job.number),
                    kept.name,
                    kept.sha256,
                    before,
                    after,
                )
                for id, held_out in sources:
                    if not held_out:
                        self._store.execute(
                            "INSERT INTO learnt (adapter, id) VALUES (?, ?)", number, id
                        )
                self._versions.activate(number)
                self._versions.retire(self._loop.adapters_kept)
                self._store.add("adapters_accepted")
            for id, _ in sources:
                self._store.execute(
                    "UPDATE annotations SET used_in = ? WHERE id = ?", job.number, id
                )
            self._jobs.end(job.number)
            self._store.add("fine_tunes")
            data: dict[str, Any] = {"job": job.number, "adapter": number if kept else None}
            # JSON has no infinities and no NaN
            data["heldout_loss_before"] = before if math.isfinite(before) else str(before)
            data["heldout_loss_after"] = after if math.isfinite(after) else str(after)
            event = "adapter_accepted" if kept else "adapter_rejected"
            self._store.append(self._clock(), event, None, data)
        for id, _ in sources:
            self._buffer.set_waiting(id, False)
        self._jobs.sweep()
        self._versions.sweep()
        if kept:
            self._engine.use_adapter(self._versions.file(number))
        verdict = "did not get worse" if accepted else "got worse, so the old adapter stays"
        return FineTuneReport(
            state="accepted" if accepted else "rejected",
            reason=f"the held-out loss went from {before:.4f} to {after:.4f}: it {verdict}.",
            adapter=self._versions.active,
            synthesized=self._synthesized,
            job=job.number,
            heldout_loss_before=before,
            heldout_loss_after=after,
            losses=result.losses,
            seconds=result.seconds,
        )

    def _report(self, state: State, reason: str, job: FineTuneJob | None = None) -> FineTuneReport:
        number = job.number if job else None
        return FineTuneReport(state, reason, self._versions.active, self._synthesized, number)

    def _too_little_memory(self, conditions: Conditions) -> str:
        return (
            f"{conditions.free_memory_mb} MB are free, too little even for sequences of "
            f"{self._loop.shortest_sequence_tokens} tokens."
        )
