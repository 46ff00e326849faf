"""The Core ML package: its functions in PyTorch against the plain forward, and what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from exporters.coreml.compression import Grid, ideal_bytes, plan, stored_values
from exporters.coreml.functions import Decode, Embed, Prefill, adapter_inputs
from exporters.coreml.half import SafeNorm, for_half
from exporters.coreml.lm_package import lower
from exporters.coreml.multifunction import check, read_signatures, weight_bytes
from exporters.errors import ExportError
from exporters.model.assembly import build
from exporters.model.plain_attention import masked_attention, plain_attention
from exporters.model.projection import LoRA
from exporters.model.spec import read_spec
from exporters.model.transformer import Norm, Transformer
from exporters.signature import ProgramSignature
from tests.bounds import entropy_bound
from tests.exporters.coreml.half_bounds import measured
from tests.toolchain.verify.mil_values import Package
from toolchain.compile.tolerances import HALF, model_terms, rounding

CONTEXT = 48
CHUNK = 16
SIZE = 64
SIZES = {
    "vocab_size": 96,
    "hidden_size": SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 32, "sliding_window": 10, "query_pre_attn_scalar": 24}
MODELS: dict[str, dict] = {
    "llama": {"tie_word_embeddings": True},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"tie_word_embeddings": False, "sliding_window": 10},
}


def tiny(kind: str, adapter: bool = False) -> Transformer:
    """A random model, with a random adapter on attention if asked."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **SIZES | MODELS[kind])
    source = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.2))
    modules = ["qkv_proj", "down_proj"] if kind == "phi3" else ["q_proj", "v_proj", "down_proj"]
    model = build(
        read_spec(config, CONTEXT), source.state_dict(), modules if adapter else [], rank=4
    )
    for module in model.modules():
        if isinstance(module, LoRA):
            for buffer in module.buffers():
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    return model


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference."""
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_chunks_and_tokens_give_the_forward(kind: str, adapter: bool) -> None:
    """Prefill in unequal chunks, then decode to the end of the context: each step's logits are
    those of the whole sequence without a cache, padding filled with arbitrary tokens. Off they are
    by what a float16 cache does."""
    model = tiny(kind, adapter)
    tokens = torch.randint(3, SIZES["vocab_size"], (1, CONTEXT), dtype=torch.int32)
    expected = model(tokens)[0]
    buffers = dict(model.named_buffers())
    largest = expected.abs().max().item()
    bound = largest * measured(model, tokens, 1, half=False).logits
    assert bound < 1e-2 * largest  # a wrong constant of 1 % is seen
    inputs = {name: buffers[path].clone() for name, path in adapter_inputs(model).items()}
    assert bool(inputs) == adapter
    safe = for_half(model)
    for module in safe.modules():
        if isinstance(module, LoRA):  # the functions must use their inputs, not these
            for name, buffer in module.named_buffers():
                setattr(module, name, torch.full_like(buffer, torch.nan))
    prefill, decode = Prefill(safe, CHUNK), Decode(safe)
    start = 0
    # The last chunk's padding would reach past the end of the context: 35 + 16 > 48.
    for count in (CHUNK, 5, 14, 9):
        chunk = torch.randint(3, SIZES["vocab_size"], (1, CHUNK), dtype=torch.int32)
        chunk[:, :count] = tokens[:, start : start + count]
        untouched = prefill.k_1[:, :, start + count :].clone()
        logits = prefill(chunk, integers(start), integers(count), inputs)
        start += count
        assert torch.equal(prefill.k_1[:, :, start:], untouched)
        assert apart(logits[0], expected[start - 1]) <= bound
    for name, buffer in prefill.named_buffers():
        if name.startswith(("k_", "v_")):
            getattr(decode, name).copy_(buffer)
    for position in range(start, CONTEXT):
        logits = decode(tokens[:, position : position + 1], integers(position), inputs)
        assert apart(logits[0], expected[position]) <= bound


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("count", [1, 2, 23, 32])
@torch.no_grad()
def test_embed(kind: str, count: int) -> None:
    """Against the definition, in float64, from the unpadded sequence without its adapter."""
    model = tiny(kind, adapter=True)
    tokens = torch.randint(3, SIZES["vocab_size"], (1, 32), dtype=torch.int32)
    attends = [plain_attention(model.spec, layer) for layer in model.spec.layers]
    hidden = model.hidden(tokens[:, :count], torch.arange(count), attends, adapted=False)
    vectors = hidden[0].double().numpy()
    pooled, entropy = Embed(for_half(model), 32)(tokens, integers(count))
    off = rounding(model_terms(model.spec, 32) + SIZE)
    np.testing.assert_allclose(
        pooled.numpy(), vectors.mean(0), rtol=0, atol=off * np.abs(vectors).max()
    )
    p = np.linalg.norm(vectors, axis=1)
    p = p / p.sum()
    wanted = -(p * np.log(p)).sum() / np.log(count) if count > 1 else 0.0
    assert entropy.shape == (1,)
    assert abs(entropy.item() - wanted) <= entropy_bound(hidden[0].norm(dim=-1), off)


@pytest.mark.parametrize("scale", [0.0, 1e-5, 1e-2, 1.0, 300.0, 3e4])
def test_norm_in_half(scale: float) -> None:
    """In float16 arithmetic at magnitudes whose squares leave its range, against float32. Each of
    its eight steps rounds once. What is added: a shrunk input may lie among the subnormal numbers,
    which are 2⁻²⁴ apart, and is divided by √ε at least; so is one that is divided by the largest,
    and multiplied by √64 at most."""
    torch.manual_seed(1)
    x = (torch.randn(1, 5, 64).clamp(-2, 2) * scale).half()
    norm = Norm(torch.rand(64) + 0.5, 1e-6)
    for shrunk in (1.0, 0.0625):
        safe = SafeNorm(norm, shrunk).half()
        found = safe(x * shrunk).float()
        added = 1.5 * 2.0**-25 * ((1 / safe.root_eps if shrunk < 1 else 0.0) + 8)
        torch.testing.assert_close(found, norm(x.float()), rtol=8 * HALF, atol=added)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_headroom(kind: str) -> None:
    """The residual stream is a sixteenth, the hidden states are the same; float32, to the bit but
    for the norms' own rounding."""
    model = tiny(kind, adapter=True)
    tokens = torch.randint(3, SIZES["vocab_size"], (1, 20))
    attends = [plain_attention(model.spec, layer) for layer in model.spec.layers]
    shrunk = for_half(model)
    streams = [m.stream(tokens, torch.arange(20), attends) for m in (model, shrunk)]
    bound = rounding(model_terms(model.spec, 20))
    for found, wanted in ((streams[1] * 16, streams[0]), (shrunk(tokens), model(tokens))):
        assert apart(found, wanted) <= bound * wanted.abs().max().item()


