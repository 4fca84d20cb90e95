"""The commands about students outside of this program: export, import."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from extract.teachers import TEACHERS
from pipeline import provenance
from pipeline.progress import show_when_slow
from pipeline.screen import console
from pipeline.stages import STAGES
from pipeline.workspace import Workspace, find_damage, read_result
from storage.errors import DamagedError, DecantError, InputError
from storage.files import LocalFiles
from storage.fingerprint import digest_file, short
from storage.reader import load_manifest

_FORCE = click.option("--force", is_flag=True, help="Also into a folder that holds other files, which stay.")


@click.command(help="Write the student of the folder SOURCE as TARGET, for timm, Hugging Face's hub and ONNX runtimes.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--format", type=click.Choice(["timm", "onnx", "both"]), default="timm", show_default=True,
    help="What other programs read: timm and the hub, ONNX runtimes, or all of them.",
)  # fmt: skip
@_FORCE
def export(source: Path, target: Path, format: str, force: bool) -> None:
    saved_student = importlib.import_module("distill.saved_student")
    exporting = importlib.import_module("distill.export")
    _refuse_damaged(source)
    facts = saved_student.load_student_facts(source)
    with show_when_slow("export", console) as progress:
        progress.start(1, "students")
        record = exporting.export_student(
            source, target, format=format, origin=_origin(source, facts, exporting.Origin), force=force
        )
    for name, file in record.files.items():
        console.print(f"  {name}  {file.num_bytes:,} bytes  {short(file.digest)}")
    console.print(f"{target}: {record.architecture}, {_checked(record, format)}", soft_wrap=True)


def _checked(record: Any, format: str) -> str:
    """What is known of the files' tokens."""
    told = []
    if format != "onnx":
        told.append("timm reads it and gives the student's tokens exactly")
    if format != "timm" and record.onnx_difference is None:
        told.append("the ONNX graph was not run, because onnxruntime is not installed")
    elif format != "timm":
        told.append(f"the ONNX graph's tokens differ from the student's by at most {record.onnx_difference:.1e}")
    return "; ".join(told)


def _refuse_damaged(source: Path) -> None:
    """
    Raises:
        DamagedError: a run's student is not what the run wrote.
    """
    result = read_result(source)
    damage = find_damage(STAGES["distill"], source, result) if result and result.stage == "distill" else ""
    if damage:
        raise DamagedError(f"{source}: {damage.partition(';')[0]}; run `make distill FORCE=1`")


def _origin(source: Path, facts: Mapping[str, str], origin: Any) -> Any:
    """What the work folder around a run tells of its teacher."""
    teacher = facts.get("teacher") or _teacher_of(Workspace(source.absolute().parent.parent), facts.get("store", ""))
    spec = TEACHERS.get(teacher)
    libraries = ", ".join(f"{name} {provenance.version(name)}" for name in ("timm", "torch"))
    return origin(
        teacher=teacher,
        licence=spec.licence if spec else "",
        made_with=f"Decant {provenance.code_version()}, {libraries}",
    )


def _teacher_of(workspace: Workspace, fingerprint: str) -> str:
    """The teacher of the store with this fingerprint; empty where no such store lies there."""
    for folder in workspace.stores():
        try:
            manifest = load_manifest(LocalFiles(folder), allow_unfinished=True)
        except DecantError:  # another store's trouble
            continue
        if manifest.fingerprint == fingerprint:
            return manifest.plan.features.teacher
    return ""


@click.command(
    "import", help="Read SOURCE, a checkpoint of the paper's authors, as a student, and write it as the folder TARGET."
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--teacher", default="", help="What it was distilled from, such as clip-b; for the record.")
@_FORCE
def import_(source: Path, target: Path, teacher: str, force: bool) -> None:
    checkpoints = importlib.import_module("extract.checkpoints")
    importing = importlib.import_module("distill.importing")
    if not source.is_file():
        found = "a folder" if source.exists() else "not there"
        raise InputError(
            f"{source} is {found}, expected a checkpoint of the paper's authors, such as the distilled models that "
            "their README.md links"
        )
    with show_when_slow("import", console) as progress:
        progress.start(1, "files")
        facts = {"converted_from": source.name, "digest_of_that_file": digest_file(source)}
        student = importing.import_student(
            checkpoints.read_checkpoint(source), target, facts | ({"teacher": teacher} if teacher else {}), force=force
        )
    console.print(f"{target}: {student.label} at {student.input_px} px, from {source.name}", soft_wrap=True)


COMMANDS = (export, import_)
