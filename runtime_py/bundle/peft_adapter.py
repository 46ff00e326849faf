"""LoRA adapters in PEFT's own format: adapter_config.json and adapter_model.safetensors.

Needs NumPy and safetensors only, so that a phone's library can mirror it. What is read means what
it means to PEFT 0.21.2; a kind of adapter that would mean more than B·A·scaling is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import TensorSpec, serialize

from runtime_py.bundle.adapter_folder import CONFIG, WEIGHTS, find_folder, read_config, read_entries
from runtime_py.bundle.peft_config import check_config, fresh_config, resolve
from runtime_py.bundle.peft_selection import is_all_linear, selects
from runtime_py.bundle.text_names import renamed_config, text_name
from runtime_py.loop.errors import AdapterError
from runtime_py.loop.files import replacing
from runtime_py.loop.lfs import refuse_pointers

__all__ = [
    "PeftAdapter",
    "check_fits",
    "fresh_config",
    "read_peft",
    "write_peft",
]

Tensors = Mapping[str, tuple[np.ndarray, np.ndarray]]

_KEY = re.compile(r"base_model\.model\.(.{1,256})\.lora_(A|B)\.weight")
_TABLES = {"embed_tokens", "lm_head"}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A LoRA adapter. ``tensors`` maps a module's path in the base model, such as
    ``model.layers.0.self_attn.q_proj``, to A [r, in] and B [out, r].

    The arrays are always float32, which holds float16 and bfloat16 exactly (NumPy has no bfloat16);
    ``dtype`` is the one in the file ("float32", "float16" or "bfloat16"), in which ``write_peft``
    writes them again. ``config`` is adapter_config.json as it is, except that the language layers
    of a multi-modal model are selected by their paths in the text model.
    """

    config: dict
    tensors: Tensors
    dtype: str = "float32"

    @property
    def rank(self) -> int:
        """The default rank; ``rank_of`` is that of one module."""
        return self.config.get("r", 8)  # PEFT's default

    @property
    def alpha(self) -> float:
        return self.config.get("lora_alpha", 8)

    def rank_of(self, module: str) -> int:
        return resolve(self.config.get("rank_pattern"), module, self.rank)

    def alpha_of(self, module: str) -> float:
        return resolve(self.config.get("alpha_pattern"), module, self.alpha)

    def scaling(self, module: str) -> float:
        """The factor of B·A: α/r (Hu et al., 2021) or α/√r (rsLoRA, Kalajdzievski, 2023)."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_peft(path: Path) -> PeftAdapter:
    """Read an adapter's folder; ``path`` may also be one of its files, or the folder around it.

    Raises ``AdapterError`` for anything but a sound, plain LoRA all of which PEFT would load.
    """
    folder = find_folder(path)
    refuse_pointers([folder / CONFIG, folder / WEIGHTS], AdapterError)
    config = read_config(folder)
    check_config(config, folder / CONFIG)
    tensors, dtype = _read_tensors(folder)
    adapter = PeftAdapter(config, tensors, dtype)
    _check_tensors(adapter, str(folder / WEIGHTS))
    return _text_only(adapter, str(folder / WEIGHTS))


def _text_only(adapter: PeftAdapter, where: str) -> PeftAdapter:
    if all(text_name(module) == module for module in adapter.tensors):
        return adapter
    config = renamed_config(
        adapter.config,
        {module: adapter.rank_of(module) for module in adapter.tensors},
        {module: adapter.alpha_of(module) for module in adapter.tensors},
        where,
    )
    renamed = {text_name(module): pair for module, pair in adapter.tensors.items()}
    return PeftAdapter(config, renamed, adapter.dtype)


def write_peft(folder: Path, adapter: PeftAdapter, replace: bool = False) -> None:
    """Write an adapter folder that ``peft.PeftModel.from_pretrained`` loads, whole or not at all.

    Values are rounded to nearest even in ``adapter.dtype``: unchanged if they were read in it.
    Raises ``AdapterError`` if the adapter is unsound, or the folder exists and is not to be
    ``replace``d, ``WriteError`` if writing fails.
    """
    if os.path.lexists(folder) and not replace:
        raise AdapterError(f"{folder} exists already; choose another name or remove it.")
    check_config(adapter.config, folder / CONFIG)
    _check_tensors(adapter, "the adapter to write")
    stored = {
        f"base_model.model.{module}.lora_{part}.weight": _encode(array, adapter.dtype)
        for module, pair in sorted(adapter.tensors.items())
        for part, array in zip("AB", pair, strict=True)
    }
    specs = {
        name: TensorSpec(
            dtype=adapter.dtype,
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in stored.items()
    }
    with replacing(folder) as beside:
        beside.mkdir()
        text = json.dumps(adapter.config, indent=2, ensure_ascii=False, allow_nan=False)
        (beside / CONFIG).write_text(text + "\n", encoding="utf-8")
        (beside / WEIGHTS).write_bytes(serialize(specs, metadata={"format": "pt"}))


def check_fits(adapter: PeftAdapter, expected: Mapping[str, tuple[int, int]]) -> None:
    """Check an adapter against a base model: ``expected`` maps a module's path to (in, out).

    Raises one ``AdapterError`` that lists every misfit, with both shapes.
    """
    misfits = _random_modules(adapter, expected)
    for module, (a, b) in sorted(adapter.tensors.items()):
        if module not in expected:
            misfits.append(f"{module} does not exist in the base model")
            continue
        into, out = expected[module]
        rank = adapter.rank_of(module)
        for part, array, wanted in (("A", a, (rank, into)), ("B", b, (out, rank))):
            if array.shape != wanted:
                misfits.append(f"{module} {part} is {list(array.shape)}, expected {list(wanted)}")
    if misfits:
        base = adapter.config.get("base_model_name_or_path") or "another base model"
        raise AdapterError(
            f"the adapter (made for {base}) does not fit this model, {len(misfits)} misfits: "
            f"{'; '.join(misfits)}. Use the base model that it was trained on."
        )


def _random_modules(adapter: PeftAdapter, expected: Iterable[str]) -> list[str]:
    """What PEFT would fill with random numbers: it makes B zero only where told to initialize."""
    if adapter.config.get("init_lora_weights", True):
        return []
    return [
        f"{module} is selected and has no tensors, and init_lora_weights leaves them random"
        for module in sorted(set(expected) - set(adapter.tensors))
        if selects(adapter.config, module)
    ]


def _read_tensors(folder: Path) -> tuple[Tensors, str]:
    path = folder / WEIGHTS
    modules: dict[str, dict[str, np.ndarray]] = {}
    odd, tables, dtypes = [], [], set()
    for name, entry in read_entries(folder):
        if _TABLES & set(name.split(".")):
            tables.append(name)
        elif match := _KEY.fullmatch(name):
            dtypes.add(entry["dtype"])
            modules.setdefault(match[1], {})[match[2]] = _decode(entry)
        else:
            odd.append(name)
    if tables:
        raise AdapterError(
            f"{path} has {len(tables)} tensors of the embedding table or the output head "
            f"({', '.join(sorted(tables)[:5])}), which are part of the base model here; train "
            f"again without {' and '.join(sorted(_TABLES))}, or merge the adapter into its model."
        )
    if odd:
        raise AdapterError(
            f"{path} has {len(odd)} tensors that are not a linear layer's lora_A or lora_B "
            f"({', '.join(sorted(odd)[:5])}); only plain LoRA on linear layers is supported."
        )
    if not modules:
        raise AdapterError(f"{path} has no LoRA tensors.")
    if halves := sorted(m for m, parts in modules.items() if len(parts) == 1):
        raise AdapterError(f"{path} has only one of lora_A and lora_B for {', '.join(halves)}.")
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise AdapterError(
            f"{path} has tensors of {', '.join(sorted(dtypes))}; expected one of "
            f"{', '.join(_DTYPES)} for all."
        )
    tensors = {module: (parts["A"], parts["B"]) for module, parts in sorted(modules.items())}
    return tensors, _DTYPES[dtypes.pop()]


def _decode(entry: dict) -> np.ndarray:
    """A stored tensor as float32, exactly. Another dtype is refused by the caller, unread."""
    data, shape = entry["data"], entry["shape"]
    if entry["dtype"] == "BF16":  # the upper half of a float32
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    if entry["dtype"] in ("F32", "F16"):
        form = "<f4" if entry["dtype"] == "F32" else "<f2"
        return np.frombuffer(data, form).astype(np.float32).reshape(shape)
    return np.zeros(shape, np.float32)


def _encode(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to the bits of ``dtype``, contiguous and little endian, rounded to nearest even."""
    wide = np.ascontiguousarray(array, "<f4")
    if dtype == "float32":
        return wide
    if dtype == "float16":
        with np.errstate(over="ignore"):  # reported below
            narrow = wide.astype("<f2")
        too_large = ~np.isfinite(narrow)
    else:
        bits = wide.view("<u4")
        narrow = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        too_large = (narrow & 0x7FFF) >= 0x7F80  # the bits of infinity
    if too_large.any():
        raise AdapterError(f"the adapter has values too large for {dtype}; write it as float32.")
    return narrow


