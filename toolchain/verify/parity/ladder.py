"""All rungs of one bundle, in their order."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporters.errors import ExportError
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.loop.errors import BundleError
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
from toolchain.verify.parity.models import Models
from toolchain.verify.parity.verdict import NOT_ASKED, RUNGS, Report, Rung, not_run
from toolchain.verify.source import find_source

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


@dataclass(frozen=True)
class Request:
    """``rungs``: those asked for, all where empty; the others are not run, and say so."""

    bundle: Path
    rungs: tuple[str, ...] = ()
    source: str | None = None
    quick: bool = False
    cpu: str = CPU


def climb(request: Request, told: Callable[[str], None] = lambda stage: None) -> Report:
    """Raises ``BundleError`` for a bundle that cannot be opened, or options that make no sense."""
    if unknown := sorted(set(request.rungs) - set(RUNGS)):
        raise BundleError(f"no --rung {', '.join(unknown)}; known: {', '.join(RUNGS)}.")
    begun = time.monotonic()
    bundle = open_bundle(request.bundle)
    manifest = bundle.manifest
    with tempfile.TemporaryDirectory(prefix="attune-parity-") as scratch:
        context = open_context(request, bundle, Path(scratch))
        context.told = told
        rungs = [_run(name, request, context) for name in RUNGS]
        texts = {case.name: case.text for case in context.cases}
    precisions = {
        name: target.quantize
        for name, target in (("android", manifest.android), ("ios", manifest.ios))
        if target is not None
    }
    return Report(
        bundle=str(request.bundle),
        model=manifest.model.name,
        precisions=precisions,
        rungs=tuple(rungs),
        texts=texts,
        seconds=time.monotonic() - begun,
    )


def open_context(request: Request, bundle: Bundle, scratch: Path) -> Context:
    text = ChatText(bundle)
    values = adapters(bundle)
    return Context(
        bundle=bundle,
        text=text,
        models=_models(request, bundle, values[INITIAL]),
        cases=cases(bundle.manifest, text, request.quick),
        examples=examples(bundle, text, request.quick) if bundle.manifest.training else (),
        adapters=values,
        scratch=scratch,
        quick=request.quick,
        cpu=request.cpu,
    )


def _models(request: Request, bundle: Bundle, initial: dict[str, np.ndarray]) -> Models | str:
    """The models in PyTorch, or why there are none. A ``--source`` that is another model than the
    bundle's is the user's mistake, and raises."""
    if (
        request.source is not None
        and not Path(request.source).exists()
        and ("/" not in request.source or request.source.startswith(("/", ".")))
        and request.source != "tiny"
    ):
        return f"the source {request.source} is no longer there."
    try:
        found = find_source(bundle.manifest, request.source)
    except ExportError as error:
        return f"the source cannot be read: {error}"
    if isinstance(found, str):
        return found
    models = Models(bundle, found, initial)
    assert models.as_read
    return models


def _run(name: str, request: Request, context: Context) -> Rung:
    if request.rungs and name not in _needed(request.rungs):
        return not_run(name, NOT_ASKED)
    return run_rung(name, context)


def run_rung(name: str, context: Context) -> Rung:
    begun = time.monotonic()
    context.told(name)
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
