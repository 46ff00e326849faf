"""Loss and gradient of one sequence, streamed through the layers.

The host walks the layers with one compiled block, handing it each layer's weights where they lie in
the mapped file. Of the forward it keeps each layer's input, and, within a budget, what the backward
would otherwise compute anew. Letters in shapes: T the program's tokens, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.manifest import Training
from runtime_py.engine.base_weights import BaseWeights, decode_rows
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.engine.program_calls import ExecutorchPrograms, Programs
from runtime_py.engine.training_plan import power
from runtime_py.loop.errors import TrainingError

UNSEEN = -1e9  # below every real score, and no softmax sees it


@dataclass(frozen=True)
class StepNumbers:
    """What one AdamW step needs besides the state and its gradient.

    ``per_token`` is 1 / labels of the batch; ``rates`` the learning rates of A's and of B's
    numbers; ``corrections`` 1 / (1 − βᵗ) for both moments.
    """

    per_token: float
    clip: float
    rates: tuple[float, float]
    weight_decay: float
    corrections: tuple[float, float]


def step_numbers(
    step: int,
    tokens: int,
    rates: tuple[float, float],
    weight_decay: float,
    clip: float,
    betas: tuple[float, float],
) -> StepNumbers:
    """For step ``step`` (from 1 on) over ``tokens`` labels; ``rates``: of A and of B; ``clip``: the
    largest global norm."""
    first, second = (1.0 / (1.0 - power(beta, step)) for beta in betas)
    return StepNumbers(1.0 / tokens, clip, rates, weight_decay, (first, second))


class StreamingEngine:
    """Training on a bundle's programs.

    ``keep_mb``: how much of the forward to keep, in MB (10⁶ bytes); 0 computes it anew. Kept are
    whole layers, the later ones, as many as fit.
    """

    def __init__(
        self, programs: Programs, weights: BaseWeights, training: Training, keep_mb: float = 0.0
    ) -> None:
        self._programs, self._weights, self._training = programs, weights, training
        self._keep_bytes = keep_mb * 1e6
        self._bound: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self._at: dict[tuple[int | None, int | None], dict[str, np.ndarray]] = {}
        self._buffers: dict[str, np.ndarray] = {}
        self._head = self._slices()

    # Where the inputs of a call come from

    def _slices(self) -> dict[str, np.ndarray]:
        """The head's inputs that lie in the file: its norm, and its rows slice by slice."""
        inputs = {"base.norm": self._weights["norm"]}
        size = self._training.head_slice
        for tensor in self._programs.signatures["head"].inputs:
            if tensor.name.startswith("base.head."):
                _, _, index, part = tensor.name.split(".")
                start = int(index) * size
                inputs[tensor.name] = self._weights[f"head.{part}"][:, start : start + size]
        return inputs

    def _base(self, name: str, layer: int) -> dict[str, np.ndarray]:
        """The inputs of a block's program that lie in the weights file."""
        if (name, layer) not in self._bound:
            self._bound[name, layer] = {
                tensor.name: self._weights[f"layers.{layer}.{tensor.name.removeprefix('base.')}"]
                for tensor in self._programs.signatures[name].inputs
                if tensor.name.startswith("base.")
            }
        return self._bound[name, layer]

    def _place(self, examples: Sequence[Example], length: int) -> None:
        """Where each token of the call stands, for every kind of layer: mask [1, 1, T, T], cos and
        sin [1, n, T]."""
        positions = np.concatenate(
            [np.arange(e.inputs) for e in examples]
            + [np.zeros(length - sum(e.inputs for e in examples), np.int64)]
        )
        owner = np.repeat(np.arange(len(examples) + 1), [*(e.inputs for e in examples), 0])
        owner = np.concatenate([owner, np.full(length - len(owner), -1)])
        self._at = {}
        for at in dict.fromkeys(self._training.layers):
            cos, sin = self._rotary(positions, at.rope, length)
            mask = causal_mask(owner, at.window)
            self._at[at.rope, at.window] = {"mask": mask, "cos": cos, "sin": sin}

    def _rotary(
        self, positions: np.ndarray, rope: int | None, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Without a rotary embedding, a turn by nothing."""
        if rope is None:
            inputs = self._programs.signatures[f"block_forward_{length}"].inputs
            shape = next([int(n) for n in t.shape] for t in inputs if t.name == "cos")
            return np.ones(shape, np.float32), np.zeros(shape, np.float32)
        cos, sin = (
            self._weights[f"rope.{rope}.{part}"][:, :, positions] for part in ("cos", "sin")
        )
        return np.ascontiguousarray(cos), np.ascontiguousarray(sin)

    def _call(self, name: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        signature = self._programs.signatures[name]
        outputs = self._programs.call(name, [given[tensor.name] for tensor in signature.inputs])
        return {t.name: output for t, output in zip(signature.outputs, outputs, strict=True)}

    def _block(
        self,
        kind: str,
        length: int,
        layer: int,
        state: AdapterState,
        given: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        name = f"{kind}_{length}"
        at = self._training.layers[layer]
        known = {**self._base(name, layer), **self._at[at.rope, at.window]}
        return self._call(name, {**known, **state.of_layer(layer), **given})

    def _buffer(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """Memory that is taken once and used in every step."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tuple(shape):
            self._buffers[name] = buffer = np.zeros(shape, np.float32)
        return buffer

    # One call: a sequence, or several that fit one program together

    @property
    def capacity(self) -> int:
        """Input tokens of the longest program."""
        return max(self._training.lengths)

    def length_of(self, examples: Sequence[Example]) -> int:
        """The shortest program that holds ``examples``, in tokens."""
        needed = sum(e.inputs for e in examples)
        fitting = [length for length in self._training.lengths if length >= needed]
        if not fitting:
            raise TrainingError(
                f"a sequence of {needed} tokens does not fit the longest training program "
                f"({self.capacity}): cut it, or export with a longer --train-lengths."
            )
        return min(fitting)

    def _forward(
        self, state: AdapterState, examples: Sequence[Example], keep: bool
    ) -> tuple[np.ndarray, int, dict[int, dict[str, np.ndarray]]]:
        """-> output of the last block [1, F, T], T, and what was kept of which layer; the layers'
        inputs stay in the buffers ``x.<layer>``."""
        length = self.length_of(examples)
        self._place(examples, length)
        layers = len(self._training.layers)
        features = self._weights["norm"].shape[1]
        x = self._buffer("x.0", (1, features, length))
        x[...] = 0.0
        tokens = np.concatenate([e.tokens[: e.inputs] for e in examples])
        rows = decode_rows(self._weights, self._training.table, tokens)
        x[0, :, : len(tokens)] = rows.T * np.float32(self._training.embed_scale)
        kept: dict[int, dict[str, np.ndarray]] = {}
        room = self.kept_layers(length) if keep else 0
        for layer in range(layers):
            outputs = self._block("block_forward", length, layer, state, {"x": x})
            saved = {name: y for name, y in outputs.items() if name.startswith("saved.")}
            if keep and layer == layers - 1:
                kept[layer] = saved  # no other forward overwrites them before its backward
            elif layer >= layers - 1 - room:
                kept[layer] = {n: self._buffer(f"{n}.{layer}", y.shape) for n, y in saved.items()}
                for name, value in saved.items():
                    kept[layer][name][...] = value
            x = self._buffer(f"x.{layer + 1}" if keep else f"x.{(layer + 1) % 2}", x.shape)
            x[...] = outputs["y"]
        return x, length, kept

    def kept_layers(self, length: int) -> int:
        """How many layers' saved tensors fit the budget. The last layer's need none of it."""
        outputs = self._programs.signatures[f"block_forward_{length}"].outputs
        size = sum(
            4 * int(np.prod([int(n) for n in tensor.shape]))
            for tensor in outputs
            if tensor.name.startswith("saved.")
        )
        return int(min(self._keep_bytes / size, len(self._training.layers) - 1))

    def _loss(
        self, x: np.ndarray, examples: Sequence[Example], grad: np.ndarray | None
    ) -> tuple[float, int]:
        """Summed loss and labels; the gradient of x [1, F, T] goes to ``grad``."""
        labels = np.concatenate([e.labels[1 : e.inputs + 1] for e in examples])
        positions = np.flatnonzero(labels != IGNORED)
        size, features = self._training.positions, x.shape[1]
        total, count = 0.0, 0
        for start in range(0, len(positions), size):
            chunk = positions[start : start + size]
            columns = self._buffer("head.x", (1, features, size))
            targets = self._buffer("head.targets", (1, size, features))
            real = self._buffer("head.real", (1, size, 1))
            for array in (columns, targets, real):
                array[...] = 0.0
            columns[0, :, : len(chunk)] = x[0][:, chunk]
            targets[0, : len(chunk)] = decode_rows(self._weights, "head", labels[chunk])
            real[0, : len(chunk)] = 1.0
            given = {"x": columns, "targets": targets, "real": real, **self._head}
            outputs = self._call("head", given)
            total += float(outputs["loss"][0])
            count += int(outputs["count"][0])
            if grad is not None:
                grad[0][:, chunk] = outputs["gradient.x"][0][:, : len(chunk)]
        return total, count

    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        """Summed cross-entropy over the labels, in nats, and how many there are."""
        x, _, _ = self._forward(state, examples, keep=False)
        return self._loss(x, examples, None)

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        """``loss``, and its gradient added to ``into`` (flat, [rows, 1024])."""
        x, length, kept = self._forward(state, examples, keep=True)
        grad = self._buffer("gradient", x.shape)
        grad[...] = 0.0
        total, count = self._loss(x, examples, grad)
        views = state.layout.views(into)
        for layer in reversed(range(len(self._training.layers))):
            given = {"x": self._buffers[f"x.{layer}"], "gradient.y": grad}
            kind = "block_backward_saved" if layer in kept else "block_backward"
            outputs = self._block(kind, length, layer, state, {**given, **kept.get(layer, {})})
            for name, value in outputs.items():
                if name == "gradient.x":
                    grad[...] = value
                else:
                    views[f"layers.{layer}.{name.removeprefix('gradient.')}"] += value
        return total, count

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        """One AdamW step on ``state`` -> the gradient's norm before clipping. Where that is no
        number, the state stays as it is."""
        first, second = numbers.corrections
        scalars = {
            "per_token": numbers.per_token,
            "most": numbers.clip,
            "weight_decay": numbers.weight_decay,
            "mean_correction": first,
            "square_correction": second,
        }
        given = {name: np.full((1, 1), value, np.float32) for name, value in scalars.items()}
        given |= {"parameters": state.parameters, "gradient": gradient}
        rate = self._buffer("rate", state.parameters.shape)
        state.layout.fill_rates(rate, *numbers.rates)
        given |= {"mean": state.mean, "square": state.square, "rate": rate}
        outputs = self._call("adamw", given)
        norm = float(outputs["norm"][0, 0])
        if math.isfinite(norm):
            state.replace(outputs["parameters"], outputs["mean"], outputs["square"])
        return norm


def causal_mask(owner: np.ndarray, window: int | None) -> np.ndarray:
    """0 where a query sees a key (of the same ``owner`` [T], not later, within the window), else
    ``UNSEEN``: float32 [1, 1, T, T]."""
    steps = np.arange(len(owner))
    distance = steps[:, None] - steps[None, :]
    seen = (distance >= 0) & (owner[:, None] == owner[None, :])
    if window is not None:
        seen &= distance < window
    return np.where(seen, np.float32(0.0), np.float32(UNSEEN))[None, None]


def open_training(
    bundle: Bundle, *, keep_mb: float = 0.0, threads: int | None = None
) -> StreamingEngine:
    """A bundle's Android training programs on its weights file. Raises ``BundleError``."""
    runner = ExecutorchPrograms(bundle.path, bundle.android.training_programs, threads)
    return StreamingEngine(runner, BaseWeights(bundle.training_weights), bundle.training, keep_mb)
