"""Each MIL operation on random shapes, against coremltools' constant folding, or NumPy and PyTorch
where coremltools does not fold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder, Function
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from exporters.errors import ExportError
from toolchain.compile.tolerances import HALF, SINGLE, rounding
from toolchain.verify.mil.operations import known
from toolchain.verify.mil.registry import KERNELS

EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
)
SEEDS = st.integers(0, 2**31)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
FLOATS = st.sampled_from([np.float16, np.float32])
NUMBERS = st.sampled_from([np.float16, np.float32, np.int32])
# Of the result's own size: one rounding, and what single intermediate roundings add to it. How many
# of these a chain of elementary functions takes, each right to a few last bits, is ``steps``.
STEPS = {np.dtype(np.float16): 2.0**-10, np.dtype(np.float32): 2.0**-21}


def tensor(value: object) -> torch.Tensor | str:
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    return torch.from_numpy(array.astype(np.int32) if array.dtype == np.int64 else array)


def ours(name: str, **arguments: object) -> list[np.ndarray]:
    """What the kernel gives; floats rounded to the dtype of its first floating argument."""
    several = {
        key: [tensor(v) for v in (value if isinstance(value, tuple) else (value,))]
        for key, value in arguments.items()
    }
    return [result.numpy() for result in KERNELS[name].compute(several)]


def folded(name: str, **arguments: object) -> list[np.ndarray]:
    with Function({}, opset_version=ct.target.iOS18):
        result = getattr(Builder, name)(**arguments)
        results = result if isinstance(result, list | tuple) else [result]
        assert all(r.val is not None for r in results), f"{name} did not fold"
        return [np.asarray(r.val) for r in results]


def agree(
    found: Sequence[np.ndarray],
    wanted: Sequence[np.ndarray],
    dtype: object,
    steps: float = 1.0,
    sums: float = 0.0,
) -> None:
    """Integers exactly; floats after rounding to ``dtype`` within ``steps`` of its precision, of
    the largest value, and what ``sums`` in another order may add."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        if one.dtype.kind != "f":
            assert one.dtype == other.dtype or other.dtype == np.int64
            np.testing.assert_array_equal(one, other)
            continue
        rounded = one.astype(dtype).astype(np.float64)
        reference = other.astype(np.float64)
        finite = np.abs(reference[np.isfinite(reference)])
        size = finite.max() if finite.size else 0.0
        np.testing.assert_allclose(
            rounded, reference, rtol=0, atol=steps * STEPS[np.dtype(dtype)] * size + sums
        )


def check(name: str, dtype: object, steps: float = 1.0, **arguments: object) -> None:
    agree(ours(name, **arguments), folded(name, **arguments), dtype, steps)


def check_sums(name: str, dtype: object, terms: int, **arguments: object) -> None:
    """An operation that adds so many ``terms``: by a part of the sum of their magnitudes, which
    is what the operation gives of the magnitudes of its inputs."""
    floats = {
        k: v for k, v in arguments.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"
    }
    largest = ours(name, **(arguments | {k: np.abs(v) for k, v in floats.items()}))
    # A logarithm turns a part of what it is taken of into as much of itself.
    size = max(float(np.abs(one).max()) for one in largest) + ("log" in name)
    sums = size * rounding(terms)
    sums *= HALF / SINGLE if dtype is np.float16 else 1.0
    agree(ours(name, **arguments), folded(name, **arguments), dtype, 1.0, sums)


def numbers(
    seed: int, shape: Sequence[int], dtype: object, low: float = -3, high: float = 3
) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, tuple(shape)).astype(dtype)


