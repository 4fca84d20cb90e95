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
from pipeline.config import PipelineConfig, apply_overrides, parse_assignment
from pipeline.demo_data import prepare_solar_cells
from pipeline.named_teachers import SEVERAL, split_teachers, with_others, with_weights
from pipeline.planning import Plan, make_plan
from pipeline.precision_table import show_precisions
from pipeline.presets import PRESETS, load_preset, preset_for_teacher
from pipeline.progress import show_progress, show_when_slow
from pipeline.runner import execute
from pipeline.screen import console, show_plan, show_results, show_status, show_teachers
from pipeline.stages import STAGES
from pipeline.store_commands import COMMANDS as STORE_COMMANDS
from pipeline.store_commands import ENCODING, LAYOUT, WHITENING
from pipeline.workspace import Workspace, load_current, open_workspace
from storage.atomic import write_file, write_json
from storage.encodings import find_encoding
from storage.errors import DecantError
from storage.stage import Interrupted
from storage.whitening import find_whitening

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


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every stage command takes, with the same words."""
    for option in reversed(
        [
            click.option("--preset", help=f"Settings to start from: {', '.join(PRESETS)}."),
            click.option(
                "--teacher",
                help="A name of `decant teachers`, timm:NAME, open_clip:NAME/TAG or FILE.py; several with commas "
                "(extract, plan, run).",
            ),
            click.option(
                "--weights", help="A local file with the teacher's weights, `random`, or `hub`; one for each teacher."
            ),
            click.option("--data", help="A folder of class folders, or tars of images (WebDataset)."),
            click.option("--views", type=int, help="Stored views an image."),
            LAYOUT,
            ENCODING,
            WHITENING,
            click.option("--store", help="Train from this finished store, a path or URL, instead of extracting one."),
            click.option("--student", help="vit-ti, vit-s, vit-b, vit-l or toy."),
            click.option("--seeds", type=int, help="Fine-tune with this many seeds."),
            click.option("--executor", type=click.Choice(["ray", "inline"]), help="Where extraction runs."),
            click.option(
                "--set", "assignments", multiple=True, metavar="NAME=VALUE",
                help="Any setting, such as distill.epochs=30; repeatable.",
            ),
            click.option(
                "--work", default="runs", show_default=True, type=click.Path(path_type=Path),
                help="Folder for all results.",
            ),
            click.option("--force", is_flag=True, help="Run the named stage again even if it is up to date."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(provenance.version("decant-fd"), prog_name="decant")
def cli() -> None:
    """Feature distillation from a stored teacher: extract once, distill many students, fine-tune, report.

    Results lie in --work (runs/). A command starts from the settings of the one before it there, or from a preset;
    options change them.
    """


def _stage_command(name: str, command: Command) -> None:
    @cli.command(name, help=command.help)
    @_options
    def invoke(work: Path, force: bool, **options: Any) -> None:
        workspace = open_workspace(work)
        config = resolve_config(workspace, command=name, **options)
        run_stages(config, workspace, command.stages, command.stages if force else command.again)


for _name, _command in COMMANDS.items():
    _stage_command(_name, _command)


@cli.command(help="The whole path on real photographs with a real pretrained teacher, on a laptop CPU.")
@_options
def demo(work: Path, force: bool, **options: Any) -> None:
    workspace = open_workspace(work)
    options["preset"] = options["preset"] or "demo"
    options["data"] = options["data"] or str(prepare_solar_cells(work / "solar-cells"))
    console.print(f"demo: {PRESETS[options['preset']].expectation}; stop it at any time, the same command goes on")
    run_stages(resolve_config(workspace, command="demo", **options), workspace, ALL, ALL if force else ())


@cli.command(help="What a run would do, and why; nothing is run.")
@_options
def plan(work: Path, force: bool, **options: Any) -> None:
    workspace = open_workspace(work)
    config = resolve_config(workspace, command="plan", **options)
    show_plan(_make_plan(config, workspace, ALL, ALL if force else ()), ALL)


@cli.command(help="How far each precision of a teacher is from float32, and how fast it is; nothing is stored.")
@_options
def precision(work: Path, force: bool, **options: Any) -> None:
    workspace = open_workspace(work)
    config = resolve_config(workspace, command="precision", **options)
    show_precisions(_make_plan(config, workspace, (), ()))


@cli.command(help="Every store, student and result in the work folder.")
@click.option("--work", default="runs", show_default=True, type=click.Path(path_type=Path))
def status(work: Path) -> None:
    show_status(open_workspace(work))


for _store_command in STORE_COMMANDS:
    cli.add_command(_store_command)


@cli.command(help="The teachers by name: what they see and give, what they cost, their licence.")
def teachers() -> None:
    show_teachers()


def resolve_config(
    workspace: Workspace, *, command: str, preset: str | None, teacher: str | None, weights: str | None,
    data: str | None, views: int | None, layout: str | None, encoding: str | None, whitening: str | None,
    store: str | None, student: str | None, seeds: int | None, executor: str | None, assignments: tuple[str, ...],
) -> PipelineConfig:  # fmt: skip
    """Settings of a command: a preset, or the recipe of a newly named teacher, or those of the command before it; then
    the options. Where several teachers are named, the first one counts."""
    from distill.config import find_student
    from extract.resolve import identify_teacher

    named = split_teachers(teacher, command)
    for name in named:
        identify_teacher(name)
    first = named[0] if named else None
    current = load_current(workspace)
    before = PipelineConfig.checked(current, f"{workspace.current_path} (delete it to begin anew)") if current else None
    if preset:
        config = load_preset(preset)
    elif before is not None and (first is None or first in before.teachers):
        config = before.led_by(first or before.extract.teacher)
        console.print(f"settings: those of the last command here ({workspace.current_path}, preset {config.preset})")
    else:
        config = preset_for_teacher(first or "clip-b")
    if before is not None and data is None:
        config = config.model_copy(update={"data": before.data})
    changes: list[tuple[str, Any]] = [
        ("data.path", data),
        ("extract.teacher", first),
        ("extract.views", views),
        ("extract.layout", layout),
        ("extract.whitening", find_whitening(whitening).to_json() if whitening else None),
        ("extract.encoding", find_encoding(encoding).to_json() if encoding else None),
        ("distill.store", store),
        ("distill.student", find_student(student).to_json() if student else None),
        ("finetune.seeds", list(range(seeds)) if seeds is not None else None),
        ("extract.run.executor", executor),
    ]
    overrides = [(name, value) for name, value in changes if value is not None]
    config = apply_overrides(config, overrides)
    if named and command in SEVERAL:
        config = with_others(config, named)
    config = with_weights(config, weights, command)
    return apply_overrides(config, [parse_assignment(text) for text in assignments])


def run_stages(config: PipelineConfig, workspace: Workspace, stages: tuple[str, ...], again: tuple[str, ...]) -> None:
    """Plan, show the plan, run, show the results."""
    plan = _make_plan(config, workspace, stages, again)
    show_plan(plan, stages)
    write_json(workspace.current_path, config.to_json())
    results = execute(plan, stages, functools.partial(show_progress, console=console))
    show_results(plan, results)


def _make_plan(config: PipelineConfig, workspace: Workspace, stages: tuple[str, ...], again: tuple[str, ...]) -> Plan:
    """The first plan for a data set reads all of it."""
    with show_when_slow("reading images", console) as progress:
        return make_plan(config, workspace, stages, again=again, progress=progress)


def main() -> None:
    """Run a command; every error becomes one line and an exit code (0 done, 1 our bug, 2 settings or data, 3 finished
    with quarantined jobs, 4 busy, 6 damaged, 130 interrupted)."""
    errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    again = provenance.command_line()
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        context = getattr(error, "ctx", None)
        errors.print(f"then: {context.command_path if context else again} --help")
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt, click.Abort):  # click makes an Abort of a KeyboardInterrupt
        errors.print(f"\ninterrupted; everything finished so far is kept. Go on with: {again}")
        sys.exit(130)
    except DecantError as error:
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
