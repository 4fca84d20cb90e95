"""How many views, which encoding? Students of EfficientNet-Lite0 on any data set of photographs, by this project's own
commands: one row a kind of store, some seeds each, and the teacher in the loop as the control.

    make experiments DATA=<folder of class folders>

Rows that are done are kept, as every stage is, so a run that was stopped goes on.
"""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from distill.checkpoint import load_weights
from distill.student import DistillModel
from finetune.config import EvaluateConfig
from finetune.evaluate import compare_tokens
from finetune.features import pool_student
from finetune.linear_probe import linear_probe
from finetune.run import student_shape
from storage.image_index import ImageIndex, load_index
from storage.reader import open_store

ROOT = Path(__file__).parents[2]
WORKERS = ("--executor", "process")
EPOCHS = 16
SETTINGS = (
    "extract.input_px=96", 'distill.student={"kind":"timm","model":"tf_mobilenetv3_small_minimal_100","input_px":96}',
    f"distill.epochs={EPOCHS}", "distill.batch_size=32", "distill.optim.base_lr=0.064",
    "distill.optim.warmup_epochs=1", "extract.run.audit_records=0", "distill.run.trackers=[]",
    "distill.run.threads=1", "evaluate.run.threads=1",
)  # fmt: skip
"""On top of the preset `demo`. The student is a convolutional network, which learns something from a thousand images; a
ViT of the demo's size came no further than a cosine of 0.35 with its teacher in the same time, whatever the store."""


class Kind(NamedTuple):
    """One row of the table."""

    name: str
    views: int
    options: tuple[str, ...] = ()
    group: str = "views"

    @property
    def is_online(self) -> bool:
        return "--online" in self.options


KINDS = (
    Kind("1 view", 1),
    Kind("2 views", 2),
    Kind("4 views", 4),
    Kind("8 views", 8),
    Kind(f"online, {EPOCHS} views", EPOCHS, ("--online",)),
    Kind("2 views, fp16", 2, group="bytes"),
    Kind("4 views, int8", 4, ("--encoding", "int8"), "bytes"),
    Kind("8 views, fp16, 25% of the tokens (3 of 9)", 8, ("--set", "extract.token_fraction=0.25"), "bytes"),
)


class Found(NamedTuple):
    """What the seeds of one row gave."""

    name: str
    group: str
    command: str
    bytes_per_image: int
    """In the store; 0 without one."""
    accuracies: tuple[float, ...]
    """Of a linear probe on the student's frozen features, on the images that are held out."""
    cosines: tuple[float, ...]
    """Between the student's tokens and the teacher's, on those images."""


def settings_of(kind: Kind, seed: int) -> list[str]:
    """The options of a row's commands."""
    texts = [*SETTINGS, f"distill.seed={seed}"]
    return [
        "--preset",
        "demo",
        "--views",
        str(kind.views),
        *kind.options,
        *(w for text in texts for w in ("--set", text)),
    ]


def decant(command: str, options: Sequence[str], data: str, work: Path) -> str:
    """Run a command of the project; returns what it printed.

    Raises:
        CalledProcessError: it failed; its words are on the screen.
    """
    words = [sys.executable, "-m", "pipeline", command, "--data", data, "--work", str(work), *options]
    return subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def folder_of(stage: str, printed: str) -> Path:
    """Where a command says that its result lies."""
    (line,) = [line for line in printed.splitlines() if re.match(rf"{stage}: .* \([0-9a-f]+\)$", line)]
    return Path(line.removeprefix(f"{stage}: ").rpartition(" (")[0])


def measure(data: str, work: Path, seeds: int, say: Callable[[str], None]) -> list[Found]:
    """All rows; students are trained two at a time."""
    stores: dict[Kind, Path] = {}
    for kind in KINDS:
        if not kind.is_online:
            stores[kind] = folder_of("extract", decant("extract", [*settings_of(kind, 0), *WORKERS], data, work))
            say(f"{kind.name}: the store")
    first = [*settings_of(KINDS[0], 0), *WORKERS]
    decant("distill", first, data, work)
    decant("evaluate", first, data, work)  # makes the store of the held-out images, and probes the teacher
    (eval_store,) = (work / "stores").glob("*-eval-*/manifest.json")
    (index,) = (load_index(path) for path in (work / "data").glob("*"))
    probe = Probe(stores[KINDS[0]], eval_store.parent, index)
    found: dict[Kind, list[tuple[float, float]]] = {kind: [] for kind in KINDS}

    def train(job: tuple[int, Kind]) -> None:
        seed, kind = job
        folder = folder_of("distill", decant("distill", settings_of(kind, seed), data, work))
        accuracy, cosine = probe(folder)
        found[kind].append((accuracy, cosine))
        say(f"{kind.name}, seed {seed}: accuracy {accuracy:.1%}, cosine {cosine:.3f}")

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(train, itertools.product(range(seeds), KINDS)))
    return [
        Found(
            kind.name, kind.group, " ".join(row_command(kind)),
            open_store(stores[kind]).manifest.num_bytes // len(index.split("train")) if kind in stores else 0,
            *(tuple(values) for values in zip(*found[kind], strict=True)),
        )
        for kind in KINDS
    ]  # fmt: skip


class Probe:
    """Judges students by the same views of the same images, whatever they were trained on."""

    def __init__(self, train_store: Path, eval_store: Path, index: ImageIndex) -> None:
        self.parts = [
            (open_store(train_store), index.split("train")), (open_store(eval_store), index.split("eval"))
        ]  # fmt: skip

    def __call__(self, folder: Path) -> tuple[float, float]:
        """Accuracy of a linear probe on the mean tokens, and mean cosine with the teacher's tokens; held-out images."""
        cfg, device = EvaluateConfig(), torch.device("cpu")
        torch.set_num_threads(1)
        shape = student_shape(folder / "student.safetensors")
        model = DistillModel(shape, [self.parts[1][0].plan.features], drop_path=0.0)
        model.student.load_state_dict(load_weights(folder / "student.safetensors"))
        model.projectors.load_state_dict(load_weights(folder / "projector.safetensors"))
        model.eval()
        pooled = [pool_student(model, store, images, shape.input_px, device) for store, images in self.parts]
        result = linear_probe(*pooled, penalties=cfg.penalties, iterations=cfg.iterations, seed=0)
        distance = compare_tokens(model, *self.parts[1], shape.input_px, device)
        return result.accuracy, distance["cosine"]


def row_command(kind: Kind) -> list[str]:
    """What makes a row's students, as a user would give it."""
    words = " ".join(kind.options)
    for option, variable in (("--online", "ONLINE=1"), ("--encoding ", "ENCODING="), ("--set ", "SET=")):
        words = words.replace(option, variable)
    return ["make", "distill" if kind.is_online else "extract distill", f"VIEWS={kind.views}", *words.split()]
