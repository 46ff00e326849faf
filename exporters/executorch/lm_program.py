"""Lowers the inference programs to ``lm.pte``: XNNPACK for the arithmetic, the adapter outside.

The adapter's tensors are constants that the program names but does not hold; the runtime binds
them from a ``.ptd`` file. They enter the delegates as ordinary inputs, so that another file is
another adapter, without a new export.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeProgramManager,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from torch.export import Dim, ExportedProgram

from exporters.errors import ExportError
from exporters.executorch.delegation import Delegation, measure
from exporters.executorch.methods import EmbedProgram, LmProgram
from exporters.executorch.patches import edge_config, quiet
from exporters.executorch.pieces import PieceFactory
from exporters.model.lora_tensors import adapter_tensors
from exporters.model.spec import ModelSpec
from exporters.model.transformer import Transformer
from exporters.signature import ProgramSignature, TensorSpec

MOST_MISSED = 0.05  # share of an lm's FLOPs that neither XNNPACK nor the LLM attention takes
ADAPTER_FILE = "adapter"


@dataclass(frozen=True)
class LoweredLm:
    """What ``lower_lm`` wrote. ``adapter``: the names the program binds, with their shapes."""

    programs: tuple[ProgramSignature, ...]
    delegation: dict[str, Delegation]
    adapter: dict[str, tuple[int, ...]]


def _capture(module: torch.nn.Module, longest: int, cached: bool) -> ExportedProgram:
    tokens = torch.zeros(1, min(8, longest), dtype=torch.int64)
    length = Dim("length", min=1, max=longest)
    start = torch.zeros(1, dtype=torch.int64)
    args, shapes = ((tokens, start), ({1: length}, None)) if cached else ((tokens,), ({1: length},))
    with torch.no_grad():
        return torch.export.export(module, args, dynamic_shapes=shapes, strict=False)


def lower_lm(
    model: Transformer,
    out: Path,
    *,
    prefill_length: int,
    embed_length: int,
    bos_id: int,
    eos_ids: list[int],
    progress: Callable[[str], None] = lambda step: None,
) -> LoweredLm:
    """Writes ``out`` (.pte) with the methods ``forward`` and ``embed``, sharing their weights.

    ``forward``: tokens [1, 1..prefill_length] int64, start_pos [1] int64 -> logits of the last
    token [1, vocab] float32. ``embed``: tokens [1, 1..embed_length] int64 -> pooled [hidden]
    float32, entropy [1] float32. Raises ``ExportError`` where the result is not what it must be:
    too little in the delegate, or adapter names missing.
    """
    context = model.spec.context
    prefill_length, embed_length = min(prefill_length, context), min(embed_length, context)
    adapter = adapter_tensors(model)
    with quiet():
        progress("lower the blocks")
        pieces = PieceFactory(model, prefill_length)
        forward_module = LmProgram(model, pieces)
        embed_pieces = PieceFactory(model, embed_length)
        embed_module = EmbedProgram(model, embed_pieces)
        progress("capture")
        forward = _capture(forward_module.eval(), prefill_length, cached=True)
        embed = _capture(embed_module.eval(), embed_length, cached=False)
        progress("lower the rest")
        constants = _constant_methods(model.spec, prefill_length, bos_id, eos_ids)
        edge = _lower_rest({"forward": forward, "embed": embed}, model.spec, constants)
        delegation = {
            name: measure(edge.exported_program(name), factory.flops)
            for name, factory in (("forward", pieces), ("embed", embed_pieces))
        }
        buffers = edge.exported_program("forward").graph_signature.inputs_to_buffers
        outside = {node for node, name in buffers.items() if name in adapter}
        progress("serialize")
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                external_constants=lambda node: ADAPTER_FILE if node.name in outside else None
            )
        )
    _check(delegation["forward"], set(adapter) - set(buffers.values()))
    with out.open("wb") as file:
        program.write_to_file(file)
    return LoweredLm(
        programs=_signatures(model, prefill_length, embed_length),
        delegation=delegation,
        adapter={name: tuple(t.shape) for name, t in adapter.items()},
    )


def _constant_methods(
    spec: ModelSpec, prefill_length: int, bos_id: int, eos_ids: list[int]
) -> dict[str, object]:
    """What the stock LLM runner asks a program for."""
    return {
        "get_bos_id": bos_id,
        "get_eos_ids": eos_ids,
        "get_vocab_size": spec.vocab,
        "get_max_seq_len": prefill_length,
        "get_max_context_len": spec.context,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": spec.attention_softcap is None,
        "enable_dynamic_shape": True,
    }


def _lower_rest(
    programs: dict[str, ExportedProgram], spec: ModelSpec, constants: dict[str, object]
) -> EdgeProgramManager:
    """Lowers what is left around the delegates, which has products only where attention is
    soft-capped."""
    rest = [XnnpackPartitioner()] if spec.attention_softcap is not None else []
    return to_edge_transform_and_lower(
        programs,
        partitioner=dict.fromkeys(programs, rest),
        compile_config=edge_config(),
        constant_methods=constants,
    )


def _check(forward: Delegation, lost: set[str]) -> None:
    if lost:
        raise ExportError(f"the lowered program lost these adapter tensors: {sorted(lost)}.")
    if forward.missed > MOST_MISSED:
        rest = ", ".join(f"{op} ({flops:.3g} FLOPs)" for op, flops in forward.outside.items())
        raise ExportError(
            f"XNNPACK does not take {forward.missed:.1%} of the FLOPs of lm, at most "
            f"{MOST_MISSED:.0%} are expected; outside are: {rest}."
        )


def _signatures(
    model: Transformer, prefill_length: int, embed_length: int
) -> tuple[ProgramSignature, ...]:
    spec = model.spec
    forward = ProgramSignature(
        "forward",
        inputs=(
            TensorSpec("tokens", (1, f"1..{prefill_length}"), "int64"),
            TensorSpec("start_pos", (1,), "int64"),
        ),
        outputs=(TensorSpec("logits", (1, spec.vocab), "float32"),),
    )
    embed = ProgramSignature(
        "embed",
        inputs=(TensorSpec("tokens", (1, f"1..{embed_length}"), "int64"),),
        outputs=(
            TensorSpec("pooled", (spec.hidden,), "float32"),
            TensorSpec("entropy", (1,), "float32"),
        ),
    )
    return forward, embed
