"""The simulated clock: a day of use, a night of charging, and heat that makes work pause.

Simulated time depends on how far the loop is and on nothing else, so that a run that was killed has
the same clock as one that was not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.schedule import Conditions, Moment
from toolchain.simulate.device import Device

GRID = 2.0**-26  # seconds
COOLED = 3.0  # kelvin below the limit at which work goes on
HOUR = 3600.0
DAY = 24 * HOUR


@dataclass(frozen=True)
class Thermal:
    """``duty``: the part of the time that the device can work without passing the policy's limit;
    ``celsius``: where its surface settles, or the limit."""

    duty: float
    celsius: float


def thermal(device: Device, policy: LoopPolicy) -> Thermal:
    """Newton's law of cooling: work until the limit, rest until ``COOLED`` below it."""
    heat = device.heat
    rest = heat.ambient_celsius + heat.charging_watts * heat.kelvin_per_watt
    busy = rest + device.power.watts * heat.kelvin_per_watt
    limit = policy.hottest_celsius
    if busy <= limit:
        return Thermal(1.0, busy)
    cooled = limit - COOLED
    if rest >= cooled:  # it never cools down so far
        return Thermal(0.0, max(rest, limit))
    warming = math.log((busy - cooled) / (busy - limit))  # in time constants
    cooling = math.log((limit - rest) / (cooled - rest))
    return Thermal(warming / (warming + cooling), limit)


class Clock:
    """``wall``: simulated seconds of this night so far, work and the pauses that heat makes. They
    lie on a grid, so that sums and differences are exact."""

    def __init__(self, device: Device, policy: LoopPolicy) -> None:
        self._rhythm, self._heat = device.rhythm, thermal(device, policy)
        self._device = device
        self._place, self.night, self.wall = 0, False, 0.0

    def by_day(self, place: int) -> None:
        """Dialogue ``place`` (from 1 on) has just ended; 0: none yet."""
        self._place, self.night, self.wall = place, False, 0.0

    def by_night(self) -> None:
        self.night = True

    @property
    def day(self) -> int:
        return max(0, self._place - 1) // self._rhythm.dialogues

    def ends_day(self, place: int) -> bool:
        return place % self._rhythm.dialogues == 0

    def __call__(self) -> Moment:
        if self.night:
            return Moment(self._night_begins + self.wall, self.day)
        rhythm = self._rhythm
        part = (max(0, self._place - 1) % rhythm.dialogues + 0.5) / rhythm.dialogues
        hour = rhythm.use_from + part * (rhythm.use_to - rhythm.use_from)
        return Moment(self.day * DAY + hour * HOUR, self.day)

    def add(self, work: float) -> None:
        """Work of so many seconds was done in this night."""
        self.wall += on_grid(work / self._heat.duty)

    @property
    def work(self) -> float:
        """Seconds of this night's work without the pauses."""
        return self.wall * self._heat.duty

    def since_night(self, moment: float) -> float:
        """Seconds from when this night began to ``moment``."""
        return moment - self._night_begins

    @property
    def _night_begins(self) -> float:
        later = DAY if self._rhythm.charge_from < self._rhythm.use_from else 0.0
        return self.day * DAY + on_grid(self._rhythm.charge_from * HOUR) + later

    @property
    def night_is_over(self) -> bool:
        return self.wall >= self._rhythm.night_hours * HOUR

    def conditions(self, free_memory_mb: int) -> Conditions:
        """The device now: in a night on its charger and unused; ``celsius`` before it works."""
        heat = self._device.heat
        charging = self.night and not self.night_is_over
        celsius = heat.ambient_celsius + heat.charging_watts * heat.kelvin_per_watt * charging
        if self._heat.duty == 0.0:
            celsius = self._heat.celsius + COOLED
        return Conditions(charging, self.night, celsius, free_memory_mb)


def on_grid(seconds: float) -> float:
    return math.floor(seconds / GRID + 0.5) * GRID
