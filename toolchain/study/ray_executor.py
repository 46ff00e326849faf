"""The same tasks on the machines of a Ray cluster: one actor a worker, the same outcomes.

Every machine needs attune in this version and the place's files under the same paths. Ray is an
optional extra: ``pip install 'attune-mobile[ray]'``.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from runtime_py.engine.native import silenced
from runtime_py.loop.errors import LoopError
from toolchain.study.executor import DIED, Done, Failed, NoWorld, Result, Task, Work, failed
from toolchain.study.executor import perform as perform_task

LOCAL = "local"  # an address: a cluster of this machine alone, for as long as the run takes
_SECONDS = 5.0  # until an address counts as silent


def run_on_ray(
    work: Work[Any, Task, Result],
    tasks: Sequence[Task],
    address: str,
    jobs: int | None,
    gpus: int = 0,
    cpus: int = 1,
) -> Iterator[Done[Result] | Failed]:
    """Yields each task's outcome as soon as it is there, as ``run_in_processes`` does.

    ``address``: ``host:port``, ``ray://host:port``, ``auto`` or ``local``; ``jobs``: workers at
    once, None for as many as the cluster has room for; ``gpus`` and ``cpus``: of each worker.
    Raises ``LoopError`` where no cluster answers, ``NoWorld``.
    """
    ray = _connected(address)
    try:
        workers = min(len(tasks), jobs or _room(ray, gpus, cpus))
        yield from _run(ray, work, tasks, workers, {"num_cpus": cpus, "num_gpus": gpus})
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    """The module ``ray``, connected."""
    try:
        import ray
    except ImportError:
        raise LoopError(
            "--ray needs Ray, which is not installed: pip install 'attune-mobile[ray]'."
        ) from None
    _check_answers(address)
    own: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        with silenced():  # Ray's native part tells every try
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise _silent(address, str(error).splitlines()[0] if str(error) else "") from None
    return ray


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes."""
    if address in (LOCAL, "auto"):
        return
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        if not place.hostname or not place.port:
            raise _silent(address, "it has no host and port")
        socket.create_connection((place.hostname, place.port), timeout=_SECONDS).close()
    except ValueError:
        raise _silent(address, "its port is none") from None
    except OSError as error:
        raise _silent(address, error.strerror or str(error)) from None


def _silent(address: str, why: str) -> LoopError:
    return LoopError(
        f"no Ray cluster answers at {address!r}{f' ({why})' if why else ''}: start one with "
        f"`ray start --head` and give its host:port, or 'local' for this machine alone."
    )


def _room(ray: Any, gpus: int, cpus: int) -> int:
    """Workers that the cluster has room for, at least one."""
    there = ray.cluster_resources()
    return max(1, int(there.get("GPU", 0) // gpus if gpus else there.get("CPU", 1) // cpus))


def _run(
    ray: Any,
    work: Work[Any, Task, Result],
    tasks: Sequence[Task],
    workers: int,
    needs: dict[str, int],
) -> Iterator[Done[Result] | Failed]:
    actor = ray.remote(**needs)(_Performer)
    waiting = iter(enumerate(tasks))
    running: dict[Any, tuple[Any, int]] = {}

    def start(performer: Any) -> None:
        for index, task in waiting:
            running[performer.perform.remote(work, task)] = performer, index
            return

    for _ in range(workers):
        start(actor.remote())
    while running:
        (reference,), _ = ray.wait(list(running), num_returns=1)
        performer, index = running.pop(reference)
        outcome = _outcome(ray, reference, index)
        start(actor.remote() if _is_dead(outcome) else performer)
        yield outcome


def _is_dead(outcome: Done[Any] | Failed) -> bool:
    return isinstance(outcome, Failed) and outcome.sentence == DIED


def _outcome(ray: Any, reference: Any, index: int) -> Done[Any] | Failed:
    try:
        return Done(index, ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, NoWorld):
            raise NoWorld(str(error.cause)) from None
        return Failed(index, failed(index, error.cause).sentence, str(error))
    except ray.exceptions.RayError as error:  # the actor died, or its machine
        return Failed(index, DIED, str(error))


class _Performer:
    """An actor: a process with a world of its own."""

    def perform(self, work: Work[Any, Task, Result], task: Task) -> Result:
        return perform_task(work, task)
