"""What a model computes on the way to its logits, by place, so that the first difference shows.

A place is ``layers.<i>.<operator>``; ``OPERATORS`` says what stands at each. Places come in the
order of computation, and a difference counts where it first exceeds its tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from exporters.model.lora_targets import site_targets
from exporters.model.plain_attention import Attend, plain_attention
from exporters.model.spec import ModelSpec
from exporters.model.transformer import Transformer
from exporters.training.block import MATRICES
from toolchain.compile.noise import perturbed
from toolchain.verify.parity.native_child import Instruction
from toolchain.verify.parity.place_recorder import PlaceRecorder
from toolchain.verify.parity.verdict import FirstDifference

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
    """The layer and the operator at a place."""
    if not place.startswith("layers."):
        return None, OPERATORS[place]
    _, layer, operator = place.split(".", 2)
    return int(layer), OPERATORS[operator]


def differences(measured: Values, expected: Values) -> list[tuple[str, float]]:
    """Of the places that both have, in the order of ``expected``: the largest difference as a part
    of the largest value."""
    result = []
    for place, reference in expected.items():
        if (value := measured.get(place)) is None:
            continue
        if value.size != reference.size:
            result.append((place, float("inf")))
            continue
        gap = np.abs(value.reshape(reference.shape).astype(np.float64) - reference).max()
        size = max(float(np.abs(reference).max()), 1e-30)
        result.append((place, float(gap) / size if np.isfinite(gap) else float("inf")))
    return result


def first_difference(
    layers: Sequence[tuple[str, float]],
    tolerance: float,
    floor: Mapping[str, float] | None = None,
) -> FirstDifference | None:
    """The first place beyond ``tolerance``, or beyond ``_ABOVE`` times the ``floor`` up to its
    place where that is more."""
    noise = 0.0
    for place, gap in layers:
        noise = max(noise, (floor or {}).get(place, 0.0))
        allowed = max(tolerance, _ABOVE * noise)
        if not gap <= allowed:
            layer, operator = operator_of(place)
            where = "outside of the layers" if layer is None else f"layer {layer}"
            return FirstDifference(
                layer,
                operator,
                f"{where}: the first difference is in the {operator}, {gap:.2g} of its range "
                f"(at most {allowed:.2g} is expected).",
            )
    return None


@torch.no_grad()
def noise_floor(model: Transformer, tokens: np.ndarray) -> dict[str, float]:
    """How far each place moves where the token embeddings change in float32's last bit."""
    expected = of_transformer(model, tokens)
    with perturbed(model, 0):
        return dict(differences(of_transformer(model, tokens), expected))


@torch.no_grad()
def of_transformer(model: Transformer, tokens: np.ndarray) -> Values:
    """Of one call over ``tokens`` [n], all places."""
    spec = model.spec
    ids = torch.from_numpy(tokens)[None]
    with PlaceRecorder() as recorder:
        recorder.put("embedding", model.lookup(ids))
        if len(model.ropes) == 1:
            tables = [getattr(model, f"{kind}_0")[: len(tokens), 0] for kind in ("cos", "sin")]
            recorder.put("rotary tables", torch.stack(tables))
        for index, block in enumerate(model.blocks):
            for site, names in MATRICES.items():
                places = [f"layers.{index}.{name}" for name in names]
                recorder.products(
                    getattr(block, site), f"layers.{index}.{site}.in", places, list[Tensor]
                )
            recorder.output(block, f"layers.{index}.y")
        attends = [_placed(recorder, index, spec) for index in range(len(spec.layers))]
        hidden = model.hidden(ids, torch.arange(ids.shape[1]), attends)
        recorder.put("logits", model.logits(hidden)[0])
        return recorder.values


def _placed(recorder: PlaceRecorder, layer: int, spec: ModelSpec) -> Attend:
    """A layer's attention, whose queries, keys and values are kept."""
    attend = plain_attention(spec, spec.layers[layer])

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            recorder.put(f"layers.{layer}.{name}.placed", tensor)
        return attend(q, k, v)

    return watched


@torch.no_grad()
def of_hugging_face(model: PeftModel, spec: ModelSpec, tokens: np.ndarray) -> Values:
    """The same places of the reference, as far as its modules show them."""
    modules = dict(model.named_modules())
    prefix = "base_model.model.model"
    with PlaceRecorder() as recorder:
        for index in range(len(spec.layers)):
            block = f"{prefix}.layers.{index}"
            for site, targets in site_targets(spec).items():
                names = iter(MATRICES[site])
                for target in targets:
                    places = [f"layers.{index}.{next(names)}" for _ in target.rows]
                    recorder.products(
                        modules[f"{block}.{target.module}"],
                        f"layers.{index}.{site}.in",
                        places,
                        _split(target.rows),
                    )
            recorder.output(modules[block], f"layers.{index}.y")
        ropes = {layer.rope for layer in spec.layers if layer.rope}
        if len(ropes) == 1 and f"{prefix}.rotary_emb" in modules:
            pairs = len(next(iter(ropes)).inv_freq)
            recorder.call(modules[f"{prefix}.rotary_emb"], "rotary tables", _tables(pairs))
        ids = torch.from_numpy(tokens)[None]
        recorder.put("logits", model(input_ids=ids, use_cache=False).logits[0])
        return recorder.values


def _split(rows: Sequence[int]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Of a fused module's output [1, S, out], the part of each of our matrices."""
    return lambda output: output.split(list(rows), dim=-1)


def _tables(pairs: int) -> Callable[[tuple[Tensor, Tensor]], np.ndarray]:
    """Of Hugging Face's cos and sin [1, S, D], those of each pair once: [2, S, pairs]."""
    return lambda output: np.stack([part[0, :, :pairs].numpy() for part in output])


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
