"""A bundle checks itself on the device: golden vectors, in seconds.

``golden/golden.json`` and ``golden/golden.safetensors`` hold a few real inputs with what the
reference gave for them at export (docs/parity.md). An app runs this once after a download, or after
an update of its runtime. Whatever runs the programs is a ``SelfTestEngine`` here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from runtime_py.bundle.adapter_forms import read_values, write_values
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.examples import Example
from runtime_py.engine.lm import ExecutorchLm
from runtime_py.engine.program_calls import ExecutorchPrograms, Programs
from runtime_py.engine.streaming import StreamingEngine
from runtime_py.loop.buffer import Buffer
from runtime_py.loop.errors import BundleError, TrainingError
from runtime_py.loop.lexicons import BUILTIN, Lexicons, read_lexicons
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Embedding
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.replacement import choose
from runtime_py.loop.words import words

FOLDER, JSON, TENSORS = "golden", "golden.json", "golden.safetensors"
FORMAT = 2
_SCORES = ("EOE", "DSS", "IDD")
_ODD, _RANGE = 2654435761, 1 << 32  # Knuth's multiplier: it spreads the numbers from 0 on
Values = Mapping[str, np.ndarray]


class SelfTestEngine(Protocol):
    def logits(self, tokens: np.ndarray, prompt: int, adapter: str) -> np.ndarray:
        """tokens int64 [n], the first ``prompt`` together and the others one by one, with the
        adapter ``initial`` or ``effect`` -> [1 + n - prompt, vocab] float32."""
        ...

    def embed(self, tokens: np.ndarray) -> tuple[np.ndarray, float]:
        """-> pooled [hidden] float32, entropy"""
        ...

    def gradient(self, example: Example) -> tuple[float, np.ndarray] | None:
        """With ``effect``: loss a label, and the summed loss's gradient as the flat adapter; None
        where the engine has no training programs."""
        ...


@dataclass(frozen=True)
class SelfCheck:
    """``max_rel``: largest difference as a part of the largest value expected; ``likeness``: the
    correlation, for logits the smallest of the rows. None is no bound."""

    program: str
    case: str
    max_abs: float
    max_rel: float
    likeness: float
    most: float | None
    least: float | None

    @property
    def passed(self) -> bool:
        near = self.most is None or self.max_rel <= self.most
        return near and (self.least is None or self.likeness >= self.least)


@dataclass(frozen=True, eq=False)
class Golden:
    """``document``: golden.json; ``tensors``: golden.safetensors."""

    document: Mapping[str, Any]
    tensors: Values


def effect(values: Values) -> dict[str, np.ndarray]:
    """The adapter with B no longer zero: number i of each B, counted in row-major order, is
    (i · 2654435761 mod 2³²) / 2³² · 0.1 − 0.05. In float64, rounded once."""
    changed = dict(values)
    for name, value in values.items():
        if ".lora_B" in name:
            spread = np.arange(value.size, dtype=np.uint64) * np.uint64(_ODD) % np.uint64(_RANGE)
            flat = spread.astype(np.float64) / _RANGE * 0.1 - 0.05
            changed[name] = flat.astype(np.float32).reshape(value.shape)
    return changed


def read_golden(bundle: Path) -> Golden | None:
    """None where the bundle has none. Raises ``BundleError`` where they cannot be read."""
    folder = bundle / FOLDER
    if not (folder / JSON).is_file():
        return None
    try:
        document = json.loads((folder / JSON).read_bytes())
        tensors = {name: np.array(value) for name, value in BaseWeights(folder / TENSORS).items()}
    except (UnicodeDecodeError, json.JSONDecodeError, TrainingError) as error:
        raise BundleError(f"the golden vectors in {folder} are damaged ({error}).") from error
    if document.get("format") != FORMAT:
        raise BundleError(
            f"the golden vectors in {folder} have the format {document.get('format')}, this attune "
            f"reads {FORMAT}: export the bundle again."
        )
    return Golden(document, tensors)


def self_test(
    golden: Golden, engine: SelfTestEngine, target: str, lexicons: Lexicons | None = None
) -> list[SelfCheck]:
    """Everything that ``golden`` has for ``target``, ``android`` or ``ios``. ``lexicons``: the
    bundle's; attune's own where None."""
    reference = golden.document["targets"][target]
    bounds: Mapping[str, Mapping[str, float | None]] = reference["tolerances"]
    checks: list[SelfCheck] = []
    for case in golden.document["cases"]:
        name, tokens = case["name"], np.array(case["tokens"], np.int64)
        for adapter in golden.document["adapters"]:
            place = f"{target}.{name}.{adapter}"
            ids = golden.tensors[f"{place}.ids"].astype(np.int64)  # [rows, K]
            expected = golden.tensors[f"{place}.logits"]
            logits = engine.logits(tokens, case["prompt"], adapter)
            rows = np.take_along_axis(logits, ids, axis=1)
            checks.append(judged("lm", f"{name}, {adapter}", rows, expected, bounds["logits"]))
        pooled, entropy = engine.embed(tokens)
        expected = golden.tensors[f"{target}.{name}.pooled"]
        checks.append(judged("embed", name, pooled, expected, bounds["pooled"]))
        entropies = np.array([entropy]), np.array([reference["entropy"][name]])
        # A share from 0 to 1, and near 0 where there is one token.
        checks.append(judged("embed: entropy", name, *entropies, bounds["entropy"], 1.0))
    if (training := golden.document["training"]) is not None:
        checks += _trained(golden, engine, training)
    if (stream := golden.document["decisions"].get(target)) is not None:
        checks += _decided(engine, stream, lexicons)
    return checks


class StorelessSelection:
    """Selection alone, without a store: scores a dialogue, and keeps it or not."""

    def __init__(self, policy: LoopPolicy, lexicons: Lexicons, hidden: int) -> None:
        self._policy, self._lexicons = policy, lexicons
        self.buffer = Buffer(policy.bins, len(lexicons.names), hidden)
        self._chance, self._number = SplitMix64(policy.seed), 0

    def observe(self, id: str, text: str, embedding: Embedding) -> dict[str, Any]:
        self._number += 1
        new = self.buffer.measure(id, self._number, words(text), embedding, self._lexicons)
        choice = choose(self.buffer, new, self._chance, self._policy)
        replaced = None if choice.bin is None else self.buffer.ids[choice.bin]
        if choice.bin is not None:
            self.buffer.put(choice.bin, new)
        self.buffer.see(new)
        scores = [new.scores.eoe, new.scores.dss, new.scores.idd]
        return {"id": id, "bin": choice.bin, "replaced": replaced, "scores": scores}


def policy_of(stream: Mapping[str, Any]) -> LoopPolicy:
    return LoopPolicy(selection=stream["selection"], bins=stream["bins"], seed=stream["seed"])


def _decided(
    engine: SelfTestEngine, stream: Mapping[str, Any], lexicons: Lexicons | None
) -> list[SelfCheck]:
    """The stream once more with this engine's vectors: its scores, and the same choices."""
    decisions: list[dict[str, Any]] = []
    selection: StorelessSelection | None = None
    for dialogue in stream["dialogues"]:
        pooled, entropy = engine.embed(np.array(dialogue["tokens"], np.int64))
        selection = selection or StorelessSelection(
            policy_of(stream), lexicons or read_lexicons(BUILTIN), len(pooled)
        )
        vector = Embedding(pooled.astype(np.float32), entropy)
        decisions.append(selection.observe(dialogue["id"], dialogue["text"], vector))
    expected, case = stream["expected"], f"{len(decisions)} dialogues"
    scores = [np.array([row["scores"] for row in rows]) for rows in (decisions, expected)]
    differ = sum(
        (a["bin"], a["replaced"]) != (b["bin"], b["replaced"])
        for a, b in zip(decisions, expected, strict=True)
    )
    scored = []
    for column, name in enumerate(_SCORES):
        pair = scores[0][:, column], scores[1][:, column]
        bound = {"most": stream["most"][column], "least": None}
        scored.append(judged(f"decisions: {name}", case, *pair, bound, 1.0))  # as they are
    choices = SelfCheck("decisions: kept and replaced", case, differ, differ, 1.0, 0.0, None)
    return [*scored, choices]


