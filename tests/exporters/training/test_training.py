"""The training programs against autograd: primitives, blocks, head, AdamW, stored weights."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from exporters.executorch.training_program import lower_training
from exporters.model.quantize import quantized
from exporters.model.rounding import round_search
from exporters.model.transformer import activate
from exporters.training import primitives as p
from exporters.training.adamw import AdamW
from exporters.training.head import TrainingHead
from exporters.training.programs import BETA1, BETA2, EPS, training_programs
from exporters.training.storage import PRECISIONS
from exporters.training.weights_file import as_stored, kept_precision, write_weights
from runtime_py.bundle.manifest import Optimizer
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.program_calls import ExecutorchPrograms
from runtime_py.engine.streaming import StreamingEngine, causal_mask, step_numbers
from tests import tiny
from tests.exporters.training.training_kit import (
    Kit,
    MilPrograms,
    check_gradient,
    example_of,
    make_kit,
)
from toolchain.compile.precision import ANDROID
from toolchain.compile.tolerances import SINGLE, rounding
from toolchain.compile.training_part import EagerPrograms, lower_programs, training_spec
from toolchain.verify.reference_engines import PeftEngine, peft_gradient

KINDS = list(tiny.ARCHITECTURES)


@pytest.fixture(autouse=True)
def in_float64():
    """Primitives are checked where rounding cannot hide a wrong formula."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def slopes(function, *inputs: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """-> a random gradient of ``function``'s value, and autograd's of each input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    grad = torch.randn_like(value)
    return value.detach(), grad, torch.autograd.grad(value, leaves, grad)


SIZES = st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(1, 7))


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES)
def test_rms_norm(sizes: tuple[int, int, int]) -> None:
    torch.set_default_dtype(torch.float64)
    batch, features, tokens = sizes
    x, weight = torch.randn(batch, features, tokens), torch.randn(1, features, 1)
    value, grad, (dx,) = slopes(lambda x: p.rms_norm(x, weight, 1e-6), x)
    close(value.mT, torch.nn.functional.rms_norm(x.mT, (features,), weight[0, :, 0], 1e-6))
    close(p.rms_norm_backward(x, weight, 1e-6, grad), dx)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, rest=st.integers(0, 3))
def test_rotate(sizes: tuple[int, int, int], rest: int) -> None:
    torch.set_default_dtype(torch.float64)
    heads, pairs, tokens = sizes
    angle = torch.randn(1, pairs, tokens)
    x = torch.randn(heads, 2 * pairs + rest, tokens)
    value, grad, (dx,) = slopes(lambda x: p.rotate(x, angle.cos(), angle.sin()), x)
    # A turn of complex numbers.
    turned = torch.complex(x[:, :pairs], x[:, pairs : 2 * pairs]) * torch.exp(1j * angle)
    close(value, torch.cat([turned.real, turned.imag, x[:, 2 * pairs :]], dim=1))
    close(p.rotate(grad, angle.cos(), -angle.sin()), dx)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_activations(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    x = torch.linspace(-9, 9, 400)
    value, grad, (dx,) = slopes(lambda x: activate(name, x), x)
    functional = torch.nn.functional
    expected = functional.silu(x) if name == "silu" else functional.gelu(x, approximate="tanh")
    close(value, expected)
    close(p.activation_slope(name, x) * grad, dx)


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.integers(1, 5),
    tokens=st.integers(1, 9),
    window=st.one_of(st.none(), st.integers(1, 5)),
    cap=st.sampled_from([None, 1.5]),
)
def test_attention(
    kv_heads: int, groups: int, size: int, tokens: int, window: int | None, cap: float | None
) -> None:
    torch.set_default_dtype(torch.float64)
    heads, scale = kv_heads * groups, 0.7
    attention = p.Attention(heads, kv_heads, size, scale, cap)
    mask = torch.from_numpy(causal_mask(np.zeros(tokens), window)).double()
    q, k, v = (torch.randn(1, n * size, tokens) for n in (heads, kv_heads, kv_heads))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(-1, size, tokens).mT for x in (q, k, v))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.mT * scale
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        return (torch.softmax(scores + mask[0], -1) @ v).mT.reshape(1, -1, tokens)

    value, grad, expected = slopes(plain, q, k, v)
    out, softmax = attention.forward(q, k, v, mask)
    close(out, value)
    for known in (None, softmax):
        found = attention.backward(q, k, v, mask, value, grad, known)
        for one, want in zip(found, expected, strict=True):
            close(one, want)


