"""What a fleet is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from runtime_py.loop.errors import LoopError
from toolchain.fleet.user_life import LifeOptions


@dataclass(frozen=True)
class FleetOptions:
    """``users``: how many, from number ``first`` on. ``partners``: others whose adapters each
    user's dialogues are tried with; ``seed``: of users, streams and partners."""

    users: int
    dialogues: int
    tests: int
    partners: int
    seed: int
    life: LifeOptions
    datasets: tuple[str, ...] = ()
    manners: tuple[str, ...] = ()
    first: int = 0


def check_options(options: FleetOptions) -> None:
    """Raises ``LoopError`` with all misfits."""
    wrong = []
    if options.users < 2:
        wrong.append("--users is at least 2: one is tried with another's adapter")
    if options.dialogues < 1 or options.tests < 1:
        wrong.append("--dialogues and --tests are at least 1")
    if options.partners < 1:
        wrong.append("--partners is at least 1")
    if not 1 <= options.life.nights <= options.dialogues:
        wrong.append("--nights is at least 1, and at most --dialogues")
    if not 0.0 <= options.life.answer_rate <= 1.0:
        wrong.append("--answer-rate is 0 to 1")
    if wrong:
        raise LoopError(f"{'; '.join(wrong)}.")
