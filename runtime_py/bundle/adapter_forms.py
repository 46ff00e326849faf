"""An adapter in all its forms, and the ways between them, lossless in every direction.

- PEFT's folder (``peft_adapter``);
- the programs' tensors by name, here as ``to_runtime`` gives them: float32, of one rank for all;
- the flat matrices of training (``adapter_state``), made of those and giving them back;
- the ``.ptd`` that the phone's runtime binds (``flat_tensor``): those, and ``META`` beside them.

A module of a smaller rank than the programs' is padded with zeros, which adds nothing to its
update. Training leaves them zero, to the bit: with s the scale, g the gradient of the output and x
the input, ∂A = s · Bᵀg xᵀ has zero rows where B has zero columns, ∂B = s · g (A x)ᵀ zero columns
where A has zero rows, and AdamW moves a zero without gradient nowhere. ``META`` keeps what padding
and float32 hide. ``from_runtime`` refuses values that a PEFT folder could not hold: something in
the padding, in a module that the adapter has not, or a scale that is not the configuration's.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime_py.bundle.manifest import AdapterTensor
from runtime_py.bundle.peft_adapter import PeftAdapter, read_peft
from runtime_py.bundle.peft_config import check_config
from runtime_py.loop.errors import AdapterError
from runtime_py.loop.files import replacing
from runtime_py.loop.lfs import refuse_pointers

META = "adapter_config.json"  # in a .ptd: UTF-8 JSON as uint8, beside the tensors
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class AdapterMeta:
    """What a ``.ptd`` says of the PEFT folder that it stands for: its configuration, the dtype of
    its file, and the modules that it has, such as ``model.layers.0.self_attn.q_proj``."""

    config: dict
    dtype: str
    modules: tuple[str, ...]

    def encode(self) -> np.ndarray:
        """uint8 [bytes]: one JSON object in UTF-8."""
        fields = {"config": self.config, "dtype": self.dtype, "modules": list(self.modules)}
        return np.frombuffer(json.dumps(fields, ensure_ascii=False).encode(), np.uint8)


def read_meta(arrays: Mapping[str, np.ndarray], where: str) -> AdapterMeta:
    """The ``META`` of a file's arrays. Raises ``AdapterError``, naming ``where``, without one that
    attune wrote."""
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
    return AdapterMeta(meta["config"], meta["dtype"], tuple(meta["modules"]))


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
    meta = AdapterMeta(adapter.config, adapter.dtype, tuple(sorted(adapter.tensors)))
    arrays[META] = meta.encode()
    return arrays


def _misfits(adapter: PeftAdapter, tensors: Sequence[AdapterTensor]) -> list[str]:
    inputs: dict[str, int] = {}
    outputs: dict[str, int] = {}
    most = 0
    for tensor in tensors:
        module, part = tensor.name.rsplit(".", 1)
        if part == "lora_A":
            inputs[module], most = tensor.shape[2], max(most, tensor.shape[1])
        elif part.startswith("lora_B"):
            outputs[module] = max(outputs.get(module, 0), tensor.rows[1])
    misfits = []
    for path, (a, b) in adapter.tensors.items():
        module, rank = path.removeprefix("model."), adapter.rank_of(path)
        if module not in inputs:
            misfits.append(f"{path} is not adapted by this program")
            continue
        if rank > most:
            misfits.append(f"{path} has rank {rank}, the program has {most}")
        for part, array, expected in (
            ("A", a, (rank, inputs[module])),
            ("B", b, (outputs[module], rank)),
        ):
            if array.shape != expected:
                misfits.append(f"{path} {part} is {list(array.shape)}, expected {list(expected)}")
    return misfits


def from_runtime(arrays: Mapping[str, np.ndarray], where: str) -> PeftAdapter:
    """The PEFT adapter that ``to_runtime`` was given, or one trained since in its place.

    ``arrays``: the programs' tensors and ``META``. One trained since has values that its first
    dtype may not hold: it is float32 then. Raises ``AdapterError``, naming ``where``, for arrays
    that attune did not write, and with all values that a PEFT folder could not hold.
    """
    meta = read_meta(arrays, where)
    config_only = PeftAdapter(meta.config, {}, meta.dtype)
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    strays = [
        f"{name} is not zero, and the adapter does not have its module"
        for name, array in arrays.items()
        if ".lora_" in name and f"model.{name.rsplit('.', 1)[0]}" not in meta.modules
        if array.any()
    ]
    for path in meta.modules:
        module, rank = path.removeprefix("model."), config_only.rank_of(path)
        parts = _parts(arrays, module)
        a, scale = arrays.get(f"{module}.lora_A"), arrays.get(f"{module}.scale")
        if a is None or scale is None or not parts:
            raise AdapterError(f"{where} lacks tensors of {path} that its '{META}' names.")
        b = np.concatenate([arrays[name][0] for name in parts])  # [out, r]
        if a[0, rank:].any() or b[:, rank:].any():
            strays.append(f"{path} has rank {rank}, and values beyond it that are not zero")
        if scale.item() != np.float32(config_only.scaling(path)):
            strays.append(
                f"{path} has the scale {scale.item():g}, its configuration says "
                f"{config_only.scaling(path):g}"
            )
        pairs[path] = (np.ascontiguousarray(a[0, :rank]), np.ascontiguousarray(b[:, :rank]))
    if strays:
        raise AdapterError(
            f"{where} has values that no PEFT folder with its configuration holds, {len(strays)} "
            f"misfits: {'; '.join(strays)}. It was not trained from an adapter that attune wrote."
        )
    return PeftAdapter(meta.config, pairs, meta.dtype if _holds(pairs, meta.dtype) else "float32")


def _parts(arrays: Mapping[str, np.ndarray], module: str) -> list[str]:
    """The names of B's parts in the order of their rows: one, or ``lora_B_0``, ``lora_B_1`` …"""
    whole = f"{module}.lora_B"
    endings = (name.removeprefix(f"{whole}_") for name in arrays if name.startswith(f"{whole}_"))
    numbers = sorted(int(ending) for ending in endings if ending.isdecimal())
    return [whole] if whole in arrays else [f"{whole}_{number}" for number in numbers]


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
        refuse_pointers([path], AdapterError)
        from runtime_py.bundle.flat_tensor import read_ptd  # ExecuTorch's, and heavy

        return from_runtime(read_ptd(path), str(path))
    return read_peft(path)


