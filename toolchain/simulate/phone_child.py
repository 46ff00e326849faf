"""The process that is the phone: puts the limits on itself, then lives.

``python -m toolchain.simulate.phone_child PLAN.json CORES FD``: events go to the file descriptor.
Exit code 3: the last event, ``PhoneFailed``, says why.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import toolchain.report.quiet  # noqa: F401  (before the heavy imports)

FAILED = 3  # exit code


def main(file: str, most_cores: str, descriptor: str) -> int:
    """The process's exit code."""
    from toolchain.simulate.limits import limit_cores, limit_memory

    cores = limit_cores(int(most_cores))  # before any library counts them

    import jinja2  # noqa: F401  (what Python needs is not the phone's: here, and now)
    import torch
    import transformers.tokenization_utils_tokenizers  # noqa: F401

    import runtime_py.engine.lm  # noqa: F401
    from runtime_py.bundle.bundle import open_bundle
    from runtime_py.loop.errors import AttuneError
    from toolchain.simulate.events import LimitsSet, PhoneEvent, PhoneFailed, to_line
    from toolchain.simulate.life import Phone
    from toolchain.simulate.life_plan import LifePlan

    torch.set_num_threads(cores)
    plan = LifePlan.from_json(Path(file).read_bytes())
    with os.fdopen(int(descriptor), "wb") as out:

        def emit(event: PhoneEvent) -> None:
            out.write(to_line(event))
            out.flush()

        before = limit_memory(plan.device.memory.app_mb)
        emit(LimitsSet(before.resident, cores))
        try:
            with Phone(plan, open_bundle(plan.bundle), emit) as phone:
                phone.live()
        except AttuneError as error:
            emit(PhoneFailed(str(error)))
            return FAILED
        except MemoryError:
            emit(PhoneFailed("the memory that the device allows an app was used up."))
            return FAILED
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # native thread pools need no farewell
