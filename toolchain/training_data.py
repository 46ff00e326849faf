"""The dialogues of a file by what they are for: to be learned, to choose the step, to be judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.examples import Example, fit
from runtime_py.loop.errors import TrainingError
from runtime_py.loop.stream import read_dialogues

Sets = tuple[tuple[Example, ...], ...]
T = TypeVar("T")


def flat(sets: Sets) -> list[Example]:
    """The sequences of all of them."""
    return [one for some in sets for one in some]


@dataclass(frozen=True)
class TrainingData:
    """Dialogues as sets of sequences. ``stopping`` chooses the step whose state is kept;
    ``held_out`` is neither learned nor chosen by. ``cut``, ``left_out``: ids of dialogues that are
    too long."""

    training: Sets
    stopping: Sets
    held_out: Sets
    cut: tuple[str, ...]
    left_out: tuple[str, ...]


def read_training_data(
    bundle: Bundle,
    path: Path,
    held_out: float,
    stopping_from: int,
    refuse_long: bool,
    notify: Callable[[str], None],
) -> TrainingData:
    """``held_out``: part of the dialogues that are not learned; where these are ``stopping_from``
    or more, half of them is for stopping. Raises ``TrainingError``."""
    dialogues = read_dialogues(path)
    longest = max(bundle.training.lengths)
    fitted = fit(dialogues, ChatText.of(bundle), longest, refuse_long)
    if fitted.cut:
        notify(f"cut at a turn to fit {longest} tokens: {len(fitted.cut)} of {len(dialogues)}")
    if fitted.left_out:
        notify(
            f"left out, since even the first exchange has more than {longest} tokens: "
            f"{len(fitted.left_out)} (export with a longer --train-lengths to keep them)"
        )
    if not fitted.sets:
        raise TrainingError(
            f"no dialogue of {path} fits the training programs ({longest} tokens): export "
            f"with a longer --train-lengths."
        )
    parts = divide(fitted.sets, held_out, stopping_from)
    return TrainingData(*parts, fitted.cut, fitted.left_out)


def divide(
    examples: Sequence[T], held_out: float, stopping_from: int
) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
    """To be learned, at least one; for stopping; to be judged. Evenly spread: of every so many the
    last is held out, and of those every other one is for stopping, if there are so many."""
    count = min(round(len(examples) * held_out), len(examples) - 1)
    step = len(examples) / count if count else 0
    chosen = {int((i + 1) * step) - 1 for i in range(count)}
    training = tuple(e for i, e in enumerate(examples) if i not in chosen)
    held = tuple(e for i, e in enumerate(examples) if i in chosen)
    stopping = held[::2] if len(held) >= stopping_from else ()
    return training, stopping, held[1::2] if stopping else held
