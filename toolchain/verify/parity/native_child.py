"""Runs the calls of a ``.pte`` in ExecuTorch's Python runtime, in a process of its own.

Native code that meets a damaged file may crash; here that is an exception with a sentence. The
requests are those of ``toolchain.verify.arm64.emulate``, so one list of calls serves both
processors. The process loads a program anew for every request, and lives until one crashes it:
starting one takes seconds.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from runtime_py.engine.executorch_library import load_module, set_threads
from toolchain.verify.arm64.emulate import Call, FileSlice, OutputOf, RunError

TIMEOUT_S = 1200.0
_DEBUG_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction of a method as it ran: its operator, and the tensors that it took and gave
    (those of a delegate: all of its inputs, then its outputs)."""

    operator: str
    tensors: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class CallResults:
    """``outputs`` of each call; ``instructions`` of the last one, where it was watched."""

    outputs: list[list[np.ndarray]]
    instructions: tuple[Instruction, ...] = ()


def run_calls(
    program: Path,
    data: Sequence[Path],
    calls: Sequence[Call],
    watch: bool = False,
    timeout: float = TIMEOUT_S,
) -> CallResults:
    """All calls in one process, so a cache lasts from call to call. Raises ``RunError``.

    ``watch``: also what every instruction of the last call gave.
    """
    with tempfile.TemporaryDirectory(prefix="attune-parity-") as scratch:
        folder = Path(scratch)
        _write(folder, program, data, calls, watch)
        _served(program, folder, timeout)
        return _read(folder)


class _Server:
    """The child, its two pipes, and the file that its standard error goes to."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[3])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the child)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "toolchain.verify.parity.native_child"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

        self._requests = cast(IO[bytes], self.process.stdin)
        self._answers = cast(IO[bytes], self.process.stdout)

    def ask(self, folder: Path, timeout: float) -> str | None:
        """The child's answer: "" where all went well, None where it took too long."""
        self._requests.write(f"{folder}\n".encode())
        self._requests.flush()
        ready, _, _ = select.select([self._answers], [], [], timeout)
        if not ready:
            self.end()
            return None
        if line := self._answers.readline():
            return json.loads(line)
        code = self.process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            return f"crashed with {name}: the file may be damaged, or memory ran out."
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = [text.strip() for text in lines if text.strip()][-1:]
        return f"failed: {last[0] if last else f'exit code {code}'}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


_servers: list[_Server] = []


def _served(program: Path, folder: Path, timeout: float) -> None:
    if _servers and _servers[0].process.poll() is not None:
        _servers.clear()
    if not _servers:
        _servers.append(_Server())
        atexit.register(_servers[0].end)
    answer = _servers[0].ask(folder, timeout)
    if answer is None:
        raise RunError(f"{program} in ExecuTorch took longer than {timeout:g} s.")
    if answer:
        raise RunError(f"{program} in ExecuTorch {answer}")


