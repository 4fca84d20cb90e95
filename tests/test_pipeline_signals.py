"""Ctrl-C and SIGTERM while libraries are loaded, images are listed and a teacher is loaded: never a traceback."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from storage.stage import Terminated, raise_on_sigterm, stop_on_signals

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def catches_sigterm(pid: int) -> bool:
    """Whether a process has begun to look at signals itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("number", list(CODES), ids=lambda number: number.name)
def test_a_command_that_is_stopped_early_says_so_in_one_line(
    number: signal.Signals, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    images, root = make_images(), Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "pipeline", "extract", "--preset", "smoke", "--data", str(images)]
    for latest in (0.1, 1.0, 3.0):
        with subprocess.Popen(
            [*command, "--work", str(tmp_path / "runs")], cwd=root, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "PYTHONFAULTHANDLER": ""},
        ) as process:  # fmt: skip
            while process.poll() is None and not catches_sigterm(process.pid):
                time.sleep(0.002)
            time.sleep(moments.uniform(0, latest))
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        assert "Traceback" not in said
        if process.returncode == CODES[number]:
            assert "interrupted" in said
        else:  # too late: it is done, or the interpreter is at its end and looks at no signal any more
            assert process.returncode in (0, -number), said
            assert list(tmp_path.glob("runs/stores/*/result.json"))


def test_sigterm_ends_at_once_where_nothing_is_under_way() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), raise_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), EOFError("nothing more")], ids=type)
def test_what_breaks_between_our_own_processes_is_no_interruption(
    error: Exception, decant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """click is silent about a broken pipe, and takes the end of a file for a Ctrl-D."""

    def breaks() -> None:
        raise error

    monkeypatch.setattr(cli, "show_teachers", breaks)
    outcome = decant("teachers")
    assert outcome.code == 1
    assert f"bug: RuntimeError: {type(error).__name__}: {error}" in outcome.err
    assert "interrupted" not in outcome.err


def test_the_second_signal_ends_at_once() -> None:
    with pytest.raises(Terminated), stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        signal.raise_signal(signal.SIGTERM)
