"""Several processes for one distillation: started, watched and stopped; torchrun's, or Ray Train's."""

import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from distill.config import DistillRunConfig
from distill.device import check_gpus
from distill.job import JOB_FILE, OUTCOME_FILE, PROGRESS_FILE, STOP_FILE, Job, Outcome
from distill.parent import PARENT
from distill.relay import Follower
from storage.atomic import remove_file, write_file
from storage.errors import ConfigError, DecantError
from storage.stage import Interrupted, Progress, StopRequest

LOG_FILE = "processes.log"
"""What the processes print, in the run's folder."""
MOST_RESTARTS = 3
"""How often all processes are started again, from the newest checkpoint, because one of them was lost."""
_FILES = (JOB_FILE, OUTCOME_FILE, PROGRESS_FILE, STOP_FILE)
_POLL_SECONDS = 0.1
_LOG_LINES = 15


class Processes(Protocol):
    """What a launcher started."""

    def poll(self) -> int | None:
        """The exit status once all have ended."""

    def last_words(self) -> str:
        """What they said last, for an error of which nothing else is known."""


def launch(job: Job, progress: Progress, stop: StopRequest) -> dict[str, Any]:
    """Train with `gpus` processes a machine; returns the stage's metrics.

    Raises:
        Interrupted: they saved a checkpoint, because a stop was asked for.
        ConfigError, DecantError: what one of them raised; or they ended without a word.
    """
    folder = job.out_dir.absolute()
    job = job.model_copy(
        update={"out_dir": folder, "inputs": {name: Path(path).absolute() for name, path in job.inputs.items()}}
    )
    write_file(folder / JOB_FILE, job.model_dump_json().encode())
    follower = Follower(folder / PROGRESS_FILE, progress)
    with closing(follower), _start(job.cfg.run, folder, progress) as processes:
        while processes.poll() is None and not _has_failed(folder):
            time.sleep(_POLL_SECONDS)
            follower.follow()
            if stop and not (folder / STOP_FILE).exists():
                write_file(folder / STOP_FILE, stop.signal_name.encode())
        status = processes.poll()
        follower.follow()
    return _take_metrics(folder, f"status {status}; {processes.last_words()}", stop)


def sweep(folder: Path) -> None:
    """Remove what a command left there that was killed while its processes were at work."""
    _remove(folder, *_FILES, LOG_FILE)


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        remove_file(folder / name)


def _read_outcome(folder: Path) -> Outcome | None:
    """None as long as no process has said how it ended."""
    path = folder / OUTCOME_FILE
    return Outcome.from_file(path, path.read_bytes()) if path.exists() else None


def _has_failed(folder: Path) -> bool:
    """Whether something was wrong that another attempt would not mend."""
    outcome = _read_outcome(folder)
    return outcome is not None and bool(outcome.error)


def _take_metrics(folder: Path, end: str, stop: StopRequest) -> dict[str, Any]:
    """Those of the outcome, or its error; the files between the processes are gone then."""
    outcome = _read_outcome(folder)
    _remove(folder, *_FILES)
    if outcome is None:
        raise DecantError(f"the training's processes ended with {end}")
    if outcome.error:
        error = DecantError(outcome.error)
        error.exit_code = outcome.exit_code
        raise error
    if outcome.interrupted or outcome.metrics is None:
        raise Interrupted(stop.signal_name)
    _remove(folder, LOG_FILE)
    return outcome.metrics


def _start(run: DistillRunConfig, folder: Path, progress: Progress) -> AbstractContextManager[Processes]:
    if run.launcher == "ray":
        ours: AbstractContextManager[Processes] = _ray_launcher().start(run, folder)
        return ours
    return _torchrun(run, folder, progress)


def _ray_launcher() -> Any:
    try:
        return importlib.import_module("distill.launch_ray")
    except ImportError as error:
        raise ConfigError(
            f"LAUNCHER=ray needs what Ray Train needs ({error}): pip install 'decant-fd[ray-train]'; LAUNCHER=torchrun "
            "needs nothing more"
        ) from error


@contextmanager
def _torchrun(run: DistillRunConfig, folder: Path, progress: Progress) -> Iterator["_Torchrun"]:
    """torchrun in a process group of its own, so that a Ctrl-C is heard here alone; it ends with the block."""
    check_gpus(run.device, run.gpus)
    where = ["--standalone"]
    if run.nodes > 1:
        if run.rendezvous is None:
            raise ConfigError(
                f"distill.run.nodes is {run.nodes}: say where they meet, distill.run.rendezvous=HOST:PORT of this one"
            )
        where = [
            f"--nnodes={run.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={run.rendezvous}", "--rdzv-id=decant"
        ]  # fmt: skip
    arguments = [
        "-m", "distill.agent", *where, f"--nproc-per-node={run.gpus}", f"--max-restarts={MOST_RESTARTS}",
        "-m", "distill.worker", str(folder / JOB_FILE),
    ]  # fmt: skip
    if run.nodes > 1:
        progress.say(f"give on each of the {run.nodes - 1} other machines: {shlex.join(['python', *arguments])}")
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        PARENT: str(os.getpid()),
    }
    with (folder / LOG_FILE).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield _Torchrun(process, folder / LOG_FILE)
    except KeyboardInterrupt:  # the second one: at once
        process.kill()  # and its processes with it
        process.wait()
        raise
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _Torchrun(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path

    def poll(self) -> int | None:
        return self.process.poll()

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        if not lines:
            return "killed from outside, perhaps for want of memory"
        return "\n".join([f"the end of {self.log}:", *lines])
