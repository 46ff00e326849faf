"""What is said of a bundle's paraphrases."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters.model.spec import read_spec
from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.manifest import MeasuredForm, Policy, Synthesis
from tests.tiny import config_of, paper_bundle
from toolchain.cli.inspect import paraphrases


@pytest.mark.parametrize(
    ("usable", "written", "said"),
    [
        ((), 3, "as the policy file has them, not tried"),
        ((7, 4), 3, "the form first (usable pairs: first 7 of 10, second 4 of 10)"),
        ((0, 0), 0, "off, for no form gave 5% (usable pairs: first 0 of 10, "
         "second 0 of 10)"),
        ((7, 4), 0, "off, as the policy says; with them on, the form first (usable pairs: "
         "first 7 of 10, second 4 of 10)"),
    ],
)  # fmt: skip
def test_paraphrases(tmp_path: Path, usable: tuple[int, ...], written: int, said: str) -> None:
    folder = paper_bundle(tmp_path, read_spec(config_of("llama"), 48), ["q_proj"], 2)
    manifest = open_bundle(folder).manifest
    rows = tuple(
        MeasuredForm(form=name, tried=10, usable=count)
        for name, count in zip(("first", "second"), usable, strict=False)
    )
    synthesis = Synthesis(form="first", chosen_by="yield" if rows else "default", measured=rows)
    policy = Policy(loop={"paraphrases": written}, synthesis=synthesis)
    assert paraphrases(manifest.model_copy(update={"policy": policy})) == said
