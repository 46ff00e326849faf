"""Training by autograd over a whole model, behind the calls of ``runtime_py.engine.trainer``.

``PeftEngine`` is the independent one: Hugging Face's module with PEFT's LoRA. Nothing is streamed
and none of our own formulas is used, so it checks all of them; but it has the float32 weights of
the checkpoint only. ``TransformerEngine`` is our transformer, with the weights of a program or a
file, quantized ones too: it checks what is streamed, not the transformer, which ``PeftEngine`` and
the ladder's lower rungs check. Clipping and AdamW are PyTorch's own in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from exporters.model.transformer import Transformer
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.manifest import AdapterTensor, Optimizer
from runtime_py.engine.examples import Example
from runtime_py.engine.streaming import StepNumbers
from toolchain.compile.autograd import (
    autograd_gradient,
    autograd_loss,
    summed_loss,
    trained_tensors,
)
from toolchain.verify.peft_module import padded, peft_parameters, set_peft_adapter


def peft_gradient(
    model: nn.Module, tensors: Sequence[AdapterTensor], examples: Sequence[Example]
) -> tuple[float, dict[str, np.ndarray]]:
    """Summed loss of ``examples`` with the adapter that ``model`` holds, and its gradient by each
    of ``tensors`` that is trained: by the programs' names, in their shapes and the model's dtype.

    ``model``: a ``peft.PeftModel`` around a causal language model.
    """
    places = peft_parameters(model, tensors)
    # A fused module of PEFT's is several of the programs' tensors.
    parameters = list({id(parameter): parameter for parameter, _ in places.values()}.values())
    trainable = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        with torch.enable_grad():
            loss = torch.stack([_loss(model, example) for example in examples]).sum()
            grads = torch.autograd.grad(loss, parameters)
    finally:
        for parameter, before in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(before)
    of = {id(parameter): grad for parameter, grad in zip(parameters, grads, strict=True)}
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return loss.item(), {
        name: padded(of[id(parameter)][rows], shapes[name])
        for name, (parameter, rows) in places.items()
    }


def _loss(model: nn.Module, example: Example) -> Tensor:
    tokens = torch.from_numpy(example.tokens)[None]
    return summed_loss(model(input_ids=tokens, use_cache=False).logits, example)


def torch_update(
    optimizer: Optimizer, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers
) -> float:
    """Clips ``gradient`` and takes a step of ``torch.optim.AdamW`` itself, every tensor of the
    adapter a parameter, A's and B's in groups of their own rates (LoRA+). -> the norm before
    clipping; where it is not finite, ``state`` stays.
    """
    layout = state.layout
    views = layout.views(gradient)
    parameters: dict[str, nn.Parameter] = {}
    for name, value in layout.views(state.parameters).items():
        parameters[name] = nn.Parameter(torch.from_numpy(value.copy()))
        parameters[name].grad = torch.from_numpy(views[name] * np.float32(numbers.per_token))
    norm = nn.utils.clip_grad_norm_(list(parameters.values()), numbers.clip)
    if not torch.isfinite(norm):
        return float(norm)
    groups = [
        {"params": [p for name, p in parameters.items() if part in name], "lr": rate}
        for part, rate in zip((".lora_A", ".lora_B"), numbers.rates, strict=True)
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=numbers.weight_decay,
        foreach=False,
    )
    means, squares = (layout.views(moment) for moment in (state.mean, state.square))
    for name, parameter in parameters.items():
        adamw.state[parameter] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": torch.from_numpy(means[name].copy()),
            "exp_avg_sq": torch.from_numpy(squares[name].copy()),
        }
    adamw.step()
    after = [layout.zeros() for _ in range(3)]
    for name, parameter in parameters.items():
        moments = adamw.state[parameter]
        found = (parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"])
        for matrix, tensor in zip(after, found, strict=True):
            layout.views(matrix)[name][...] = tensor.numpy()
    state.replace(*after)
    return float(norm)


class PeftEngine:
    """``model``: a ``peft.PeftModel`` around a causal language model, whose adapter has the modules
    of ``tensors``."""

    capacity = 0  # one sequence a call: nothing is packed here

    def __init__(
        self, model: nn.Module, tensors: Sequence[AdapterTensor], optimizer: Optimizer
    ) -> None:
        self._model, self._tensors, self._optimizer = model, tensors, optimizer

    @property
    def trained(self) -> list[Tensor]:
        """The parameters whose gradient is taken."""
        places = peft_parameters(self._model, self._tensors).values()
        return list({id(parameter): parameter for parameter, _ in places}.values())

    @torch.no_grad()
    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        set_peft_adapter(self._model, self._tensors, state.tensors)
        total = sum(float(_loss(self._model, example)) for example in examples)
        return total, sum(example.count for example in examples)

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        set_peft_adapter(self._model, self._tensors, state.tensors)
        loss, gradients = peft_gradient(self._model, self._tensors, examples)
        views = state.layout.views(into)
        for name, gradient in gradients.items():
            views[name] += gradient
        return loss, sum(example.count for example in examples)

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        return torch_update(self._optimizer, state, gradient, numbers)


class TransformerEngine:
    """Our transformer with whatever weights it has."""

    capacity = 0

    def __init__(self, model: Transformer, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    @property
    def trained(self) -> list[Tensor]:
        """The tensors whose gradient is taken."""
        return list(trained_tensors(self._model).values())

    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        total = autograd_loss(self._model, state.tensors, examples)
        return total, sum(example.count for example in examples)

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        whole = autograd_gradient(self._model, state.tensors, examples)
        views = state.layout.views(into)
        for name, gradient in whole.gradients.items():
            views[name] += gradient
        return whole.loss, sum(example.count for example in examples)

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        return torch_update(self._optimizer, state, gradient, numbers)
