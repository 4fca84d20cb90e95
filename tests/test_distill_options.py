"""What a run can be asked for: targets, losses, several teachers, precision, memory. Each against the plain way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config import DistillConfig, DistillRunConfig, OptimConfig, OtherStore
from distill.objective import Objective, StorePart
from distill.run import run
from distill.stream import DistillStream, unlike_pixels
from distill.student import DistillModel, normalise_images
from distill.student_config import BeitStudent
from distill.targets import decode_targets
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run as extract
from storage.errors import ConfigError
from storage.image_index import load_index
from storage.reader import open_store
from storage.store import FeatureReader
from storage.whitening import LayerNorm, MeanStd, NoWhitening, Pca, Whitening

MakeIndex = Callable[..., tuple[Path, Any]]
CFG = DistillConfig(
    student=BeitStudent(input_px=32, patch_px=8, width=32, depth=2, heads=2), epochs=4, batch_size=8,
    optim=OptimConfig(base_lr=0.2, warmup_epochs=1), run=DistillRunConfig(device="cpu", threads=1, trackers=()),
)  # fmt: skip
PREFIX, GRID = 1, 16


def fill(data: Path, out: Path, **settings: Any) -> FeatureReader:
    inline = ExecutionConfig(executor="inline", device="cpu", audit_records=0)
    extract(ExtractConfig.model_validate({"teacher": "toy", "views": 2, "run": inline} | settings), {"data": data}, out)
    return open_store(out)


@pytest.fixture
def data(make_index: MakeIndex) -> Path:
    return make_index()[0]


def objective_and_part(reader: FeatureReader, data: Path, **changes: Any) -> tuple[Objective, Any, np.ndarray]:
    """An objective, what a stream brings for it, and the records of that step."""
    cfg = CFG.model_copy(update=changes)
    stream = DistillStream([reader], load_index(data).location, cfg)
    draw = stream.order.batch(3, cfg.batch_size)
    records_B = draw.positions_B * reader.plan.views_per_image + stream.view_order.views(draw)
    return Objective(reader, cfg, has_cls=True), stream.load(3).stores[0], records_B


def random_predictions(tokens: int = PREFIX + GRID, channels: int = 24) -> Tensor:
    return torch.randn(8, tokens, channels, generator=torch.Generator().manual_seed(1))


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whitening", [LayerNorm(), MeanStd(), Pca(), NoWhitening()], ids=lambda each: each.kind)
def test_the_teachers_own_tokens_come_from_the_same_store(whitening: Whitening, data: Path, tmp_path: Path) -> None:
    """Whitening undone in torch is what the store's own reader undoes in numpy."""
    reader = fill(data, tmp_path / "store", whitening=whitening.to_json())
    objective, part, records_B = objective_and_part(reader, data, whiten=False, loss="mse")
    raw_BTC = torch.from_numpy(reader.raw_tokens(records_B))
    pred_BTC = random_predictions()
    torch.testing.assert_close(objective(pred_BTC, part), F.mse_loss(pred_BTC, raw_BTC), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("whitening", [LayerNorm(), MeanStd()], ids=lambda each: each.kind)
def test_a_pooled_target_is_the_mean_of_the_maps_own_tokens(
    whitening: Whitening, whiten: bool, data: Path, tmp_path: Path
) -> None:
    reader = fill(data, tmp_path / "store", whitening=whitening.to_json())
    objective, part, records_B = objective_and_part(reader, data, target="pooled", whiten=whiten)
    mean_BC = torch.from_numpy(reader.raw_tokens(records_B))[:, PREFIX:].mean(1)
    if whiten and whitening.kind == "layer_norm":
        mean_BC = (mean_BC - mean_BC.mean(1, keepdim=True)) / (mean_BC.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    elif whiten:
        mean_C, std_C = torch.tensor(reader.statistics)
        mean_BC = (mean_BC - mean_C) / std_C
    pred_BTC = random_predictions()
    expected = F.smooth_l1_loss(pred_BTC[:, PREFIX:].mean(1), mean_BC, beta=2.0)
    torch.testing.assert_close(objective(pred_BTC, part), expected, rtol=2e-3, atol=1e-4)


def test_the_cls_token_alone(data: Path, tmp_path: Path) -> None:
    reader = fill(data, tmp_path / "store")
    objective, part, _ = objective_and_part(reader, data, target="cls")
    pred_BTC = random_predictions()
    expected = F.smooth_l1_loss(pred_BTC[:, 0], part.encoded["tokens"][:, 0].float(), beta=2.0)
    torch.testing.assert_close(objective(pred_BTC, part), expected)


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_the_cls_token_weighs_what_it_is_told_to(fraction: float, data: Path, tmp_path: Path) -> None:
    reader = fill(data, tmp_path / "store", token_fraction=fraction)
    objective, part, _ = objective_and_part(reader, data, cls_weight=5.0)
    pred_BTC = random_predictions()
    total, count = 0.0, 0
    for row, tokens_SC in enumerate(part.encoded["tokens"].float()):
        places = range(PREFIX + GRID) if part.positions_BS is None else part.positions_BS[row].tolist()
        for place, target_C in zip(places, tokens_SC, strict=True):
            token_weight = 5.0 if place == 0 else 1.0
            total += token_weight * float(F.smooth_l1_loss(pred_BTC[row, place], target_C, beta=2.0))
            count += 1
    mean_weight = (5.0 * PREFIX + GRID) / (PREFIX + GRID)  # over all tokens, whichever are at hand
    assert float(objective(pred_BTC, part)) == pytest.approx(total / count / mean_weight, rel=1e-5)

    halves = [
        objective(pred_BTC[rows], StorePart({name: field[rows] for name, field in part.encoded.items()},
                                            None if part.positions_BS is None else part.positions_BS[rows]))
        for rows in (slice(0, 4), slice(4, 8))
    ]  # fmt: skip
    assert float(sum(halves)) / 2 == pytest.approx(float(objective(pred_BTC, part)), rel=1e-5), "a batch in parts"


@pytest.mark.parametrize("loss", ["cosine", "mse", "smooth_l1"])
def test_losses_are_their_formulas(loss: str, data: Path, tmp_path: Path) -> None:
    reader = fill(data, tmp_path / "store")
    objective, part, _ = objective_and_part(reader, data, loss=loss, beta=0.5)
    pred_BTC, target_BTC = random_predictions().double(), part.encoded["tokens"].double()
    gap_BTC = pred_BTC - target_BTC
    lengths_BT = pred_BTC.norm(dim=-1) * target_BTC.norm(dim=-1)
    expected = {
        "cosine": (1 - (pred_BTC * target_BTC).sum(-1) / lengths_BT).mean(),
        "mse": gap_BTC.square().mean(),
        "smooth_l1": torch.where(gap_BTC.abs() < 0.5, gap_BTC.square(), gap_BTC.abs() - 0.25).mean(),
    }[loss]
    assert float(objective(pred_BTC.float(), part)) == pytest.approx(float(expected), rel=1e-5)


def test_targets_that_a_store_cannot_give_are_refused(data: Path, tmp_path: Path) -> None:
    reader = fill(data, tmp_path / "few", token_fraction=0.4)
    with pytest.raises(ConfigError, match=r"target=pooled needs all tokens, but the store of 'toy' keeps 40%"):
        Objective(reader, CFG.model_copy(update={"target": "pooled"}), has_cls=True)
    with pytest.raises(ConfigError, match=r"target=cls needs a CLS token of both.*use distill\.target=pooled"):
        Objective(reader, CFG.model_copy(update={"target": "cls"}), has_cls=False)


# ---- several teachers ------------------------------------------------------------------------------------------------


def test_the_loss_of_several_teachers_is_their_weighted_mean(data: Path, tmp_path: Path) -> None:
    """That of the first step, before any update, put together by hand."""
    readers = [fill(data, tmp_path / "plain"), fill(data, tmp_path / "int8", encoding={"kind": "int8"})]
    other = OtherStore(store=str(tmp_path / "int8"), weight=3.0)
    cfg = CFG.model_copy(update={"epochs": 1, "drop_path": 0.0, "also": (other,)})
    metrics = run(cfg, {"data": data, "extract": tmp_path / "plain"}, tmp_path / "both")

    torch.manual_seed(cfg.seed)
    model = DistillModel(cfg.student, [reader.plan.features for reader in readers], drop_path=0.0)
    batch = DistillStream(readers, load_index(data).location, cfg).load(0)
    predictions = model(normalise_images(batch.images_BHWC, torch.device("cpu")))
    losses = []
    for reader, pred_BTC, part in zip(readers, predictions, batch.stores, strict=True):
        target_BTC = decode_targets(part.encoded, reader.plan.encoding).float()
        losses.append(float(F.smooth_l1_loss(pred_BTC.detach(), target_BTC, beta=2.0)))
    assert abs(losses[0] - losses[1]) > 0.01
    assert metrics["first_loss"] == pytest.approx((losses[0] + 3 * losses[1]) / 4, rel=1e-5)
    projectors = safetensors.torch.load_file(tmp_path / "both" / "projector.safetensors")
    assert set(projectors) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_views_that_were_rendered_otherwise_are_told(data: Path, tmp_path: Path) -> None:
    first, same = (fill(data, tmp_path / name) for name in ("first", "same"))
    bicubic = fill(data, tmp_path / "bicubic", renderer={"kernel": "bicubic"})
    kept, jpeg = fill(data, tmp_path / "kept", keep_views=True), fill(data, tmp_path / "jpeg", layout="wds")
    assert unlike_pixels([first]) == unlike_pixels([first, same]) == unlike_pixels([kept, jpeg]) == []
    found = unlike_pixels([first, bicubic, jpeg])
    assert [str(store.location) in line for store, line in zip((bicubic, jpeg), found, strict=True)] == [True, True]


def test_stores_of_other_views_are_refused(data: Path, tmp_path: Path) -> None:
    fill(data, tmp_path / "one")
    fill(data, tmp_path / "other", views=3)
    cfg = CFG.model_copy(update={"also": (OtherStore(store=str(tmp_path / "other")),)})
    with pytest.raises(ConfigError, match=r"views_per_image is 2 in .*one and 3 in .*make extract TEACHER=one,other"):
        run(cfg, {"data": data, "extract": tmp_path / "one"}, tmp_path / "out")


# ---- how to compute --------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(data: Path, tmp_path: Path) -> dict[str, Path]:
    fill(data, tmp_path / "store")
    return {"data": data, "extract": tmp_path / "store"}


def train(inputs: dict[str, Path], out: Path, **changes: Any) -> tuple[list[float], dict[str, Tensor]]:
    settings = {name: value for name, value in changes.items() if name in DistillConfig.model_fields}
    how = {name: value for name, value in changes.items() if name not in settings}
    cfg = CFG.model_copy(update=settings | {"run": CFG.run.model_copy(update=how)})
    metrics = run(cfg, inputs, out)
    return [point["loss"] for point in metrics["history"]], safetensors.torch.load_file(out / "student.safetensors")


def test_activations_that_are_computed_again_change_no_bit(inputs: dict[str, Path], tmp_path: Path) -> None:
    plain = train(inputs, tmp_path / "plain", drop_path=0.3)
    again = train(inputs, tmp_path / "again", drop_path=0.3, checkpoint_activations=True)
    assert plain[0] == again[0]
    assert all(plain[1][name].equal(again[1][name]) for name in plain[1])


def test_bfloat16_learns_the_same_within_its_precision(inputs: dict[str, Path], tmp_path: Path) -> None:
    plain, lower = train(inputs, tmp_path / "plain")[0], train(inputs, tmp_path / "lower", precision="bfloat16")[0]
    assert lower != plain
    np.testing.assert_allclose(lower, plain, rtol=0.02)


def test_parts_of_a_batch_are_the_batch(inputs: dict[str, Path], tmp_path: Path) -> None:
    plain = train(inputs, tmp_path / "plain", drop_path=0.0)
    parts = train(inputs, tmp_path / "parts", drop_path=0.0, accumulate=4)
    np.testing.assert_allclose(parts[0], plain[0], rtol=1e-4)
    for name, value in plain[1].items():
        torch.testing.assert_close(parts[1][name], value, rtol=1e-3, atol=2e-5)


def test_the_saved_weights_are_the_running_mean_where_one_is_asked_for(inputs: dict[str, Path], tmp_path: Path) -> None:
    losses, weights = train(inputs, tmp_path / "plain")
    same_losses, mean = train(inputs, tmp_path / "mean", ema_decay=0.5)
    assert same_losses == losses, "the mean is only looked at"
    distance = max(float((weights[name] - mean[name]).abs().max()) for name in weights)
    assert 1e-5 < distance < 0.1
