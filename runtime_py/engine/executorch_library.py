"""ExecuTorch's native library and kernels, without the compiler around them.

``portable_lib`` and ``custom_ops``, as ExecuTorch offers them, import ``executorch.exir`` and
TorchInductor, seconds of work that running a program has no use for. What they load is loaded here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch  # first: it loads what the library needs
from executorch.extension.llm import custom_ops
from executorch.extension.pybindings import _C
from executorch.kernels import quantized  # noqa: F401  (quantized_decomposed::* kernels)

(_LLAMA,) = Path(str(custom_ops.__file__)).parent.glob("*custom_ops_aot_lib.*")
torch.ops.load_library(_LLAMA)  # llama::* kernels


def set_threads(count: int) -> None:
    """For all programs of this process."""
    _C._unsafe_reset_threadpool(count)


def load_program(path: Path) -> Any:
    """A ``.pte`` file, checked by ExecuTorch; methods are loaded from it by name."""
    return _C._load_program(
        str(path),
        enable_etdump=False,
        debug_buffer_size=0,
        program_verification=_C.Verification.InternalConsistency,
    )


def load_module(path: Path, data: Path | None) -> Any:
    """A ``.pte`` file with what ``data``, a ``.ptd`` file, holds of its weights."""
    return _C._load_for_executorch(str(path), str(data) if data else None)