@settings(max_examples=20, deadline=None)
@given(sizes=SIZES, parts=st.integers(1, 3))
def test_lora(sizes: tuple[int, int, int], parts: int) -> None:
    torch.set_default_dtype(torch.float64)
    rank, features, tokens = sizes
    x, a = torch.randn(1, features, tokens), torch.randn(1, rank, features)
    bs = [torch.randn(1, 3 + i, rank) for i in range(parts)]
    scale = torch.full((1, 1, 1), 2.0)

    def plain(x: Tensor, a: Tensor, *bs: Tensor) -> Tensor:
        return torch.cat([2.0 * b @ (a @ x) for b in bs], dim=1)

    value, grad, (dx, da, *dbs) = slopes(plain, x, a, *bs)
    close(torch.cat(p.lora(x, a, bs, scale), dim=1), value)
    grads = list(grad.split([b.shape[1] for b in bs], dim=1))
    found_x, found_a, found_bs = p.lora_backward(x, a, bs, scale, grads)
    close(found_x.mT, dx)
    close(found_a, da)
    for found, want in zip(found_bs, dbs, strict=True):
        close(found, want)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_stored_matrices(precision: str) -> None:
    """Products are those of the decoded matrix, which is the nearest or the given grid's."""
    own = PRECISIONS[precision]
    weight = torch.randn(24, 128)
    parts = own.encode(weight)
    assert {(q.name, q.shape, q.dtype) for q in own.parts(24, 128)} == {
        (name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in parts.items()
    }
    decoded = own.decode(parts)
    bound = {"fp32": 0.0, "int8": 0.01, "int4": 0.1}[precision]
    assert (decoded[0] - weight).norm() <= bound * weight.norm()
    x, grad = torch.randn(1, 128, 5), torch.randn(1, 24, 5)
    torch.testing.assert_close(own.forward(parts, x), decoded @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(own.backward(parts, grad), grad.mT @ decoded, rtol=1e-5, atol=1e-4)
    rounded = round_search(weight, 4, 32, None, True)
    if precision != "int8":  # a 4-bit grid is kept as it is
        torch.testing.assert_close(
            own.decode(own.encode(rounded))[0], rounded.dequantize(), rtol=0, atol=1e-6
        )


@settings(max_examples=20, deadline=None)
@given(
    vocab=st.sampled_from([7, 64, 4097]),
    cap=st.sampled_from([None, 2.0]),
    size=st.sampled_from([1.0, 30.0]),
)
def test_head(vocab: int, cap: float | None, size: float) -> None:
    """Loss and gradient are cross-entropy's, without a one-hot; padded positions count nothing."""
    torch.set_default_dtype(torch.float64)
    config = tiny.config_of("granite", vocab_size=vocab)
    from dataclasses import replace

    from exporters.model.spec import read_spec

    spec = replace(read_spec(config, 32), logit_softcap=cap)
    head = TrainingHead(spec, PRECISIONS["fp32"])
    assert sum(head.rows) == vocab
    rows = torch.randn(vocab, spec.hidden) * size
    slices = [{"value": part[None]} for part in rows.split(head.rows)]
    norm, x = torch.randn(1, spec.hidden, 1), torch.randn(1, spec.hidden, 5)
    targets = torch.randint(vocab, (5,))
    real = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]).view(1, 5, 1)

    def plain(x: Tensor) -> Tensor:
        hidden = torch.nn.functional.rms_norm(x.mT, (spec.hidden,), norm[0, :, 0], spec.norm_eps)
        logits = hidden[0] @ rows.T * spec.logit_scale
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        # The program's losses end where a float32 probability does.
        return (losses.clamp(max=-math.log(1e-37)) * real.view(-1)).sum()

    leaf = x.clone().requires_grad_()
    loss = plain(leaf)
    found, count, grad = head(x, norm, slices, rows[targets][None], real)
    torch.testing.assert_close(found, loss.detach().view(1), rtol=1e-6, atol=1e-8)
    assert count.item() == 3
    (expected,) = torch.autograd.grad(loss, leaf)
    if loss < 80:
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_adamw_is_pytorchs(ratio: float) -> None:
    """Twenty steps with clipping and decay, against ``torch.optim.AdamW`` with two groups of
    parameters, the second of which learns ``ratio`` times as fast."""
    step, rates = AdamW(0.9, 0.999, 1e-8), (1e-2, ratio * 1e-2)
    values = torch.randn(3, 1024) * 0.1
    mean, square = torch.zeros_like(values), torch.zeros_like(values)
    slow, fast = (torch.nn.Parameter(part.clone()) for part in values.split([1, 2]))
    rate = torch.cat([torch.full_like(p, r) for p, r in zip((slow, fast), rates, strict=True)])
    optimizer = torch.optim.AdamW(
        [{"params": [slow], "lr": rates[0]}, {"params": [fast], "lr": rates[1]}], weight_decay=0.1
    )
    for number in range(1, 21):
        grad = torch.randn(3, 1024) * 10.0 ** torch.randint(-3, 2, (1,))
        slow.grad, fast.grad = (grad / 7).split([1, 2])
        norm = torch.nn.utils.clip_grad_norm_([slow, fast], 1.0)
        optimizer.step()
        scalars = [1 / 7, 1.0, 0.1, 1 / (1 - 0.9**number), 1 / (1 - 0.999**number)]
        numbers = [torch.full((1, 1), value) for value in scalars]
        values, mean, square, found = step(values, grad, mean, square, rate, *numbers)
        torch.testing.assert_close(found[0, 0], norm, rtol=1e-5, atol=0)
        wanted = torch.cat([slow, fast]).detach()
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-6 * ratio)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_streams_what_peft_computes(kind: str, tmp_path: Path) -> None:
    """One step of the captured functions on every target, recomputing or keeping: the same bits,
    and PEFT's loss and gradients."""
    kit = make_kit(tmp_path, kind, tiny.every_target(kind))
    programs = EagerPrograms(training_programs(kit.spec, [32]))
    example = example_of()
    check_gradient(kit, kit.engine(programs), example)
    state = kit.state()
    low, high = state.layout.zeros(), state.layout.zeros()
    kit.engine(programs).gradient(state, [example], low)
    kit.engine(programs, keep_mb=1.0).gradient(state, [example], high)
    np.testing.assert_array_equal(low, high)


