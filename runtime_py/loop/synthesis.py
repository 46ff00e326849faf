"""Paraphrases of answered sets by the model itself, and which of them may be learnt from."""

from __future__ import annotations

from dataclasses import dataclass

from runtime_py.loop.dialogue import Dialogue, Turn, check_text
from runtime_py.loop.errors import LoopError, PromptTooLong
from runtime_py.loop.metrics import rouge1
from runtime_py.loop.policy import TEXT, LoopPolicy
from runtime_py.loop.protocols import Engine
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.words import words


@dataclass(frozen=True)
class Paraphrase:
    """``tries`` 0: the original itself, which stays."""

    text: str
    seed: int  # of the generation that gave it
    rouge1: float  # F1 with the original
    tries: int


@dataclass(frozen=True)
class Pair:
    question: Paraphrase
    answer: Paraphrase


def taken(reply: str, begin: str, end: str) -> str | None:
    """What stands between the first ``begin`` and the next ``end``, without space around it.

    An empty ``begin`` is the reply's start, an empty ``end`` its end. None: one of them is missing.
    """
    at = reply.find(begin)
    if at < 0:
        return None
    rest = reply[at + len(begin) :]
    until = rest.find(end) if end else len(rest)
    return rest[:until].strip() if until >= 0 else None


def paraphrase(
    text: str, engine: Engine, stream: SplitMix64, loop: LoopPolicy
) -> Paraphrase | None:
    """Tries until one lies within the ROUGE-1 bounds; each try takes one seed of the stream. A text
    that fills the model's context is tried once."""
    before, _, behind = loop.paraphrase_prompt.partition(TEXT)
    prompt = (Turn("user", before + text + behind),)
    original = words(text)
    for tries in range(1, loop.paraphrase_retries + 2):
        seed = stream.seed()
        try:
            reply = engine.generate(
                prompt,
                temperature=loop.paraphrase_temperature,
                seed=seed,
                max_new_tokens=loop.paraphrase_max_tokens,
                prefix=loop.paraphrase_prefix,
            )
        except PromptTooLong:
            return None
        rewritten = taken(reply, loop.paraphrase_begin, loop.paraphrase_end)
        if not rewritten or not _is_text(rewritten):
            continue
        score = rouge1(original, words(rewritten))
        if loop.rouge1_lowest <= score <= loop.rouge1_highest:
            return Paraphrase(rewritten, seed, score, tries)
    return None


def synthesize(
    dialogue: Dialogue, engine: Engine, stream: SplitMix64, loop: LoopPolicy
) -> Pair | None:
    """The last question and its answer, of which ``paraphrase_use`` names the one that is
    rewritten, or both; None if one that is fails."""

    def rewritten(text: str, part: str) -> Paraphrase | None:
        if loop.paraphrase_use in ("both", part):
            return paraphrase(text, engine, stream, loop)
        return Paraphrase(text, seed=0, rouge1=1.0, tries=0)

    question = rewritten(dialogue.question, "question")
    if question is None:
        return None
    answer = rewritten(dialogue.answer, "answer")
    return None if answer is None else Pair(question, answer)


def _is_text(text: str) -> bool:
    try:
        check_text(text, "a paraphrase")
    except LoopError:
        return False
    return True
