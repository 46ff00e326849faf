"""How many usable pairs of paraphrases a bundle's model writes, form by form."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.phone_engine import LmCall, PhoneEngine
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.policy import LoopPolicy
from toolchain.compile.paraphrase_forms import FORMS, count_pairs, find_form, form_of


@dataclass(frozen=True)
class FormYield:
    """Of one form: ``usable`` pairs of ``dialogues``, one attempt each; ``decoded``: tokens that
    the model wrote for them."""

    form: str
    dialogues: int
    usable: int
    decoded: int
    seconds: float

    @property
    def share(self) -> float:
        return self.usable / self.dialogues

    def as_json(self) -> dict:
        """For ``--json``: every field, and ``yield``."""
        return asdict(self) | {"yield": self.share}


def forms_of(loop: LoopPolicy, names: Sequence[str]) -> dict[str, LoopPolicy]:
    """The policy with each form of ``names``, by name; without names with its own alone, "all" is
    every known one. Raises ``LoopError`` for a name that is not known."""
    if not names:
        return {form_of(loop): loop}
    known = [form.name for form in FORMS]
    wanted = [one for name in names for one in (known if name == "all" else [name])]
    return {name: find_form(name).within(loop) for name in wanted}


def bench_synthesis(
    bundle: Bundle,
    dialogues: Sequence[Dialogue],
    forms: Sequence[str] = (),
    *,
    adapter: Path | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda form: None,
) -> list[FormYield]:
    """Asks the bundle's program, with ``adapter`` (a .ptd) or the bundle's own, by each of
    ``forms`` (see ``forms_of``), with what else the bundle's policy says."""
    loop = LoopPolicy.from_fields(dict(bundle.manifest.policy.loop))
    decoded = 0

    def count(call: LmCall) -> None:
        nonlocal decoded
        decoded += call.tokens if call.kind == "decode" else 0

    engine = PhoneEngine(bundle, threads, on_call=count)
    if adapter is not None:
        engine.use_adapter(adapter)
    rows = []
    for name, policy in forms_of(loop, forms).items():
        progress(name)
        decoded, since = 0, time.monotonic()
        usable = count_pairs(dialogues, engine, policy)
        rows.append(FormYield(name, len(dialogues), usable, decoded, time.monotonic() - since))
    return rows
