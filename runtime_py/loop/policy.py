"""The loop's choices, each a named field; a bundle's manifest keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from math import inf
from typing import Any

from runtime_py.loop.errors import LoopError

QUESTION = "Do you think my response is acceptable and if not what would be an ideal response?"
UNBOUNDED = 1e6  # of ``forgetting_bound``: nothing is measured
TEXT = "{text}"  # in ``paraphrase_prompt``: where the text stands
USES = ("both", "question", "answer")  # of ``paraphrase_use``
BRACKETS = (  # the method's own words
    "Please refine and generate a text semantically similar to the following text block, no need "
    f"to answer it, no need to explain, use [ ] to hold your generated response: {TEXT}"
)
REWRITE = (
    "Rewrite the following text in different words, keeping its meaning. Give only the rewritten "
    f"text.\n\nText: {TEXT}"
)


CENTRES = ("none", "bundle")
SCORES = ("eoe", "dss", "idd")


@dataclass(frozen=True)
class LoopPolicy:
    """The defaults are the design's. Sizes are bytes; ``_tokens``, ``_sets`` and so on say what."""

    selection: str = "paper"  # a name in replacement.POLICIES
    seed: int = 0  # of the random streams
    scores: str = "eoe dss idd"  # those of ``SCORES`` that paper and attune look at
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

    paraphrase_prompt: str = REWRITE  # ``TEXT`` stands for the text, once
    paraphrase_prefix: str = "Rewritten text:"  # the reply is begun with it
    paraphrase_begin: str = ""  # what is taken of the rest stands behind this; "": from its start
    paraphrase_end: str = ""  # and before this; "": to its end
    paraphrase_use: str = "question"  # of ``USES``: what is rewritten, the other stays as it was
    paraphrases: int = 0  # of each answered set: none, for at this size they did not help
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
    learning_rate: float = 1e-3  # of A
    b_rate_ratio: float = 1.0  # B's rate is so many times A's
    batch: int = 8
    epochs: int = 3
    fewest_steps: int = 12
    most_steps: int = 48
    check_every_steps: int = 4  # between two looks at the held-out sets that stop the training
    guard_false_acceptance: float = 0.35  # chance that an adapter no better than the old one passes
    forgetting_bound: float = 0.03  # part of the general text's perplexity that may be added
    forgetting_tokens: int = 2048  # of the general text that are measured on
    replay_share: float = 0.0  # of the training sequences that are generic dialogues
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

    @property
    def score_columns(self) -> list[int]:
        """The places of ``scores`` in ``SCORES``."""
        return [SCORES.index(name) for name in self.scores.split(" ")]

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


_MAY_BE_EMPTY = {"paraphrase_prefix", "paraphrase_begin", "paraphrase_end"}
_SCORE_CHOICES = [" ".join(some) for count in (1, 2, 3) for some in combinations(SCORES, count)]

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
    "fewest_steps": (1, 1 << 20),
    "most_steps": (1, 1 << 20),
    "check_every_steps": (1, 1 << 20),
    "b_rate_ratio": (1e-3, 1e3),
    "guard_false_acceptance": (0.0, 1.0),
    "batch": (1, 1 << 20),
    "forgetting_bound": (1e-6, UNBOUNDED),
    "forgetting_tokens": (1, 1 << 20),
    "replay_share": (0.0, 0.5),
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
        elif kind is str and not value and field.name not in _MAY_BE_EMPTY:
            misfits.append((field.name, value, "text"))
    return misfits or [*_mismatches(policy)]


def _mismatches(policy: LoopPolicy) -> Iterator[tuple[str, object, str]]:
    """What each field's own kind and limits do not say."""
    if policy.scores not in _SCORE_CHOICES:
        yield "scores", policy.scores, f"some of {' '.join(SCORES)}, in this order"
    if policy.centre not in CENTRES:
        yield "centre", policy.centre, " or ".join(CENTRES)
    if policy.paraphrase_prompt.count(TEXT) != 1:
        yield "paraphrase_prompt", policy.paraphrase_prompt, f"a text with {TEXT} in it once"
    if policy.paraphrase_use not in USES:
        yield "paraphrase_use", policy.paraphrase_use, ", ".join(USES)
    if policy.rouge1_lowest > policy.rouge1_highest:
        yield "rouge1_lowest", policy.rouge1_lowest, "at most rouge1_highest"
    if policy.shortest_sequence_tokens > policy.longest_sequence_tokens:
        short = policy.shortest_sequence_tokens
        yield "shortest_sequence_tokens", short, "at most longest_sequence_tokens"
    if policy.fewest_steps > policy.most_steps:
        yield "fewest_steps", policy.fewest_steps, "at most most_steps"
