"""``attune simulate`` as functions: a bundle, a stream and a device in, an outcome out."""

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
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.presets import PRESETS, preset
from runtime_py.loop.stream import CONVERT, in_one, read_stream
from toolchain.compile.policy_file import check_names
from toolchain.simulate.device import Device, find_device, host_cores
from toolchain.simulate.estimate import Estimate, check_fits, estimate
from toolchain.simulate.events import PhoneEvent
from toolchain.simulate.faults import Fault, draw
from toolchain.simulate.life_plan import STATE, LifePlan
from toolchain.simulate.limits import check_system
from toolchain.simulate.outcome import SimulationOutcome, StreamScan
from toolchain.simulate.outcome_reader import read_outcome
from toolchain.simulate.phone_app import bundle_lexicons
from toolchain.simulate.unseen import Tests, last_adapter, measure_unseen, read_tests
from toolchain.simulate.watcher import Watcher


@dataclass(frozen=True)
class Simulation:
    """Checked, before anything runs."""

    bundle: Bundle
    stream: StreamScan
    estimate: Estimate
    plan: LifePlan
    faults: tuple[Fault, ...]
    tests: Tests | None = None


def prepare(
    *,
    bundle: Path,
    stream: Path,
    device: str,
    out: Path,
    lexicons: Path | None = None,
    policy: str | Path | None = None,
    answer_rate: float = 1.0,
    dialogues_a_day: int | None = None,
    model_replies: bool = False,
    limit: int | None = None,
    probes: int = 40,
    kills: int = 0,
    full_disk: bool = False,
    low_memory: bool = False,
    seed: int = 0,
    tests: Path | None = None,
) -> Simulation:
    """Checks what ``attune simulate`` was asked for; its ``--help`` has the meanings. ``out`` is
    the folder that the run will write.

    Raises ``LoopError`` or ``BundleError`` for what cannot be run.
    """
    check_system()
    if not 0.0 <= answer_rate <= 1.0:
        raise LoopError(f"--answer-rate is {answer_rate:g}; expected 0 to 1.")
    if (out / STATE).exists():
        raise LoopError(f"{out} holds a run already: choose another --out, or remove it.")
    opened = open_bundle(bundle)
    phone = _with_rhythm(find_device(device), dialogues_a_day)
    loop = read_policy(opened.manifest, policy)
    bundle_lexicons(opened, lexicons)  # sound, or refused here
    scanned = scan(stream, limit)
    places = len(scanned.blocks)
    expected = estimate(opened, loop, places)
    check_fits(phone, expected, opened.manifest)
    plan = LifePlan(
        bundle=bundle.resolve(),
        stream=stream.resolve(),
        folder=out.resolve(),
        device=phone,
        policy=loop,
        lexicons=None if lexicons is None else lexicons.resolve(),
        places=places,
        answer_rate=answer_rate,
        seed=seed,
        probes=min(probes, places),
        model_replies=model_replies,
        threads=min(phone.compute.cores, host_cores()),
        lean=expected.must_be_lean(phone.memory.app_mb),
    )
    faults = draw(kills, full_disk, low_memory, places, seed)
    unseen = None if tests is None else read_tests(tests, plan, opened)
    return Simulation(opened, scanned, expected, plan, tuple(faults), unseen)


def simulate(
    simulation: Simulation,
    on_event: Callable[[PhoneEvent], None],
    on_test: Callable[[int], None] = lambda done: None,
) -> SimulationOutcome:
    """Runs the loop. ``on_event`` gets every event of the phone; ``on_test`` how many of the tests
    are scored, when the life is over."""
    plan, bundle = simulation.plan, simulation.bundle
    plan.state.mkdir(parents=True)
    needs = {length: training_bytes(bundle, length) for length in bundle.training.lengths}
    record = Watcher(plan, simulation.faults, needs, on_event).run()
    outcome = read_outcome(bundle.manifest, simulation.stream, simulation.estimate, plan, record)
    if simulation.tests is None or record.ended:
        return outcome
    adapter = last_adapter(bundle, plan.state)
    unseen = measure_unseen(bundle, adapter, simulation.tests, plan.threads, on_test)
    return replace(outcome, unseen=unseen)


def _with_rhythm(device: Device, dialogues_a_day: int | None) -> Device:
    if dialogues_a_day is None:
        return device
    return replace(device, rhythm=replace(device.rhythm, dialogues=dialogues_a_day))


def read_policy(manifest: Manifest, chosen: str | Path | None) -> LoopPolicy:
    """The bundle's policy, with the fields of a preset, or of a JSON file, in place of its own.
    Raises ``LoopError``, for an unknown kind of selection too."""
    fields: dict[str, Any] = dict(manifest.policy.loop)
    if isinstance(chosen, str) and chosen in PRESETS:
        fields = asdict(preset(chosen))
    elif chosen is not None:
        fields |= _fields_of(Path(chosen))
    policy = LoopPolicy.from_fields(fields)
    check_names(policy)
    return policy


def _fields_of(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        LoopPolicy.from_json(text)
    except FileNotFoundError:
        raise LoopError(
            f"there is no policy {file}; expected a JSON file, or a preset: "
            f"{', '.join(sorted(PRESETS))}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LoopError(f"the policy {file} cannot be read: {error}.") from None
    except LoopError as error:
        raise LoopError(f"{file}: {error}") from None
    fields: dict[str, Any] = json.loads(text)
    return fields


def scan(path: Path, limit: int | None) -> StreamScan:
    """Reads a stream once. Its bad lines are left out, and named; one good one is needed."""
    bad: list[str] = []
    blocks: list[str] = []
    for record in read_stream(path, lambda error: bad.append(str(error))):
        if limit is not None and len(blocks) == limit:
            break
        block = record.extra.get("block", record.extra.get("dataset", ""))
        blocks.append(str(block))
    if not blocks:
        why = f": {in_one(path, bad)}" if bad else f".{CONVERT}"
        raise LoopError(f"{path} has no dialogue that can be used{why}")
    return StreamScan(path, tuple(blocks), tuple(bad))
