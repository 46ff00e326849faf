"""``attune simulate`` as a function: a bundle, a stream and a device in, an outcome out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.manifest import Manifest
from runtime_py.engine.memory import training_bytes
from runtime_py.loop.errors import LoopError
from runtime_py.loop.lexicons import read_lexicons
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.replacement import find_policy
from runtime_py.loop.stream import read_stream
from toolchain.simulate.device import Device, find_device, host_cores
from toolchain.simulate.estimate import Estimate, check_fits, estimate
from toolchain.simulate.faults import draw
from toolchain.simulate.life import STATE, Life, lexicons_of
from toolchain.simulate.limits import check_system
from toolchain.simulate.outcome import Outcome, Stream
from toolchain.simulate.outcome_reader import gather
from toolchain.simulate.watcher import Watcher

Told = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """What a user asked for; see ``attune simulate --help``."""

    bundle: Path
    stream: Path
    device: str
    out: Path
    lexicons: Path | None = None
    policy: Path | None = None
    answer_rate: float = 1.0
    dialogues_a_day: int | None = None
    model_replies: bool = False
    limit: int | None = None
    probes: int = 40
    faults: int = 0
    full_disk: bool = False
    low_memory: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Prepared:
    """A request that was checked, before anything runs."""

    request: Request
    bundle: Bundle
    device: Device
    policy: LoopPolicy
    stream: Stream
    estimate: Estimate


def prepare(request: Request) -> Prepared:
    """Raises ``LoopError`` or ``BundleError`` for what cannot be run."""
    check_system()
    if not 0.0 <= request.answer_rate <= 1.0:
        raise LoopError(f"--answer-rate is {request.answer_rate:g}; expected 0 to 1.")
    if (request.out / STATE).exists():
        raise LoopError(f"{request.out} holds a run already: choose another --out, or remove it.")
    bundle = open_bundle(request.bundle)
    device = find_device(request.device)
    if request.dialogues_a_day is not None:
        rhythm = replace(device.rhythm, dialogues=request.dialogues_a_day)
        device = replace(device, rhythm=rhythm)
    policy = policy_of(bundle.manifest, request.policy)
    find_policy(policy.selection)
    read_lexicons(lexicons_of(bundle, _text(request.lexicons)))
    stream = scan(request.stream, request.limit)
    found = estimate(bundle, policy, len(stream.blocks))
    check_fits(device, found, bundle.manifest)
    return Prepared(request, bundle, device, policy, stream, found)


def policy_of(manifest: Manifest, file: Path | None) -> LoopPolicy:
    """The bundle's policy, with a JSON file's fields in place of its own."""
    fields = dict(manifest.policy.loop)
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
            LoopPolicy.from_json(text)
        except FileNotFoundError:
            raise LoopError(f"there is no policy {file}; expected a JSON file.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise LoopError(f"the policy {file} cannot be read: {error}.") from None
        except LoopError as error:
            raise LoopError(f"{file}: {error}") from None
        fields |= json.loads(text)
    return LoopPolicy.from_fields(fields)


def scan(path: Path, limit: int | None) -> Stream:
    """Reads a stream once. Its bad lines are left out, and named; one good one is needed."""
    bad: list[str] = []
    blocks: list[str] = []
    for record in read_stream(path, lambda error: bad.append(str(error))):
        if limit is not None and len(blocks) == limit:
            break
        block = record.extra.get("block", record.extra.get("dataset", ""))
        blocks.append(str(block))
    if not blocks:
        first = f": {bad[0]}" if bad else "."
        raise LoopError(f"{path} has no dialogue that can be used{first}")
    return Stream(path, tuple(blocks), tuple(bad))


def simulate(prepared: Prepared, told: Told) -> Outcome:
    """Runs the loop. ``told`` hears of every event of the phone."""
    request, device = prepared.request, prepared.device
    places = len(prepared.stream.blocks)
    (request.out / STATE).mkdir(parents=True)
    life = Life(
        bundle=str(request.bundle.resolve()),
        stream=str(request.stream.resolve()),
        folder=str(request.out.resolve()),
        device=str(Path(request.device).resolve())
        if request.device.endswith(".toml")
        else request.device,
        policy=asdict(prepared.policy),
        lexicons=_text(request.lexicons and request.lexicons.resolve()),
        places=places,
        dialogues_a_day=device.rhythm.dialogues,
        answer_rate=request.answer_rate,
        seed=request.seed,
        probes=min(request.probes, places),
        model_replies=request.model_replies,
        lean=prepared.estimate.must_be_lean(device.memory.app_mb),
        threads=min(device.compute.cores, host_cores()),
    )
    faults = draw(request.faults, request.full_disk, request.low_memory, places, request.seed)
    lengths = prepared.bundle.training.lengths
    needs = {length: training_bytes(prepared.bundle, length) for length in lengths}
    watched = Watcher(life, device, faults, needs, told).run()
    return gather(
        prepared.bundle.manifest, device, prepared.stream, prepared.estimate, life, watched
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