ANY, POSITIVE, UNIT = (-3.0, 3.0), (0.1, 3.0), (-0.95, 0.95)
SMOOTH = (
    *("abs", "atan", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor", "relu", "relu6"),
    *("round", "sigmoid", "sign", "sin", "sinh", "softplus", "softsign", "square", "tanh"),
)
UNARY = {
    **dict.fromkeys(SMOOTH, ANY),
    **dict.fromkeys(["acos", "asin", "atanh", "tan"], UNIT),
    **dict.fromkeys(["log", "sqrt", "rsqrt", "inverse"], POSITIVE),
}


@pytest.mark.parametrize("name", UNARY)
@given(seed=SEEDS, shape=SHAPES, dtype=FLOATS)
@settings(EXAMPLES, max_examples=6)
def test_unary(name: str, seed: int, shape: tuple[int, ...], dtype: type) -> None:
    check(name, dtype, 4, x=numbers(seed, shape, dtype, *UNARY[name]))


@pytest.mark.parametrize("name", ["log", "rsqrt", "inverse"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.5])
def test_epsilon(name: str, epsilon: float) -> None:
    x = numbers(1, (3, 4), np.float32, *POSITIVE)
    check(name, np.float32, 2, x=x, epsilon=np.float32(epsilon))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("clip", {"alpha": -0.5, "beta": 1.25}),
        ("threshold", {"alpha": 0.5}),
        ("leaky_relu", {"alpha": 0.25}),
        ("elu", {"alpha": 1.5}),
        ("scaled_tanh", {"alpha": 1.5, "beta": 0.5}),
        ("linear_activation", {"alpha": 1.5, "beta": 0.5}),
        ("sigmoid_hard", {"alpha": 0.25, "beta": 0.5}),
        ("gelu", {"mode": "EXACT"}),
        ("gelu", {"mode": "TANH_APPROXIMATION"}),
        ("gelu", {"mode": "SIGMOID_APPROXIMATION"}),
        ("gelu", {}),
    ],
)
@given(seed=SEEDS, shape=SHAPES)
@settings(EXAMPLES, max_examples=5)
def test_activations(name: str, parameters: dict, seed: int, shape: tuple[int, ...]) -> None:
    values = {k: v if isinstance(v, str) else np.float32(v) for k, v in parameters.items()}
    check(name, np.float32, 4, x=numbers(seed, shape, np.float32), **values)


@given(seed=SEEDS, shape=SHAPES)
@EXAMPLES
def test_silu(seed: int, shape: tuple[int, ...]) -> None:
    x = numbers(seed, shape, np.float32)
    wide = x.astype(np.float64)
    agree(ours("silu", x=x), [wide / (1 + np.exp(-wide))], np.float32, 2)


COMPARISONS = ["equal", "not_equal", "greater", "greater_equal", "less", "less_equal"]
ARITHMETIC = ["add", "sub", "mul", "maximum", "minimum", "floor_div", "mod"]


@pytest.mark.parametrize("name", [*ARITHMETIC, *COMPARISONS])
@given(seed=SEEDS, shape=SHAPES, dtype=NUMBERS, data=st.data())
@settings(EXAMPLES, max_examples=8)
def test_binary(
    name: str, seed: int, shape: tuple[int, ...], dtype: type, data: st.DataObject
) -> None:
    """With broadcasting, by axes of size 1 and by missing axes."""
    other = [data.draw(st.sampled_from([1, n])) for n in shape]
    x = numbers(seed, shape, dtype)
    y = numbers(seed + 1, other[data.draw(st.integers(0, len(other) - 1)) :], dtype)
    if name in ("floor_div", "mod"):
        y = np.where(np.abs(y) < 1, dtype(2), y)
    check(name, dtype, x=x, y=y)


@given(seed=SEEDS, shape=SHAPES, dtype=FLOATS)
@EXAMPLES
def test_division_and_powers(seed: int, shape: tuple[int, ...], dtype: type) -> None:
    x = numbers(seed, shape, dtype)
    y = numbers(seed + 1, shape, dtype, *POSITIVE)
    check("real_div", dtype, x=x, y=y)
    check("pow", dtype, 2, x=y, y=x)


@pytest.mark.parametrize("name", ["logical_and", "logical_or", "logical_xor"])
def test_logic(name: str) -> None:
    x, y = np.array([[True], [False]]), np.array([True, False])
    check(name, np.float32, x=x, y=y)
    check("logical_not", np.float32, x=x)


