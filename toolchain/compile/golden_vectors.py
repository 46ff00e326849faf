"""Writes a bundle's golden vectors: real inputs, and what the reference gives for them.

The reference is PyTorch with the very weights of each target's programs, and for training autograd
over the whole transformer. docs/parity.md has the format; ``runtime_py.engine.self_test`` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from exporters.model.lora_tensors import set_adapter
from exporters.model.transformer import Transformer
from exporters.training.programs import TrainingSpec
from exporters.training.weights_file import as_stored
from runtime_py.bundle.adapter_state import FlatLayout
from runtime_py.bundle.manifest import AdapterTensor
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.engine.self_test import (
    FOLDER,
    FORMAT,
    JSON,
    TENSORS,
    StorelessSelection,
    effect,
    policy_of,
)
from runtime_py.loop.lexicons import read_lexicons
from runtime_py.loop.protocols import Embedding
from runtime_py.loop.words import words
from toolchain.compile.autograd import WholeGradient, autograd_gradient
from toolchain.compile.golden_bounds import Reading, tolerances
from toolchain.compile.golden_scores import remembered, score_spread
from toolchain.compile.mean_vector import embedding
from toolchain.compile.tolerances import of_gradient, of_loss

PROMPT, DECODED = 33, 4  # tokens of a case
TOP, SAMPLED = 16, 48  # logits of each position: the largest, and others evenly over the vocabulary
GRADIENTS = 512  # numbers of the flat gradient, evenly over it
_DIALOGUES = 3
_STREAM, _BINS = 10, 4
_REFUSED = 4  # dialogues that no bin takes at most: others replace
_PLACES = 256  # tokens of the training case at most


@dataclass(frozen=True, eq=False)
class GoldenReference:
    """One target: its precision, and the transformer with its programs' weights."""

    quantize: str
    model: Transformer


@dataclass(frozen=True, eq=False)
class GoldenTraining:
    """``model``: the one that the weights file was written from; ``lengths``: in tokens."""

    model: Transformer
    spec: TrainingSpec
    lengths: Sequence[int]


def write_golden(
    folder: Path,
    *,
    texts: Sequence[torch.Tensor],
    dialogues: Mapping[str, tuple[str, list[int]]],
    eos: int,
    adapter: Mapping[str, np.ndarray],
    layout: Sequence[AdapterTensor],
    embed_length: int,
    references: Mapping[str, GoldenReference],
    training: GoldenTraining,
) -> None:
    """Writes ``golden/`` into the bundle ``folder``.

    ``texts``: real dialogues as tokens [1, S] each; ``dialogues``: text and tokens of some by id;
    ``eos``: a token that ends a reply; ``adapter``: the bundle's, by the programs' names, which
    ``layout`` has; ``embed_length``: tokens that ``embed`` reads at most; ``references``: by
    target. The models' adapters are afterwards what they were.
    """
    (folder / FOLDER).mkdir()
    initial = {t.name: np.asarray(adapter[t.name], np.float32) for t in layout}
    adapters = {"initial": initial, "effect": effect(initial)}
    spec = training.model.spec
    cases = _cases(texts, eos, min(spec.context, embed_length), spec.vocab)
    tensors: dict[str, np.ndarray] = {}
    targets: dict[str, dict] = {}
    for target, reference in references.items():
        targets[target], values = _target(target, reference, cases, adapters)
        set_adapter(reference.model, initial)
        tensors |= values
    decisions = {
        target: _decisions(target, reference, dialogues, embed_length)
        for target, reference in references.items()
    }
    case, values = _training(training, texts, layout, adapters["effect"])
    tensors |= values
    golden = {
        "format": FORMAT,
        "adapters": list(adapters),
        "cases": cases,
        "targets": targets,
        "training": case,
        "decisions": decisions,
    }
    text = json.dumps(golden, indent=1, ensure_ascii=False)
    (folder / FOLDER / JSON).write_text(text + "\n", encoding="utf-8")
    # Not the library's save_file, whose error for a full disk is no OSError.
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    (folder / FOLDER / TENSORS).write_bytes(save(arrays))