def _trained(
    golden: Golden, engine: SelfTestEngine, training: Mapping[str, Any]
) -> list[SelfCheck]:
    example = Example(
        training["case"],
        np.array(training["tokens"], np.int64),
        np.array(training["labels"], np.int64),
    )
    result = engine.gradient(example)
    if result is None:
        return []
    loss, gradient = result
    bounds = training["tolerances"]
    flat = gradient.reshape(-1)
    places = golden.tensors["training.places"].astype(np.int64)
    norm = float(np.linalg.norm(flat.astype(np.float64)))
    pairs = {
        "loss": (np.array([loss]), np.array([training["loss"]])),
        "gradient: norm": (np.array([norm]), np.array([training["gradient_norm"]])),
        "gradient": (flat[places], golden.tensors["training.gradient"]),
    }
    return [
        judged(name, training["case"], *pair, bounds[name.partition(":")[0]])
        for name, pair in pairs.items()
    ]


def judged(
    program: str,
    case: str,
    measured: np.ndarray,
    expected: np.ndarray,
    bound: Mapping[str, float | None],
    size: float | None = None,
) -> SelfCheck:
    """``measured`` against ``expected``, two arrays of one shape; of a matrix each row by itself.
    ``bound``: ``most`` as a part of ``size``, by default the largest value expected, ``least`` of
    the correlation; None is no bound."""
    values, reference = measured.astype(np.float64), expected.astype(np.float64)
    gap = float(np.abs(values - reference).max()) if np.isfinite(values).all() else np.inf
    size = size or max(float(np.abs(reference).max()), 1e-30)
    rows = zip(values, reference, strict=True) if reference.ndim == 2 else [(values, reference)]
    likeness = min(_likeness(a, b) for a, b in rows) if np.isfinite(gap) else 0.0
    return SelfCheck(program, case, gap, gap / size, likeness, bound["most"], bound["least"])


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    if a.size < 2:
        return 1.0
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else float(np.allclose(a, b))


