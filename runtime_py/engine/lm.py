"""Runs a bundle's ``lm.pte`` in ExecuTorch: next-token logits, greedy text, embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from runtime_py.engine.executorch_library import load_module, set_threads
from runtime_py.engine.native import silenced


class ExecutorchLm:
    """One loaded program with one adapter. The KV cache lives in the program: a call at position
    ``start`` continues what was computed up to there."""

    def __init__(self, program: Path, adapter: Path | None, threads: int | None = None) -> None:
        if threads is not None:
            set_threads(threads)
        self._module = load_module(program, adapter)
        self._called: set[str] = set()
        self.prefill_length = int(self._run("get_max_seq_len")[0])
        self.context = int(self._run("get_max_context_len")[0])

    def _run(self, method: str, *inputs: Tensor) -> list:
        """A method's outputs; the runtime talks of the processor on its first call."""
        if method in self._called:
            return self._module.run_method(method, inputs)
        with silenced():
            outputs = self._module.run_method(method, inputs)
        self._called.add(method)
        return outputs

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        """tokens [1, S] int64, S ≤ ``prefill_length`` -> logits of the last one [1, vocab]."""
        return self._run("forward", tokens, torch.tensor([start]))[0]

    def prefill(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Any number of tokens, in chunks -> logits of the last one [1, vocab]."""
        logits = torch.empty(0)
        for begin in range(0, tokens.shape[1], self.prefill_length):
            logits = self.forward(tokens[:, begin : begin + self.prefill_length], start + begin)
        return logits

    def greedy(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> Iterator[int]:
        """The most likely continuation of ``prompt``, token by token, until ``stop``, ``count``
        tokens or the end of the context."""
        logits = self.prefill(torch.tensor([list(prompt)]))
        for position in range(len(prompt), min(len(prompt) + count, self.context)):
            token = int(logits.argmax())
            if token in stop:
                return
            yield token
            logits = self.forward(torch.tensor([[token]]), position)

    def all_logits(self, tokens: Tensor) -> Tensor:
        """Logits after every token, one call a token as in decoding: [1, S] -> [1, S, vocab]."""
        rows = [self.forward(tokens[:, i : i + 1], i) for i in range(tokens.shape[1])]
        return torch.stack(rows, dim=1)

    def embed(self, tokens: Tensor) -> tuple[Tensor, float]:
        """tokens [1, S] int64 -> pooled vector [hidden] float32 and entropy, by the base model."""
        pooled, entropy = self._run("embed", tokens)
        return pooled, float(entropy)
