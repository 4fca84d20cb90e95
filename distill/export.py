"""A distilled student as a folder that other programs read: timm, Hugging Face's hub, ONNX runtimes.

The folder is written beside its place, loaded back by timm, compared with the student, and then renamed: it is whole or
not there. `export.json` in it says what it was made of and holds the digest of every file.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import timm
import torch

from distill.checkpoint import save_weights
from distill.export_folder import check_target, private_folder, publish_folder
from distill.model_card import Card, Origin
from distill.onnx import FILE as ONNX_FILE
from distill.onnx import OPSET, onnx_difference, require_onnx, write_onnx
from distill.onnx import WEIGHTS_FILE as ONNX_WEIGHTS_FILE
from distill.saved_student import SavedStudent, load_student
from distill.timm_folder import CONFIG, WEIGHTS, timm_arguments, timm_config
from distill.token_layout import find_layout, student_tokens
from storage.atomic import to_json_bytes, write_file
from storage.errors import InputError
from storage.fingerprint import digest_file
from storage.schema import Schema, Sealed

Format = Literal["timm", "onnx", "both"]
RECORD, CARD = "export.json", "README.md"
FILES = frozenset({CONFIG, WEIGHTS, ONNX_FILE, ONNX_WEIGHTS_FILE, CARD, RECORD})
_UNKNOWN = Origin()


class ExportedFile(Schema):
    num_bytes: int
    digest: str


class ExportRecord(Sealed):
    """`export.json`."""

    remedy: ClassVar[str] = "export the student again"

    student: dict[str, Any]
    facts: dict[str, str]
    """What the student's own file says of where it comes from."""
    architecture: str
    model_args: dict[str, Any]
    files: dict[str, ExportedFile]
    timm_difference: float | None
    """Largest difference between timm's tokens and the student's; None where no timm folder was asked for."""
    onnx_difference: float | None
    """The same of the ONNX graph; None where there is none, or no onnxruntime to run it."""


def export_student(
    source: Path, target: Path, *, format: Format = "timm", origin: Origin = _UNKNOWN, force: bool = False
) -> ExportRecord:
    """Write the student of a run's folder as `target`.

    Args:
        origin: what is known of it beside its own file; goes into the card.
        force: write into a folder that holds other things.

    Returns:
        What was written, as `export.json` has it.

    Raises:
        InputError: no student there; it cannot be expressed, or what was written does not give its tokens.
        DamagedError: its file cannot be read.
        ConfigError: this timm does not build it; `target` holds something else; ONNX is not installed.
    """
    check_target(target, FILES, RECORD, force=force)
    if format != "timm":
        require_onnx()
    saved = load_student(source)
    architecture, arguments = timm_arguments(saved.cfg)
    has_timm, has_onnx = format != "onnx", format != "timm"
    with private_folder(target) as folder:
        if has_timm:
            _write_timm(saved, architecture, arguments, folder)
        if has_onnx:
            write_onnx(
                saved.network, saved.cfg.input_px, folder, {"student": saved.cfg.model_dump_json()} | saved.facts
            )
        record = ExportRecord(
            student=saved.cfg.to_json(), facts=saved.facts, architecture=architecture, model_args=arguments,
            timm_difference=_timm_difference(saved, folder) if has_timm else None,
            onnx_difference=onnx_difference(saved.network, saved.cfg.input_px, folder) if has_onnx else None,
            files={},
        )  # fmt: skip
        write_file(
            folder / CARD, _card(saved, target.name, record, origin, has_timm=has_timm, has_onnx=has_onnx).encode()
        )
        files = {
            path.name: ExportedFile(num_bytes=path.stat().st_size, digest=digest_file(path))
            for path in sorted(folder.iterdir())
        }
        record = record.model_copy(update={"files": files})
        write_file(folder / RECORD, record.to_file())
        publish_folder(folder, target, FILES)
    return record


def _write_timm(saved: SavedStudent, architecture: str, arguments: dict[str, Any], folder: Path) -> None:
    facts = {"format": "pt", "student": saved.cfg.model_dump_json()} | saved.facts  # `format` is asked for by readers
    save_weights(folder / WEIGHTS, saved.network.state_dict(), facts)
    config = timm_config(saved.cfg, architecture, arguments, saved.network)
    write_file(folder / CONFIG, to_json_bytes(config))


def _timm_difference(saved: SavedStudent, folder: Path) -> float:
    """Largest difference between the student's tokens and those of what timm makes of the folder.

    Raises:
        InputError: there is one, or timm cannot read the folder.
    """
    side = saved.cfg.input_px
    images_BCHW = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    remedy = "install a newer timm, or the one that the student was made with"
    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.no_grad():
            found_BTC = student_tokens(loaded, images_BCHW)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"timm {timm.__version__} cannot read what was exported ({' '.join(str(error).split())[:200]}); {remedy}"
        ) from error
    with torch.no_grad():
        expected_BTC = student_tokens(saved.network, images_BCHW)
    difference = float((found_BTC - expected_BTC).abs().max())
    if difference != 0:
        raise InputError(
            f"timm {timm.__version__} gives other tokens for the exported student than its own, by {difference:.2g}; "
            f"{remedy}"
        )
    return difference


def _card(
    saved: SavedStudent, name: str, record: ExportRecord, origin: Origin, *, has_timm: bool, has_onnx: bool
) -> str:
    card = Card(
        name=name, architecture=record.architecture, arguments=record.model_args, input_px=saved.cfg.input_px,
        layout=find_layout(saved.network, saved.cfg.input_px, saved.cfg.label),
        num_parameters=sum(parameter.numel() for parameter in saved.network.parameters()), facts=saved.facts,
        origin=origin, has_timm=has_timm, onnx_opset=OPSET if has_onnx else None,
    )  # fmt: skip
    return card.to_markdown()
