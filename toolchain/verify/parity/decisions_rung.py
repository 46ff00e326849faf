"""The last rung: the whole loop on a real stream, by engine.

Two loops read the same dialogues: one on the bundle's programs, one in PyTorch with the same
weights. Scores, kept and replaced sets, greedy text, losses and the trained adapter are compared.
Where activations are int8, scores differ in their last digits (docs/quantization.md), so a choice
between two sets whose scores are that close may fall either way: such a tie is told from an error
by its margin, and what comes after it is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exporters.model.transformer import Transformer
from runtime_py.bundle.adapter_forms import read_values
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.phone_engine import PhoneEngine
from runtime_py.engine.streamed_tuner import StreamedFineTuner
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.lexicons import read_lexicons
from runtime_py.loop.log import Decision
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Embedding, Engine, FineTuner
from runtime_py.loop.schedule import Conditions, Moment
from toolchain.compile.tolerances import TABLE
from toolchain.verify.parity.cases import dialogues
from toolchain.verify.parity.context import Context
from toolchain.verify.parity.run_bounds import ScoreBounds, of_android, of_loop
from toolchain.verify.parity.torch_loop import TorchPhone, TorchTuner
from toolchain.verify.parity.verdict import Check, Rung, compare, not_run, rung, stated

STREAM, QUICK_STREAM = 24, 10
BINS = 6
_WORDS = 24  # tokens of a reply
NIGHT = Conditions(charging=True, idle=True, celsius=25.0, free_memory_mb=100_000)


@dataclass(frozen=True, eq=False)
class LoopOutcome:
    """What a loop did. ``adapter``: the trained one's values; ``reply``: greedy, with it."""

    decisions: tuple[Decision, ...]
    losses: tuple[float, ...]
    held_out: tuple[float, float]
    accepted: int
    adapter: dict[str, np.ndarray]
    reply: str
    first_reply: str


def live(
    context: Context, name: str, engine: Engine, tuner: FineTuner, stream: Sequence[Dialogue]
) -> LoopOutcome:
    """The stream from first to last, every question answered, and one night of fine-tuning."""
    policy = LoopPolicy(
        bins=BINS,
        bin_bytes=4 * context.bundle.manifest.model.hidden + 16384,
        questions_per_day=1000,
        asking="entry",  # everything happens on one day
        keep_asked=False,  # so that sets are replaced though all are asked about
        heldout_every=3,
        paraphrases=0,  # they are sampled at a temperature: the text below is not
        fine_tune_every_sets=len(stream),
        fine_tune_memory_mb=0,
        epochs=2,
        batch=2,
        fewest_steps=1,
        learning_rate=1e-3,
        forgetting_tokens=256,
        reply_max_tokens=_WORDS,
    )
    folder = context.scratch / name
    folder.mkdir()
    ticks = iter(range(1, 1 << 30))
    with Personalizer(
        folder, policy, read_lexicons(), engine, tuner,
        lambda: Moment(float(next(ticks)), 0), context.bundle,
    ) as loop:  # fmt: skip
        decisions = [loop.observe(dialogue) for dialogue in stream]
        prompt = stream[0].turns[:1]
        first = loop.generate(prompt)
        for question in loop.pending_questions():
            loop.answer(question.id)
        report = loop.fine_tune(NIGHT)
        trained = sorted(folder.rglob("*.ptd"))
        tensors = context.bundle.manifest.adapter.tensors
        adapter = read_values(trained[-1], tensors) if trained else {}
        return LoopOutcome(
            decisions=tuple(decisions),
            losses=report.losses,
            held_out=(_number(report.heldout_loss_before), _number(report.heldout_loss_after)),
            accepted=report.adapter,
            adapter=adapter,
            reply=loop.generate(prompt),
            first_reply=first,
        )


def _number(loss: float | None) -> float:
    """0 where there was nothing to judge by."""
    return 0.0 if loss is None or math.isnan(loss) else loss


def decisions(context: Context) -> Rung:
    """ExecuTorch's loop against PyTorch's, and against itself."""
    manifest = context.bundle.manifest
    if manifest.android is None or manifest.training is None:
        return not_run("decisions", "the bundle has no Android part to run the loop with.")
    stream = dialogues(QUICK_STREAM if context.quick else STREAM)
    context.progress("decisions: PyTorch")
    torch.set_grad_enabled(True)
    reference = TorchPhone(context, context.source.android)
    expected = live(context, "pytorch", reference, TorchTuner(context), stream)
    context.progress("decisions: ExecuTorch")
    measured = phone_life(context, "executorch", stream)

    def embed(model: Transformer) -> list[Embedding]:
        return [TorchPhone(context, model).embed(dialogue) for dialogue in stream]

    checks = same_life(measured, expected, of_loop(context, embed))
    checks += _reply(context, reference, measured, expected, stream)
    return rung("decisions", "PyTorch with the same weights", checks)


