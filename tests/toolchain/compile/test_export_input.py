"""What an export reads: names, and numbers that float16 loses."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime_py.bundle.manifest import Policy
from runtime_py.loop.errors import AdapterError
from tests import tiny
from toolchain.compile.export_input import AdapterRequest, read_input


def test_what_is_given_of_a_fresh_adapter_is_taken(tmp_path: Path) -> None:
    folder = str(tiny.save_checkpoint(tmp_path / "m"))
    usual = read_input(folder, AdapterRequest(), None, None).adapter
    assert (usual.rank, usual.alpha) == (Policy().lora_rank, Policy().lora_alpha) == (8, 16.0)
    asked = read_input(folder, AdapterRequest(None, 2, 0.5, ("o_proj",)), None, None).adapter
    assert (asked.rank, asked.alpha, asked.scaling("any")) == (2, 0.5, 0.25)
    assert asked.config["target_modules"] == ["o_proj"]
    with pytest.raises(AdapterError, match="r is 0; a rank is an integer of at least 1"):
        read_input(folder, AdapterRequest(rank=0), None, None)


@pytest.mark.parametrize("given", ["../Qwen2.5-0.5B-Instruct", "."])
def test_a_models_name_is_whole(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save_checkpoint(tmp_path / "Qwen2.5-0.5B-Instruct", "qwen2")
    monkeypatch.chdir(folder)
    read = read_input(given, AdapterRequest(), None, None)
    assert read.name == "Qwen2.5-0.5B-Instruct"
    assert read.adapter.config["base_model_name_or_path"] == "Qwen2.5-0.5B-Instruct"
    assert read.checkpoint.source.startswith("Qwen2.5-0.5B-Instruct (safetensors): ")
