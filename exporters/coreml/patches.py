"""How coremltools 9.0 is made to work, quietly, beside torch 2.13: all of it in one place."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import warnings
from collections.abc import Iterator

import torch

# Operators that coremltools has no translation for, as ones that it has. Until coremltools 9.0
# has ``__and__``, which torch.export keeps for ``&`` of two masks since torch 2.7.
DECOMPOSITIONS = {torch.ops.aten.__and__.Tensor: torch.bitwise_and}

# coremltools 9.0 validates the whole program after each of its passes, a third of a conversion's
# time; the finished package is checked instead (``exporters.coreml.multifunction.check``).
_PROGRAM = "coremltools.converters.mil.mil.program"

# Where coremltools 9.0 has bound tqdm at import; it has no switch for its progress bars.
_BARS = (
    ("coremltools.converters.mil.frontend.torch.ops", "_tqdm"),
    ("coremltools.converters.mil.mil.passes.pass_pipeline", "tqdm"),
    ("coremltools.optimize.coreml._quantization_passes", "tqdm"),
)


def _accept(program: object, check_essential_scope: bool | None = False) -> None:
    """In place of a validation."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Imports and runs coremltools without warnings (of untested versions, of libraries that only
    macOS has, of int64 constants that become int32) and without progress bars. Errors still show.
    """
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = []
    program = importlib.import_module(_PROGRAM).Program
    validate = program.validate
    try:
        program.validate = _accept
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module, name in _BARS:
                owner = importlib.import_module(module)
                bars.append((owner, name, getattr(owner, name)))
                setattr(owner, name, functools.partial(getattr(owner, name), disable=True))
            yield
    finally:
        logger.setLevel(level)
        program.validate = validate
        for owner, name, bar in bars:
            setattr(owner, name, bar)
