"""A student as an ONNX graph: `images` (B, 3, H, W) to `tokens` (B, T, C), for any batch.

Written by torch's exporter from `torch.export`. Where onnxruntime is installed the graph is run on random images and
compared with the student.
"""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.token_layout import student_tokens
from storage.errors import ConfigError, InputError, first_line

FILE = "model.onnx"
WEIGHTS_FILE = f"{FILE}.data"
"""Beside it where the weights are too large for the file."""
OPSET = 18
"""The first with LayerNorm and all else that students need; runtimes since early 2023 have it."""
TOLERANCE = 1e-3
"""Between graph and student, as a share of the largest value (of 1 where that is larger)."""
_MOST_BYTES_INSIDE = 1_500_000_000
"""A file of the format can have 2 GB."""
_MODULES, _RUNTIME = ("onnx", "onnxscript"), "onnxruntime"
_INSTALL = "pip install 'decant-fd[onnx]'"


class _Tokens(nn.Module):
    """The student as a function of images alone."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return student_tokens(self.student, images)


def require_onnx() -> None:
    """Refuse before anything is written.

    Raises:
        ConfigError: a library is not installed.
    """
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"writing ONNX needs {' and '.join(missing)}, not installed here; {_INSTALL}")


def write_onnx(student: nn.Module, input_px: int, folder: Path, facts: Mapping[str, str]) -> None:
    """Write `model.onnx`, and `model.onnx.data` where the weights are large.

    Args:
        student: in evaluation mode, on the CPU.
        facts: go into the file's metadata.

    Raises:
        InputError: torch cannot express this network as a graph.
    """
    num_bytes = sum(tensor.nbytes for tensor in student.state_dict().values())
    images_BCHW = torch.zeros(2, 3, input_px, input_px)  # some versions of torch take a batch of one for a constant
    try:
        with torch.no_grad(), _single_operations(student), _quiet():
            program: Any = torch.onnx.export(
                _Tokens(student).eval(), (images_BCHW,), dynamo=True, verbose=False, opset_version=OPSET,
                input_names=["images"], output_names=["tokens"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            )  # fmt: skip
    except Exception as error:  # of many kinds, each for an operation that cannot be expressed
        raise InputError(
            f"torch {torch.__version__} cannot write this student as ONNX ({first_line(error)}); export it with "
            "FORMAT=timm, or with another version of torch"
        ) from error
    _remove_traces(program.model)
    program.model.metadata_props.update(facts)
    program.save(str(folder / FILE), external_data=num_bytes > _MOST_BYTES_INSIDE)


def onnx_difference(student: nn.Module, input_px: int, folder: Path) -> float | None:
    """The largest absolute difference between the graph's tokens and the student's, for random images in batches of one
    and three; None where onnxruntime is not installed.

    Raises:
        InputError: they are not the same.
    """
    if importlib.util.find_spec(_RUNTIME) is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in (1, 3):
        images_BCHW = torch.randn(batch_size, 3, input_px, input_px, generator=generator)
        with torch.no_grad():
            expected_BTC = student_tokens(student, images_BCHW)
        [found_BTC] = session.run(["tokens"], {"images": images_BCHW.numpy()})
        if found_BTC.shape != tuple(expected_BTC.shape):
            raise InputError(f"the ONNX graph gives {found_BTC.shape}, the student {tuple(expected_BTC.shape)}")
        difference = float((torch.from_numpy(found_BTC) - expected_BTC).abs().max())
        allowed = TOLERANCE * max(1.0, float(expected_BTC.abs().max()))
        if not difference <= allowed:  # NaN is no difference that is allowed
            raise InputError(
                f"the ONNX graph's tokens differ from the student's by {difference:.2g}, at most {allowed:.2g} is "
                "expected; export with FORMAT=timm, or with another version of torch or onnxruntime"
            )
        largest = max(largest, difference)
    return largest


@contextlib.contextmanager
def _single_operations(student: nn.Module) -> Iterator[None]:
    """torch cannot export timm's fused attention with a bias for any batch, but attention by single operations."""
    modules: list[Any] = [module for module in student.modules() if getattr(module, "fused_attn", False)]
    for module in modules:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in modules:
            module.fused_attn = True


def _remove_traces(model: Any) -> None:
    """The exporter writes down which line of which file made each node, with this machine's paths."""
    parts = [model, model.graph, *model.functions.values()]
    nodes = list(model.graph.all_nodes())
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    values += [output for node in nodes for output in node.outputs]
    for part in (*parts, *nodes, *values):
        part.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and its optimiser tell of their own affairs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
