"""Runs tasks in worker processes, each of which opens its world once.

A worker has a process pool of its own, so that one that dies (killed for its memory, say) takes no
other's task with it: its task is reported as failed and a new worker goes on. What a task yields
depends on the task and the place alone, never on the number of workers or on who was faster.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from runtime_py.loop.errors import AttuneError, LoopError

Place = TypeVar("Place")
Task = TypeVar("Task")
Result = TypeVar("Result")

DIED = "its worker ended without a word, as when the system takes the memory"


class NoWorld(LoopError):  # noqa: N818 - what happened, as the loop's errors say it
    """A worker cannot open what all tasks need: none can be run."""


@dataclass(frozen=True)
class Work(Generic[Place, Task, Result]):
    """``open``: called once in each worker with ``place``; ``run``: with each task and what was
    opened. Both are functions of a module, which a worker imports."""

    open: Callable[[Place], Any]
    run: Callable[[Task, Any], Result]
    place: Place


@dataclass(frozen=True)
class Done(Generic[Result]):
    """``index``: of the task."""

    index: int
    result: Result


@dataclass(frozen=True)
class Failed:
    """``sentence``: what went wrong, in short; ``trace``: at length, for who repairs it."""

    index: int
    sentence: str
    trace: str


_worlds: dict[Any, Any] = {}  # of this process: one, but for a pool that serves several places


def perform(work: Work[Any, Task, Result], task: Task) -> Result:
    """In a worker: the task in this process's world. Raises ``NoWorld`` where there is none."""
    if work.place not in _worlds:
        try:
            _worlds[work.place] = work.open(work.place)
        except AttuneError as error:
            raise NoWorld(str(error)) from None
    return work.run(task, _worlds[work.place])


def failed(index: int, error: BaseException) -> Failed:
    """A user's mistake by its sentence; anything else with its kind."""
    sentence = str(error) if isinstance(error, AttuneError) else f"{type(error).__name__}: {error}"
    return Failed(index, sentence, "".join(traceback.format_exception(error)))


def run_in_processes(
    work: Work[Any, Task, Result], tasks: Sequence[Task], jobs: int
) -> Iterator[Done[Result] | Failed]:
    """Yields each task's outcome as soon as it is there. Raises ``NoWorld``.

    Where the caller stops early, what runs is ended.
    """
    workers = [_Worker() for _ in range(min(jobs, len(tasks)))]
    waiting = iter(enumerate(tasks))
    running: dict[Future[Result], tuple[_Worker, int]] = {}
    try:
        for worker in workers:
            _next(worker, waiting, work, running)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, index = running.pop(future)
                error = future.exception()
                if isinstance(error, NoWorld):
                    raise error
                if isinstance(error, BrokenProcessPool):
                    worker.renew()
                _next(worker, waiting, work, running)
                yield _outcome(index, future, error)
    finally:
        for worker in workers:
            worker.end()


def _next(
    worker: _Worker,
    waiting: Iterator[tuple[int, Task]],
    work: Work[Any, Task, Result],
    running: dict[Future[Result], tuple[_Worker, int]],
) -> None:
    for index, task in waiting:
        running[worker.pool.submit(perform, work, task)] = worker, index
        return


def _outcome(
    index: int, future: Future[Result], error: BaseException | None
) -> Done[Result] | Failed:
    if error is None:
        return Done(index, future.result())
    if isinstance(error, BrokenProcessPool):
        return Failed(index, DIED, "")
    return failed(index, error)


class _Worker:
    """A process, made when it gets its first task."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would share PyTorch's threads
        self.pool = ProcessPoolExecutor(1, spawn, initializer=_end_with_parent)

    def end(self) -> None:
        processes = list((self.pool._processes or {}).values())
        for process in processes:
            process.kill()
        self.pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker when the process that made it is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
