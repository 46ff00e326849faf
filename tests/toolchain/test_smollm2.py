"""A real model end to end: SmolLM2-135M from its GGUF, float32, in ExecuTorch's stock runner.

The references are transformers and PEFT, on real prompts.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from exporters.model.checkpoint import Checkpoint, load_checkpoint
from runtime_py.bundle.adapter_forms import to_runtime
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.flat_tensor import write_ptd
from runtime_py.bundle.manifest import Manifest
from runtime_py.bundle.peft_adapter import read_peft
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.engine.lm import ExecutorchLm
from runtime_py.engine.stock_runner import StockRunner
from runtime_py.engine.streaming import open_training
from runtime_py.engine.trainer import train
from runtime_py.engine.training_plan import Settings
from runtime_py.loop.dialogue import Turn
from tests import tiny
from tests.exporters.training.training_way import Way, check_same_way
from toolchain.bench.training_engines import peft_model
from toolchain.bench.training_speed import pick_sequence
from toolchain.compile.bundle_export import export
from toolchain.compile.tolerances import ABOVE
from toolchain.verify.reference_engines import PeftEngine, peft_gradient

SHARED = Path(__file__).parents[3] / "shared"
GGUF = SHARED / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = SHARED / "data" / "dev"
PROMPTS, REPLY = 5, 64  # prompts, tokens of a reply
STEPS = 8  # of training an adapter
NAMES = ("streamed", "float32", "float64")  # runs of training
TEXTS = ("dolly", "empathetic")  # what each adapter learns

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not (GGUF.is_file() and DATA.is_dir()),
        reason=f"needs {GGUF.name} and the data in ../shared",
    ),
]


def _dialogues(name: str, count: int) -> list[list[dict]]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["turns"] for line, _ in zip(file, range(count), strict=False)]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(str(GGUF))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "bundle"
    export(str(GGUF), out, targets=("android",), quantize={"android": "none"})
    return out


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [turns[0]["content"] for turns in _dialogues("dolly", PROMPTS)]


def _greedy(model: PreTrainedModel | PeftModel, checkpoint: Checkpoint, rendered: str) -> str:
    """Text after ``rendered`` by transformers' own greedy search."""
    tokenizer = checkpoint.tokenizer
    tokens = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=REPLY,
            do_sample=False,
            eos_token_id=list(checkpoint.eos_ids),
            pad_token_id=checkpoint.eos_ids[0],
        )
    new = [i for i in out[0, tokens.shape[1] :].tolist() if i not in checkpoint.eos_ids]
    return tokenizer.decode(new)


def _replies(runner: StockRunner, prompts: list[str]) -> dict[str, str]:
    """Rendered prompt -> the stock runner's greedy reply."""
    rendered = [runner.text.for_runner([Turn("user", prompt)]) for prompt in prompts]
    return {text: runner.generate(text, REPLY, 0.0)[0] for text in rendered}


def test_stock_runner_writes_what_transformers_writes(
    bundle: Path, manifest: Manifest, checkpoint: Checkpoint, prompts: list[str]
) -> None:
    model = checkpoint.hf_model()
    replies = _replies(StockRunner(Bundle(bundle, manifest)), prompts)
    assert len(replies) == PROMPTS
    assert all(replies.values())
    assert replies == {text: _greedy(model, checkpoint, text) for text in replies}


