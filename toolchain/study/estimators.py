"""Estimators of a dialogue's entropy of embedding, by name: what the score EOE may be.

The paper says that a set's tokens carry information and not how p comes from their vectors.
``norm`` is what the ``embed`` program computes; the others are compared to it in the study.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from exporters.model.transformer import Transformer
from toolchain.study.batched import Batch, middle_states

Estimator = Callable[["TokenVectors"], np.ndarray]
ESTIMATORS: dict[str, Estimator] = {}
BAND_CENTRE = 3.0  # nats a token


@dataclass(frozen=True, eq=False)
class TokenVectors:
    """What an estimator sees of a call: ``vectors`` [N, hidden] after the final norm, of the base
    model; ``batch``: its tokens."""

    model: Transformer
    batch: Batch
    vectors: Tensor

    def each(self) -> tuple[Tensor, ...]:
        """Each sequence's vectors [n, hidden]."""
        return self.vectors.split(self.batch.counts)

    def middle(self) -> list[Tensor]:
        """Each sequence's vectors [n, hidden] after half of the layers, float64."""
        states = middle_states(self.model, self.batch)
        return [row.double() for row in states.split(self.batch.counts)]


def estimator(name: str) -> Callable[[Estimator], Estimator]:
    def register(function: Estimator) -> Estimator:
        ESTIMATORS[name] = function
        return function

    return register


@estimator("norm")
def norm(seen: TokenVectors) -> np.ndarray:
    """−Σ p ln p / ln n with p the tokens' share of the norms; 0 for one token."""
    values = []
    for vectors in seen.each():
        norms = vectors.double().norm(dim=-1)
        p = norms / norms.sum().clamp(min=1e-300)
        nats = -torch.where(p > 0, p * torch.log(p.clamp(min=1e-300)), 0.0).sum()
        values.append(float(nats) / math.log(len(p)) if len(p) > 1 else 0.0)
    return np.array(values)


@estimator("renyi2")
def renyi2(seen: TokenVectors) -> np.ndarray:
    """Rényi's entropy of order 2 of the middle layer's centred unit vectors, without the first
    token: −ln ‖Z Zᵀ / n‖² in nats (matrix-based: Giraldo et al., 2015); 0 below three tokens, and
    where they are all alike."""
    values = []
    for vectors in seen.middle():
        rest = vectors[1:]
        if len(rest) < 2:
            values.append(0.0)
            continue
        centred = rest - rest.mean(0)
        unit = centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
        gram = unit @ unit.T / len(unit)
        square = float((gram * gram).sum())
        values.append(-math.log(square) if square else 0.0)
    return np.array(values)


@estimator("surprisal")
def surprisal(seen: TokenVectors) -> np.ndarray:
    """Mean surprisal of the tokens under the base model, in nats; 0 for one token."""
    values = []
    for vectors, tokens in zip(
        seen.each(), seen.batch.tokens.split(seen.batch.counts), strict=True
    ):
        logits = seen.model.logits(vectors[:-1])
        told = nn.functional.cross_entropy(logits, tokens[1:]) if len(tokens) > 1 else 0.0
        values.append(float(told))
    return np.array(values)


@estimator("surprisal_band")
def surprisal_band(seen: TokenVectors) -> np.ndarray:
    """−|mean surprisal − ``BAND_CENTRE``|: what is too easy and what is too hard both lose."""
    return -np.abs(surprisal(seen) - BAND_CENTRE)


@estimator("nuclear")
def nuclear(seen: TokenVectors) -> np.ndarray:
    """Nuclear norm of the matrix of next-token probabilities P [n, vocab], over n (Cui et al.,
    2020): high where predictions are sure and differ from each other."""
    values = []
    for vectors in seen.each():
        p = torch.softmax(seen.model.logits(vectors).double(), dim=-1)
        spectrum = torch.linalg.eigvalsh(p @ p.T).clamp(min=0.0)  # squares of singular values
        values.append(float(spectrum.sqrt().sum()) / len(p))
    return np.array(values)
