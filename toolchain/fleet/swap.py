"""The swap control: other users' adapters on one user's dialogues.

What an adapter gains for its own user alone is not yet personal: every adapter may have learned how
to answer at all. Personal is what is left beside the mean of others' adapters on the same tests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain.fleet.fleet_world import FleetWorld
from toolchain.fleet.manners import find_manner
from toolchain.fleet.user_life import UserLife, as_wanted
from toolchain.fleet.users import FleetUser
from toolchain.streams.chance import chance, shuffled
from toolchain.streams.made import make_stream


@dataclass(frozen=True)
class SwapTask:
    """``adapters``: of the partners, by their numbers; None: the bundle's own."""

    user: FleetUser
    adapters: tuple[tuple[int, bytes | None], ...]
    data: Path


@dataclass(frozen=True)
class Swapped:
    """``losses``: the mean of the user's tests, nats a label, with each partner's adapter."""

    number: int
    partners: tuple[int, ...]
    losses: tuple[float, ...]

    def personal(self, life: UserLife) -> float | None:
        """The user's gain minus the mean of what the partners' adapters gain on the same tests;
        None: it has no partners."""
        if not self.losses:
            return None
        return sum(self.losses) / len(self.losses) - sum(life.after) / len(life.after)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Swapped:
        return Swapped(raw["number"], tuple(raw["partners"]), tuple(raw["losses"]))


def partners_of(number: int, lived: Sequence[int], count: int, seed: int) -> tuple[int, ...]:
    """``count`` of the others in ``lived`` (fewer where there are not so many), drawn by the seed
    and the number alone, ascending."""
    others = [other for other in sorted(lived) if other != number]
    return tuple(sorted(shuffled(others, chance(seed, "partners", number))[:count]))


def swap(task: SwapTask, world: FleetWorld) -> Swapped:
    """Runs each partner's adapter on the user's tests, as the user would have them answered."""
    tests = make_stream(task.user.recipe, task.data, task.user.seed).tests
    fitting = as_wanted(tests, find_manner(task.user.manner), world.tuner)
    wanted = [one.dialogue for one in fitting]
    own = world.bundle.adapter_file
    losses = []
    with tempfile.TemporaryDirectory(prefix="attune-fleet-") as folder:
        for number, adapter in task.adapters:
            file = own
            if adapter is not None:
                file = Path(folder) / f"{number}{own.suffix}"
                file.write_bytes(adapter)
            losses.append(sum(world.losses(file, wanted)) / len(wanted))
    return Swapped(task.user.number, tuple(number for number, _ in task.adapters), tuple(losses))
