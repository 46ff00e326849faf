"""All operations that are known, and whether a function can be computed with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from exporters.errors import ExportError

# Imported for what they register.
from toolchain.verify.mil import compressed as _compressed
from toolchain.verify.mil import elementwise as _elementwise
from toolchain.verify.mil import indexing as _indexing
from toolchain.verify.mil import products as _products
from toolchain.verify.mil import reductions as _reductions
from toolchain.verify.mil import shaping as _shaping
from toolchain.verify.mil.mlpackage import MilFunction, Operation
from toolchain.verify.mil.registry import KERNELS, Kernel

_MODULES = (_compressed, _elementwise, _indexing, _products, _reductions, _shaping)

CONSTANT = "const"
READ_STATE = "read_state"
# The parameters of an operation that writes a state: the state, and what it becomes.
WRITE_STATE = {"write_state": ("input", "data"), "coreml_update_state": ("state", "value")}
_OWN = {CONSTANT: ("val",), READ_STATE: ("input",)} | WRITE_STATE


def known() -> tuple[str, ...]:
    """The names of all operations that are known."""
    return tuple(sorted((*KERNELS, *_OWN)))


def is_constant(operation: Operation) -> bool:
    """Whether what the operation gives is part of the program, compressed or not."""
    return operation.type == CONSTANT or operation.type.startswith("constexpr_")


def _parameters(kind: str) -> tuple[set[str], set[str]]:
    """What an operation must be given, and what it may be."""
    if kind in _OWN:
        return set(_OWN[kind]), set()
    parameters = KERNELS[kind].parameters
    required = {name for name, (_, must) in parameters.items() if must}
    return required, parameters.keys() - required


def kernels(function: MilFunction) -> Mapping[str, Kernel]:
    """The kernels of a function's operations by their type.

    Raises ``ExportError`` with everything about the function that is not known, all of it at once:
    operations, and parameters that are unknown or missing.
    """
    unknown = Counter(
        operation.type
        for operation in function.operations
        if operation.nested or (operation.type not in KERNELS and operation.type not in _OWN)
    )
    misfits = set()
    for operation in function.operations:
        if operation.type in unknown:
            continue
        required, optional = _parameters(operation.type)
        misfits |= {
            f"{operation.type} has the unknown parameter '{name}'"
            for name in operation.arguments.keys() - required - optional
        }
        misfits |= {
            f"{operation.type} ({operation.name}) lacks its parameter '{name}'"
            for name in required - operation.arguments.keys()
        }
    if not unknown and not misfits:
        return {o.type: KERNELS[o.type] for o in function.operations if o.type in KERNELS}
    parts = [f"{name} ({count} times)" for name, count in sorted(unknown.items())]
    problems = [f"operations that are not known: {', '.join(parts)}"] if parts else []
    problems += sorted(misfits)
    raise ExportError(
        f"function '{function.name}' cannot be computed: {'; '.join(problems)}. Known are: "
        f"{', '.join(known())}."
    )
