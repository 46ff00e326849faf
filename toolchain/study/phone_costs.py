"""Modelled seconds of a bundle's programs on a phone, whatever engine really computes.

The calls are those that ``PhoneEngine`` and ``StreamedFineTuner`` make; what each costs is the
roofline's matter. A training run's sequences are taken at their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText, Tokens
from runtime_py.engine.phone_engine import LmCall
from runtime_py.engine.retention import GRID
from runtime_py.engine.streamed_tuner import TrainingCall
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.protocols import FineTuneJob, FineTuneResult
from toolchain.simulate.device import Compute, Device
from toolchain.simulate.roofline import Cost, Counter


class CallCounter(Protocol):
    """``Counter`` is one."""

    def lm(self, call: LmCall) -> Cost: ...

    def training(self, call: TrainingCall) -> Cost: ...


class Texts(Protocol):
    """``ChatText`` is one."""

    def tokens(self, turns: Sequence[Turn], reply: bool = False) -> Tokens: ...

    def encode(self, text: str) -> list[int]: ...


class PhoneCosts:
    """``embed_length``: tokens of a dialogue that are embedded; ``lengths``: tokens of the training
    programs."""

    def __init__(
        self,
        counter: CallCounter,
        compute: Compute,
        text: Texts,
        embed_length: int,
        lengths: Sequence[int],
    ) -> None:
        self._counter, self._compute, self._text = counter, compute, text
        self._embed_length, self._lengths = embed_length, sorted(lengths)

    def embed(self, dialogue: Dialogue) -> float:
        tokens = min(self._embed_length, self._tokens(dialogue.turns))
        return self._lm(LmCall("embed", tokens, 0))

    def reply(self, messages: Sequence[Turn], text: str) -> float:
        read = len(self._text.tokens(messages, reply=True).ids)
        written = len(self._text.encode(text))
        return self._lm(LmCall("prefill", read, 0)) + self._lm(LmCall("decode", written, read))

    def night(
        self,
        replies: Sequence[tuple[Sequence[Turn], str]],
        runs: Sequence[tuple[FineTuneJob, FineTuneResult]],
    ) -> float:
        """Of paraphrases, by what was read and what was written, and of trainings."""
        written = sum(self.reply(messages, text) for messages, text in replies)
        return written + sum(self.training(job, result) for job, result in runs)

    def length(self, job: FineTuneJob) -> int:
        """Of the programs that hold the job's longest sequence."""
        sets = (*job.training, *job.stopping, *job.guard)
        longest = min(job.max_sequence_tokens, max(self._tokens(one.turns) for one in sets))
        return next((n for n in self._lengths if n >= longest), self._lengths[-1])

    def training(self, job: FineTuneJob, result: FineTuneResult) -> float:
        """Gradients of ``batch`` sequences a step and its update, the stopping sets at each look,
        the guard before and after, and the general text without the adapter, with it, and where
        it is scaled, at each step of the bisection."""
        length = self.length(job)
        steps, looks = len(result.losses), len(result.stopping_curve)
        gradients = [self._call("gradient", one, length) for one in job.training]
        step = job.batch * sum(gradients) / len(gradients)
        step += self._training(TrainingCall("update"))
        stopping = sum(self._call("loss", one, length) for one in job.stopping)
        guard = sum(self._call("loss", one, length) for one in job.guard)
        general = 0.0
        if result.perplexity is not None:
            readings = 2 if result.scale == 1.0 else 2 + int(math.log2(GRID))
            calls = -(-job.forgetting_tokens // length)
            general = readings * calls * self._training(TrainingCall("loss", length, length))
        return steps * step + looks * stopping + 2 * guard + general

    def _call(self, kind: str, dialogue: Dialogue, length: int) -> float:
        labels = min(length, 1 + len(self._text.encode(dialogue.answer)))  # and the turn's end
        if kind == "gradient":
            return self._training(TrainingCall("gradient", length, labels))
        return self._training(TrainingCall("loss", length, labels))

    def _tokens(self, turns: Sequence[Turn]) -> int:
        return len(self._text.tokens(turns).ids)

    def _lm(self, call: LmCall) -> float:
        return self._counter.lm(call).seconds(self._compute)

    def _training(self, call: TrainingCall) -> float:
        return self._counter.training(call).seconds(self._compute)


def phone_costs(bundle: Bundle, phone: Device, text: ChatText) -> PhoneCosts:
    """Of a bundle with an Android part."""
    embed_length = bundle.manifest.policy.embed_length
    lengths = bundle.training.lengths
    return PhoneCosts(Counter(bundle), phone.compute, text, embed_length, lengths)
