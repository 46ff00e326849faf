"""The world of a fleet's workers: the study's."""

from __future__ import annotations

from toolchain.fleet.fleet_world import FleetPlace, FleetWorld
from toolchain.study.world import World


def open_world(place: FleetPlace) -> FleetWorld:
    """Raises ``AttuneError`` where a bundle or device cannot be used."""
    return World(place.study)
