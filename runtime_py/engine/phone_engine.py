"""The loop's engine on a bundle's ``lm.pte``: embeds dialogues, and writes text.

Text comes from chat pieces, logits, and a seed: the same ones give the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from runtime_py.bundle.adapter_forms import check_runtime_file
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.native import silenced
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import LoopError
from runtime_py.loop.protocols import Embedding
from runtime_py.loop.random_stream import SplitMix64

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_py.engine.lm import ExecutorchLm


@dataclass(frozen=True)
class LmCall:
    """What the model was asked to do: ``tokens`` after the first ``start`` ones. A ``decode`` is
    ``tokens`` calls of one token each."""

    kind: Literal["embed", "prefill", "decode"]
    tokens: int
    start: int


def _ignore(call: LmCall) -> None:
    pass


class PhoneEngine:
    """``on_call`` gets every call, after it. The program is loaded when it is first needed.

    Each of its two methods packs the weights for itself. ``lean``: only one of them is in memory,
    and is made anew whenever the other was used in between.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        on_call: Callable[[LmCall], None] = _ignore,
        lean: bool = False,
    ) -> None:
        self._program, self._adapter = bundle.android.lm, bundle.android.adapter
        self.text = ChatText.of(bundle)
        self._bundle, self._threads, self._on_call = bundle, threads, on_call
        self._lm: ExecutorchLm | None = None
        self._lean, self._method = lean, ""

    def use_adapter(self, file: Path) -> None:
        adapter = check_runtime_file(file)
        if adapter != self._adapter:
            self.release()
            self._adapter = adapter

    def release(self) -> None:
        """Gives the program's memory back until it is needed again."""
        self._lm = None

    def _loaded(self, method: str) -> ExecutorchLm:
        if self._lean and method != self._method:
            self.release()
        self._method = method
        if self._lm is None:
            # Heavy, and whoever only counts calls has no need of it.
            from runtime_py.engine.lm import ExecutorchLm

            program = self._program
            try:
                with silenced():  # the runtime talks of the processor
                    self._lm = ExecutorchLm(program, self._adapter, self._threads)
            except RuntimeError as error:
                raise LoopError(
                    f"{program} cannot be loaded with {self._adapter} ({error}): the memory does "
                    f"not suffice, or the adapter is not one of this bundle."
                ) from error
            self._threads = None  # the pool stays for the process
        return self._lm

    def embed(self, dialogue: Dialogue) -> Embedding:
        ids = self.text.tokens(dialogue.turns).ids
        ids = ids[: self._bundle.manifest.policy.embed_length]
        pooled, entropy = self._loaded("embed").embed(_tokens(ids))  # [1, n] -> [hidden]
        self._on_call(LmCall("embed", len(ids), 0))
        return Embedding(pooled.numpy().astype(np.float32, copy=True), entropy)

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        """Ends at an end token, after ``max_new_tokens``, or with the context. Where messages and
        ``prefix`` fill the context the oldest exchanges are left out; raises ``PromptTooLong``
        where even the last message does."""
        prompt = self.text.prompt(messages, prefix)
        lm = self._loaded("forward")
        stops = set(self._bundle.manifest.tokenizer.eos_ids)
        chance = SplitMix64(seed)
        logits = lm.prefill(_tokens(prompt))
        self._on_call(LmCall("prefill", len(prompt), 0))
        written: list[int] = []
        end = min(len(prompt) + max_new_tokens, self._bundle.manifest.model.context)
        for position in range(len(prompt), end):
            token = sample(logits[0].numpy(), temperature, chance)
            if token in stops:
                break
            written.append(token)
            if position + 1 < end:
                logits = lm.forward(_tokens([token]), position)
        self._on_call(LmCall("decode", len(written), len(prompt)))
        return self.text.decode(written).strip()


def _tokens(ids: Sequence[int]) -> Tensor:
    """int64 [1, n]"""
    import torch

    return torch.tensor([list(ids)])


def sample(logits: np.ndarray, temperature: float, chance: SplitMix64) -> int:
    """One token of ``logits`` [vocab]. At 0 the most likely, and nothing is drawn; else the first
    token at which the sum of probabilities exceeds a number drawn from [0, 1)."""
    if temperature == 0.0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    sums = np.cumsum(weights)
    drawn = (chance.next() >> 11) * 2.0**-53 * sums[-1]
    return min(int(np.searchsorted(sums, drawn, side="right")), len(sums) - 1)
