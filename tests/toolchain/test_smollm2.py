"""A real model end to end: SmolLM2-135M from its GGUF, float32, in ExecuTorch's stock runner.

The references are transformers and PEFT, on real prompts.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from exporters.checkpoint import Checkpoint, load_checkpoint
from exporters.executorch.flat_tensor import write_ptd
from runtime_py.lm import ExecutorchLm
from runtime_py.manifest import Manifest, open_bundle
from runtime_py.peft_adapter import read_peft
from toolchain.adapters import to_runtime
from toolchain.commands.chat import StockRunner
from toolchain.export import Request, export

SHARED = Path(__file__).parents[3] / "shared"
GGUF = SHARED / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = SHARED / "data" / "dev"
PROMPTS, REPLY = 5, 64  # prompts, tokens of a reply
STEPS = 8  # of training an adapter
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
    export(Request(str(GGUF), out, ("android",), quantize={"android": "none"}), lambda step: None)
    return out


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return open_bundle(bundle)


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
    rendered = [runner.render([{"role": "user", "content": prompt}]) for prompt in prompts]
    return {text: runner.generate(text, REPLY, 0.0)[0] for text in rendered}


def test_stock_runner_writes_what_transformers_writes(
    bundle: Path, manifest: Manifest, checkpoint: Checkpoint, prompts: list[str]
) -> None:
    model = checkpoint.hf_model()
    replies = _replies(StockRunner(bundle, manifest), prompts)
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
        found[name] = _replies(StockRunner(bundle, manifest, file), prompts)
        assert found[name] == {text: _greedy(model, checkpoint, text) for text in found[name]}
        text = next(iter(found[name]))
        tokens = checkpoint.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            expected = model(tokens["input_ids"]).logits
        lm = ExecutorchLm(bundle / "android" / "lm.pte", file)
        assert (lm.all_logits(tokens["input_ids"]) - expected).abs().max() < 1e-3
    first, second = found.values()
    assert first != second
