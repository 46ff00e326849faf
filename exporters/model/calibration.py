"""What the inputs of a transformer's matrices look like on a calibration text: Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from exporters.model.plain_attention import plain_attention
from exporters.model.transformer import Transformer

SITES = ("qkv", "o", "gate_up", "down")


class _Tap(nn.Module):
    """Stands in for a block: lets its input pass, and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def forward(self, *args):
        self.calls.append(args)
        return args[0]


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


def _add(total: Tensor | None, x: Tensor) -> Tensor:
    """total + Σ x xᵀ over the vectors of x [..., in]."""
    flat = x.detach().flatten(0, -2).float()
    if total is None:
        total = torch.zeros(flat.shape[1], flat.shape[1])
    return total.addmm_(flat.T, flat)


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
    calls = _block_calls(model, batches)
    states = [first for first, *_ in calls[0]]
    for index, rest in enumerate(calls):
        grams: dict[str, Tensor] = {}

        def hook(site: str, grams: dict[str, Tensor] = grams):
            def keep(module: nn.Module, args: tuple) -> None:
                grams[site] = _add(grams.get(site), args[0])

            return keep

        handles = [
            getattr(model.blocks[index], site).register_forward_pre_hook(hook(site))
            for site in SITES
        ]
        for x, (_, *others) in zip(states, rest, strict=True):
            model.blocks[index](x, *others)
        for handle in handles:
            handle.remove()
        yield f"blocks.{index}", grams
        states = [
            model.blocks[index](x, *others) for x, (_, *others) in zip(states, rest, strict=True)
        ]
    head: Tensor | None = None
    for x in states:
        head = _add(head, model.norm(x))
    assert head is not None
    yield "", {"head": head}


def collect_grams(model: Transformer, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """All of ``walk_grams`` of an unchanging model at once: "blocks.0.qkv" ... "head" -> [in, in].
    Holds every matrix: for a model of a billion weights that is several gigabytes."""
    return {
        f"{block}.{site}".strip("."): gram
        for block, grams in walk_grams(model, batches)
        for site, gram in grams.items()
    }