def test_attention_is_pytorchs() -> None:
    spec = tiny("llama").spec
    q = torch.randn(1, 5, spec.heads, spec.head_dim)
    k, v = torch.randn(2, 1, 9, spec.kv_heads, spec.head_dim)
    seen = torch.ones(5, 9, dtype=torch.bool).tril(4)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=seen, enable_gqa=True
    )
    # An error of a score is one of its weight, as a part of it.
    score = spec.attention_scale * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    bound = rounding(spec.head_dim + 9) * (1 + 2 * score) * v.abs().max().item()
    assert bound < 1e-3 * v.abs().max().item()
    assert apart(masked_attention(spec, q, k, v, seen), expected.transpose(1, 2)) <= bound


def check_structure(out: Path, signatures: list[ProgramSignature], model: Transformer) -> None:
    spec = model.spec
    assert {s.name for s in read_signatures(out)} == {"prefill", "decode", "embed"}
    prefill, decode, embed = signatures
    assert [i.name for i in decode.inputs[:2]] == ["tokens", "start"]
    assert [i.shape for i in prefill.inputs[:3]] == [(1, CHUNK), (1,), (1,)]
    assert [i.name for i in embed.inputs] == ["tokens", "count"]
    assert {i.name for i in prefill.inputs[3:]} == set(adapter_inputs(model))
    assert prefill.inputs[3:] == decode.inputs[2:]
    cache = (1, spec.kv_heads, CONTEXT, spec.head_dim)
    assert prefill.states == decode.states
    assert {(s.name, s.shape, s.dtype) for s in decode.states} == {
        (f"{kind}_{layer}", cache, "float16") for kind in "kv" for layer in range(2)
    }
    assert embed.states == ()


