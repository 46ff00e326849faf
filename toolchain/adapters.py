"""An adapter's two forms: PEFT's folder, and the named tensors that the programs bind.

The programs have one rank for all targets. A module of a smaller rank is padded with zeros, which
adds nothing to its update; ``META`` keeps what padding and float32 hide, so that the way back gives
identical tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from exporters.model import lora_targets, site_targets
from exporters.spec import ModelSpec
from runtime_py.manifest import AdapterTensor
from runtime_py.peft_adapter import AdapterError, PeftAdapter
from runtime_py.peft_config import check_config

_DTYPES = ("float32", "float16", "bfloat16")
META = "adapter_config.json"  # in a .ptd: UTF-8 JSON as uint8, beside the tensors


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


def to_runtime(adapter: PeftAdapter, tensors: Sequence[AdapterTensor]) -> dict[str, np.ndarray]:
    """The program's tensors (float32, zero-padded to its rank) and ``META``.

    Raises ``AdapterError`` where the adapter has modules, ranks or shapes that the program has not.
    """
    if misfits := _misfits(adapter, tensors):
        raise AdapterError(
            f"the adapter does not fit the compiled program, {len(misfits)} misfits: "
            f"{'; '.join(misfits)}. Export the model with this adapter."
        )
    arrays: dict[str, np.ndarray] = {}
    for tensor in tensors:
        module, part = tensor.name.rsplit(".", 1)
        array = np.zeros(tensor.shape, np.float32)
        if (pair := adapter.tensors.get(f"model.{module}")) is not None:
            if part == "scale":
                array[:] = adapter.scaling(f"model.{module}")
            elif part == "lora_A":
                array[0, : pair[0].shape[0]] = pair[0]
            else:
                array[0, :, : pair[1].shape[1]] = pair[1][slice(*tensor.rows)]
        arrays[tensor.name] = array
    meta = {
        "config": adapter.config,
        "dtype": adapter.dtype,
        "modules": sorted(adapter.tensors),
    }
    text = json.dumps(meta, ensure_ascii=False).encode()
    arrays[META] = np.frombuffer(text, np.uint8)
    return arrays


def _misfits(adapter: PeftAdapter, tensors: Sequence[AdapterTensor]) -> list[str]:
    inputs: dict[str, int] = {}
    outputs: dict[str, int] = {}
    rank = 0
    for tensor in tensors:
        module, part = tensor.name.rsplit(".", 1)
        if part == "lora_A":
            inputs[module], rank = tensor.shape[2], max(rank, tensor.shape[1])
        elif part.startswith("lora_B"):
            outputs[module] = max(outputs.get(module, 0), tensor.rows[1])
    misfits = []
    for path, (a, b) in adapter.tensors.items():
        module, own = path.removeprefix("model."), adapter.rank_of(path)
        if module not in inputs:
            misfits.append(f"{path} is not adapted by this program")
            continue
        if own > rank:
            misfits.append(f"{path} has rank {own}, the program has {rank}")
        for part, array, wanted in (
            ("A", a, (own, inputs[module])),
            ("B", b, (outputs[module], own)),
        ):
            if array.shape != wanted:
                misfits.append(f"{path} {part} is {list(array.shape)}, expected {list(wanted)}")
    return misfits


def _read_meta(arrays: Mapping[str, np.ndarray], where: str) -> tuple[dict, str, list[str]]:
    """PEFT's config, the dtype and the adapted modules that a file's ``META`` says."""
    if META not in arrays:
        raise AdapterError(
            f"{where} has no '{META}' among its tensors: expected a file that attune wrote."
        )
    try:
        meta = json.loads(arrays[META].tobytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{where}: its '{META}' is damaged ({error}).") from None
    kinds = {"config": dict, "dtype": str, "modules": list}
    if not isinstance(meta, dict) or any(not isinstance(meta.get(k), t) for k, t in kinds.items()):
        raise AdapterError(f"{where}: its '{META}' has not the fields {', '.join(kinds)}.")
    if meta["dtype"] not in _DTYPES or not all(isinstance(m, str) for m in meta["modules"]):
        raise AdapterError(
            f"{where}: its '{META}' has a dtype or modules that attune never writes."
        )
    check_config(meta["config"], Path(f"{where} ({META})"))
    return meta["config"], meta["dtype"], meta["modules"]


def from_runtime(arrays: Mapping[str, np.ndarray], where: str) -> PeftAdapter:
    """The PEFT adapter that ``to_runtime`` was given, or one trained since in its place."""
    config, dtype, modules = _read_meta(arrays, where)
    pairs = {}
    shape_only = PeftAdapter(config, {}, dtype)
    for path in modules:
        module, rank = path.removeprefix("model."), shape_only.rank_of(path)
        parts = sorted(name for name in arrays if name.startswith(f"{module}.lora_B"))
        if f"{module}.lora_A" not in arrays or not parts:
            raise AdapterError(f"{where} lacks tensors of {path} that its '{META}' names.")
        a = arrays[f"{module}.lora_A"][0, :rank]
        b = np.concatenate([arrays[name][0, :, :rank] for name in parts])
        pairs[path] = (np.ascontiguousarray(a), np.ascontiguousarray(b))
    # An adapter trained since holds values its first dtype has not: it is float32 from then on.
    return PeftAdapter(config, pairs, dtype if _holds(pairs, dtype) else "float32")


def _holds(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], dtype: str) -> bool:
    if dtype == "float32":
        return True
    for array in (a for pair in pairs.values() for a in pair):
        if dtype == "bfloat16":
            exact = not (np.ascontiguousarray(array).view(np.uint32) & 0xFFFF).any()
        else:
            with np.errstate(over="ignore"):
                exact = np.array_equal(array.astype(np.float16).astype(np.float32), array)
        if not exact:
            return False
    return True


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
