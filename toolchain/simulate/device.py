"""Device profiles: what a phone lets an app use, each figure with its source.

A profile is a TOML file of tables. A figure is ``{ value = …, source = "…" }``; a source that
begins with ``estimate`` is one. Unknown, missing and impossible fields are one error.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from runtime_py.loop.errors import LoopError

FOLDER = Path(__file__).resolve().parent / "devices"
CLASSES = ("flagship", "mid-range", "low-end", "computer")
SYSTEMS = ("android", "ios", "linux")


@dataclass(frozen=True)
class DeviceMemory:
    """MB of 10⁶ bytes. ``app_mb``: what an app may hold while it works in the background."""

    device_mb: float
    app_mb: float


@dataclass(frozen=True)
class Compute:
    """Sustained figures of the CPU cores that the app uses. ``gflops``: float32, ``gops``: 8-bit
    integers, each a multiplication and an addition as two; ``gigabytes_per_s``: memory."""

    cores: int
    gflops: float
    gops: float
    gigabytes_per_s: float


@dataclass(frozen=True)
class DeviceStorage:
    """``app_mb``: bundle, store, adapters and training states together."""

    app_mb: float


@dataclass(frozen=True)
class Power:
    """``watts``: of the device under this load, above rest."""

    battery_wh: float
    watts: float


@dataclass(frozen=True)
class Heat:
    """Newton's law of cooling: the surface approaches ambient + watts · ``kelvin_per_watt`` with
    the time constant ``minutes``. ``charging_watts``: what charging turns into heat."""

    ambient_celsius: float
    kelvin_per_watt: float
    minutes: float
    charging_watts: float


@dataclass(frozen=True)
class Rhythm:
    """A day, in hours from 0 to 24; ``charge_from`` may be later than ``charge_to``, over
    midnight. Dialogues are spread evenly from ``use_from`` to ``use_to``."""

    dialogues: int
    use_from: float
    use_to: float
    charge_from: float
    charge_to: float

    @property
    def night_hours(self) -> float:
        return (self.charge_to - self.charge_from) % 24.0


@dataclass(frozen=True)
class Device:
    """``sources``: what each figure rests on, by ``table.field``."""

    name: str
    kind: str
    system: str
    memory: DeviceMemory
    compute: Compute
    storage: DeviceStorage
    power: Power
    heat: Heat
    rhythm: Rhythm
    sources: dict[str, str]


_TABLES: dict[str, type] = {
    "memory": DeviceMemory,
    "compute": Compute,
    "storage": DeviceStorage,
    "power": Power,
    "heat": Heat,
    "rhythm": Rhythm,
}
_TEXTS = {"name": None, "class": CLASSES, "system": SYSTEMS}
_ANY_SIGN = {"heat.ambient_celsius"}
_MAY_BE_ZERO = {"heat.charging_watts", "rhythm.use_from", "rhythm.charge_from", "rhythm.charge_to"}


def device_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_device(name: str) -> Device:
    """A shipped profile by its name, or a TOML file by its path. Raises ``LoopError``."""
    path = Path(name)
    if path.suffix != ".toml":
        path = FOLDER / f"{name}.toml"
        if name not in device_names():
            raise LoopError(
                f"there is no device {name!r}; known are {', '.join(device_names())}, or give a "
                f".toml file."
            )
    return read_device(path)


def read_device(path: Path) -> Device:
    """A profile from its TOML file. Raises ``LoopError`` with all misfits."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoopError(f"there is no device profile {path}.") from None
    except OSError as error:
        raise LoopError(f"the device profile {path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LoopError(f"the device profile {path} is not TOML: {error}.") from None
    wrong: list[str] = []
    sources: dict[str, str] = {}
    texts = {key: _text(raw, key, allowed, wrong) for key, allowed in _TEXTS.items()}
    tables = {name: _table(raw, name, kind, sources, wrong) for name, kind in _TABLES.items()}
    wrong += [f"{key} is unknown" for key in raw if key not in _TEXTS and key not in _TABLES]
    if not wrong:
        wrong += _impossible(tables)
    if wrong:
        raise LoopError(
            f"the device profile {path} cannot be used: {'; '.join(wrong)}. Correct it; see "
            f"{FOLDER / 'pixel-8.toml'} for one that is right."
        )
    built: dict[str, Any] = {name: kind(**tables[name]) for name, kind in _TABLES.items()}
    return Device(
        name=texts["name"], kind=texts["class"], system=texts["system"], sources=sources, **built
    )


def _text(raw: dict[str, Any], key: str, allowed: tuple[str, ...] | None, wrong: list[str]) -> str:
    value = raw.get(key)
    if value is None:
        wrong.append(f"{key} is missing")
    elif not isinstance(value, str) or (allowed and value not in allowed):
        wrong.append(f"{key} is {value!r}, expected {' or '.join(allowed or ('text',))}")
    return str(value)


def _table(
    raw: dict[str, Any], table: str, kind: type, sources: dict[str, str], wrong: list[str]
) -> dict[str, float]:
    given = raw.get(table)
    if not isinstance(given, dict):
        wrong.append(f"the table [{table}] is missing")
        return {}
    known = {field.name: str(field.type) for field in fields(kind)}
    wrong += [f"{table}.{key} is unknown" for key in given if key not in known]
    values: dict[str, float] = {}
    for name, type_name in known.items():
        place = f"{table}.{name}"
        figure = given.get(name)
        if figure is None:
            wrong.append(f"{place} is missing")
            continue
        if not isinstance(figure, dict) or set(figure) != {"value", "source"}:
            wrong.append(f"{place} is {figure!r}, expected {{ value = …, source = … }}")
            continue
        value, source = figure["value"], figure["source"]
        whole = type_name == "int"
        if type(value) is not int and (whole or type(value) is not float):
            wrong.append(f"{place} is {value!r}, expected a {'whole ' if whole else ''}number")
        elif place not in _ANY_SIGN and (value < 0 or (value == 0 and place not in _MAY_BE_ZERO)):
            wrong.append(f"{place} is {value!r}, expected more than 0")
        elif not isinstance(source, str) or not source.strip():
            wrong.append(f"{place} has no source")
        else:
            values[name], sources[place] = (value if whole else float(value)), source
    return values


def _impossible(tables: dict[str, dict[str, float]]) -> list[str]:
    day, memory = tables["rhythm"], tables["memory"]
    wrong = [
        f"rhythm.{name} is {day[name]:g}, expected an hour from 0 to 24"
        for name in ("use_from", "use_to", "charge_from", "charge_to")
        if day[name] > 24
    ]
    if day["use_from"] >= day["use_to"]:
        wrong.append("rhythm.use_from is not before rhythm.use_to")
    if day["charge_from"] < day["use_to"] and day["charge_from"] >= day["use_from"]:
        wrong.append("rhythm.charge_from is before rhythm.use_to: the night begins after use")
    if memory["app_mb"] > memory["device_mb"]:
        wrong.append("memory.app_mb is more than memory.device_mb")
    return wrong


def host_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
