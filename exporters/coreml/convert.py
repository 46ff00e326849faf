"""One PyTorch function into one Core ML model with compressed weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.coreml.compression import Grid
from exporters.coreml.functions import Pool
from exporters.coreml.patches import DECOMPOSITIONS
from exporters.signature import ProgramSignature, TensorSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_COMPRESS = "compression::linear_quantize_weights"
_WIDE = 1  # debug handle of what stays in float32


def capture(function: nn.Module, inputs: Mapping[str, Any]) -> ExportedProgram:
    """The function as operators that coremltools translates; ``inputs`` by argument name.

    By torch.export and not by tracing: mutated buffers become states by themselves, every mask and
    index keeps its dtype, and it is the capture that ExecuTorch's programs are made of as well.
    """
    with torch.no_grad():
        program = torch.export.export(function, (), dict(inputs), strict=False)
    program = program.run_decompositions(dict(DECOMPOSITIONS))
    for node in program.graph.nodes:
        owners = [kind for _, kind in node.meta.get("nn_module_stack", {}).values()]
        node.meta["debug_handle"] = _WIDE if any(_named(k, Pool) for k in owners) else 0
    return program


def _named(kind: Any, module: type[nn.Module]) -> bool:
    """Whether an entry of ``nn_module_stack`` (a class or its qualified name) is this class."""
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return name == f"{module.__module__}.{module.__qualname__}"


def convert(
    program: ExportedProgram,
    signature: ProgramSignature,
    grids: Mapping[str, Grid],
    half: bool,
    path: Path,
) -> None:
    """Writes the program as a one-function package at ``path``.

    ``half`` computes in float16, but for ``Pool``; ``grids`` says how the constants that stand for
    which buffers of the program are rounded. Names come from the signature.
    """
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil import Operation
    from coremltools.converters.mil.mil.scope import ScopeSource

    def narrow(op: Operation) -> bool:
        return _WIDE not in op.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE, [])

    pipeline = ct.PassPipeline.DEFAULT
    if grids:
        configs = {}
        for buffer, grid in grids.items():
            name = "b_" + buffer.replace(".", "_") + ("_to_fp16" if half else "")
            configs[name] = cto.OpLinearQuantizerConfig(
                mode="linear_symmetric",
                dtype=f"int{grid.bits}",
                granularity="per_block" if grid.block else "per_channel",
                block_size=(1, grid.block) if grid.block else 32,
                weight_threshold=0,
            )
        pipeline.append_pass(_COMPRESS)
        pipeline.set_options(_COMPRESS, {"config": cto.OptimizationConfig(op_name_configs=configs)})
    precision = ct.transform.FP16ComputePrecision(narrow) if half else ct.precision.FLOAT32
    model = ct.convert(
        program,
        inputs=[_tensor_type(spec) for spec in signature.inputs],
        outputs=[_tensor_type(spec, shaped=False) for spec in signature.outputs],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=precision,
        pass_pipeline=pipeline,
        skip_model_load=True,
        package_dir=str(path),
    )
    del model


def _tensor_type(spec: TensorSpec, shaped: bool = True) -> Any:
    import coremltools as ct

    dtype = np.dtype(spec.dtype).type
    if shaped:
        return ct.TensorType(name=spec.name, shape=spec.shape, dtype=dtype)
    return ct.TensorType(name=spec.name, dtype=dtype)


def tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    """The description of a tensor of static shape."""
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
