"""A teacher is known by its tensors: every name, type, shape and value, and nothing else."""

import gc
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from extract.weights import tensor_fingerprint
from storage.fingerprint import digest_parts

State = dict[str, torch.Tensor]

MIXED: State = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
    "scalar": torch.tensor(2.5),
    "brain": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "flag": torch.tensor([True, False]),
    "nothing": torch.zeros(0, 4),
}


def test_the_fingerprint_ignores_order_and_file_format(tmp_path: Path) -> None:
    fingerprint = tensor_fingerprint(MIXED)
    assert tensor_fingerprint(dict(reversed(MIXED.items()))) == fingerprint
    assert tensor_fingerprint(safetensors.torch.load(safetensors.torch.save(MIXED))) == fingerprint
    torch.save(MIXED, tmp_path / "mixed.pth")
    assert tensor_fingerprint(torch.load(tmp_path / "mixed.pth", weights_only=True)) == fingerprint
    strided = MIXED | {"matrix": MIXED["matrix"].T.contiguous().T}
    assert not strided["matrix"].is_contiguous()
    assert tensor_fingerprint(strided) == fingerprint
    assert tensor_fingerprint(MIXED | {"matrix": nn.Parameter(MIXED["matrix"])}) == fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"matrix": torch.arange(6, dtype=torch.float32).view(2, 3).index_fill(1, torch.tensor([2]), 2.0)},
        {"matrix": torch.arange(6, dtype=torch.float32).view(3, 2)},
        {"matrix": torch.arange(6, dtype=torch.float32).view(2, 3).view(torch.int32)},
        {"scalar": torch.tensor([2.5])},
        {"scalar": torch.tensor(2.5000002)},
        {"brain": torch.tensor([1.0, 2.0], dtype=torch.float16)},
        {"brain": torch.tensor([1.0, 2.015625], dtype=torch.bfloat16)},
        {"flag": torch.tensor([True, True])},
        {"nothing": torch.zeros(4, 0)},
        {"more": torch.zeros(1)},
    ],
)
def test_the_fingerprint_changes_with_every_value_shape_and_type(change: State) -> None:
    assert tensor_fingerprint(MIXED | change) != tensor_fingerprint(MIXED)


def test_the_fingerprint_changes_with_names() -> None:
    renamed = {("vector" if name == "matrix" else name): value for name, value in MIXED.items()}
    swapped = MIXED | {"scalar": MIXED["count"], "count": MIXED["scalar"]}
    assert len({tensor_fingerprint(state) for state in (MIXED, renamed, swapped)}) == 3


def test_the_fingerprint_holds_one_tensor_at_a_time() -> None:
    """A second copy of a teacher of 3 B parameters would not fit. Its value is that of all parts at once."""
    parts = []
    for name in sorted(MIXED):
        raw = MIXED[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        parts += [f"{name} {MIXED[name].dtype} {tuple(MIXED[name].shape)}".encode(), raw]
    assert tensor_fingerprint(MIXED) == digest_parts(parts)

    class Watched(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> torch.Tensor:
            gc.collect()
            assert sum(copy() is not None for copy in copies) <= 1
            copy = torch.zeros(4)
            copies.append(weakref.ref(copy))
            return copy

    copies: list[weakref.ref[torch.Tensor]] = []
    tensor_fingerprint(Watched(dict.fromkeys("abcdef", 0)))
    assert len(copies) == 6
