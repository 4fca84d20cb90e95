"""A distilled student becomes a classifier: which tensors go where, and that it computes what it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from distill.checkpoint import load_weights, save_weights
from distill.optim import build_optimizer
from distill.student import build_student
from distill.student_config import BeitStudent, StudentConfig, find_student
from finetune.classifier import build_classifier, classifier_state, count_correct, layer_lr_scale
from finetune.config import FinetuneConfig
from finetune.run import student_shape
from storage.errors import ConfigError, DamagedError
from tests.fixtures.students import NETWORKS, SWINV2, VIT

TOY = BeitStudent.model_validate(find_student("toy").to_json())
TABLE = "rel_pos_bias.relative_position_bias_table"
SaveStudent = Callable[..., Path]


@pytest.fixture
def save_student(tmp_path: Path) -> SaveStudent:
    """A student of random weights everywhere, also where a fresh one has zeros and ones; gives its file."""

    def save(cfg: StudentConfig = TOY) -> Path:
        generator = torch.Generator().manual_seed(1)
        student = build_student(cfg, drop_path=0.0)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        path = tmp_path / "student.safetensors"
        save_weights(path, student.state_dict(), {"student": cfg.model_dump_json()})
        return path

    return save


def classifier_of(weights: Path | None, cfg: StudentConfig = TOY, num_classes: int = 5) -> nn.Module:
    return build_classifier(cfg, num_classes=num_classes, drop_path=0.0, weights=weights).eval()


def test_shared_table_goes_into_every_block_and_the_final_norm_nowhere(save_student: SaveStudent) -> None:
    student = load_weights(save_student())
    state = classifier_state(student, classifier_of(None).state_dict())
    tables = [name for name in state if "relative_position_bias_table" in name]
    assert tables == [f"blocks.{n}.attn.relative_position_bias_table" for n in range(TOY.depth)]
    assert all(torch.equal(state[name], student[TABLE]) for name in tables)
    assert len({state[name].data_ptr() for name in tables}) == TOY.depth, "from now on each block has its own"
    assert "norm.weight" in student
    assert not [name for name in state if name.startswith(("norm.", "rel_pos_bias."))]
    untouched = set(student) - {TABLE, "norm.weight", "norm.bias"}
    assert all(torch.equal(state[name], student[name]) for name in untouched)
    assert untouched <= set(state)


@pytest.mark.parametrize("positions", ["shared", "per_block", "absolute"])
def test_logits_equal_an_independent_forward(save_student: SaveStudent, positions: str) -> None:
    """Student tokens before its final norm -> mean of the patches -> the new norm -> the head."""
    cfg = TOY.model_copy(update={"positions": positions})
    path = save_student(cfg)
    model = classifier_of(path, cfg)
    generator = torch.Generator().manual_seed(2)
    fresh = {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if name.startswith(("fc_norm.", "head."))
    }
    assert sorted(fresh) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    model.load_state_dict(fresh, strict=False)
    images_BCHW = torch.randn(3, 3, TOY.input_px, TOY.input_px, generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(images_BCHW), plain_logits(cfg, load_weights(path), fresh, images_BCHW), rtol=1e-4, atol=1e-5
        )


def plain_logits(cfg: BeitStudent, student: dict[str, Tensor], fresh: dict[str, Tensor], images_BCHW: Tensor) -> Tensor:
    body = build_student(cfg, drop_path=0.0).eval()
    body.load_state_dict(student)
    body.norm = torch.nn.Identity()
    patches_BTC = body.forward_features(images_BCHW)[:, 1:]
    pooled_BC = F.layer_norm(patches_BTC.mean(1), (TOY.width,), fresh["fc_norm.weight"], fresh["fc_norm.bias"], 1e-6)
    return F.linear(pooled_BC, fresh["head.weight"], fresh["head.bias"])


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_keep_all_but_what_timm_pools_with(save_student: SaveStudent, name: str) -> None:
    """Its map is the student's, to the bit, but for a norm that timm has behind the pooling instead of in front."""
    cfg, *_ = NETWORKS[name]
    path = save_student(cfg)
    model: Any = classifier_of(path, cfg)
    student = build_student(cfg, drop_path=0.0).eval()
    student.load_state_dict(load_weights(path))
    images_BCHW = torch.randn(2, 3, cfg.input_px, cfg.input_px, generator=torch.Generator().manual_seed(2))
    if "norm.weight" in student.state_dict() and "norm.weight" not in model.state_dict():
        student.norm = nn.Identity()
    with torch.inference_mode():
        assert torch.equal(model.forward_features(images_BCHW), student.forward_features(images_BCHW))
        assert model(images_BCHW).shape == (2, 5)
    assert {value.requires_grad for value in model.parameters()} == {True}
    weights = load_weights(path)
    save_weights(path, {name: weights[name] for name in sorted(weights)[1:]}, {"student": cfg.model_dump_json()})
    with pytest.raises(DamagedError, match="1 tensors differ"):
        classifier_of(path, cfg)


