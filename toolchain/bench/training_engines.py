"""What a training step is timed on: attune, PyTorch with PEFT, ExecuTorch's own kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.model.transformer import Transformer
from runtime_py.bundle.adapter_forms import to_runtime
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.manifest import Manifest
from runtime_py.bundle.peft_adapter import read_peft
from runtime_py.engine.examples import Example
from runtime_py.engine.executorch_library import load_module
from runtime_py.engine.native import silenced
from runtime_py.engine.streaming import StreamingEngine, open_training, step_numbers

RATE, DECAY, CLIP = 3e-4, 0.01, 1.0
BETAS = (0.9, 0.999)


class Stepper(Protocol):
    """One contestant: each call is a whole step with micro-batch 1, gradient and AdamW."""

    @property
    def name(self) -> str: ...

    def step(self) -> float:
        """-> the mean loss before the update, in nats a label."""
        ...


class AttuneStepper:
    """The bundle's programs."""

    def __init__(
        self, name: str, engine: StreamingEngine, state: AdapterState, example: Example
    ) -> None:
        self.name = name
        self._engine, self._state, self._example = engine, state, example
        self._gradient = state.layout.zeros()

    def step(self) -> float:
        self._gradient[...] = 0.0
        loss, count = self._engine.gradient(self._state, [self._example], self._gradient)
        numbers = step_numbers(self._state.step + 1, count, (RATE, RATE), DECAY, CLIP, BETAS)
        self._engine.update(self._state, self._gradient, numbers)
        return loss / count

    def kept_layers(self, length: int) -> int:
        """Layers whose activations the budget holds, in a program of ``length`` tokens."""
        return self._engine.kept_layers(length)


def peft_model(model: PreTrainedModel, manifest: Manifest) -> nn.Module:
    """LoRA of the bundle's rank and targets around ``model``, changed in place; no dropout."""
    adapter = manifest.adapter
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        target_modules=list(adapter.targets),
        lora_dropout=0.0,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


class TorchStepper:
    """PEFT in eager PyTorch, with or without gradient checkpointing; logits of every position, as
    Hugging Face's loss computes them."""

    def __init__(self, model: nn.Module, example: Example, checkpointing: bool) -> None:
        self.name = "torch + peft, checkpointing" if checkpointing else "torch + peft, eager"
        self._model, self._checkpointing = model, checkpointing
        self._tokens = torch.from_numpy(example.tokens)[None]
        self._labels = torch.from_numpy(example.labels)[None]
        trained = [p for p in model.parameters() if p.requires_grad]
        self._trained = trained
        self._optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)

    def step(self) -> float:
        """-> the mean loss before the update, in nats a label."""
        model: PreTrainedModel = self._model  # type: ignore[assignment]
        model.train()
        if self._checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        self._optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=self._tokens, labels=self._labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, CLIP)
        self._optimizer.step()
        return float(loss.detach())


class _Joint(nn.Module):
    """Our transformer with its LoRA tensors as parameters, and its loss: what ExecuTorch's own
    training export takes."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if name.startswith("lora_"):
                    delattr(module, name)
                    module.register_parameter(name, nn.Parameter(buffer))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens int64 [1, S], labels int64 [S], all of them counted -> mean loss."""
        logits = self.model(tokens)[0]
        return nn.functional.cross_entropy(logits, labels)


class KernelStepper:
    """ExecuTorch's own way: a joint forward and backward graph in its kernels, without a delegate.
    Gradients only: its optimizer is not counted."""

    def __init__(self, model: Transformer, example: Example, folder: Path) -> None:
        from executorch.exir import to_edge
        from torch.export.experimental import _export_forward_backward

        self.name = f"ExecuTorch kernels, {len(model.blocks)} layers"
        tokens = torch.from_numpy(example.tokens)[None]
        labels = torch.from_numpy(example.tokens).roll(-1)
        self._inputs = [tokens, labels]
        joint = _Joint(model).train()
        path = folder / f"joint-{len(model.blocks)}.pte"
        with silenced():
            program = torch.export.export(joint, (tokens, labels), strict=False)
            program = _export_forward_backward(program)
            path.write_bytes(to_edge(program).to_executorch().buffer)
        from executorch.kernels import quantized  # noqa: F401

        self._module = load_module(path)

    def step(self) -> float:
        with silenced():
            return float(self._module.run_method("forward", self._inputs)[0])


def labelled(tokens: Tensor, labels: Tensor) -> Example:
    """A benchmark's sequence: int64 [n] both; a label is ``IGNORED`` where none is learned."""
    return Example("benchmark", tokens.numpy(), labels.numpy())


def attune_stepper(
    name: str, bundle: Bundle, sequence: Example, keep_mb: float, threads: int
) -> AttuneStepper:
    engine = open_training(bundle, keep_mb=keep_mb, threads=threads)
    values = to_runtime(read_peft(bundle.peft), bundle.manifest.adapter.tensors)
    return AttuneStepper(
        name, engine, AdapterState.of(bundle.manifest.adapter.tensors, values), sequence
    )