def _write(
    folder: Path, program: Path, data: Sequence[Path], calls: Sequence[Call], watch: bool
) -> None:
    if len(data) > 1:
        raise RunError(f"ExecuTorch's Python runtime takes one data file, not {len(data)}.")
    records: list[dict] = []
    with (folder / "inputs").open("wb") as file:
        for call in calls:
            inputs: list[dict] = []
            for value in call.inputs:
                if isinstance(value, OutputOf):
                    inputs.append({"call": value.call, "index": value.index})
                    continue
                if isinstance(value, np.ndarray):
                    file.write(bytes(-file.tell() % 64))
                    start = file.tell()
                    file.write(np.ascontiguousarray(value).tobytes())
                    path, value = str(folder / "inputs"), _slice(folder, start, value)
                else:
                    path = str(value.path.resolve())
                place = {"path": path, "offset": value.offset, "dtype": value.dtype}
                inputs.append({**place, "shape": list(value.shape)})
            records.append({"method": call.method, "inputs": inputs})
        file.write(bytes(64))
    request = {
        "program": str(program.resolve()),
        "data": [str(path.resolve()) for path in data],
        "watch": watch,
        "calls": records,
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")


def _slice(folder: Path, start: int, array: np.ndarray) -> FileSlice:
    return FileSlice(folder / "inputs", start, array.dtype.name, array.shape)


def _read(folder: Path) -> CallResults:
    response = json.loads((folder / "response.json").read_text(encoding="utf-8"))
    with np.load(folder / "outputs.npz", allow_pickle=False) as arrays:
        outputs = [
            [arrays[f"o{i}.{j}"] for j in range(count)]
            for i, count in enumerate(response["outputs"])
        ]
        instructions = tuple(
            Instruction(name, tuple(arrays[f"s{i}.{j}"] for j in range(count)))
            for i, (name, count) in enumerate(response["instructions"])
        )
    return CallResults(outputs, instructions)


# In the child


def _serve(folder: Path) -> None:
    import torch
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (llama::* kernels)
    from executorch.kernels import quantized  # noqa: F401  (quantized_decomposed::* kernels)

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    watch = bool(request["watch"])
    data = Path(request["data"][0]) if request["data"] else None
    module = load_module(
        Path(request["program"]), data, trace=watch, debug_bytes=_DEBUG_BYTES if watch else 0
    )
    maps: dict[str, np.memmap] = {}

    def tensor(value: dict) -> Any:
        if "call" in value:
            return outputs[value["call"]][value["index"]]
        if value["path"] not in maps:
            maps[value["path"]] = np.memmap(value["path"], np.uint8, mode="r")
        dtype = np.dtype(value["dtype"])
        size = dtype.itemsize * int(np.prod(value["shape"]))
        part = maps[value["path"]][value["offset"] : value["offset"] + size]
        return torch.from_numpy(part.view(dtype).reshape(value["shape"]))

    outputs: list[list[Any]] = []
    for call in request["calls"]:
        inputs = tuple(tensor(value) for value in call["inputs"])
        results = module.run_method(call["method"], inputs)
        outputs.append([v if isinstance(v, torch.Tensor) else torch.tensor(v) for v in results])
    instructions = _instructions(module, folder) if watch else []
    arrays = {f"o{i}.{j}": v.numpy() for i, row in enumerate(outputs) for j, v in enumerate(row)}
    arrays |= {
        f"s{i}.{j}": value
        for i, instruction in enumerate(instructions)
        for j, value in enumerate(instruction.tensors)
    }
    np.savez(folder / "outputs.npz", **arrays)  # type: ignore[arg-type]
    response = {
        "outputs": [len(row) for row in outputs],
        "instructions": [(one.operator, len(one.tensors)) for one in instructions],
    }
    (folder / "response.json").write_text(json.dumps(response), encoding="utf-8")


def _instructions(module: Any, folder: Path) -> list[Instruction]:
    """What the call of a watched module computed, from ExecuTorch's own event log."""
    import torch
    from executorch.devtools import Inspector

    log, buffer = folder / "log", folder / "buffer"
    module.write_etdump_result_to_file(str(log), str(buffer))
    blocks = Inspector(etdump_path=str(log), debug_buffer_path=str(buffer)).event_blocks
    instructions: list[Instruction] = []
    for event in [b for b in blocks if b.name == "Execute"][-1].events:
        values = [v for v in (event.debug_data or []) if isinstance(v, torch.Tensor)]
        if values and event.name != "OPERATOR_CALL":
            name = event.name.removeprefix("native_call_")
            copies = tuple(value.detach().numpy().copy() for value in values)
            instructions.append(Instruction(name, copies))
    return instructions


def _main() -> None:
    """A folder a line in, a JSON string a line out; native code's own words go nowhere."""
    import torch  # noqa: F401

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        set_threads(int(threads))
    for line in sys.stdin:
        answer = ""
        try:
            _serve(Path(line.rstrip("\n")))
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            words = str(error).splitlines() or [type(error).__name__]
            answer = f"failed: {words[0]}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
