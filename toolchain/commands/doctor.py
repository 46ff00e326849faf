"""``attune doctor``: are the fragile packages those that were tested together?"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated

import typer
from packaging.requirements import Requirement
from rich.table import Table

from toolchain.console import output, print_json

PINNED = ("torch", "executorch", "coremltools", "transformers", "peft", "torchao", "optimum")


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


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check the installed versions against the combination that was tested.

    Exit code 1 where one differs. Example: [bold]attune doctor[/]
    """
    tested = tested_versions()
    rows: list[dict] = [
        {"package": name, "tested": tested[name], "installed": installed_version(name)}
        for name in sorted(tested, key=lambda n: (n not in PINNED, n))
    ]
    for row in rows:
        row["ok"] = row["tested"] == row["installed"]
    python_ok = sys.version_info[:2] == (3, 11)
    healthy = python_ok and all(row["ok"] for row in rows)
    if as_json:
        print_json(
            {
                "python": {
                    "installed": platform.python_version(),
                    "tested": "3.11",
                    "ok": python_ok,
                },
                "packages": rows,
                "platform": f"{platform.system()} {platform.machine()}",
                "coreml_prediction": platform.system() == "Darwin",
                "ok": healthy,
            }
        )
    else:
        table = Table("package", "tested", "installed", "", box=None, pad_edge=False)
        table.add_row(
            "python", "3.11", platform.python_version(), "ok" if python_ok else "[red]![/]"
        )
        for row in rows:
            found = row["installed"] or "not installed"
            table.add_row(row["package"], row["tested"], found, "ok" if row["ok"] else "[red]![/]")
        output.print(table)
        output.print(
            "This combination was tested."
            if healthy
            else "This combination was not tested: install attune-mobile in a fresh environment."
        )
        if platform.system() != "Darwin":
            output.print(
                "Core ML packages are written and checked here, and can only run on a Mac."
            )
    if not healthy:
        raise typer.Exit(1)
