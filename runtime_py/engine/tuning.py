"""One fine-tuning of the loop on any engine: judged before, trained, judged after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.general_text import read_general, read_replay
from runtime_py.bundle.manifest import Optimizer
from runtime_py.engine.examples import Example, example
from runtime_py.engine.replay import with_replay
from runtime_py.engine.retention import general_examples, retain
from runtime_py.engine.run_state import FILE
from runtime_py.engine.trainer import TrainingOutcome, train
from runtime_py.engine.training_engine import TrainingEngine, each_loss
from runtime_py.engine.training_plan import Settings
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import TrainingDiverged, TrainingError, TrainingStateUnusable
from runtime_py.loop.policy import UNBOUNDED
from runtime_py.loop.protocols import FineTuneJob, FineTuneResult

SAVED_AFTER = 32  # sequences whose gradients a kill may cost, where a step has no more
Stage = Literal["before", "training", "after"]


@dataclass(frozen=True)
class Lessons:
    """A job's dialogues as examples, each with its last reply as labels. ``training`` ends with
    what is replayed; ``general``: what forgetting is measured on, empty where it is not."""

    training: tuple[Example, ...]
    stopping: tuple[Example, ...]
    guard: tuple[Example, ...]
    general: tuple[Example, ...] = ()

    @property
    def longest(self) -> int:
        """Input tokens."""
        return max(e.inputs for e in (*self.training, *self.stopping, *self.guard))


def lessons(
    job: FineTuneJob, text: ChatText, longest: int, bundle: Bundle | None = None
) -> Lessons:
    """What the job learns and is judged by, with the bundle's own dialogues and text where the job
    asks for them.

    Raises ``TrainingError`` where a dialogue reads more than ``longest`` tokens: nothing is cut
    here, for a reply that is cut is not what the user wanted."""

    def read(dialogues: Sequence[Dialogue]) -> tuple[Example, ...]:
        return tuple(example(dialogue, text, last_only=True) for dialogue in dialogues)

    whole = Lessons(read(job.training), read(job.stopping), read(job.guard))
    every = (*whole.training, *whole.stopping, *whole.guard)
    if long := [one.id for one in every if one.inputs > longest]:
        raise TrainingError(
            f"{len(long)} dialogues of job {job.number} are longer than {longest} tokens, which is "
            f"what it can learn: {', '.join(long[:20])}. Leave them out."
        )
    if not whole.training or not whole.guard:
        raise TrainingError(
            f"job {job.number} has {len(whole.training)} dialogues to learn and "
            f"{len(whole.guard)} to judge by: give at least one of each."
        )
    if not job.replay_share and job.forgetting_bound >= UNBOUNDED:
        return whole
    if bundle is None:
        raise TrainingError(
            f"job {job.number} replays dialogues or bounds what is forgotten, and both come with a "
            f"bundle: give it one."
        )
    return _with_generic(whole, job, text, bundle)


def _with_generic(own: Lessons, job: FineTuneJob, text: ChatText, bundle: Bundle) -> Lessons:
    """What the bundle adds never needs longer programs than the job's own."""
    training, general = own.training, own.general
    if job.replay_share:
        training = with_replay(training, read_replay(bundle), text, job.replay_share, job.seed)
    if job.forgetting_bound < UNBOUNDED:
        room = min(length for length in bundle.training.lengths if length >= own.longest)
        general = general_examples(read_general(bundle), text, room, job.forgetting_tokens)
    return replace(own, training=training, general=general)


def settings_of(job: FineTuneJob) -> Settings:
    return Settings(
        steps=job.steps,
        batch=job.batch,
        learning_rate=job.learning_rate,
        b_rate_ratio=job.b_rate_ratio,
        seed=job.seed,
        check_every=job.check_every,
        save_every=max(1, SAVED_AFTER // job.batch),
    )


def tune(
    engine: TrainingEngine,
    state: AdapterState,
    job: FineTuneJob,
    taught: Lessons,
    optimizer: Optimizer,
    folder: Path,
    adapter: Path,
    *,
    stop: Callable[[], bool],
    base: str = "",
    on_stage: Callable[[Stage], None] = lambda stage: None,
    on_check: Callable[[int], None] = lambda step: None,
) -> FineTuneResult | None:
    """Trains ``state``, which begins as the job's parent; the caller writes it to ``adapter``.

    Where a loss is no number it ends as it began, and the guard's losses are infinite. The run's
    state is in ``folder``; one that is damaged, or that another bundle, another version of attune
    or a job that was frozen anew has left, is removed, and the run begins anew. ``base``: see
    ``train``. ``on_stage`` hears what is computed next, ``on_check`` the step of every look at the
    stopping examples. None: ``stop`` said so between two calls.
    """
    parent = state.parameters.copy()
    on_stage("before")
    before = each_loss(engine, state, taught.guard, stop)
    if before is None:
        return None
    on_stage("training")

    def run() -> TrainingOutcome | None:
        """The training from where the folder's state is, or from its beginning."""
        return train(
            engine,
            state,
            taught.training,
            settings_of(job),
            optimizer,
            folder,
            stopping=taught.stopping,
            base=base,
            on_check=on_check,
            stop=stop,
        )

    try:
        outcome = _begun_anew_if_unusable(run, folder)
    except TrainingDiverged:
        state.parameters[...] = parent
        infinite = (float("inf"),) * len(taught.guard)
        return FineTuneResult(adapter, before, infinite, (), (), 0, 0.0)
    if outcome is None:
        return None
    on_stage("after")
    return _judged(engine, state, job, taught, before, outcome, adapter, stop)


def _begun_anew_if_unusable(
    run: Callable[[], TrainingOutcome | None], folder: Path
) -> TrainingOutcome | None:
    try:
        return run()
    except TrainingStateUnusable:  # nobody else could remove it, and the job would never end
        (folder / FILE).unlink()
        return run()


def _judged(
    engine: TrainingEngine,
    state: AdapterState,
    job: FineTuneJob,
    taught: Lessons,
    before: tuple[float, ...],
    outcome: TrainingOutcome,
    adapter: Path,
    stop: Callable[[], bool],
) -> FineTuneResult | None:
    """What was trained, within the bound on forgetting, and the guard's losses with it."""
    retained = None
    if taught.general:
        retained = retain(engine, state, taught.general, job.forgetting_bound, stop)
        if retained is None:
            return None
    # Where nothing was learned the state is the parent's, and so are its losses.
    unchanged = not outcome.kept_step and (retained is None or retained.scale == 1.0)
    after = before if unchanged else each_loss(engine, state, taught.guard, stop)
    if after is None:
        return None
    result = FineTuneResult(
        adapter, before, after, outcome.losses, outcome.curve, outcome.kept_step, outcome.seconds
    )
    if retained is None:
        return result
    return replace(
        result,
        scale=retained.scale,
        base_perplexity=retained.base,
        perplexity=retained.scaled,
    )
