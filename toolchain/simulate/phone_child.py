"""The process that is the phone: puts the limits on itself, then lives.

``python -m toolchain.simulate.phone_child LIFE.json FD``: events go to the file descriptor, one
JSON object a line. Exit code 3: the last event, ``error``, says why.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import toolchain.report.quiet  # noqa: F401  (before the heavy imports)


def main(file: str, descriptor: str) -> int:
    from toolchain.simulate.limits import limit_cores, limit_memory

    text = json.loads(Path(file).read_text(encoding="utf-8"))
    cores = limit_cores(text["threads"])  # before any library counts them

    import executorch.runtime  # noqa: F401  (what Python needs is not the phone's: here, and now)
    import jinja2  # noqa: F401
    import torch
    import transformers.tokenization_utils_tokenizers  # noqa: F401

    import runtime_py.engine.lm  # noqa: F401
    from exporters.errors import ExportError
    from runtime_py.bundle.bundle import open_bundle
    from runtime_py.loop.errors import BundleError, LoopError, TrainingError
    from toolchain.simulate.life import Life, Phone, device_of

    torch.set_num_threads(cores)
    out = os.fdopen(int(descriptor), "w", encoding="utf-8", buffering=1)

    def say(event: dict[str, Any]) -> None:
        out.write(json.dumps(event, ensure_ascii=False) + "\n")

    life = Life(**{**text, "threads": cores})
    before = limit_memory(device_of(life).memory.app_mb)
    say({"event": "limited", "resident": before.resident, "data": before.data, "cores": cores})
    try:
        bundle = open_bundle(Path(life.bundle))
        with Phone(life, bundle, say) as phone:
            phone.live()
    except (LoopError, BundleError, TrainingError, ExportError) as error:
        say({"event": "error", "why": str(error)})
        return 3
    except MemoryError:
        say({"event": "error", "why": "the memory that the device allows an app was used up."})
        return 3
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # native thread pools need no farewell