def check_update(kit: Kit, engine: StreamingEngine) -> None:
    """One step of AdamW, clipped, with decay and another rate for B: PyTorch's."""
    found, expected = kit.state(), kit.state()
    gradient = found.layout.zeros()
    _, count = engine.gradient(found, [example_of()], gradient)
    numbers = step_numbers(1, count, (1e-2, 4e-2), 0.1, 1e-2, (BETA1, BETA2))
    optimizer = Optimizer(beta1=BETA1, beta2=BETA2, epsilon=EPS)
    norm = engine.update(found, gradient, numbers)
    assert norm > numbers.clip
    reference = PeftEngine(kit.peft, kit.tensors, optimizer)
    bound = rounding(gradient.size)  # of the norm, and of what it divides
    assert norm == pytest.approx(reference.update(expected, gradient, numbers), rel=bound, abs=0)
    for name in ("parameters", "mean", "square"):
        want = torch.from_numpy(getattr(expected, name))
        gap = tiny.relative(torch.from_numpy(getattr(found, name)), want)
        assert gap <= 2 * bound + 4 * SINGLE, name  # twice: of the square


def lowered(kit: Kit) -> ExecutorchPrograms:
    (kit.folder / "android").mkdir(exist_ok=True)
    return ExecutorchPrograms(
        kit.folder, lower_programs("android", kit.folder, kit.spec, kit.training.lengths)
    )


@pytest.mark.parametrize(
    "kind",
    [k if k in ("llama", "gemma2") else pytest.param(k, marks=pytest.mark.full) for k in KINDS],
)
def test_executorch_computes_what_peft_computes(kind: str, tmp_path: Path) -> None:
    kit = make_kit(tmp_path, kind)
    programs = lowered(kit)
    for keep in (0.0, 1.0):
        check_gradient(kit, kit.engine(programs, keep), example_of())
    check_update(kit, kit.engine(programs))


