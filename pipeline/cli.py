"""The commands. Thin: options to settings, settings to a plan, a plan to a run, errors to one line and an exit code."""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console

from pipeline import provenance
from pipeline.config import PipelineConfig
from pipeline.demo_data import prepare_solar_cells
from pipeline.estimate import show_estimate
from pipeline.export_commands import COMMANDS as STUDENT_COMMANDS
from pipeline.options import TRIAL, WORK, stage_options
from pipeline.planning import Plan, make_plan
from pipeline.precision_table import show_precisions
from pipeline.presets import PRESETS
from pipeline.progress import show_progress, show_when_slow
from pipeline.runner import execute
from pipeline.screen import console, show_plan, show_results, show_status, show_teachers
from pipeline.settings import resolve_config
from pipeline.stages import STAGES
from pipeline.store_commands import COMMANDS as STORE_COMMANDS
from pipeline.workspace import Workspace, open_workspace
from storage.atomic import write_file, write_json
from storage.errors import DecantError, QuarantineError
from storage.stage import Interrupted, Terminated, raise_on_sigterm

ALL = tuple(STAGES)

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Before torch is loaded: how long its threads spin while they wait for each other. A training step of the demo on 2
# cores took 33 ms with this, 52 ms with threads that sleep at once, and with the default (300,000) up to 2 s beside a
# busy neighbour, because spinning threads starve the others.


class Command(NamedTuple):
    """A command that runs stages."""

    stages: tuple[str, ...]
    again: tuple[str, ...]
    """Stages that run even if they are up to date, because they were named: those that are cheap beside what they
    measure. A store and a student are kept and reused; --force makes them again."""
    help: str


