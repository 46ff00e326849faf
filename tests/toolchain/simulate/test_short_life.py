"""The user of the short life: what is too long for the model or for learning ends nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from runtime_py.loop.dialogue import Dialogue, Turn
from tests.runtime_py.loop.test_lesson import Mute
from tests.runtime_py.loop.toy import NIGHT, ToyTuner, open_toy, small_policy
from toolchain.simulate.short_life import _live_through


class Brief(Mute):
    def generate(self, messages: Sequence[Turn], **options: object) -> str:  # type: ignore[override]
        super().generate(messages, **options)  # type: ignore[arg-type]
        return "run"


def test_what_is_too_long_ends_nothing(tmp_path: Path) -> None:
    policy = dataclasses.replace(
        small_policy("fifo", bins=8, every=1), paraphrases=0, bin_bytes=1 << 16
    )
    with open_toy(tmp_path, policy, ToyTuner(lengths=(64,)), Brief(room=50)) as app:

        def live(id: str, question: int, answer: int) -> None:
            turns = Turn("user", "walk " * question), Turn("assistant", "sun " * answer)
            _live_through(app, Dialogue(id, turns))

        live("no-reply", 55, 5)  # the stream's own reply is taken
        live("no-answer", 10, 60)  # 70 tokens with the ideal answer, though not with the model's
        live("both", 70, 70)  # never asked about
        live("neither", 10, 10)
        assert [question.id for question in app.pending_questions()] == ["no-answer"]
        assert app.status().answered == 2
        assert app.fine_tune(NIGHT).state == "accepted"
