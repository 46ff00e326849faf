"""Fine-tuning by a bundle's training programs: from a job to an adapter's file.

A job's folder holds the state after the last whole step, so that a killed run goes on from there
and ends with the same bits. A trained adapter is the bundle's own ``.ptd`` with other values.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save

from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.manifest import AdapterTensor, Manifest, Tensor
from runtime_py.engine.examples import Example, fit
from runtime_py.engine.native import silenced
from runtime_py.engine.streaming import StepNumbers, StreamingEngine, open_training
from runtime_py.engine.trainer import Settings, evaluate, train
from runtime_py.loop.errors import LoopError, TrainingDiverged
from runtime_py.loop.files import replacing
from runtime_py.loop.protocols import FineTuneJob, FineTuneResult

ADAPTER = "adapter.ptd"  # in a job's folder
RESERVE = 0.25  # of what a run needs must be free before each call, or it ends
SAVED_AFTER = 32  # sequences whose gradients a kill may cost, where a step has no more
_PEFT_WEIGHTS = "adapter_model.safetensors"
_NO_MEMORY = ("MemoryAllocationFailed", "0x21", "bad_alloc", "DefaultCPUAllocator")


@dataclass(frozen=True)
class TrainingCall:
    """What was computed: the ``loss`` or ``gradient`` of ``labels`` labels by the programs of
    ``length`` tokens, or the ``update`` of step ``step`` after them. ``trained``: all steps are
    done, and the held-out loss after them is computed."""

    kind: Literal["loss", "gradient", "update"]
    length: int = 0
    labels: int = 0
    step: int = 0
    trained: bool = False


def _unheard(call: TrainingCall) -> None:
    pass


def _nothing() -> None:
    pass


def _unlimited() -> float:
    return math.inf


def runtime_file(bundle: Bundle, file: Path) -> Path:
    """The ``.ptd`` for an adapter's file: the bundle's own where ``file`` is its PEFT weights."""
    if file == bundle.peft / _PEFT_WEIGHTS:
        return bundle.android.adapter
    if file.suffix != ".ptd":
        raise LoopError(
            f"{file} is not an adapter file of this bundle: expected a .ptd, or convert it with "
            f"attune adapter convert."
        )
    return file


def read_values(file: Path, tensors: Sequence[AdapterTensor]) -> dict[str, np.ndarray]:
    """An adapter's tensors from its ``.ptd``, by name, at the manifest's offsets."""
    data = file.read_bytes()
    values = {}
    for tensor in tensors:
        count = math.prod(tensor.shape)
        if tensor.offset is None or tensor.offset + 4 * count > len(data):
            raise LoopError(
                f"{file} has no place for {tensor.name}: it does not belong to this bundle."
            )
        flat = np.frombuffer(data, "<f4", count, tensor.offset)
        values[tensor.name] = flat.reshape(tensor.shape).astype(np.float32)
    return values


def peft_writer(manifest: Manifest) -> Callable[[Path, Path], None]:
    """For ``Personalizer``: writes a ``.ptd`` as PEFT's ``adapter_model.safetensors``, with the
    names and shapes that PEFT has. The parts of a fused matrix are joined again."""
    tensors = [tensor for tensor in manifest.adapter.tensors if tensor.peft]

    def write(source: Path, out: Path) -> None:
        values = read_values(source, tensors)
        joined: dict[str, list[np.ndarray]] = {}
        for tensor in tensors:
            joined.setdefault(tensor.peft, []).append(values[tensor.name][0])
        arrays = {name: np.ascontiguousarray(np.concatenate(v)) for name, v in joined.items()}
        out.write_bytes(save(arrays, {"format": "pt"}))

    return write


def write_values(
    file: Path, source: Path, tensors: Sequence[AdapterTensor], values: Mapping[str, np.ndarray]
) -> None:
    """``source``, a ``.ptd``, with other values, at ``file``: there whole, or not at all."""
    with replacing(file) as beside:
        shutil.copyfile(source, beside)
        with beside.open("r+b") as out:
            for tensor in tensors:
                assert tensor.offset is not None
                out.seek(tensor.offset)
                out.write(np.ascontiguousarray(values[tensor.name], "<f4").tobytes())


class StreamedFineTuner:
    """``before`` is called ahead of a run, to free memory; ``available_mb`` is what the process may
    still take, asked before a run and between sequences. ``told`` hears of every call, after it,
    and of an update before it is saved."""

    def __init__(
        self,
        bundle: Bundle,
        text: ChatText,
        *,
        threads: int | None = None,
        before: Callable[[], None] = _nothing,
        available_mb: Callable[[], float] = _unlimited,
        told: Callable[[TrainingCall], None] = _unheard,
    ) -> None:
        self._training, self._android = bundle.training, bundle.android
        self._bundle, self._text, self._threads = bundle, text, threads
        self._before, self._available, self._told = before, available_mb, told

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        self._before()
        longest = min(job.max_sequence_tokens, max(self._training.lengths))
        examples = fit(job.training, self._text, longest).examples
        held_out = fit(job.held_out, self._text, longest).examples
        tensors = self._bundle.manifest.adapter.tensors
        parent = runtime_file(self._bundle, job.parent)
        if not examples or not held_out:  # nothing to learn from, or nothing to judge it by
            write_values(folder / ADAPTER, parent, tensors, read_values(parent, tensors))
            return FineTuneResult(folder / ADAPTER, math.nan, math.nan, (), 0.0)
        state = AdapterState.of(tensors, read_values(parent, tensors))
        settings = Settings(
            epochs=job.epochs,
            batch=job.batch,
            learning_rate=job.learning_rate,
            seed=job.seed,
            save_every=max(1, SAVED_AFTER // job.batch),
        )
        capacity = self.program_for(max(e.inputs for e in (*examples, *held_out)))
        need = self.need_mb(capacity)
        engine = _Guarded(self._open, capacity, need, self._available, self._told)
        optimizer = self._training.optimizer
        try:
            before = evaluate(engine, state, held_out)
            done = train(engine, state, examples, settings, optimizer, folder, stop=stop)
            if done is None:
                return None
            engine.trained = True
            after = evaluate(engine, state, held_out)
        except TrainingDiverged:
            write_values(folder / ADAPTER, parent, tensors, state.tensors)
            return FineTuneResult(folder / ADAPTER, before, math.inf, (), 0.0)
        write_values(folder / ADAPTER, parent, tensors, state.tensors)
        return FineTuneResult(folder / ADAPTER, before, after, done.losses, done.seconds)

    def _open(self) -> StreamingEngine:
        with silenced():  # the runtime talks of the processor
            engine = open_training(self._bundle, threads=self._threads)
        self._threads = None  # the pool stays for the process
        return engine

    def program_for(self, tokens: int) -> int:
        """The length of the shortest programs that hold ``tokens``."""
        return min(length for length in self._training.lengths if length >= tokens)

    def need_mb(self, length: int) -> float:
        """What a run with the programs of ``length`` tokens takes at most, in MB."""
        return training_bytes(self._bundle, length) / 1e6


class _Guarded:
    """The training programs, with an eye on memory and on losses that are no numbers."""

    def __init__(
        self,
        opening: Callable[[], StreamingEngine],
        capacity: int,
        need_mb: float,
        available_mb: Callable[[], float],
        told: Callable[[TrainingCall], None],
    ) -> None:
        self._available, self._told = available_mb, told
        self.capacity, self._length = capacity, capacity
        self.trained = False
        self._check(need_mb)
        self._reserve_mb = RESERVE * need_mb
        with _memory():
            self._engine = opening()

    def _check(self, need_mb: float) -> None:
        if self._available() < need_mb:
            raise MemoryError

    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        self._check(self._reserve_mb)
        with _memory():
            loss, labels = self._engine.loss(state, examples)
        length = self._engine.length_of(examples)
        self._told(TrainingCall("loss", length, labels, trained=self.trained))
        return loss, labels

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        self._check(self._reserve_mb)
        with _memory():
            loss, labels = self._engine.gradient(state, examples, into)
        self._length = self._engine.length_of(examples)
        self._told(TrainingCall("gradient", self._length, labels))
        return loss, labels

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        with _memory():
            norm = self._engine.update(state, gradient, numbers)
        self._told(TrainingCall("update", self._length, step=state.step))
        return norm


@contextmanager
def _memory() -> Iterator[None]:
    """ExecuTorch's failed allocations as ``MemoryError``."""
    try:
        yield
    except RuntimeError as error:
        if any(text in str(error) for text in _NO_MEMORY):
            raise MemoryError from error
        raise


