"""Curves and token pictures for the report. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import base64
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.errors import DamagedError

COLOURS = {"distill": "#0072B2", "scratch": "#D55E00", "distilled": "#009E73"}
LABELS = {"scratch": "from scratch", "distilled": "after feature distillation"}


class TokenPicture(NamedTuple):
    """One view with its tokens as colours; data URIs of PNGs."""

    key: str
    image: str
    teacher: str
    student: str
    cosine: float
    """Mean cosine between predicted and true tokens of this view."""


def curve_svg(title: str, ylabel: str, curves: Sequence[tuple[str, str, Sequence[Mapping[str, float]]]]) -> str:
    """Loss against step, as inline SVG. `curves`: label, colour, history."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "decant", "font.family": "sans-serif", "font.size": 10}
    ):
        figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
        seen = set()
        for label, colour, history in curves:
            steps = [point["step"] for point in history]
            losses = [point["loss"] for point in history]
            axes.plot(steps, losses, color=colour, linewidth=1.4, label=None if label in seen else label)
            seen.add(label)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if len(seen) > 1:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def distill_curve(metrics: Mapping[str, Any]) -> str:
    return curve_svg(
        "Distillation", "smooth L1 on whitened tokens", [("student", COLOURS["distill"], metrics["history"])]
    )


def finetune_curve(metrics: Mapping[str, Any]) -> str:
    curves = [(LABELS[m["start"]], COLOURS[m["start"]], m["history"]) for m in metrics["members"]]
    return curve_svg("Fine-tuning, each seed", "training loss", curves)


def token_pictures(path: Path) -> list[TokenPicture]:
    """Views beside the first three principal components of the tokens: the teacher's components, for both.

    Raises:
        DamagedError: the file is not what the evaluation stage writes.
    """
    if not path.exists():
        return []
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        grid_hw = tuple(int(side) for side in arrays["grid_hw"])
        teacher_BTC, student_BTC = (arrays[name].astype(np.float32) for name in ("teacher_BTC", "student_BTC"))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedError(f"{path} cannot be read ({error}); run `make evaluate`") from error
    teacher_BT3, student_BT3 = principal_colours(teacher_BTC, student_BTC)
    return [
        TokenPicture(
            str(key), _data_uri(image), _data_uri(teacher.reshape(*grid_hw, 3)),
            _data_uri(student.reshape(*grid_hw, 3)), _mean_cosine(teacher_TC, student_TC),
        )
        for key, image, teacher, student, teacher_TC, student_TC in zip(
            arrays["keys"], arrays["images_BHWC"], teacher_BT3, student_BT3, teacher_BTC, student_BTC, strict=True
        )
    ]  # fmt: skip


def principal_colours(
    teacher_BTC: NDArray[np.float32], student_BTC: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Project both on the teacher's first three principal components; one colour scale for all, (B, T, 3) uint8."""
    flat = teacher_BTC.reshape(-1, teacher_BTC.shape[-1])
    mean = flat.mean(0)
    _, _, directions = np.linalg.svd(flat - mean, full_matrices=False)
    basis = directions[:3]
    teacher, student = ((tokens - mean) @ basis.T for tokens in (teacher_BTC, student_BTC))
    low, high = np.percentile(teacher.reshape(-1, len(basis)), [2, 98], axis=0)
    scaled = [np.clip((part - low) / np.maximum(high - low, 1e-6), 0, 1) for part in (teacher, student)]
    padded = [np.pad(part, ((0, 0), (0, 0), (0, 3 - len(basis)))) for part in scaled]
    teacher_colours, student_colours = ((255 * part).round().astype(np.uint8) for part in padded)
    return teacher_colours, student_colours


def _mean_cosine(first_TC: NDArray[np.float32], second_TC: NDArray[np.float32]) -> float:
    norms = np.linalg.norm(first_TC, axis=1) * np.linalg.norm(second_TC, axis=1)
    return float(((first_TC * second_TC).sum(1) / np.maximum(norms, 1e-9)).mean())


def _data_uri(pixels_HWC: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
