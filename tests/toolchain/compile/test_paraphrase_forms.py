"""Forms of paraphrases: yields that were counted by hand, and which form an export keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import LoopPolicy
from tests.runtime_py.loop.toy import ToyEngine
from toolchain.compile.paraphrase_forms import (
    FORMS,
    choose_form,
    count_pairs,
    find_form,
    form_of,
    trial_dialogues,
    unmeasured,
)


def dialogue(number: int) -> Dialogue:
    turns = (
        Turn("user", f"one two three q{number}"),
        Turn("assistant", f"four five six a{number}"),
    )
    return Dialogue(f"d{number}", turns)


class Model(ToyEngine):
    """Says ``reply`` of what it was asked to rewrite, where the prompt has ``understands`` and the
    reply was begun with ``begun``; a copy of it otherwise."""

    def __init__(self, understands: str, begun: str, good: Sequence[str], wrap: str = "{}") -> None:
        super().__init__()
        self.understands, self.begun, self.good, self.wrap = understands, begun, good, wrap
        self.most: set[int] = set()

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        self.most.add(max_new_tokens)
        asked = messages[-1].content
        last = asked.split()[-1]  # q1, a1, ...
        start = "one two" if last[0] == "q" else "four five"
        if self.understands in asked and prefix == self.begun and last in self.good:
            return self.wrap.format(f"{start} otherwise {last}")
        return "nothing of it"


def test_a_pair_needs_both_parts() -> None:
    """Of three dialogues the first gives both, the second only a question, the third nothing."""
    engine = Model("Rewrite", "Rewritten text:", ["q1", "a1", "q2"])
    dialogues = [dialogue(n) for n in (1, 2, 3)]
    assert count_pairs(dialogues, engine, LoopPolicy(paraphrase_use="both")) == 1
    assert count_pairs(dialogues, engine, LoopPolicy(paraphrase_use="question")) == 2
    assert count_pairs(dialogues, engine, LoopPolicy(paraphrase_use="answer")) == 1
    assert count_pairs(dialogues, engine, LoopPolicy(paraphrase_prefix="")) == 0


@pytest.mark.parametrize(
    ("understands", "begun", "wrap", "best", "usable"),
    [
        ("Rewrite the following", "Rewritten text:", "{}", "rewrite", [2, 0, 0, 0]),
        ("Rewrite each", "Rewritten text:", "{}", "examples", [0, 2, 0, 0]),
        ("Please refine", "[", "{}] as asked", "brackets_begun", [0, 0, 2, 0]),
        ("Please refine", "", "Sure: [{}].", "brackets", [0, 0, 0, 2]),
        ("Rewrite", "Rewritten text:", "{}", "rewrite", [2, 2, 0, 0]),
    ],
)
def test_the_form_that_the_model_answers_is_kept(
    understands: str, begun: str, wrap: str, best: str, usable: list[int]
) -> None:
    engine = Model(understands, begun, ["q1", "a1", "q2", "a2"], wrap)
    loop = LoopPolicy(bins=7)
    chosen, synthesis = choose_form(engine, loop, [dialogue(n) for n in (1, 2, 3)])
    assert chosen == find_form(best).within(loop)
    assert (synthesis.form, synthesis.chosen_by) == (best, "yield")
    assert [row.form for row in synthesis.measured] == [form.name for form in FORMS]
    assert [row.usable for row in synthesis.measured] == usable
    assert {row.tried for row in synthesis.measured} == {3}
    assert engine.most == {64}
    assert chosen.paraphrase_max_tokens == 256


@pytest.mark.parametrize(("dialogues", "paraphrases"), [(20, 3), (21, 0)])
def test_below_the_lowest_yield_nothing_is_written(dialogues: int, paraphrases: int) -> None:
    """One pair of twenty is 5 %, which is enough; of twenty-one it is not."""
    engine = Model("Rewrite the", "Rewritten text:", ["q1", "a1"])
    chosen, synthesis = choose_form(
        engine, LoopPolicy(paraphrases=3), [dialogue(n + 1) for n in range(dialogues)]
    )
    assert chosen.paraphrases == paraphrases
    assert max(row.usable for row in synthesis.measured) == 1


def test_forms_have_names() -> None:
    for form in FORMS:
        assert form_of(form.within(LoopPolicy(seed=3))) == form.name
    assert form_of(replace(LoopPolicy(), paraphrase_prefix="Again:")) == "own"
    assert unmeasured(LoopPolicy()).form == "rewrite"
    with pytest.raises(LoopError, match=r"'bracket'; known: rewrite, examples, brackets_begun"):
        find_form("bracket")


def test_the_dialogues_that_forms_are_tried_on() -> None:
    trial = trial_dialogues()
    assert len({d.id for d in trial}) == 10
    assert all(6 <= len(d.question.split()) <= 16 for d in trial)
    assert all(8 <= len(d.answer.split()) <= 40 for d in trial)
