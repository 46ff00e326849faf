"""ExecuTorch's native library and kernels, without the compiler around them.

``portable_lib`` and ``custom_ops``, as ExecuTorch offers them, import ``executorch.exir`` and
TorchInductor, seconds of work that running a program has no use for. What they load is loaded here.
executorch 1.5.1 names what a host needs of it as if it were private.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch  # first: it loads what the library needs
from executorch.extension.llm import custom_ops
from executorch.extension.pybindings import _C
from executorch.kernels import quantized  # noqa: F401  (quantized_decomposed::* kernels)

from runtime_py.engine.native import silenced

_LLAMA = sorted(Path(str(custom_ops.__file__)).parent.glob("*custom_ops_aot_lib.*"))
if len(_LLAMA) != 1:
    raise ImportError(
        f"executorch has {len(_LLAMA)} libraries of LLM kernels where 1.5.1 has one: see attune "
        f"doctor, and install attune-mobile in a fresh environment."
    )
torch.ops.load_library(_LLAMA[0])  # llama::* kernels


def set_threads(threads: int) -> None:
    """The size of ExecuTorch's thread pool, which all programs of a process share: to be set before
    one is loaded, since nothing may run meanwhile."""
    with silenced():
        _C._unsafe_reset_threadpool(threads)


def load_program(path: Path) -> Any:
    """A ``.pte`` file, checked by ExecuTorch; methods are loaded from it by name."""
    return _C._load_program(
        str(path),
        enable_etdump=False,
        debug_buffer_size=0,
        program_verification=_C.Verification.InternalConsistency,
    )


def load_module(
    program: Path, data: Path | None = None, *, trace: bool = False, debug_bytes: int = 0
) -> Any:
    """A ``.pte`` with its ``.ptd``, whose methods take and give tensors (an ``ExecuTorchModule``).

    ``trace``: it keeps the times of its instructions, and with ``debug_bytes`` what they gave, in a
    buffer of so many bytes.
    """
    with silenced():
        return _C._load_for_executorch(
            str(program),
            str(data) if data is not None else None,
            enable_etdump=trace,
            debug_buffer_size=debug_bytes,
        )
