"""Whole packages in the interpreter of MIL: read from disk, against coremltools operation by
operation and PyTorch end to end; compressed constants, states, refusals, damaged files."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Var
from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as ios16
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as ios18
from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter
from coremltools.optimize import _utils as packing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from exporters.coreml.convert import capture, convert, tensor_spec
from exporters.coreml.functions import Embed, adapter_inputs
from exporters.coreml.lm_package import lower
from exporters.coreml.patches import quiet
from exporters.errors import ExportError
from exporters.model.assembly import build
from exporters.model.plain_attention import plain_attention
from exporters.model.spec import read_spec
from exporters.model.transformer import Transformer
from exporters.signature import ProgramSignature
from tests import tiny
from tests.bounds import entropy_bound
from tests.exporters.coreml.half_bounds import measured
from tests.toolchain.verify.mil_values import Package as Folded
from toolchain.compile.tolerances import ABOVE, FLOAT16_ABOVE, HALF, rounding
from toolchain.verify.mil.blob import BlobFile
from toolchain.verify.mil.interpreter import Interpreter
from toolchain.verify.mil.mlpackage import MilFunction, Name, Operation, Package, read_package
from toolchain.verify.mil.registry import KERNELS
from toolchain.verify.mil.values import Stored, TensorType, find_dtype

CHUNK, EMBED = 16, 32
# Two exports that have all quantized and all plain constants; with the time, every architecture.
CASES = [
    ("llama", "int4"),
    ("gemma2", "none"),
    *(
        pytest.param(case, marks=pytest.mark.full)
        for case in zip(tiny.ARCHITECTURES, ("int8", "fp16", "int4") * 3, strict=True)
    ),
]
# Operations that sum or round in between: folded in float32, and rounded once, as is ours.
SUMS = ("linear", "matmul", "softmax", "reduce_mean", "reduce_sum", "rsqrt", "log")
# One step of the format, as a part of a value's size.
STEPS = {np.dtype(np.float16): 2.0**-10, np.dtype(np.float32): 2.0**-23}
ADDED = ("linear", "matmul", "reduce_mean", "reduce_sum")


@dataclass(frozen=True)
class Made:
    """A model and the package that was made of it."""

    quantize: str
    model: Transformer
    path: Path


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    kind, quantize = request.param
    one = {name: v[:1] for name, v in tiny.ARCHITECTURES[kind].items() if isinstance(v, list)}
    source = tiny.hugging_face(kind, num_hidden_layers=1, **one)
    targets = ["qkv_proj", "down_proj"] if kind == "phi3" else ["q_proj", "v_proj", "down_proj"]
    model = build(read_spec(source.config, tiny.CONTEXT), source.state_dict(), targets, 4)
    out = tmp_path_factory.mktemp("mil") / f"{kind}.mlpackage"
    lower(model, out, quantize=quantize, prefill_length=CHUNK, embed_length=EMBED)
    return Made(quantize, model, out)


@pytest.fixture(scope="module")
def package(made: Made) -> Path:
    """A package with states, for what is the same in all."""
    return made.path


def random_inputs(function: MilFunction, seed: int, start: int, count: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn([n or 1 for n in kind.shape], generator=random) * 0.3
        for name, kind in function.inputs.items()
    }
    length = function.inputs["tokens"].shape[1]
    assert length is not None
    inputs["tokens"] = tiny.tokens_of(length, seed, 40).int()
    for name, value in (("start", start), ("count", count)):
        if name in inputs:
            inputs[name] = torch.tensor([value], dtype=torch.int32)
    return inputs


def lockstep(
    interpreter: Interpreter, reference: Folded, name: str, start: int, states: dict[str, Tensor]
) -> int:
    """Runs a function, and folds each of its operations on the values that the run had before it.
    Returns how many values were compared."""
    function = interpreter.package.function(name)
    inputs = random_inputs(function, start + 1, start, 5)
    seen: dict[str, np.ndarray] = {}
    reference.state = {key: value.numpy() for key, value in states.items()}
    interpreter.run(name, inputs, states, lambda _, key, value: seen.update({key: value.numpy()}))
    program = reference.program.functions[name]
    values = {program.inputs[key]: value.numpy() for key, value in inputs.items()}
    compared = 0
    for op in program.operations:
        wide = op.op_type in SUMS and op.outputs[0].name in seen
        known = {v: _wide(x) for v, x in values.items()} if wide else dict(values)
        # What sums in another order may differ by is a part of their terms' magnitudes.
        magnitudes = {v: _magnitude(x) for v, x in known.items()}
        if op.op_type in ADDED:
            reference._run(op, magnitudes)
        reference._run(op, known)
        for var in op.outputs:
            wanted = np.asarray(known[var])
            if var.name not in seen:
                values[var] = known[var]
                continue
            found = seen.pop(var.name)
            sums = 0.0
            if op.op_type in ADDED:
                inputs = [known[v] for v in op.inputs.values() if isinstance(v, Var)]
                terms = max(n for x in inputs for n in (*np.shape(x), 1))
                sums = rounding(terms) * float(np.max(magnitudes[var]))
            what = f"{op.op_type} {var.name}"
            close(found, wanted.astype(found.dtype) if wide else wanted, what, sums)
            values[var] = found.astype(wanted.dtype if not wide else found.dtype)[()]
            compared += 1
    assert not seen
    for key, value in states.items():
        np.testing.assert_array_equal(value.numpy(), reference.state[key])
    return compared


def _wide(value: object) -> object:
    half = isinstance(value, np.ndarray | np.generic) and value.dtype == np.float16
    return value.astype(np.float32) if half else value  # type: ignore[attr-defined]


def _magnitude(value: object) -> object:
    number = isinstance(value, np.ndarray | np.generic) and value.dtype.kind == "f"
    return np.abs(value) if number else value  # type: ignore[call-overload]


def close(found: np.ndarray, wanted: np.ndarray, what: str, sums: float = 0.0) -> None:
    """Floats to 8 steps of their format, and what ``sums`` in another order may add."""
    assert found.shape == wanted.shape, what
    if found.dtype.kind != "f":
        np.testing.assert_array_equal(found, wanted, what)
        return
    assert found.dtype == wanted.dtype, what
    size = np.abs(wanted.astype(np.float64)).max(initial=0)
    np.testing.assert_allclose(
        found.astype(np.float64),
        wanted.astype(np.float64),
        rtol=0,
        atol=size * STEPS[found.dtype] * (8 if found.dtype == np.float32 else 1) + sums,
        err_msg=what,
    )


def test_every_operation_of_a_package(made: Made) -> None:
    """Against coremltools' folding, from a prompt with padding over a state that is in use."""
    interpreter, reference = Interpreter(read_package(made.path)), Folded(made.path)
    states = interpreter.states("prefill")
    for name, start in (("prefill", 0), ("prefill", 5), ("decode", 10), ("decode", 11)):
        assert lockstep(interpreter, reference, name, start, states) > 90
    assert states["k_0"][:, :, 12:].eq(0).all()
    assert states["k_0"][:, :, :12].ne(0).any(-1).all()
    assert lockstep(interpreter, reference, "embed", 0, {}) > 90


