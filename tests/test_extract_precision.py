"""The fast paths of a teacher against plain float32."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from extract.backends import load_teacher
from extract.precision import Agreement, compare_with_float32
from extract.sample import SampleViews
from extract.spec import TeacherSpec
from extract.teacher import Forward, Teacher, choose_precision
from extract.teachers import find_teacher
from storage.errors import ConfigError, InputError
from storage.records import ImageKey

TOY = find_teacher("toy")


def some_pixels(count: int = 6, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def sample(pixels: Tensor, batch_size: int) -> list[SampleViews]:
    return [SampleViews(part, [ImageKey("x")] * len(part)) for part in pixels.split(batch_size)]


class Recorder(nn.Module):
    """Gives its input's cells as tokens, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.batches.append(len(images_BCHW))
        cells_BTC = nn.functional.avg_pool2d(images_BCHW, 8).flatten(2).transpose(1, 2)
        return cells_BTC @ self.weight


RECORDED = TeacherSpec(name="recorded", library="python", input_px=32, patch_px=8, channels=3)


def recorded(forward: Forward | None = None) -> tuple[Teacher, Recorder]:
    module = Recorder()
    return Teacher(RECORDED, module, forward or module, torch.device("cpu")), module


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_lower_precision_is_near_float32_and_no_copy_of_it(precision: str) -> None:
    pixels = some_pixels()
    fast, exact = (load_teacher(TOY, device="cpu", precision=name) for name in (precision, "float32"))
    assert torch.equal(fast.in_float32(pixels), exact(pixels))
    assert not torch.equal(fast(pixels), exact(pixels))
    assert (fast.is_exact, exact.is_exact) == (False, True)
    assert fast(pixels).dtype == torch.float32
    assert fast.fingerprint == exact.fingerprint, "the weights are the same"


def test_the_report_has_the_mean_and_the_worst_token() -> None:
    """A teacher whose fast path is wrong for one token of one view, by a known angle."""
    teacher, module = recorded()
    pixels = some_pixels(4)

    def fast(images_BCHW: Tensor) -> Tensor:
        tokens_BTC = module(images_BCHW).clone()
        if len(tokens_BTC) > 1:
            tokens_BTC[1, 5] = tokens_BTC[1, 5].roll(1) * 7 + 3  # scale and offset are nothing to whitening
        return tokens_BTC

    teacher._fast = fast
    turned = module(
        torch.stack([(pixels[1] / 255 - torch.tensor(RECORDED.mean)) / torch.tensor(RECORDED.std)]).permute(0, 3, 1, 2)
    )[0, 5]
    centred = turned - turned.mean()
    expected = float(centred @ centred.roll(1) / (centred @ centred))
    found = compare_with_float32(teacher, sample(pixels, 4))
    assert found.num_views == 4
    assert found.worst_cosine == pytest.approx(expected, abs=1e-5)
    assert found.mean_cosine == pytest.approx((63 + expected) / 64, abs=1e-5)
    same = compare_with_float32(teacher, sample(pixels, 1))
    assert (same.mean_cosine, same.worst_cosine) == (1, 1)


def test_the_report_reads_well() -> None:
    text = str(Agreement("float16", 16, 0.9999987, 0.99981))
    assert text == (
        "float16 against plain float32 on 16 views: mean cosine of the whitened tokens 0.999999, worst token 0.999810"
    )


def test_a_bad_or_unusable_precision_is_warned_of() -> None:
    for worst in (0.98, float("nan")):
        found = Agreement("float16", 16, 0.9999, worst)
        assert not found.is_good
        assert str(found).startswith("warning: float16 against plain float32")
        assert str(found).endswith("set extract.precision=bfloat16 or float32")
    assert Agreement("float16", 1, float("nan"), float("nan")).to_json() == {
        "precision": "float16", "num_views": 1, "mean_cosine": None, "worst_cosine": None,
    }  # fmt: skip


def test_a_trained_network_survives_bfloat16() -> None:
    teacher = load_teacher(find_teacher("efficientnet-lite0").at(input_px=96), device="cpu", precision="bfloat16")
    agreement = compare_with_float32(teacher, sample(some_pixels(2, 96), 2))
    assert 0.99 < agreement.worst_cosine < agreement.mean_cosine < 1