CASTS = ["fp16", "fp32", "int32", "int16", "uint16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("wanted", CASTS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32, np.bool])
def test_casts(wanted: str, dtype: type) -> None:
    """Floats are truncated; what a narrower integer cannot hold is not defined for floats."""
    x = np.array([-3.7, -0.5, 0, 0.5, 1.5, 100.9])
    x = np.abs(x) if wanted.startswith("u") and dtype is not np.int32 else x
    (found,), (reference,) = (f("cast", x=x.astype(dtype), dtype=wanted) for f in (ours, folded))
    assert found.dtype == (np.int32 if wanted == "uint16" else reference.dtype)
    np.testing.assert_array_equal(found, reference)


REDUCTIONS = [
    *("sum", "mean", "prod", "max", "min", "sum_square"),
    *("l1_norm", "l2_norm", "log_sum", "log_sum_exp"),
]


@pytest.mark.parametrize("name", REDUCTIONS)
@given(seed=SEEDS, shape=SHAPES, keep=st.booleans(), data=st.data())
@settings(EXAMPLES, max_examples=10)
def test_reductions(
    name: str, seed: int, shape: tuple[int, ...], keep: bool, data: st.DataObject
) -> None:
    every = st.lists(st.sampled_from(range(len(shape))), min_size=1, unique=True)
    axes = data.draw(st.none() | every)
    negative = data.draw(st.booleans())
    given_axes = {} if axes is None else {"axes": np.int32(axes) - len(shape) * negative}
    x = numbers(seed, shape, np.float32, *(POSITIVE if "log" in name else ANY))
    if name in ("max", "min"):
        check(f"reduce_{name}", np.float32, 0, x=x, keep_dims=keep, **given_axes)
    else:
        check_sums(f"reduce_{name}", np.float32, x.size, x=x, keep_dims=keep, **given_axes)
    if name in ("sum", "mean", "max", "min"):
        whole = numbers(seed, shape, np.int32, -50, 50)
        check(f"reduce_{name}", np.float32, x=whole, keep_dims=keep, **given_axes)


@pytest.mark.parametrize("name", ["reduce_argmax", "reduce_argmin"])
@given(seed=SEEDS, shape=SHAPES, keep=st.booleans(), data=st.data())
@settings(EXAMPLES, max_examples=8)
def test_arguments(
    name: str, seed: int, shape: tuple[int, ...], keep: bool, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = numbers(seed, shape, np.float32)
    check(name, np.float32, x=x, axis=np.int32(axis), keep_dims=keep)


@given(seed=SEEDS, shape=SHAPES, dtype=FLOATS, data=st.data())
@EXAMPLES
def test_softmax_and_order(
    seed: int, shape: tuple[int, ...], dtype: type, data: st.DataObject
) -> None:
    axis = np.int32(data.draw(st.integers(-len(shape), len(shape) - 1)))
    check("softmax", dtype, 8, x=numbers(seed, shape, dtype, -9, 9), axis=axis)
    x = np.random.default_rng(seed).permutation(int(np.prod(shape))).reshape(shape)
    x = x.astype(np.float32)
    up = data.draw(st.booleans())
    check("argsort", np.float32, x=x, axis=axis, ascending=up)
    k = np.int32(data.draw(st.integers(1, shape[axis])))
    check("topk", np.float32, x=x, k=k, axis=axis, ascending=up)
    reverse = data.draw(st.booleans())
    running = np.int32(axis % len(shape))
    check("cumsum", np.float32, 0, x=x, axis=running, reverse=reverse)  # of integers, exact
    exclusive = ours("cumsum", x=x, axis=running, exclusive=True)
    agree(exclusive, [np.cumsum(x, running) - x], np.float32, 0)


@given(seed=SEEDS, shape=SHAPES, data=st.data())
@EXAMPLES
def test_norms(seed: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(shape) - 1))
    axes, sizes = np.arange(first, len(shape), dtype=np.int32), shape[first:]
    x, gamma, beta = (numbers(seed + i, s, np.float32) for i, s in enumerate((shape, sizes, sizes)))
    found = ours("layer_norm", x=x, axes=axes, gamma=gamma, beta=beta, epsilon=np.float32(1e-2))
    values = (torch.from_numpy(v) for v in (x, gamma, beta))
    source, *affine = values
    reference = torch.nn.functional.layer_norm(source, sizes, *affine, eps=1e-2)
    agree(found, [reference.numpy()], np.float32, 16)
    if len(shape) >= 3:
        check("l2_norm", np.float32, 4, x=x, epsilon=np.float32(1e-3))


@given(seed=SEEDS, batch=SHAPES, dtype=FLOATS, left=st.booleans(), right=st.booleans())
@EXAMPLES
def test_products(seed: int, batch: tuple[int, ...], dtype: type, left: bool, right: bool) -> None:
    a, b, c = 3, 7, 5
    x = numbers(seed, (*batch, b, a) if left else (*batch, a, b), dtype)
    y = numbers(seed + 1, (*batch[1:], c, b) if right else (*batch[1:], b, c), dtype)
    check_sums("matmul", dtype, b, x=x, y=y, transpose_x=left, transpose_y=right)
    rows = numbers(seed, (*batch[:2], b), dtype)
    weight, bias = numbers(seed + 2, (c, b), dtype), numbers(seed + 3, (c,), dtype)
    check_sums("linear", dtype, b + 1, x=rows, weight=weight, bias=bias)
    (found,) = ours("linear", x=rows, weight=weight)
    assert found.dtype == np.float32  # sums run in float32; whoever asked rounds them


@given(seed=SEEDS, batch=SHAPES.filter(lambda s: len(s) < 3), mask=st.sampled_from(["", "b", "f"]))
@EXAMPLES
def test_attention(seed: int, batch: tuple[int, ...], mask: str) -> None:
    query, key, value = (
        numbers(seed + i, (*batch, *s), np.float32) for i, s in enumerate([(3, 4), (5, 4), (5, 6)])
    )
    masks = {"b": np.tri(3, 5, 2, dtype=bool), "f": numbers(seed, (3, 5), np.float32)}
    extra = {"attn_mask": masks[mask]} if mask else {}
    arguments = {"query": query, "key": key, "value": value} | extra
    check("scaled_dot_product_attention", np.float32, 16, **arguments)


@given(seed=SEEDS, shape=SHAPES, dtype=NUMBERS, data=st.data())
@EXAMPLES
def test_shapes(seed: int, shape: tuple[int, ...], dtype: type, data: st.DataObject) -> None:
    x, rank = numbers(seed, shape, dtype), len(shape)
    perm = np.int32(data.draw(st.permutations(range(rank))))
    check("transpose", dtype, x=x, perm=perm)
    axis = data.draw(st.integers(-rank - 1, rank))
    check("expand_dims", dtype, x=x, axes=np.int32([axis]))
    check("expand_dims", dtype, x=x, axes=np.int32([0, -1]))
    ones = [axis for axis, n in enumerate(shape) if n == 1]
    if ones and len(ones) < rank:
        check("squeeze", dtype, x=x, axes=np.int32(ones))
        check("squeeze", dtype, x=x)
    check("reshape", dtype, x=x, shape=np.int32([-1, shape[-1]]))
    check("reshape", dtype, x=x, shape=np.int32([1, -1, 0]))
    check("reshape", dtype, x=x, shape=np.int32([0] * rank))
    check("reverse", dtype, x=x, axes=perm[:1])
    check("reverse", dtype, x=x)
    if rank >= 2:
        cut = data.draw(st.integers(1, rank - 1))  # coremltools cannot fold 0
        check("flatten2d", dtype, x=x, axis=np.int32(data.draw(st.sampled_from([cut, cut - rank]))))
        lower, upper = np.int32(data.draw(st.tuples(*[st.integers(-1, 3)] * 2)))
        check("band_part", dtype, x=x, lower=lower, upper=upper)
    check("tile", dtype, x=x, reps=np.int32(data.draw(st.tuples(*[st.integers(1, 3)] * rank))))
    check("identity", dtype, x=x)
    check("shape", dtype, x=x)
    check("fill_like", dtype, ref_tensor=x, value=dtype(3))
    check("non_zero", dtype, x=x)
    (found,) = ours(
        "reshape_like",
        x=x,
        ref_tensors=(np.zeros((9, x.size)), x[None]),
        begins=(np.int32(1), np.int32(0)),
        ends=(np.int32(2), np.int32(1)),
        end_masks=(np.bool(False), np.bool(False)),
    )
    np.testing.assert_array_equal(found, x.reshape(-1, 1))


@given(seed=SEEDS, shape=SHAPES, dtype=NUMBERS, data=st.data())
@EXAMPLES
def test_joining(seed: int, shape: tuple[int, ...], dtype: type, data: st.DataObject) -> None:
    rank = len(shape)
    axis = data.draw(st.integers(-rank, rank - 1))
    values = tuple(numbers(seed + i, shape, dtype) for i in range(3))
    longer = np.concatenate([values[0], values[0]], axis)
    check("concat", dtype, values=(*values, longer), axis=np.int32(axis))
    check("stack", dtype, values=values, axis=np.int32(axis % rank))
    (found,) = ours("concat", values=values[:2], axis=np.int32(axis), interleave=True)
    np.testing.assert_array_equal(found.take(range(0, 2 * shape[axis], 2), axis), values[0])
    np.testing.assert_array_equal(found.take(range(1, 2 * shape[axis], 2), axis), values[1])
    x = np.concatenate(values, axis)
    check("split", dtype, x=x, num_splits=np.int32(3), axis=np.int32(axis))
    sizes = np.int32([shape[axis], 2 * shape[axis]])
    check("split", dtype, x=x, split_sizes=sizes, axis=np.int32(axis))
    cond = numbers(seed, shape, np.float32) > 0
    check("select", dtype, cond=cond, a=values[0], b=values[1])
    check("select", dtype, cond=cond, a=values[0], b=dtype(2))


@given(seed=SEEDS, shape=SHAPES, mode=st.sampled_from(["constant", "reflect", "replicate"]))
@EXAMPLES
def test_pad(seed: int, shape: tuple[int, ...], mode: str) -> None:
    x = numbers(seed, (*shape, 4, 5), np.float32)
    check("pad", np.float32, x=x, pad=np.int32([3, 1, 0, 2]), mode=mode, constant_val=np.float32(2))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_making(dtype: type) -> None:
    check("range_1d", dtype, start=dtype(-2), end=dtype(9), step=dtype(3))
    check("fill", dtype, shape=np.int32([2, 3]), value=dtype(4))
    indices = np.int32([[0, 3], [2, -1]])
    (found,) = ours(
        "one_hot",
        indices=indices,
        one_hot_vector_size=np.int32(4),
        axis=np.int32(1),
        on_value=dtype(5),
        off_value=dtype(-1),
    )
    wanted = np.where(np.arange(4)[None, :, None] == indices[:, None, :], 5, -1)
    agree([found], [wanted.astype(dtype)], dtype)


@given(seed=SEEDS, shape=SHAPES, data=st.data())
@settings(EXAMPLES, max_examples=60)
def test_slices(seed: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    """Masks, strides both ways, negative bounds; and writing where was read."""
    x, rank = numbers(seed, shape, np.float32), len(shape)
    flags = st.lists(st.booleans(), min_size=rank, max_size=rank).map(np.array)
    begin = np.int32([data.draw(st.integers(-n, n - 1)) for n in shape])
    stride = np.int32([data.draw(st.sampled_from([1, 1, 2, 3])) for _ in shape])
    first = begin % np.int32(shape)
    end = np.int32([data.draw(st.integers(b + 1, n)) for b, n in zip(first, shape, strict=True)])
    single = data.draw(flags)
    arguments = {
        "begin": begin,
        "end": end,
        "stride": stride,
        "begin_mask": data.draw(flags),
        "end_mask": data.draw(flags),
    }
    (part,) = ours("slice_by_index", x=x, **arguments)
    if part.size:
        check("slice_by_index", np.float32, x=x, **arguments)
        check("slice_update", np.float32, x=x, update=part + 1, **arguments)
    if not single.all():
        arguments |= {"squeeze_mask": single, "begin_mask": np.zeros(rank, bool)}
        check("slice_by_index", np.float32, x=x, **arguments)
    (back,) = ours("slice_by_index", x=x, begin=begin, end=end * 0 - 99, stride=-stride)
    slices = tuple(slice(int(b), -99, -int(s)) for b, s in zip(begin, stride, strict=True))
    np.testing.assert_array_equal(back, x[slices])
    changed = x.copy()
    changed[slices] = back + 1
    (found,) = ours(
        "slice_update", x=x, update=back + 1, begin=begin, end=end * 0 - 99, stride=-stride
    )
    np.testing.assert_array_equal(found, changed)
    size = (end - first) * ~data.draw(flags)
    size = np.where(size == 0, -1, size).astype(np.int32)  # all that is left
    check("slice_by_size", np.float32, x=x, begin=begin, size=size)


@given(seed=SEEDS, shape=SHAPES, dtype=NUMBERS, data=st.data())
@settings(EXAMPLES, max_examples=30)
def test_gather(seed: int, shape: tuple[int, ...], dtype: type, data: st.DataObject) -> None:
    x, random = numbers(seed, shape, dtype), np.random.default_rng(seed)
    axis = data.draw(st.integers(0, len(shape) - 1))
    batch = data.draw(st.integers(0, axis))
    places = (*shape[:batch], *data.draw(SHAPES)[:2])
    indices = random.integers(0, shape[axis], places, np.int32)
    check("gather", dtype, x=x, indices=indices, axis=np.int32(axis), batch_dims=np.int32(batch))
    along = random.integers(0, shape[axis], (*shape[:axis], 3, *shape[axis + 1 :]), np.int32)
    check("gather_along_axis", dtype, x=x, indices=along, axis=np.int32(axis))
    k = data.draw(st.integers(1, len(shape)))
    tuples = np.stack([random.integers(0, n, (2, 3), np.int32) for n in shape[:k]], -1)
    agree(ours("gather_nd", x=x, indices=tuples), [x[tuple(np.moveaxis(tuples, -1, 0))]], dtype)


REDUCE: dict[str, Callable] = {
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


@pytest.mark.parametrize("mode", [*REDUCE, "update"])
@given(seed=SEEDS, shape=SHAPES, data=st.data())
@settings(EXAMPLES, max_examples=10)
def test_scatter(mode: str, seed: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    """Repeated indices in all modes but ``update``, where no order is promised."""
    x, random = numbers(seed, shape, np.float32), np.random.default_rng(seed)
    axis = data.draw(st.integers(0, len(shape) - 1))
    rows = random.permutation(shape[axis]).astype(np.int32)
    rows = rows if mode == "update" else np.concatenate([rows, rows[:1]])
    updates = numbers(seed + 1, (*shape[:axis], len(rows), *shape[axis + 1 :]), np.float32)
    place = (slice(None),) * axis + (rows,)
    wanted = x.copy()
    if mode == "update":
        wanted[place] = updates
    else:
        REDUCE[mode](wanted, place, updates)
    arguments = {"data": x, "updates": updates, "mode": mode}
    # A value meets two updates at most; the other modes but "mul" choose, and round nothing.
    sums = rounding(3) * float(np.abs(x).max() + 2 * np.abs(updates).max())
    bounds = (1.0 if mode == "mul" else 0.0, sums if mode in ("add", "sub") else 0.0)
    found = ours("scatter", indices=rows, axis=np.int32(axis), **arguments)
    agree(found, [wanted], np.float32, *bounds)
    shape_of_rows = [-1 if i == axis else 1 for i in range(len(shape))]
    spread = np.broadcast_to(rows.reshape(shape_of_rows), updates.shape).copy()
    found = ours("scatter_along_axis", indices=spread, axis=np.int32(axis), **arguments)
    agree(found, [wanted], np.float32, *bounds)
    if mode in ("add", "sub", "update") and axis == 0:
        found = ours("scatter_nd", indices=rows[:, None], **arguments)
        agree(found, [wanted], np.float32, *bounds)


def test_what_is_undefined_is_refused() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with pytest.raises(ExportError, match="takes index 3 of an axis of 3"):
        ours("gather", x=x, indices=np.int32([3]), axis=np.int32(1))
    with pytest.raises(ExportError, match="takes index -1 of an axis of 2"):
        ours("gather_along_axis", x=x, indices=np.int32([[0, 1, -1]]), axis=np.int32(0))
    with pytest.raises(ExportError, match="MIL does not say how it rounds"):
        ours("real_div", x=np.int32([1]), y=np.int32([2]))
    with pytest.raises(ExportError, match="mode 'ROUGH' is unknown; known: EXACT"):
        ours("gelu", x=x, mode="ROUGH")
    with pytest.raises(ExportError, match=r"puts \[1, 3\] into a slice of \[2, 3\]"):
        ours("slice_update", x=x, update=x[:1], begin=np.int32([0, 0]), end=np.int32([2, 3]))
    with pytest.raises(ExportError, match="takes 2 from 1 of an axis of 2"):
        ours("slice_by_size", x=x, begin=np.int32([1, 0]), size=np.int32([2, 3]))


def test_every_operation_is_tested() -> None:
    """A new operation without a case here, or in test_mil.py, is an omission."""
    folder = Path(__file__).parent
    source = "".join((folder / name).read_text() for name in ("test_mil.py", Path(__file__).name))
    listed = {*UNARY, *ARITHMETIC, *COMPARISONS, *(f"reduce_{name}" for name in REDUCTIONS)}
    assert not [name for name in known() if name not in listed and f'"{name}"' not in source]