def check_size(out: Path, model: Transformer, quantize: str) -> None:
    """Against the closed form: matrices of the blocks, table and head, with their scales."""
    s = model.spec
    rows = 2 * (s.q_dim + 2 * s.kv_dim + s.hidden + 2 * s.intermediate + s.hidden)
    block = 2 * s.hidden * (2 * s.q_dim + 2 * s.kv_dim + 3 * s.intermediate)
    vocab = s.vocab * (1 if s.tied else 2)
    least = {
        "int4": block * 9 // 16 + vocab * (s.hidden + 2),
        "int8": block + 2 * rows + vocab * (s.hidden + 2),
        "fp16": 2 * (block + vocab * s.hidden),
        "none": 4 * (block + vocab * s.hidden),
    }[quantize]
    # Norms, rotation tables and the headers of some fifty constants come on top.
    assert least < weight_bytes(out) < least * 1.1 + 18_000


def use_weights_of(package: Package, model: Transformer) -> None:
    """Gives the model the matrices that the package has rounded, which must be near its own."""
    # The matrix of a tied head goes by either of its names.
    buffers = dict(model.named_buffers(remove_duplicate=False))
    rounded, grids = 0, plan(model, "int4")
    for op in package.program.functions["decode"].operations:
        if op.op_type == "constexpr_blockwise_shift_scale":
            name = op.name.removeprefix("b_body_model_").split("_to_fp16")[0]
            name = next(n for n in buffers if n.replace(".", "_") == name)
            weight = buffers[name]
            values = torch.from_numpy(op.materialized_val_inference().astype(np.float32))
            groups = weight.unflatten(1, (-1, 32 if name.startswith("blocks.") else SIZE))
            step = groups.abs().amax(-1, keepdim=True) / (7 if name.startswith("blocks.") else 127)
            gap = (values.view_as(groups) - groups).abs()
            assert (gap <= 0.51 * step + 1e-3).all(), name
            assert torch.equal(stored_values(weight, grids[name]), values), name
            weight.copy_(values)
            rounded += 1
    assert rounded == (15 if model.spec.tied else 16)


