"""Delegates compiled once for each distinct shape and rebound to each layer's weights.

Between two attentions lies a *piece*: the end of one block and the beginning of the next. All
pieces of a model are alike but for their constants, and XNNPACK's blob names a constant by the
SHA-256 of its bytes. So one piece is lowered with random weights, and every layer's is that blob
with the names replaced, and the layer's own bytes beside it. Lowering then takes the time of a few
pieces, whatever the model's depth.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge
from executorch.exir.backend.backend_api import to_backend
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exporters.errors import ExportError
from exporters.executorch.delegation import flops_of
from exporters.executorch.patches import (
    SPECS,
    constants_of,
    edge_config,
    packed_nibbles,
    rebound,
    stand_for,
)
from exporters.executorch.piece_modules import (
    FinalPiece,
    NormPiece,
    PieceBody,
    PieceFunction,
    ShapesOnly,
)
from exporters.model.quantize import QuantizedLinear, share
from exporters.model.transformer import Dense, Norm, Transformer


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _constants(module: nn.Module) -> dict[str, tuple[str, bytes]]:
    """What XNNPACK stores of a piece's weights: buffer -> (name of the constant, its bytes)."""
    stored: dict[str, tuple[str, bytes]] = {}
    for path, part in module.named_modules():
        values: dict[str, tuple[str, bytes]] = {}
        if isinstance(part, QuantizedLinear):
            four = part.bits == 4
            values["q"] = ("", _bytes(packed_nibbles(part.q) if four else part.q))
            scale = part.scale.to(torch.bfloat16) if four else part.scale
            values["scale"] = ("scale_", _bytes(scale))
        elif isinstance(part, Dense | Norm):
            values["weight"] = ("", _bytes(part.weight))
        if isinstance(part, QuantizedLinear | Dense) and part.bias is not None:
            values["bias"] = ("", _bytes(part.bias))
        for name, (prefix, data) in values.items():
            stored[f"{path}.{name}"] = (prefix + hashlib.sha256(data).hexdigest(), data)
    return stored


def _with_random_weights(module: nn.Module) -> nn.Module:
    """The same modules with other weights, no two of them alike."""
    copied = share(module)
    random = torch.Generator().manual_seed(0)

    def positive(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=random) + 0.5

    for part in copied.modules():
        if isinstance(part, QuantizedLinear):
            low, high = (-8, 8) if part.bits == 4 else (-127, 128)
            part.q = torch.randint(low, high, part.q.shape, generator=random, dtype=torch.int8)
            part.scale = positive(part.scale)
        elif isinstance(part, Dense | Norm):
            part.weight = positive(part.weight)
        if isinstance(part, QuantizedLinear | Dense) and part.bias is not None:
            part.bias = positive(part.bias)
    return copied


def lower_whole(module: nn.Module, program: ExportedProgram) -> tuple[LoweredBackendModule, float]:
    """One XNNPACK delegate of everything that ``program`` does, and its FLOPs."""
    edge = to_edge(program, compile_config=edge_config()).exported_program()
    # The partitioner marks the quantization nodes that become part of a linear.
    tagged = XnnpackPartitioner().partition(edge).tagged_exported_program
    left = [
        str(node.target)
        for node in tagged.graph.nodes
        if node.op == "call_function" and "delegation_tag" not in node.meta
    ]
    if left:
        raise ExportError(
            f"XNNPACK does not take {sorted(set(left))}, which a block computes with."
        )
    for node in tagged.graph.nodes:
        node.meta.pop("delegation_tag", None)
    return to_backend("XnnpackBackend", tagged, SPECS), flops_of(tagged.graph)


@dataclass(frozen=True)
class _Template:
    """A lowered piece with random weights: its blob, the constants in it by buffer, those that
    every layer shares, and a stand-in for its shapes."""

    blob: bytes
    names: dict[str, str]
    shared: dict[str, bytes]
    shapes: ExportedProgram
    flops: float


