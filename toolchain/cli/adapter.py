"""``attune adapter``: PEFT folders and the runtime's adapter file, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from runtime_py.bundle.adapter_forms import load_adapter, to_runtime
from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.peft_adapter import write_peft
from runtime_py.loop.errors import AdapterError
from toolchain.cli.options import AdapterPath, Json
from toolchain.report.console import bold, line, megabytes, output, print_json

app = typer.Typer(help="Show and convert LoRA adapters.", no_args_is_help=True)


@app.command()
def show(
    path: AdapterPath,
    as_json: Json = False,
) -> None:
    """Show an adapter's rank, targets, sizes and how far it is from doing nothing.

    Example: [bold]attune adapter show out/tiny/adapter[/]
    """
    adapter = load_adapter(path)
    rows = [
        {
            "module": module,
            "inputs": a.shape[1],
            "outputs": b.shape[0],
            "rank": adapter.rank_of(module),
            "scaling": adapter.scaling(module),
            # ‖B A‖ is a norm of an r × r problem: ‖B A‖² = tr((BᵀB)(AAᵀ)).
            "update_norm": float(
                np.sqrt(max(0.0, np.sum((b.T @ b) * (a @ a.T)))) * adapter.scaling(module)
            ),
        }
        for module, (a, b) in adapter.tensors.items()
    ]
    parameters = sum(a.size + b.size for a, b in adapter.tensors.values())
    if as_json:
        print_json(
            {
                "path": str(path),
                "rank": adapter.rank,
                "alpha": adapter.alpha,
                "dtype": adapter.dtype,
                "parameters": parameters,
                "base_model": adapter.config.get("base_model_name_or_path"),
                "modules": rows,
            }
        )
        return
    output.print(
        line(
            bold(path),
            f"  LoRA r {adapter.rank}, α {adapter.alpha:g}, {adapter.dtype}, "
            f"{parameters:,} parameters ({megabytes(4 * parameters)} as float32), "
            f"base {adapter.config.get('base_model_name_or_path') or 'not named'}",
        )
    )
    table = Table("module", "in", "out", "r", "scaling", "‖update‖", box=None, pad_edge=False)
    for row in rows if len(rows) <= 24 else rows[:24]:
        cells = (row["inputs"], row["outputs"], row["rank"])
        table.add_row(
            str(row["module"]), *map(str, cells), f"{row['scaling']:g}", f"{row['update_norm']:.4g}"
        )
    output.print(table)
    if len(rows) > 24:
        output.print(f"… and {len(rows) - 24} more modules (--json has all)")


@app.command()
def convert(
    source: AdapterPath,
    out: Annotated[Path, typer.Argument(help="A .ptd file to write, or a new PEFT folder.")],
    bundle: Annotated[
        Path | None, typer.Option(help="The bundle that a .ptd is for: it knows the layout.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert between PEFT's folder and the runtime's file, without loss.

    Example: [bold]attune adapter convert my-lora my-lora.ptd --bundle out/tiny[/]
    """
    if out.exists():
        raise AdapterError(f"{out} exists already: choose another name or remove it.")
    from runtime_py.bundle.flat_tensor import write_ptd

    adapter = load_adapter(source)
    if out.suffix == ".ptd":
        if bundle is None:
            raise AdapterError(
                "a .ptd file has the layout of one compiled program: name its bundle with --bundle."
            )
        write_ptd(out, to_runtime(adapter, open_bundle(bundle).manifest.adapter.tensors))
        size = out.stat().st_size
    else:
        write_peft(out, adapter)
        size = sum(f.stat().st_size for f in out.iterdir())
    if as_json:
        print_json({"source": str(source), "out": str(out), "bytes": size})
    else:
        output.print(f"{source} → {out} ({megabytes(size)})")
