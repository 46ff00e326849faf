"""Which exchange is asked about: acknowledgements never, and the rules against slow ones."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py.loop.acknowledgements import make_acknowledgements, read_acknowledgements
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import LoopError
from runtime_py.loop.exchanges import EXCHANGE_RULES, Exchanges, find_exchange_rule
from runtime_py.loop.words import words
from tests.runtime_py.loop.toy import LEXICONS, dialogue

SGD = Path(__file__).parents[4] / "shared/data/corpus/sgd_cc-by-sa.jsonl.gz"
ENGLISH = read_acknowledgements()

CLOSINGS = """
Thanks, that's all.
No, thank you so much for your help!
thank you, that is all I need for now
Nope, I'm good.
Okay, bye!
Great, have a nice day
Yes, that's correct.
Yes please
Sounds good to me.
That’s perfect, thanks a lot!
No, I don't need anything else.
Not right now. I appreciate your help.
ok
👍
...
I am all set. Goodbye.
You've been very helpful.
Sure, that works for me.
That'll be it.
Nothing for now, thanks.
""".strip().splitlines()

QUESTIONS = """
Thanks. What is the capital of Peru?
Yes, please book a table for two.
No, make it seven instead of eight.
How long does the flight take?
I feel sad today.
Okay, and what about the price?
Explain photosynthesis in one paragraph.
Great! Write me a poem about the sea.
Is it far from the station?
My daughter has a fever since Monday.
Rewrite that in plain English.
Can you find me a doctor?
I would like to reserve a room.
Why?
Tell me more.
Play the song on the kitchen device.
I need help with my taxes.
Danke, das ist alles.
""".strip().splitlines()


@pytest.mark.parametrize("text", CLOSINGS)
def test_closings_are_acknowledgements(text: str) -> None:
    assert ENGLISH.has_all_of(text)


@pytest.mark.parametrize("text", QUESTIONS)
def test_questions_are_not(text: str) -> None:
    assert not ENGLISH.has_all_of(text)


@pytest.mark.full
def test_most_last_turns_of_sgd_are_closings() -> None:
    if not SGD.exists():
        pytest.skip("needs shared/data/corpus")
    with gzip.open(SGD, "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["turns"] for line in file]
    last = [ENGLISH.has_all_of(turns[-2]["content"]) for turns in rows]
    first = [ENGLISH.has_all_of(turns[0]["content"]) for turns in rows]
    assert sum(last) / len(last) > 0.84
    assert sum(first) / len(first) < 0.001


def test_a_list_in_another_language(tmp_path: Path) -> None:
    file = tmp_path / "german.txt"
    file.write_text("danke\ndas ist alles\nschön\n", encoding="utf-8")
    german = read_acknowledgements(file)
    assert german.has_all_of("Danke, das ist alles.")
    assert not german.has_all_of("Das ist schön.")
    with pytest.raises(LoopError, match=r"none\.txt cannot be read: No such file"):
        read_acknowledgements(tmp_path / "none.txt")
    file.write_bytes(b"sch\xf6n")
    with pytest.raises(LoopError, match="is not UTF-8"):
        read_acknowledgements(file)


def of(*turns: str) -> Dialogue:
    roles = ("user", "assistant")
    return Dialogue("d", tuple(Turn(roles[n % 2], t) for n, t in enumerate(turns)))  # type: ignore[arg-type]


def test_last_is_the_last_that_is_no_acknowledgement() -> None:
    exchanges = Exchanges(find_exchange_rule("last"), LEXICONS, ENGLISH)
    told = ("What is bread?", "Baked dough.", "And salt?", "A mineral.", "Thanks!", "Welcome.")
    assert exchanges.to_ask_about(of(*told)) == 1
    assert exchanges.to_ask_about(of(*told[4:])) is None
    short = Exchanges(
        find_exchange_rule("last"), LEXICONS, ENGLISH, lambda dialogue, exchange: exchange < 1
    )
    assert short.to_ask_about(of(*told)) == 0
    none = Exchanges(find_exchange_rule("last"), LEXICONS, ENGLISH, lambda d, e: False)
    assert none.to_ask_about(of(*told)) is None


def test_salient_prefers_a_domain_and_content() -> None:
    exchanges = Exchanges(find_exchange_rule("salient"), LEXICONS, ENGLISH)
    told = (
        "Some tree?", "One tree.",
        "Has the nurse a pill for fever?", "The nurse has one pill against fever, by night.",
        "Thanks for the nurse", "Never.",
        "Okay thanks", "Bye",
    )  # fmt: skip
    assert exchanges.to_ask_about(of(*told)) == 1


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 7),
    eligible=st.sets(st.integers(0, 6)),
    rule=st.sampled_from(sorted(EXCHANGE_RULES)),
)
def test_rules_against_fractions(seed: int, length: int, eligible: set[int], rule: str) -> None:
    one = dialogue(1, seed, exchanges=length)
    nothing = make_acknowledgements(["qqq"])
    exchanges = Exchanges(
        find_exchange_rule(rule), LEXICONS, nothing, lambda _, exchange: exchange in eligible
    )
    able = [n for n in range(length) if n in eligible]

    def salience(number: int) -> int:
        def measures(n: int) -> tuple[Fraction, int]:
            text = words(f"{one.turns[2 * n].content}\n{one.turns[2 * n + 1].content}")
            return Fraction(sum(LEXICONS.hits(text)), len(text)), len(set(text))

        total = 0
        for column in (0, 1):
            values = [measures(n)[column] for n in able]
            mine = measures(number)[column]
            total += 2 * sum(v < mine for v in values) + sum(v == mine for v in values)
        return total

    if not able:
        expected = None
    elif rule == "last":
        expected = able[-1]
    else:
        expected = [n for n in able if salience(n) == max(map(salience, able))][-1]
    assert exchanges.to_ask_about(one) == expected


def test_an_unknown_rule_names_the_known() -> None:
    with pytest.raises(LoopError, match=r"'best'.*expected one of last, salient"):
        find_exchange_rule("best")
