"""The loop on a short stream that ships with attune: what the model says before, and after a night.

The user of this stream likes every reply as a harbour master would give it. The model answers as it
will, the user says what would be an ideal response, and one fine-tuning later the model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

from runtime_py.bundle.bundle import open_bundle
from runtime_py.engine.phone_engine import PhoneEngine
from runtime_py.engine.streamed_tuner import StreamedFineTuner, TrainingCall
from runtime_py.loop.errors import LoopError
from runtime_py.loop.fine_tuning import FineTuneReport
from runtime_py.loop.lexicons import read_lexicons
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import FineTuneJob, FineTuneResult
from runtime_py.loop.schedule import Conditions, Moment
from runtime_py.loop.stream import read_stream
from toolchain.simulate.life import is_text, lexicons_of

PROMPTS = (
    "I want a table for four on Friday.",
    "Can you find me a hotel in Madrid?",
    "I need a train to Boston.",
)
REPLY_TOKENS = 40


@dataclass(frozen=True)
class Reply:
    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class ShortLoop:
    """Losses in nats a label, of the sets that were held out."""

    replies: tuple[Reply, ...]
    observed: int
    kept: int
    answered: int
    steps: int
    heldout_loss_before: float | None
    heldout_loss_after: float | None
    report: FineTuneReport


def run_short_loop(
    bundle: Path,
    folder: Path,
    told: Callable[[str, int, int], None] = lambda stage, done, of: None,
    *,
    threads: int | None = None,
    stream: Path | None = None,
) -> ShortLoop:
    """Lives through a stream in ``folder`` without a phone's limits, fine-tunes once, and asks
    ``PROMPTS`` before and after. ``told``: a stage, and how much of it is done.

    Raises ``BundleError`` or ``LoopError``.
    """
    opened = open_bundle(bundle)
    policy = replace(
        LoopPolicy.from_fields(dict(opened.manifest.policy.loop)),
        selection="attune",
        bins=64,
        questions_per_day=1000,
        paraphrases=0,  # a model of 4 million parameters cannot paraphrase
        fine_tune_every_sets=1,
        epochs=12,
        batch=8,
        learning_rate=5e-3,
        reply_max_tokens=REPLY_TOKENS,
    )
    if stream is None:
        with as_file(files("toolchain.compile") / "data" / "demo_stream.jsonl") as shipped:
            records = list(read_stream(shipped))
    else:
        records = list(read_stream(stream))
    if not records:
        raise LoopError(f"{stream} has no dialogue: give one JSON object a line.")
    engine = PhoneEngine(opened, threads)
    steps = 0

    def trained(call: TrainingCall) -> None:
        nonlocal steps
        if call.kind == "update":
            steps += 1
            told("fine-tune", steps, planned.steps)

    streamed = StreamedFineTuner(
        opened, engine.text, threads=threads, before=engine.release, on_call=trained
    )
    planned = _Planned(streamed)
    with Personalizer(
        folder=folder,
        policy=policy,
        lexicons=read_lexicons(lexicons_of(opened, None)),
        engine=engine,
        tuner=planned,
        clock=lambda: Moment(0.0, 0),
        bundle=opened,
    ) as app:
        before = [app.generate(prompt) for prompt in PROMPTS]
        for number, record in enumerate(records, start=1):
            ideal = record.dialogue
            reply = app.generate(ideal.turns[:-1])
            app.observe(ideal.with_answer(reply) if is_text(reply) else ideal)
            for question in app.pending_questions():
                app.answer(question.id, ideal.answer)
            told("observe and answer", number, len(records))
        report = app.fine_tune(Conditions(True, True, 25.0, 1 << 20))
        after = [app.generate(prompt) for prompt in PROMPTS]
        status = app.status()
    return ShortLoop(
        replies=tuple(map(Reply, PROMPTS, before, after)),
        observed=status.observed,
        kept=status.kept,
        answered=status.answered,
        steps=steps,
        heldout_loss_before=report.heldout_loss_before,
        heldout_loss_after=report.heldout_loss_after,
        report=report,
    )


class _Planned:
    """A fine-tuner that says beforehand how many steps a job has at most."""

    def __init__(self, tuner: StreamedFineTuner) -> None:
        self._tuner, self.steps = tuner, 0

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        self.steps = job.epochs * -(-len(job.training) // job.batch)
        return self._tuner.run(job, folder, stop)
