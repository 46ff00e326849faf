"""A bundle's model in PyTorch, on a CPU or a GPU, for many sequences at once: losses, gradients,
vectors, text.

It has the weights that the training programs have, for text too, and batches what a phone takes one
by one: last bits differ from the programs'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from exporters.model.lora_tensors import adapter_tensors
from exporters.model.projection import LoRA
from runtime_py.bundle.adapter_state import AdapterState, FlatLayout
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.manifest import AdapterTensor
from runtime_py.engine.examples import Example
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import PromptTooLong
from runtime_py.loop.protocols import Embedding
from toolchain.study.base_model import base_model, bundle_spec
from toolchain.study.batched import (
    Batch,
    Choose,
    continued,
    greedy,
    hidden_states,
    label_losses,
    together,
)
from toolchain.study.estimators import ESTIMATORS, TokenVectors


@dataclass(frozen=True)
class AdapterShape:
    """``modules``: short names such as ``q_proj``; the adapter's ``tensors`` as a manifest has
    them."""

    modules: tuple[str, ...]
    rank: int
    tensors: tuple[AdapterTensor, ...]


def adapter_shape(bundle: Bundle) -> AdapterShape:
    """The bundle's own."""
    adapter = bundle.manifest.adapter
    return AdapterShape(adapter.targets, adapter.rank, adapter.tensors)


