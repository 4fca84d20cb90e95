"""Ctrl-C and kills in every stage, and at any moment: the same command goes on, and ends with the same bytes.

Commands run in processes of their own. They are forked from one that has loaded the libraries already: that takes
seconds, a run a fraction of one.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages import STAGES
from pipeline.workspace import Workspace, find_damage

FORKER = """
import json, os, signal, sys
import distill.run, extract.run, finetune.evaluate, finetune.run, matplotlib.pyplot, pipeline.report
from pipeline import cli, screen

def hold_at(text, write):
    def hold(*words, **options):
        write(*words, **options)
        if words and text in str(words[0]):
            os.kill(os.getpid(), signal.SIGSTOP)  # until the test says what becomes of it
    return hold

def run(request):
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell would have it ignored
    if request["hold"]:
        screen.console.print = hold_at(request["hold"], screen.console.print)
        render = pipeline.report.render_page
        pipeline.report.render_page = lambda *facts: screen.console.print("rendering") or render(*facts)
    sys.argv = ["decant", *request["arguments"]]
    cli.main()

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(json.loads(line))
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
    while os.WIFSTOPPED(status := os.waitpid(child, os.WUNTRACED)[1]):
        print("held", flush=True)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

MOMENTS = {
    "extract": "extract: 4/16 images",
    "distill": "distill: 1/8 steps",
    "finetune": "finetune: 1/4 steps",
    "evaluate": "linear probe on the student",
    "report": "rendering",
}
"""What a run prints when a stage is at work."""


class Command:
    """A command under way in a process of its own."""

    def __init__(self, forker: "subprocess.Popen[str]", log: Path, arguments: list[str], hold: str) -> None:
        assert forker.stdin is not None
        assert forker.stdout is not None
        self.log, self._answers = log, forker.stdout
        forker.stdin.write(json.dumps({"log": str(log), "arguments": arguments, "hold": hold}) + "\n")
        forker.stdin.flush()
        self.pid = int(self._answers.readline())
        if hold:
            assert self._answers.readline() == "held\n", self.text

    @property
    def text(self) -> str:
        return " ".join(self.log.read_text().split())

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a command that is held goes on with it."""
        for each in (number, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):  # it may have ended a moment ago
                os.kill(self.pid, each)

    def end(self) -> int:
        """Wait for it; gives the exit code, or minus the number of the signal that killed it."""
        return int(self._answers.readline())


@pytest.fixture(scope="module")
def forker() -> Iterator["subprocess.Popen[str]"]:
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", FORKER], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture
def start(forker: "subprocess.Popen[str]", finished_run: tuple[Path, Path], tmp_path: Path) -> Callable[..., Command]:
    """Start `run` on the images of the finished run, in a work folder of one's own. `hold`: stop where this is said."""
    arguments = ["run", "--preset", "smoke", "--data", str(finished_run[0]), "--work", str(tmp_path / "runs")]

    def run(hold: str = "") -> Command:
        return Command(forker, tmp_path / "log.txt", arguments, hold)

    return run


def comparable(work: Path, tree_bytes: Callable[[Path], dict[str, object]]) -> dict[str, object]:
    """All that is bound to be the same in two runs; times are not."""
    files = {part: tree_bytes(work / part) for part in ("stores", "students", "finetune", "evaluate")}
    [(_, finetuned)] = Workspace(work).results(STAGES["finetune"])
    [(_, evaluated)] = Workspace(work).results(STAGES["evaluate"])
    numbers = [(m["start"], m["seed"], m["accuracy"], m["history"]) for m in finetuned.metrics["members"]]
    probes = [evaluated.metrics[name]["accuracy"] for name in ("teacher_probe", "student_probe")]
    return {"files": files, "members": numbers, "probes": probes, "held out": evaluated.metrics["held_out"]}


@pytest.mark.parametrize(
    ("number", "stages"),
    [(signal.SIGINT, tuple(MOMENTS)), (signal.SIGKILL, tuple(MOMENTS)), (signal.SIGTERM, ("distill",))],
    ids=["SIGINT", "SIGKILL", "SIGTERM"],
)
def test_a_run_that_is_stopped_in_every_stage_ends_with_the_same_bytes(
    start: Callable[..., Command], number: signal.Signals, stages: tuple[str, ...], finished_run: tuple[Path, Path],
    tmp_path: Path, tree_bytes: Callable[[Path], dict[str, object]],
) -> None:  # fmt: skip
    work = Workspace(tmp_path / "runs")
    reason = "was stopped from outside" if number == signal.SIGKILL else "was interrupted"
    before = ""
    for stage in stages:
        command = start(hold=MOMENTS[stage])
        command.send(number)
        code, text = command.end(), command.text
        assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], text
        if number != signal.SIGKILL:
            assert "interrupted; everything finished so far is kept. Go on with: decant run --preset smoke" in text
            assert "Traceback" not in text
        assert not before or f"{before} resume {reason} last time" in text
        assert not work.results(STAGES[stage]), "a stage that was stopped has no result"
        before = stage
    command = start()
    assert command.end() == 0, command.text
    assert f"{before} resume {reason} last time" in command.text
    assert comparable(work.root, tree_bytes) == comparable(finished_run[1], tree_bytes)
    assert not [path for path in work.root.rglob("*") if path.suffix in (".partial", ".again", ".old")]
    command = start()
    assert (command.end(), command.text.count(" skip ")) == (0, len(STAGES))


def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bytes(
    start: Callable[..., Command], finished_run: tuple[Path, Path], tmp_path: Path,
    tree_bytes: Callable[[Path], dict[str, object]],
) -> None:  # fmt: skip
    """After each kill, whatever calls itself done is whole."""
    work, seed = Workspace(tmp_path / "runs"), random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    for _ in range(8):
        command = start()
        time.sleep(moments.uniform(0.01, 0.9))
        command.send(signal.SIGKILL)
        if command.end() == 0:
            break
        done = [(stage, *found) for stage in STAGES.values() for found in work.results(stage)]
        assert not [find_damage(*found) for found in done if find_damage(*found)]
    command = start()
    assert command.end() == 0, command.text
    assert comparable(work.root, tree_bytes) == comparable(finished_run[1], tree_bytes)


def test_a_second_command_gives_way_to_the_first(start: Callable[..., Command], tmp_path: Path, decant: Any) -> None:
    command = start(hold=MOMENTS["distill"])
    outcome = decant("distill", "--work", tmp_path / "runs")
    assert outcome.code == 4
    assert f"is being written by process {command.pid} on" in outcome.err
    assert "wait for it to end, or stop it" in outcome.err
    command.send(signal.SIGCONT)
    assert command.end() == 0, command.text
    assert decant("distill", "--work", tmp_path / "runs").code == 0
