"""Replay: how many generic dialogues are mixed in, which, and that they fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime_py.bundle.chat_pieces import UNSAID
from runtime_py.bundle.chat_text import Tokens
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.engine.replay import draw, replay_count, with_replay
from runtime_py.loop.dialogue import Dialogue, Turn


def example(id: str, inputs: int = 3) -> Example:
    tokens = np.arange(inputs + 1, dtype=np.int64)
    return Example(id, tokens, np.where(tokens > 0, tokens, IGNORED))


@given(st.integers(1, 500), st.floats(0.0, 0.5))
def test_the_share_is_met_as_nearly_as_whole_sequences_can(own: int, share: float) -> None:
    count = replay_count(own, share)
    exact = Fraction(share) / (1 - Fraction(share)) * own
    assert abs(count - exact) <= Fraction(1, 2) + Fraction(1, 10**9)
    assert count <= own


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 2**63 - 1))
def test_each_is_drawn_before_any_is_drawn_again(there: int, count: int, seed: int) -> None:
    examples = [example(str(n)) for n in range(there)]
    drawn = draw(examples, count, seed)
    assert len(drawn) == count
    times = Counter(one.id for one in drawn)
    assert max((times[e.id] for e in examples), default=0) <= -(-count // there)
    assert min(times[e.id] for e in examples) >= count // there
    assert [e.id for e in drawn] == [e.id for e in draw(examples, count, seed)]


def test_the_draw_is_pinned() -> None:
    """Another language draws the same: SplitMix64 from the seed with "replay" xored in."""
    state, order = 5 ^ int.from_bytes(b"replay", "big"), list(range(6))
    for last in range(5, 0, -1):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
        other = (z ^ z >> 31) % (last + 1)
        order[last], order[other] = order[other], order[last]
    drawn = draw([example(str(n)) for n in range(6)], 6, 5)
    assert [int(one.id) for one in drawn] == order


class Letters:
    """A chat text whose tokens are characters."""

    written_alike = True

    def tokens(self, turns: Sequence[Turn]) -> Tokens:
        ids: list[int] = []
        said: list[int] = []
        for index, turn in enumerate(turns):
            whose = index if turn.role == "assistant" else UNSAID
            ids += [ord(c) for c in f"{turn.role[0]}{turn.content}|"]
            said += [UNSAID] + [whose] * (len(turn.content) + 1)
        return Tokens(ids, said)


def dialogue(id: str, *contents: str) -> Dialogue:
    roles = ("user", "assistant") * len(contents)
    return Dialogue(id, tuple(Turn(r, c) for r, c in zip(roles, contents, strict=False)))  # type: ignore[arg-type]


def test_what_is_replayed_is_no_longer_than_the_users_own() -> None:
    """One that fits, one that is cut to its first exchange, and one whose first does not fit."""
    own = [example("own", 10), example("own2", 6)]
    generic = [
        dialogue("fits", "1", "23"),
        dialogue("cut", "1", "23", "4", "5678"),
        dialogue("long", "12345", "678901"),
    ]
    text = Letters()
    mixed = with_replay(own, generic, text, 0.5, seed=3)  # type: ignore[arg-type]
    assert mixed[:2] == tuple(own)
    replayed = sorted(mixed[2:], key=lambda one: one.id)
    assert [one.id for one in replayed] == ["cut", "fits"]
    for one in replayed:
        assert "".join(map(chr, one.tokens)) == "u1|a23|"
        labels = ["." if label == IGNORED else chr(label) for label in one.labels]
        assert "".join(labels) == "....23|"
    assert with_replay(own, generic, text, 0.0, seed=3) == tuple(own)  # type: ignore[arg-type]
