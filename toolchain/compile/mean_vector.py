"""The mean of dialogues' vectors, which a bundle brings: without it they are nearly parallel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from exporters.coreml.functions import Embed
from exporters.model.transformer import Transformer
from runtime_py.bundle.bundle import MEAN_VECTOR


@torch.no_grad()
def embedding(model: Transformer, tokens: Sequence[int]) -> tuple[np.ndarray, float]:
    """A text's vector, float32 [hidden], and its entropy, as ``embed`` computes them."""
    count = len(tokens)
    pooled, entropy = Embed(model, count)(
        torch.tensor([list(tokens)], dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
    )
    return pooled.numpy(), float(entropy)


def write_mean_vector(
    folder: Path, model: Transformer, texts: Sequence[torch.Tensor], embed_length: int
) -> None:
    """Writes the mean over ``texts``, tokens [1, S] each, of which ``embed`` reads
    ``embed_length`` at most, into the bundle ``folder``."""
    vectors = [embedding(model, text[0, :embed_length].tolist())[0] for text in texts]
    mean = np.mean(np.stack(vectors), axis=0, dtype=np.float64)  # [hidden]
    (folder / MEAN_VECTOR).write_bytes(mean.astype("<f4").tobytes())
