"""What a package computes, found by coremltools' own constant folding: each operation is rebuilt
on constant inputs and its folded value read. Slow and for tiny models, but independent of us."""

from __future__ import annotations

from pathlib import Path

import coremltools as ct
import numpy as np
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.converters.mil.mil import Builder, Function, Operation, Var


class Package:
    """A multifunction package and one state shared by its functions."""

    def __init__(self, path: Path) -> None:
        spec = ct.utils.load_spec(str(path))
        weights = path / "Data/com.apple.CoreML/weights"
        self.program = load(spec, spec.specificationVersion, str(weights))
        self.state: dict[str, np.ndarray] = {}
        for function in spec.description.functions:
            for feature in function.state:
                shape = tuple(feature.type.stateType.arrayType.shape)
                self.state[feature.name] = np.zeros(shape, np.float16)

    def run(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        function = self.program.functions[name]
        values = {function.inputs[key]: value for key, value in inputs.items()}
        for op in function.operations:
            self._run(op, values)
        return {var.name: np.asarray(values[var]) for var in function.outputs}

    def _run(self, op: Operation, values: dict[Var, np.ndarray]) -> None:
        if op.op_type == "const":
            values[op.outputs[0]] = op.outputs[0].val
            return
        if op.op_type.startswith("constexpr"):
            values[op.outputs[0]] = op.materialized_val_inference()
            return
        if op.op_type == "read_state":
            values[op.outputs[0]] = self.state[op.input.name]
            return
        if op.op_type in ("write_state", "coreml_update_state"):
            state = op.inputs.get("state", op.inputs.get("input"))
            self.state[state.name] = values[op.inputs.get("value", op.inputs.get("data"))]
            if op.outputs:
                values[op.outputs[0]] = self.state[state.name]
            return

        def value(var: Var) -> np.ndarray | bool:
            # NumPy 2.4 refuses its own bool where coremltools 9.0 passes keepdims.
            known = values[var]
            return bool(known) if isinstance(known, np.bool) else known

        given = {
            key: tuple(value(v) for v in var) if isinstance(var, list | tuple) else value(var)
            for key, var in op.inputs.items()
        }
        if op.op_type == "silu":  # the one operation that does not fold
            x = given["x"].astype(np.float64)
            values[op.outputs[0]] = (x / (1 + np.exp(-x))).astype(given["x"].dtype)
            return
        with Function({}, opset_version=ct.target.iOS18):
            result = getattr(Builder, op.op_type)(**given)
        results = result if isinstance(result, list | tuple) else [result]
        for var, folded in zip(op.outputs, results, strict=True):
            assert folded.val is not None, f"{op.op_type} {op.name} did not fold"
            values[var] = folded.val
