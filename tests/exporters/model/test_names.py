"""What a model is called, by where it lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters.model.names import model_name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
        ("Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
        ("a/phi-3.5/", "phi-3.5"),
        ("a/phi-3.5/.", "phi-3.5"),
        (".", "v0.1"),
        ("..", "Model-1.5"),
        ("../v0.2/..", "Model-1.5"),
        ("m.Q4_K_M.gguf", "m.Q4_K_M"),
        ("m-1.5.GGUF", "m-1.5"),
        ("folder.gguf", "folder.gguf"),  # a folder
    ],
)
def test_the_last_part_is_kept_whole(
    given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "Model-1.5" / "v0.1"
    (here / "folder.gguf").mkdir(parents=True)
    (here.parent / "v0.2").mkdir()
    monkeypatch.chdir(here)
    assert model_name(Path(given)) == expected
