"""A policy file for an export: JSON with fields of the loop, and what a fresh adapter is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from exporters.errors import ExportError
from runtime_py.loop.asking import find_asking_rule
from runtime_py.loop.errors import LoopError
from runtime_py.loop.exchanges import find_exchange_rule
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.replacement import find_policy

LORA = ("lora_rank", "lora_alpha", "lora_targets")
FORM = ("paraphrase_prompt", "paraphrase_prefix", "paraphrase_begin", "paraphrase_end")


@dataclass(frozen=True)
class PolicyFile:
    """``loop``: the fields of ``LoopPolicy`` that it names; the rest of a fresh adapter, each None
    where the file does not say."""

    loop: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None

    @property
    def has_adapter(self) -> bool:
        return any(value is not None for value in (self.rank, self.alpha, self.targets))


def read_policy_file(path: Path | None, lengths: Sequence[int]) -> PolicyFile:
    """``lengths``: tokens of the training programs; None: no file. Raises ``ExportError`` with all
    misfits of a kind."""
    if path is None:
        return PolicyFile()
    raw = _object(path)
    known = [one.name for one in fields(LoopPolicy)]
    if unknown := sorted(set(raw) - {*known, *LORA}):
        raise ExportError(
            f"the policy {path} has unknown fields: {', '.join(unknown)}; it knows "
            f"{', '.join((*known, *LORA))}."
        )
    loop = {name: value for name, value in raw.items() if name not in LORA}
    longest = max(lengths, default=0)
    try:
        policy = LoopPolicy.from_fields(within_lengths(loop, lengths))
        check_names(policy)
    except LoopError as error:
        raise ExportError(f"{path}: {error}") from None
    if policy.longest_sequence_tokens > longest:
        raise ExportError(
            f"the policy {path} has longest_sequence_tokens {policy.longest_sequence_tokens}, and "
            f"the longest training program would have {longest}: give --train-lengths "
            f"{policy.longest_sequence_tokens}."
        )
    return PolicyFile(loop, *_adapter(path, raw))


def check_names(policy: LoopPolicy) -> None:
    """Raises ``LoopError`` for a name that nothing has."""
    find_policy(policy.selection)
    find_asking_rule(policy.asking)
    find_exchange_rule(policy.ask_exchange)


def within_lengths(loop: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """The fields of a policy whose sequences fit the training programs, where it names no other."""
    fitting = {
        "longest_sequence_tokens": max(lengths),
        "shortest_sequence_tokens": min(64, *lengths, loop.get("longest_sequence_tokens", 64)),
    }
    return {**fitting, **loop}


def _object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"there is no policy {path}; expected a JSON file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"the policy {path} cannot be read: {error}.") from None
    except json.JSONDecodeError as error:
        raise ExportError(
            f"the policy {path} is not JSON (line {error.lineno}, column {error.colno}: "
            f"{error.msg})."
        ) from None
    if not isinstance(raw, dict):
        raise ExportError(f"the policy {path} is a JSON {type(raw).__name__}; expected an object.")
    return raw


def _adapter(
    path: Path, raw: Mapping[str, Any]
) -> tuple[int | None, float | None, tuple[str, ...] | None]:
    rank, alpha, targets = (raw.get(name) for name in LORA)
    wrong = []
    if rank is not None and (type(rank) is not int or rank < 1):
        wrong.append(f"lora_rank is {rank!r}, expected a whole number of at least 1")
    if alpha is not None and (type(alpha) not in (int, float) or not 0 < alpha < float("inf")):
        wrong.append(f"lora_alpha is {alpha!r}, expected a number above 0")
    if targets is not None and not _are_names(targets):
        wrong.append(f"lora_targets is {targets!r}, expected a list of modules, such as q_proj")
    if wrong:
        raise ExportError(f"the policy {path} cannot be used: {'; '.join(wrong)}. Correct it.")
    return (
        rank,
        None if alpha is None else float(alpha),
        None if targets is None else tuple(targets),
    )


def _are_names(targets: object) -> bool:
    return (
        isinstance(targets, list)
        and bool(targets)
        and all(isinstance(name, str) and name for name in targets)
    )
