"""One fine-tuning from due to accepted or rejected, in steps that can each be the last one.

Every step is a transaction: after an interruption the next call goes on with the first step that
is not in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from runtime_py.loop.adapter_versions import Versions
from runtime_py.loop.buffer import Buffer
from runtime_py.loop.fine_tune_report import FineTuneReport, State
from runtime_py.loop.guard import judge
from runtime_py.loop.jobs import Jobs, answered_sources, fitted, is_whole, two_sided
from runtime_py.loop.lesson import Capacity, lesson
from runtime_py.loop.log import Event
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Engine, FineTuneJob, FineTuner, FineTuneResult
from runtime_py.loop.records import annotated_sets, write_pair
from runtime_py.loop.schedule import (
    Conditions,
    Moment,
    is_due,
    next_shorter,
    obstacles,
    sequence_tokens,
)
from runtime_py.loop.store import Store
from runtime_py.loop.synthesis import synthesize


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
        capacity: Capacity,
        clock: Callable[[], Moment],
    ) -> None:
        self._store, self._versions, self._jobs, self._buffer = store, versions, jobs, buffer
        self._loop, self._engine, self._tuner, self._clock = loop, engine, tuner, clock
        self._capacity = capacity
        self._synthesized = 0

    def run(self, conditions: Conditions, stop: Callable[[], bool]) -> FineTuneReport:
        """Begins a job, or goes on with the one that is unfinished, as far as the policy, the
        device and ``stop`` let it; the report says how far. ``stop`` is asked between paraphrases
        and between micro-batches."""
        self._synthesized = 0
        job = self._unfinished()
        if job is None and (refusal := self._refusal()):
            return refusal
        if reasons := obstacles(conditions, self._loop):
            return self._report("postponed", f"{', and '.join(reasons)}.", job)
        longest = self._capacity.longest
        if job:
            longest = min(longest, job.max_sequence_tokens)
        free = conditions.free_memory_mb
        tokens = sequence_tokens(self._tuner.lengths, longest, free, self._loop)
        if tokens is None:
            return self._report("postponed", self._too_little_memory(conditions), job)
        try:
            if job is None:
                sources, left_out = fitted(
                    answered_sources(self._store), self._capacity.within(tokens)
                )
                if not two_sided(sources):
                    return self._one_sided(tokens, left_out, None)
                self._paraphrase(tokens, stop)
                job = self._begin(tokens)
            elif not is_whole(job, self._capacity.within(tokens)):
                shorter = self._shorten(job, tokens)
                if isinstance(shorter, FineTuneReport):
                    return shorter
                job = shorter
            return self._train(job, conditions, stop)
        except _Stopped:
            return self._report("stopped", "it was stopped, and goes on when called again.", job)

    def _unfinished(self) -> FineTuneJob | None:
        """The job that was begun. It is abandoned where its parent's file is not sound, and where
        it has nothing to learn or nothing to judge it by with the programs there are, which an
        older store or another bundle can leave."""
        number = self._jobs.unfinished()
        if number is None:
            return None
        parent, left_out = self._jobs.parent(number), list[str]()
        if self._versions.usable(parent) == parent:
            job = self._jobs.read(number)
            capacity = self._capacity.within(job.max_sequence_tokens)
            sources, left_out = fitted(self._jobs.sources(number), capacity)
            if two_sided(sources):
                return job
        with self._store.transaction(durable=True):
            self._jobs.end(number)
            self._store.set_count("fine_tune_from", 0)  # its sets wait, so it is due again
            data = {"job": number, "left_out": left_out}
            self._store.append(self._clock(), "job_abandoned", None, data)
        self._jobs.sweep()
        return None

    def _refusal(self) -> FineTuneReport | None:
        """Why no job can begin, whatever the device allows."""
        since = self._store.count("observed") - self._store.count("fine_tune_from")
        if not is_due(since, 0, self._loop):
            every = self._loop.fine_tune_every_sets
            return self._report("not_due", f"{since} of {every} dialogue sets were observed.")
        sources, left_out = fitted(answered_sources(self._store), self._capacity)
        if two_sided(sources):
            return None
        reason = "no set is answered to learn from, or none that is held out"
        if left_out:
            reason += (
                f"; left out as longer than the {self._capacity.longest} tokens that can be "
                f"learned: {', '.join(left_out[:20])}"
            )
        return self._report("too_few", f"{reason}.", left_out=left_out)

    def _paraphrase(self, tokens: int, stop: Callable[[], bool]) -> None:
        """One transaction a pair: its text, that it was tried, and the random stream after it."""
        adapter = self._versions.active
        capacity = self._capacity.within(tokens)
        for item in annotated_sets(self._store):
            if item.held_out or lesson(item.dialogue, capacity) is None:
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
                    event: Event = "synthesized" if pair else "not_synthesized"
                    self._store.append(self._clock(), event, id, data)
                self._synthesized += pair is not None

    def _begin(self, tokens: int) -> FineTuneJob:
        sources, left_out = fitted(answered_sources(self._store), self._capacity.within(tokens))
        stream = self._store.stream("training")
        seed = stream.seed()
        with self._store.transaction(durable=True):
            parent = self._versions.untouched_parent()
            number = self._jobs.begin(parent, seed, tokens, self._loop, sources)
            self._store.save_stream("training", stream)
            self._store.set_count("fine_tune_from", self._store.count("observed"))
            job = self._jobs.read(number)
            data = {"parent": parent, "sources": sorted(one.id for one in sources)}
            self._log_job("job_begun", job, left_out, data)
        return job

    def _shorten(self, job: FineTuneJob, tokens: int) -> FineTuneJob | FineTuneReport:
        """The job with shorter sequences, without what is too long for them: that waits for
        another. Where a side would have nothing left, the job stays as it is, postponed."""
        capacity = self._capacity.within(tokens)
        sources, left_out = fitted(self._jobs.sources(job.number), capacity)
        if not two_sided(sources):
            return self._one_sided(tokens, left_out, job)
        with self._store.transaction():
            self._jobs.shorten(job.number, tokens, self._loop, sources)
            job = self._jobs.read(job.number)
            self._log_job("job_shortened", job, left_out, {})
        self._jobs.sweep()
        return job

    def _log_job(
        self, event: Event, job: FineTuneJob, left_out: Sequence[str], more: dict[str, Any]
    ) -> None:
        data = {
            "job": job.number,
            "sequence_tokens": job.max_sequence_tokens,
            "steps": job.steps,
            "training": len(job.training),
            "stopping": len(job.stopping),
            "guard": len(job.guard),
            "left_out": list(left_out),
        }
        self._store.append(self._clock(), event, None, data | more)

    def _train(
        self, job: FineTuneJob, conditions: Conditions, stop: Callable[[], bool]
    ) -> FineTuneReport:
        while True:
            folder = self._jobs.folder(job)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                result = self._tuner.run(job, folder, stop)
            except MemoryError:
                tokens = next_shorter(self._tuner.lengths, job.max_sequence_tokens, self._loop)
                if tokens is None:
                    return self._report("postponed", self._too_little_memory(conditions), job)
                shorter = self._shorten(job, tokens)
                if isinstance(shorter, FineTuneReport):
                    return shorter
                job = shorter
                continue
            if result is None:
                reason = "it was stopped in training, and goes on when called again."
                return self._report("stopped", reason, job)
            return self._end(job, result)

    def _end(self, job: FineTuneJob, result: FineTuneResult) -> FineTuneReport:
        """Takes or refuses the adapter: one transaction, and the job is over."""
        verdict = judge(result, self._loop.guard_false_acceptance)
        number = self._store.rows("SELECT max (number) FROM adapters")[0][0] + 1
        kept = self._versions.keep(result, number) if verdict.accepted else None
        sources = self._jobs.sources(job.number)
        with self._store.transaction(durable=True):
            if kept:
                learnt = [source.id for source in sources if not source.held_out]
                parent = self._jobs.parent(job.number)
                losses = (verdict.before, verdict.after)
                self._versions.add(number, parent, kept, losses, learnt)
                self._versions.activate(number)
                self._versions.retire(self._loop.adapters_kept)
                self._store.add("adapters_accepted")
            for source in sources:
                self._store.execute(
                    "UPDATE annotations SET used_in = ? WHERE id = ?", job.number, source.id
                )
            self._jobs.end(job.number)
            self._store.add("fine_tunes")
            data = {"job": job.number, "adapter": number if kept else None, **verdict.data()}
            data |= {"steps": len(result.losses), "kept_step": result.kept_step}
            data |= {"scale": result.scale, "perplexity": result.perplexity}
            data |= {"base_perplexity": result.base_perplexity}
            event: Event = "adapter_accepted" if kept else "adapter_rejected"
            self._store.append(self._clock(), event, None, data)
        for source in sources:
            self._buffer.set_waiting(source.id, False)
        self._jobs.sweep()
        self._versions.sweep()
        if kept:
            self._engine.use_adapter(self._versions.file(number))
        return FineTuneReport(
            state="accepted" if kept else "rejected",
            reason=verdict.reason,
            adapter=self._versions.active,
            synthesized=self._synthesized,
            job=job.number,
            left_out=self._jobs.left_out(job.number),
            heldout_loss_before=verdict.before,
            heldout_loss_after=verdict.after,
            losses=result.losses,
            kept_step=result.kept_step,
            scale=result.scale,
            forgetting=result.forgetting,
            changed=verdict.changed,
            false_acceptance=verdict.false_acceptance,
            seconds=result.seconds,
        )

    def _report(
        self,
        state: State,
        reason: str,
        job: FineTuneJob | None = None,
        left_out: Sequence[str] = (),
    ) -> FineTuneReport:
        number = job.number if job else None
        active = self._versions.active
        return FineTuneReport(state, reason, active, self._synthesized, number, tuple(left_out))

    def _one_sided(
        self, tokens: int, left_out: Sequence[str], job: FineTuneJob | None
    ) -> FineTuneReport:
        reason = (
            f"the memory allows {tokens} tokens now, and so short is no set to learn, or none that "
            f"is held out."
        )
        return self._report("postponed", reason, job, left_out)

    def _too_little_memory(self, conditions: Conditions) -> str:
        return (
            f"{conditions.free_memory_mb} MB are free, too little even for sequences of "
            f"{self._loop.shortest_sequence_tokens} tokens."
        )
