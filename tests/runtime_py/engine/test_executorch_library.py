"""What it takes to run a program: the native library, and nothing of ExecuTorch's compiler."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import sys
import runtime_py.engine.lm
import runtime_py.engine.program_calls
import torch
heavy = [m for m in ("executorch.exir", "torch._dynamo", "torch._inductor") if m in sys.modules]
assert not heavy, heavy
assert torch.ops.llama.custom_sdpa
"""


def test_the_compiler_is_not_imported() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
