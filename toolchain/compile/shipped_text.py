"""The short text that ships with attune, and perplexity on it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib.resources import files

import torch
from torch import Tensor

from runtime_py.bundle.chat_text import ChatText
from runtime_py.loop.dialogue import Dialogue, Turn

LONGEST = 512  # tokens of a dialogue that are used


def shipped_dialogues(split: str) -> list[list[dict]]:
    """``calibration`` or ``perplexity``: lists of turns with role and content."""
    text = files("toolchain.compile").joinpath("data/text.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [row["turns"] for row in rows if row["split"] == split]


def as_dialogue(id: str, turns: Sequence[dict]) -> Dialogue:
    """A shipped dialogue as the loop takes one."""
    return Dialogue(id, tuple(Turn(turn["role"], turn["content"]) for turn in turns))


def shipped_turns(split: str) -> list[tuple[Turn, ...]]:
    """``shipped_dialogues`` as turns."""
    return [as_dialogue("", turns).turns for turns in shipped_dialogues(split)]


def tokenize(
    text: ChatText, dialogues: Sequence[Sequence[Turn]], longest: int = LONGEST
) -> list[Tensor]:
    """Dialogues as a bundle's hosts read them: int64 [1, S] each, S at most ``longest``."""
    encoded = [text.tokens(turns).ids for turns in dialogues]
    return [torch.tensor([ids[:longest]]) for ids in encoded if len(ids) > 1]


def shared_prefix(texts: Sequence[Tensor]) -> int:
    """Tokens that all texts begin with: the chat pieces' own."""
    shortest = min(text.shape[1] for text in texts)
    first = texts[0][0, :shortest]
    same = torch.stack([text[0, :shortest] == first for text in texts]).all(0).int()
    return int(same.cumprod(0).sum())


@torch.no_grad()
def perplexity(logits: Callable[[Tensor], Tensor], texts: Sequence[Tensor]) -> float:
    """exp of the mean negative log-likelihood of each next token; ``logits``: [1, S] -> [1, S, V].

    The prefix that the template gives every text is read but not counted: repeated in each, its
    few tokens would weigh more than many of the text's own.
    """
    start = shared_prefix(texts)
    total, count = 0.0, 0
    for tokens in texts:
        if tokens.shape[1] <= start:
            continue
        predicted = logits(tokens)[0, start - 1 : -1] if start else logits(tokens)[0, :-1]
        expected = tokens[0, max(start, 1) :]
        total -= predicted.log_softmax(-1).gather(1, expected[:, None]).sum().item()
        count += expected.shape[0]
    return math.exp(total / count)