def test_constants_of_a_package(made: Made) -> None:
    """Every constant, decompressed, is to the bit what coremltools reads from the package."""
    interpreter, reference = Interpreter(read_package(made.path)), Folded(made.path)
    for name, function in reference.program.functions.items():
        constants = dict(interpreter.constants(name))
        for op in function.operations:
            if op.op_type.startswith("constexpr"):
                wanted = op.materialized_val_inference()
            elif op.op_type == "const" and not isinstance(op.val.val, str):
                wanted = np.asarray(op.val.val)
            else:
                continue
            # coremltools makes constants of its own of what stands inside of an operation.
            if op.outputs[0].name not in constants:
                assert op.op_type == "const"
                continue
            found = constants.pop(op.outputs[0].name).numpy()
            assert found.dtype == wanted.dtype or wanted.dtype == np.uint16
            np.testing.assert_array_equal(found, wanted)
        assert not constants


@torch.no_grad()
def test_a_package_is_the_model(made: Made) -> None:
    """Prefill in chunks, then decode, and the embedding, against PyTorch with its own weights."""
    model = made.model
    interpreter = Interpreter(read_package(made.path))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    names = {name.replace(".", "_"): name for name in buffers}
    for name, value in interpreter.constants("decode"):
        if name.endswith("_quantized"):
            matrix = name.removeprefix("b_body_model_").split("_to_fp16")[0]
            buffers[names[matrix]].copy_(value)
    random = torch.Generator().manual_seed(3)
    for path_of in adapter_inputs(model).values():
        buffers[path_of].copy_(torch.randn(buffers[path_of].shape, generator=random) * 0.3)
    adapter = {name: buffers[path_of] for name, path_of in adapter_inputs(model).items()}
    tokens = tiny.tokens_of(24).int()
    expected = model(tokens)[0]
    states = interpreter.states("decode")
    half = made.quantize != "none"  # the cache is float16 in all of them
    allowed = measured(model, tokens, 24, half)
    print(f"{made.quantize}: {allowed}")
    assert max(allowed.logits, allowed.pooled) < 1e-2  # a wrong constant of 1 % is seen
    bound = allowed.logits * expected.abs().max()
    for start, count in ((0, CHUNK), (CHUNK, 4)):
        chunk = torch.full((1, CHUNK), 7, dtype=torch.int32)
        chunk[:, :count] = tokens[:, start : start + count]
        places = {"start": torch.tensor([start]).int(), "count": torch.tensor([count]).int()}
        found = interpreter.run("prefill", {"tokens": chunk} | places | adapter, states)
        assert (found["logits"][0] - expected[start + count - 1]).abs().max() <= bound
    for place in range(20, 24):
        step = {"tokens": tokens[:, place : place + 1], "start": torch.tensor([place]).int()}
        found = interpreter.run("decode", step | adapter, states)
        assert (found["logits"][0] - expected[place]).abs().max() <= bound
    text = torch.zeros(1, EMBED, dtype=torch.int32)
    text[:, :24] = tokens
    found = interpreter.run("embed", {"tokens": text, "count": torch.tensor([24]).int()})
    pooled, entropy = Embed(model, EMBED)(text, torch.tensor([24]))
    assert tiny.relative(found["pooled"], pooled) <= allowed.pooled
    attends = [plain_attention(model.spec, layer) for layer in model.spec.layers]
    norms = model.hidden(tokens, torch.arange(24), attends, adapted=False)[0].norm(dim=-1)
    assert abs((found["entropy"] - entropy).item()) <= entropy_bound(norms, allowed.norm)


