"""The reference: Hugging Face's module with PEFT's LoRA, autograd over the whole model.

Nothing is streamed and none of our own formulas is used, so this checks all of them. Gradient
clipping and AdamW are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.manifest import AdapterTensor, Optimizer
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.engine.streaming import StepNumbers


class TorchEngine:
    """``model``: a ``peft.PeftModel`` around a causal language model, whose adapter has the shapes
    of ``tensors``."""

    def __init__(
        self, model: nn.Module, tensors: Sequence[AdapterTensor], optimizer: Optimizer
    ) -> None:
        self.model, self._optimizer = model, optimizer
        parameters = dict(model.named_parameters())
        self._tensors = [t for t in tensors if not t.name.endswith(".scale")]
        self._own: dict[str, nn.Parameter] = {}
        for tensor in self._tensors:
            name = tensor.peft.replace(".weight", ".default.weight")
            self._own[tensor.name] = parameters[name]
        for parameter in parameters.values():
            parameter.requires_grad_(any(parameter is own for own in self._own.values()))

    def _part(self, tensor: AdapterTensor, whole: Tensor) -> Tensor:
        """The tensor's rows of PEFT's matrix."""
        return whole[slice(*tensor.rows)] if ".lora_B" in tensor.name else whole

    @torch.no_grad()
    def _take(self, state: AdapterState) -> None:
        values = state.tensors
        for tensor in self._tensors:
            own = self._part(tensor, self._own[tensor.name])
            own.copy_(torch.from_numpy(values[tensor.name][0]))

    def _loss(self, example: Example) -> Tensor:
        tokens = torch.from_numpy(example.tokens)[None]
        labels = torch.from_numpy(example.labels)
        logits = self.model(input_ids=tokens, use_cache=False).logits[0, :-1]
        return nn.functional.cross_entropy(
            logits, labels[1:], ignore_index=IGNORED, reduction="sum"
        )

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters whose gradient is taken."""
        return list({id(own): own for own in self._own.values()}.values())

    @property
    def capacity(self) -> int:
        """One sequence a call: nothing is packed here."""
        return 0

    @torch.no_grad()
    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        self._take(state)
        total = sum(float(self._loss(example)) for example in examples)
        return total, sum(example.count for example in examples)

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        self._take(state)
        for parameter in self._own.values():
            parameter.grad = None
        loss = torch.stack([self._loss(example) for example in examples]).sum()
        loss.backward()
        views = state.layout.views(into)
        for tensor in self._tensors:
            grad = self._own[tensor.name].grad
            assert grad is not None
            views[tensor.name][0] += self._part(tensor, grad).float().numpy()
        return float(loss.detach()), sum(example.count for example in examples)

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        """``torch.optim.AdamW`` itself; ``numbers.decay`` is 1 − rate · weight decay."""
        parameter = nn.Parameter(torch.from_numpy(state.parameters.copy()))
        parameter.grad = torch.from_numpy(gradient * np.float32(numbers.per_token))
        norm = nn.utils.clip_grad_norm_([parameter], numbers.clip)
        if not torch.isfinite(norm):
            return float(norm)
        own = self._optimizer
        adamw = torch.optim.AdamW(
            [parameter],
            lr=numbers.rate,
            betas=(own.beta1, own.beta2),
            eps=own.epsilon,
            weight_decay=(1.0 - numbers.decay) / numbers.rate,
            foreach=False,
        )
        mean, square = (torch.from_numpy(moment.copy()) for moment in (state.mean, state.square))
        adamw.state[parameter] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": mean,
            "exp_avg_sq": square,
        }
        adamw.step()
        state.replace(parameter.detach().numpy(), mean.numpy(), square.numpy())
        return float(norm)