def _train(checkpoint: Checkpoint, name: str, out: Path) -> None:
    """A LoRA adapter with B ≠ 0, after a few steps on dialogues of one kind, as PEFT saves it."""
    torch.manual_seed(len(name))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(checkpoint.hf_model(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for turns in _dialogues(name, STEPS):
        text = checkpoint.tokenizer.apply_chat_template(
            turns, chat_template=checkpoint.chat_template, tokenize=False
        )
        ids = checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"][:96]
        tokens = torch.tensor([ids])
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(out)


@pytest.fixture(scope="module")
def adapters(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT folders by name."""
    home = tmp_path_factory.mktemp("adapters")
    for name in TEXTS:
        _train(checkpoint, name, home / name)
    return {name: home / name for name in TEXTS}


def test_one_program_with_two_adapters_equals_peft(
    bundle: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    adapters: dict[str, Path],
    prompts: list[str],
    tmp_path: Path,
) -> None:
    found = {}
    for name, folder in adapters.items():
        adapter = read_peft(folder)
        assert all(b.any() for _, b in adapter.tensors.values())
        file = tmp_path / f"{name}.ptd"
        write_ptd(file, to_runtime(adapter, manifest.adapter.tensors))
        model = PeftModel.from_pretrained(checkpoint.hf_model(), folder).eval()
        found[name] = _replies(StockRunner(Bundle(bundle, manifest), file), prompts)
        assert found[name] == {text: _greedy(model, checkpoint, text) for text in found[name]}
        text = next(iter(found[name]))
        tokens = checkpoint.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            single = model(tokens["input_ids"]).logits.double()
            double = model.double()(tokens["input_ids"]).logits
        lm = ExecutorchLm(bundle / "android" / "lm.pte", file)
        logits = lm.all_logits(tokens["input_ids"]).double()
        bound = ABOVE * tiny.relative(single, double)
        assert bound < 1e-2  # a wrong constant of 1 % is seen
        assert tiny.relative(logits, double) <= bound
    first, second = found.values()
    assert first != second


# Training


@pytest.fixture(scope="module")
def sequence(bundle: Path, manifest: Manifest) -> Example:
    """256 tokens of a real dialogue."""
    return pick_sequence(Bundle(bundle, manifest), data=DATA / "dolly.jsonl.gz")


@pytest.fixture(scope="module")
def trained(checkpoint: Checkpoint, manifest: Manifest) -> PeftModel:
    """PEFT's model with the bundle's rank and targets, A and B away from zero."""
    peft = peft_model(checkpoint.hf_model(), manifest).eval()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.02)
    return peft


def _state(peft: PeftModel, manifest: Manifest, folder: Path) -> AdapterState:
    peft.save_pretrained(str(folder))
    return AdapterState.of(
        manifest.adapter.tensors, to_runtime(read_peft(folder), manifest.adapter.tensors)
    )


def _off(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(found[n] - e).max() / np.abs(e).max()) for n, e in expected.items())


def _unlike(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest 1 − cosine of a tensor."""
    return max(
        1.0 - float((found[n] * e).sum() / np.sqrt((found[n] ** 2).sum() * (e**2).sum()))
        for n, e in expected.items()
    )


@torch.no_grad()
def _losses(model: PeftModel, example: Example) -> np.ndarray:
    """Of each label, in nats, float64."""
    logits = model(torch.from_numpy(example.tokens)[None]).logits[0, :-1]
    labels = torch.from_numpy(example.labels)[1:]
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return loss.double().numpy()


def test_gradients_are_exact(
    bundle: Path,
    manifest: Manifest,
    sequence: Example,
    trained: PeftModel,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Every LoRA gradient of one real dialogue, against float64: off by no more than ``ABOVE``
    times what float32 in PyTorch is."""
    state = _state(trained, manifest, tmp_path / "lora")
    engine = open_training(Bundle(bundle, manifest))
    flat = state.layout.zeros()
    loss, count = engine.gradient(state, [sequence], flat)
    assert count == sequence.count
    found = {n: v.astype(np.float64) for n, v in state.layout.views(flat).items()}
    tensors = manifest.adapter.tensors
    loss32, gradients = peft_gradient(trained, tensors, [sequence])
    single = {n: g.astype(np.float64) for n, g in gradients.items()}
    wide = copy.deepcopy(trained).double()
    loss64, double = peft_gradient(wide, tensors, [sequence])
    # Of the sum, differences of either sign might cancel by chance: each label's counts.
    loss_bound = ABOVE * np.abs(_losses(trained, sequence) - _losses(wide, sequence)).sum()
    record_property("loss off float64, float32's, allowed", str((loss, loss32, loss64, loss_bound)))
    record_property("off float32", _off(found, single))
    record_property("off float64", _off(found, double))
    record_property("float32 off float64", _off(single, double))
    record_property("unlike float64", _unlike(found, double))
    record_property("float32 unlike float64", _unlike(single, double))
    assert abs(loss - loss64) <= loss_bound < 1e-2 * loss64
    assert _off(found, double) <= ABOVE * _off(single, double) < 1e-2
    # Of two such vectors 1 − cosine is half the square of the difference.
    assert _unlike(found, double) <= ABOVE**2 * _unlike(single, double) + 2.0**-48


def test_twenty_steps(
    bundle: Path, manifest: Manifest, sequence: Example, trained: PeftModel, tmp_path: Path
) -> None:
    assert manifest.training is not None
    optimizer = manifest.training.optimizer
    own = Settings(steps=20, batch=1, learning_rate=3e-4, save_every=100)
    start, *states = (_state(trained, manifest, tmp_path / name) for name in ("start", *NAMES))
    engines = (
        open_training(Bundle(bundle, manifest)),
        PeftEngine(trained, manifest.adapter.tensors, optimizer),
        PeftEngine(copy.deepcopy(trained).double(), manifest.adapter.tensors, optimizer),
    )
    ways = []
    for state, engine, name in zip(states, engines, NAMES, strict=True):
        outcome = train(engine, state, [sequence], own, optimizer, tmp_path / f"run-{name}")
        assert outcome is not None
        assert outcome.losses[-1] < outcome.losses[0]
        ways.append(Way.of(start, state, np.array(outcome.losses)))
    found, single, wide = ways
    assert min(single.moved.values()) > 0
    sizes = {name: float(np.abs(value).max()) for name, value in single.values.items()}
    check_same_way(found, single, wide, sizes)
