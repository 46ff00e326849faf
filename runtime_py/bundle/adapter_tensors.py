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

from runtime_py.bundle.manifest import AdapterTensor
from runtime_py.bundle.peft_adapter import PeftAdapter, read_peft
from runtime_py.bundle.peft_config import check_config
from runtime_py.loop.errors import AdapterError

_DTYPES = ("float32", "float16", "bfloat16")
META = "adapter_config.json"  # in a .ptd: UTF-8 JSON as uint8, beside the tensors


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


def load_adapter(path: Path) -> PeftAdapter:
    """A PEFT folder or a runtime file (.ptd). Raises ``AdapterError``."""
    if path.suffix == ".ptd":
        if not path.is_file():
            raise AdapterError(f"there is no adapter file {path}.")
        from runtime_py.bundle.flat_tensor import read_ptd

        return from_runtime(read_ptd(path), str(path))
    return read_peft(path)
