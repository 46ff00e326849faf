"""How ExecuTorch 1.5.1's export is made to do what it offers no way to ask for: in one place.

Each says what would make it needless. ``exporters.coreml.patches`` is the same for coremltools.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping

import torch
from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor
from executorch.exir import EdgeCompileConfig
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn
from torch.export import ExportedProgram

# XNNPACK's preprocessing runs all its passes, each over the whole graph; with this name it runs
# only the one that our graphs need. Needless once it can be handed its passes.
SPECS = [CompileSpec("dqlinear_partitioner", b"")]
_ALIGNMENT = 16  # of a constant in a program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings that the lowering stack prints for its own reasons."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def edge_config() -> EdgeCompileConfig:
    """A new one for each lowering: 1.5.1 doubles the ``preserve_ops`` of one that it gets."""
    return EdgeCompileConfig(
        _check_ir_validity=False, _skip_dim_order=True, preserve_ops=[torch.ops.aten.linear.default]
    )


def packed_nibbles(q: Tensor) -> Tensor:
    """4-bit integers int8 [out, in] as XNNPACK stores them, two to a byte. It has no other home
    than the visitor of a graph's nodes."""
    return NodeVisitor.convert_to_qc4w(q)


def constants_of(lowered: LoweredBackendModule) -> dict[str, bytes]:
    """The named data that a delegate refers to; empty where it has none."""
    named = lowered.named_data_store_output
    if named is None:
        return {}
    return {
        name: bytes(named.buffers[entry.buffer_index]) for name, entry in named.pte_data.items()
    }


def rebound(
    blob: bytes, constants: Mapping[str, bytes], shapes: ExportedProgram
) -> LoweredBackendModule:
    """A delegate of XNNPACK made by hand: ``blob`` with the ``constants`` that it names. It stands
    for ``shapes`` while the program around it is traced.

    Needless once a backend can be asked for the same graph with other constants.
    """
    store = NamedDataStore()
    for name, data in constants.items():
        store.add_named_data(name, data, _ALIGNMENT)
    named = store.get_named_data_store_output()
    lowered = LoweredBackendModule(shapes, "XnnpackBackend", blob, SPECS, named)
    lowered.meta = {"debug_handle_map": {}}
    # Each pass copies the program around it deeply, and all constants with it. A delegate is never
    # changed again, so that a copy may hold it as well.
    object.__setattr__(lowered, "__deepcopy__", lambda memo: lowered)
    return lowered


def stand_for(program: ExportedProgram, module: nn.Module) -> ExportedProgram:
    """``program``, which gives ``module`` where it is asked for its own. Each pass asks, and making
    a module copies the history of its nodes, longer each time."""
    object.__setattr__(program, "module", lambda check_guards=True: module)
    return program