def _check_tensors(adapter: PeftAdapter, where: str) -> None:
    wrong = []
    if adapter.dtype not in _DTYPES.values():
        raise AdapterError(f"dtype is {adapter.dtype}; expected {', '.join(_DTYPES.values())}.")
    for module, (a, b) in adapter.tensors.items():
        rank = adapter.rank_of(module)
        sound = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] == rank
        if not sound or 0 in a.shape + b.shape:
            wrong.append(
                f"{module}: A {list(a.shape)} and B {list(b.shape)}, expected A [{rank}, in] and "
                f"B [out, {rank}]"
            )
        elif not (np.isfinite(a).all() and np.isfinite(b).all()):
            wrong.append(f"{module} has values that are not finite")
        if not selects(adapter.config, module):
            wrong.append(
                f"{module} is not among target_modules, or is left out by exclude_modules, "
                f"layers_to_transform or layers_pattern, so PEFT would ignore it"
            )
    for parent in () if is_all_linear(adapter.config) else _parents(adapter.tensors):
        if selects(adapter.config, parent):
            wrong.append(f"{parent} is selected too, and is no linear layer: PEFT does not load it")
    if wrong:
        raise AdapterError(f"{where} is unsound ({len(wrong)}): {'; '.join(wrong)}.")


def _parents(modules: Iterable[str]) -> list[str]:
    """The paths of all modules that hold one of ``modules``."""
    parts = (module.split(".") for module in modules)
    return sorted({".".join(part[:count]) for part in parts for count in range(1, len(part))})
