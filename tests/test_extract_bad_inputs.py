"""Bad images and wrong weights: named, and never stored."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from extract.backends import load_teacher
from extract.config import ExecutionConfig, ExtractConfig
from extract.extraction import write_extraction
from extract.run import run
from extract.teachers import find_teacher
from extract.worker import Worker
from storage.errors import ConfigError, DecantError, InputError, QuarantineError
from storage.folder import load_plan
from storage.image_index import load_index
from storage.reader import open_store
from storage.receipts import committed_shards
from storage.records import ImageKey

CFG = ExtractConfig(
    teacher="toy", views=2, records_per_shard=6, run=ExecutionConfig(executor="inline", batch_size=4, device="cpu")
)
"""16 training images in 6 shards."""
MakeIndex = Callable[..., tuple[Path, object]]
TreeBytes = Callable[[Path], dict[str, bytes]]


def test_an_unreadable_image_is_a_hole_and_touches_no_other(
    make_images: Callable[..., Path], make_index: MakeIndex, tmp_path: Path
) -> None:
    one_by_one = CFG.model_copy(update={"run": CFG.run.model_copy(update={"batch_size": 2})})
    data, _ = make_index(make_images("images"))
    run(one_by_one, {"data": data}, tmp_path / "whole")
    whole = open_store(tmp_path / "whole")
    bad = whole.images.keys[4]
    (tmp_path / "images" / bad).write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of the kind")

    data, _ = make_index(tmp_path / "images")
    metrics = run(one_by_one, {"data": data}, tmp_path / "holed")
    holed = open_store(tmp_path / "holed")
    assert [entry["key"] for entry in metrics["bad_images"]] == [bad]
    assert metrics["bad_images"][0]["reason"]
    assert metrics["records"] == 2 * 15
    assert list(holed.usable_images()) == [position for position in range(16) if position != 4]
    for key in holed.images.keys:
        for view in range(2) if key != bad else ():
            one, two = whole.read(ImageKey(key), view), holed.read(ImageKey(key), view)
            assert one.view == two.view
            assert one.tokens_TC.tobytes() == two.tokens_TC.tobytes()


def test_too_many_unreadable_images_stop_the_run_and_are_listed(
    make_images: Callable[..., Path], make_index: MakeIndex, tmp_path: Path
) -> None:
    images = make_images("images")
    for number in (0, 5):
        (images / "dark" / f"{number:03d}.png").write_bytes(b"no picture")
    data, _ = make_index(images, eval_fraction=0)
    with pytest.raises(InputError) as caught:
        run(CFG, {"data": data}, tmp_path / "store")
    assert "2 of 20 images" in str(caught.value)
    assert "dark/000.png" in str(caught.value)
    assert "dark/005.png" in str(caught.value)
    assert not (tmp_path / "store" / "manifest.json").exists()
    done = len(list(tmp_path.glob("store/receipts/*")))
    with pytest.raises(InputError, match="2 of 20 images"):
        run(CFG, {"data": data}, tmp_path / "store")
    assert len(list(tmp_path.glob("store/receipts/*"))) == done, "said before any more work"
    forgiving = CFG.model_copy(update={"max_bad_fraction": 0.1})
    assert run(forgiving, {"data": data}, tmp_path / "store")["records"] == 2 * 18


def test_an_image_that_changed_since_it_was_listed_is_named(
    make_images: Callable[..., Path], make_index: MakeIndex, tmp_path: Path
) -> None:
    images = make_images("images")
    data, _ = make_index(images)
    key = load_index(data).split("train").keys[7]
    (images / key).write_bytes((images / "light" / "000.png").read_bytes())
    with pytest.raises(InputError, match=f"image '{key}' of .*images has changed since it was listed"):
        run(CFG, {"data": data}, tmp_path / "store")
    assert 2 not in committed_shards(tmp_path / "store", load_plan(tmp_path / "store"))


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_weights(tmp_path: Path) -> Path:
    """The toy teacher's weights with one value changed."""
    state = {name: value.contiguous() for name, value in load_teacher(find_teacher("toy")).module.state_dict().items()}
    state["mix.bias"][0] += 1
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_other_weights_never_get_into_a_store(
    toy_store: Callable[..., tuple[Path, Path]], other_weights: Path, tree_bytes: TreeBytes
) -> None:
    data, root = toy_store(views=2)
    before = tree_bytes(root)
    cfg = CFG.model_copy(update={"weights": other_weights})
    hashes = [load_teacher(find_teacher("toy"), weights=file).fingerprint for file in (None, other_weights)]
    with pytest.raises(ConfigError) as caught:
        run(cfg, {"data": data}, root)
    assert f"teacher_fingerprint is '{hashes[0]}', expected '{hashes[1]}'" in str(caught.value)
    assert tree_bytes(root) == before
    write_extraction(root, cfg, load_index(data).split("train"))
    with pytest.raises(ConfigError, match=f"weights of 'toy' are {hashes[1]}, the store's are {hashes[0]}"):
        Worker([root], cfg.run)  # as on another machine, whose file is another


def test_a_shard_for_which_a_teacher_gives_nan_is_given_up_with_the_image(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = make_index()
    calls = 0

    def speak(self: object, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        tokens = torch.rand(len(pixels), 17, 24)
        tokens[1, 3, 5] = float("nan") if calls == 2 else 0
        return tokens

    monkeypatch.setattr("extract.backends.Teacher.__call__", speak)
    key = load_index(data).split("train").keys[2]  # batches of 4 views in shards of 6: it is alone in the second one
    who = r"; look at .* precision of teacher 'toy' \(extract.tap=final_norm, block -1\); the largest value is nan"
    with pytest.raises(QuarantineError, match=f"NaN, infinity .* 1 of 1 images of a batch \\({key}\\){who}"):
        run(CFG, {"data": data}, tmp_path / "store")
    done = committed_shards(tmp_path / "store", load_plan(tmp_path / "store"))
    assert sorted(done) == [1, 2, 3, 4, 5], "the others are extracted"


def test_a_teacher_that_always_gives_nan_does_not_go_on_for_long(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = make_index()
    calls = []

    def speak(self: object, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return torch.full((len(pixels), 17, 24), float("nan"))

    monkeypatch.setattr("extract.backends.Teacher.__call__", speak)
    cfg = CFG.model_copy(update={"records_per_shard": 2})
    with pytest.raises(DecantError, match=r"10 shards were given up in a row, .* NaN.* no matter of a few images"):
        run(cfg, {"data": data}, tmp_path / "store")
    assert len(calls) == 10, "once a shard"
