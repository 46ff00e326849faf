"""Paraphrases of answered sets by the model itself, and which of them may be learnt from."""

from __future__ import annotations

from dataclasses import dataclass

from runtime_py.loop.dialogue import Dialogue, Turn, check_text
from runtime_py.loop.errors import LoopError, PromptTooLong
from runtime_py.loop.metrics import rouge1
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Engine
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.words import words


@dataclass(frozen=True)
class Paraphrase:
    text: str
    seed: int  # of the generation that gave it
    rouge1: float  # F1 with the original
    tries: int


@dataclass(frozen=True)
class Pair:
    question: Paraphrase
    answer: Paraphrase


def between_brackets(reply: str) -> str | None:
    """What stands between the first ``[`` and the next ``]``, without space around it."""
    start = reply.find("[")
    end = reply.find("]", start + 1)
    return reply[start + 1 : end].strip() if 0 <= start < end else None


def paraphrase(
    text: str, engine: Engine, stream: SplitMix64, loop: LoopPolicy
) -> Paraphrase | None:
    """Tries until one lies within the ROUGE-1 bounds; each try takes one seed of the stream. A text
    that fills the model's context is tried once."""
    prompt = (Turn("user", loop.paraphrase_prompt + text),)
    original = words(text)
    for tries in range(1, loop.paraphrase_retries + 2):
        seed = stream.seed()
        try:
            reply = engine.generate(
                prompt,
                temperature=loop.paraphrase_temperature,
                seed=seed,
                max_new_tokens=loop.paraphrase_max_tokens,
            )
        except PromptTooLong:
            return None
        rewritten = between_brackets(reply)
        if not rewritten or not _is_text(rewritten):
            continue
        score = rouge1(original, words(rewritten))
        if loop.rouge1_lowest <= score <= loop.rouge1_highest:
            return Paraphrase(rewritten, seed, score, tries)
    return None


def synthesize(
    dialogue: Dialogue, engine: Engine, stream: SplitMix64, loop: LoopPolicy
) -> Pair | None:
    """One paraphrase of the last question and one of its answer; None if either fails."""
    question = paraphrase(dialogue.question, engine, stream, loop)
    if question is None:
        return None
    answer = paraphrase(dialogue.answer, engine, stream, loop)
    return None if answer is None else Pair(question, answer)


def _is_text(text: str) -> bool:
    try:
        check_text(text, "a paraphrase")
    except LoopError:
        return False
    return True