class BatchedModel:
    """A bundle's base with an adapter that is changed in place. ``tokens_a_call``: of a
    batch."""

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        shape: AdapterShape | None = None,
        tokens_a_call: int | None = None,
    ) -> None:
        self.bundle, self.device = bundle, device
        self.shape = shape or adapter_shape(bundle)
        self.text = ChatText.of(bundle)
        self.spec = bundle_spec(bundle)
        self.model = base_model(bundle, self.spec, self.shape.modules, self.shape.rank).to(device)
        self.layout = FlatLayout.of(self.shape.tensors)
        self.tokens_a_call = tokens_a_call or (32768 if device.type == "cuda" else 4096)
        self._flat = torch.zeros(self.layout.rows, 1024, device=device)
        self._scales: Mapping[str, np.ndarray] = {}

    def set_adapter(self, state: AdapterState) -> None:
        """Copies the adapter's numbers to the device."""
        self._use(state.scales, torch.from_numpy(state.parameters).to(self.device, copy=True))

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within it adapters are changed at will; the one that was in use is again afterwards."""
        scales, flat = self._scales, self._flat
        try:
            yield
        finally:
            self._use(scales, flat)

    def _use(self, scales: Mapping[str, np.ndarray], flat: Tensor) -> None:
        tensors = adapter_tensors(self.model)
        for name, scale in scales.items():
            tensors[name].fill_(float(scale.item()))
        self._scales = scales
        self._bind(flat)

    def set_values(self, values: Mapping[str, np.ndarray]) -> None:
        """``values``: every tensor of the adapter by name, float32."""
        self.set_adapter(AdapterState.of(self.shape.tensors, values))

    def _bind(self, flat: Tensor) -> None:
        """Makes the model's LoRA tensors views of ``flat``, a gradient of which can be taken."""
        self._flat = flat
        line = flat.reshape(-1)
        places = self.layout.places
        for index, block in enumerate(self.model.blocks):
            for module in block.modules():
                if not isinstance(module, LoRA):
                    continue
                for name in ("lora_A", *module.b_names):
                    start, shape = places[f"layers.{index}.{module.target.module}.{name}"]
                    size = int(np.prod(shape))
                    module._buffers[name] = line[start : start + size].view(shape)

    # Losses and gradients

    @property
    def capacity(self) -> int:
        return self.tokens_a_call

    def labelled(self, examples: Sequence[Example]) -> tuple[Batch, Tensor]:
        """What one call reads, and int64 [N] what follows each token, ``IGNORED`` where it does
        not count."""
        batch = together([e.tokens[: e.inputs] for e in examples], self.device)
        labels = np.concatenate([e.labels[1 : e.inputs + 1] for e in examples])
        return batch, torch.from_numpy(labels.astype(np.int64, copy=False)).to(self.device)

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of sequences that share a call, short ones first."""
        order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
        calls: list[list[int]] = []
        room = 0
        for index in order:
            if lengths[index] > room:
                calls.append([])
                room = self.tokens_a_call
            calls[-1].append(index)
            room -= lengths[index]
        return calls

    @torch.no_grad()
    def losses(self, examples: Sequence[Example], adapted: bool = True) -> np.ndarray:
        """Of each example, nats summed over its labels: float64 [n]."""
        result = np.zeros(len(examples))
        for call in self.batches([e.inputs for e in examples]):
            batch, labels = self.labelled([examples[index] for index in call])
            result[call] = label_losses(self.model, batch, labels, adapted).double().cpu().numpy()
        return result

    def loss_and_gradient(self, examples: Sequence[Example]) -> tuple[float, np.ndarray]:
        """Summed loss, and its gradient by the adapter: float32 [rows, 1024]."""
        flat = self._flat.detach().requires_grad_()
        self._bind(flat)
        total = 0.0
        with torch.enable_grad():
            for call in self.batches([e.inputs for e in examples]):
                batch, labels = self.labelled([examples[index] for index in call])
                loss = label_losses(self.model, batch, labels).sum()
                loss.backward()
                self._bind(flat)
                total += float(loss.detach())
        gradient = flat.grad
        self._bind(flat.detach())
        if gradient is None:
            return total, np.zeros(tuple(flat.shape), np.float32)
        return total, gradient.cpu().numpy()

    # Vectors

    @torch.no_grad()
    def embed(self, dialogues: Sequence[Dialogue], estimator: str = "norm") -> list[Embedding]:
        """Vector and entropy of each by the base model, as the ``embed`` program's; ``estimator``:
        a name in ``ESTIMATORS``."""
        longest = self.bundle.manifest.policy.embed_length
        sequences = [
            np.asarray(self.text.tokens(d.turns).ids[:longest], np.int64) for d in dialogues
        ]
        results: list[Embedding | None] = [None] * len(sequences)
        for call in self.batches([len(sequence) for sequence in sequences]):
            batch = together([sequences[index] for index in call], self.device)
            vectors = hidden_states(self.model, batch, adapted=False)
            pooled = [each.mean(0).cpu().numpy() for each in vectors.split(batch.counts)]
            entropies = ESTIMATORS[estimator](TokenVectors(self.model, batch, vectors))
            for row, index in enumerate(call):
                results[index] = Embedding(pooled[row].astype(np.float32), float(entropies[row]))
        return cast(list[Embedding], results)

    # Text

    def prompt(self, messages: Sequence[Turn], prefix: str = "") -> np.ndarray:
        """Token ids int64 [n] of the messages up to where the assistant begins to speak, and of
        what its reply begins with. Raises ``PromptTooLong``."""
        return np.asarray(self.text.prompt(messages, prefix), np.int64)

    def write(self, prompt: np.ndarray, most: int, choose: Choose) -> str:
        """The continuation of one prompt, its tokens taken by ``choose``."""
        return self._written([prompt], most, choose)[0]

    def replies(self, prompts: Sequence[Sequence[Turn]], most: int) -> list[str]:
        """The greedy reply to each, of at most ``most`` tokens; "" where the prompt is too long."""
        ids = []
        for messages in prompts:
            try:
                ids.append(self.prompt(messages))
            except PromptTooLong:
                ids.append(np.zeros(0, np.int64))
        texts = [""] * len(ids)
        there = [index for index, one in enumerate(ids) if len(one)]
        for call in self.batches([len(ids[index]) + most for index in there]):
            chosen = [there[place] for place in call]
            written = self._written([ids[index] for index in chosen], most, greedy)
            for index, text in zip(chosen, written, strict=True):
                texts[index] = text
        return texts

    def _written(self, prompts: Sequence[np.ndarray], most: int, choose: Choose) -> list[str]:
        manifest = self.bundle.manifest
        batch = together(prompts, self.device)
        rows = continued(
            self.model, batch, most, manifest.tokenizer.eos_ids, manifest.model.context, choose
        )
        return [self.text.decode(row).strip() for row in rows]
