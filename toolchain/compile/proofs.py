"""What an export proves of its own work before it lets go of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from exporters.errors import ExportError
from exporters.model.transformer import Transformer
from runtime_py.bundle.flat_tensor import write_ptd
from runtime_py.engine.lm import ExecutorchLm
from toolchain.compile import spread
from toolchain.compile.tolerances import ABOVE, model_terms, of_int8, rounding
from toolchain.compile.wide import Wide

LEAST_CHANGE = 1e-3  # of the logits' range: what an adapter with an effect changes at least
LIKE_ON_TEXT = 0.95  # a limit on power: correlation of logits after real text, at any precision
PROMPT = 32  # tokens of the check


def _relative(measured: Tensor, expected: Tensor) -> float:
    return ((measured - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@torch.no_grad()
def equal_to_hugging_face(
    model: Transformer, reference: PreTrainedModel, texts: Sequence[Tensor]
) -> float:
    """Compares our transformer (adapter without effect) with the Hugging Face module on real text.

    Returns the largest relative difference of the logits; raises ``ExportError`` where it is more
    than float32 explains: then this architecture's computation is not the one we built.
    """
    worst = 0.0
    for tokens in sorted(texts, key=lambda t: -t.shape[1])[:2]:
        expected = reference(tokens).logits
        if not expected.isfinite().all():
            raise ExportError(
                "the model's logits on real text are NaN or infinite, in transformers too: its "
                "weights are damaged or out of float32's range."
            )
        error = _relative(model(tokens), expected)
        allowed = rounding(model_terms(model.spec, tokens.shape[1]))
        if error > allowed:  # the format alone does not explain it: do sums cancel in transformers?
            with Wide():
                exact = reference(tokens).logits
            allowed = max(allowed, ABOVE * _relative(expected, exact))
        if not error <= allowed:  # NaN neither
            raise ExportError(
                f"the transformer built for {model.spec.architecture} differs from Hugging Face's "
                f"by {error:.2g} of the logits' range on real text (at most {allowed:.2g} is "
                f"expected): this model computes something that attune does not know; please "
                f"report it."
            )
        worst = max(worst, error)
    return worst


def with_effect(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The adapter with a B that is not zero, so that it changes what the model says."""
    random = np.random.default_rng(1)
    changed = dict(arrays)
    for name, array in arrays.items():
        part = name.rsplit(".", 1)[-1]
        if part.startswith("lora_"):
            changed[name] = random.normal(0, 0.05, array.shape).astype(np.float32)
        elif part == "scale":
            changed[name] = np.full(array.shape, 2.0, np.float32)
    return changed


@torch.no_grad()
def android_program(
    program: Path,
    adapter: Path,
    model: Transformer,
    arrays: Mapping[str, np.ndarray],
    text: Tensor,
) -> None:
    """Runs the lowered program on ``text`` [1, S]: equal to PyTorch with the same weights, in one
    call and token by token; and another adapter file changes its logits. Raises ``ExportError``
    where it is not so.
    """
    tokens = text[:, : min(PROMPT, model.spec.context // 2)]
    rows = model(tokens)
    expected = rows[:, -1]
    if model.is_float:
        most, least = rounding(model_terms(model.spec, tokens.shape[1])), -1.0
    else:
        last = spread.of_int8(model, [lambda one: one(tokens)[:, -1].numpy()])
        most, least = math.inf, max(LIKE_ON_TEXT, of_int8(last).likeness or LIKE_ON_TEXT)
    lm = ExecutorchLm(program, adapter)
    prompt_logits = lm.prefill(tokens)
    stepwise = lm.all_logits(tokens)[:, -1]
    for name, logits in (("in one call", prompt_logits), ("token by token", stepwise)):
        error = _relative(logits, expected)
        likeness = torch.corrcoef(torch.cat([logits, expected]))[0, 1].item()
        if model.is_float and error > most:
            with Wide():
                exact = model(tokens)[:, -1]
            most = max(most, ABOVE * _relative(expected, exact))
        if not (error <= most and likeness >= least):
            raise ExportError(
                f"lm.pte computes other logits than PyTorch with the same weights, {name}: off by "
                f"{error:.2g} of their range, correlation {likeness:.5f} (at most {most:.2g}, at "
                f"least {least:.5f})."
            )
    trial = adapter.with_name("trial.ptd")
    write_ptd(trial, with_effect(arrays))
    changed = ExecutorchLm(program, trial).prefill(tokens)
    trial.unlink()
    if not _relative(changed, prompt_logits) > LEAST_CHANGE:
        raise ExportError(
            "another adapter file does not change the logits of lm.pte: the adapter is not bound."
        )
