"""A worker's world: the study's engine, and a bundle's programs to model the phone's time by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.loop.dialogue import Dialogue
from toolchain.fleet.world import Costs, FleetPlace, LoopWorld
from toolchain.simulate.device import Device
from toolchain.study.phone_costs import phone_costs
from toolchain.study.world import open_world as open_study_world


def open_world(place: FleetPlace) -> BundleWorld:
    """Raises ``BundleError`` for a bundle that cannot be used."""
    return BundleWorld(open_study_world(place.study), open_bundle(place.study.bundle))


class BundleWorld:
    """``world`` computes; ``bundle`` says what that costs on a phone."""

    def __init__(self, world: LoopWorld, bundle: Bundle) -> None:
        self._world, self._programs, self._text = world, bundle, ChatText(bundle)
        self.policy, self.lexicons, self.bundle = world.policy, world.lexicons, world.bundle
        self.engine, self.tuner = world.engine, world.tuner

    def costs(self, phone: Device) -> Costs:
        return phone_costs(self._programs, phone, self._text)

    def losses(self, adapter: Path, dialogues: Sequence[Dialogue]) -> Sequence[float]:
        return self._world.losses(adapter, dialogues)

    def replies(self, adapter: Path, dialogues: Sequence[Dialogue], most: int) -> Sequence[str]:
        return self._world.replies(adapter, dialogues, most)
