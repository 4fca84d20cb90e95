"""What is in a store: the tokens that the teacher gives for the very views that are stored beside them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from PIL import Image, ImageOps

from extract.backends import load_teacher
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run
from extract.teachers import find_teacher
from storage.decode import decode_image
from storage.errors import InputError
from storage.image_index import load_index
from storage.reader import open_store
from storage.views import CentreCrop, RandomResizedCrop, Renderer, View

CFG = ExtractConfig(
    teacher="toy", views=3, records_per_shard=7, run=ExecutionConfig(executor="inline", batch_size=5, device="cpu")
)
"""Two images a shard; batches of 5 views end in the middle of an image."""


def render_plainly(path: Path, view: View, side: int, resample: Image.Resampling) -> np.ndarray:
    """A view's pixels, straight from the file and without the project's own code."""
    box = (view.left, view.top, view.left + view.width, view.top + view.height)
    image = Image.open(path).convert("RGB").crop(box).resize((side, side), resample)
    return np.asarray(ImageOps.mirror(image) if view.flip else image)


@pytest.mark.parametrize(
    ("sampler", "kernel", "input_px"),
    [
        (RandomResizedCrop(seed=4), "bilinear", None),
        (RandomResizedCrop(min_scale=0.08, seed=5), "bicubic", 48),
        (CentreCrop(), "bilinear", None),
    ],
)
def test_every_record_is_what_the_teacher_says_about_its_view(
    sampler: RandomResizedCrop | CentreCrop,
    kernel: str,
    input_px: int | None,
    make_images: Callable[..., Path],
    make_index: Callable[..., tuple[Path, object]],
    tmp_path: Path,
) -> None:
    root = make_images(per_class=4)
    for path in root.glob("dark/*.png"):
        Image.open(path).convert("L").save(path)
    data, _ = make_index(root)
    renderer = Renderer.model_validate({"kernel": kernel})
    cfg = CFG.model_copy(update={"sampler": sampler, "renderer": renderer, "input_px": input_px})
    metrics = run(cfg, {"data": data}, tmp_path / "store")
    reader, images = open_store(tmp_path / "store"), load_index(data).split("train")
    arrays = zarr.open_group(str(tmp_path / "store"), mode="r")
    teacher = load_teacher(find_teacher("toy").at(input_px=input_px), device="cpu")
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[kernel]

    records = [record for shard in range(reader.plan.num_shards) for record in reader.iter_shard(shard)]
    assert [(record.key, record.view_index) for record in records] == [(k, v) for k in images.keys for v in range(3)]
    assert metrics["records"] == len(records) == 3 * len(images)
    flips = set()
    for number, record in enumerate(records):
        path = Path(images.location) / record.key
        width, height = Image.open(path).size
        assert record.view == sampler.view(record.key, record.view_index, (height, width))
        pixels = renderer.render_view(decode_image(path.read_bytes()), record.view, teacher.spec.input_px)
        plain = render_plainly(path, record.view, teacher.spec.input_px, resample)
        # two libraries round their filters' weights; bicubic ones overshoot, and so do their differences
        assert np.abs(pixels.astype(int) - plain).max() <= {"bilinear": 1, "bicubic": 2}[kernel]
        raw = teacher(torch.from_numpy(pixels.copy())[None])[0]
        expected = F.layer_norm(raw, raw.shape[-1:], eps=1e-5).half().numpy()
        # batches of other sizes may round the last bit of the teacher's sums otherwise
        np.testing.assert_allclose(
            record.tokens_TC.astype(np.float32), expected.astype(np.float32), rtol=2**-10, atol=1e-4
        )
        np.testing.assert_allclose(record.token_mean_T, raw.mean(-1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(record.token_std_T, (raw.var(-1, correction=0) + 1e-5).sqrt(), rtol=1e-4)
        np.testing.assert_array_equal(arrays["tokens"][number], record.tokens_TC)
        np.testing.assert_array_equal(arrays["token_mean"][number], record.token_mean_T)
        flips.add(record.view.flip)
    assert flips == ({False} if isinstance(sampler, CentreCrop) else {False, True})


def test_the_plan_tells_everything_that_made_the_store(toy_store: Callable[..., tuple[Path, Path]]) -> None:
    data, root = toy_store(views=2)
    plan, spec = open_store(root).plan, find_teacher("toy")
    assert plan.features == spec.feature_spec()
    assert plan.whitening.to_json() == {"kind": "layer_norm", "eps": 1e-5}
    assert plan.sampler == RandomResizedCrop().to_json()
    assert plan.renderer == Renderer().describe()
    assert plan.images_fingerprint == load_index(data).split("train").fingerprint
    assert plan.teacher_fingerprint == load_teacher(spec).fingerprint
    assert {name: plan.teacher[name] for name in ("model", "mean", "tap", "input_px")} == {
        "model": "toy", "mean": list(spec.mean), "tap": "final_norm", "input_px": 32,
    }  # fmt: skip
    assert (plan.num_images, plan.views_per_image, plan.images_per_shard) == (16, 2, 3)


def test_other_batches_and_threads_make_the_same_store_but_for_rounding(
    toy_store: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    data, root = toy_store(views=2)
    other = ExecutionConfig(executor="inline", batch_size=1, device="cpu")
    run(
        ExtractConfig(teacher="toy", views=2, records_per_shard=6, run=other),
        {"data": data},
        tmp_path / "other",
    )
    one, two = (np.asarray(zarr.open_group(str(path), mode="r")["tokens"][:]) for path in (root, tmp_path / "other"))
    np.testing.assert_allclose(one.astype(np.float32), two.astype(np.float32), rtol=2**-10, atol=1e-4)
    assert open_store(root).manifest.fingerprint == open_store(tmp_path / "other").manifest.fingerprint


def test_an_empty_part_is_refused(make_index: Callable[..., tuple[Path, object]], tmp_path: Path) -> None:
    data, _ = make_index(eval_fraction=0)
    cfg = CFG.model_copy(update={"split": "eval"})
    with pytest.raises(InputError, match=r"no image is in the 'eval' part of .*; raise data\.eval_fraction"):
        run(cfg, {"data": data}, tmp_path / "store")


def test_a_finished_store_is_not_touched_again(
    toy_store: Callable[..., tuple[Path, Path]],
    tree_bytes: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, root = toy_store(views=2)
    before = tree_bytes(root)
    times = {path: path.stat().st_mtime_ns for path in (root / "tokens").rglob("*")}
    monkeypatch.setattr("extract.worker.extract_shard", lambda *args, **kwargs: pytest.fail("worked again"))
    cfg = ExtractConfig(teacher="toy", views=2, records_per_shard=6, run=ExecutionConfig(executor="inline"))
    metrics = run(cfg, {"data": data}, root)
    assert metrics["extracted_views_per_second"] is None
    assert metrics["records"] == 32
    assert tree_bytes(root) == before
    assert {path: path.stat().st_mtime_ns for path in (root / "tokens").rglob("*")} == times
