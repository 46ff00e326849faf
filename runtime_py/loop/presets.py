"""Policies with a name. Each states every field, so that it stays what it is as defaults change."""

from __future__ import annotations

from typing import Any

from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import BRACKETS, QUESTION, UNBOUNDED, LoopPolicy

# Qin et al., "Enabling On-Device Large Language Model Personalization with Self-Supervised Data
# Selection and Synthesis", DAC 2024, and this loop's first choices where the paper leaves one open:
# three epochs of batches of 128, a guard that looks at the mean alone, and no early stopping.
_DAC2024: dict[str, Any] = {
    "selection": "paper",
    "seed": 0,
    "scores": "eoe dss idd",
    "bins": 128,
    "bin_bytes": 22 * 1024,
    "age_fills": 50.0,
    "crowding": 0.5,
    "keep_asked": False,
    "centre": "none",
    "question": QUESTION,
    "questions_per_day": 5,
    "question_days": 10_000,
    "asking": "entry",
    "ask_exchange": "last",
    "asking_tail": 0.1,
    "asking_typical_first": 32,
    "asking_random_every": 5,
    "heldout_every": 5,
    "paraphrase_prompt": BRACKETS,
    "paraphrase_prefix": "",
    "paraphrase_begin": "[",
    "paraphrase_end": "]",
    "paraphrase_use": "both",
    "paraphrases": 3,
    "paraphrase_retries": 2,
    "paraphrase_temperature": 0.5,
    "paraphrase_max_tokens": 256,
    "rouge1_lowest": 0.2,
    "rouge1_highest": 0.9,
    "fine_tune_every_sets": 800,
    "fine_tune_memory_mb": 150,
    "hottest_celsius": 38.0,
    "must_charge": True,
    "must_idle": True,
    "learning_rate": 3e-4,
    "b_rate_ratio": 1.0,
    "batch": 128,
    "epochs": 3,
    "fewest_steps": 1,
    "most_steps": 1 << 20,
    "check_every_steps": 1 << 20,
    "guard_false_acceptance": 1.0,
    "forgetting_bound": UNBOUNDED,
    "forgetting_tokens": 2048,
    "replay_share": 0.0,
    "longest_sequence_tokens": 512,
    "shortest_sequence_tokens": 64,
    "adapters_kept": 4,
    "reply_temperature": 0.0,
    "reply_max_tokens": 256,
    "recall_examples": 0,
}

PRESETS = {"dac2024": LoopPolicy(**_DAC2024)}


def preset(name: str) -> LoopPolicy:
    """Raises ``LoopError`` for a name that there is not."""
    if name not in PRESETS:
        raise LoopError(
            f"there is no preset {name!r} of a policy; there are {', '.join(sorted(PRESETS))}."
        )
    return PRESETS[name]
