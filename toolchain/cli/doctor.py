"""``attune doctor``: are the fragile packages those that were tested together?"""

from __future__ import annotations

import platform
import sys

import typer
from rich.table import Table

from toolchain.cli.options import Json
from toolchain.compile.tested_versions import installed_version, tested_versions
from toolchain.report.console import output, print_json, styled

PINNED = ("torch", "executorch", "coremltools", "transformers", "peft", "torchao", "optimum")


def doctor(
    as_json: Json = False,
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
        wrong = styled("red", "!")
        table = Table("package", "tested", "installed", "", box=None, pad_edge=False)
        table.add_row("python", "3.11", platform.python_version(), "ok" if python_ok else wrong)
        for row in rows:
            installed = row["installed"] or "not installed"
            ok = "ok" if row["ok"] else wrong
            table.add_row(row["package"], row["tested"], installed, ok)
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