def check_runtime_file(file: Path) -> Path:
    """``file``, where a program could bind it. Raises ``AdapterError`` for anything but a .ptd."""
    if file.suffix != ".ptd":
        raise AdapterError(
            f"{file} is not an adapter file of this bundle: expected a .ptd, or convert it with "
            f"attune adapter convert."
        )
    return file


def read_values(file: Path, tensors: Sequence[AdapterTensor]) -> dict[str, np.ndarray]:
    """The programs' tensors of a ``.ptd``, float32 by name, read at the manifest's offsets as a
    phone does. Raises ``AdapterError`` where the file has no room for them."""
    data = check_runtime_file(file).read_bytes()
    values = {}
    for tensor, offset in _places(file, tensors):
        count = math.prod(tensor.shape)
        if offset + 4 * count > len(data):
            raise _no_place(file, tensor)
        flat = np.frombuffer(data, "<f4", count, offset)
        values[tensor.name] = flat.reshape(tensor.shape).astype(np.float32)
    return values


def write_values(
    file: Path, source: Path, tensors: Sequence[AdapterTensor], values: Mapping[str, np.ndarray]
) -> None:
    """``source``, a ``.ptd``, with other values, at ``file``: there whole, or not at all.

    ``values``: every one of ``tensors`` by name, in its shape. ``META`` and all else stays.
    """
    with replacing(file) as beside:
        shutil.copyfile(source, beside)
        with beside.open("r+b") as out:
            for tensor, offset in _places(source, tensors):
                out.seek(offset)
                out.write(np.ascontiguousarray(values[tensor.name], "<f4").tobytes())


def _places(file: Path, tensors: Sequence[AdapterTensor]) -> Iterator[tuple[AdapterTensor, int]]:
    for tensor in tensors:
        if tensor.offset is None:
            raise _no_place(file, tensor)
        yield tensor, tensor.offset


def _no_place(file: Path, tensor: AdapterTensor) -> AdapterError:
    return AdapterError(
        f"{file} has no place for {tensor.name}: it does not belong to this bundle."
    )