class Step(nn.Module):
    """A LoRA layer's loss with its gradients by hand, and one AdamW step, of plain operators."""

    def forward(
        self, x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor, v: Tensor, target: Tensor
    ) -> tuple[Tensor, ...]:
        """x [T, in], w [out, in], a [r, in], b [out, r], m and v [r, in], target int32 [T]"""
        low = x @ a.T
        logits = torch.tanh((x @ w.T + low @ b.T) / 4) * 4
        p = torch.softmax(logits, -1)
        own = torch.gather(p, 1, target[:, None].long())[:, 0]
        real = target > 2
        loss = torch.where(real, -torch.log(own), torch.zeros_like(own)).sum() / real.sum()
        hot = (torch.arange(w.shape[0], dtype=torch.int32)[None] == target[:, None]).to(x.dtype)
        g = (p - hot) * real[:, None].to(x.dtype) * (1 - (logits / 4) ** 2)
        first, second = torch.split(g, [2, w.shape[0] - 2], dim=1)
        g = torch.cat([first, second], 1)
        db, da = g.T @ low, (g @ b).T @ x
        m, v = m * 0.9 + da * 0.1, v * 0.999 + da * da * 0.001
        norm = torch.sqrt((da * da).sum())
        stepped = a - 0.1 * torch.clamp(1 / (norm + 1e-6), max=1.0) * m / (torch.sqrt(v) + 1e-8)
        gated = torch.nn.functional.gelu(x) + torch.nn.functional.silu(x).abs()
        return loss[None], db, stepped, m, v, gated


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_a_training_step(half: bool, tmp_path: Path) -> None:
    shapes = {"x": (6, 8), "w": (12, 8), "a": (4, 8), "b": (12, 4), "m": (4, 8), "v": (4, 8)}
    random = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(s, generator=random) for name, s in shapes.items()}
    inputs["v"] = inputs["v"].abs()
    inputs["target"] = torch.tensor([3, 0, 5, 11, 2, 3], dtype=torch.int32)
    expected = Step()(**inputs)
    kind = torch.float16 if half else torch.float64
    other = Step()(**{n: t.to(kind) if t.is_floating_point() else t for n, t in inputs.items()})
    names = ["loss", "db", "stepped", "m_next", "v_next", "gated"]
    specs = [tensor_spec(name, t) for name, t in inputs.items()]
    gives = [tensor_spec(name, t) for name, t in zip(names, expected, strict=True)]
    signature = ProgramSignature("step", tuple(specs), tuple(gives))
    path = tmp_path / "step.mlpackage"
    with quiet():
        convert(capture(Step(), inputs), signature, {}, half, path)
    found = Interpreter(read_package(path)).run("main", inputs)
    assert list(found) == names
    # By what the format does to the step in PyTorch, and at least to a chain or a sum of 12.
    times, least = (FLOAT16_ABOVE, 8 * HALF) if half else (ABOVE, rounding(12))
    for name, wanted, one in zip(names, expected, other, strict=True):
        bound = max(least, times * tiny.relative(one.double(), wanted.double()))
        assert bound < 1e-2  # a wrong constant of 1 % is seen
        assert tiny.relative(found[name], wanted) <= bound, name


