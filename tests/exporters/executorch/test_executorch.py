"""``lm.pte`` in ExecuTorch's runtime: against PyTorch, Hugging Face, PEFT and closed forms."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.extension.pybindings import portable_lib
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from exporters.errors import ExportError
from exporters.executorch import lm_program as lowering
from exporters.executorch.delegation import PROMPT, Delegation
from exporters.executorch.lm_program import LoweredLm, lower_lm
from exporters.executorch.patches import edge_config
from exporters.executorch.pieces import lower_whole
from exporters.model.assembly import build
from exporters.model.lora_tensors import adapter_tensors
from exporters.model.quantize import QuantizedLinear, Scheme, quantized
from exporters.model.rounding import round_search
from exporters.model.spec import ARCHITECTURES, read_spec
from exporters.model.transformer import Transformer
from runtime_py.bundle.adapter_forms import to_runtime
from runtime_py.bundle.flat_tensor import ALIGNMENT, locate, read_ptd, write_ptd
from runtime_py.bundle.peft_adapter import read_peft
from runtime_py.engine.lm import ExecutorchLm
from runtime_py.loop.errors import AdapterError
from tests import tiny
from tests.bounds import entropy_bound
from toolchain.compile.adapter_layout import layout
from toolchain.compile.tolerances import rounding

LAYERS = 2
# Of the logits' range: float32 sums in another order, through the sizes of tiny's models.
EXACT = rounding(LAYERS * (5 * 64 + tiny.SIZES["intermediate_size"] + tiny.CONTEXT))
RANK = 4
CHUNK = 16  # tokens of the longest call
EMBED = 32
TEXT = 40  # tokens: several calls, and most of the context


@dataclass(frozen=True)
class Case:
    """A model, what was lowered of it, and the adapter that the program was lowered with."""

    kind: str
    model: Transformer
    targets: list[str]
    program: Path
    adapter: Path
    lowered: LoweredLm


def write_adapter(path: Path, model: Transformer) -> Path:
    write_ptd(path, {name: t.numpy() for name, t in adapter_tensors(model).items()})
    return path


def lower(model: Transformer, program: Path) -> LoweredLm:
    return lower_lm(
        model, program, prefill_length=CHUNK, embed_length=EMBED, bos_id=1, eos_ids=[2, 5]
    )


def targets_of(kind: str) -> list[str]:
    """Every target once among the architectures, and ends of a block without any."""
    if kind == "phi3":
        return ["qkv_proj", "gate_up_proj"]
    return tiny.every_target(kind) if kind == "llama" else ["q_proj", "v_proj", "down_proj"]


def model_of(kind: str) -> Transformer:
    source = tiny.hugging_face(kind)
    spec = read_spec(source.config, tiny.CONTEXT)
    model = build(spec, source.state_dict(), targets_of(kind), RANK)
    random = torch.Generator().manual_seed(5)
    for name, tensor in adapter_tensors(model).items():
        tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.2)
        if name.endswith("scale"):
            tensor.fill_(1.5)
    return model


# Lowering takes most of the time here, so that each architecture and each precision is lowered once
# by ``make test``: these three as quantized programs. All the others are in ``make test-full``.
QUANTIZED = {"mistral": "8da8w", "qwen3": "8da4w", "granite": "8da4w-symmetric"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=pytest.mark.full if kind in QUANTIZED else ())
        for kind in ARCHITECTURES
    ],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind: str = request.param
    folder = tmp_path_factory.mktemp(kind)
    model = model_of(kind)
    lowered = lower(model, folder / "lm.pte")
    adapter = write_adapter(folder / "adapter.ptd", model)
    return Case(kind, model, targets_of(kind), folder / "lm.pte", adapter, lowered)


# Numbers


@torch.no_grad()
def test_every_way_of_calling_gives_the_logits(case: Case) -> None:
    """One call, unequal chunks, and token by token, each against the forward without a cache."""
    tokens = tiny.tokens_of(TEXT)
    expected = case.model(tokens)[0]
    lm = ExecutorchLm(case.program, case.adapter)

    single = lm.forward(tokens[:, :CHUNK], 0)
    assert tiny.relative(single[0], expected[CHUNK - 1]) < EXACT
    assert tiny.relative(lm.prefill(tokens)[0], expected[-1]) < EXACT
    start = 0
    for size in (5, CHUNK, 1, 11, 7):
        logits = lm.forward(tokens[:, start : start + size], start)
        start += size
        assert tiny.relative(logits[0], expected[start - 1]) < EXACT
    assert start == TEXT
    assert tiny.relative(lm.all_logits(tokens)[0], expected) < EXACT


@torch.no_grad()
def test_the_cache_reaches_to_the_end_of_the_context(case: Case) -> None:
    tokens = tiny.tokens_of(tiny.CONTEXT, seed=2)
    lm = ExecutorchLm(case.program, case.adapter)
    lm.prefill(tokens[:, :-1])
    last = lm.forward(tokens[:, -1:], tiny.CONTEXT - 1)
    assert tiny.relative(last, case.model(tokens)[:, -1]) < EXACT
    # What an earlier text left in the cache is not seen by the next.
    again = tiny.tokens_of(6, seed=3)
    assert tiny.relative(lm.forward(again, 0), case.model(again)[:, -1]) < EXACT


@torch.no_grad()
def test_two_adapter_files_for_one_program(case: Case, tmp_path: Path) -> None:
    """Each equal to transformers + peft, from the folder that PEFT wrote."""
    tokens = tiny.tokens_of(24)
    tensors = layout(case.model.spec, case.targets, RANK)
    assert {t.name: t.shape for t in tensors} == case.lowered.adapter
    every = []
    for seed in (1, 2):
        peft = tiny.adapted(tiny.hugging_face(case.kind), case.targets, RANK, seed)
        peft.save_pretrained(str(tmp_path / f"peft{seed}"))
        file = tmp_path / f"{seed}.ptd"
        write_ptd(file, to_runtime(read_peft(tmp_path / f"peft{seed}"), tensors))
        expected = peft(tokens, use_cache=False).logits[:, -1]
        every.append(expected)
        assert tiny.relative(ExecutorchLm(case.program, file).prefill(tokens), expected) < EXACT
    assert tiny.relative(*every) > 0.05, "the adapters do the same"


@torch.no_grad()
def test_embed_against_hugging_face(case: Case) -> None:
    """Mean and entropy of Hugging Face's own hidden states after the final norm; the adapter of
    the program does not count."""
    source = tiny.hugging_face(case.kind)
    lm = ExecutorchLm(case.program, case.adapter)
    for count in (1, 2, 17, EMBED):
        tokens = tiny.tokens_of(count, seed=count)
        hidden = source.model(tokens, use_cache=False).last_hidden_state[0].double()
        pooled, entropy = lm.embed(tokens)
        assert pooled.dtype == torch.float32
        assert pooled.shape == (case.model.spec.hidden,)
        assert tiny.relative(pooled.double(), hidden.mean(0)) < EXACT
        p = hidden.norm(dim=1) / hidden.norm(dim=1).sum()
        closed = -(p * p.log()).sum().item() / math.log(count) if count > 1 else 0.0
        bound = entropy_bound(hidden.norm(dim=1), EXACT)
        assert abs(entropy - closed) <= bound
        assert -bound <= entropy <= 1 + bound


# What the file is


def test_the_delegates_take_nearly_all(case: Case) -> None:
    for part in case.lowered.delegation.values():
        assert part.missed == 0.0  # all products; attention is the LLM operator's
        assert part.fraction >= 0.9  # and little beside them, even in a model this small
    forward = case.lowered.delegation["forward"]
    spec = case.model.spec
    block = spec.hidden * (2 * spec.q_dim + 2 * spec.kv_dim + 3 * spec.intermediate)
    least = 2 * (PROMPT * LAYERS * block + spec.hidden * spec.vocab)
    # Norms, rotation and the adapter come on top, and attention where it is delegated as well.
    assert least < forward.inside < 1.4 * least
    if spec.attention_softcap is None:
        causal = 2 * LAYERS * spec.q_dim * PROMPT * (PROMPT + 1)  # of q·k and of p·v: 4 / 2
        assert forward.outside == {"llama.custom_sdpa.default": causal}


def test_one_piece_between_two_attentions(case: Case) -> None:
    if case.model.spec.attention_softcap is not None:
        pytest.skip("its attention is in delegates of its own")
    for part in case.lowered.delegation.values():
        assert part.delegates == LAYERS + 2


def float_bytes(model: Transformer) -> int:
    """Every parameter once, as float32; a tied head is stored for the delegate, and as a table."""
    buffers = {id(t): t for t in model.buffers()}
    keep = [b for m in (*model.blocks, model.norm) for b in m.modules()]
    adapter = {id(t) for t in adapter_tensors(model).values()}
    inside = {
        id(t): t
        for module in keep
        for name, t in module.named_buffers(recurse=False)
        if id(t) not in adapter and name != "average"
    }
    assert inside.keys() <= buffers.keys()
    matrices = sum(t.numel() for t in inside.values())
    return 4 * (matrices + 2 * model.spec.vocab * model.spec.hidden)


def test_weights_are_stored_once(case: Case) -> None:
    """``forward`` and ``embed`` together: little more than the weights that they share."""
    spec = case.model.spec
    weights = float_bytes(case.model)
    ropes = 4 * len(case.model.ropes) * spec.context * spec.head_dim * 2
    size = case.program.stat().st_size
    graphs = 30_000 * LAYERS + 60_000  # two programs' operators, delegates and alignment
    if spec.attention_softcap is not None:
        graphs *= 2
    assert weights < size < weights + ropes + graphs
    assert size < 1.5 * weights, "a second copy would go unnoticed"
    data = case.program.read_bytes()
    for block in case.model.blocks:
        weight = block.down.bases[0].weight.numpy().tobytes()
        assert data.count(weight) == 1


def test_the_adapter_is_not_in_the_program(case: Case) -> None:
    data = case.program.read_bytes()
    for name, tensor in adapter_tensors(case.model).items():
        if not name.endswith("scale"):
            assert tensor.numpy().tobytes() not in data
    with pytest.raises(RuntimeError):
        ExecutorchLm(case.program, None).prefill(tiny.tokens_of(2))


def test_what_the_stock_runner_asks(case: Case) -> None:
    module = portable_lib._load_for_executorch(str(case.program), str(case.adapter))
    softcap = case.model.spec.attention_softcap is not None
    expected = {
        "get_bos_id": [1],
        "get_eos_ids": [2, 5],
        "get_vocab_size": [case.model.spec.vocab],
        "get_max_seq_len": [CHUNK],
        "get_max_context_len": [tiny.CONTEXT],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [not softcap],
        "enable_dynamic_shape": [True],
    }
    assert set(module.method_names()) == {"forward", "embed", *expected}
    for name, values in expected.items():
        assert list(module.run_method(name, ())) == values
    forward, embed = (module.method_meta(name) for name in ("forward", "embed"))
    signature = {s.name: s for s in case.lowered.programs}
    assert (forward.num_inputs(), forward.num_outputs()) == (2, 1)
    assert forward.output_tensor_meta(0).sizes() == signature["forward"].outputs[0].shape
    assert (embed.num_inputs(), embed.num_outputs()) == (1, 2)
    for index, spec in enumerate(signature["embed"].outputs):
        assert embed.output_tensor_meta(index).sizes() == spec.shape


def test_a_program_that_is_not_what_it_must_be_is_refused() -> None:
    little = Delegation(3, 94.0, {"aten.bmm": 5.0, "aten.mm": 1.0})
    with pytest.raises(ExportError, match=r"does not take 6\.0% of the FLOPs.*aten\.bmm.*aten\.mm"):
        lowering._check(little, set())
    with pytest.raises(ExportError, match=r"lost these adapter tensors: \['x'\]"):
        lowering._check(Delegation(3, 1.0, {}), {"x"})
    lowering._check(Delegation(3, 95.0, {"aten.bmm": 5.0}), set())


# Quantized

SCHEMES = {
    "8da8w": Scheme(bits=8, head_bits=8),
    "8da4w": Scheme(bits=4, head_bits=8, affine=True),
    "8da4w-symmetric": Scheme(bits=4, head_bits=4),
}


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        *QUANTIZED.items(),
        pytest.param("llama", "8da8w", marks=pytest.mark.full),
        pytest.param("llama", "8da4w", marks=pytest.mark.full),
        pytest.param("gemma3_text", "8da4w-symmetric", marks=pytest.mark.full),
    ],
)
@torch.no_grad()
def test_quantized_programs(kind: str, scheme: str, tmp_path: Path) -> None:
    model = quantized(model_of(kind), SCHEMES[scheme], [tiny.tokens_of(32)])
    lowered = lower(model, tmp_path / "lm.pte")
    lm = ExecutorchLm(tmp_path / "lm.pte", write_adapter(tmp_path / "a.ptd", model))
    tokens = tiny.tokens_of(TEXT)
    expected = model(tokens)[0]
    found = lm.all_logits(tokens)[0]
    # One int8 step of an activation may round the other way; two layers pass little of it on.
    assert tiny.relative(found, expected) < 0.05
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.9995
    assert tiny.relative(lm.prefill(tokens)[0], expected[-1]) < 0.05
    assert all(part.fraction >= 0.95 for part in lowered.delegation.values())
    assert all(part.delegates == LAYERS + 2 for part in lowered.delegation.values())
    # It is the quantized model that was lowered: nearer to it than the rounding is.
    rounding = tiny.relative(expected, model_of(kind)(tokens)[0])
    assert tiny.relative(found, expected) < rounding

    spec = model.spec
    block = spec.hidden * (2 * spec.q_dim + 2 * spec.kv_dim + 3 * spec.intermediate) * LAYERS
    head, table = spec.vocab * spec.hidden, spec.vocab * spec.hidden
    bits = {"8da8w": (8, 8), "8da4w": (4 + 1, 8), "8da4w-symmetric": (4.5, 4.5)}[scheme]
    ideal = (block * bits[0] + head * bits[1] + table * 8) / 8
    assert ideal < (tmp_path / "lm.pte").stat().st_size < ideal + 30_000 * LAYERS + 60_000


class _One(nn.Module):
    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.linear(self.linear.prepare(x))]


def run_alone(linear: QuantizedLinear, x: Tensor, path: Path) -> Tensor:
    """The linear in XNNPACK, with nothing around it."""
    example = torch.zeros(1, 4, x.shape[2])
    program = torch.export.export(
        _One(linear), (example,), dynamic_shapes=({1: Dim("length", min=1, max=64)},), strict=False
    )
    lowered, flops = lower_whole(_One(linear), program)
    assert flops > 0

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.piece = [lowered]

        def forward(self, x: Tensor) -> Tensor:
            return self.piece[0](x)[0]

    call = torch.export.export(Call(), (example,), strict=False)
    edge = to_edge_transform_and_lower(call, compile_config=edge_config())
    with path.open("wb") as file:
        edge.to_executorch(ExecutorchBackendConfig()).write_to_file(file)
    module = portable_lib._load_for_executorch(str(path))
    return torch.cat([module.forward((x[:, i : i + 4],))[0] for i in range(0, x.shape[1], 4)], 1)


@pytest.mark.parametrize(("bits", "affine"), [(8, False), (4, False), (4, True)])
@torch.no_grad()
def test_one_quantized_linear_is_exact(bits: int, affine: bool, tmp_path: Path) -> None:
    """XNNPACK computes a single quantized product as PyTorch does on the same integers."""
    torch.manual_seed(3)
    weight = torch.randn(48, 64)
    group = 32 if bits == 4 else 64
    rounded = round_search(weight, bits, group, None, affine)
    linear = QuantizedLinear(rounded, bits, torch.randn(48))
    x = torch.randn(1, 32, 64) * 3 + 0.5
    expected = linear(linear.prepare(x))
    assert tiny.relative(run_alone(linear, x, tmp_path / "one.pte"), expected) < 1e-5
    # And PyTorch's is the product with the weights that the integers stand for, but for x's int8.
    product = x @ rounded.dequantize().T + linear.bias
    step = (x.amax(-1) - x.amin(-1).clamp(max=0)).max() / 255
    assert (expected - product).abs().max() < step * rounded.dequantize().abs().sum(1).max()
    assert tiny.relative(expected, product) < 0.05


# The adapter's file

NAMES = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def named_arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    arrays = {}
    for name, shape, kind in zip(
        draw(st.lists(NAMES, min_size=1, max_size=5, unique=True)),
        itertools.cycle(draw(st.lists(SHAPES, min_size=1, max_size=5))),
        itertools.cycle(draw(st.lists(st.sampled_from(["f4", "u1"]), min_size=1, max_size=3))),
    ):
        count = math.prod(shape) * np.dtype(kind).itemsize
        # Any bits, NaN among them: a file keeps bits.
        arrays[name] = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), kind).reshape(
            shape
        )
    return arrays


@settings(max_examples=60, deadline=None)
@given(arrays=named_arrays())
def test_a_ptd_file_gives_back_what_was_written(
    arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ptd") / "x.ptd"
    write_ptd(path, arrays)
    assert [p.name for p in path.parent.iterdir()] == ["x.ptd"]
    back = read_ptd(path)
    assert back.keys() == arrays.keys()
    offsets, data = locate(path), path.read_bytes()
    assert offsets.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
        assert offsets[name] % ALIGNMENT == 0
        assert data[offsets[name] : offsets[name] + array.nbytes] == array.tobytes()


def test_a_damaged_ptd_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ptd"
    write_ptd(path, {"a": np.arange(50, dtype=np.float32)})
    whole = path.read_bytes()
    for size in (0, 3, 8, 30, len(whole) - 60):
        path.write_bytes(whole[:size])
        for read in (read_ptd, locate):
            with pytest.raises(AdapterError, match=r"x\.ptd is not a whole \.ptd file"):
                read(path)
    path.write_bytes(b"PK" * 100)
    with pytest.raises(AdapterError, match="not a whole"):
        read_ptd(path)
