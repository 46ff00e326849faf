"""A deterministic stand-in for the model: fast enough for thousands of dialogues."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.files import replacing
from runtime_py.loop.lexicons import make_lexicons
from runtime_py.loop.metrics import entropy_of_norms
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Embedding, FineTuneJob, FineTuneResult
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.schedule import Conditions, Moment

HIDDEN = 12
NIGHT = Conditions(charging=True, idle=True, celsius=25.0, free_memory_mb=1000)
DAY = Conditions(charging=False, idle=False, celsius=25.0, free_memory_mb=1000)
TEXT = (
    "bread salt oven fever pill nurse train hotel map share bond cash sun tree blue run "
    "walk say good very some thing here there one two never always"
)
WORDS = TEXT.split()
LEXICONS = make_lexicons(
    {"food": WORDS[:3], "medical": WORDS[3:6], "travel": WORDS[6:9], "money": WORDS[9:12]}
)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def vector(word: str) -> np.ndarray:
    return np.random.default_rng(_hash(word)).standard_normal(HIDDEN)


class ToyEngine:
    def __init__(self) -> None:
        self.adapter: Path | None = None

    def embed(self, dialogue: Dialogue) -> Embedding:
        tokens = np.array([vector(word) for word in dialogue.text.split()])  # [n, HIDDEN]
        entropy = entropy_of_norms(np.linalg.norm(tokens, axis=1))
        return Embedding(tokens.mean(axis=0).astype(np.float32), entropy)

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        words = messages[-1].content.rpartition(": ")[2].split()
        kept = [word for place, word in enumerate(words) if (seed >> place % 60) & 3]
        return "" if seed % 5 == 0 else " ".join([*kept, WORDS[seed % len(WORDS)]])

    def use_adapter(self, file: Path) -> None:
        self.adapter = file


class ToyTuner:
    """One "micro-batch" an iteration; its state is one file, replaced after each. A token is a
    word. ``change``: of every guard set's loss; ``too_long``: above so many tokens the memory
    does not suffice. ``jobs``: every one that was run, for as long as it went."""

    def __init__(
        self,
        change: float = -0.1,
        too_long: int = 1 << 20,
        lengths: tuple[int, ...] = (64, 128, 256, 512),
    ) -> None:
        self.change, self.too_long, self.lengths = change, too_long, lengths
        self.halt = False  # stops after each micro-batch
        self.jobs: list[FineTuneJob] = []

    def tokens(self, dialogue: Dialogue) -> int:
        return len(dialogue.text.split())

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        self.jobs.append(job)
        if job.max_sequence_tokens > self.too_long:
            raise MemoryError
        state = folder / "state.json"
        digest, losses = hashlib.sha256(job.parent.read_bytes()).hexdigest(), []
        if state.exists():
            digest, losses = json.loads(state.read_text())
        parts = (job.training, job.stopping, job.guard)
        texts = [[[d.id, d.text] for d in part] for part in parts]
        everything = [job.seed, job.max_sequence_tokens, job.steps, texts]
        while len(losses) < 4:
            if stop():
                return None
            digest = hashlib.sha256(f"{digest}{everything}".encode()).hexdigest()
            losses.append(2.0 - len(losses) / 10)
            part = state.with_suffix(".part")
            part.write_text(json.dumps([digest, losses]))
            part.replace(state)
            if self.halt:
                return None
        adapter = folder / "adapter.safetensors"
        adapter.write_text(digest)
        before = tuple(2.0 + place / 10 for place in range(len(job.guard)))
        after = tuple(loss + self.change for loss in before)
        curve = ((0, 2.0), (len(losses), 2.0 + self.change)) if job.stopping else ()
        return FineTuneResult(adapter, before, after, tuple(losses), curve, len(losses), 1.0)


class Clock:
    """A day every ``day`` readings."""

    def __init__(self, day: int = 100) -> None:
        self.now, self.day = 0, day

    def __call__(self) -> Moment:
        self.now += 1
        return Moment(float(self.now), self.now // self.day)


def dialogue(number: int, seed: int = 0, exchanges: int = 1) -> Dialogue:
    stream = SplitMix64(seed * 1_000_003 + number)
    turns = []
    for _ in range(exchanges):
        for role in ("user", "assistant"):
            words = [WORDS[stream.below(len(WORDS))] for _ in range(4 + stream.below(9))]
            turns.append(Turn(role, " ".join(words)))  # type: ignore[arg-type]
    return Dialogue(f"d{number}", tuple(turns))


@dataclass(frozen=True)
class ToyBundle:
    folder: Path
    hidden: int = HIDDEN

    @property
    def adapter_file(self) -> Path:
        return self.folder / "adapter.safetensors"

    def as_peft(self, file: Path, folder: Path) -> None:
        with replacing(folder) as beside:
            beside.mkdir()
            (beside / "adapter_config.json").write_text("{}")
            shutil.copyfile(file, beside / "adapter_model.safetensors")


def toy_bundle(folder: Path) -> ToyBundle:
    """A bundle in ``folder``, which is made."""
    bundle = ToyBundle(folder / "bundle")
    bundle.folder.mkdir(parents=True, exist_ok=True)
    bundle.adapter_file.write_text("zero")
    return bundle


def small_policy(
    selection: str = "attune", bins: int = 8, every: int = 20, seed: int = 7
) -> LoopPolicy:
    return LoopPolicy(
        selection=selection,
        bins=bins,
        bin_bytes=2048,
        fine_tune_every_sets=every,
        seed=seed,
        paraphrases=3,
        paraphrase_use="both",
    )


def open_toy(
    folder: Path,
    policy: LoopPolicy | None = None,
    tuner: ToyTuner | None = None,
    engine: ToyEngine | None = None,
    clock: Callable[[], Moment] | None = None,
) -> Personalizer:
    return Personalizer(
        folder=folder / "state",
        policy=policy or small_policy(),
        lexicons=LEXICONS,
        engine=engine or ToyEngine(),
        tuner=tuner or ToyTuner(),
        clock=clock or Clock(),
        bundle=toy_bundle(folder),
    )
