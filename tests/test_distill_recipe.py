"""The loss, the learning rate and the decayed parameters of the paper's recipe."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from distill.config import OptimConfig
from distill.loss import feature_loss
from distill.optim import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors, set_learning_rate
from distill.student import DistillModel, build_student
from distill.student_config import BeitStudent, StudentConfig, TimmStudent, find_student
from storage.records import FeatureSpec

# ---- loss ------------------------------------------------------------------------------------------------------------


def loss_slowly(pred: Tensor, target: Tensor, beta: float) -> float:
    """Smooth L1, one value after the other."""
    total = 0.0
    for p, t in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True):
        gap = abs(p - t)
        total += 0.5 * gap**2 / beta if gap < beta else gap - 0.5 * beta
    return total / pred.numel()


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_loss_is_its_formula(beta: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    pred = (torch.randn(2, 5, 8, generator=generator) * 2).to(dtype)
    target = (torch.randn(2, 5, 8, generator=generator) * 2).half()
    found = feature_loss(pred, target, beta=beta)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(loss_slowly(pred, target, beta), rel=1e-5)


def test_large_half_precision_differences_do_not_overflow() -> None:
    pred, target = torch.full((1, 1, 4), 60000.0).half(), torch.full((1, 1, 4), -60000.0).half()
    assert float(feature_loss(pred, target, beta=2.0)) == pytest.approx(119999, rel=1e-3)


def test_a_zero_prediction_scores_a_quarter_on_whitened_targets() -> None:
    targets = torch.randn(8, 197, 768, generator=torch.Generator().manual_seed(2))
    assert float(feature_loss(torch.zeros_like(targets), targets, beta=2.0)) == pytest.approx(0.2467, abs=1e-3)
    assert float(feature_loss(targets, targets, beta=2.0)) == 0


def test_every_value_weighs_the_same() -> None:
    pred = torch.zeros(2, 3, 4, requires_grad=True)
    feature_loss(pred, torch.full((2, 3, 4), -1.0), beta=2.0).backward()
    assert pred.grad is not None
    torch.testing.assert_close(pred.grad, torch.full((2, 3, 4), 0.5 / 24))


# ---- learning rate ---------------------------------------------------------------------------------------------------


def rates(cfg: OptimConfig, num_steps: int, per_epoch: float, batch_size: int = 512) -> list[float]:
    return [
        learning_rate(step, cfg=cfg, num_steps=num_steps, steps_per_epoch=per_epoch, batch_size=batch_size)
        for step in range(num_steps)
    ]


def test_the_papers_schedule() -> None:
    """2048 images a step: base 3e-4 becomes 1.2e-3; ten epochs of warm-up from 2e-6, then a cosine over the other
    ninety down to 2e-5."""
    per_epoch, steps = 625.5, 62550
    found = rates(OptimConfig(), steps, per_epoch, batch_size=2048)
    start, peak, floor, warmup = 2e-6, 1.2e-3, 2e-5, 6255
    assert found[0] == pytest.approx(start)
    assert found[warmup // 2] == pytest.approx(start + (peak - start) * (warmup // 2) / warmup)
    assert found[warmup] == max(found) == pytest.approx(peak)
    middle = (warmup + steps) // 2
    assert found[middle] == pytest.approx((peak + floor) / 2, rel=1e-3)
    for step in (10_000, 33_333, 60_000):
        share = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert found[step] == pytest.approx(floor + (peak - floor) * share)
    assert found[-1] == pytest.approx(floor, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.65**3, 0.75**25])
def test_it_is_the_authors_scheduler(scale: float) -> None:
    """timm's, as their lr_scheduler.py sets it up. The last scale is that of CLIP-L's deepest group, whose peak is
    below the floor."""
    cfg = OptimConfig(base_lr=2.5e-4, warmup_lr=5e-7, min_lr=5e-7, warmup_epochs=2)
    per_epoch, steps, batch_size = 10, 70, 2048
    times = batch_size / 512
    [group] = (
        optimizer := torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.base_lr * times * scale)
    ).param_groups
    authors = CosineLRScheduler(
        optimizer, t_initial=steps - 20, cycle_mul=1.0, lr_min=cfg.min_lr * times, warmup_lr_init=cfg.warmup_lr * times,
        warmup_prefix=True, warmup_t=20, cycle_limit=1, t_in_epochs=False,
    )  # fmt: skip
    for step in range(steps):
        authors.step_update(step)
        found = learning_rate(
            step, cfg=cfg, num_steps=steps, steps_per_epoch=per_epoch, batch_size=batch_size, scale=scale
        )
        assert found == pytest.approx(group["lr"], rel=1e-9), step


@settings(max_examples=80, deadline=None)
@given(
    num_steps=st.integers(1, 200), per_epoch=st.floats(0.05, 60), warmup=st.floats(0, 12), batch=st.integers(1, 4096)
)
def test_it_rises_then_falls_between_floor_and_peak(
    num_steps: int, per_epoch: float, warmup: float, batch: int
) -> None:
    """Also where the warm-up is longer than the training."""
    cfg = OptimConfig(warmup_epochs=warmup)
    found = rates(cfg, num_steps, per_epoch, batch)
    top = found.index(max(found))
    assert top == min(round(warmup * per_epoch), num_steps - 1)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    start, low, high = (lr * batch / 512 for lr in (cfg.warmup_lr, cfg.min_lr, cfg.base_lr))
    assert max(found) == pytest.approx(high)
    assert found[0] == pytest.approx(start if top else high)
    assert low * (1 - 1e-9) <= min(found[top:])
    doubled = rates(cfg, num_steps, per_epoch, 2 * batch)
    assert doubled == pytest.approx([2 * rate for rate in found])


def test_all_groups_get_the_rate() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))]} for _ in range(3)]
    optimizer = torch.optim.AdamW(groups)
    set_learning_rate(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.01]


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> DistillModel:
    features = FeatureSpec(teacher="made-up", num_prefix_tokens=1, grid_hw=(4, 4), channels=24)
    torch.manual_seed(0)
    return DistillModel(find_student("toy"), [features], drop_path=0)


def groups_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_matrices_and_the_position_table_are_decayed_and_nothing_else(model: DistillModel) -> None:
    groups = groups_by_name(model, build_optimizer(model, OptimConfig(weight_decay=0.05)))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.05}
    per_block = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    assert decayed == {
        "student.patch_embed.proj.weight", "student.rel_pos_bias.relative_position_bias_table", "projectors.0.weight",
        *(f"student.blocks.{block}.{name}" for block in range(2) for name in per_block),
    }  # fmt: skip
    assert {groups[name]["weight_decay"] for name in set(groups) - decayed} == {0.0}
    assert {"student.cls_token", "student.blocks.0.gamma_1", "student.blocks.1.attn.q_bias"} <= set(groups) - decayed


@pytest.mark.parametrize(
    ("student", "not_decayed", "decayed"),
    [
        (
            TimmStudent(model="swinv2_tiny_window8_256", input_px=64, arguments={"embed_dim": 8, "depths": [1, 1, 1, 1],
                        "num_heads": [1, 1, 1, 1], "window_size": 4}),
            {"layers.0.blocks.0.attn.cpb_mlp.0.weight", "layers.0.blocks.0.attn.cpb_mlp.2.weight",
             "layers.0.blocks.0.attn.logit_scale"},
            {"patch_embed.proj.weight", "layers.1.downsample.reduction.weight", "layers.0.blocks.0.attn.qkv.weight"},
        ),
        (
            TimmStudent(model="vit_tiny_patch16_224", input_px=64, arguments={"depth": 1, "reg_tokens": 2}),
            {"cls_token", "reg_token", "pos_embed", "norm.weight"},
            {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"},
        ),
        (BeitStudent(input_px=32, patch_px=16, width=16, depth=1, heads=1, positions="absolute"),
         {"cls_token", "pos_embed"}, {"patch_embed.proj.weight"}),
        (BeitStudent(input_px=32, patch_px=16, width=16, depth=1, heads=1, positions="per_block"),
         {"cls_token"}, {"blocks.0.attn.relative_position_bias_table"}),
    ],
)  # fmt: skip
def test_other_students_are_decayed_as_the_authors_do(
    student: StudentConfig, not_decayed: set[str], decayed: set[str]
) -> None:
    """SwinV2's position MLP and attention scale are matrices, and not decayed for all that."""
    network = build_student(student, drop_path=0)
    wrapped = nn.ModuleDict({"student": network})
    for model, prefix in ((network, ""), (wrapped, "student.")):
        groups = groups_by_name(model, build_optimizer(model, OptimConfig(weight_decay=0.05)))
        assert {groups[prefix + name]["weight_decay"] for name in not_decayed} == {0.0}
        assert {groups[prefix + name]["weight_decay"] for name in decayed} == {0.05}
        vectors = {name for name, value in model.named_parameters() if value.ndim == 1}
        assert {groups[name]["weight_decay"] for name in vectors} == {0.0}


