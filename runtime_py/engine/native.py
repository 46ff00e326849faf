"""Calls into ExecuTorch's native code: it prints what only its authors want to read, and executorch
1.5.1 names what a host needs of it as if it were private."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def silenced() -> Iterator[TextIO]:
    """Keeps what native code writes to standard output and error off the terminal; errors still
    raise. Yields the real standard output, for what is meant to be seen meanwhile."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved, null = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        with os.fdopen(os.dup(saved[0]), "w", encoding="utf-8") as terminal:
            yield terminal
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, null):
            os.close(descriptor)


@functools.cache
def library() -> Any:
    """ExecuTorch's own module, with the kernels that a bundle's programs call.

    ``portable_lib`` and ``custom_ops``, which ExecuTorch offers for that, import its compiler and
    TorchInductor besides: seconds that running a program has no use for.
    """
    import torch  # first: it loads what the library needs
    from executorch.extension.llm import custom_ops
    from executorch.extension.pybindings import _C
    from executorch.kernels import quantized  # noqa: F401  (quantized_decomposed::* kernels)

    (llama,) = Path(str(custom_ops.__file__)).parent.glob("*custom_ops_aot_lib.*")
    torch.ops.load_library(llama)  # llama::* kernels
    return _C


def set_threads(threads: int) -> None:
    """The size of ExecuTorch's thread pool, which all programs of a process share: to be set before
    one is loaded, since nothing may run meanwhile."""
    with silenced():
        library()._unsafe_reset_threadpool(threads)


def load_program(path: Path) -> Any:
    """A ``.pte`` whose methods are loaded by name and read their inputs where they lie (an
    ``ExecuTorchProgram``). Its methods must not outlive it."""
    native = library()
    return native._load_program(
        str(path),
        enable_etdump=False,
        debug_buffer_size=0,
        program_verification=native.Verification.InternalConsistency,
    )


def load_module(
    program: Path, data: Path | None = None, *, trace: bool = False, debug_bytes: int = 0
) -> Any:
    """A ``.pte`` with its ``.ptd``, whose methods take and give tensors (an ``ExecuTorchModule``).

    ``trace``: it keeps the times of its instructions, and with ``debug_bytes`` what they gave, in a
    buffer of so many bytes.
    """
    with silenced():
        return library()._load_for_executorch(
            str(program),
            str(data) if data is not None else None,
            enable_etdump=trace,
            debug_buffer_size=debug_bytes,
        )
