"""What the training programs are tried on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime_py.engine.examples import IGNORED
from tests.runtime_py.engine.toy import chat_text
from toolchain.verify.parity.cases import examples


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    ("lengths", "context"), [((8,), 16), ((48,), 96), ((256, 512), 512), ((64, 16), 2048)]
)
def test_the_programs_of_every_length_are_filled(
    tmp_path: Path, lengths: tuple[int, ...], context: int, quick: bool
) -> None:
    """And every example has something to learn, however short the programs are."""
    model = SimpleNamespace(context=context)
    bundle: Any = SimpleNamespace(
        training=SimpleNamespace(lengths=lengths), manifest=SimpleNamespace(model=model)
    )
    found = examples(bundle, chat_text(tmp_path), quick)
    for example in found:
        assert (example.labels != IGNORED).any()
        assert 1 <= example.inputs <= max(lengths)
        assert len(example.tokens) <= context
        kept = example.labels != IGNORED
        assert (example.labels[kept] == example.tokens[kept]).all()
    ascending = sorted(lengths)
    for shorter, length in zip([0, *ascending], ascending, strict=False):
        assert any(shorter < e.inputs <= length for e in found), f"none needs those of {length}"
    assert quick == (len(found) == len(lengths))
