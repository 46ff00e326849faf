"""What a model computes on the way to its logits, by place, so that the first difference shows.

A place is ``layers.<i>.<operator>``; ``OPERATORS`` says what stands at each. Places come in the
order of computation, and a difference counts where it first exceeds its tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from exporters.model.spec import ModelSpec
from exporters.model.transformer import (
    Attend,
    Projection,
    Transformer,
    plain_attention,
    site_targets,
)
from exporters.training.block import MATRICES
from toolchain.verify.evaluation import PERTURBATION
from toolchain.verify.parity.native_child import Instruction
from toolchain.verify.parity.verdict import Found

OPERATORS = {
    "embedding": "token embedding",
    "rotary tables": "rotary embedding (base, scaling or positions)",
    "qkv.in": "norm before attention",
    "q": "q projection (matrix, bias or LoRA)",
    "k": "k projection (matrix, bias or LoRA)",
    "v": "v projection (matrix, bias or LoRA)",
    "q.placed": "q with its rotation (norm before it, matrix, LoRA or rotary embedding)",
    "k.placed": "k with its rotation (norm before it, matrix, LoRA or rotary embedding)",
    "v.placed": "v (norm before it, matrix or LoRA)",
    "o.in": "attention (rotation, scores, mask or softmax)",
    "o": "o projection",
    "gate_up.in": "residual after attention, or norm before the MLP",
    "gate": "gate projection",
    "up": "up projection",
    "down.in": "activation of the MLP",
    "down": "down projection",
    "y": "end of the block (o projection, MLP or residual)",
    "logits": "final norm or head",
}
_ABOVE = 4.0  # a fault stands out from roundings that turned the other way by this factor
Values = dict[str, np.ndarray]


def operator_of(place: str) -> tuple[int | None, str]:
    if not place.startswith("layers."):
        return None, OPERATORS[place]
    _, layer, operator = place.split(".", 2)
    return int(layer), OPERATORS[operator]


def differences(found: Values, expected: Values) -> list[tuple[str, float]]:
    """Of the places that both have, in the order of ``expected``: the largest difference as a part
    of the largest value."""
    result = []
    for place, want in expected.items():
        if (own := found.get(place)) is None:
            continue
        if own.size != want.size:
            result.append((place, float("inf")))
            continue
        gap = np.abs(own.reshape(want.shape).astype(np.float64) - want).max()
        size = max(float(np.abs(want).max()), 1e-30)
        result.append((place, float(gap) / size if np.isfinite(gap) else float("inf")))
    return result


def first_difference(
    layers: Sequence[tuple[str, float]],
    tolerance: float,
    floor: Mapping[str, float] | None = None,
) -> Found | None:
    """The first place beyond ``tolerance``, or beyond ``_ABOVE`` times the ``floor`` up to its
    place where that is more."""
    noise = 0.0
    for place, gap in layers:
        noise = max(noise, (floor or {}).get(place, 0.0))
        allowed = max(tolerance, _ABOVE * noise)
        if not gap <= allowed:
            layer, operator = operator_of(place)
            where = "outside of the layers" if layer is None else f"layer {layer}"
            return Found(
                layer,
                operator,
                f"{where}: the first difference is in the {operator}, {gap:.2g} of its range "
                f"(at most {allowed:.2g} is expected).",
            )
    return None


@torch.no_grad()
def noise_floor(model: Transformer, tokens: np.ndarray) -> dict[str, float]:
    """How far each place moves where the token embeddings change in float32's last bit."""
    random = torch.Generator().manual_seed(0)

    def shaken(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=random, dtype=torch.float64)
        return (output.double() * (1.0 + PERTURBATION * noise)).float()

    expected = of_transformer(model, tokens)
    handle = model.table.register_forward_hook(shaken)
    try:
        return dict(differences(of_transformer(model, tokens), expected))
    finally:
        handle.remove()


