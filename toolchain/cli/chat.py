"""``attune chat``: talk to a bundle's Android part, in ExecuTorch's stock LLM runner."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.manifest import Manifest
from runtime_py.engine.stock_runner import StockRunner
from runtime_py.loop.dialogue import Turn
from runtime_py.loop.errors import BundleError
from toolchain.cli.options import AndroidBundle, Json
from toolchain.report.console import bold, console, dim, line, output, print_error, print_json


def chat(
    bundle: AndroidBundle,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this one message and end; else a conversation.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Another adapter: a .ptd file or a PEFT folder.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens a reply.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Talk to the Android part on this machine, in the stock runner, streaming.

    Example: [bold]attune chat out/tiny --prompt "I need a hotel in Paris."[/]
    """
    opened = open_bundle(bundle)
    if as_json and prompt is None:
        raise BundleError("--json answers one message: give it with --prompt.")
    with _runtime_adapter(opened.manifest, adapter) as file:
        runner = StockRunner(opened, file)
        if prompt is not None:
            _once(runner, prompt, max_new_tokens, temperature, as_json)
            return
        _converse(runner, opened.manifest, max_new_tokens, temperature)


@contextmanager
def _runtime_adapter(manifest: Manifest, adapter: Path | None) -> Iterator[Path | None]:
    """The adapter as a .ptd file for this bundle: checked, and converted where it is PEFT's."""
    if adapter is None:
        yield None
        return
    from runtime_py.bundle.adapter_forms import load_adapter, to_runtime
    from runtime_py.bundle.flat_tensor import write_ptd

    with tempfile.TemporaryDirectory(prefix="attune-") as folder:
        file = Path(folder) / "adapter.ptd"
        write_ptd(file, to_runtime(load_adapter(adapter), manifest.adapter.tensors))
        yield file


def _once(runner: StockRunner, prompt: str, count: int, temperature: float, as_json: bool) -> None:
    rendered = runner.text.for_runner([Turn("user", prompt)])
    reply, statistics = runner.generate(
        rendered, count, temperature, None if as_json else output.shown
    )
    if as_json:
        print_json({"prompt": prompt, "rendered": rendered, "reply": reply, "stats": statistics})
    else:
        print(flush=True)


def _converse(runner: StockRunner, manifest: Manifest, count: int, temperature: float) -> None:
    console.print(
        line(
            bold(manifest.model.name),
            " in ExecuTorch's stock runner. Ctrl-D ends, /new forgets.",
        )
    )
    turns: list[Turn] = []
    while (typed := _ask()) is not None:
        if typed == "/new":
            turns = []
        if typed in ("", "/new"):
            continue
        turns = _fitting(runner, [*turns, Turn("user", typed)], count)
        try:
            prompt = runner.text.for_runner(turns)
            reply, statistics = runner.generate(prompt, count, temperature, output.shown)
        except BundleError as error:  # this message cannot be answered: the conversation goes on
            print_error(error)
            turns.pop()
            continue
        print(flush=True)
        turns.append(Turn("assistant", reply))
        if rate := _rate(statistics):
            console.print(dim(f"{rate:.0f} tokens/s"))


def _ask() -> str | None:
    """The next line that is typed; None where there is no more."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _fitting(runner: StockRunner, turns: list[Turn], count: int) -> list[Turn]:
    """``turns`` without the first exchanges, so that a reply of ``count`` tokens has room."""
    while len(turns) > 1:
        if len(runner.text.tokens(turns, reply=True).ids) + count <= runner.context:
            break
        turns = turns[2:]
    return turns


def _rate(statistics: dict) -> float | None:
    try:
        spent = statistics["inference_end_ms"] - statistics["first_token_ms"]
        return 1000.0 * (statistics["generated_tokens"] - 1) / spent if spent > 0 else None
    except KeyError:
        return None