def gradient_of(
    bundle: Bundle, programs: Programs, values: Values, example: Example
) -> tuple[float, np.ndarray]:
    """What ``SelfTestEngine.gradient`` asks for, streamed through ``programs``."""
    engine = StreamingEngine(programs, BaseWeights(bundle.training_weights), bundle.training)
    state = AdapterState.of(bundle.manifest.adapter.tensors, values)
    into = state.layout.zeros()
    loss, count = engine.gradient(state, [example], into)
    return loss / count, into


def adapter_files(bundle: Bundle, scratch: Path) -> tuple[dict[str, Path], Values]:
    """The files of ``initial`` and ``effect``, and the values of the second."""
    initial, tensors = bundle.android.adapter, bundle.manifest.adapter.tensors
    changed = effect(read_values(initial, tensors))
    write_values(scratch / "effect.ptd", initial, tensors, changed)
    return {"initial": initial, "effect": scratch / "effect.ptd"}, changed


class PhoneTest:
    """The bundle's Android programs in this process."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self._bundle = bundle
        self._scratch = tempfile.TemporaryDirectory(prefix="attune-self-test-")
        files, self._values = adapter_files(bundle, Path(self._scratch.name))
        self._lms = {
            name: ExecutorchLm(bundle.android.lm, file, threads) for name, file in files.items()
        }

    def logits(self, tokens: np.ndarray, prompt: int, adapter: str) -> np.ndarray:
        lm, ids = self._lms[adapter], torch.from_numpy(tokens)[None]
        rows = [lm.prefill(ids[:, :prompt]).clone()]
        rows += [lm.forward(ids[:, i : i + 1], i).clone() for i in range(prompt, len(tokens))]
        return torch.cat(rows).numpy()

    def embed(self, tokens: np.ndarray) -> tuple[np.ndarray, float]:
        pooled, entropy = self._lms["initial"].embed(torch.from_numpy(tokens)[None])
        return pooled.numpy().copy(), entropy

    def gradient(self, example: Example) -> tuple[float, np.ndarray] | None:
        if self._bundle.manifest.training is None:
            return None
        runner = ExecutorchPrograms(self._bundle.path, self._bundle.android.training_programs)
        return gradient_of(self._bundle, runner, self._values, example)
