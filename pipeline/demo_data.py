"""The demo's photographs as a folder of class folders, such as any user has.

They are the 2,624 photographs of solar cells of the package `elpv-dataset` (Buerhop-Lutz et al. 2018, Deitsch et al.
2021; CC BY-NC-SA 4.0), each with a defect probability of 0, 1/3, 2/3 or 1 given by an expert.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from storage.atomic import disk_errors, private_name, remove_tree
from storage.errors import DamagedError, InputError

DEFECTIVE_FROM = 0.5
"""Defect probability from which a cell counts as defective."""


def prepare_solar_cells(target: Path) -> Path:
    """Make `target/functional` and `target/defective` from the package, once.

    Raises:
        InputError: the package is not installed.
        DamagedError: the package's list of images is not what it should be.
    """
    if target.exists():
        return target
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or found.origin is None:
        raise InputError(
            "the demo's photographs come with the package elpv-dataset: `pip install elpv-dataset`, or `make setup`"
        )
    source = Path(found.origin).parent / "data"
    private = private_name(target)
    try:
        with disk_errors(target, 100_000_000):
            for name in ("functional", "defective"):
                (private / name).mkdir(parents=True)
            for file, probability in _labels(source / "labels.csv"):
                folder = "defective" if probability >= DEFECTIVE_FROM else "functional"
                shutil.copyfile(source / file, private / folder / Path(file).name)
            os.rename(private, target)
    finally:
        remove_tree(private)
    return target


def _labels(path: Path) -> list[tuple[str, float]]:
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    try:
        return [(file, float(probability)) for file, probability, *_ in rows]
    except ValueError as error:
        raise DamagedError(
            f"{path} is not a list of <file> <probability> <type> ({error}); reinstall elpv-dataset"
        ) from error
