"""A teacher's row of data to a frozen module that gives its tokens. One builder a library."""

import importlib

import torch

from extract.built import Built
from extract.hub import fetch_weights
from extract.spec import TeacherSpec
from extract.teacher import Teacher, choose_device, choose_devices
from extract.weights import WeightsSource, load_weights_file, locate_weights
from storage.errors import ConfigError, DecantError, first_line

BUILDERS = {
    "timm": "extract.timm_teachers",
    "open_clip": "extract.open_clip_teachers",
    "python": "extract.file_teachers",
    "toy": "extract.toy",
}
"""Modules with a `build(spec)`; a library is imported only when one of its teachers is asked for."""


def load_teacher(
    spec: TeacherSpec, *, weights: WeightsSource | None = None, device: str = "auto", precision: str = "float32",
    is_compiled: bool = False, channels_last: bool = True, gpus: int = 1,
) -> Teacher:  # fmt: skip
    """Build a teacher and fill in its weights.

    Args:
        spec: with the wanted input size and tap (`TeacherSpec.at`); position embeddings are resampled.
        weights: a local file instead of the row's own source, or `random`.
        gpus: that the network is spread over, where one has no memory for it.

    Raises:
        InputError: weights that cannot be had or do not fit.
        ConfigError: no such device, tap or block; no such weights; a network that the library cannot build so.
    """
    path = locate_weights(spec, weights)
    if path is None and weights is None and spec.weights.startswith("hub"):
        path = fetch_weights(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same everywhere
        built = _build(spec)
    if path is not None:
        load_weights_file(built.module, spec, path, built.fit)
    found = choose_device(device)
    return Teacher(
        spec, built.module, built.forward, found, precision=precision, is_compiled=is_compiled,
        channels_last=channels_last, devices=choose_devices(found, gpus),
    )  # fmt: skip


def _build(spec: TeacherSpec) -> Built:
    """Run a library's builder; its many ways to say that something does not fit together become one."""
    try:
        built: Built = importlib.import_module(BUILDERS[spec.library]).build(spec)
        return built
    except DecantError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{spec.library} cannot build {spec.model} of teacher {spec.name!r} at {spec.input_px} px: "
            f"{first_line(error)}"
        ) from error
