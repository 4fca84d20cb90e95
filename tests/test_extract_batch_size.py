"""The batch size that nobody chose."""

import pytest
import torch

from extract import batch_size
from extract.backends import load_teacher
from extract.batch_size import choose_batch_size, fitting
from extract.teacher import Teacher
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


class Gpu:
    """A device of 80 GB whose forward pass takes 2 GB, and 1 GB more for each view; what it took is kept for later,
    as torch's allocator does."""

    type = "cuda"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, teacher: Teacher, fits: int = 80) -> None:
        self.peak, self.kept, self.fits = 0, 70 * GB, fits
        self.forward, self.teacher = teacher._fast, teacher
        self.seen: list[int] = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GB - self.kept, 80 * GB))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "peak", 0))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "kept", 2 * GB))
        monkeypatch.setattr(teacher, "_fast", self.run)
        monkeypatch.setattr(teacher, "_tokens", lambda pixels, forward, precision: forward(pixels))
        teacher.device = self  # type: ignore[assignment]

    def run(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(pixels))
        if len(pixels) > self.fits:
            raise torch.OutOfMemoryError
        self.peak = max(self.peak, (2 + len(pixels)) * GB)
        return torch.zeros(len(pixels), *self.teacher.features.shape_TC)


def test_a_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(find_teacher("toy"), device="cpu")
    gpu = Gpu(monkeypatch, teacher)
    assert choose_batch_size(teacher) == 32, "seven tenths of 78 GB hold 54 views; kept memory is free memory"
    assert gpu.seen == [1, 5]


def test_a_gpu_that_is_nearly_full_is_not_overrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the five views at a time take no more than two: that says nothing about one view."""
    teacher = load_teacher(find_teacher("toy"), device="cpu")
    Gpu(monkeypatch, teacher, fits=3)
    assert choose_batch_size(teacher) == 2
    assert teacher.most_views == 3


def test_workers_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(find_teacher("toy"), device="cpu")
    monkeypatch.setattr(batch_size, "free_memory_bytes", lambda: GB // 100)
    assert [choose_batch_size(teacher, sharers=count) for count in (1, 2, 8)] == [16, 8, 2]


def test_attention_outweighs_all_else_with_many_tokens() -> None:
    """SAM at 1024 px: 4096 tokens, 12 heads."""
    teacher = load_teacher(find_teacher("toy"), device="cpu")
    teacher.features = find_teacher("sam-b").feature_spec()
    assert batch_size._estimated_view_bytes(teacher) == 2 * 4 * 12 * 4096**2


def test_a_hierarchical_teacher_is_judged_by_its_first_stage() -> None:
    """224 px in patches of 4 and 64 channels are 200,704 values, more than the image's or the last stage's."""
    teacher = load_teacher(find_teacher("toy"), device="cpu")
    flat = batch_size._estimated_view_bytes(teacher)
    teacher.spec = teacher.spec.model_copy(update={"stage_channels": (64, 24), "input_px": 224})
    assert batch_size._estimated_view_bytes(teacher) == 4 * 24 * (224 // 4) ** 2 * 64 > flat
