"""Runs a ``.pte`` in a child process: on ARM64 under QEMU's user emulation, or on this machine.

A child can crash, hang or give up; here that is an exception with a sentence.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolchain.verify.arm64.build import Runner, prepare

CPU = "cortex-a76"  # ARMv8.2 with the int8 dot product, as most phones' processors
TIMEOUT_S = 600.0

_ALIGNMENT = 64  # of an input in its file
# What decides in which order the BLAS that attention calls adds up.
_SPLIT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY")
_PAST_END = 64  # bytes after the last input: a kernel may read a vector's width past its end


class RunError(Exception):
    """A program that could not be run as asked; the message says why, as one sentence."""


@dataclass(frozen=True)
class FileSlice:
    """An input that stays in a file: contiguous little-endian numbers from byte ``offset`` on.

    ``dtype`` is a name of ``kDtypes`` in request.h: NumPy's names and ``bfloat16``.
    """

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OutputOf:
    """An input that is the output ``index`` of the sequence's ``call``, both counted from 0."""

    call: int
    index: int


Input = np.ndarray | FileSlice | OutputOf


@dataclass(frozen=True)
class Call:
    """One method with all its inputs, in the program's order."""

    method: str
    inputs: tuple[Input, ...] = ()


def refuse_cpu(cpu: str) -> None:
    """Raises ``RunError`` for a QEMU CPU model that computes wrongly.

    ``max``, the default, has SME, and with it QEMU 7.2 gives wrong int8 products: next tokens
    differ, and the cosine of the logits is 0.95. ``max,sme=off`` is right, as are 7.2's others.
    """
    model, *properties = cpu.split(",")
    if model in ("", "max") and not {"sme=off", "sve=off"} & set(properties):
        raise RunError(
            f"QEMU's CPU model {model or 'by default, max,'} computes int8 products wrongly with "
            f"its SME instructions: take {CPU}, or max,sme=off."
        )


class Arm64Program:
    """A ``.pte`` with its ``.ptd`` files. Every run is a process of its own, so a KV cache lasts
    from call to call within one sequence and no longer.

    ``native`` runs the same runner on this machine: what differs between the two is ARM64's doing,
    what differs between native and Python is the runner's. With ``native`` and ``older``, QEMU's
    name of a processor of this machine's own architecture, such as Haswell, it runs under QEMU as
    that: kernels for instructions that it does not have are left aside. Raises ``RunError`` where
    there is no runner; ``prepare`` gives the reason without an exception.
    """

    def __init__(
        self,
        program: Path,
        data: Sequence[Path] = (),
        native: bool = False,
        cpu: str = CPU,
        timeout: float = TIMEOUT_S,
        cache: Path | None = None,
        older: str | None = None,
    ) -> None:
        if not native:
            refuse_cpu(cpu)
        runner = prepare(native, cache)
        if isinstance(runner, str):
            raise RunError(runner)
        self._files = [("program", program), *(("data", file) for file in data)]
        self._command = _command(runner, cpu) if older is None else _older(runner, older)
        self._timeout = timeout

    def call(self, method: str, inputs: Sequence[Input] = ()) -> list[np.ndarray]:
        """The outputs of one method, in a fresh process."""
        return self.run_sequence([Call(method, tuple(inputs))])[0]

    def run_sequence(self, calls: Sequence[Call]) -> list[list[np.ndarray]]:
        """The outputs of every call, in one process. Raises ``RunError``."""
        for _, file in self._files:
            if not file.is_file():
                raise RunError(f"{file} is not a file.")
        with tempfile.TemporaryDirectory(prefix="attune-") as scratch:
            folder = Path(scratch)
            _write_request(folder, [(k, str(p.resolve())) for k, p in self._files], calls)
            self._run(folder)
            return _read_response(folder, len(calls))

    def _run(self, folder: Path) -> None:
        try:
            done = subprocess.run(
                [*self._command, "request", "response", "outputs"],
                cwd=folder,  # where QEMU leaves a core
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=self._timeout,
            )
        except subprocess.TimeoutExpired:
            raise RunError(
                f"{self._name()} took longer than {self._timeout:g} s: ask for fewer or shorter "
                "calls, or allow more time."
            ) from None
        except OSError as error:
            raise RunError(f"{self._command[0]} cannot be started: {error.strerror}.") from error
        if done.returncode == 0:
            return
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            reason = f"crashed with {name}: the file may be damaged, or memory ran out."
        else:
            reason = f"failed: {errors[-1] if errors else f'exit code {done.returncode}.'}"
        raise RunError(f"{self._name()} {reason}")

    def _name(self) -> str:
        where = "under QEMU" if len(self._command) > 1 else "in the native runner"
        return f"{self._files[0][1]} {where}"


