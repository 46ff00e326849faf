"""A fleet from its options to its outcome: first every life, then every swap; resumed by user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.replacement import find_policy
from toolchain.fleet.fleet_options import FleetOptions, check_options
from toolchain.fleet.fleet_outcome import FleetOutcome, UserFailure
from toolchain.fleet.fleet_world import FleetPlace, FleetWorld
from toolchain.fleet.folder import FleetFolder, open_folder
from toolchain.fleet.swap import Swapped, SwapTask, partners_of, swap
from toolchain.fleet.user_life import (
    LifeTask,
    UserLife,
    UserLived,
    a_day,
    evenings,
    live,
    policy_of,
)
from toolchain.fleet.users import Crowd, FleetUser, make_crowd
from toolchain.simulate.device import Device, find_device
from toolchain.study.executor import Done, Failed, Work, run_in_processes
from toolchain.study.ray_executor import run_on_ray
from toolchain.study.study_run import Crew


@dataclass(frozen=True)
class Fleet:
    """Checked, before anybody lives."""

    place: FleetPlace
    phone: Device
    options: FleetOptions
    crowd: Crowd
    folder: FleetFolder


def prepare(
    place: FleetPlace, options: FleetOptions, out: Path, policy: LoopPolicy, facts: dict[str, Any]
) -> Fleet:
    """``policy``: the bundle's; ``facts``: what else results depend on, such as the hashes of
    bundle and data. Raises ``LoopError`` for what cannot be run."""
    check_options(options)
    phone = find_device(place.phone)
    per_day = a_day(phone, options.life, options.dialogues)
    due = evenings(per_day, options.life.nights, options.dialogues)
    checked = policy_of(policy, options.life, 0, due)
    find_policy(checked.selection)
    data = place.study.data
    numbers = range(options.first, options.first + options.users)
    crowd = make_crowd(
        data,
        numbers,
        options.dialogues,
        options.tests,
        options.seed,
        options.datasets,
        options.manners,
    )
    life = options.life
    configuration = {
        **facts,
        "phone": phone.name,
        "first": options.first,
        "users": options.users,
        "dialogues": options.dialogues,
        "tests": options.tests,
        "partners": options.partners,
        "seed": options.seed,
        "datasets": list(crowd.files),
        "manners": list(options.manners),
        "nights": life.nights,
        "answer_rate": life.answer_rate,
        "dialogues_a_day": life.dialogues_a_day,
        "replies": life.replies,
        "reply_tokens": life.reply_tokens,
        "policy": dict(life.policy),
    }
    return Fleet(place, phone, options, crowd, open_folder(out, configuration))


Told = Callable[[str, int, int], None]  # "lives" or "swaps", how many are done, of how many


def run(
    fleet: Fleet,
    crew: Crew,
    open_world: Callable[[FleetPlace], FleetWorld],
    told: Told = lambda phase, done, of: None,
) -> FleetOutcome:
    """What is in the folder already is not run again. ``open_world`` is a function of a module:
    workers import it."""
    failures: dict[int, UserFailure] = {}
    _live(fleet, crew, open_world, told, failures)
    _swap(fleet, crew, open_world, told, failures)
    return read_outcome(fleet, tuple(failures[number] for number in sorted(failures)))


def read_outcome(fleet: Fleet, failures: tuple[UserFailure, ...]) -> FleetOutcome:
    """Of what is in the folder of this fleet's users."""
    numbers = {user.number for user in fleet.crowd.users}
    folder = fleet.folder
    lives = {n: life for n, life in folder.lives().items() if n in numbers}
    swaps = {n: one for n, one in folder.swaps().items() if n in lives}
    seconds = {n: taken for n, taken in folder.seconds().items() if n in lives}
    order = sorted(lives)
    return FleetOutcome(
        phone=fleet.phone,
        options=fleet.options,
        small=fleet.crowd.small,
        users=tuple(user for user in fleet.crowd.users if user.number in lives),
        lives=tuple(lives[n] for n in order),
        swaps=tuple(swaps.get(n) for n in order),
        failures=failures,
        seconds=tuple(seconds[n] for n in sorted(seconds)),
    )