def test_scratch_takes_nothing_from_a_student() -> None:
    torch.manual_seed(3)
    first = classifier_of(None).state_dict()
    torch.manual_seed(3)
    second = classifier_of(None).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["head.weight"].shape == (5, TOY.width)
    assert float(first["head.weight"].std()) == pytest.approx(0.02 * 0.001, rel=0.2)
    assert float(first["blocks.0.attn.qkv.weight"].abs().max()) > 0.05, "fine-tuning's weights are not cut off"


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("patch_embed.proj.weight", 1 / 16),
        ("cls_token", 1 / 16),
        ("blocks.0.attn.qkv.weight", 1 / 8),
        ("blocks.1.attn.relative_position_bias_table", 1 / 4),
        ("blocks.2.gamma_1", 1 / 2),
        ("fc_norm.weight", 1.0),
        ("head.bias", 1.0),
    ],
)
def test_layer_lr_scale(name: str, scale: float) -> None:
    model = classifier_of(None, TOY.model_copy(update={"depth": 3}))
    assert layer_lr_scale(model, 0.5)(name) == scale
    assert layer_lr_scale(model, 1.0)(name) == 1


def test_every_parameter_of_a_classifier_gets_the_share_of_its_layer() -> None:
    depth, decay = 12, 0.65
    model = classifier_of(None, BeitStudent(input_px=32, patch_px=16, width=16, depth=depth, heads=2))
    groups = build_optimizer(model, FinetuneConfig().optim, lr_scale=layer_lr_scale(model, decay)).param_groups
    shares = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            below = depth - int(name.split(".")[1])
        else:
            below = depth + 1 if name.startswith(("patch_embed.", "cls_token")) else 0
        assert shares[id(parameter)] == pytest.approx(decay**below), name


def test_layers_of_a_vit_are_timms() -> None:
    model = classifier_of(None, VIT)
    shares = {id(value): group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.7)
              for value in group["params"]}  # fmt: skip
    scale = layer_lr_scale(model, 0.7)
    for name, parameter in model.named_parameters():
        assert scale(name) == pytest.approx(shares[id(parameter)]), name


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("head.fc.weight", 0), ("norm.weight", 0), ("layers.2.blocks.1.attn.proj.bias", 1),
        ("layers.2.blocks.0.norm1.bias", 2), ("layers.2.downsample.norm.weight", 3),
        ("layers.1.blocks.1.attn.logit_scale", 3),
        ("layers.1.blocks.0.mlp.fc1.bias", 4), ("layers.1.downsample.reduction.weight", 5),
        ("layers.0.blocks.1.attn.cpb_mlp.0.weight", 5), ("layers.0.blocks.0.attn.q_bias", 6),
        ("patch_embed.proj.weight", 7), ("patch_embed.norm.weight", 7),
    ],
)  # fmt: skip
def test_layers_of_a_swinv2_are_the_authors(name: str, below: int) -> None:
    """Three stages of two blocks: the merging of patches belongs to the block before it, the last norm to the head."""
    model = classifier_of(None, SWINV2)
    assert name in dict(model.named_parameters())
    assert layer_lr_scale(model, 0.8)(name) == pytest.approx(0.8**below)


def test_a_network_without_layers_is_not_decayed_layer_by_layer() -> None:
    model = nn.Linear(2, 2)
    assert layer_lr_scale(model, 1.0)("weight") == 1
    with pytest.raises(ConfigError, match=r"which layers Linear has; set finetune.layer_decay=1"):
        layer_lr_scale(model, 0.9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"width": 64}, "expected (64"), ({"depth": 3}, "blocks.2."), ({"depth": 1}, "expected none"),
     ({"patch_px": 16}, "found (")],
)  # fmt: skip
def test_weights_of_another_shape_are_refused(save_student: SaveStudent, changes: dict[str, int], said: str) -> None:
    path = save_student()
    other = BeitStudent.model_validate(TOY.to_json() | changes)
    with pytest.raises(DamagedError, match="not a student of this shape") as caught:
        classifier_of(path, other)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "make distill" in str(caught.value)


def test_shape_is_read_from_the_header(save_student: SaveStudent) -> None:
    for cfg in (BeitStudent(input_px=32, patch_px=16, width=48, depth=1, heads=3, layer_scale=0.0), SWINV2, VIT):
        assert student_shape(save_student(cfg)) == cfg


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut", "no header"])
def test_a_file_that_is_no_student_is_refused(save_student: SaveStudent, tmp_path: Path, kind: str) -> None:
    path = save_student()
    if kind == "missing":
        path.unlink()
    elif kind == "no header":
        save_weights(path, {"a": torch.zeros(2)}, {})
    else:
        path.write_bytes({"empty": b"", "text": b"<html>not found</html>", "cut": path.read_bytes()[:-100]}[kind])
    with pytest.raises(DamagedError, match=r"not a distilled student.*run `make distill FORCE=1`"):
        student_shape(path)


def test_count_correct() -> None:
    logits_BN = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.1, 9.0]])
    assert count_correct(logits_BN, torch.tensor([0, 2, 2])) == 2
