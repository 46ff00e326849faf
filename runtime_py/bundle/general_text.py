"""The general text that a bundle ships, and the dialogues that can be replayed in training."""

from __future__ import annotations

import json
from dataclasses import dataclass

from runtime_py.bundle.bundle import Bundle
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import BundleError
from runtime_py.loop.stream import read_dialogues


@dataclass(frozen=True)
class GeneralText:
    """A dialogue, which the chat pieces write out, or ``plain`` text, which they do not."""

    id: str
    turns: tuple[Turn, ...] = ()
    plain: str = ""


def read_general(bundle: Bundle) -> tuple[GeneralText, ...]:
    """What forgetting is measured on, in order. Raises ``BundleError`` where there is none."""
    texts = []
    path = bundle.path / _named(bundle, bundle.manifest.policy.general, "general text")
    for line in path.read_text(encoding="utf-8").split("\n"):  # no other separator ends a line
        if not line:
            continue
        row = json.loads(line)
        turns = tuple(Turn(turn["role"], turn["content"]) for turn in row.get("turns", ()))
        texts.append(GeneralText(row["id"], turns, row.get("text", "")))
    return tuple(texts)


def read_replay(bundle: Bundle) -> tuple[Dialogue, ...]:
    """Generic dialogues to train on. Raises ``BundleError`` where there are none."""
    name = _named(bundle, bundle.manifest.policy.replay, "dialogues to replay")
    return tuple(read_dialogues(bundle.path / name))


def _named(bundle: Bundle, file: str | None, what: str) -> str:
    if file is None:
        raise BundleError(f"{bundle.path} has no {what}: export it anew.")
    return file