COMMANDS: dict[str, Command] = {
    "run": Command(ALL, (), "Run everything that is not up to date: extract, distill, fine-tune, evaluate, report."),
    "extract": Command(("extract",), (), "Fill or resume a store: the teacher's tokens of every view of every image."),
    "distill": Command(("distill",), (), "Train a student from the store; again and again from the same store."),
    "finetune": Command(("finetune",), ("finetune",), "Fine-tune on the labels, from scratch and from the student."),
    "evaluate": Command(
        ("extract_eval", "evaluate"), ("evaluate",), "Probe frozen features; compare student and teacher."
    ),
    "report": Command(("report",), ("report",), "Write the table and the HTML page from finished stages."),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(provenance.version("decant-fd"), prog_name="decant")
def cli() -> None:
    """Feature distillation from a stored teacher: extract once, distill many students, fine-tune, report.

    Results lie in --work (runs/). A command starts from the settings of the one before it there, or from a preset;
    options change them.
    """


def _stage_command(name: str, command: Command) -> None:
    @cli.command(name, help=command.help)
    @stage_options
    def invoke(work: Path, force: bool, join: bool, retry_failed: bool, **options: Any) -> None:
        workspace = open_workspace(work)
        config = resolve_config(workspace, command=name, **options)
        again = command.stages if force else command.again
        run_stages(config, workspace, command.stages, again, join=join, retry_failed=retry_failed)


for _name, _command in COMMANDS.items():
    _stage_command(_name, _command)


@cli.command(help="The whole path on real photographs with a real pretrained teacher, on a laptop CPU.")
@stage_options
def demo(work: Path, force: bool, join: bool, retry_failed: bool, **options: Any) -> None:
    workspace = open_workspace(work)
    options["preset"] = options["preset"] or "demo"
    options["data"] = options["data"] or str(prepare_solar_cells(work / "solar-cells"))
    console.print(f"demo: {PRESETS[options['preset']].expectation}; stop it at any time, the same command goes on")
    config = resolve_config(workspace, command="demo", **options)
    run_stages(config, workspace, ALL, ALL if force else (), join=join, retry_failed=retry_failed)


@cli.command(help="What a run would do, why, and how long its extraction would take; nothing is run but a trial of it.")
@stage_options
@TRIAL
def plan(work: Path, force: bool, join: bool, retry_failed: bool, trial: float, **options: Any) -> None:
    workspace = open_workspace(work)
    config = resolve_config(workspace, command="plan", **options)
    found = _make_plan(config, workspace, ALL, ALL if force else ())
    show_plan(found, ALL)
    show_estimate(found, trial, console)


@cli.command(help="How far each precision of a teacher is from float32, and how fast it is; nothing is stored.")
@stage_options
def precision(work: Path, force: bool, join: bool, retry_failed: bool, **options: Any) -> None:
    workspace = open_workspace(work)
    config = resolve_config(workspace, command="precision", **options)
    show_precisions(_make_plan(config, workspace, (), ()))


@cli.command(help="Every store, student and result in the work folder, or named stores; and how far those at work are.")
@click.argument("stores", nargs=-1)
@WORK
def status(stores: tuple[str, ...], work: Path) -> None:
    show_status(open_workspace(work), stores)


for _other_command in (*STORE_COMMANDS, *STUDENT_COMMANDS):
    cli.add_command(_other_command)


@cli.command(help="The teachers by name: what they see and give, what they cost, their licence.")
def teachers() -> None:
    show_teachers()


def _saying_what_breaks(act: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose own broken pipes and ended files are told as the bugs that they are. click takes the one for a
    reader of our output that has left, and is silent, and the other for an interruption; rich sees to our output."""

    @functools.wraps(act)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return act(*arguments, **options)
        except (BrokenPipeError, EOFError) as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return call


for _made in cli.commands.values():
    if _made.callback is not None:
        _made.callback = _saying_what_breaks(_made.callback)


def run_stages(
    config: PipelineConfig, workspace: Workspace, stages: tuple[str, ...], again: tuple[str, ...], *,
    join: bool = False, retry_failed: bool = False,
) -> None:  # fmt: skip
    """Plan, show the plan, run, show the results. How this command goes about it is no setting of the next one."""
    plan = _make_plan(config, workspace, stages, again)
    show_plan(plan, stages)
    write_json(workspace.current_path, config.to_json())
    display = functools.partial(show_progress, console=console)
    results = execute(plan, stages, display, join=join, retry_failed=retry_failed)
    show_results(plan, results)


def _make_plan(config: PipelineConfig, workspace: Workspace, stages: tuple[str, ...], again: tuple[str, ...]) -> Plan:
    """The first plan for a data set reads all of it."""
    with show_when_slow("reading images", console) as progress:
        return make_plan(config, workspace, stages, again=again, progress=progress)


def main() -> None:
    """Run a command; every error becomes one line and an exit code (0 done, 1 our bug, 2 settings or data, 3 finished
    with quarantined jobs, 4 busy, 6 damaged, 130 interrupted, 143 ended by SIGTERM)."""
    errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    again = provenance.command_line()
    try:
        with raise_on_sigterm():
            cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        context = getattr(error, "ctx", None)
        errors.print(f"then: {context.command_path if context else again} --help")
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt, click.Abort) as error:  # click makes an Abort of a KeyboardInterrupt
        errors.print(f"\ninterrupted; everything finished so far is kept. Go on with: {again}")
        is_sigterm = str(error) == "SIGTERM" or isinstance(error.__cause__ or error, Terminated)
        sys.exit(143 if is_sigterm else 130)
    except DecantError as error:
        if isinstance(error, QuarantineError) and "--retry-failed" not in sys.argv:
            again = f"{again} --retry-failed"
        errors.print(f"error: {error}\nthen: {error.then or again}")
        sys.exit(error.exit_code)
    except Exception as error:
        where = _save_traceback(traceback.format_exc())
        errors.print(
            f"bug: {type(error).__name__}: {error} (traceback {where}); please report it with that\nthen: {again}"
        )
        sys.exit(1)


def _save_traceback(text: str) -> str:
    path = Path("decant-crash.txt").absolute()
    try:
        write_file(path, text.encode())
    except (DecantError, OSError):  # the disk may be what is wrong
        print(text, file=sys.stderr)
        return "above"
    return f"in {path}"