def _environment() -> dict[str, str]:
    """Libraries come from nowhere else; a product's sums are split as in this process."""
    split = {name: os.environ[name] for name in _SPLIT if name in os.environ}
    return {"LC_ALL": "C", "PATH": os.defpath, **split}


def _command(runner: Runner, cpu: str) -> list[str]:
    if runner.emulator is None:
        return [str(runner.executable)]
    return [str(runner.emulator), "-cpu", cpu, "-L", str(runner.sysroot), str(runner.executable)]


def _older(runner: Runner, cpu: str) -> list[str]:
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if emulator is None or platform.machine() != "x86_64":
        raise RunError(
            f"qemu-x86_64, which runs a program as on a {cpu}, is not installed, or this is no "
            "x86-64 machine."
        )
    return [emulator, "-cpu", cpu, str(runner.executable)]


def _write_request(folder: Path, files: list[tuple[str, str]], calls: Sequence[Call]) -> None:
    """``request`` as runner.cpp defines it, and ``inputs`` with the arrays that it points to."""
    records: list[tuple[str, ...]] = [*files]
    with (folder / "inputs").open("wb") as inputs:
        for call in calls:
            records.append(("call", call.method))
            for value in call.inputs:
                if isinstance(value, OutputOf):
                    records.append(("result", str(value.call), str(value.index)))
                    continue
                if isinstance(value, np.ndarray):
                    inputs.write(bytes(-inputs.tell() % _ALIGNMENT))
                    start = inputs.tell()
                    inputs.write(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
                    value = FileSlice(Path("inputs"), start, value.dtype.name, value.shape)
                    path = "inputs"
                else:
                    path = str(value.path.resolve())
                shape = "x".join(map(str, value.shape)) or "-"
                records.append(("input", value.dtype, shape, str(value.offset), path))
        inputs.write(bytes(_PAST_END))
    for field in (field for record in records for field in record):
        if not field or set("\t\n\r") & set(field):
            raise RunError(f"{field!r} cannot be written into a request: name the file otherwise.")
    text = "".join("\t".join(record) + "\n" for record in records)
    (folder / "request").write_bytes(os.fsencode(text))


def _read_response(folder: Path, calls: int) -> list[list[np.ndarray]]:
    results: list[list[np.ndarray]] = []
    numbers = (folder / "outputs").read_bytes()
    lines = (folder / "response").read_text(encoding="utf-8").splitlines()
    for kind, *fields in (line.split("\t") for line in lines):
        if kind == "call":
            results.append([])
        elif kind == "output":
            name, sizes, offset = fields
            shape = () if sizes == "-" else tuple(map(int, sizes.split("x")))
            if name == "bfloat16":
                raise RunError("an output is bfloat16, which NumPy does not know.")
            dtype = np.dtype(name).newbyteorder("<")
            count = int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(numbers, dtype, count, int(offset))
            results[-1].append(array.astype(dtype.newbyteorder("="), copy=True).reshape(shape))
    if lines[-1:] != ["done"] or len(results) != calls:
        raise RunError("the runner's response is incomplete: is the disk for temporary files full?")
    return results
