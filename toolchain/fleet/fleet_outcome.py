"""What came of a fleet: the gains, whose they are, who got worse and why, and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from toolchain.fleet.fleet_options import FleetOptions
from toolchain.fleet.swap import Swapped
from toolchain.fleet.user_life import UserLife
from toolchain.fleet.users import FleetUser
from toolchain.report.statistics import RESAMPLES, Interval, percentile_interval
from toolchain.simulate.device import Device

FEW_GUARDS = 4  # held-out sets; fewer judge by chance
_SEED = 2024
_CHUNK = 500  # resamples at once


@dataclass(frozen=True)
class UserFailure:
    """``phase``: life or swap."""

    number: int
    phase: str
    sentence: str


@dataclass(frozen=True)
class Worse:
    """A user whose loss rose; ``gain`` is negative."""

    number: int
    gain: float
    reason: str


@dataclass(frozen=True)
class MannerRow:
    """Means over the users of one manner; compliance over those whose replies tell."""

    manner: str
    users: int
    gain: float
    personal: float | None
    compliance_before: float | None
    compliance_after: float | None


@dataclass(frozen=True)
class AcrossUsers:
    """``interval``: of the mean over users, None with fewer than two; ``quantiles``: 10, 50 and
    90 %."""

    mean: float
    interval: Interval | None
    quantiles: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class FleetOutcome:
    """``lives`` and ``swaps`` go with ``users``; a swap is None where it failed. ``seconds``: that
    each life took on the machines it ran on."""

    phone: Device
    options: FleetOptions
    small: tuple[str, ...]
    users: tuple[FleetUser, ...]
    lives: tuple[UserLife, ...]
    swaps: tuple[Swapped | None, ...]
    failures: tuple[UserFailure, ...]
    seconds: tuple[float, ...]

    @property
    def gains(self) -> list[float]:
        """Nats a label, one a user."""
        return [life.gain for life in self.lives]

    @property
    def relative_gains(self) -> list[float]:
        """As parts of each user's loss before."""
        return [life.gain * len(life.before) / sum(life.before) for life in self.lives]

    @property
    def personal(self) -> list[float | None]:
        """Own gain minus the mean of others', one a user."""
        pairs = zip(self.lives, self.swaps, strict=True)
        return [None if one is None else one.personal(life) for life, one in pairs]

    @property
    def worse(self) -> list[Worse]:
        """The worst first."""
        pairs = zip(self.users, self.lives, strict=True)
        found = [
            Worse(life.number, life.gain, why_worse(user, life))
            for user, life in pairs
            if life.gain < 0
        ]
        return sorted(found, key=lambda one: one.gain)

    @property
    def states(self) -> dict[str, int]:
        """How the nights on which a fine-tuning was due ended."""
        return dict(Counter(night.state for life in self.lives for night in life.nights))

    @property
    def reasons(self) -> dict[str, int]:
        """Why nights brought no new adapter, the most frequent first."""
        told = Counter(
            night.reason
            for life in self.lives
            for night in life.nights
            if night.state != "accepted"
        )
        return dict(told.most_common())

    @property
    def night_minutes(self) -> list[float]:
        """Modelled, of each night on which something was computed."""
        return [night.minutes for life in self.lives for night in life.nights if night.minutes]

    @property
    def too_long(self) -> int:
        """Nights with more work than hours."""
        return sum(night.too_long for life in self.lives for night in life.nights)

    def manners(self) -> list[MannerRow]:
        """In the order in which they first occur."""
        rows = []
        for manner in dict.fromkeys(life.manner for life in self.lives):
            of = [place for place, life in enumerate(self.lives) if life.manner == manner]
            lives = [self.lives[place] for place in of]
            rows.append(
                MannerRow(
                    manner,
                    len(of),
                    float(np.mean([life.gain for life in lives])),
                    _mean([self.personal[place] for place in of]),
                    _mean([life.compliance_before for life in lives]),
                    _mean([life.compliance_after for life in lives]),
                )
            )
        return rows

    def as_json(self) -> dict[str, Any]:
        """All numbers; measured seconds are of the machines it ran on."""
        personal = [value for value in self.personal if value is not None]
        return {
            "phone": self.phone.name,
            "users": self.options.users,
            "lived": len(self.lives),
            "dialogues": self.options.dialogues,
            "left_out_datasets": list(self.small),
            "gain": _told(self.gains),
            "relative_gain": _told(self.relative_gains),
            "personal_gain": _told(personal),
            "got_worse": [asdict(one) for one in self.worse],
            "manners": [asdict(row) for row in self.manners()],
            "nights": {"states": self.states, "reasons": self.reasons, "too_long": self.too_long},
            "modelled": {
                "night_minutes": _told(self.night_minutes),
                "day_minutes": _told([life.day_minutes for life in self.lives]),
                "watt_hours": _told([life.watt_hours for life in self.lives]),
                "battery_wh": self.phone.power.battery_wh,
            },
            "failures": [asdict(one) for one in self.failures],
            "seconds_a_life": _told(list(self.seconds)),
            "lives": [
                {**life.as_json(), "gain": life.gain, "personal": own}
                for life, own in zip(self.lives, self.personal, strict=True)
            ],
        }


def summary(values: Sequence[float]) -> AcrossUsers | None:
    """None: there are no values. The interval is the bootstrap's over users."""
    if not values:
        return None
    found = np.asarray(values, np.float64)  # [users]
    low, middle, high = (float(q) for q in np.quantile(found, (0.1, 0.5, 0.9)))
    return AcrossUsers(float(found.mean()), mean_interval(found), (low, middle, high))


def mean_interval(values: np.ndarray) -> Interval | None:
    """The percentile interval of the mean; ``values``: float64 [n]. None for fewer than two."""
    if len(values) < 2:
        return None
    chance = np.random.default_rng(_SEED)
    means = [
        values[chance.integers(0, len(values), (_CHUNK, len(values)))].mean(axis=1)
        for _ in range(RESAMPLES // _CHUNK)
    ]
    return percentile_interval(np.concatenate(means))


def why_worse(user: FleetUser, life: UserLife) -> str:
    """The first that holds: what was asked about on one side, who judged, or neither."""
    names = [source.name for source in user.recipe.sources]
    unseen = [name for name in names if not life.answered.get(name)]
    strange = sum(life.tests.count(name) for name in unseen)
    if 2 * strange >= len(life.tests):
        return (
            f"no answer was about {' and '.join(unseen)}: {strange} of its {len(life.tests)} test "
            f"dialogues"
        )
    accepted = [night for night in life.nights if night.state == "accepted"]
    fewest = min((night.guard for night in accepted), default=0)
    if fewest < FEW_GUARDS:
        return f"the guard had {fewest} held-out sets to judge an adapter by"
    drifted = f" after {sum(life.answered.values())} answers"
    return f"the guard's sets got better and the unseen dialogues did not{drifted}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _told(values: Sequence[float]) -> dict[str, Any] | None:
    found = summary(values)
    return None if found is None else asdict(found)
