"""Which tensors a program's adapter has, and a new adapter to begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from exporters.model.lora_targets import lora_targets, site_targets
from exporters.model.spec import ModelSpec
from runtime_py.bundle.manifest import AdapterTensor
from runtime_py.bundle.peft_adapter import PeftAdapter


def module_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Every module that LoRA can adapt: its path -> (inputs, outputs)."""
    every = [t for targets in site_targets(spec).values() for t in targets]
    return {
        f"model.layers.{index}.{t.module}": (t.inputs, sum(t.rows))
        for index in range(len(spec.layers))
        for t in every
    }


def modules_of(adapter: PeftAdapter) -> tuple[str, ...]:
    """The short names of the modules it adapts, such as ``q_proj``, in order of appearance."""
    return tuple(dict.fromkeys(path.split(".")[-1] for path in adapter.tensors))


def highest_rank(adapter: PeftAdapter) -> int:
    return max(adapter.rank_of(path) for path in adapter.tensors)


def layout(spec: ModelSpec, modules: Sequence[str], rank: int) -> tuple[AdapterTensor, ...]:
    """The tensors of a program's adapter, in order, and where PEFT keeps each."""
    tensors = []
    for index in range(len(spec.layers)):
        for target in lora_targets(spec, modules):
            base = f"layers.{index}.{target.module}"
            peft = f"base_model.model.model.{base}"
            tensors.append(
                AdapterTensor(
                    name=f"{base}.lora_A",
                    peft=f"{peft}.lora_A.weight",
                    rows=(0, rank),
                    shape=(1, rank, target.inputs),
                )
            )
            start = 0
            for part, rows in enumerate(target.rows):
                suffix = f"_{part}" if len(target.rows) > 1 else ""
                tensors.append(
                    AdapterTensor(
                        name=f"{base}.lora_B{suffix}",
                        peft=f"{peft}.lora_B.weight",
                        rows=(start, start + rows),
                        shape=(1, rows, rank),
                    )
                )
                start += rows
            tensors.append(
                AdapterTensor(name=f"{base}.scale", peft="", rows=(0, 1), shape=(1, 1, 1))
            )
    return tuple(tensors)


def fresh(spec: ModelSpec, config: Mapping, modules: Sequence[str], rank: int) -> PeftAdapter:
    """A new adapter as PEFT initializes one: A uniform in ±1/√in (Kaiming, a = √5), B zero."""
    random = np.random.default_rng(0)
    pairs = {}
    for index in range(len(spec.layers)):
        for target in lora_targets(spec, modules):
            bound = target.inputs**-0.5
            a = random.uniform(-bound, bound, (rank, target.inputs)).astype(np.float32)
            b = np.zeros((sum(target.rows), rank), np.float32)
            pairs[f"model.layers.{index}.{target.module}"] = (a, b)
    return PeftAdapter(dict(config), pairs)
