"""Lowers the training programs: each is one XNNPACK delegate on the host's own memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from executorch.exir import ExecutorchBackendConfig, to_edge
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.constant_prop_pass import constant_prop_pass
from torch import Tensor, nn
from torch.export import ExportedProgram

from exporters.executorch.patches import edge_config, quiet
from exporters.executorch.pieces import lower_whole
from exporters.training.programs import TrainingProgram


@dataclass(frozen=True)
class LoweredTraining:
    """FLOPs of the products in each program, by name; all of them are in its one delegate."""

    flops: dict[str, float]


class _Delegate(nn.Module):
    """A method that is nothing but its delegate."""

    def __init__(self, lowered: LoweredBackendModule) -> None:
        super().__init__()
        self.lowered = lowered

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return list(self.lowered(*tensors))


def capture(program: TrainingProgram) -> ExportedProgram:
    """The program's operators, its constant rows as data, which is how a delegate takes them."""
    with torch.no_grad():
        return constant_prop_pass(
            torch.export.export(program.module, program.example(), strict=False)
        )


def lower_training(programs: Sequence[TrainingProgram], out: Path) -> LoweredTraining:
    """Writes ``out`` (.pte) with one method a program.

    Inputs and outputs are not planned: a call reads and writes where the host says, a mapped
    weights file included. Raises ``ExportError`` where XNNPACK does not take an operator.
    """
    flops: dict[str, float] = {}
    methods: dict[str, ExportedProgram] = {}
    with quiet(), torch.no_grad():
        for program in programs:
            name = program.signature.name
            lowered, flops[name] = lower_whole(program.module, capture(program))
            methods[name] = torch.export.export(_Delegate(lowered), program.example(), strict=False)
        edge = to_edge(methods, compile_config=edge_config())
        planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
        whole = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    with out.open("wb") as file:
        whole.write_to_file(file)
    return LoweredTraining(flops)