@pytest.mark.parametrize(
    "kind", [k if k == "llama" else pytest.param(k, marks=pytest.mark.full) for k in KINDS]
)
def test_coreml_computes_what_peft_computes(kind: str, tmp_path: Path) -> None:
    """One step of the Core ML package: PEFT's loss and gradients, and PyTorch's AdamW."""
    kit = make_kit(tmp_path, kind)
    programs = MilPrograms(training_programs(kit.spec, [32]), tmp_path / "training.mlpackage")
    engine = kit.engine(programs)
    check_gradient(kit, engine, example_of())
    check_update(kit, engine)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_weights_are_those_of_lm(precision: str, tmp_path: Path) -> None:
    """Trained against the integers that ``lm`` multiplies with, in the lowered programs: the loss
    and gradients of a PEFT model that has their values."""
    kit = make_kit(tmp_path, "llama")
    scheme = ANDROID["8da8w" if precision == "int8" else "8da4w"]
    assert scheme is not None
    model = quantized(kit.model, scheme, [tiny.tokens_of(40, seed) for seed in range(4)])
    spec = training_spec(model, kit.spec.lora, kit.spec.rank, None)
    assert (spec.blocks, spec.head) == kept_precision(model) == (precision, "int8")
    written = write_weights(model, spec, 32, kit.folder / kit.training.weights)
    training = kit.training.model_copy(
        update={"precision": precision, "head_precision": "int8", "table": written.table}
    )
    assert written.table == "head"  # stored once
    stored = as_stored(model, spec)
    state = kit.peft.state_dict()
    for index, block in enumerate(stored.blocks):
        for site, names in {
            "qkv": ("q_proj", "k_proj", "v_proj"),
            "o": ("o_proj",),
            "gate_up": ("gate_proj", "up_proj"),
            "down": ("down_proj",),
        }.items():
            for name, base in zip(names, getattr(block, site).bases, strict=True):
                part = "mlp" if name[:4] in ("gate", "up_p", "down") else "self_attn"
                key = f"base_model.model.model.layers.{index}.{part}.{name}"
                own = f"{key}.base_layer.weight"
                state[own if own in state else f"{key}.weight"].copy_(base.weight)
                # What the file says is what lm dequantizes.
                original = getattr(model.blocks[index], site).bases[names.index(name)]
                values = original.integers_as_float()
                if original.offset is not None:
                    offsets = original.offset.integers_as_float()
                    values = values + offsets.repeat_interleave(original.group, 1)
                torch.testing.assert_close(base.weight, values, rtol=0, atol=1e-6)
    state["base_model.model.model.embed_tokens.weight"].copy_(stored.table.weight)
    quantized_kit = Kit(kit.folder, kit.peft, model, spec, training, kit.tensors, kit.values)
    programs = lowered(quantized_kit)
    check_gradient(quantized_kit, quantized_kit.engine(programs), example_of())


def test_a_model_without_rotary_layers(tmp_path: Path) -> None:
    kit = make_kit(tmp_path, "smollm3", no_rope_layers=[0, 0])
    programs = EagerPrograms(training_programs(kit.spec, [32]))
    check_gradient(kit, kit.engine(programs), example_of())


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """A sequence in a longer program: the same loss and gradients."""
    kit = make_kit(tmp_path, "gemma3_text", length=16)
    longer = make_kit(tmp_path, "gemma3_text", length=40)
    example = example_of(15)
    check_gradient(kit, kit.engine(EagerPrograms(training_programs(kit.spec, [16]))), example)
    engine = longer.engine(EagerPrograms(training_programs(longer.spec, [40])))
    check_gradient(longer, engine, example)


def test_the_weights_file_is_safetensors(tmp_path: Path) -> None:
    """The safetensors package reads it; tensors lie one after another from a multiple of 64."""
    kit = make_kit(tmp_path, "qwen3")
    path = kit.folder / kit.training.weights
    own = BaseWeights(path)
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(own)
        for name in own:
            np.testing.assert_array_equal(file.get_tensor(name), own[name])
    blocks = sum(
        t.numel() for b in kit.model.blocks for n, t in b.named_buffers() if "lora" not in n
    )
    assert path.stat().st_size < 4 * (blocks + 2 * kit.model.table.weight.numel()) + 40_000
    assert own["layers.0.q.value"].base is not None  # a view of the mapping


def test_an_operator_that_is_not_taken_is_an_error(tmp_path: Path) -> None:
    from dataclasses import replace

    from exporters.errors import ExportError
    from exporters.training.programs import adamw_program

    kit = make_kit(tmp_path, "llama")
    program = adamw_program(kit.spec)

    class Odd(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> list[Tensor]:
            return [torch.erf(tensors[0]), *tensors[1:4]]

    with pytest.raises(ExportError, match="erf"):
        lower_training([replace(program, module=Odd())], tmp_path / "x.pte")


def test_autograd_is_not_what_is_tested(tmp_path: Path) -> None:
    """The comparison can fail: another adapter has other gradients."""
    kit = make_kit(tmp_path, "llama")
    kit.values["layers.0.self_attn.q_proj.lora_B"] = (
        kit.values["layers.0.self_attn.q_proj.lora_B"] * 1.01
    )
    programs = EagerPrograms(training_programs(kit.spec, [32]))
    with pytest.raises(AssertionError):
        check_gradient(kit, kit.engine(programs), example_of())
    assert peft_gradient(kit.peft, kit.tensors, [example_of()])[0] > 0