def training_bytes(bundle: Bundle, length: int) -> int:
    """An upper estimate of what a run takes with programs of ``length`` tokens, beside the mapped
    weights: every layer's input; of one block its outputs twice, its scores three times and its
    matrices in float32; the head's logits twice, and one slice of its rows twice, in float32 and
    packed; the adapter, gradient and moments, and the copies of them in an update and
    in what is being saved."""
    model, training = bundle.manifest.model, bundle.training
    block = bundle.android.program(f"block_forward_{length}")
    outputs = sum(_numbers(tensor) for tensor in block.outputs)
    packed = 2 if training.precision == "int4" else 1
    matrices = packed * sum(_numbers(t) for t in block.inputs if t.name.endswith((".q", ".value")))
    rows = 2 * min(training.head_slice, model.vocab) * model.hidden
    inputs = (len(training.layers) + 3) * model.hidden * length
    logits = 2 * training.positions * model.vocab
    adapter = 12 * sum(math.prod(tensor.shape) for tensor in bundle.manifest.adapter.tensors)
    block_numbers = 2 * outputs + 3 * model.heads * length * length + matrices
    return 4 * (inputs + block_numbers + logits + rows + adapter)


def _numbers(tensor: Tensor) -> int:
    return math.prod(int(n) for n in tensor.shape)
