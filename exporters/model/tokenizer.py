"""The tokenizer and chat template of a checkpoint, as the phone will use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from exporters.errors import ExportError
from exporters.model.gguf_file import GGUFFile
from exporters.model.lfs import refuse_pointer
from exporters.model.safetensors_state import read_json

# Byte-level kinds that transformers splits like GPT-2. SmolLM's also splits digits apart, which
# changes nothing since its vocabulary has no token of two digits.
_LIKE_GPT2 = {None, "default", "gpt-2", "smollm"}


def json_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder's tokenizer.json, which the phone reads as it is.

    Read by the class that takes that file literally, not by a model's own class, which may rebuild
    it from its parts. Raises ``ExportError`` if the file is missing or broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError(
            f"{folder} has no tokenizer.json, which the phone needs; write one with "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})."
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    refuse_pointer(folder / "chat_template.jinja")
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:
        # The tokenizers library raises a bare Exception; a more specific one is not its own.
        if type(error) is not Exception:
            raise
        raise ExportError(
            f"{path} cannot be read as a tokenizer ({error}); download or write it again."
        ) from None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ExportError(
            f"{folder / 'tokenizer_config.json'} does not fit its tokenizer.json: {error}."
        ) from None
    return cast(PreTrainedTokenizerFast, tokenizer)


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file describes, built by transformers; ``ExportError`` if the file
    has none, or one that transformers would build differently from llama.cpp."""
    vocab = _checked_vocab(file)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name, local_files_only=True
        )
    except (KeyError, IndexError, OSError, TypeError, ValueError) as error:
        raise ExportError(f"{file.path}: its tokenizer cannot be built: {error}.") from None
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library, as above
            raise
        raise ExportError(f"{file.path}: its tokenizer cannot be built: {error}.") from None
    built = tokenizer.get_vocab()
    lost = {vocab[i] for i in set(range(len(vocab))) - set(built.values())}
    lost |= {token for token in _whole_tokens(file, vocab) if token not in built}
    if lost:
        raise ExportError(
            f"{file.path}: {len(lost)} of its {len(vocab)} tokens are lost when transformers "
            f"builds its tokenizer (such as {min(lost)!r}); use the model's safetensors checkpoint."
        )
    return _as_the_file_says(file, cast(PreTrainedTokenizerFast, tokenizer), len(vocab))


def _whole_tokens(file: GGUFFile, vocab: list[str]) -> list[str]:
    """Tokens that are matched as they are written; the others may be spelled in bytes."""
    types = file.metadata.get("tokenizer.ggml.token_type")
    whole = {3, 4} if file.metadata["tokenizer.ggml.model"] == "gpt2" else {3}  # control, user's
    given = types if isinstance(types, list) else []
    return [token for token, kind in zip(vocab, given, strict=False) if kind in whole]


def _as_the_file_says(
    file: GGUFFile, tokenizer: PreTrainedTokenizerFast, size: int
) -> PreTrainedTokenizerFast:
    """Without what transformers adds of its own: GPT-2's <|endoftext|> to every byte-level
    vocabulary, with an id past the model's embedding; and a space before the first word where the
    file says that there is none. Raises ``ExportError`` where it says that there is one, and
    transformers knows none."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    made = parts | {"added_tokens": [t for t in parts["added_tokens"] if t["id"] < size]}
    if file.metadata["tokenizer.ggml.model"] == "llama":  # llama.cpp asks it of no other kind
        prefixed = file.metadata.get("tokenizer.ggml.add_space_prefix")
        plain = _without_prefix(made)
        if prefixed is False:
            made = plain
        elif prefixed and plain == made:
            raise ExportError(
                f"{file.path}: tokenizer.ggml.add_space_prefix is true, but transformers builds "
                f"this kind of tokenizer without; use the model's safetensors checkpoint."
            )
    if made == parts:
        return tokenizer
    backend = Tokenizer.from_str(json.dumps(made))
    known = backend.get_vocab()
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: getattr(tokenizer, name) for name in names}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        **{name: token for name, token in special.items() if token in known},
    )


def _without_prefix(parts: dict) -> dict:
    """The parts of a tokenizer.json of SentencePiece's kind, without the space that is put before
    a text and taken away again when it is decoded."""

    def plain(part: dict | None) -> dict | None:
        if part is None or part["type"] == "Prepend" or _strips_first(part):
            return None
        if part["type"] == "Metaspace":
            return part | {"prepend_scheme": "never"}
        if part["type"] != "Sequence":
            return part
        (key,) = part.keys() - {"type"}
        return part | {key: [step for step in map(plain, part[key]) if step is not None]}

    names = ("normalizer", "pre_tokenizer", "decoder")
    return parts | {name: plain(parts[name]) for name in names}


def _strips_first(part: dict) -> bool:
    return part["type"] == "Strip" and part.get("content") == " " and part.get("start") == 1


def _checked_vocab(file: GGUFFile) -> list[str]:
    meta = file.metadata
    kind, vocab = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(vocab, list) or not vocab:
        raise ExportError(
            f"{file.path} has a tokenizer of kind '{kind or 'none'}'; expected byte-level BPE "
            f"('gpt2') or SentencePiece ('llama') with its tokens."
        )
    pre = meta.get("tokenizer.ggml.pre")
    if kind == "gpt2" and pre not in _LIKE_GPT2 and pre not in GGUF_PRE_TOKENIZER_SPLITS:
        raise ExportError(
            f"{file.path}: transformers does not know how a '{pre}' tokenizer splits text; use the "
            f"model's safetensors checkpoint."
        )
    prefixed = meta.get("tokenizer.ggml.add_space_prefix", True)
    if not isinstance(prefixed, bool):
        raise ExportError(
            f"{file.path}: tokenizer.ggml.add_space_prefix is {prefixed!r}, expected true or false."
        )
    needed = "merges" if kind == "gpt2" else "scores"
    if not isinstance(meta.get(f"tokenizer.ggml.{needed}"), list):
        raise ExportError(f"{file.path} has no tokenizer.ggml.{needed}; its tokenizer needs them.")
    for name in ("bos", "eos", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = meta.get(key)
        if value is not None and not (isinstance(value, int) and 0 <= value < len(vocab)):
            raise ExportError(
                f"{file.path}: {key} is {value}, but its vocabulary has {len(vocab)} tokens."
            )
    return vocab


def settle_template(
    tokenizer: PreTrainedTokenizerFast, given: Path | None, vocab: int, where: str
) -> str:
    """The chat template to use: the file given, else the tokenizer's own. The tokenizer keeps it.

    Raises ``ExportError`` if there is none, or the tokenizer has tokens beyond the model's
    ``vocab``; whether the template can be rendered, whoever compiles it finds out.
    """
    template = _read_template(given) if given else tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ExportError(
                f"{where} has the chat templates {', '.join(sorted(template))} and no default: "
                f"write the one to use into a file, and give that with --chat-template FILE."
            )
        template = template["default"]
    if not template:
        raise ExportError(f"{where} has no chat template; give one with --chat-template FILE.")
    tokenizer.chat_template = template
    if tokenizer.vocab_size > vocab:
        raise ExportError(
            f"the tokenizer of {where} has tokens up to {tokenizer.vocab_size - 1}, but the "
            f"model's vocabulary ends at {vocab - 1}: they are not of one model."
        )
    return str(template)


def _read_template(path: Path) -> str:
    refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ExportError(f"{path} is not UTF-8 text; expected a Jinja chat template.") from None
    except OSError as error:
        raise ExportError(f"the chat template {path} cannot be read: {error.strerror}.") from None
