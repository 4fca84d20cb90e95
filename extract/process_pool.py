"""Workers as processes of this machine, each with a pipe to the driver and, where there are GPUs, its share of them.

They are forked from a server process that has loaded the libraries and has no threads: a new worker takes the time that
its teacher takes. A worker ends when its pipe does, so none outlives the driver, however that ends.
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from extract.config import ExecutionConfig, sharers_of_a_gpu
from extract.driver import JOBS_IN_FLIGHT
from extract.held_back import sigterm_held_back
from extract.jobs import Died, Done, Event, Job, MakeWork, Raised, Ready, reason_of
from extract.turns import Turns
from storage.errors import ConfigError
from storage.stage import StopRequest

_GPUS = "CUDA_VISIBLE_DEVICES"
_PATIENCE_SECONDS = 10.0
_SERVER_KNOWS = ["extract.worker"]
"""What the server process imports, once for all workers."""


class _Call(NamedTuple):
    """To a worker. Numbers count from 0."""

    number: int
    job: Job


class _Answer(NamedTuple):
    """Of a worker: to a call, or that it is up or cannot be made."""

    number: int | None
    result: Any = None
    error: Exception | None = None


class _Process(NamedTuple):
    """A worker, as the driver sees it."""

    process: Any
    pipe: Connection
    gpus: str
    calls: dict[int, Job]
    """Under way, by number."""
    numbers: Iterator[int]


class ProcessPool:
    can_kill = True

    def __init__(self, cfg: ExecutionConfig, make_work: MakeWork[Any], num_jobs: int) -> None:
        self._make_work = make_work
        shares = _shares_of_gpus(cfg) if cfg.device != "cpu" else []
        wanted = cfg.workers or len(shares) or cfg.cpu_workers(len(os.sched_getaffinity(0)))
        if shares and wanted > len(shares):
            raise ConfigError(
                f"{wanted} workers with {cfg.gpus_per_worker:g} GPUs each are more than this machine's GPUs have room "
                f"for ({len(shares)}); lower extract.run.workers or extract.run.gpus_per_worker"
            )
        self.size = min(wanted, num_jobs)
        self._free_gpus = (shares or [""] * self.size)[: self.size]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_SERVER_KNOWS)
        self._numbers = itertools.count()
        self._workers: dict[int, _Process] = {}
        self._stillborn: list[Died] = []

    def start(self) -> int:
        """A worker that cannot be started, as when the server process was killed, is one that died."""
        number, gpus = next(self._numbers), self._free_gpus.pop(0)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._make_work, gpus), name=f"decant-worker-{number}", daemon=True
        )
        try:
            _begin(process)
        except (EOFError, OSError) as error:
            ours.close()
            self._free_gpus.append(gpus)
            self._stillborn.append(Died(number, f"its process could not be started: {reason_of(error)}"))
        else:
            self._workers[number] = _Process(process, ours, gpus, {}, itertools.count())
        theirs.close()
        return number

    def submit(self, worker: int, job: Job) -> None:
        found = self._workers[worker]
        call = _Call(next(found.numbers), job)
        found.calls[call.number] = job
        with contextlib.suppress(OSError):  # it has just died; `wait` says so
            found.pipe.send(call)

    def wait(self, seconds: float) -> Sequence[Event]:
        if self._stillborn:
            events, self._stillborn = self._stillborn, []
            return events
        ends = {found.pipe: number for number, found in self._workers.items()}
        ends |= {found.process.sentinel: number for number, found in self._workers.items()}
        numbers = dict.fromkeys(ends[end] for end in wait(list(ends), seconds))  # type: ignore[index]
        return [event for number in numbers for event in self._events(number)]

    def _events(self, number: int) -> Iterator[Event]:
        found = self._workers[number]
        with contextlib.suppress(EOFError, OSError):
            while found.pipe.poll():
                yield _event(number, found, found.pipe.recv())
            if found.process.is_alive():
                return
        found.process.join(1)
        yield Died(number, _how_it_ended(found.process.exitcode))

    def kill(self, worker: int) -> None:
        found = self._workers.pop(worker, None)
        if found is None:  # it was never there
            return
        found.process.kill()
        found.process.join(_PATIENCE_SECONDS)  # one that waits for a dead disk cannot be ended
        found.pipe.close()
        self._free_gpus.append(found.gpus)


def _begin(process: BaseProcess) -> None:
    """Start a process. A server that was killed a moment ago may still count as alive, and answers nobody: then nothing
    was begun, and it is tried again."""
    for pause_seconds in (0.1, 0.5, 2.0, None):
        _ensure_server()
        try:
            process.start()
            return
        except ConnectionRefusedError:
            if pause_seconds is None:
                raise
            time.sleep(pause_seconds)


def _ensure_server() -> None:
    """Have the server process run; it, and what it forks, hears no SIGTERM."""
    resource_tracker.ensure_running()  # otherwise started below, where it would let the signal through again
    with sigterm_held_back():
        forkserver.ensure_running()


def _event(number: int, found: _Process, answer: _Answer) -> Event:
    job = None if answer.number is None else found.calls.pop(answer.number)
    if answer.error is not None:
        return Raised(number, job, answer.error)
    return Ready(number, answer.result) if job is None else Done(number, job, answer.result)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (by the system, out of memory?)" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"
    return f"its process ended with code {code}"


def _shares_of_gpus(cfg: ExecutionConfig) -> list[str]:
    """What each worker is to see of the GPUs that this process sees; nothing where there are none.

    Raises:
        ConfigError: there are fewer than a worker needs.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        return []
    listed = os.environ.get(_GPUS)
    names = listed.split(",")[:count] if listed else [str(number) for number in range(count)]
    if cfg.gpus_per_worker < 1:
        return names * sharers_of_a_gpu(cfg)
    each = int(cfg.gpus_per_worker)
    if each > count:
        raise ConfigError(f"a worker needs {each} GPUs, this process sees {count}; lower extract.run.gpus_per_worker")
    return [",".join(names[first : first + each]) for first in range(0, count - each + 1, each)]