def _target(
    target: str,
    reference: GoldenReference,
    cases: Sequence[dict],
    adapters: Mapping[str, Mapping[str, np.ndarray]],
) -> tuple[dict, dict[str, np.ndarray]]:
    """A target's section, and the tensors of its cases."""
    tensors: dict[str, np.ndarray] = {}
    for adapter, values in adapters.items():
        set_adapter(reference.model, values)
        for case in cases:
            rows = _logits(reference.model, case["tokens"])[case["prompt"] - 1 :]
            ids = _chosen(rows)
            place = f"{target}.{case['name']}.{adapter}"
            # The runtime reads float32 and int8 only; token ids are exact in float32.
            tensors[f"{place}.ids"] = ids.astype(np.float32)
            tensors[f"{place}.logits"] = np.take_along_axis(rows, ids, axis=1)
    entropies = {}
    for case in cases:
        pooled, entropy = embedding(reference.model, case["tokens"])
        tensors[f"{target}.{case['name']}.pooled"] = pooled
        entropies[case["name"]] = entropy
    section = {
        "quantize": reference.quantize,
        "tolerances": tolerances(
            target, reference.model, _READING, [case["tokens"] for case in cases]
        ),
        "entropy": entropies,
    }
    return section, tensors


def stream(
    dialogues: Sequence[Sequence[Mapping[str, str]]], texts: Sequence[torch.Tensor]
) -> dict[str, tuple[str, list[int]]]:
    """Dialogues by id: their contents joined by newlines, and their tokens. ``texts`` are the same
    dialogues, or shorter for those that hold no text."""
    if len(dialogues) != len(texts):
        return {}
    return {
        f"dialogue-{number}": ("\n".join(turn["content"] for turn in turns), text[0].tolist())
        for number, (turns, text) in enumerate(zip(dialogues, texts, strict=True))
    }


