"""The loop's choices, each a named field; a bundle's manifest keeps them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any

from runtime_py.loop.errors import LoopError

QUESTION = "Do you think my response is acceptable and if not what would be an ideal response?"
PARAPHRASE = (
    "Please refine and generate a text semantically similar to the following text block, no need "
    "to answer it, no need to explain, use [ ] to hold your generated response: "
)


CENTRES = ("none", "bundle")


@dataclass(frozen=True)
class LoopPolicy:
    """The defaults are the design's. Sizes are bytes; ``_tokens``, ``_sets`` and so on say what."""

    selection: str = "paper"  # a name in policies.POLICIES
    seed: int = 0  # of the random streams
    bins: int = 128
    bin_bytes: int = 22 * 1024
    age_fills: float = 50.0  # attune: observed sets, in buffers, that cost a set all its rank
    crowding: float = 0.5  # attune: what a domain that fills the buffer costs its sets
    keep_asked: bool = True  # what is asked about, or answered and not yet used, stays
    centre: str = "none"  # bundle: its mean is taken from vectors before they are compared

    question: str = QUESTION
    questions_per_day: int = 5
    question_days: int = 3  # an open question lapses after so many
    asking: str = "entry"  # a name in asking.ASKING
    ask_exchange: str = "last"  # a name in exchanges.EXCHANGE_RULES
    asking_tail: float = 0.1  # uncertain: this share of the stored sets, the most uncertain, is not
    asking_typical_first: int = 32  # dual: answers before it asks about uncertain ones
    asking_random_every: int = 5  # dual: one question in so many is drawn; 0: none
    heldout_every: int = 5  # one answered set in so many is kept for the guard

    paraphrase_prompt: str = PARAPHRASE
    paraphrases: int = 3
    paraphrase_retries: int = 2
    paraphrase_temperature: float = 0.5
    paraphrase_max_tokens: int = 256
    rouge1_lowest: float = 0.2
    rouge1_highest: float = 0.9

    fine_tune_every_sets: int = 800
    fine_tune_memory_mb: int = 150  # that must be free, at ``longest_sequence_tokens``
    hottest_celsius: float = 38.0
    must_charge: bool = True
    must_idle: bool = True
    epochs: int = 3
    learning_rate: float = 3e-4
    batch: int = 128
    longest_sequence_tokens: int = 512
    shortest_sequence_tokens: int = 64  # where memory is short, before fine-tuning is postponed
    adapters_kept: int = 4  # files, besides the bundle's own

    reply_temperature: float = 0.0
    reply_max_tokens: int = 256
    recall_examples: int = 0  # answered sets that are put before a conversation

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value!r}, expected {expected}" for name, value, expected in _misfits(self)
        ]
        if wrong:
            raise LoopError(f"the policy cannot be used: {'; '.join(wrong)}. Correct it.")

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> LoopPolicy:
        """Fields that are absent have their defaults; one that is unknown is an error."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise LoopError(
                f"the policy is not JSON (line {error.lineno}, column {error.colno}: {error.msg})."
            ) from None
        if not isinstance(raw, dict):
            raise LoopError(f"the policy is a JSON {type(raw).__name__}; expected an object.")
        return LoopPolicy.from_fields(raw)

    @staticmethod
    def from_fields(raw: dict[str, Any]) -> LoopPolicy:
        known = [field.name for field in fields(LoopPolicy)]
        if unknown := sorted(set(raw) - set(known)):
            raise LoopError(
                f"the policy has unknown fields: {', '.join(unknown)}; it knows {', '.join(known)}."
            )
        floats = {field.name for field in fields(LoopPolicy) if field.type == "float"}
        whole: dict[str, Any] = {
            k: float(v) if k in floats and type(v) is int else v for k, v in raw.items()
        }
        return LoopPolicy(**whole)


_LIMITS: dict[str, tuple[float, float]] = {  # field: (least, most)
    "seed": (0, (1 << 64) - 1),
    "bins": (1, 1 << 14),  # as far as the sum of directions fits an int64
    "bin_bytes": (256, 1 << 24),
    "questions_per_day": (0, 10_000),
    "question_days": (1, 10_000),
    "asking_tail": (0.0, 1.0),
    "asking_typical_first": (0, 1 << 40),
    "asking_random_every": (0, 10_000),
    "recall_examples": (0, 100),
    "heldout_every": (2, 10_000),
    "paraphrases": (0, 100),
    "paraphrase_retries": (0, 100),
    "paraphrase_max_tokens": (1, 1 << 20),
    "fine_tune_every_sets": (1, 1 << 40),
    "fine_tune_memory_mb": (0, 1 << 20),
    "epochs": (1, 10_000),
    "batch": (1, 1 << 20),
    "longest_sequence_tokens": (8, 1 << 20),
    "shortest_sequence_tokens": (8, 1 << 20),
    "adapters_kept": (1, 10_000),
    "reply_max_tokens": (1, 1 << 20),
    "age_fills": (1e-3, 1e9),
    "crowding": (0.0, 1e6),
    "paraphrase_temperature": (0.0, 10.0),
    "rouge1_lowest": (0.0, 1.0),
    "rouge1_highest": (0.0, 1.0),
    "hottest_celsius": (-50.0, 150.0),
    "learning_rate": (0.0, 10.0),
    "reply_temperature": (0.0, 10.0),
}


def _misfits(policy: LoopPolicy) -> list[tuple[str, object, str]]:
    misfits: list[tuple[str, object, str]] = []
    for field in fields(LoopPolicy):
        value: Any = getattr(policy, field.name)
        kind = {"str": str, "int": int, "float": float, "bool": bool}[str(field.type)]
        low, high = _LIMITS.get(field.name, (-inf, inf))
        wrong_kind = type(value) is not kind  # a bool is no int here
        if wrong_kind:
            misfits.append((field.name, value, f"a {field.type}"))
        elif field.name in _LIMITS and not low <= value <= high:
            misfits.append((field.name, value, f"{low:g} to {high:g}"))
        elif kind is str and not value:
            misfits.append((field.name, value, "text"))
    if not misfits:
        if policy.centre not in CENTRES:
            misfits.append(("centre", policy.centre, " or ".join(CENTRES)))
        if policy.rouge1_lowest > policy.rouge1_highest:
            misfits.append(("rouge1_lowest", policy.rouge1_lowest, "at most rouge1_highest"))
        if policy.shortest_sequence_tokens > policy.longest_sequence_tokens:
            short = policy.shortest_sequence_tokens
            misfits.append(("shortest_sequence_tokens", short, "at most longest_sequence_tokens"))
    return misfits
