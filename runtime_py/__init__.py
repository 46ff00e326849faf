"""What runs on the phone, as Python: a bundle, the loop that personalizes it, and its engine.

The names below are all that an application needs. Each is loaded when it is first used, so that
who only needs the loop imports neither PyTorch nor ExecuTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime_py.bundle.adapter_forms import load_adapter as load_adapter
    from runtime_py.bundle.bundle import Bundle as Bundle
    from runtime_py.bundle.bundle import open_bundle as open_bundle
    from runtime_py.bundle.chat_text import ChatText as ChatText
    from runtime_py.bundle.peft_adapter import PeftAdapter as PeftAdapter
    from runtime_py.engine.phone_engine import PhoneEngine as PhoneEngine
    from runtime_py.engine.self_test import self_test as self_test
    from runtime_py.engine.streamed_tuner import StreamedFineTuner as StreamedFineTuner
    from runtime_py.loop.annotation import Question as Question
    from runtime_py.loop.dialogue import Dialogue as Dialogue
    from runtime_py.loop.dialogue import Turn as Turn
    from runtime_py.loop.errors import AttuneError as AttuneError
    from runtime_py.loop.fine_tune_report import FineTuneReport as FineTuneReport
    from runtime_py.loop.lexicons import Lexicons as Lexicons
    from runtime_py.loop.lexicons import read_lexicons as read_lexicons
    from runtime_py.loop.log import Decision as Decision
    from runtime_py.loop.personalizer import Personalizer as Personalizer
    from runtime_py.loop.policy import LoopPolicy as LoopPolicy
    from runtime_py.loop.schedule import Conditions as Conditions
    from runtime_py.loop.schedule import Moment as Moment
    from runtime_py.loop.status import Status as Status
    from runtime_py.loop.stream import read_stream as read_stream

_MODULES = {
    "bundle.adapter_forms": ("load_adapter",),
    "bundle.bundle": ("Bundle", "open_bundle"),
    "bundle.chat_text": ("ChatText",),
    "bundle.peft_adapter": ("PeftAdapter",),
    "engine.phone_engine": ("PhoneEngine",),
    "engine.self_test": ("self_test",),
    "engine.streamed_tuner": ("StreamedFineTuner",),
    "loop.annotation": ("Question",),
    "loop.dialogue": ("Dialogue", "Turn"),
    "loop.errors": ("AttuneError",),
    "loop.fine_tune_report": ("FineTuneReport",),
    "loop.lexicons": ("Lexicons", "read_lexicons"),
    "loop.log": ("Decision",),
    "loop.personalizer": ("Personalizer",),
    "loop.policy": ("LoopPolicy",),
    "loop.schedule": ("Conditions", "Moment"),
    "loop.status": ("Status",),
    "loop.stream": ("read_stream",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    """A public name, from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