@torch.no_grad()
def of_transformer(model: Transformer, tokens: np.ndarray) -> Values:
    """Of one call over ``tokens`` [n], all places."""
    values: Values = {}
    spec = model.spec
    ids = torch.from_numpy(tokens)[None]
    values["embedding"] = model.lookup(ids).numpy()
    if len(model.ropes) == 1:
        tables = (getattr(model, f"{kind}_0")[: len(tokens), 0] for kind in ("cos", "sin"))
        values["rotary tables"] = np.stack([t.numpy() for t in tables])
    handles = []

    def attend(layer: int) -> Attend:
        own = plain_attention(spec, spec.layers[layer])

        def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for name, tensor in (("q", q), ("k", k), ("v", v)):
                values[f"layers.{layer}.{name}.placed"] = tensor.numpy().copy()
            return own(q, k, v)

        return watched

    def site_hook(layer: int, site: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, outputs: list[Tensor]) -> None:
            values[f"layers.{layer}.{site}.in"] = inputs[0].numpy().copy()
            for name, output in zip(MATRICES[site], outputs, strict=True):
                values[f"layers.{layer}.{name}"] = output.numpy().copy()

        return hook

    def block_hook(layer: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            values[f"layers.{layer}.y"] = output.numpy().copy()

        return hook

    for index, block in enumerate(model.blocks):
        for site in MATRICES:
            part = getattr(block, site)
            assert isinstance(part, Projection)
            handles.append(part.register_forward_hook(site_hook(index, site)))
        handles.append(block.register_forward_hook(block_hook(index)))
    try:
        attends = [attend(i) for i in range(len(spec.layers))]
        hidden = model.hidden(ids, torch.arange(ids.shape[1]), attends)
        values["logits"] = model.logits(hidden)[0].numpy()
    finally:
        for handle in handles:
            handle.remove()
    return values


@torch.no_grad()
def of_hugging_face(model: PeftModel, spec: ModelSpec, tokens: np.ndarray) -> Values:
    """The same places of the reference, as far as its modules show them."""
    values: Values = {}
    handles = []
    modules = dict(model.named_modules())
    prefix = "base_model.model.model"

    def tensor_of(output: object) -> Tensor:
        found = output[0] if isinstance(output, tuple) else output
        assert isinstance(found, Tensor)
        return found

    def target_hook(layer: int, site: str, names: Sequence[str], rows: Sequence[int]) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            values.setdefault(f"layers.{layer}.{site}.in", inputs[0].numpy().copy())
            parts = tensor_of(output).split(list(rows), dim=-1)
            for name, part in zip(names, parts, strict=True):
                values[f"layers.{layer}.{name}"] = part.numpy().copy()

        return hook

    def whole_hook(place: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            values[place] = tensor_of(output).numpy().copy()

        return hook

    for index in range(len(spec.layers)):
        for site, targets in site_targets(spec).items():
            names = list(MATRICES[site])
            for target in targets:
                own = [names.pop(0) for _ in target.rows]
                module = modules[f"{prefix}.layers.{index}.{target.module}"]
                handles.append(
                    module.register_forward_hook(target_hook(index, site, own, target.rows))
                )
        handles.append(
            modules[f"{prefix}.layers.{index}"].register_forward_hook(
                whole_hook(f"layers.{index}.y")
            )
        )
    ropes = {layer.rope for layer in spec.layers if layer.rope}
    if len(ropes) == 1 and f"{prefix}.rotary_emb" in modules:
        pairs = len(next(iter(ropes)).inv_freq)

        def rotary_hook(module: nn.Module, inputs: tuple, output: tuple) -> None:
            values["rotary tables"] = np.stack([part[0, :, :pairs].numpy() for part in output])

        handles.append(modules[f"{prefix}.rotary_emb"].register_forward_hook(rotary_hook))
    try:
        ids = torch.from_numpy(tokens)[None]
        values["logits"] = model(input_ids=ids, use_cache=False).logits[0].numpy()
    finally:
        for handle in handles:
            handle.remove()
    return values


def of_executorch(steps: Sequence[Instruction], spec: ModelSpec, expected: Mapping) -> Values:
    """The places of a watched ``forward``: what the pieces between two attentions give, and what
    attention gives. ``expected``: the transformer's, for the shapes."""
    values: Values = {}
    sizes = [
        [expected[f"layers.{index}.{name}.placed"].size for name in "qkv"]
        for index in range(len(spec.layers))
    ]
    layer = 0  # the next one whose queries, keys and values come
    for step in steps:
        last = step.tensors[-1]
        if "embedding" in step.operator and "embedding" not in values:
            values["embedding"] = last * np.float32(spec.embed_scale)
        elif "custom_sdpa" in step.operator:
            values[f"layers.{layer - 1}.o.in"] = last
        elif step.operator != "DELEGATE_CALL":
            continue
        elif layer == len(spec.layers):
            # The products of a plain attention are delegates too, of other sizes.
            if last.size == expected[f"layers.{layer - 1}.y"].size:
                values.setdefault(f"layers.{layer - 1}.y", last)
        elif [tensor.size for tensor in step.tensors[-3:]] == sizes[layer]:
            for name, tensor in zip("qkv", step.tensors[-3:], strict=True):
                values[f"layers.{layer}.{name}.placed"] = tensor
            if layer:
                values[f"layers.{layer - 1}.y"] = step.tensors[-4]
            layer += 1
    known = {place: value.size for place, value in expected.items()}
    return {place: value for place, value in values.items() if known.get(place) == value.size}