@pytest.mark.parametrize(
    ("name", "device", "has_gpu", "expected"),
    [
        ("auto", "auto", False, "float32"),
        ("auto", "auto", True, "float16"),
        ("auto", "cpu", True, "float32"),
        ("auto", "cuda", True, "float16"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("float32", "cuda", True, "float32"),
    ],
)
def test_the_precision_that_nobody_chose(
    name: str, device: str, has_gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_precision(name, device) == expected


class Activations:
    """What a forward pass holds: a tensor that a failed attempt must not keep alive."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Tensor]] = []

    @property
    def count(self) -> int:
        return sum(reference() is not None for reference in self.alive)


def limit_memory(teacher: Teacher, module: Recorder, views: int, which: str = "_fast") -> Activations:
    """Give the teacher a device that has no memory for more views than that."""
    activations = Activations()

    def forward(images_BCHW: Tensor) -> Tensor:
        held = images_BCHW * 2
        assert activations.count == 0, "a failed attempt still holds its memory"
        activations.alive.append(weakref.ref(held))
        if len(images_BCHW) > views:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return module(held / 2)

    setattr(teacher, which, forward)
    return activations


@pytest.mark.parametrize(("views", "expected"), [(6, [6]), (3, [3, 3]), (2, [2, 2, 2]), (1, [1] * 6)])
def test_a_batch_too_large_for_the_gpu_is_done_in_parts(views: int, expected: list[int]) -> None:
    teacher, module = recorded()
    pixels = some_pixels()
    whole = teacher(pixels)
    module.batches.clear()
    activations = limit_memory(teacher, module, views)
    assert torch.equal(teacher(pixels), whole)
    assert module.batches == expected
    tries = len(activations.alive)
    assert torch.equal(teacher(pixels), whole)
    assert len(activations.alive) == tries + len(expected), "what fits is remembered"


def test_the_comparison_with_float32_is_done_in_parts_too() -> None:
    """It needs more memory than the fast path."""
    teacher, module = recorded()
    limit_memory(teacher, module, 2, "_plain")
    assert compare_with_float32(teacher, sample(some_pixels(6), 6)).num_views == 6


def test_a_gpu_too_small_for_one_view_is_said_so() -> None:
    teacher, module = recorded()
    limit_memory(teacher, module, 0)
    with pytest.raises(InputError, match=r"'recorded' does not fit into the memory of cpu with one view of 32 px"):
        teacher(some_pixels())


def test_a_compiler_that_fails_is_no_bug_of_ours() -> None:
    from torch._dynamo.exc import TorchDynamoException

    def forward(images_BCHW: Tensor) -> Tensor:
        raise TorchDynamoException("no C++ compiler\nand a long story")

    teacher, _ = recorded()
    teacher._fast = forward
    with pytest.raises(ConfigError, match=r"torch\.compile cannot make .*'recorded'.*extract\.run\.compile=false"):
        teacher(some_pixels())


def test_float32_is_float32_on_a_gpu_too() -> None:
    """torch's default for convolutions is TF32."""
    torch.backends.cudnn.allow_tf32 = True
    recorded()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_compiled_teacher_gives_the_same_tokens() -> None:
    """Needs a C++ compiler, as torch.compile does."""
    pixels = some_pixels(4)
    exact = load_teacher(TOY, device="cpu")
    compiled = load_teacher(TOY, device="cpu", is_compiled=True)
    assert not compiled.is_exact
    try:
        found = compiled(pixels)
    except ConfigError as error:
        pytest.skip(f"nothing to compile with: {error}")
    torch.testing.assert_close(found, exact(pixels), rtol=1e-4, atol=1e-4)
    assert torch.equal(compiled.in_float32(pixels), exact(pixels))


def test_the_memory_format_changes_nothing_but_rounding() -> None:
    spec, pixels = find_teacher("efficientnet-lite0").at(input_px=96), some_pixels(2, 96)
    last, first = (load_teacher(spec, device="cpu", channels_last=value)(pixels) for value in (True, False))
    torch.testing.assert_close(last, first, rtol=1e-3, atol=1e-3 * float(first.std()))
