"""The training programs with the names, shapes and order of what they take and return.

A name says where the host finds a tensor: ``base.…`` in the weights file under the call's layer,
``adapter.…`` in the adapter, ``saved.…`` and ``gradient.…`` among another program's results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exporters.errors import ExportError
from exporters.model.lora_targets import LoraTarget, lora_targets
from exporters.model.spec import ModelSpec
from exporters.signature import ProgramSignature, TensorSpec
from exporters.training.adamw import COLUMNS, AdamW
from exporters.training.block import MATRICES, Places, Softmax, TrainingBlock
from exporters.training.head import TrainingHead
from exporters.training.storage import PRECISIONS

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # PyTorch's defaults


@dataclass(frozen=True)
class TrainingSpec:
    """What the programs of one model are made for.

    ``blocks``, ``head``: precisions of the base weights; ``lora``: adapted modules as PEFT names
    them; ``biased``: sites whose matrices have biases; ``positions``: those of one head call.
    """

    model: ModelSpec
    blocks: str
    head: str
    lora: tuple[str, ...]
    rank: int
    biased: tuple[str, ...]
    positions: int

    @property
    def targets(self) -> list[LoraTarget]:
        return lora_targets(self.model, self.lora)

    @property
    def pairs(self) -> int:
        """Rotated pairs of channels; where a layer has no rotary embedding, its tables are 1, 0."""
        pairs = {len(layer.rope.inv_freq) for layer in self.model.layers if layer.rope}
        if len(pairs) > 1:
            raise ExportError(
                f"{self.model.architecture} rotates {sorted(pairs)} pairs of channels in different "
                f"layers; training programs know one number only."
            )
        return pairs.pop() if pairs else self.model.head_dim // 2

    def block(self) -> TrainingBlock:
        adapted = [target.module for target in self.targets]
        return TrainingBlock(self.model, self.blocks, adapted, self.biased)


@dataclass(frozen=True, eq=False)
class TrainingProgram:
    """A function to be captured, and what it takes."""

    signature: ProgramSignature
    module: nn.Module

    def example(self) -> tuple[Tensor, ...]:
        """Zeros of the inputs' shapes and dtypes."""
        return tuple(
            torch.zeros([int(size) for size in spec.shape], dtype=getattr(torch, spec.dtype))
            for spec in self.signature.inputs
        )


class _Named(nn.Module):
    """A function of named tensors, called with a flat list of them."""

    def __init__(
        self, names: Sequence[str], function: Callable[[dict[str, Tensor]], list[Tensor]]
    ) -> None:
        super().__init__()
        self.names, self.function = names, function

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return self.function(dict(zip(self.names, tensors, strict=True)))


def _float(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, shape, "float32")


def _make(
    name: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    function: Callable[[dict[str, Tensor]], list[Tensor]],
) -> TrainingProgram:
    signature = ProgramSignature(name, tuple(inputs), tuple(outputs))
    return TrainingProgram(signature, _Named([spec.name for spec in inputs], function).eval())


def base_inputs(spec: TrainingSpec) -> list[TensorSpec]:
    """A block's tensors of the weights file."""
    m = spec.model
    norms = {"attention": m.hidden, "mlp": m.hidden}
    norms |= {"attention_post": m.hidden, "mlp_post": m.hidden} if m.post_norm else {}
    norms |= {"q": m.head_dim, "k": m.head_dim} if m.qk_norm else {}
    inputs = [_float(f"base.norm.{name}", 1, size, 1) for name, size in norms.items()]
    rows = {"q": m.q_dim, "k": m.kv_dim, "v": m.kv_dim, "o": m.hidden, "down": m.hidden}
    rows |= {"gate": m.intermediate, "up": m.intermediate}
    columns = {"o": m.q_dim, "down": m.intermediate}
    for site, names in MATRICES.items():
        for name in names:
            inner = columns.get(site, m.hidden)
            parts = PRECISIONS[spec.blocks].parts(rows[name], inner)
            inputs += [TensorSpec(f"base.{name}.{q.name}", q.shape, q.dtype) for q in parts]
            if site in spec.biased:
                inputs.append(_float(f"base.{name}.bias", 1, rows[name], 1))
    return inputs


def adapter_inputs(spec: TrainingSpec) -> list[TensorSpec]:
    """A block's tensors of the adapter: A, the Bs and the scale of each target."""
    inputs = []
    for target in spec.targets:
        name = f"adapter.{target.module}"
        inputs.append(_float(f"{name}.lora_A", 1, spec.rank, target.inputs))
        for index, rows in enumerate(target.rows):
            part = f"lora_B_{index}" if len(target.rows) > 1 else "lora_B"
            inputs.append(_float(f"{name}.{part}", 1, rows, spec.rank))
        inputs.append(_float(f"{name}.scale", 1, 1, 1))
    return inputs


