"""How many views, which encoding: see experiments.py.

    make experiments DATA=<folder of class folders> [SEEDS=3] [DOCS=1]

With DOCS=1 the tables and the picture go into docs/experiments.md.
"""

import json
import os
import time
from pathlib import Path

import pytest

from tests.bench.experiments import measure
from tests.bench.experiments_page import as_markdown, draw, write_page
from tests.bench.report import describe_machine, installed_versions


@pytest.mark.timeout(0)
def test_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.environ.get("BENCH_FOLDER", "runs/experiments"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(what: str) -> None:
        with capsys.disabled():
            print(f"experiments: {time.monotonic() - started:5.0f} s  {what}", flush=True)

    found = measure(os.environ["BENCH_DATA"], folder, int(os.environ.get("BENCH_SEEDS") or 3), say)
    (folder / "experiments.json").write_text(json.dumps([each._asdict() for each in found], indent=1))
    machine, versions = describe_machine(), installed_versions()
    where = f"{machine['cores']} cores ({machine['cpu']}); torch {versions['torch']}, timm {versions['timm']}."
    draw(found, folder / "experiments.png")
    if os.environ.get("BENCH_DOCS"):
        write_page(found, where)
    say(f"{folder}/experiments.json, {folder}/experiments.png\n\n{as_markdown(found, where)}")