def test_watching_and_forgetting(package: Path) -> None:
    """Each value is shown once, in order, with its operation; what is used up is gone."""
    interpreter = Interpreter(read_package(package))
    function = interpreter.package.function("decode")
    alive: list[weakref.ref] = []
    most, names = 0, []

    def watch(operation: Operation, name: str, value: Tensor) -> None:
        nonlocal most
        assert operation.outputs[name].admits(value)
        names.append(name)
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))

    inputs = random_inputs(function, 1, 0, 1)
    watched = interpreter.run("decode", inputs, interpreter.states("decode"), watch)
    unwatched = interpreter.run("decode", inputs, interpreter.states("decode"))
    torch.testing.assert_close(watched, unwatched, rtol=0, atol=0)
    assert len(set(names)) == len(names) > 100
    assert most < 20


def test_keeping_constants_changes_nothing(package: Path) -> None:
    read = read_package(package)
    inputs = random_inputs(read.function("embed"), 1, 0, 3)
    kept = Interpreter(read, keep_bytes=10_000_000)
    expected = Interpreter(read).run("embed", inputs)
    for _ in range(2):
        torch.testing.assert_close(kept.run("embed", inputs), expected, rtol=0, atol=0)


PACKED = {"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6, "int4": 4}
PLAIN = {"float32": "float", "float16": "fp16"} | {
    n: n for n in ("int8", "uint8", "int16", "uint16", "int32", "uint32")
}


def stored(path: Path, values: dict[str, np.ndarray]) -> dict[str, int]:
    writer = _BlobStorageWriter(str(path))
    offsets = {}
    for name, value in values.items():
        raw = value.view(np.uint16) if name == "float16" else value
        offsets[name] = getattr(writer, f"write_{PLAIN.get(name, name)}_data")(raw)
    del writer
    return offsets


@pytest.mark.parametrize("count", [1, 5, 8, 64, 77])
def test_weight_files(count: int, tmp_path: Path) -> None:
    """All dtypes, against the file's writer and coremltools' own reader."""
    random = np.random.default_rng(count)
    values = {n: random.integers(0, 100, count).astype(n) for n in PLAIN}
    for name, bits in PACKED.items():
        low = -(2 ** (bits - 1)) if name == "int4" else 0
        numbers = random.integers(low, low + 2**bits, count)
        builtin = getattr(ct.converters.mil.mil.types, name)
        values[name] = numbers.astype(ct.converters.mil.mil.types.nptype_from_builtin(builtin))
    offsets = stored(tmp_path / "weight.bin", values)
    file = BlobFile(tmp_path / "weight.bin")
    reader = _BlobStorageReader(str(tmp_path / "weight.bin"))
    for name, offset in offsets.items():
        kind = TensorType(find_dtype(name), (count,))
        found = Stored(kind, file, offset).load().numpy()
        np.testing.assert_array_equal(found, values[name].astype(found.dtype))
        read = getattr(reader, f"read_{PLAIN.get(name, name)}_data")(offset)
        read = np.asarray(read).view(np.float16) if name == "float16" else np.asarray(read)
        np.testing.assert_array_equal(found, read.astype(found.dtype))


def decompressed(name: str, **arguments: object) -> np.ndarray:
    tensors = {key: [torch.from_numpy(np.asarray(v))] for key, v in arguments.items()}
    (found,) = KERNELS[name].compute(tensors)
    return found.numpy()


@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    size=st.integers(1, 4),
    kind=st.sampled_from([np.float16, np.float32]),
    shifted=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_scales(seed: int, counts: list[int], size: int, kind: type, shifted: bool) -> None:
    random = np.random.default_rng(seed)
    data = random.integers(-128, 128, [n * size for n in counts]).astype(np.int8)
    scale = random.uniform(0.01, 1, counts).astype(kind)
    offset = random.integers(-128, 128, counts).astype(np.int8) if shifted else None
    given_offset = {} if offset is None else {"offset": offset}
    found = decompressed("constexpr_blockwise_shift_scale", data=data, scale=scale, **given_offset)
    wanted = ios18.constexpr_blockwise_shift_scale.decompress(data, scale, offset)
    np.testing.assert_array_equal(found.astype(kind), wanted)
    axis = int(random.integers(len(counts)))
    scales = random.uniform(0.01, 1, data.shape[axis]).astype(np.float32)
    zeros = random.integers(-128, 128, data.shape[axis]).astype(np.int8)
    for zero, step in ((zeros, scales), (zeros[0], scales[0])):
        found = decompressed(
            "constexpr_affine_dequantize",
            quantized_data=data, zero_point=zero, scale=step, axis=np.int32(axis),
        )  # fmt: skip
        wanted = ios16.constexpr_affine_dequantize.decompress(data, zero, step, axis)
        np.testing.assert_array_equal(found, wanted)


@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    size=st.integers(1, 4),
    bits=st.sampled_from([1, 2, 3, 4, 6, 8]),
    vector=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_tables(seed: int, counts: list[int], size: int, bits: int, vector: int) -> None:
    random = np.random.default_rng(seed)
    indices = random.integers(0, 2**bits, [n * size for n in counts]).astype(np.uint8)
    table = random.normal(size=(*counts, 2**bits, vector)).astype(np.float16)
    axis = int(random.integers(len(counts)))
    found = decompressed(
        "constexpr_lut_to_dense", indices=indices, lut=table, vector_axis=np.int32(axis)
    )
    wanted = ios18.constexpr_lut_to_dense.decompress(indices, table, axis)
    np.testing.assert_array_equal(found, wanted)
    packed = packing.pack_elements_into_bits(indices.flatten(), bits)
    flat = table.reshape(-1)[: 2**bits]
    found = decompressed(
        "constexpr_lut_to_dense", indices=packed, lut=flat, shape=np.int32(indices.shape)
    )
    np.testing.assert_array_equal(found, flat[indices])
    half = random.normal(size=3).astype(np.float16)
    (wide,) = KERNELS["constexpr_cast"].compute(
        {"source_val": [torch.from_numpy(half)], "output_dtype": ["fp32"]}
    )
    np.testing.assert_array_equal(wide.numpy(), half.astype(np.float32))


TWO = TensorType(find_dtype("float32"), (2,))


def by_hand(*operations: Operation, outputs: tuple[str, ...] = ("y",)) -> Interpreter:
    function = MilFunction("f", {"x": TWO}, {"s": TWO}, outputs, operations)
    return Interpreter(Package(Path("hand.mlpackage"), {"f": function}))


def operation(kind: str, gives: str, nested: bool = False, **arguments: str) -> Operation:
    given_names = {key: (Name(value),) for key, value in arguments.items()}
    return Operation(kind, f"op_{gives}", given_names, {gives: TWO} if gives else {}, nested)


@pytest.mark.parametrize("both", [True, False])
def test_states(both: bool) -> None:
    """What is read before and after a write, in both forms of writing; all or nothing."""
    update = operation("coreml_update_state", "new", state="s", value="sum")
    write = operation("write_state", "", input="s", data="sum")
    steps = [
        operation("read_state", "old", input="s"),
        operation("add", "sum", x="x", y="old"),
        update if both else write,
        operation("read_state", "again", input="s"),
    ]
    outputs = ("old", "again", "new") if both else ("old", "again")
    interpreter = by_hand(*steps, outputs=outputs)
    states = interpreter.states("f")
    x = torch.tensor([1.0, 2.0])
    for before in (0, 1, 2):
        found = interpreter.run("f", {"x": x}, states)
        assert found["old"].equal(x * before)
        assert all(found[name].equal(x * (before + 1)) for name in outputs[1:])
        assert states["s"].equal(x * (before + 1))
    # A function that shares no state leaves those of others alone.
    failing = by_hand(*steps, operation("gather", "y", x="x", indices="again"), outputs=("y",))
    with pytest.raises(ExportError, match=r"gather \(op_y\)"):
        failing.run("f", {"x": x}, states)
    assert states["s"].equal(x * 3)


def test_what_is_unknown_is_refused_at_once() -> None:
    seen = []
    interpreter = by_hand(
        operation("add", "a", x="x", y="x"),
        operation("conv", "b", x="a"),
        operation("lstm", "c", x="b"),
        operation("conv", "d", x="c"),
        operation("cond", "e", nested=True, pred="d"),
        operation("exp", "f", x="e", base="e"),
        operation("add", "y", x="f"),
    )
    states = interpreter.states("f")
    with pytest.raises(ExportError) as refused:
        interpreter.run("f", {"x": torch.ones(2)}, states, lambda *one: seen.append(one))
    assert not seen
    assert (
        "function 'f' cannot be computed: operations that are not known: cond (1 times), "
        "conv (2 times), lstm (1 times); add (op_y) lacks its parameter 'y'; exp has the unknown "
        "parameter 'base'. Known are: abs, "
    ) in str(refused.value)


def test_arguments_that_do_not_fit(package: Path) -> None:
    interpreter = Interpreter(read_package(package))
    with pytest.raises(ExportError, match="has no function 'train'; it has decode, embed, prefill"):
        interpreter.run("train", {})
    inputs = {"tokens": torch.zeros(1, 3, dtype=torch.int32), "extra": torch.ones(1)}
    with pytest.raises(ExportError) as refused:
        interpreter.run("embed", inputs)
    assert str(refused.value) == (
        "function 'embed': input 'tokens' is int32 [1, 3], not int32 [1, 32]; "
        "input 'count' is missing, not int32 [1]; input 'extra' is not known."
    )
    with pytest.raises(ExportError, match=r"state 'k_0' is missing, not float16 \[1, 2, 48, "):
        interpreter.run("decode", random_inputs(interpreter.package.function("decode"), 1, 0, 1))


def test_a_result_that_is_not_what_was_declared() -> None:
    wide = replace(operation("add", "y", x="x", y="x"), outputs={"y": replace(TWO, shape=(3,))})
    interpreter = by_hand(wide)
    with pytest.raises(ExportError, match=r"add \(op_y\) gives float32 \[2\] where float32 \[3\]"):
        interpreter.run("f", {"x": torch.ones(2)}, interpreter.states("f"))


def test_damaged_packages(package: Path, tmp_path: Path) -> None:
    inputs = random_inputs(read_package(package).function("embed"), 1, 0, 3)

    def damaged(path: Path, change: str) -> Path:
        copy = tmp_path / f"{len(list(tmp_path.iterdir()))}.mlpackage"
        shutil.copytree(package, copy)
        file = copy / path
        content = file.read_bytes()
        if change == "missing":
            file.unlink()
        elif change == "short":
            file.write_bytes(content[: len(content) // 2])
        else:
            file.write_bytes(content.replace(b"\xef\xbe\xad\xde", b"\xef\xbe\xad\xdf"))
        return copy

    root = Path("Data/com.apple.CoreML")
    weights = root / "weights/weight.bin"
    for path, change, message in (
        (Path("Manifest.json"), "missing", "is not an .mlpackage: it has no Manifest.json"),
        (Path("Manifest.json"), "short", "does not name a model"),
        (root / "model.mlmodel", "missing", "is missing: the package is not complete"),
        (root / "model.mlmodel", "short", "is not a Core ML model"),
        (weights, "missing", "is missing: the package is not complete"),
        (weights, "short", "truncated"),
        (weights, "headers", "has no header there: the file is damaged"),
    ):
        with pytest.raises(ExportError, match=message):
            Interpreter(read_package(damaged(path, change))).run("embed", inputs)
    with pytest.raises(ExportError, match=r"is not an \.mlpackage"):
        read_package(tmp_path / "nothing.mlpackage")
    listing = json.loads((package / "Manifest.json").read_text())
    assert read_package(package).path == package
    assert listing["rootModelIdentifier"] in listing["itemInfoEntries"]


def test_weights_of_another_program(tmp_path: Path) -> None:
    offsets = stored(tmp_path / "weight.bin", {"int8": np.arange(6, dtype=np.int8)})
    file = BlobFile(tmp_path / "weight.bin")
    for name, count in (("float16", 3), ("int8", 7)):
        with pytest.raises(ExportError, match="do not belong together"):
            Stored(TensorType(find_dtype(name), (count,)), file, offsets["int8"]).load()
    (tmp_path / "other.bin").write_bytes(b"\x01\x00\x00\x00\x07\x00\x00\x00" + bytes(64))
    with pytest.raises(ExportError, match="a weight file of version 7; only 2 is known"):
        BlobFile(tmp_path / "other.bin")
