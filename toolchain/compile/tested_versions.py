"""The versions that attune was tested with, and those that are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def tested_versions() -> dict[str, str]:
    """The exact versions that this attune was tested with, as its own metadata pins them."""
    pins = {}
    for line in requires("attune-mobile") or []:
        requirement = Requirement(line)
        exact = [s.version for s in requirement.specifier if s.operator == "=="]
        if exact and requirement.marker is None:
            pins[requirement.name] = exact[0]
    return pins


def installed_version(package: str) -> str | None:
    """Without a local suffix such as ``+cpu``, which does not change what is supported."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None
