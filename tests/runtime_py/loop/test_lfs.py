"""Git LFS pointers in place of what a host reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime_py.bundle.adapter_forms import load_adapter
from runtime_py.bundle.bundle import open_bundle
from runtime_py.loop.errors import AdapterError, BundleError, LoopError
from runtime_py.loop.raw_lines import raw_lines

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def test_a_pointer_is_named_as_one(tmp_path: Path) -> None:
    for name in ("said.jsonl", "v1.ptd"):
        (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(LoopError, match=r"said.jsonl is a Git LFS pointer, .* 'git lfs pull'"):
        list(raw_lines(tmp_path / "said.jsonl"))
    with pytest.raises(AdapterError, match=r"v1.ptd is a Git LFS pointer, .* 'git lfs pull'"):
        load_adapter(tmp_path / "v1.ptd")


def test_all_pointers_of_a_bundle_are_named(tmp_path: Path) -> None:
    (tmp_path / "android").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "android" / "lm.pte").write_bytes(POINTER)
    (tmp_path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(BundleError, match=r"lm.pte, .*tokenizer.json are Git LFS pointers"):
        open_bundle(tmp_path)


def test_what_only_speaks_of_pointers_is_none(tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    path.write_bytes(b'{"text": "version https://git-lfs.github.com/spec/v1"}\n')
    assert [number for number, _ in raw_lines(path)] == [1]
