"""A report as text for the terminal and as Markdown for the documentation."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.bench.results import Report, Row, Section

PACKAGES = (
    "numpy", "zarr", "numcodecs", "crc32c", "blake3", "simplejpeg", "cykooz-resizer", "torch", "torchvision", "timm",
    "pillow", "ray", "tensorstore", "webdataset", "lmdb", "h5py", "safetensors", "pyarrow",
)  # fmt: skip


def describe_machine() -> dict[str, str]:
    """What the numbers were made on."""
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory[0] / 2**20:.0f} GiB" if memory else "unknown",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f} when it began",
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def installed_versions() -> dict[str, str]:
    """Versions of all libraries that take part."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def as_text(report: Report) -> str:
    """The table for a terminal."""
    lines = [", ".join(f"{name} {value}" for name, value in {**report.machine, **report.versions}.items())]
    for section in report.sections:
        lines += ["", section.title, f"  {section.method}"]
        width = max(len(row.what) for row in section.rows) + 2
        for row in section.rows:
            cells = f"{value_cell(row):>22}  {ratio_cell(row):>7}  {target_cell(row):<16}"
            lines.append(f"  {row.what:<{width}}{cells}  {remark(section, row)}".rstrip())
    return "\n".join(lines)


def as_markdown(report: Report) -> str:
    """The tables for `docs/benchmarks.md`."""
    machine = "; ".join(f"{name}: {value}" for name, value in report.machine.items())
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    lines = [f"Machine: {machine}.", "", f"Versions: {versions}."]
    for section in report.sections:
        lines += ["", f"### {section.title}", "", section.method[0].upper() + section.method[1:] + ".", ""]
        lines += ["| | measured | ratio | aim | |", "|---|---:|---:|---|---|"]
        for row in section.rows:
            name = f"**{row.what}**" if row.role == "ours" else row.what
            cells = [name, value_cell(row), ratio_cell(row), target_cell(row), remark(section, row)]
            lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    winners = [
        f"{row.what} ({section.title.lower()})" for section in report.sections for row in section.winning_peers()
    ]
    lines += ["", "Peers that are ahead of this store: " + ("; ".join(winners) if winners else "none") + "."]
    return "\n".join(lines)


def value_cell(row: Row) -> str:
    if row.value is None:
        return "not installed"
    digits = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}"
    if 0.99 < row.value < 1:
        digits = f"{row.value:.5f}"
    return f"{digits} {row.unit}".strip()


def ratio_cell(row: Row) -> str:
    if row.ratio is None:
        return ""
    return f"{row.ratio:.3f}" if row.ratio < 0.1 or row.is_less_better else f"{row.ratio:.2f}"


def target_cell(row: Row) -> str:
    if row.target is None:
        return ""
    return f"{'<=' if row.is_less_better else '>='} {row.target:g} {'met' if row.is_met else 'MISSED'}"


def remark(section: Section, row: Row) -> str:
    """The limit is named as such, and so is a peer that is ahead of us."""
    marks = ["the limit"] if row.role == "limit" else []
    if row in section.winning_peers():
        marks.append("AHEAD OF US")
    if row.note and row.value is not None:
        marks.append(row.note)
    return "; ".join(marks)
