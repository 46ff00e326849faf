"""Generic dialogues among the user's own, so that training on the one does not lose the other."""

from __future__ import annotations

from collections.abc import Sequence

from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.examples import Example, fit
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.random_stream import SplitMix64

_SALT = 0x7265706C6179  # "replay": the job's other draws begin with its seed itself


def replay_count(own: int, share: float) -> int:
    """How many generic sequences make ``share`` (0 to 0.5) of them and ``own`` others."""
    return int(share / (1.0 - share) * own + 0.5)


def with_replay(
    own: Sequence[Example],
    generic: Sequence[Dialogue],
    text: ChatText,
    share: float,
    seed: int,
) -> tuple[Example, ...]:
    """``own``, and behind them generic dialogues drawn by ``seed`` that make ``share`` of all.

    None is longer than the longest of ``own``, so none needs longer programs: it is cut after the
    last exchange that fits, or not drawn where its first does not. They teach every reply of the
    assistant's. Each is drawn once before any is drawn again.
    """
    wanted = replay_count(len(own), share)
    if not wanted:
        return tuple(own)
    sets = fit(generic, text, max(one.inputs for one in own)).sets
    fitting = [one for some in sets for one in some]
    return (*own, *draw(fitting, wanted, seed))


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """``count`` of them: orders of all, each drawn from the seed, one after another."""
    chance = SplitMix64(seed ^ _SALT)
    drawn: list[Example] = []
    while examples and len(drawn) < count:
        order = list(examples)
        for last in range(len(order) - 1, 0, -1):  # Fisher and Yates
            other = chance.below(last + 1)
            order[last], order[other] = order[other], order[last]
        drawn += order
    return drawn[:count]
