"""The known forms of asking a model for a paraphrase, and which of them it answers best.

What works depends on the model: one writes the brackets that it is asked for, another only goes on
with a reply that was begun for it. So ``attune export`` tries all of them, as it tries precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from runtime_py.bundle.manifest import MeasuredForm, Synthesis
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import BRACKETS, REWRITE, LoopPolicy
from runtime_py.loop.protocols import Engine
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.synthesis import synthesize
from toolchain.compile.shipped_text import as_dialogue, shipped_dialogues
from toolchain.defaults import LOWEST_YIELD

TRIED = 10  # dialogues
QUESTION_WORDS, ANSWER_WORDS = (6, 16), (8, 40)  # long ones cost more; long questions are lists
MOST_TOKENS = 64  # of a reply while forms are tried

_EXAMPLES = (
    "Rewrite each text in different words, keeping its meaning.\n\n"
    "Text: The shop on the corner closes at six in the evening, except on Fridays.\n"
    "Rewritten text: Except on Fridays, the corner shop shuts its doors at 6 pm.\n\n"
    "Text: How can I keep my plants healthy in winter?\n"
    "Rewritten text: What should I do so that my plants stay well during the cold months?\n\n"
    "Text: {text}"
)


@dataclass(frozen=True)
class ParaphraseForm:
    """The four texts of a policy that belong together, under a name."""

    name: str
    prompt: str
    prefix: str = ""
    begin: str = ""
    end: str = ""

    def within(self, loop: LoopPolicy) -> LoopPolicy:
        """The policy with this form."""
        return replace(
            loop,
            paraphrase_prompt=self.prompt,
            paraphrase_prefix=self.prefix,
            paraphrase_begin=self.begin,
            paraphrase_end=self.end,
        )


FORMS = (  # of equals the first is kept
    ParaphraseForm("rewrite", REWRITE, prefix="Rewritten text:"),
    ParaphraseForm("examples", _EXAMPLES, prefix="Rewritten text:"),
    ParaphraseForm("brackets_begun", BRACKETS, prefix="[", end="]"),
    ParaphraseForm("brackets", BRACKETS, begin="[", end="]"),
)


def find_form(name: str) -> ParaphraseForm:
    """Raises ``LoopError`` where there is none of that name."""
    for form in FORMS:
        if form.name == name:
            return form
    known = ", ".join(form.name for form in FORMS)
    raise LoopError(f"no paraphrase form is named {name!r}; known: {known}.")


def form_of(loop: LoopPolicy) -> str:
    """The name of the policy's form; "own" where it is none of ``FORMS``."""
    return next((form.name for form in FORMS if form.within(loop) == loop), "own")


def trial_dialogues() -> list[Dialogue]:
    """Short ones of attune's own text, the same each time."""
    short = []
    for number, turns in enumerate(shipped_dialogues("perplexity")):
        dialogue = as_dialogue(f"trial-{number}", turns)
        asked, answered = len(dialogue.question.split()), len(dialogue.answer.split())
        if _within(asked, QUESTION_WORDS) and _within(answered, ANSWER_WORDS):
            short.append(dialogue)
    return short[:TRIED]


def _within(count: int, bounds: tuple[int, int]) -> bool:
    return bounds[0] <= count <= bounds[1]


def count_pairs(
    dialogues: Sequence[Dialogue],
    engine: Engine,
    loop: LoopPolicy,
    progress: Callable[[], None] = lambda: None,
) -> int:
    """How many of ``dialogues`` give a usable pair in one attempt by the policy's form. The seeds
    are the same for every form; ``progress`` is called after each dialogue."""
    stream, once = SplitMix64(loop.seed), replace(loop, paraphrase_retries=0)
    usable = 0
    for dialogue in dialogues:
        usable += synthesize(dialogue, engine, stream, once) is not None
        progress()
    return usable


def choose_form(
    engine: Engine, loop: LoopPolicy, dialogues: Sequence[Dialogue]
) -> tuple[LoopPolicy, Synthesis]:
    """The policy with the form that gives most usable pairs of ``dialogues``, and what each gave.

    Below ``LOWEST_YIELD`` the policy writes no paraphrases.
    """
    short = replace(loop, paraphrase_max_tokens=min(MOST_TOKENS, loop.paraphrase_max_tokens))
    measured = tuple(
        MeasuredForm(
            form=form.name,
            tried=len(dialogues),
            usable=count_pairs(dialogues, engine, form.within(short)),
        )
        for form in FORMS
    )
    best = max(measured, key=lambda row: row.usable)
    chosen = find_form(best.form).within(loop)
    if best.usable < LOWEST_YIELD * best.tried:
        chosen = replace(chosen, paraphrases=0)
    return chosen, Synthesis(form=best.form, chosen_by="yield", measured=measured)


def unmeasured(loop: LoopPolicy) -> Synthesis:
    """Of a bundle without a program that runs here: the policy's own form, untried."""
    return Synthesis(form=form_of(loop), chosen_by="default", measured=())
