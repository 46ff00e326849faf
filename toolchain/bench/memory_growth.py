"""How the memory of training grows with layers and tokens, on small random models.

Programs are lowered here and run in children, whose peak above idle is measured as in
``toolchain.bench.peak_memory``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from exporters.model.assembly import build
from exporters.model.spec import read_spec
from runtime_py.bundle import manifest as m
from runtime_py.bundle.adapter_forms import to_runtime
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.program_calls import ExecutorchPrograms
from runtime_py.engine.streaming import StreamingEngine
from toolchain.bench.peak_memory import STEPS, measure
from toolchain.bench.training_engines import AttuneStepper, labelled
from toolchain.compile.adapter_layout import fresh, layout
from toolchain.compile.training_part import lower_programs, training_spec, write_training

HIDDEN, RANK = 256, 8
MODULES = ("q_proj", "k_proj", "v_proj")
LAYERS, TOKENS = (4, 8, 16, 32), (64, 128, 256, 512)


@dataclass(frozen=True)
class GrowthRow:
    """Bytes: the peak above an idle child, and its parts that are known: ``inputs`` kept of the
    layers, and ``adapter`` with gradient, moments and rates; ``file``: the mapped weights."""

    layers: int
    tokens: int
    peak: int
    inputs: int
    adapter: int
    file: int


def bench_growth(progress: Callable[[str], None] = lambda text: None) -> list[GrowthRow]:
    """Layers at 256 tokens, then tokens at 8 layers; hidden size 256, float32 base weights."""
    cases = [(layers, 256) for layers in LAYERS] + [(8, tokens) for tokens in TOKENS]
    rows = []
    for layers, tokens in dict.fromkeys(cases):
        progress(f"{layers} layers, {tokens} tokens")
        rows.append(_row(layers, tokens))
    return rows


def _row(layers: int, tokens: int) -> GrowthRow:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    spec = read_spec(config, 512)
    model = build(spec, LlamaForCausalLM(config).state_dict(), MODULES, RANK)
    with tempfile.TemporaryDirectory(prefix="attune-") as name:
        folder = Path(name)
        (folder / "android").mkdir()
        spec_of_programs = training_spec(model, MODULES, RANK, None)
        training = write_training(folder, model, spec_of_programs, [tokens])
        programs = lower_programs("android", folder, spec_of_programs, [tokens])
        tensors = layout(spec, MODULES, RANK)
        description = {
            "training": training.model_dump(mode="json"),
            "programs": [program.model_dump(mode="json") for program in programs],
            "tensors": [tensor.model_dump(mode="json") for tensor in tensors],
            "layers": layers,
            "tokens": tokens,
        }
        (folder / "case.json").write_text(json.dumps(description))
        memory = measure([sys.executable, "-m", __name__, name], f"{layers} layers")
        state = _state(tensors, spec_layers=layers)
        file = (folder / training.weights).stat().st_size
    return GrowthRow(
        layers, tokens, memory.peak, 4 * HIDDEN * tokens * layers, 5 * state.parameters.nbytes, file
    )


def _state(tensors: Sequence[m.AdapterTensor], spec_layers: int) -> AdapterState:
    from runtime_py.bundle.peft_adapter import fresh_config

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=spec_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    adapter = fresh(read_spec(config, 512), fresh_config(RANK, 16, MODULES, ""), MODULES, RANK)
    return AdapterState.of(tensors, to_runtime(adapter, tensors))


def main(name: str) -> None:
    """The child."""
    folder = Path(name)
    case = json.loads((folder / "case.json").read_text())
    training = m.Training.model_validate(case["training"])
    programs = [m.Program.model_validate(program) for program in case["programs"]]
    tensors = [m.AdapterTensor.model_validate(tensor) for tensor in case["tensors"]]
    torch.set_num_threads(1)
    tokens = torch.arange(case["tokens"]) % 1000
    engine = StreamingEngine(
        ExecutorchPrograms(folder, programs, 1), BaseWeights(folder / training.weights), training
    )
    state = _state(tensors, case["layers"])
    stepper = AttuneStepper("growth", engine, state, labelled(tokens, tokens.clone()))
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(STEPS):
        stepper.step()


if __name__ == "__main__":
    main(sys.argv[1])
