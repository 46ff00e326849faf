"""What pieces compute, as modules to be lowered, and the stand-in for one while it is traced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from exporters.model.lora_tensors import ENTER, LEAVE, lora_buffers
from exporters.model.transformer import Block, Norm, Rotation, Transformer


class PieceBody(nn.Module):
    """End of one block, beginning of the next, or one of the two."""

    swap: Tensor | None

    def __init__(
        self, leave: Block | None, enter: Block | None, swap: Tensor | None, adapted: bool
    ):
        super().__init__()
        self.leave, self.enter, self.adapted = leave, enter, adapted
        self.register_buffer("swap", swap)

    def forward(self, x: Tensor, mixed: Tensor | None, tables: Sequence[Tensor]) -> list[Tensor]:
        out = []
        if self.leave is not None and mixed is not None:
            x = self.leave.leave(x, mixed, self.adapted)
            out.append(x)
        if self.enter is not None:
            rotation = Rotation(tables[0], tables[1], self.swap) if self.swap is not None else None
            out += self.enter.enter(x, rotation, self.adapted)
        return out

    def adapter(self) -> list[str]:
        names = []
        if self.adapted and self.leave is not None:
            names += [f"leave.{name}" for name, _ in lora_buffers(self.leave, LEAVE)]
        if self.adapted and self.enter is not None:
            names += [f"enter.{name}" for name, _ in lora_buffers(self.enter, ENTER)]
        return names


class PieceFunction(nn.Module):
    """A body as a function of x, attention's output, cos and sin, and the adapter's tensors."""

    def __init__(self, body: PieceBody) -> None:
        super().__init__()
        self.body = body
        self.names = body.adapter()

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        rest = list(tensors[1:])
        mixed = rest.pop(0) if self.body.leave is not None else None
        tables = [rest.pop(0), rest.pop(0)] if self.body.swap is not None else []
        adapter = dict(zip(self.names, rest, strict=True))
        return torch.func.functional_call(self.body, adapter, (tensors[0], mixed, tables))


class FinalPiece(nn.Module):
    """The last norm and the head: x [1, 1, hidden] -> logits [1, 1, vocab]."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return [self.model.logits(self.model.norm(tensors[0]))]


class NormPiece(nn.Module):
    """The last norm: x [1, S, hidden]."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return [self.norm(tensors[0])]


class ShapesOnly(nn.Module):
    """Stands for a lowered piece while the program around it is traced: only shapes matter."""

    def __init__(self, outputs: Sequence[tuple[int | None, ...]]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        length = tensors[0].shape[1]
        return [
            tensors[0].new_empty([length if size is None else size for size in shape])
            for shape in self.outputs
        ]
