"""The files of a PEFT adapter: where they are, and what stands in for them by mistake."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, deserialize

from runtime_py.loop.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_MLX_WEIGHTS = ("adapters.safetensors", "adapters.npz")
_MLX_FIELDS = ("fine_tune_type", "lora_parameters", "lora_layers")
_SHOWN = 10  # folders in a message


def find_folder(path: Path) -> Path:
    """The adapter's folder, where ``path`` is it, one of its two files, or the folder in which
    PEFT made one for a named adapter.

    Raises ``AdapterError`` where there is none, or which of several is meant cannot be told.
    """
    if path.is_file():
        return _folder_of(path)
    if not path.is_dir():
        raise AdapterError(f"no such adapter folder: {path}.")
    if (path / CONFIG).exists():
        return path
    try:
        inside = sorted(child for child in path.iterdir() if (child / CONFIG).is_file())
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}.") from None
    if len(inside) == 1:
        return inside[0]
    if inside:
        more = f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else ""
        raise AdapterError(
            f"{path} holds {len(inside)} adapters, in the folders "
            f"{', '.join(child.name for child in inside[:_SHOWN])}{more}; name one of them."
        )
    if any((path / name).exists() for name in _MLX_WEIGHTS):
        raise _mlx_error(path, {})
    raise AdapterError(f"{path} has no {CONFIG}; expected a PEFT adapter folder.")


def read_config(folder: Path) -> dict:
    """adapter_config.json. Raises ``AdapterError`` for no JSON object, or one of MLX's."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder} has no {CONFIG}; expected a PEFT adapter folder.") from None
    except UnicodeDecodeError:
        raise AdapterError(f"{path} is not UTF-8 text; expected a JSON object.") from None
    except json.JSONDecodeError as error:
        raise AdapterError(
            f"{path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})."
        ) from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds a {type(config).__name__}; expected a JSON object.")
    if "peft_type" not in config and any(field in config for field in _MLX_FIELDS):
        raise _mlx_error(folder, config)
    return config


def read_entries(folder: Path) -> list[tuple[str, dict]]:
    """The tensors of the weights file: names, and what safetensors says of each. Raises
    ``AdapterError`` for none, a damaged one, or one of MLX's names."""
    path = folder / WEIGHTS
    try:
        entries = deserialize(path.read_bytes())
    except FileNotFoundError:
        if (folder / _PICKLE).exists():
            raise _pickle_error(folder) from None
        raise AdapterError(f"{folder} has no {WEIGHTS}.") from None
    except SafetensorError as error:
        raise AdapterError(f"{path} is truncated or corrupt ({error}); copy it again.") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}.") from None
    if any(name.endswith((".lora_a", ".lora_b")) for name, _ in entries):
        raise _mlx_error(path, {})
    return entries


def _folder_of(file: Path) -> Path:
    if file.name == _PICKLE:
        raise _pickle_error(file.parent)
    if file.name in _MLX_WEIGHTS:
        beside = file.parent / CONFIG
        raise _mlx_error(file, read_config(file.parent) if beside.is_file() else {})
    if file.name not in (CONFIG, WEIGHTS):
        raise AdapterError(
            f"{file} is a file that PEFT does not read; expected a folder with {CONFIG} and "
            f"{WEIGHTS}, or a .ptd file."
        )
    return file.parent


def _pickle_error(folder: Path) -> AdapterError:
    return AdapterError(
        f"{folder} has its weights only as a pickle ({_PICKLE}), which can run code when read and "
        f"never is; save the adapter again as safetensors."
    )


def _mlx_error(where: Path, config: dict) -> AdapterError:
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        return AdapterError(
            f"{where} is an adapter of MLX (mlx-lm) with fine_tune_type {kind!r}, which is no "
            f"plain LoRA; fuse it into its model (mlx_lm.fuse) and export that."
        )
    return AdapterError(
        f"{where} is an adapter of MLX (mlx-lm); expected one of PEFT. Convert it: for each of its "
        f"modules X write base_model.model.X.lora_A.weight = X.lora_a transposed and "
        f"base_model.model.X.lora_B.weight = X.lora_b transposed into {WEIGHTS}, and peft_type "
        f'"LORA", r = rank, lora_alpha = scale · rank{_numbers(config)} and target_modules = the '
        f"last words of all X into {CONFIG}."
    )


def _numbers(config: dict) -> str:
    settings = config.get("lora_parameters")
    settings = settings if isinstance(settings, dict) else {}
    rank, scale = settings.get("rank"), settings.get("scale")
    if not isinstance(rank, int) or not isinstance(scale, int | float) or "alpha" in settings:
        return ""
    return f" (here r = {rank}, lora_alpha = {scale * rank:g})"