# ---- in the worker's process -----------------------------------------------------------------------------------------


def _serve(pipe: Connection, make_work: MakeWork[Any], gpus: str) -> None:
    """Carry out what comes through the pipe, until it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the driver decides
        signal.signal(number, signal.SIG_IGN)
    if gpus:
        os.environ[_GPUS] = gpus  # before torch looks for them
    turn = threading.Lock()

    def say(answer: _Answer) -> None:
        with turn, contextlib.suppress(OSError):  # the driver is gone
            pipe.send(answer)

    try:
        work = make_work()
    except Exception as error:
        say(_Answer(None, error=_portable(error)))
        os._exit(1)
    turns = Turns(int(getattr(work, "jobs_at_a_time", 1)))

    def carry_out(call: _Call) -> None:
        with turns.take(call.number):
            try:
                answer = _Answer(call.number, work(call.job))
            except BaseException as error:  # a stranger's network may raise SystemExit
                answer = _Answer(call.number, error=_portable(error))
            say(answer)

    say(_Answer(None, turns.at_a_time))
    with ThreadPoolExecutor(max(turns.at_a_time, JOBS_IN_FLIGHT)) as pool:
        with contextlib.suppress(EOFError, OSError):
            while True:
                pool.submit(carry_out, pipe.recv())
        os._exit(0)  # whatever is under way


def _portable(error: BaseException) -> Exception:
    """The error itself, where it survives the journey; else its text."""
    try:
        if isinstance(error, Exception) and type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # anything may be wrong with a stranger's class
        pass
    return RuntimeError(reason_of(error))


@contextlib.contextmanager
def open_process_pool(
    cfg: ExecutionConfig, make_work: MakeWork[Any], num_jobs: int, stop: StopRequest
) -> Iterator[ProcessPool]:
    """
    Raises:
        ConfigError: more workers than there is room for on the GPUs.
    """
    yield ProcessPool(cfg, make_work, num_jobs)
