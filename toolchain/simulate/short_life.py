"""The loop on a short stream that ships with attune: what the model says before, and after a night.

The user of this stream likes every reply as a harbour master would give it. The model answers as it
will, the user says what would be an ideal response, and one fine-tuning later the model does.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

from runtime_py.bundle.bundle import Bundle
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import AnswerTooLong, PromptTooLong
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import UNBOUNDED, LoopPolicy
from runtime_py.loop.schedule import Conditions, Moment
from runtime_py.loop.stream import read_stream
from toolchain.simulate.life import is_text
from toolchain.simulate.phone_app import load_programs, open_loop

PROMPTS = (
    "I want a table for four on Friday.",
    "Can you find me a hotel in Madrid?",
    "I need a train to Boston.",
)
REPLY_TOKENS = 40


@dataclass(frozen=True)
class ReplyPair:
    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class ShortLoop:
    """``steps`` of fine-tuning; losses in nats a label, of the sets that were held out."""

    replies: tuple[ReplyPair, ...]
    observed: int
    kept: int
    answered: int
    steps: int
    heldout_loss_before: float | None
    heldout_loss_after: float | None


def run_short_loop(bundle: Bundle, folder: Path) -> ShortLoop:
    """Lives through the stream in ``folder`` without a phone's limits, fine-tunes once, and asks
    ``PROMPTS`` before and after.

    Raises ``BundleError`` or ``LoopError``.
    """
    programs = load_programs(bundle)
    with open_loop(
        bundle,
        folder,
        _policy(bundle),
        lexicons=None,
        engine=programs.engine,
        tuner=programs.tuner,
        clock=lambda: Moment(0.0, 0),
    ) as app:
        before = [app.generate(prompt) for prompt in PROMPTS]
        with as_file(files("toolchain.compile") / "data" / "demo_stream.jsonl") as stream:
            for record in read_stream(stream):
                _live_through(app, record.dialogue)
        report = app.fine_tune(Conditions(True, True, 25.0, 1 << 20))
        after = [app.generate(prompt) for prompt in PROMPTS]
        status = app.status()
    return ShortLoop(
        replies=tuple(map(ReplyPair, PROMPTS, before, after)),
        observed=status.observed,
        kept=status.kept,
        answered=status.answered,
        steps=len(report.losses),
        heldout_loss_before=report.heldout_loss_before,
        heldout_loss_after=report.heldout_loss_after,
    )


def _policy(bundle: Bundle) -> LoopPolicy:
    return replace(
        LoopPolicy.from_fields(dict(bundle.manifest.policy.loop)),
        selection="attune",
        bins=64,
        questions_per_day=1000,
        asking="entry",  # everything happens on one day
        paraphrases=0,  # a model of 4 million parameters cannot paraphrase
        fine_tune_every_sets=1,
        epochs=12,
        batch=8,
        most_steps=1000,
        learning_rate=5e-3,
        forgetting_bound=UNBOUNDED,  # one manner for everything is what this user wants
        reply_max_tokens=REPLY_TOKENS,
    )


def _live_through(app: Personalizer, ideal: Dialogue) -> None:
    """The model answers in its way, and whatever is asked gets the ideal answer."""
    try:
        reply = app.generate(ideal.turns[:-1])
    except PromptTooLong:
        reply = ""
    app.observe(ideal.with_answer(reply) if is_text(reply) else ideal)
    for question in app.pending_questions():
        if question.id != ideal.id:  # one of before, whose answer was too long
            continue
        with suppress(AnswerTooLong):  # the question stays open
            app.answer(question.id, ideal.exchange(question.exchange)[1].content)
