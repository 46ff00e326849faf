"""What the inputs of a transformer's matrices look like on a calibration text: Gram matrices.

GPTQ's integers hang on them, so they are the same bits on every processor
(``exporters.model.deterministic_calls``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exporters.errors import ExportError
from exporters.model.deterministic import gram
from exporters.model.deterministic_calls import SameBits
from exporters.model.plain_attention import plain_attention
from exporters.model.transformer import Transformer

_TOGETHER = 1024  # vectors of one product
_Hook = Callable[[nn.Module, tuple], None]
SITES = ("qkv", "o", "gate_up", "down")


class _Tap(nn.Module):
    """Stands in for a block: lets its input pass, and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        self.calls.append((x, *others))
        return x


def _block_calls(model: Transformer, batches: Sequence[Tensor]) -> list[list[tuple]]:
    """For each block, what it would be called with for each batch, but for the input itself."""
    taps = [_Tap() for _ in model.blocks]
    blocks, model.blocks = model.blocks, nn.ModuleList(taps)  # type: ignore[assignment]
    try:
        for tokens in batches:
            attends = [plain_attention(model.spec, layer) for layer in model.spec.layers]
            model.stream(tokens, torch.arange(tokens.shape[1]), attends)
    finally:
        model.blocks = blocks
    return [tap.calls for tap in taps]


class _Gram:
    """Σ x xᵀ over the vectors that it is given, many at a time."""

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x [..., in]"""
        self._waiting.append(x.detach().flatten(0, -2).float())
        if sum(part.shape[0] for part in self._waiting) >= _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        part = gram(torch.cat(self._waiting))
        self._total = part if self._total is None else self._total.add_(part)
        self._waiting = []

    def result(self) -> Tensor:
        """float32 [in, in]. Raises ``ExportError`` where no vector was added."""
        if self._waiting:
            self._flush()
        if self._total is None:
            raise ExportError("the calibration text has no tokens: give one that has.")
        return self._total.float()


@torch.no_grad()
def walk_grams(
    model: Transformer, batches: Sequence[Tensor]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """For each block in turn ("blocks.0", ...) the Gram matrix Σ x xᵀ [in, in] of the inputs of
    each of its sites, and last ("", {"head": ...}). ``batches``: tokens [1, S].

    A block that the caller quantizes before asking for the next one computes the inputs of those
    after it: so each is fitted to what it will be given. Only one block's matrices and the hidden
    states of all tokens are held.
    """
    with SameBits():
        calls = _block_calls(model, batches)
    states = [first for first, *_ in calls[0]]
    for index, rest in enumerate(calls):
        block = model.blocks[index]
        inputs: dict[str, Tensor] = {}
        grams = {site: _Gram() for site in SITES}

        def hook(site: str, inputs: dict[str, Tensor] = inputs) -> _Hook:
            def keep(module: nn.Module, args: tuple) -> None:
                inputs[site] = args[0]

            return keep

        handles = [getattr(block, site).register_forward_pre_hook(hook(site)) for site in SITES]
        same = SameBits()
        for x, (_, *others) in zip(states, rest, strict=True):
            with same:
                block(x, *others)
            for site, vectors in inputs.items():
                grams[site].add(vectors)
        for handle in handles:
            handle.remove()
        yield f"blocks.{index}", {site: part.result() for site, part in grams.items()}
        with SameBits():
            states = [block(x, *others) for x, (_, *others) in zip(states, rest, strict=True)]
    head = _Gram()
    for x in states:
        with SameBits():
            x = model.norm(x)
        head.add(x)
    yield "", {"head": head.result()}


def collect_grams(model: Transformer, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """All of ``walk_grams`` of an unchanging model at once: "blocks.0.qkv" ... "head" -> [in, in].
    Holds every matrix: for a model of a billion weights that is several gigabytes."""
    return {
        f"{block}.{site}".strip("."): matrix
        for block, grams in walk_grams(model, batches)
        for site, matrix in grams.items()
    }