def test_frozen_parameters_are_left_out_and_scales_kept(model: DistillModel) -> None:
    model.student.cls_token.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(), lr_scale=lambda name: 0.25 if "blocks.0." in name else 1.0)
    groups = groups_by_name(model, optimizer)
    assert set(groups) == {name for name, _ in model.named_parameters()} - {"student.cls_token"}
    assert all(group["lr_scale"] == (0.25 if "blocks.0." in name else 1.0) for name, group in groups.items())
    assert len(optimizer.param_groups) == 4
    assert {(g["betas"], g["eps"]) for g in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


def take_steps(model: DistillModel, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        optimizer.zero_grad()
        feature_loss(model(torch.randn(2, 3, 32, 32))[0], torch.randn(2, 17, 24), beta=2.0).backward()
        optimizer.step()


def test_the_optimisers_state_survives_as_tensors(model: DistillModel) -> None:
    cfg = OptimConfig()
    features = FeatureSpec(teacher="made-up", num_prefix_tokens=1, grid_hw=(4, 4), channels=24)
    other = DistillModel(find_student("toy"), [features], drop_path=0)
    optimizer, another = build_optimizer(model, cfg), build_optimizer(other, cfg)
    take_steps(model, optimizer, 0, 3)
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizer)}
    parameters = len(list(model.parameters()))
    assert len(tensors) == 3 * parameters, "step and two moments of each"

    other.load_state_dict(model.state_dict())
    load_optimizer_tensors(another, tensors)
    assert all(torch.equal(tensors[name], value) for name, value in optimizer_tensors(another))
    for one in ((model, optimizer), (other, another)):
        take_steps(*one, 3, 6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    fresh = build_optimizer(other, cfg)
    assert not list(optimizer_tensors(fresh))
