"""The products of a block: matrices that share one input, and their low-rank updates."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exporters.model.lora_targets import LoraTarget


class LoRA(nn.Module):
    """The low-rank update of one target (Hu et al., 2021), in PEFT's own layouts.

    ``lora_A`` [1, r, in], ``lora_B`` [1, rows, r] (``lora_B_0``, ``lora_B_1``, … where the target
    is several of our matrices), ``scale`` [1, 1, 1] its α/r.
    """

    lora_A: Tensor  # noqa: N815  (PEFT's name)
    scale: Tensor

    def __init__(self, target: LoraTarget, rank: int) -> None:
        super().__init__()
        self.target = target
        self.register_buffer("lora_A", torch.zeros(1, rank, target.inputs))
        self.register_buffer("scale", torch.zeros(1, 1, 1))
        for name, rows in zip(self.b_names, target.rows, strict=True):
            self.register_buffer(name, torch.zeros(1, rows, rank))

    @property
    def b_names(self) -> list[str]:
        many = len(self.target.rows) > 1
        return [f"lora_B_{i}" if many else "lora_B" for i in range(len(self.target.rows))]

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [1, S, in] -> the update of each matrix [1, S, rows].

        The adapter is the second operand, which XNNPACK repacks at each call: for one token that is
        cheaper than padding x.
        """
        down = torch.bmm(x, self.lora_A.permute(0, 2, 1)) * self.scale  # [1, S, r]
        return [torch.bmm(down, getattr(self, name).permute(0, 2, 1)) for name in self.b_names]


class Projection(nn.Module):
    """The matrices that share one input, each with its low-rank update if it has one."""

    bases: MutableSequence[Any]  # Dense or quantized

    def __init__(self, bases: Sequence[nn.Module], loras: Sequence[LoRA | None]) -> None:
        super().__init__()
        self.bases = nn.ModuleList(bases)  # type: ignore[assignment]
        self.loras = nn.ModuleList(lora or nn.Identity() for lora in loras)

    def forward(self, x: Tensor, adapted: bool) -> list[Tensor]:
        """x [1, S, in] -> for each matrix [1, S, rows]."""
        prepared = self.bases[0].prepare(x)
        outputs = [base(prepared) for base in self.bases]
        loras = [m for m in self.loras if isinstance(m, LoRA)]
        if not (loras and adapted):
            return outputs
        start = 0
        for lora in self.loras:
            if not isinstance(lora, LoRA):
                start += 1
                continue
            for update in lora(x):
                outputs[start] = outputs[start] + update
                start += 1
        return outputs