class PieceFactory:
    """Lowers the pieces of one model; equal ones once."""

    def __init__(self, model: Transformer, longest: int) -> None:
        self.model = model
        self.longest = longest
        self.flops = 0.0  # of all pieces made
        self.count = 0
        self._templates: dict[tuple, _Template] = {}

    def between(self, leave: int | None, enter: int | None, adapted: bool) -> LoweredBackendModule:
        """The piece that ends block ``leave`` and begins block ``enter``."""
        spec, blocks = self.model.spec, self.model.blocks
        rope = spec.layers[enter].rope if enter is not None else None
        index = self.model.ropes.index(rope) if rope is not None else None
        swap = getattr(self.model, f"swap_{index}") if index is not None else None
        body = PieceBody(
            blocks[leave] if leave is not None else None,
            blocks[enter] if enter is not None else None,
            swap,
            adapted,
        )
        outputs: list[tuple[int | None, ...]] = []
        if leave is not None:
            outputs.append((1, None, spec.hidden))
        if enter is not None:
            outputs.append((1, None, spec.heads, spec.head_dim))
            outputs += [(1, None, spec.kv_heads, spec.head_dim)] * 2
        function = PieceFunction(body)
        kinds = tuple(type(m).__name__ for m in body.modules())
        key = (leave is not None, enter is not None, index, adapted, kinds)
        dims = [1, 1] if leave is not None else [1]
        dims += [0, 0] if swap is not None else []
        return self._make(key, function, self._inputs(body, leave is not None), dims, outputs)

    def final(self) -> LoweredBackendModule:
        x = torch.zeros(1, 1, self.model.spec.hidden)
        shell = share(self.model)
        shell.blocks = nn.ModuleList()  # type: ignore[assignment]
        shell.table = nn.Identity()
        return self._make(
            ("final",), FinalPiece(shell), [x], [], [(1, None, self.model.spec.vocab)]
        )

    def normed(self) -> LoweredBackendModule:
        x = torch.zeros(1, 8, self.model.spec.hidden)
        return self._make(
            ("norm",), NormPiece(self.model.norm), [x], [1], [(1, None, self.model.spec.hidden)]
        )

    def _inputs(self, body: PieceBody, leaves: bool) -> list[Tensor]:
        spec, length = self.model.spec, min(8, self.longest)
        inputs = [torch.zeros(1, length, spec.hidden)]
        if leaves:
            inputs.append(torch.zeros(1, length, spec.heads, spec.head_dim))
        if body.swap is not None:
            # Two tensors: export takes one given twice for one input.
            inputs += [torch.zeros(length, 1, spec.head_dim) for _ in range(2)]
        return inputs + [body.get_buffer(name) for name in body.adapter()]

    def _make(
        self,
        key: tuple,
        function: nn.Module,
        inputs: list[Tensor],
        dims: list[int],
        outputs: list[tuple[int | None, ...]],
    ) -> LoweredBackendModule:
        """``dims``: which dimension of each of the first inputs is the length of the call."""
        if key not in self._templates:
            self._templates[key] = self._lower(function, inputs, dims, outputs)
        template = self._templates[key]
        constants = _constants(function)
        if missing := sorted(template.names.keys() - constants.keys()):
            raise ExportError(f"the blocks of {self.model.spec.architecture} differ: {missing}.")
        blob = template.blob
        data_by_name: dict[str, bytes] = {}
        for buffer, generic in template.names.items():
            name, data = constants[buffer]
            blob = blob.replace(generic.encode(), name.encode())
            data_by_name[name] = data
        self.flops += template.flops
        self.count += 1
        return rebound(blob, data_by_name | template.shared, template.shapes)

    def _lower(
        self,
        function: nn.Module,
        inputs: list[Tensor],
        dims: list[int],
        outputs: list[tuple[int | None, ...]],
    ) -> _Template:
        length = Dim("length", min=1, max=self.longest)
        shapes = ((*({dim: length} for dim in dims), *[None] * (len(inputs) - len(dims))),)

        def capture(module: nn.Module) -> ExportedProgram:
            with torch.no_grad():
                return torch.export.export(
                    module, tuple(inputs), dynamic_shapes=shapes if dims else None, strict=False
                )

        stand_in = _with_random_weights(function)
        lowered, flops = lower_whole(stand_in, capture(stand_in))
        held = constants_of(lowered)
        # A piece uses only a part of each of its two blocks.
        every = {buffer: name for buffer, (name, _) in _constants(stand_in).items()}
        names = {buffer: name for buffer, name in every.items() if name in held}
        shared = {name: data for name, data in held.items() if name not in names.values()}
        shapes_only = ShapesOnly(outputs)
        program = stand_for(capture(shapes_only), shapes_only)
        return _Template(lowered.processed_bytes, names, shared, program, flops)
