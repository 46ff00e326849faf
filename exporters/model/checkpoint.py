"""A Hugging Face causal language model from a hub id, a folder or a GGUF file: config, weights,
tokenizer and chat template, each checked before it is used. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from exporters.errors import ExportError
from exporters.model.end_tokens import end_ids
from exporters.model.gguf_file import read_gguf
from exporters.model.gguf_model import GGUFState, architecture_of, read_config
from exporters.model.names import model_name
from exporters.model.redundant import settle_redundant
from exporters.model.safetensors_state import SafetensorsState, read_json, weight_files
from exporters.model.spec import ARCHITECTURES
from exporters.model.tokenizer import gguf_tokenizer, json_tokenizer, settle_template

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "chat_template.jinja"]
_HUB_EXCEPT = ["*/*", "consolidated*"]  # e.g. Mistral's second copy of its weights
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as it was published.

    ``state`` has Hugging Face's names and the stored dtype (float32, float16 or bfloat16; float32
    from GGUF) and reads a tensor at each lookup. ``template_origin``: what the chat template is
    called in a sentence. ``eos_ids`` are all tokens that end a reply, the tokenizer's own first.
    ``name`` is the last part of where it was found; ``source`` says name, kind and the SHA-256 of
    each weights file.
    """

    name: str
    config: PreTrainedConfig
    state: Mapping[str, Tensor]
    tokenizer: PreTrainedTokenizerFast
    chat_template: str
    template_origin: str
    eos_ids: tuple[int, ...]
    source: str

    def hf_model(self) -> PreTrainedModel:
        """Hugging Face's own module with these weights: float32, eager attention, eval mode.

        Raises ``ExportError`` if the weights are not exactly those that the module has.
        """
        # transformers' mapping is typed as if it could hold several classes for a config.
        owner: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
        try:
            with _no_progress_bar():
                model, info = owner.from_pretrained(
                    None,
                    config=self.config,
                    state_dict=dict(self.state),
                    dtype=torch.float32,
                    attn_implementation="eager",
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported below, with all the others
                )
        except (StrictDataclassError, ValueError) as error:
            raise ExportError(f"transformers cannot build {self.source}: {_line(error)}.") from None
        misfits = [f"{name} is missing" for name in sorted(info["missing_keys"])]
        misfits += [f"{name} is not part of it" for name in sorted(info["unexpected_keys"])]
        for name, stored, expected in sorted(info["mismatched_keys"]):
            misfits.append(f"{name} is {list(stored)}, expected {list(expected)}")
        if misfits:
            shown = "; ".join(misfits[:20]) + ("; …" if len(misfits) > 20 else "")
            raise ExportError(
                f"the weights of {self.source} do not fit its config ({len(misfits)}): {shown}."
            )
        return model.eval()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Whoever exports shows stages of its own, to which this takes a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_checkpoint(model: str, *, chat_template: Path | None = None) -> Checkpoint:
    """Open a model: a hub id, a folder with config.json, tokenizer.json and safetensors, or a
    .gguf file. ``chat_template`` is a Jinja file used in place of the model's own.

    Raises ``ExportError`` with one sentence for whatever is missing, broken or not supported; the
    architecture is checked before the weights are opened.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        name = model_name(path)
        return _from_folder(path, name, name, chat_template)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _from_gguf(path, chat_template)
        raise ExportError(
            f"{path} is a file; expected a .gguf file, a folder with config.json, or a hub id "
            f"(pickled weights are never read)."
        )
    looks_like_path = (
        model.startswith((".", "/", "~"))
        or "\\" in model
        or path.suffix.lower() in (".gguf", ".safetensors", ".bin", ".pt", ".pth")
        or not _HUB_ID.fullmatch(model)
    )
    if looks_like_path:
        raise ExportError(
            f"no such file or folder: {model or '(empty)'}; expected a folder with config.json, a "
            f".gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    folder = _download(model)
    name = model_name(Path(model))
    return _from_folder(folder, name, f"{model}@{folder.name}", chat_template)


def _download(model: str) -> Path:
    try:
        folder = snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_EXCEPT)
    except GatedRepoError:
        raise ExportError(
            f"'{model}' is gated on the Hugging Face hub: accept its terms there and log in with "
            f"'hf auth login'."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ExportError(
            f"'{model}' is neither a folder or file here nor a model on the Hugging Face hub; "
            f"check its spelling."
        ) from None
    except HfHubHTTPError as error:
        raise ExportError(f"the Hugging Face hub refused '{model}': {_line(error)}.") from None
    except (OSError, HTTPError):
        raise ExportError(
            f"'{model}' is no folder or file here, and the Hugging Face hub cannot be reached to "
            f"look for it there: check its spelling or the network, or give a folder or .gguf file."
        ) from None
    return Path(folder)


def _from_folder(folder: Path, name: str, found: str, template: Path | None) -> Checkpoint:
    raw = _folder_config(folder)
    rename: Callable[[str], str | None] = str
    if raw.get("model_type") == "gemma3" and isinstance(raw.get("text_config"), dict):
        raw, rename = raw["text_config"], _gemma3_text_name
        raw.setdefault("model_type", "gemma3_text")
    _check_architecture(raw.get("model_type"), folder / "config.json")
    if raw.get("quantization_config"):
        raise ExportError(
            f"{folder} holds weights that are already quantized (quantization_config in "
            f"config.json); use the original checkpoint, attune quantizes by itself."
        )
    config = _config(raw, folder / "config.json")
    state = SafetensorsState(weight_files(folder), rename)
    settle_redundant(config, state, folder)
    tokenizer = json_tokenizer(folder)
    named = {"its tokenizer": tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        named["generation_config.json"] = generation.get("eos_token_id")
    named["config.json"] = config.eos_token_id
    stops = end_ids(named, config.vocab_size, str(folder))
    chosen = settle_template(tokenizer, template, config.vocab_size, str(folder))
    source = _source(found, state.files)
    origin = _template_origin(template, folder)
    return Checkpoint(name, config, state, tokenizer, chosen, origin, stops, source)


def _from_gguf(path: Path, template: Path | None) -> Checkpoint:
    file = read_gguf(path)
    architecture_of(file)
    try:
        config = read_config(file)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ExportError(f"{path} describes an impossible model: {_line(error)}.") from None
    config._attn_implementation = "eager"
    state = GGUFState(file, config)
    tokenizer = gguf_tokenizer(file)
    eot = "tokenizer.ggml.eot_token_id"
    named = {
        "its tokenizer": tokenizer.eos_token_id,
        "its metadata": config.eos_token_id,
        eot: file.metadata.get(eot),
    }
    stops = end_ids(named, config.vocab_size, str(path))
    chosen = settle_template(tokenizer, template, config.vocab_size, str(path))
    source = _source(path.name, (path,))
    origin = _template_origin(template, path)
    return Checkpoint(model_name(path), config, state, tokenizer, chosen, origin, stops, source)


def _template_origin(given: Path | None, where: Path) -> str:
    return str(given) if given else f"the chat template of {where}"


def _folder_config(folder: Path) -> dict:
    path = folder / "config.json"
    if path.is_file():
        return read_json(path)
    if (folder / "adapter_config.json").is_file():
        raise ExportError(
            f"{folder} is a PEFT adapter, not a model: give the model it was trained on, and this "
            f"folder as --adapter."
        )
    if ggufs := sorted(p.name for p in folder.glob("*.gguf")):
        raise ExportError(
            f"{folder} has no config.json but GGUF files ({', '.join(ggufs[:3])}); name the file "
            f"itself, such as {folder / ggufs[0]}."
        )
    raise ExportError(
        f"{folder} has no config.json; expected a model folder as save_pretrained of transformers "
        f"writes it."
    )


def _check_architecture(model_type: object, where: Path) -> None:
    if model_type not in ARCHITECTURES:
        raise ExportError(
            f"{where}: architecture '{model_type}' is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}."
        )


def _config(raw: dict, where: Path) -> PreTrainedConfig:
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        # Configs check their own fields, and raise what comes to hand where one is malformed.
        raise ExportError(f"{where} has a value that cannot be used: {_line(error)}.") from None
    for name in _SIZES:
        size = getattr(config, name, None)
        if size is not None and not (isinstance(size, int) and size > 0):
            raise ExportError(f"{where}: {name} is {size}; expected a positive integer.")
    config._attn_implementation = "eager"
    return config


def _gemma3_text_name(stored: str) -> str | None:
    """Names in a multimodal Gemma 3 checkpoint, old and new, as its text model has them."""
    for prefix, name in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ):
        if stored.startswith(prefix):
            return name + stored.removeprefix(prefix)
    other = ("vision_tower.", "multi_modal_projector.")
    return None if stored.removeprefix("model.").startswith(other) else stored


def _source(name: str, files: tuple[Path, ...]) -> str:
    kind = "GGUF" if files[0].suffix.lower() == ".gguf" else "safetensors"
    sums = []
    for path in files:
        with path.open("rb") as file:
            sums.append(f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}")
    return f"{name} ({kind}): {', '.join(sums)}"


def _line(error: Exception) -> str:
    """The message of another library's exception on one line, without its final stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".")
