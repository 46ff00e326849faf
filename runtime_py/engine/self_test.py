"""A bundle checks itself on the device: golden vectors, in seconds.

``golden/golden.json`` and ``golden/golden.safetensors`` hold a few real inputs with what the
reference gave for them at export (docs/parity.md). An app runs this once after a download, or after
an update of its runtime. Whatever runs the programs is an ``Engine`` here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.manifest import AdapterTensor, BundleError, Manifest
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.examples import Example
from runtime_py.engine.job_runner import read_values, write_values
from runtime_py.engine.lm import ExecutorchLm
from runtime_py.engine.program_calls import ExecutorchPrograms, Programs
from runtime_py.engine.streaming import StreamingEngine
from runtime_py.engine.training_error import TrainingError
from runtime_py.loop.buffer import Buffer
from runtime_py.loop.lexicons import BUILTIN, Lexicons, read_lexicons
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Embedding
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.replacement import choose
from runtime_py.loop.words import words

FOLDER, JSON, TENSORS = "golden", "golden.json", "golden.safetensors"
FORMAT = 1
_ODD, _RANGE = 2654435761, 1 << 32  # Knuth's multiplier: it spreads the numbers from 0 on
Values = Mapping[str, np.ndarray]


class Engine(Protocol):
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
    said: Mapping[str, Any]
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
        said = json.loads((folder / JSON).read_bytes())
        tensors = {name: np.array(value) for name, value in BaseWeights(folder / TENSORS).items()}
    except (UnicodeDecodeError, json.JSONDecodeError, TrainingError) as error:
        raise BundleError(f"the golden vectors in {folder} are damaged ({error}).") from error
    if said.get("format") != FORMAT:
        raise BundleError(
            f"the golden vectors in {folder} have the format {said.get('format')}, this attune "
            f"reads {FORMAT}: export the bundle again."
        )
    return Golden(said, tensors)


def self_test(
    golden: Golden, engine: Engine, target: str, lexicons: Lexicons | None = None
) -> list[SelfCheck]:
    """Everything that ``golden`` has for ``target``, ``android`` or ``ios``. ``lexicons``: the
    bundle's; attune's own where None."""
    own = golden.said["targets"][target]
    bounds: Mapping[str, Mapping[str, float | None]] = own["tolerances"]
    checks: list[SelfCheck] = []
    for case in golden.said["cases"]:
        name, tokens = case["name"], np.array(case["tokens"], np.int64)
        for adapter in golden.said["adapters"]:
            place = f"{target}.{name}.{adapter}"
            ids = golden.tensors[f"{place}.ids"].astype(np.int64)  # [rows, K]
            expected = golden.tensors[f"{place}.logits"]
            found = engine.logits(tokens, case["prompt"], adapter)
            rows = np.take_along_axis(found, ids, axis=1)
            checks.append(judged("lm", f"{name}, {adapter}", rows, expected, bounds["logits"]))
        pooled, entropy = engine.embed(tokens)
        want = golden.tensors[f"{target}.{name}.pooled"]
        checks.append(judged("embed", name, pooled, want, bounds["pooled"]))
        one, other = np.array([entropy]), np.array([own["entropy"][name]])
        # A share from 0 to 1, and near 0 where there is one token.
        checks.append(judged("embed: entropy", name, one, other, bounds["entropy"], 1.0))
    if (training := golden.said["training"]) is not None:
        checks += _trained(golden, engine, training)
    if (stream := golden.said["decisions"].get(target)) is not None:
        checks += _decided(engine, stream, lexicons)
    return checks


class Loop:
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
        scores = [new.scores.eoe, new.scores.dss, new.scores.idd]
        return {"id": id, "bin": choice.bin, "replaced": replaced, "scores": scores}


def policy_of(said: Mapping[str, Any]) -> LoopPolicy:
    return LoopPolicy(selection=said["selection"], bins=said["bins"], seed=said["seed"])


def _decided(engine: Engine, said: Mapping[str, Any], lexicons: Lexicons | None) -> list[SelfCheck]:
    """The stream once more with this engine's vectors: its scores, and the same choices."""
    own: list[dict[str, Any]] = []
    loop: Loop | None = None
    for dialogue in said["dialogues"]:
        pooled, entropy = engine.embed(np.array(dialogue["tokens"], np.int64))
        loop = loop or Loop(policy_of(said), lexicons or read_lexicons(BUILTIN), len(pooled))
        vector = Embedding(pooled.astype(np.float32), entropy)
        own.append(loop.observe(dialogue["id"], dialogue["text"], vector))
    want, case = said["expected"], f"{len(own)} dialogues"
    scores = [np.array([row["scores"] for row in rows]) for rows in (own, want)]
    differ = sum(
        (a["bin"], a["replaced"]) != (b["bin"], b["replaced"])
        for a, b in zip(own, want, strict=True)
    )
    bound = {"most": said["most"], "least": None}
    scored = judged("decisions: scores", case, scores[0].ravel(), scores[1].ravel(), bound)
    choices = SelfCheck("decisions: kept and replaced", case, differ, differ, 1.0, 0.0, None)
    return [scored, choices]


