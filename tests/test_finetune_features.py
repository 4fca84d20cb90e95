"""Pooled features and the comparison with the teacher, against the teacher itself and against plain loops."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from distill.student import DistillModel, normalise_images
from distill.student_config import find_student
from extract import run as extraction
from extract.backends import load_teacher
from extract.config import ExecutionConfig, ExtractConfig
from extract.teachers import find_teacher
from finetune import features
from finetune.evaluate import compare_tokens
from finetune.features import iter_views, pool_student, pool_teacher
from storage.errors import InputError
from storage.image_index import ImageList
from storage.reader import FeatureReader, open_store
from storage.stage import Interrupted, StopRequest
from storage.views import Renderer

CPU = torch.device("cpu")


class Stored(NamedTuple):
    """A store of the toy teacher, and its images."""

    reader: FeatureReader
    images: ImageList


@pytest.fixture
def stored(make_images: Callable[..., Path], make_index: Callable[..., object], tmp_path: Path) -> Stored:
    """Eight images in three views each; one image is unusable."""
    root = make_images(per_class=4)
    (root / "dark" / "002.png").write_bytes(b"no picture")
    path, index = make_index(root, eval_fraction=0.0)
    cfg = ExtractConfig(teacher="toy", views=3, records_per_shard=6, run=ExecutionConfig(executor="inline"))
    extraction.run(cfg, {"data": path}, tmp_path / "store")
    return Stored(open_store(tmp_path / "store"), index.split("train"))


@pytest.fixture
def model(stored: Stored) -> DistillModel:
    torch.manual_seed(0)
    made = DistillModel(find_student("toy"), [stored.reader.plan.features], drop_path=0.0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made.eval()


def rendered_views(stored: Stored) -> list[tuple[int, int, torch.Tensor]]:
    """(position, view, pixels) of all usable views, one by one."""
    reader, images = stored
    renderer = Renderer(kernel=reader.plan.renderer["kernel"])
    found = []
    for position, key in enumerate(images.keys):
        for number in range(3) if key != "dark/002.png" else ():
            pixels = renderer.render_view(images.read_image(position), reader.read(key, number).view, 32)
            found.append((position, number, torch.from_numpy(pixels.copy())))
    return found


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_views_come_in_order_with_their_own_pixels(stored: Stored, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(features, "BATCH", batch)
    batches = list(iter_views(*stored, image_px=32))
    expected = rendered_views(stored)
    assert [p for b in batches for p in b.positions_B] == [position for position, _, _ in expected]
    pixels = torch.cat([b.images_BHWC for b in batches if b.images_BHWC is not None])
    assert torch.equal(pixels, torch.stack([view for _, _, view in expected]))
    tokens = torch.cat([b.tokens_BTC for b in batches])
    records = [stored.reader.read(stored.images.keys[position], number) for position, number, _ in expected]
    np.testing.assert_array_equal(tokens, np.stack([record.tokens_TC for record in records]))
    numbers = [position * 3 + number for position, number, _ in expected]
    assert [record for b in batches for record in b.records_B] == numbers
    assert all(b.images_BHWC is None for b in iter_views(*stored))


def test_pooled_teacher_is_the_teachers_own_mean_over_the_grid(stored: Stored) -> None:
    """The teacher runs again on the views; whitening must have been undone and the prefix token left out."""
    teacher = load_teacher(find_teacher("toy"), device="cpu")
    truth = torch.stack([teacher(pixels[None])[0, 1:].mean(0) for _, _, pixels in rendered_views(stored)])
    pooled = pool_teacher(*stored)
    torch.testing.assert_close(pooled.features_NC, truth, rtol=0, atol=2e-3)
    assert truth.std() > 0.05, "the tolerance must be small against what is compared"


def test_pooled_labels_and_positions_skip_the_unusable_image(stored: Stored) -> None:
    pooled = pool_teacher(*stored)
    positions = [position for position in range(8) if stored.images.keys[position] != "dark/002.png" for _ in range(3)]
    assert pooled.positions_N.tolist() == positions
    assert pooled.labels_N.tolist() == [stored.images.labels[position] for position in positions]


def test_pooled_student_is_the_mean_of_its_patches_after_the_norm(stored: Stored, model: DistillModel) -> None:
    pooled = pool_student(model, *stored, 32, CPU)
    with torch.inference_mode():
        truth = [
            model.student.forward_features(normalise_images(pixels[None], CPU))[0, 1:].mean(0)
            for _, _, pixels in rendered_views(stored)
        ]
    torch.testing.assert_close(pooled.features_NC, torch.stack(truth), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [4, 64])
def test_compare_tokens_equals_plain_loops(
    stored: Stored, model: DistillModel, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """21 views in batches of 4: the last one is smaller and must not count more."""
    monkeypatch.setattr(features, "BATCH", batch)
    found = compare_tokens(model, *stored, 32, CPU)
    losses, cosines, zeros = [], [], []
    for position, number, pixels in rendered_views(stored):
        target = stored.reader.read(stored.images.keys[position], number).tokens_TC.astype(np.float64)
        with torch.inference_mode():
            pred = model(normalise_images(pixels[None], CPU))[0][0].double().numpy()
        losses.append(smooth_l1(pred - target))
        zeros.append(smooth_l1(target))
        norms = np.linalg.norm(pred, axis=1) * np.linalg.norm(target, axis=1)
        cosines.append(((pred * target).sum(1) / norms).mean())
    assert found["views"] == 21
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert found["zero_loss"] == pytest.approx(np.mean(zeros), abs=1e-5)
    assert 0.2 < found["zero_loss"] < 0.3


def smooth_l1(difference: np.ndarray, beta: float = 2.0) -> float:
    """Quadratic below beta, linear above."""
    size = np.abs(difference)
    return float(np.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta).mean())


def test_a_perfect_student_has_no_loss_and_cosine_one(stored: Stored) -> None:
    """A model that looks the targets up stands for a student that learnt everything."""
    targets = torch.cat([b.tokens_BTC for b in iter_views(*stored)])

    class Oracle(torch.nn.Module):
        has_cls = (True,)

        def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (targets,)

    found = compare_tokens(Oracle(), *stored, 32, CPU)  # type: ignore[arg-type]
    assert found["loss"] == 0
    assert found["cosine"] == pytest.approx(1, abs=1e-6)


def test_an_image_that_is_gone_is_named_with_what_to_do(stored: Stored) -> None:
    (Path(stored.images.location) / "light" / "001.png").unlink()
    with pytest.raises(InputError, match=r"readable when its features were extracted.*give the command again"):
        list(iter_views(*stored, image_px=32))


def test_a_stop_is_heard_between_batches(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BATCH", 4)
    stop = StopRequest()
    views = iter_views(*stored, stop=stop)
    next(views)
    stop.signal_name = "SIGINT"
    with pytest.raises(Interrupted, match="SIGINT"):
        next(views)
