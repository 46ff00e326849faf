"""Where a decoded token's time goes, operator by operator, from ExecuTorch's own event trace."""

from __future__ import annotations

import re
import statistics
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from executorch.devtools import Inspector
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (llama::* kernels)
from executorch.kernels import quantized  # noqa: F401  (quantized_decomposed::* kernels)

from runtime_py.engine.executorch_library import load_module, set_threads

_NUMBER = re.compile(r" #\d+$")  # XNNPACK counts the operators of one kind in a delegate
_KERNEL = "native_call_"  # before the names of most kernels
_CALL, _DELEGATE, _WHOLE = "OPERATOR_CALL", "DELEGATE_CALL", "Method::execute"
WITHIN = "delegates: around their operators"
AROUND = "program: dispatch, memory and inputs"


@dataclass(frozen=True)
class TraceEvent:
    """One entry of the trace: its milliseconds in each of several equal calls."""

    name: str
    milliseconds: tuple[float, ...]
    delegated: bool


@dataclass(frozen=True)
class ProfileRow:
    """All operators of one kind in one call: how many, their time, their share of the call's."""

    operator: str
    where: str  # "XNNPACK" | "kernel" | ""
    calls: int
    milliseconds: float
    share: float


def _faster_half(milliseconds: Sequence[float]) -> list[int]:
    order = sorted(range(len(milliseconds)), key=lambda i: milliseconds[i])
    return order[: (len(order) + 1) // 2]


def group(events: Iterable[TraceEvent]) -> list[ProfileRow]:
    """Rows by falling time, whose shares add up to 1.

    Of the calls the faster half counts. Its mean, not its median: XNNPACK's times are differences
    of whole microseconds, whose rounding only a mean undoes.
    """
    events = list(events)
    counted = _faster_half(next(e.milliseconds for e in events if e.name == _WHOLE))
    totals: dict[tuple[str, str], list[float]] = {}
    inside = kernels = delegates = whole = 0.0
    calls = 0
    for event in events:
        taken = statistics.fmean(event.milliseconds[i] for i in counted)
        if event.delegated:
            key = (_NUMBER.sub("", event.name), "XNNPACK")
            inside += taken
        elif event.name == _DELEGATE:
            delegates += taken
            calls += 1
            continue
        elif event.name in (_CALL, _WHOLE):  # a call holds the kernel that is listed by itself
            whole += taken if event.name == _WHOLE else 0.0
            continue
        else:
            key = (event.name.removeprefix(_KERNEL), "kernel")
            kernels += taken
        totals.setdefault(key, []).append(taken)
    rows = [(name, where, len(times), sum(times)) for (name, where), times in totals.items()]
    rows.append((WITHIN, "XNNPACK", calls, max(0.0, delegates - inside)))
    rows.append((AROUND, "", 1, max(0.0, whole - delegates - kernels)))
    total = sum(row[3] for row in rows) or 1.0
    return sorted((ProfileRow(*row, row[3] / total) for row in rows), key=lambda r: -r.milliseconds)


def profile_decode(
    program: Path, adapter: Path, prompt: Sequence[int], continuation: Sequence[int], threads: int
) -> list[ProfileRow]:
    """Decodes ``continuation`` after ``prompt`` with tracing on, which itself costs some time."""
    set_threads(threads)
    module = load_module(program, adapter, trace=True)
    for position, token in enumerate([*prompt, *continuation]):
        module.run_method("forward", (torch.tensor([[token]]), torch.tensor([position])))
    with tempfile.TemporaryDirectory(prefix="attune-") as folder:
        trace = Path(folder) / "trace.etdp"
        module.write_etdump_result_to_file(str(trace), str(trace.with_suffix(".bin")))
        with warnings.catch_warnings():  # that tensors were not recorded
            warnings.simplefilter("ignore")
            blocks = Inspector(etdump_path=str(trace)).event_blocks
    events = [
        TraceEvent(
            event.name, tuple(event.perf_data.raw[len(prompt) :]), bool(event.is_delegated_op)
        )
        for block in blocks
        if block.name == "Execute"
        for event in block.events
        if event.perf_data is not None
    ]
    return group(events)