def _trained(golden: Golden, engine: Engine, said: Mapping[str, Any]) -> list[SelfCheck]:
    example = Example(
        said["case"], np.array(said["tokens"], np.int64), np.array(said["labels"], np.int64)
    )
    result = engine.gradient(example)
    if result is None:
        return []
    loss, gradient = result
    bounds = said["tolerances"]
    flat = gradient.reshape(-1)
    places = golden.tensors["training.places"].astype(np.int64)
    norm = float(np.linalg.norm(flat.astype(np.float64)))
    pairs = {
        "loss": (np.array([loss]), np.array([said["loss"]])),
        "gradient: norm": (np.array([norm]), np.array([said["gradient_norm"]])),
        "gradient": (flat[places], golden.tensors["training.gradient"]),
    }
    return [
        judged(name, said["case"], *pair, bounds[name.partition(":")[0]])
        for name, pair in pairs.items()
    ]


def judged(
    program: str,
    case: str,
    found: np.ndarray,
    expected: np.ndarray,
    bound: Mapping[str, float | None],
    size: float | None = None,
) -> SelfCheck:
    """``size``: what differences are a part of, where that is not the largest value expected."""
    own, want = found.astype(np.float64), expected.astype(np.float64)
    gap = float(np.abs(own - want).max()) if np.isfinite(own).all() else np.inf
    size = size or max(float(np.abs(want).max()), 1e-30)
    rows = zip(own, want, strict=True) if want.ndim == 2 else [(own, want)]
    likeness = min(_likeness(a, b) for a, b in rows) if np.isfinite(gap) else 0.0
    return SelfCheck(program, case, gap, gap / size, likeness, bound["most"], bound["least"])


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    if a.size < 2:
        return 1.0
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else float(np.allclose(a, b))


def gradient_of(
    bundle: Path, manifest: Manifest, programs: Programs, values: Values, example: Example
) -> tuple[float, np.ndarray]:
    """What ``Engine.gradient`` asks for, streamed through ``programs``."""
    assert manifest.training is not None
    weights = BaseWeights(bundle / manifest.training.weights)
    engine = StreamingEngine(programs, weights, manifest.training)
    state = AdapterState.of(manifest.adapter.tensors, values)
    into = state.layout.zeros()
    loss, count = engine.gradient(state, [example], into)
    return loss / count, into


def adapter_files(
    bundle: Path, runtime: str, tensors: Sequence[AdapterTensor], scratch: Path
) -> tuple[dict[str, Path], Values]:
    """The files of ``initial`` and ``effect``, and the values of the second."""
    own = bundle / runtime
    changed = effect(read_values(own, tensors))
    write_values(scratch / "effect.ptd", own, tensors, changed)
    return {"initial": own, "effect": scratch / "effect.ptd"}, changed


class PhoneTest:
    """The bundle's Android programs in this process."""

    def __init__(self, bundle: Path, manifest: Manifest, threads: int | None = None) -> None:
        if manifest.android is None or manifest.adapter.runtime is None:
            raise BundleError(f"{bundle} has no Android part: export it with --target android.")
        self._bundle, self._manifest = bundle, manifest
        self._scratch = tempfile.TemporaryDirectory(prefix="attune-self-test-")
        files, self._values = adapter_files(
            bundle, manifest.adapter.runtime, manifest.adapter.tensors, Path(self._scratch.name)
        )
        program = next(p.file for p in manifest.android.programs if p.name == "forward")
        self._lms = {
            name: ExecutorchLm(bundle / program, file, threads) for name, file in files.items()
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
        if self._manifest.training is None or self._manifest.android is None:
            return None
        programs = self._manifest.android.programs
        file = next(p.file for p in programs if p.name == "adamw")
        runner = ExecutorchPrograms(self._bundle, [p for p in programs if p.file == file])
        return gradient_of(self._bundle, self._manifest, runner, self._values, example)
