"""Core ML's own predictions against a bundle's golden vectors: what only a Mac can run.

The workflow runs it on macOS. Elsewhere it is skipped: there the packages are interpreted operator
by operator (``toolchain.verify.mil``), and Core ML itself has not been seen to run them.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from runtime_py.bundle.adapter_forms import to_runtime
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.peft_adapter import read_peft
from runtime_py.engine.examples import Example
from runtime_py.engine.self_test import effect, read_golden, self_test
from toolchain.compile.bundle_export import export
from toolchain.defaults import BUILTIN

pytestmark = pytest.mark.skipif(
    platform.system() != "Darwin", reason="Core ML predicts on macOS only"
)


class CoreMlSelfTest:
    """The engine of a self-test: the package's functions in Core ML, on the processor."""

    def __init__(self, bundle: Bundle) -> None:
        import coremltools as ct

        prefill = bundle.ios.program("prefill")
        self._chunk = int(prefill.inputs[0].shape[1])
        self._longest = int(bundle.ios.program("embed").inputs[0].shape[1])
        self._functions = {
            name: ct.models.MLModel(
                str(bundle.path / prefill.file),
                function_name=name,
                compute_units=ct.ComputeUnit.CPU_ONLY,
            )
            for name in ("prefill", "decode", "embed")
        }
        tensors = bundle.manifest.adapter.tensors
        values = to_runtime(read_peft(bundle.peft), tensors)
        initial = {tensor.name: values[tensor.name] for tensor in tensors}
        self._adapters = {"initial": initial, "effect": effect(initial)}

    def _call(self, name: str, inputs: Mapping[str, np.ndarray], state: object) -> np.ndarray:
        outputs = self._functions[name].predict(dict(inputs), state=state)
        return np.asarray(outputs["logits"], np.float32).reshape(1, -1)

    def logits(self, tokens: np.ndarray, prompt: int, adapter: str) -> np.ndarray:
        """As ``runtime_py.engine.self_test`` asks: [1 + n - prompt, vocab]. One state serves
        prefill and decode."""
        adapter_inputs = {
            name.replace(".", "_"): value for name, value in self._adapters[adapter].items()
        }
        state = self._functions["prefill"].make_state()
        rows: list[np.ndarray] = []
        for start in range(0, prompt, self._chunk):
            part = tokens[start : min(start + self._chunk, prompt)]
            inputs = {
                "tokens": _padded(part, self._chunk),
                "start": np.array([start], np.int32),
                "count": np.array([len(part)], np.int32),
            }
            rows = [self._call("prefill", inputs | adapter_inputs, state)]
        for place in range(prompt, len(tokens)):
            inputs = {
                "tokens": _padded(tokens[place : place + 1], 1),
                "start": np.array([place], np.int32),
            }
            rows.append(self._call("decode", inputs | adapter_inputs, state))
        return np.concatenate(rows)

    def embed(self, tokens: np.ndarray) -> tuple[np.ndarray, float]:
        inputs = {
            "tokens": _padded(tokens, self._longest),
            "count": np.array([len(tokens)], np.int32),
        }
        outputs = self._functions["embed"].predict(inputs)
        pooled = np.asarray(outputs["pooled"], np.float32).reshape(-1)
        return pooled, float(np.asarray(outputs["entropy"]).reshape(-1)[0])

    def gradient(self, example: Example) -> tuple[float, np.ndarray] | None:
        """Not asked here: the training package takes a layer's weights as inputs."""
        return None


def _padded(tokens: np.ndarray, length: int) -> np.ndarray:
    """int32 [1, length], zeros after the tokens."""
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded


@pytest.mark.parametrize("precision", ["none", "fp16", "int8", "int4"])
def test_core_ml_gives_the_golden_vectors(precision: str, tmp_path: Path) -> None:
    export(BUILTIN, tmp_path / "tiny", targets=("ios",), quantize={"ios": precision})
    bundle = open_bundle(tmp_path / "tiny")
    golden = read_golden(bundle.path)
    assert golden is not None
    checks = self_test(golden, CoreMlSelfTest(bundle), "ios")
    assert checks
    assert [check for check in checks if not check.passed] == []
