"""The table of teachers as text: one line a teacher where the screen is wide enough, or where nobody looks."""

from collections.abc import Iterable, Iterator

from extract.resolve import HOW_TO_NAME_OTHERS
from extract.spec import TeacherSpec

_DETAILS = ("licence", "weights", "model")
_HEADINGS = ("", "teacher", "px", "grid", "prefix", "channels", "params", "GFLOP", "kB a view", *_DETAILS)
_IS_NUMBER = tuple(2 <= number < 9 for number in range(len(_HEADINGS)))
_SOURCES = {"hub": "hub", "package": "package", "file": "your file", "random": "seed"}


def teacher_lines(specs: Iterable[TeacherSpec], width: int | None) -> Iterator[str]:
    """The teachers in columns, the paper's marked.

    Args:
        width: columns of the screen; where licence, weights and model do not fit in, they have a line of their own.
            None: any width.
    """
    specs = list(specs)
    rows = [_HEADINGS, *(_cells(spec) for spec in specs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_wide = width is None or sum(widths) + 2 * (len(widths) - 1) <= width
    for row in rows:
        aligned = zip(row, widths, _IS_NUMBER, strict=True)
        cells = [cell.rjust(size) if is_number else cell.ljust(size) for cell, size, is_number in aligned]
        if is_wide:
            yield "  ".join(cells).rstrip()
        else:
            yield "  ".join(cells[: -len(_DETAILS)]).rstrip()
            yield "     " + ", ".join(row[-len(_DETAILS) :])
    yield ""
    yield "* the paper's. prefix: CLS and registers. GFLOP: a view's forward pass. kB: a view's tokens in fp16."
    yield "your file: on no hub; WEIGHTS=<file> is yours, WEIGHTS=random shows what such a teacher costs."
    yield f"Others: TEACHER={HOW_TO_NAME_OTHERS}, a Python file of your own."


def _cells(spec: TeacherSpec) -> tuple[str, ...]:
    features = spec.feature_spec()
    return (
        "*" if spec.paper else "", spec.name, str(spec.input_px), "x".join(map(str, features.grid_hw)),
        str(spec.num_prefix_tokens), str(spec.channels), f"{_short(spec.million_parameters)} M", _short(spec.gflops),
        f"{features.record_bytes / 1000:,.0f}", spec.licence, _SOURCES[spec.weights.partition(":")[0]], _model(spec),
    )  # fmt: skip


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _model(spec: TeacherSpec) -> str:
    """As `--teacher` takes it."""
    tag = spec.weights.partition(":")[2]
    return f"{spec.library}:{spec.model}" + (f"/{tag}" if spec.library == "open_clip" else "")