def _live(
    fleet: Fleet,
    crew: Crew,
    open_world: Callable[[FleetPlace], FleetWorld],
    told: Told,
    failures: dict[int, UserFailure],
) -> None:
    there, everyone = fleet.folder.lives(), fleet.crowd.users
    users = [user for user in everyone if user.number not in there]
    data, life = fleet.place.study.data, fleet.options.life
    tasks = [LifeTask(user, life, data, fleet.phone) for user in users]
    done = len(everyone) - len(users)
    told("lives", done, len(everyone))
    work: Work[FleetPlace, LifeTask, UserLived] = Work(open_world, live, fleet.place)
    for outcome in _outcomes(work, tasks, crew, fleet.place):
        fleet.folder.begin()
        if isinstance(outcome, Failed):
            _note(fleet, users[outcome.index], "life", outcome, failures)
        else:
            fleet.folder.write_life(outcome.result)
        done += 1
        told("lives", done, len(everyone))


def _swap(
    fleet: Fleet,
    crew: Crew,
    open_world: Callable[[FleetPlace], FleetWorld],
    told: Told,
    failures: dict[int, UserFailure],
) -> None:
    """Once all have lived: who has failed is nobody's partner."""
    folder, options = fleet.folder, fleet.options
    lives, there = folder.lives(), folder.swaps()
    lived = [user.number for user in fleet.crowd.users if user.number in lives]
    partners = {n: partners_of(n, lived, options.partners, options.seed) for n in lived}
    users = [
        user
        for user in fleet.crowd.users
        if user.number in partners
        and not (user.number in there and there[user.number].partners == partners[user.number])
    ]
    tasks = _SwapTasks(fleet, users, lives, partners)
    done = len(lived) - len(users)
    told("swaps", done, len(lived))
    work: Work[FleetPlace, SwapTask, Swapped] = Work(open_world, swap, fleet.place)
    for outcome in _outcomes(work, tasks, crew, fleet.place):
        if isinstance(outcome, Failed):
            _note(fleet, users[outcome.index], "swap", outcome, failures)
        else:
            folder.write_swap(outcome.result)
        done += 1
        told("swaps", done, len(lived))


class _SwapTasks(Sequence[SwapTask]):
    """Each is made when it is asked for: adapters of a whole fleet would fill the memory."""

    def __init__(
        self,
        fleet: Fleet,
        users: Sequence[FleetUser],
        lives: Mapping[int, UserLife],
        partners: Mapping[int, tuple[int, ...]],
    ) -> None:
        self._fleet, self._users, self._lives, self._partners = fleet, users, lives, partners

    def __len__(self) -> int:
        return len(self._users)

    @overload
    def __getitem__(self, place: int) -> SwapTask: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[SwapTask]: ...

    def __getitem__(self, place: int | slice) -> SwapTask | Sequence[SwapTask]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        user = self._users[place]
        adapter = self._fleet.folder.adapter
        adapters = tuple((n, adapter(self._lives[n])) for n in self._partners[user.number])
        return SwapTask(user, adapters, self._fleet.place.study.data)


def _note(
    fleet: Fleet, user: FleetUser, phase: str, failed: Failed, failures: dict[int, UserFailure]
) -> None:
    failures[user.number] = UserFailure(user.number, phase, failed.sentence)
    fleet.folder.write_failure(user.number, failed.sentence, failed.trace)


def _outcomes(
    work: Work[FleetPlace, Any, Any], tasks: Sequence[Any], crew: Crew, place: FleetPlace
) -> Iterator[Done[Any] | Failed]:
    if not tasks:
        return iter(())
    if crew.ray is None:
        return run_in_processes(work, tasks, crew.jobs or 1)
    gpus = int(place.study.device == "cuda")
    return run_on_ray(work, tasks, crew.ray, crew.jobs, gpus=gpus, cpus=place.study.threads)