def phone_life(context: Context, name: str, stream: Sequence[Dialogue]) -> LoopOutcome:
    """The loop as a phone runs it."""
    engine = PhoneEngine(context.bundle)
    text = ChatText.of(context.bundle)
    tuner = StreamedFineTuner(context.bundle, text)
    return live(context, name, engine, tuner, stream)


def same_life(measured: LoopOutcome, expected: LoopOutcome, allowed: ScoreBounds) -> list[Check]:
    """Scores within the precision, the same choices but for ties, the same training."""
    checks: list[Check] = []
    rows = [
        [[d.scores.eoe, d.scores.dss, d.scores.idd] for d in life.decisions if d.scores]
        for life in (measured, expected)
    ]
    split = _first_split(measured.decisions, expected.decisions)
    until = len(expected.decisions) if split is None else split + 1
    scores, right = (np.array(part)[:until] for part in rows)
    for column, (name, most) in enumerate(allowed.each.items()):
        gap = float(np.abs(scores[:, column] - right[:, column]).max())
        checks.append(
            Check(
                "loop", f"{until} dialogues", f"score {name}", gap, gap,
                most, "scores", gap <= most,
            )
        )  # fmt: skip
    checks.append(_choices(measured, expected, split, right, allowed))
    if split is not None:
        return checks
    losses = np.array(measured.losses), np.array(expected.losses)
    checks.append(compare("loop", "one night", "losses", *losses, TABLE["training run"]))
    held = np.array(measured.held_out), np.array(expected.held_out)
    checks.append(compare("loop", "one night", "held-out loss", *held, TABLE["training run"]))
    if measured.adapter and expected.adapter:
        trained, reference = (
            np.concatenate([v.ravel() for v in x.adapter.values()]) for x in (measured, expected)
        )
        bound = TABLE["training run"]
        checks.append(compare("loop", "one night", "adapter", trained, reference, bound))
    same = measured.accepted == expected.accepted
    note = "" if same else f"version {measured.accepted} instead of {expected.accepted}"
    checks.append(stated("loop", "one night", "adapter taken or not", same, note))
    return checks


def _first_split(measured: Sequence[Decision], expected: Sequence[Decision]) -> int | None:
    """The first dialogue that the two loops decided differently."""
    for index, pair in enumerate(zip(measured, expected, strict=True)):
        one, other = ((d.bin, d.reason, d.replaced, d.domain, d.asked) for d in pair)
        if one != other:
            return index
    return None


def _choices(
    measured: LoopOutcome,
    expected: LoopOutcome,
    split: int | None,
    scores: np.ndarray,
    allowed: ScoreBounds,
) -> Check:
    name = "kept and replaced sets"
    case = f"{len(expected.decisions)} dialogues"
    if split is None:
        return stated("loop", case, name, True, "")
    decision, right = measured.decisions[split], expected.decisions[split]
    margins = closest(scores[: split + 1])
    note = (
        f"{decision.id} is {'kept' if decision.kept else 'refused'}, PyTorch has "
        f"{'kept' if right.kept else 'refused'} it; the closest scores differ by "
        + ", ".join(f"{margin:.2g} ({score})" for score, margin in margins.items())
    )
    tie = allowed.tied(margins)
    return stated("loop", case, name, tie, note + (" (a tie)" if tie else ""))


def closest(scores: np.ndarray) -> dict[str, float]:
    """How near the last row of ``scores`` [n, 3] is to another, by score; equal ones are no choice
    that the precision could turn."""
    gaps = np.abs(scores[:-1] - scores[-1])
    nearest = np.where(gaps > 0, gaps, np.inf).min(0, initial=np.inf)
    return dict(zip(("eoe", "dss", "idd"), nearest.tolist(), strict=True))


def _reply(
    context: Context,
    reference: TorchPhone,
    measured: LoopOutcome,
    expected: LoopOutcome,
    stream: Sequence[Dialogue],
) -> list[Check]:
    """Greedy text with the bundle's adapter. Where it parts, PyTorch's two likeliest tokens must be
    closer than the precision tells apart."""
    if measured.first_reply == expected.first_reply:
        return [stated("loop", "reply", "greedy text", True, "")]
    reference.use_adapter(context.bundle.android.adapter)
    _, tokens, margins = reference.greedy(stream[0].turns[:1], _WORDS)
    written = context.text.encode(measured.first_reply)
    place = next(
        (i for i, (a, b) in enumerate(zip(written, tokens, strict=False)) if a != b),
        min(len(written), len(tokens), len(margins) - 1),
    )
    # Both of the two may be off.
    allowed = 2.0 * (context.android_bounds or of_android(context)).largest
    tie = margins[min(place, len(margins) - 1)] <= allowed
    note = f"parts at token {place}, where PyTorch prefers its own by {margins[place]:.2g}"
    return [stated("loop", "reply", "greedy text", tie, note + (" (a tie)" if tie else ""))]