def _renamed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as ``TrainingBlock`` knows them."""
    return {
        key.split(".", 1)[1] if key.startswith(("base.", "adapter.")) else key: value
        for key, value in values.items()
    }


def block_programs(spec: TrainingSpec, length: int) -> list[TrainingProgram]:
    """``block_forward``, ``block_backward`` (recomputes the forward) and ``block_backward_saved``
    (is given what the forward saved), for sequences of ``length`` tokens."""
    block, m = spec.block(), spec.model
    x = _float("x", 1, m.hidden, length)
    places = [
        _float("mask", 1, 1, length, length),
        _float("cos", 1, spec.pairs, length),
        _float("sin", 1, spec.pairs, length),
    ]
    weights = [*base_inputs(spec), *adapter_inputs(spec)]
    saved = [_float(f"saved.{name}", 1, size, length) for name, size in block.saved.items()]
    grad = _float("gradient.y", 1, m.hidden, length)
    trained = [w for w in weights if w.name.startswith("adapter.") and ".lora_" in w.name]
    gradients = [
        TensorSpec(w.name.replace("adapter.", "gradient."), w.shape, w.dtype) for w in trained
    ]

    def at(values: dict[str, Tensor]) -> Places:
        return Places(values["mask"], values["cos"], values["sin"])

    def forward(values: dict[str, Tensor]) -> list[Tensor]:
        y, kept = block.forward(_renamed(values), values["x"], at(values))
        return [y, *(kept[name] for name in block.saved)]

    def backward(
        values: dict[str, Tensor], kept: dict[str, Tensor], softmax: Softmax | None
    ) -> list[Tensor]:
        t, grad = _renamed(values), values["gradient.y"]
        dx, gradients = block.backward(t, values["x"], at(values), kept, grad, softmax)
        return [dx, *(gradients[w.name.removeprefix("adapter.")] for w in trained)]

    def recomputing(values: dict[str, Tensor]) -> list[Tensor]:
        return backward(values, *block.recompute(_renamed(values), values["x"], at(values)))

    def given(values: dict[str, Tensor]) -> list[Tensor]:
        return backward(values, {name: values[f"saved.{name}"] for name in block.saved}, None)

    outputs = [_float("gradient.x", 1, m.hidden, length), *gradients]
    return [
        _make(
            f"block_forward_{length}",
            [x, *places, *weights],
            [_float("y", 1, m.hidden, length), *saved],
            forward,
        ),
        _make(f"block_backward_{length}", [x, grad, *places, *weights], outputs, recomputing),
        _make(
            f"block_backward_saved_{length}", [x, grad, *places, *saved, *weights], outputs, given
        ),
    ]


def head_program(spec: TrainingSpec) -> TrainingProgram:
    """``head``; its slices of the weights file are inputs ``base.head.<slice>.<part>``."""
    m = spec.model
    precision = PRECISIONS[spec.head]
    head = TrainingHead(m, precision)
    names = [[q.name for q in precision.parts(rows, m.hidden)] for rows in head.rows]
    inputs = [
        _float("x", 1, m.hidden, spec.positions),
        _float("targets", 1, spec.positions, m.hidden),
        _float("real", 1, spec.positions, 1),
        _float("base.norm", 1, m.hidden, 1),
    ]
    for index, rows in enumerate(head.rows):
        inputs += [
            TensorSpec(f"base.head.{index}.{q.name}", q.shape, q.dtype)
            for q in precision.parts(rows, m.hidden)
        ]

    def run(values: dict[str, Tensor]) -> list[Tensor]:
        slices = [
            {part: values[f"base.head.{index}.{part}"] for part in parts}
            for index, parts in enumerate(names)
        ]
        return list(
            head(values["x"], values["base.norm"], slices, values["targets"], values["real"])
        )

    outputs = [
        _float("loss", 1),
        _float("count", 1),
        _float("gradient.x", 1, m.hidden, spec.positions),
    ]
    return _make("head", inputs, outputs, run)


def flat_rows(spec: TrainingSpec) -> int:
    """Rows of 1024 numbers that hold all of an adapter's trained tensors."""
    layer = sum(spec.rank * (target.inputs + sum(target.rows)) for target in spec.targets)
    return -(-layer * len(spec.model.layers) // COLUMNS)


def adamw_program(spec: TrainingSpec) -> TrainingProgram:
    """``adamw`` over the whole adapter, see ``AdamW``."""
    rows = flat_rows(spec)
    matrices = ("parameters", "gradient", "mean", "square", "rate")
    numbers = ("per_token", "most", "weight_decay", "mean_correction", "square_correction")
    inputs = [_float(name, rows, COLUMNS) for name in matrices]
    inputs += [_float(name, 1, 1) for name in numbers]
    outputs = [_float(name, rows, COLUMNS) for name in ("parameters", "mean", "square")]
    step = AdamW(BETA1, BETA2, EPS)
    return _make(
        "adamw",
        inputs,
        [*outputs, _float("norm", 1, 1)],
        lambda values: list(step(*values.values())),
    )


def training_programs(spec: TrainingSpec, lengths: Sequence[int]) -> list[TrainingProgram]:
    """All programs of a bundle: three for each of ``lengths`` (tokens), ``head`` and ``adamw``."""
    blocks = [program for length in lengths for program in block_programs(spec, length)]
    return [*blocks, head_program(spec), adamw_program(spec)]
