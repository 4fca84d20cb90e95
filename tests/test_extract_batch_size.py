"""The batch size that nobody chose."""

import pytest
import torch

from extract import batch_size
from extract.backends import load_teacher
from extract.batch_size import choose_batch_size, fitting
from extract.teachers import find_teacher

GB = 10**9


@pytest.mark.parametrize(
    ("free_bytes", "view_bytes", "most", "expected"),
    [
        (10 * GB, GB, 32, 4),  # seven tenths of the memory, rounded down to a power of two
        (100 * GB, GB, 512, 64),
        (100 * GB, GB, 32, 32),
        (100 * GB, 1, 512, 512),
        (GB, GB, 32, 1),  # nothing fits: one is tried, and refused by the device itself
        (0, GB, 32, 1),
        (10 * GB, 0, 32, 32),
    ],
)
def test_it_fits_into_the_free_memory(free_bytes: int, view_bytes: int, most: int, expected: int) -> None:
    assert fitting(free_bytes, view_bytes, most) == expected


def test_what_a_user_says_holds() -> None:
    assert choose_batch_size(load_teacher(find_teacher("toy"), device="cpu"), 7) == 7


def test_a_cpu_takes_fewer_views_of_a_larger_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_teacher(find_teacher("toy"), device="cpu")
    assert choose_batch_size(small) == 32
    monkeypatch.setattr(batch_size, "free_memory_bytes", lambda: GB // 100)
    # 24 copies of 3 x 32 x 32 float32 values are 295 kB; 7 MB hold 23 views
    assert choose_batch_size(small) == 16


def test_a_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose forward pass takes 2 GB, and 1 GB more for each view."""
    teacher = load_teacher(find_teacher("toy"), device="cpu")
    seen: list[int] = []
    forward = teacher._fast
    monkeypatch.setattr(teacher, "_fast", lambda images: (seen.append(len(images)), forward(images))[1])

    class Gpu:
        type = "cuda"

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (2 + seen[-1]) * GB)
    real = teacher.device

    def measured(given: object) -> int:
        teacher.device = real
        try:
            return batch_size_of(given)
        finally:
            teacher.device = Gpu()  # type: ignore[assignment]

    batch_size_of = batch_size._measured_view_bytes
    monkeypatch.setattr(batch_size, "_measured_view_bytes", measured)
    teacher.device = Gpu()  # type: ignore[assignment]
    assert choose_batch_size(teacher) == 32  # 42 views of 1 GB
    assert seen == [1, 5]


def test_a_hierarchical_teacher_is_judged_by_its_first_stage() -> None:
    """224 px in patches of 4 and 64 channels are 200,704 values, more than the image's or the last stage's."""
    teacher = load_teacher(find_teacher("toy"), device="cpu")
    flat = batch_size._estimated_view_bytes(teacher)
    teacher.spec = teacher.spec.model_copy(update={"stage_channels": (64, 24), "input_px": 224})
    assert batch_size._estimated_view_bytes(teacher) == 4 * 24 * (224 // 4) ** 2 * 64 > flat
