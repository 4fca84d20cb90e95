"""The report stage: one self-contained HTML page with the table, the curves and the token pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipeline.config import ReportConfig
from pipeline.pictures import distill_curve, finetune_curve, token_pictures
from pipeline.tables import findings, result_rows
from pipeline.workspace import read_result
from storage.atomic import write_file
from storage.errors import InputError
from storage.fingerprint import digest_file
from storage.lock import hold_lock
from storage.stage import Progress, StageResult

TEMPLATE = Path(__file__).with_name("report_page.html")


def run(cfg: ReportConfig, inputs: Mapping[str, Path], out_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write `report.html` here and as the newest report of the work folder.

    Returns:
        Digests of the results that were read: a newer one makes the report stale.
    """
    folders = {name: folder for name, folder in inputs.items() if name != "data"}
    results = {name: _result(name, folder) for name, folder in folders.items()}
    page = render_page(cfg, results, folders).encode()
    with hold_lock(out_dir):
        write_file(out_dir / "report.html", page)
        write_file(out_dir.parent.parent / "report.html", page)
    return {
        "read_results": {name: digest_file(folder / "result.json") for name, folder in folders.items()},
        "num_bytes": len(page),
    }


def _result(name: str, folder: Path) -> StageResult:
    result = read_result(folder)
    if result is None:
        raise InputError(f"{folder} has no readable result.json; run `make {name}`")
    return result


def render_page(cfg: ReportConfig, results: Mapping[str, StageResult], folders: Mapping[str, Path]) -> str:
    """The page as text; everything it shows is inside it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    extract, distill = results["extract"].metrics, results["distill"].metrics
    return environment.from_string(TEMPLATE.read_text()).render(
        title=cfg.title,
        rows=result_rows(results),
        findings=findings(results),
        extract=extract,
        distill=distill,
        distill_config=results["distill"].config,
        extract_config=results["extract"].config,
        finetune=results["finetune"].metrics,
        distill_curve=distill_curve(distill),
        finetune_curve=finetune_curve(results["finetune"].metrics),
        pictures=token_pictures(folders["evaluate"] / "pictures.npz"),
        results=results,
    )
