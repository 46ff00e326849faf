"""Loss and gradients by autograd over the whole of our transformer.

What is streamed block by block with derivatives by hand is held to this: at export, in the golden
vectors, and in the ladder. It knows the weights that a file or a program has, quantized ones too,
but shares the transformer's forward with the programs. Where independence of that is the point,
``toolchain.verify.reference_engines`` has Hugging Face's module with PEFT's LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from exporters.model.lora_tensors import adapter_tensors, set_adapter
from exporters.model.transformer import Transformer
from runtime_py.engine.examples import IGNORED, Example


@dataclass(frozen=True, eq=False)
class WholeGradient:
    """Of some examples: ``loss`` in nats, summed over their labels; ``gradients`` of it by each
    LoRA tensor, by the programs' names and in their shapes; ``largest_logit``: the largest
    magnitude of what a loss is a difference of."""

    loss: float
    gradients: dict[str, np.ndarray]
    largest_logit: float


def trained_tensors(model: Transformer) -> dict[str, Tensor]:
    """Those that a gradient is taken by, by name: A and B, not the scales."""
    return {name: tensor for name, tensor in adapter_tensors(model).items() if ".lora_" in name}


def summed_loss(logits: Tensor, example: Example) -> Tensor:
    """Cross-entropy in nats, summed over the example's labels. ``logits`` [1, n, vocab]: token
    t + 1 is predicted at position t."""
    labels = torch.from_numpy(example.labels)[1:]
    return nn.functional.cross_entropy(
        logits[0, :-1], labels, ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def autograd_loss(
    model: Transformer, values: Mapping[str, np.ndarray], examples: Sequence[Example]
) -> float:
    """Summed loss of ``examples`` with the adapter ``values``, which stays in the model."""
    set_adapter(model, values)
    return sum(float(summed_loss(_logits(model, example), example)) for example in examples)


def autograd_gradient(
    model: Transformer, values: Mapping[str, np.ndarray], examples: Sequence[Example]
) -> WholeGradient:
    """The adapter ``values`` stays in the model; nothing else of it changes."""
    set_adapter(model, values)
    trained = trained_tensors(model)
    for tensor in trained.values():
        tensor.requires_grad_()
    try:
        with torch.enable_grad():
            logits = [_logits(model, example) for example in examples]
            losses = [summed_loss(*pair) for pair in zip(logits, examples, strict=True)]
            loss = torch.stack(losses).sum()
            grads = torch.autograd.grad(loss, list(trained.values()))
    finally:
        for tensor in trained.values():
            tensor.requires_grad_(False)
    return WholeGradient(
        loss=loss.item(),
        gradients={name: grad.numpy() for name, grad in zip(trained, grads, strict=True)},
        largest_logit=max(float(one.detach().abs().max()) for one in logits),
    )


def _logits(model: Transformer, example: Example) -> Tensor:
    return model(torch.from_numpy(example.tokens)[None])
