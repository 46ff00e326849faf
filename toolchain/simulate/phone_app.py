"""An app around a bundle: its programs and the loop on them, put together in this one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.phone_engine import LmCall, PhoneEngine
from runtime_py.engine.streamed_tuner import StreamedFineTuner, TrainingCall
from runtime_py.loop.acknowledgements import BUILTIN as ACKNOWLEDGEMENTS
from runtime_py.loop.acknowledgements import read_acknowledgements
from runtime_py.loop.lexicons import BUILTIN, Lexicons, read_lexicons
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Engine, FineTuner
from runtime_py.loop.schedule import Moment


@dataclass(frozen=True, eq=False)
class LoopPrograms:
    """A bundle's language model and its training programs. Before a training the model's memory
    is given back."""

    engine: PhoneEngine
    tuner: StreamedFineTuner


def _ignore(call: LmCall | TrainingCall) -> None:
    pass


def _unlimited() -> float:
    return math.inf


def load_programs(
    bundle: Bundle,
    *,
    threads: int | None = None,
    lean: bool = False,
    on_lm_call: Callable[[LmCall], None] = _ignore,
    on_training_call: Callable[[TrainingCall], None] = _ignore,
    available_mb: Callable[[], float] = _unlimited,
) -> LoopPrograms:
    """``on_lm_call`` and ``on_training_call`` get every call of a program, after it;
    ``available_mb`` is what the process may still take. ``lean``: see ``PhoneEngine``."""
    engine = PhoneEngine(bundle, threads, on_lm_call, lean=lean)
    tuner = StreamedFineTuner(
        bundle,
        engine.text,
        threads=threads,
        before=engine.release,
        available_mb=available_mb,
        on_call=on_training_call,
    )
    return LoopPrograms(engine, tuner)


def open_loop(
    bundle: Bundle,
    folder: Path,
    policy: LoopPolicy,
    *,
    lexicons: Path | None,
    engine: Engine,
    tuner: FineTuner,
    clock: Callable[[], Moment],
) -> Personalizer:
    """The loop with a bundle's adapter, its store in ``folder``. ``lexicons``: a folder in place
    of the bundle's. Close it."""
    return Personalizer(
        folder=folder,
        policy=policy,
        lexicons=bundle_lexicons(bundle, lexicons),
        engine=engine,
        tuner=tuner,
        clock=clock,
        bundle=bundle,
        acknowledgements=read_acknowledgements(bundle.acknowledgements or ACKNOWLEDGEMENTS),
        mean=bundle.mean_vector,
    )


def bundle_lexicons(bundle: Bundle, instead: Path | None) -> Lexicons:
    """Those of the folder ``instead``; else the bundle's, or attune's where it has none."""
    if instead is None:
        instead = bundle.path / "lexicons" if bundle.manifest.policy.lexicons else BUILTIN
    return read_lexicons(instead)