def _cases(texts: Sequence[torch.Tensor], eos: int, longest: int, vocab: int) -> list[dict]:
    whole = min(PROMPT + DECODED, longest)
    step = max(1, len(texts) // _DIALOGUES)
    chosen = [text for text in texts if text.shape[1] >= whole] or list(texts)
    cases: list[dict] = []
    for number in range(min(_DIALOGUES, len(chosen))):
        tokens = chosen[number * step % len(chosen)][0, :whole].tolist()
        prompt = max(1, len(tokens) - DECODED)
        cases.append({"name": f"dialogue-{number}", "tokens": tokens, "prompt": prompt})
    first = chosen[0][0, :whole].tolist()
    word = first[len(first) // 2]
    odd: dict[str, tuple[list[int], int]] = {
        "one-token": (first[:1], 1),
        "repeated": ([word] * min(24, longest), min(24, longest)),
        "odd-tokens": (([*first[:4], eos, vocab - 1, 0, eos] * 2)[:longest], min(16, longest)),
    }
    cases += [{"name": name, "tokens": t, "prompt": prompt} for name, (t, prompt) in odd.items()]
    return cases


@torch.no_grad()
def _logits(model: Transformer, tokens: Sequence[int]) -> np.ndarray:
    return model(torch.tensor([list(tokens)]))[0].numpy()


def _chosen(rows: np.ndarray) -> np.ndarray:
    """The ids whose logits are kept: int64 [rows, K]."""
    top = np.argsort(-rows, axis=1, kind="stable")[:, : min(TOP, rows.shape[1])]
    spread = np.linspace(0, rows.shape[1] - 1, SAMPLED).astype(np.int64)
    return np.concatenate([top, np.broadcast_to(spread, (len(rows), SAMPLED))], axis=1)


_READING = Reading(_logits, embedding)


def _decisions(
    target: str,
    reference: GoldenReference,
    stream: Mapping[str, tuple[str, list[int]]],
    embed_length: int,
) -> dict:
    """What selection does with a stream of real dialogues, so that every choice is one to agree on.
    A dialogue is left out where its scores are too close to a stored set's for the precision to
    tell, and where its own rounding would make them, or those of a choice before it, too close."""
    policy = {"selection": "paper", "bins": _BINS, "seed": 0}
    loop = StorelessSelection(policy_of(policy), read_lexicons(), reference.model.spec.hidden)
    cut = {name: ids[:embed_length] for name, (_, ids) in stream.items()}
    longest = max(map(len, cut.values()), default=1)
    embed = remembered(reference.model, embedding)
    spread = score_spread(target, reference.model, embed, embedding, longest)
    first = list(cut)[:_STREAM]
    for name in first:
        spread = spread.adding(cut[name])
    choices: list[np.ndarray] = []
    refused = 0
    dialogues, expected = [], []
    for name, (text, _) in stream.items():
        tokens = cut[name]
        measured = Embedding(*embed(tokens))
        if len(loop.buffer) == _BINS:
            new = loop.buffer.measure(name, 0, words(text), measured, read_lexicons()).scores
            gaps = np.array([new.eoe, new.dss, new.idd]) - loop.buffer.scores
            refusal = not (gaps > 0).all(axis=1).any()
            if not spread.bounds.tell(gaps) or (refusal and refused == _REFUSED):
                continue
            wider = spread if name in first else spread.adding(tokens)
            if not all(map(wider.bounds.tell, (*choices, gaps))):
                continue
            spread, refused = wider, refused + refusal
            choices.append(gaps)
        expected.append(loop.observe(name, text, measured))
        dialogues.append({"id": name, "text": text, "tokens": tokens})
        if len(dialogues) == _STREAM:
            break
    most = spread.bounds.each
    return {**policy, "most": most, "dialogues": dialogues, "expected": expected}


def _training(
    training: GoldenTraining,
    texts: Sequence[torch.Tensor],
    layout: Sequence[AdapterTensor],
    values: Mapping[str, np.ndarray],
) -> tuple[dict, dict[str, np.ndarray]]:
    """Loss and gradient of one dialogue, its first quarter without labels."""
    longest = min(_PLACES, *training.lengths) if training.lengths else _PLACES
    text = max(texts, key=lambda t: min(t.shape[1], longest))[0, :longest]
    labels = text.clone()
    labels[: max(1, len(text) // 4)] = IGNORED
    example = Example("golden", text.numpy(), labels.numpy())
    model = as_stored(training.model, training.spec)
    whole = autograd_gradient(model, values, [example])
    flat = FlatLayout.of(layout)
    gradient = flat.zeros()
    views = flat.views(gradient)
    for name, grad in whole.gradients.items():
        views[name][...] = grad
    line = gradient.reshape(-1)
    used = sum(int(np.prod(shape)) for _, shape in flat.places.values())
    places = np.linspace(0, used - 1, GRADIENTS).astype(np.int64)
    # Exact in float32 up to 2²⁴; larger adapters take places that are.
    exact = np.unique(places.astype(np.float32).astype(np.int64).clip(0, used - 1))
    case = {
        "case": "dialogue",
        "tokens": text.tolist(),
        "labels": labels.tolist(),
        "loss": whole.loss / example.count,
        "gradient_norm": float(np.linalg.norm(line.astype(np.float64))),
        "tolerances": _training_bounds(model, whole, example, line[exact]),
    }
    return case, {
        "training.places": exact.astype(np.float32),
        "training.gradient": line[exact],
    }


def _training_bounds(
    model: Transformer, whole: WholeGradient, example: Example, sample: np.ndarray
) -> dict:
    """As parts of the loss a label, and of the largest of ``sample``: what they are read by."""
    loss, tokens = whole.loss / example.count, len(example.tokens)
    off = (of_loss(model.spec, tokens).max_rel or 0.0) * (whole.largest_logit + loss) / loss
    greatest = max(float(np.abs(gradient).max()) for gradient in whole.gradients.values())
    steep = of_gradient(model.spec, tokens).max_rel or 0.0
    steep *= greatest / max(float(np.abs(sample).max()), 1e-30)
    return {"loss": {"most": off, "least": None}, "gradient": {"most": steep, "least": None}}
