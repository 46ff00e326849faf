"""One AdamW step over an adapter as one matrix of numbers (Loshchilov and Hutter, 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

COLUMNS = 1024  # numbers in a row of the flat adapter; the last row is padded with zeros


class AdamW(nn.Module):
    """Matrices are [rows, 1024] float32. Every number has a learning rate of its own, so that B may
    learn faster than A (LoRA+: Hayou, Ghosh and Yu, 2024).

    Sums of squares are taken row by row and then over the rows: one long sum would lose digits.
    """

    def __init__(self, beta1: float, beta2: float, eps: float) -> None:
        super().__init__()
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def forward(
        self,
        parameters: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        rate: Tensor,
        per_token: Tensor,
        most: Tensor,
        weight_decay: Tensor,
        mean_correction: Tensor,
        square_correction: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``rate`` is a matrix too, and what comes after it is [1, 1]: ``per_token`` is 1 / (labels
        of the batch), which turns the summed gradient into the mean loss's; ``most`` the global
        norm that it is clipped to; ``weight_decay`` what a number loses of itself, times its rate;
        the corrections are 1 / (1 − β₁ᵗ) and 1 / (1 − β₂ᵗ) of step t, from 1 on.

        -> parameters, mean, square, and the gradient's norm before clipping [1, 1].
        """
        gradient = gradient * per_token
        rows = gradient.shape[0]
        ones = torch.ones(1, COLUMNS, 1)
        sums = torch.bmm((gradient * gradient).view(1, rows, COLUMNS), ones)  # [1, rows, 1]
        norm = torch.sqrt(torch.bmm(torch.ones(1, 1, rows), sums)).view(1, 1)
        # As torch.nn.utils.clip_grad_norm_ does it.
        gradient = gradient * torch.clamp(most / (norm + 1e-6), max=1.0)
        mean = mean * self.beta1 + gradient * (1.0 - self.beta1)
        square = square * self.beta2 + gradient * gradient * (1.0 - self.beta2)
        step = mean * mean_correction / (torch.sqrt(square * square_correction) + self.eps)
        return parameters - rate * (parameters * weight_decay + step), mean, square, norm
