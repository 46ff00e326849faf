"""All rungs of one bundle, in their order."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from exporters.errors import ExportError
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.loop.errors import BundleError
from toolchain.compile.source import find_source
from toolchain.defaults import BUILTIN
from toolchain.verify.arm64.emulate import CPU
from toolchain.verify.parity import (
    coreml_rung,
    decisions_rung,
    executorch_rungs,
    golden_rungs,
    pytorch_rungs,
)
from toolchain.verify.parity.cases import INITIAL, adapters, cases, examples
from toolchain.verify.parity.context import Context
from toolchain.verify.parity.models import Models, open_models
from toolchain.verify.parity.verdict import NOT_ASKED, RUNGS, Report, Rung, not_run

_NEED_SOURCE = ("eager", "captured", "quantized")
_RUN: dict[str, Callable[[Context], Rung]] = {
    "eager": pytorch_rungs.eager,
    "captured": pytorch_rungs.captured,
    "quantized": pytorch_rungs.quantized,
    "executorch": executorch_rungs.executorch,
    "arm64": executorch_rungs.arm64,
    "coreml": coreml_rung.coreml,
    "decisions": decisions_rung.decisions,
}


def climb(
    folder: Path,
    *,
    rungs: Sequence[str] = (),
    source: str | None = None,
    quick: bool = False,
    cpu: str = CPU,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """All rungs of the bundle ``folder``, or those asked for: the others are not run, and say so.

    ``source``: the model that it was made from; ``quick``: fewer and shorter inputs; ``cpu``: what
    QEMU emulates. Raises ``BundleError`` for a bundle that cannot be opened, or options that make
    no sense.
    """
    if unknown := sorted(set(rungs) - set(RUNGS)):
        raise BundleError(f"no --rung {', '.join(unknown)}; known: {', '.join(RUNGS)}.")
    begun = time.monotonic()
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    with tempfile.TemporaryDirectory(prefix="attune-parity-") as scratch:
        context = open_context(bundle, Path(scratch), source=source, quick=quick, cpu=cpu)
        context.progress = progress
        needed = _needed(rungs or RUNGS)
        results = [
            run_rung(name, context) if name in needed else not_run(name, NOT_ASKED)
            for name in RUNGS
        ]
        texts = {case.name: case.text for case in context.cases}
    precisions = {
        name: target.quantize
        for name, target in (("android", manifest.android), ("ios", manifest.ios))
        if target is not None
    }
    return Report(
        bundle=str(folder),
        model=manifest.model.name,
        precisions=precisions,
        rungs=tuple(results),
        texts=texts,
        seconds=time.monotonic() - begun,
    )


def open_context(
    bundle: Bundle,
    scratch: Path,
    *,
    source: str | None = None,
    quick: bool = False,
    cpu: str = CPU,
) -> Context:
    """What all rungs share; ``scratch``: a folder for files that they make."""
    text = ChatText.of(bundle)
    values = adapters(bundle)
    return Context(
        bundle=bundle,
        text=text,
        models=_models(bundle, source, values[INITIAL]),
        cases=cases(bundle.manifest, text, quick),
        examples=examples(bundle, text, quick) if bundle.manifest.training else (),
        adapters=values,
        scratch=scratch,
        quick=quick,
        cpu=cpu,
    )


def _models(bundle: Bundle, source: str | None, initial: dict[str, np.ndarray]) -> Models | str:
    """The models in PyTorch, or why there are none. A ``--source`` that is another model than the
    bundle's is the user's mistake, and raises."""
    if (
        source is not None
        and not Path(source).exists()
        and ("/" not in source or source.startswith(("/", ".")))
        and source != BUILTIN
    ):
        return f"the source {source} is no longer there."
    try:
        original = find_source(bundle.manifest, source)
    except ExportError as error:
        return f"the source cannot be read: {error}"
    if isinstance(original, str):
        return original
    return open_models(bundle, original, initial)


def run_rung(name: str, context: Context) -> Rung:
    """One rung; where there is no source, by the golden vectors or not at all."""
    begun = time.monotonic()
    context.progress(name)
    if not isinstance(context.models, str):
        rung = _RUN[name](context)
    elif name in _NEED_SOURCE:
        rung = not_run(name, f"the model's source is needed: {context.models}")
    else:
        rung = golden_rungs.without_source(name, context)
    return replace(rung, seconds=time.monotonic() - begun)


def _needed(rungs: Sequence[str]) -> set[str]:
    """Those asked for; ARM64 is compared with this processor's results."""
    return {*rungs, *(["executorch"] if "arm64" in rungs else [])}
