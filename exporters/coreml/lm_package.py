"""A transformer into one multifunction Core ML package: ``prefill``, ``decode`` and ``embed``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters.coreml.compression import ideal_bytes, plan
from exporters.coreml.convert import capture, convert, tensor_spec
from exporters.coreml.functions import Decode, Embed, Prefill, adapter_inputs
from exporters.coreml.half import for_half
from exporters.coreml.multifunction import check, merge
from exporters.coreml.patches import quiet
from exporters.errors import ExportError
from exporters.model.plain_attention import UNSEEN_HALF
from exporters.model.transformer import Transformer
from exporters.signature import ProgramSignature, TensorSpec


@dataclass(frozen=True)
class _LmFunction:
    """A function to be lowered: its module, example inputs by argument name, and signature."""

    module: nn.Module
    inputs: dict[str, Any]
    signature: ProgramSignature


def _functions(
    model: Transformer, prefill_length: int, embed_length: int, unseen: float | None
) -> list[_LmFunction]:
    spec = model.spec
    buffers = dict(model.named_buffers())
    adapter = {name: buffers[path].clone() for name, path in adapter_inputs(model).items()}
    one = torch.ones(1, dtype=torch.int32)

    def tokens(length: int) -> torch.Tensor:
        return torch.zeros(1, length, dtype=torch.int32)

    def function(
        name: str, module: nn.Module, inputs: dict[str, Any], outputs: tuple[TensorSpec, ...]
    ) -> _LmFunction:
        """Its signature comes from the example ``inputs`` and the module's own states."""
        tensors = {k: v for k, v in inputs.items() if k != "adapter"} | inputs.get("adapter", {})
        states = [
            tensor_spec(f"{kind}_{index}", getattr(module, f"{kind}_{index}"))
            for index in range(len(spec.layers))
            for kind in ("k", "v")
            if name != "embed"
        ]
        signature = ProgramSignature(
            name,
            tuple(tensor_spec(n, t) for n, t in tensors.items()),
            outputs,
            tuple(states),
        )
        return _LmFunction(module, inputs, signature)

    logits = (TensorSpec("logits", (1, spec.vocab), "float32"),)
    vector = (
        TensorSpec("pooled", (spec.hidden,), "float32"),
        TensorSpec("entropy", (1,), "float32"),
    )
    return [
        function(
            "prefill",
            Prefill(model, prefill_length, unseen),
            {"tokens": tokens(prefill_length), "start": one - 1, "count": one, "adapter": adapter},
            logits,
        ),
        function(
            "decode",
            Decode(model, unseen),
            {"tokens": tokens(1), "start": one - 1, "adapter": adapter},
            logits,
        ),
        function(
            "embed",
            Embed(model, embed_length, unseen),
            {"tokens": tokens(embed_length), "count": one},
            vector,
        ),
    ]


def _silent(message: str) -> None:
    """The progress of a caller who did not ask for any."""


def lower(
    model: Transformer,
    out: Path,
    *,
    quantize: str,
    prefill_length: int,
    embed_length: int,
    progress: Callable[[str], None] = _silent,
) -> list[ProgramSignature]:
    """Writes ``model`` as the .mlpackage ``out`` (iOS 18) and says what its functions take.

    ``prefill``: tokens int32 [1, L], start [1], count [1] and the adapter -> logits float32
    [1, vocab] of the last of ``count`` tokens. ``decode``: tokens [1, 1], start [1] and the
    adapter -> logits. Both read and write the states ``k_<layer>`` and ``v_<layer>`` float16
    [1, kv heads, context, head channels]; a host makes the state once and gives it to both.
    ``embed``: tokens [1, L], count [1] -> pooled float32 [hidden] and entropy float32 [1], without
    adapter or state. Lengths are in tokens; those past ``count`` are padding and count for nothing.
    The adapter's inputs are named by ``exporters.coreml.functions.adapter_inputs``.

    ``quantize``: "int4" (blocks of 32 inputs; table and head 8 bits a row), "int8" (a row each),
    "fp16", or "none" (float32 weights and arithmetic). All but the last compute in float16, except
    for the pooling, which is float32. ``out`` must not exist. Raises ``ExportError`` for what
    cannot be lowered and for a package that is not what was asked for.
    """
    if out.suffix != ".mlpackage":
        raise ExportError(f"a Core ML package is named *.mlpackage, not {out.name}.")
    if out.exists():
        raise ExportError(f"{out} exists already: remove it or choose another name.")
    half = quantize != "none"
    model = for_half(model)
    grids = plan(model, quantize)
    functions = _functions(model, prefill_length, embed_length, UNSEEN_HALF if half else None)
    signatures = [function.signature for function in functions]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent) as folder, quiet():
        parts = {}
        for function in functions:
            name = function.signature.name
            progress(f"{name}: capture and convert")
            path = Path(folder) / f"{name}.mlpackage"
            program = capture(function.module, function.inputs)
            convert(
                program,
                function.signature,
                {f"body.model.{n}": g for n, g in grids.items()},
                half,
                path,
            )
            parts[name] = path
        progress("merge")
        merge(parts, "decode", out)
    ideal = ideal_bytes(model, grids, 2 if half else 4)
    constants = sum(2 if name in grids else 1 for name, _ in model.named_buffers())
    check(out, signatures, ideal, constants)
    return signatures
