"""Checkpoints: tensors as safetensors, then a small JSON with their digest that makes the checkpoint exist.

The newest valid one wins; a damaged one is passed over, loudly. Nothing is ever unpickled.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import safetensors.torch
import torch

from storage.atomic import (
    make_folder,
    open_regular,
    private_name,
    publish,
    read_regular,
    remove_tree,
    write_file,
    write_private,
)
from storage.errors import DamagedError, DiskError
from storage.fingerprint import digest_bytes, digest_file
from storage.schema import Sealed

KEEP = 2


class CheckpointHead(Sealed):
    """The commit of a checkpoint."""

    remedy: ClassVar[str] = "an earlier one serves"

    step: int
    run_digest: str
    """Of everything that must be the same to go on: settings and inputs."""
    facts: dict[str, Any]
    tensors_digest: str


class Checkpoint(NamedTuple):
    step: int
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], run_digest: str, facts: Mapping[str, Any]
) -> None:
    """Save the state after `step` steps and drop all but the newest two, and what killed writers left.

    Raises:
        DiskError: the folder cannot be written to, or something else is in its place.
    """
    make_folder(folder)
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    data = safetensors.torch.save(dict(tensors))
    path = folder / f"step-{step:08d}.safetensors"
    for place in (path, path.with_suffix(".json")):
        if place.is_dir():  # nothing takes the place of a folder
            remove_tree(place)
    private = private_name(path)
    try:
        write_private(private, data)
        publish(private, path)
    finally:
        private.unlink(missing_ok=True)
    head = CheckpointHead(step=step, run_digest=run_digest, facts=dict(facts), tensors_digest=digest_bytes(data))
    write_file(path.with_suffix(".json"), head.to_file())
    heads = sorted(folder.glob("step-*.json"))
    kept = [head for head in heads if head.stem <= path.stem][-KEEP:]  # later steps are another run's, or damaged
    for old in heads:
        if old not in kept:
            _remove(old)
            _remove(old.with_suffix(".safetensors"))


def _remove(path: Path) -> None:
    """Whatever is there: a damaged checkpoint may be anything."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def load_checkpoint(
    folder: Path, run_digest: str, say: Callable[[str], None], *, at: int | None = None
) -> Checkpoint | None:
    """The newest valid checkpoint of this very run; None when there is none.

    Args:
        at: only that of this step.
    """
    for head_path in sorted(folder.glob("step-*.json"), reverse=True):
        tensors_path = head_path.with_suffix(".safetensors")
        try:
            head = CheckpointHead.from_file(head_path, read_regular(head_path))
            os.close(open_regular(tensors_path))  # a pipe in its place would be waited for
            if digest_file(tensors_path) != head.tensors_digest:
                raise DamagedError(f"{tensors_path.name} is not what was saved")
            if head.run_digest == run_digest and at in (None, head.step):
                return Checkpoint(head.step, head.facts, safetensors.torch.load_file(tensors_path))
        except (DamagedError, DiskError, OSError, safetensors.SafetensorError) as error:
            say(f"checkpoint {head_path.name} is damaged ({error}); falling back to the one before")
    return None


def save_weights(path: Path, state: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> None:
    """Publish weights as safetensors; `facts` go into its header."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_file(path, _sort_facts(safetensors.torch.save(tensors, dict(facts))))


def _sort_facts(data: bytes) -> bytes:
    """safetensors writes facts in an order that changes from call to call; equal weights shall be equal files."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[end:]


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read weights that a stage published.

    Raises:
        DamagedError: missing or not safetensors.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DamagedError(f"{path} cannot be read ({error}); run the stage that writes it again") from error


def load_facts(path: Path) -> dict[str, str]:
    """The facts in the header of such a file.

    Raises:
        DamagedError: missing or not safetensors.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise DamagedError(f"{path} cannot be read ({error}); run the stage that writes it again") from error


def remove_checkpoints(folder: Path) -> None:
    """A finished run needs none."""
    remove_tree(folder)
