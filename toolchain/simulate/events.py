"""What the phone's process reports while it lives: frozen records, each one line of JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from runtime_py.loop.errors import LoopError
from runtime_py.loop.fine_tune_report import State


class _Event:
    """Unknown fields and values of another type are errors."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class LimitsSet(_Event):
    """The first event. ``resident``: bytes that Python took before."""

    resident: int
    cores: int
    event: Literal["limited"] = "limited"


@dataclass(frozen=True)
class AppOpened(_Event):
    """``place``: dialogues that the store had observed already."""

    place: int
    event: Literal["awake"] = "awake"


@dataclass(frozen=True)
class DialogueObserved(_Event):
    """Seconds measured here, of the call and of the embedding within it; ``tokens`` embedded;
    ``modelled_s``: of the device."""

    place: int
    observe_s: float
    embed_s: float
    tokens: int
    modelled_s: float
    event: Literal["dialogue"] = "dialogue"


@dataclass(frozen=True)
class ReplyProbed(_Event):
    """ROUGE-1 of the model's own reply with the stream's."""

    place: int
    rouge1: float
    event: Literal["probe"] = "probe"


@dataclass(frozen=True)
class NightBegun(_Event):
    """``day`` counts from 0."""

    place: int
    day: int
    event: Literal["night"] = "night"


@dataclass(frozen=True)
class StepTrained(_Event):
    """``tokens``: the length of the programs in use."""

    step: int
    tokens: int
    event: Literal["step"] = "step"


@dataclass(frozen=True)
class NightEnded(_Event):
    """How fine-tuning ended, with ``losses`` of ``job`` where a run ended. Modelled seconds of
    work, and with its pauses; ``storage`` in bytes; ``domains``: sets of each in the buffer."""

    place: int
    day: int
    state: State
    job: int | None
    losses: tuple[float, ...]
    work_s: float
    wall_s: float
    storage: int
    domains: dict[str, int]
    event: Literal["morning"] = "morning"


@dataclass(frozen=True)
class DiskFilled(_Event):
    """Others fill the disk, and a change waits for room."""

    event: Literal["full"] = "full"


@dataclass(frozen=True)
class DiskFreed(_Event):
    """The change that waited was made."""

    event: Literal["freed"] = "freed"


@dataclass(frozen=True)
class PhoneFailed(_Event):
    """The last event of a process that cannot go on; ``why`` is a sentence."""

    why: str
    event: Literal["error"] = "error"


@dataclass(frozen=True)
class StreamEnded(_Event):
    """The last event of a run that is whole."""

    event: Literal["done"] = "done"


PhoneEvent = (
    LimitsSet
    | AppOpened
    | DialogueObserved
    | ReplyProbed
    | NightBegun
    | StepTrained
    | NightEnded
    | DiskFilled
    | DiskFreed
    | PhoneFailed
    | StreamEnded
)
_ADAPTER: TypeAdapter[PhoneEvent] = TypeAdapter(
    Annotated[PhoneEvent, Field(discriminator="event")],
    config=ConfigDict(ser_json_inf_nan="constants"),  # what diverged is not finite
)


def to_line(event: PhoneEvent) -> bytes:
    """JSON in UTF-8, with the end of the line."""
    return _ADAPTER.dump_json(event) + b"\n"


def from_line(line: bytes) -> PhoneEvent:
    """Raises ``LoopError`` for an event that is not known, or has other fields."""
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}" for e in error.errors())
        raise LoopError(
            f"the phone's process reported {line[:200]!r}, which is no event ({wrong.strip()}): "
            f"both processes must run the same attune."
        ) from None
