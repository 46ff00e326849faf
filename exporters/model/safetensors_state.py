"""The tensors of a checkpoint folder, read from safetensors one at a time, when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporters.errors import ExportError
from exporters.model.lfs import refuse_pointer

_FLOATS = {"F32", "F16", "BF16"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict:
    """A JSON object from a file; ``ExportError`` if it cannot be read or is something else."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ExportError(f"{path} is not UTF-8 text; expected a JSON object.") from None
    except json.JSONDecodeError as error:
        raise ExportError(
            f"{path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            f"download or write it again."
        ) from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


class SafetensorsState(Mapping[str, Tensor]):
    """Names to tensors of one or several safetensors files, as stored (float32, float16 or
    bfloat16). A lookup reads that tensor only, so that a model larger than memory can be walked.

    ``rename`` gives the name under which a stored tensor is listed, or ``None`` to leave it out.
    """

    def __init__(self, files: list[Path], rename: Callable[[str], str | None]) -> None:
        self.files = tuple(files)
        self._handles = [_open(path) for path in files]
        self._places: dict[str, tuple[int, str]] = {}
        for index, handle in enumerate(self._handles):
            for stored in handle.keys():  # noqa: SIM118 (not a dict)
                name = rename(stored)
                if name is None:
                    continue
                if name in self._places:
                    raise ExportError(
                        f"tensor {name} is in {files[index]} and in "
                        f"{files[self._places[name][0]]}; expected each tensor once."
                    )
                dtype = handle.get_slice(stored).get_dtype()
                if dtype not in _FLOATS:
                    raise ExportError(
                        f"tensor {stored} in {files[index]} is stored as {dtype}; expected "
                        f"{', '.join(sorted(_FLOATS))}: export the checkpoint before quantization."
                    )
                self._places[name] = index, stored

    def rename(self, name: str, new: str) -> None:
        """Lists a tensor under another name."""
        self._places[new] = self._places.pop(name)

    def leave_out(self, name: str) -> None:
        """Lists a tensor no longer."""
        del self._places[name]

    def __getitem__(self, name: str) -> Tensor:
        index, stored = self._places[name]
        return self._handles[index].get_tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _open(path: Path) -> Any:  # safetensors' handle has no public type
    refuse_pointer(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ExportError(
            f"weights file {path} is truncated or corrupt ({error}); download or write it again."
        ) from None
    except OSError as error:
        raise ExportError(
            f"weights file {path} cannot be read: {error.strerror or error}."
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that together are the model; never a pickle."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if (folder / _INDEX).is_file():
        return _shards(folder)
    files = sorted(p for p in folder.glob("*.safetensors") if "consolidated" not in p.name)
    if len(files) == 1:
        return files
    if files:
        raise ExportError(
            f"{folder} has {len(files)} safetensors files and no {_INDEX} that says how they "
            f"belong together; copy that file as well."
        )
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ExportError(
            f"{folder} has its weights only as pickles ({', '.join(pickles[:3])}), which can run "
            f"code when read and never are; save the model again as safetensors "
            f"(save_pretrained of transformers does)."
        )
    raise ExportError(
        f"{folder} has no weights: expected model.safetensors, or its shards with {_INDEX} "
        f"(pickled weights are never read)."
    )


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise ExportError(f"{index} has no 'weight_map' from tensor names to file names.")
    shards = sorted(set(names.values()))
    if odd := [s for s in shards if Path(s).name != s or not s.endswith(".safetensors")]:
        raise ExportError(
            f"{index} names {', '.join(odd[:3])}; expected safetensors files in the same folder."
        )
    if missing := [s for s in shards if not (folder / s).is_file()]:
        raise ExportError(
            f"{folder} lacks {len(missing)} of {len(shards)} weight shards "
            f"({', '.join(missing[:3])}); download them again."
        )
    files = [folder / s for s in shards]
    there = {name for path in files for name in _open(path).keys()}  # noqa: SIM118
    if absent := sorted(set(names) - there):
        raise ExportError(
            f"{index} lists {len(absent)} tensors that no shard has ({', '.join(absent[:3])}); "
            f"the files are not of one download."
        )
    return files
