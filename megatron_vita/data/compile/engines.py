"""Executors: this process, processes on this machine, or ray actors on machines that share a file system.

An executor maps a job over tasks, in any order. Tasks and results are a few numbers; data go over the disk. When a
process dies, the job decides how its task is retried.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, TypeVar

from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.files import no_room

ENGINES = ("local", "ray")

T = TypeVar("T")
W = TypeVar("W")


class MapJob(Protocol[T]):
    """A function factory that is sent to other processes; small and picklable."""

    def open(self) -> Callable[[T], Any]:
        """Make the function that does one task, in the process that calls it."""

    def died(self, task: T, deaths: int) -> T:
        """The task to retry after its process died for the `deaths`-th time.

        Raises:
            DataError: a retry is pointless.
        """


def open_executor(name: str, workers: int) -> Executor:
    """The executor of a name; its processes are not started yet.

    Raises:
        ConfigError: ray is not installed.
    """
    if name == "ray":
        return RayExecutor(workers)
    return InProcess() if workers == 1 else LocalExecutor(workers)


class Executor(ABC):
    """Maps a job over tasks. A context manager: it frees its processes at the end."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027  (nothing to close is a fine default)
        """Free all processes."""

    @abstractmethod
    def map(self, job: MapJob[T], tasks: Iterable[T]) -> Iterator[tuple[T, Any]]:
        """Yield every task with its result, as they finish.

        Raises:
            VitaError: raised by a task; the other tasks are cancelled.
            OSError: the disk is full (`no_room`).
        """


class InProcess(Executor):
    """Runs the tasks in this process, one after the other. A crash ends the run."""

    def map(self, job: MapJob[T], tasks: Iterable[T]) -> Iterator[tuple[T, Any]]:
        run = job.open()
        for task in tasks:
            yield task, run(task)


class _WorkerPool(Executor, Generic[W]):
    """Workers that take one task at a time, are replaced when they die, and stay until the engine is closed."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._idle: list[W] = []

    def map(self, job: MapJob[T], tasks: Iterable[T]) -> Iterator[tuple[T, Any]]:
        waiting = deque(enumerate(tasks))
        deaths: Counter[int] = Counter()
        busy: dict[W, tuple[int, T]] = {}
        has_job: set[W] = set()  # workers that have the job
        try:
            while waiting or busy:
                while waiting and len(busy) < self._workers:
                    worker = self._idle.pop() if self._idle else self._spawn()
                    busy[worker] = waiting.popleft()
                    self._send(worker, None if worker in has_job else job, busy[worker][1])
                    has_job.add(worker)
                for worker, outcome in self._finished(list(busy)):
                    number, task = busy.pop(worker)
                    if outcome is None:
                        self._terminate(worker)
                        deaths[number] += 1
                        waiting.appendleft((number, job.died(task, deaths[number])))
                        continue
                    self._idle.append(worker)
                    good, value = outcome
                    if not good:
                        raise value
                    yield task, value
        finally:
            for worker in busy:
                self._terminate(worker)

    def close(self) -> None:
        for worker in self._idle:
            self._terminate(worker)
        self._idle.clear()

    @abstractmethod
    def _spawn(self) -> W:
        """Start a worker."""

    @abstractmethod
    def _send(self, worker: W, job: Any, task: Any) -> None:
        """Send a task to a worker; with the first task of a job, the job."""

    @abstractmethod
    def _finished(self, busy: list[W]) -> list[tuple[W, tuple[bool, Any] | None]]:
        """Wait until workers finish: each with (success, result or error), or None if it died."""

    @abstractmethod
    def _terminate(self, worker: W) -> None:
        """End a worker, whatever it is doing."""


class _Attempts:
    """Runs tasks in a worker and returns results or errors. It opens a job with its first task."""

    def __init__(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._run: Callable[[Any], Any] | None = None

    def run(self, job: Any, task: Any) -> tuple[bool, Any]:
        """(success, result or error)."""
        try:
            if job is not None:
                self._run = job.open()
            assert self._run is not None
            return True, self._run(task)
        except VitaError as error:
            return False, error
        except Exception as error:  # a defect of this package: its traceback would not reach the parent
            if isinstance(error, OSError) and no_room(error):
                return False, error
            return False, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")


def _serve(tasks: Connection) -> None:
    """Main loop of a local worker: it ends once the other end of the pipe is closed and its task is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends us
    attempts = _Attempts()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            tasks.send(attempts.run(*tasks.recv()))


class _Local:
    """One process and its pipe."""

    def __init__(self) -> None:
        # spawn: this process may hold threads (digests), which a fork would copy in the middle of their work
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_end,))
        self.process.start()
        child_end.close()


class LocalExecutor(_WorkerPool[_Local]):
    """Processes on this machine."""

    def _spawn(self) -> _Local:
        return _Local()

    def _send(self, worker: _Local, job: Any, task: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died meanwhile; `_finished` sees that
            worker.pipe.send((job, task))

    def _finished(self, busy: list[_Local]) -> list[tuple[_Local, tuple[bool, Any] | None]]:
        by_pipe = {worker.pipe: worker for worker in busy}
        out: list[tuple[_Local, tuple[bool, Any] | None]] = []
        for pipe in wait(list(by_pipe)):  # a pipe whose other end is gone is ready too
            worker = by_pipe[pipe]  # type: ignore[index]
            try:
                out.append((worker, worker.pipe.recv()))
            except (EOFError, ConnectionResetError):
                out.append((worker, None))
        return out

    def _terminate(self, worker: _Local) -> None:
        worker.pipe.close()
        worker.process.terminate()
        worker.process.join()


class RayExecutor(_WorkerPool[Any]):
    """Ray actors. All machines must see the data, the media and the output folder under the same paths.

    Joins the cluster that RAY_ADDRESS names; without it a cluster is started on this machine, reachable from it alone.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        if not os.environ.get("RAY_ADDRESS"):
            # Read when ray is imported. Without it a cluster of one machine listens on all of its networks; despite its
            # name it counts on every system (ray/_private/services.py, get_node_ip_address).
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "--engine ray needs ray: pip install 'megatron-vita[ray]', or use --engine local."
            ) from None
        self._ray = ray
        self._mine = False
        self._running: dict[Any, Any] = {}  # actor -> what it is working on

    def __enter__(self) -> Executor:
        ray = self._ray
        self._mine = not ray.is_initialized()
        if self._mine:
            start: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
            if not os.environ.get("RAY_ADDRESS"):
                start |= {"num_cpus": self._workers, "include_dashboard": False}
            try:
                ray.init(**start)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConfigError(f"--engine ray: no cluster ({error}). Correct RAY_ADDRESS, or unset it.") from None
        return self

    def close(self) -> None:
        super().close()
        if self._mine:
            self._ray.shutdown()

    def _spawn(self) -> Any:
        return self._ray.remote(num_cpus=1, max_restarts=0)(_Attempts).remote()

    def _send(self, worker: Any, job: Any, task: Any) -> None:
        self._running[worker] = worker.run.remote(job, task)

    def _finished(self, busy: list[Any]) -> list[tuple[Any, tuple[bool, Any] | None]]:
        ray = self._ray
        by_work = {self._running[worker]: worker for worker in busy}
        ready, _ = ray.wait(list(by_work), num_returns=1)
        out: list[tuple[Any, tuple[bool, Any] | None]] = []
        for work in ready:
            worker = by_work[work]
            del self._running[worker]
            try:
                out.append((worker, ray.get(work)))
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                out.append((worker, None))
        return out

    def _terminate(self, worker: Any) -> None:
        self._running.pop(worker, None)
        self._ray.kill(worker)