@pytest.mark.parametrize(
    ("kind", "quantize"),
    [("llama", "int4"), ("phi3", "int4"), ("gemma2", "fp16"), ("gemma3_text", "none")],
)
@torch.no_grad()
def test_package(kind: str, quantize: str, tmp_path: Path) -> None:
    """The package as written: its structure, its size, and the numbers it computes."""
    model = tiny(kind, adapter=True)
    out = tmp_path / "model.mlpackage"
    said: list[str] = []
    lengths = {"prefill_length": CHUNK, "embed_length": 32}
    signatures = lower(model, out, quantize=quantize, progress=said.append, **lengths)
    assert said
    assert [path.name for path in tmp_path.iterdir()] == ["model.mlpackage"]
    check_structure(out, signatures, model)
    check_size(out, model, quantize)

    package = Package(out)
    if quantize == "int4":
        use_weights_of(package, model)
    buffers = dict(model.named_buffers())
    adapter = {name: buffers[path].numpy() for name, path in adapter_inputs(model).items()}
    tokens = torch.randint(3, SIZES["vocab_size"], (1, CONTEXT), dtype=torch.int32)
    expected = model(tokens)[0].numpy()
    largest = np.abs(expected).max()
    allowed = measured(model, tokens, 23, half=quantize != "none")
    print(f"{kind}, {quantize}: {allowed}")
    assert allowed.logits < 1e-2  # a wrong constant of 1 % is seen
    atol = allowed.logits * largest
    start = 0
    for count in (CHUNK, 5, 14, 9):  # the last one's padding reaches past the end
        chunk = np.full((1, CHUNK), 7, np.int32)
        chunk[:, :count] = tokens[:, start : start + count]
        places = {"start": np.int32([start]), "count": np.int32([count])}
        logits = package.run("prefill", {"tokens": chunk} | places | adapter)["logits"]
        start += count
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits[0], expected[start - 1], rtol=0, atol=atol)
    for position in range(start, CONTEXT):
        token = {"tokens": tokens[:, position : position + 1].numpy()}
        logits = package.run("decode", token | {"start": np.int32([position])} | adapter)["logits"]
        np.testing.assert_allclose(logits[0], expected[position], rtol=0, atol=atol)
    for count in (1, 23):
        text = {"tokens": tokens[:, :32].numpy(), "count": np.int32([count])}
        found = package.run("embed", text)
        allowed = measured(model, tokens[:, :32], count, half=quantize != "none")
        pooled, entropy = Embed(model, 32)(tokens[:, :32], integers(count))
        pooled_bound = allowed.pooled * pooled.abs().max().item()
        np.testing.assert_allclose(found["pooled"], pooled.numpy(), rtol=0, atol=pooled_bound)
        attends = [plain_attention(model.spec, layer) for layer in model.spec.layers]
        hidden = model.hidden(tokens[:, :count], torch.arange(count), attends, adapted=False)
        bound = entropy_bound(hidden[0].norm(dim=-1), allowed.norm)
        print(f"entropy off by {abs(found['entropy'][0] - entropy.item()):.2g} of {bound:.2g}")
        assert abs(found["entropy"][0] - entropy.item()) <= bound


