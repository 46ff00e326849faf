"""The tokenizer of a GGUF file, against what its keys say."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from transformers import LlamaTokenizer

from exporters.errors import ExportError
from exporters.model.gguf_file import read_gguf
from exporters.model.tokenizer import gguf_tokenizer

BAR = "\u2581"
# Pieces of SentencePiece's kind, with merges that build "▁a", "ab" and "▁ab".
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES += [BAR, "a", "b", f"{BAR}a", "ab", f"{BAR}ab"]
KINDS = [2, 3, 3, *[6] * 256, *[1] * 6]  # unknown, control, bytes, normal


def sentencepiece(path: Path, prefix: object, architecture: str = "llama") -> Path:
    """A file with nothing but a tokenizer; ``prefix``: add_space_prefix, None for no such key."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_types(KINDS)
    writer.add_token_scores([0.0] * 259 + [-10.0, -11.0, -12.0, -3.0, -2.0, -1.0])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if isinstance(prefix, bool):
        writer.add_add_space_prefix(prefix)
    elif isinstance(prefix, int):
        writer.add_uint32("tokenizer.ggml.add_space_prefix", prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens(path: Path, text: str) -> list[str]:
    tokenizer = gguf_tokenizer(read_gguf(path))
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("architecture", ["llama", "phi3"])  # Metaspace, and a normalizer
@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (None, [f"{BAR}ab", f"{BAR}a"]),
        (True, [f"{BAR}ab", f"{BAR}a"]),
        (False, ["ab", f"{BAR}a"]),
    ],
)
def test_a_gguf_decides_about_the_space_before_the_first_word(
    tmp_path: Path, architecture: str, prefix: object, expected: list[str]
) -> None:
    path = sentencepiece(tmp_path / "m.gguf", prefix, architecture)
    assert tokens(path, "ab a") == expected
    tokenizer = gguf_tokenizer(read_gguf(path))
    ids = tokenizer.encode("ab a", add_special_tokens=False)
    assert tokenizer.backend_tokenizer.decode(ids) == "ab a"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<s>", "</s>", "<unk>",
    )  # fmt: skip


def test_without_the_space_it_is_the_tokenizer_that_transformers_makes_so(tmp_path: Path) -> None:
    built = gguf_tokenizer(read_gguf(sentencepiece(tmp_path / "m.gguf", False)))
    parts = built.backend_tokenizer.model
    theirs = LlamaTokenizer(
        vocab={piece: number for number, piece in enumerate(PIECES)},
        merges=[(BAR, "ab"), ("a", "b"), (BAR, "a"), (f"{BAR}a", "b")],
        add_prefix_space=False,
    )
    assert type(parts) is type(theirs.backend_tokenizer.model)
    for text in ("ab", " ab", "  a", "ab</s> ab", "b a ab", "é ab"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert built.encode(text, add_special_tokens=False) == ids
        assert built.backend_tokenizer.decode(ids) == theirs.backend_tokenizer.decode(ids)


def test_a_gguf_flag_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="add_space_prefix is 0, expected true or false"):
        gguf_tokenizer(read_gguf(sentencepiece(tmp_path / "m.gguf", 0)))
    # transformers' Gemma puts no space before a text, whatever the file says.
    path = sentencepiece(tmp_path / "g.gguf", True, "gemma2")
    with pytest.raises(ExportError, match="add_space_prefix is true, but transformers builds"):
        gguf_tokenizer(read_gguf(path))
    assert tokens(sentencepiece(tmp_path / "n.gguf", False, "gemma2"), "ab") == ["ab"]
