"""Which quantization a target gets: the smallest whose perplexity stays near float32's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from exporters.coreml.compression import plan, stored_values
from exporters.model.quantize import Scheme, quantized, share
from exporters.model.transformer import Transformer
from runtime_py.bundle.manifest import MeasuredPrecision
from toolchain.compile.shipped_text import perplexity
from toolchain.defaults import PRECISIONS

WORST_RATIO = 1.03  # of the perplexity of float32 on attune's text

ANDROID: dict[str, Scheme | None] = {
    "8da4w": Scheme(bits=4, head_bits=8, affine=True, gptq=True),
    "8da8w": Scheme(bits=8, head_bits=8),
    "none": None,
}


@dataclass(frozen=True, eq=False)
class ChosenPrecision:
    """``quantize``: its name; ``measured``: what was tried on the way to it. ``model``: the one to
    lower; ``simulated``: in PyTorch, with the weights that the lowered one has."""

    quantize: str
    chosen_by: Literal["perplexity", "user"]
    measured: tuple[MeasuredPrecision, ...]
    model: Transformer
    simulated: Transformer


def rounded_for_coreml(model: Transformer, quantize: str) -> Transformer:
    """The model with the float32 values that a Core ML package's weights stand for; rotary tables
    are left, as part of its arithmetic."""
    if quantize == "none":
        return model
    result = share(model)
    grids = plan(model, quantize)
    values: dict[int, Tensor] = {}  # a matrix that is both table and head stays one
    for name, tensor in list(result.named_buffers(remove_duplicate=False)):
        path, _, buffer = name.rpartition(".")
        if buffer not in ("weight", "bias"):
            continue
        if tensor.data_ptr() not in values:
            grid = grids.get(name)
            values[tensor.data_ptr()] = (
                stored_values(tensor, grid) if grid else tensor.half().float()
            )
        setattr(result.get_submodule(path), buffer, values[tensor.data_ptr()])
    return result


class PrecisionChooser:
    """Tries precisions on one float32 model, which is itself measured once. ``texts``: attune's
    "calibration" and "perplexity" dialogues, as tokens [1, S] each."""

    def __init__(self, model: Transformer, texts: Mapping[str, Sequence[Tensor]]) -> None:
        self.model = model
        self.texts = texts
        self._float: float | None = None

    def _rate(self, name: str, model: Transformer) -> MeasuredPrecision:
        if self._float is None:
            self._float = perplexity(self.model, self.texts["perplexity"])
        value = self._float if name == "none" else perplexity(model, self.texts["perplexity"])
        return MeasuredPrecision(quantize=name, perplexity=value, ratio_to_fp32=value / self._float)

    def _with(self, target: str, name: str) -> tuple[Transformer, Transformer]:
        """The model to lower, and one in PyTorch with the weights it will have."""
        if target == "android":
            scheme = ANDROID[name]
            if scheme is None:
                return self.model, self.model
            model = quantized(self.model, scheme, self.texts["calibration"])
            return model, model
        return self.model, rounded_for_coreml(self.model, name)

    def choose(self, target: str, requested: str | None) -> ChosenPrecision:
        """``requested``, or the smallest whose perplexity is at most ``WORST_RATIO`` × float32's.
        ``target``: "android" or "ios"."""
        measured: list[MeasuredPrecision] = []
        for name in [requested] if requested else PRECISIONS[target]:
            lowered, simulated = self._with(target, name)
            measured.append(self._rate(name, simulated))
            if requested or measured[-1].ratio_to_fp32 <= WORST_RATIO:
                break
        measured.append(self._rate("none", self.model))
        by: Literal["perplexity", "user"] = "user" if requested else "perplexity"
        return ChosenPrecision(name, by, tuple(measured), lowered, simulated)