def test_a_wrong_package_is_refused(tmp_path: Path) -> None:
    model = tiny("llama", adapter=True)
    out = tmp_path / "model.mlpackage"
    lengths = {"prefill_length": CHUNK, "embed_length": 32}
    prefill, decode, _ = signatures = lower(model, out, quantize="int8", **lengths)
    check_size(out, model, "int8")
    ideal = ideal_bytes(model, plan(model, "int8"), 2)
    check(out, signatures, ideal, 60)
    with pytest.raises(ExportError, match="weights are missing, repeated"):
        check(out, signatures, ideal // 2, 60)
    with pytest.raises(ExportError, match="weights are missing, repeated"):
        check(out, signatures, ideal * 2, 60)
    with pytest.raises(ExportError, match="embed lacks among its inputs start"):
        check(out, [prefill, decode, ProgramSignature("embed", prefill.inputs, ())], ideal, 60)
    with pytest.raises(ExportError, match="its functions are"):
        check(out, [prefill, decode], ideal, 60)


def test_stored_values_of_rows_of_zeros_and_of_weights_beyond_float16() -> None:
    weight = torch.randn(3, 64)
    weight[1] = 0
    for grid in (Grid(8, 0), Grid(4, 32)):
        found = stored_values(weight, grid)
        assert (found[1] == 0).all()
        step = weight.abs().max() / (2 ** (grid.bits - 1) - 1)
        assert (found - weight).abs().max() <= 0.51 * step
        with pytest.raises(ExportError, match="float16"):
            stored_values(weight * 4e4, grid)


@pytest.mark.parametrize(
    ("quantize", "size", "kept"),
    [
        ("int8", 1e-6, True),
        ("int8", 1e-4, True),
        ("int8", 0.01, False),
        ("int4", 1e-5, True),
        ("int4", 1e-4, False),
    ],
)
def test_a_matrix_whose_scale_float16_cannot_hold_stays_float16(
    quantize: str, size: float, kept: bool
) -> None:
    """Where a grid is kept, all is off by less than one of its steps."""
    model = tiny("llama")
    weight = model.blocks[1].down.bases[0].get_buffer("weight")
    weight.copy_(torch.randn_like(weight) * size)
    weight[3] *= 0.01 if quantize == "int4" else 1.0
    grids, whole = plan(model, quantize), plan(tiny("llama"), quantize)
    name = "blocks.1.down.bases.0.weight"
    assert grids.keys() == whole.keys() - ({name} if kept else set())
    grid = Grid(4, 32) if quantize == "int4" else Grid(8, 0)
    most = 2 ** (grid.bits - 1) - 1
    off = (stored_values(weight, grid) - weight).abs().amax(1)
    steps = weight.abs().amax(1) / most
    assert (off <= steps).all() != kept
    if quantize == "int8" and size == 1e-6:
        assert off.max() > 0.8 * weight.abs().max()  # nothing is left
    assert (weight.half().float() - weight).abs().max() <= 2**-6 * weight.abs().max()


def test_blocks_of_a_row_that_hardly_count_are_rounded_with_it() -> None:
    model = tiny("llama")
    weight = model.blocks[1].down.bases[0].get_buffer("weight")
    weight[:, 32:64] *= 1e-6
    assert plan(model, "int4").keys() == plan(tiny("llama"), "int4").keys()


@pytest.mark.parametrize("quantize", ["int4", "int8", "fp16"])
def test_weights_that_float16_cannot_hold_are_refused(quantize: str) -> None:
    model = tiny("llama")
    for block in model.blocks:
        block.down.bases[0].get_buffer("weight").mul_(1e-7)
    words = (
        r"weights of blocks\.0\.down\.bases\.0\.weight \(largest weight .*e-08\); "
        r"blocks\.1\..*: export with --quantize ios=none"
    )
    with pytest.raises(ExportError, match=words):
        plan(model, quantize)
    assert plan(model, "none") == {}


@torch.no_grad()
def test_a_package_keeps_such_a_matrix_float16(tmp_path: Path) -> None:
    model = tiny("llama")
    weight = model.blocks[1].down.bases[0].get_buffer("weight")
    weight.mul_(1e-5)
    out = tmp_path / "model.mlpackage"
    lower(model, out, quantize="int8", prefill_length=CHUNK, embed_length=32)
    package = Package(out)
    rounded, kept = set(), []
    for op in package.program.functions["decode"].operations:
        if op.op_type == "constexpr_blockwise_shift_scale":
            rounded.add(op.name.removeprefix("b_body_model_").split("_to_fp16")[0])
        elif op.op_type == "const" and "blocks_1_down_bases_0_weight" in op.name:
            kept.append(op.outputs[0].val)
    assert len(rounded) == 14
    assert "blocks_1_down_bases_0_weight" not in rounded
    (stored,) = kept
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, weight.half().numpy())


def test_a_model_without_an_adapter_has_no_such_inputs() -> None:
    assert adapter_inputs(tiny("llama")) == {}


def test_refusals(tmp_path: Path) -> None:
    model = tiny("llama")
    lengths = {"prefill_length": CHUNK, "embed_length": 32}
    with pytest.raises(ExportError, match="no quantization named 'int3'; known: int4"):
        lower(model, tmp_path / "a.mlpackage", quantize="int3", **lengths)
    with pytest.raises(ExportError, match=r"named \*\.mlpackage"):
        lower(model, tmp_path / "a.pte", quantize="int4", **lengths)
    (tmp_path / "b.mlpackage").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        lower(model, tmp_path / "b.mlpackage", quantize="int4", **lengths)
    with pytest.raises(ExportError, match="does not fit a context of 48"):
        lower(model, tmp_path / "c.mlpackage", quantize="int4", prefill_length=49, embed_length=32)
    odd = tiny("llama")
    odd.blocks[0].o.bases[0].weight = torch.zeros(64, 40)
    with pytest.raises(ExportError, match=r"blocks\.0\.o\.bases\.0\.weight \[64, 40\]"):
        plan(odd, "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["b.mlpackage"]
