"""The authors' checkpoints become students that compute what theirs did."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.authors import from_authors
from distill.student import build_student
from distill.student_config import STUDENTS, BeitStudent, StudentConfig
from distill.token_layout import student_tokens
from storage.errors import InputError
from tests.fixtures.authors_checkpoints import (
    BESIDE,
    SWINV2,
    VIT,
    Tensors,
    some_images,
    student_of,
    swinv2_checkpoint,
    swinv2_forward,
    swinv2_table,
    vit_checkpoint,
    vit_forward,
)


def tokens_of(cfg: StudentConfig, state: Tensors, images: Tensor) -> Tensor:
    student = build_student(cfg, drop_path=0.3).eval()
    student.load_state_dict(state)
    with torch.no_grad():
        return student_tokens(student, images)


@pytest.mark.parametrize("with_k_bias", [False, True])
@pytest.mark.parametrize("positions", ["shared", "per_block", "absolute"])
def test_a_vit_computes_what_theirs_does(positions: str, with_k_bias: bool) -> None:
    """A key bias adds the same to all scores of a query; so it can go."""
    expected = VIT.model_copy(update={"positions": positions})
    tensors = vit_checkpoint(expected, with_k_bias=with_k_bias)
    cfg, state = from_authors(tensors)
    assert cfg == expected
    images = some_images(cfg.input_px)
    plain = vit_forward(student_of(tensors), images, VIT.patch_px, VIT.heads)
    torch.testing.assert_close(tokens_of(cfg, state, images), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_swinv2_computes_what_theirs_does(is_shared: bool) -> None:
    """Also one whose blocks share a position MLP in each stage: here every block has its own."""
    tensors = swinv2_checkpoint(is_shared=is_shared)
    cfg, state = from_authors(tensors)
    assert cfg == SWINV2
    images = some_images(64)
    plain = swinv2_forward(student_of(tensors), images)
    torch.testing.assert_close(tokens_of(cfg, state, images), plain, rtol=1e-4, atol=1e-4)


# ---- the released ones, and what is none of them ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit-b", "vit-l"])
def test_released_vits_have_the_shapes_of_the_papers_students(name: str) -> None:
    cfg = STUDENTS[name]
    assert isinstance(cfg, BeitStudent)
    with torch.device("meta"):
        names = build_student(cfg, drop_path=0).state_dict()
    tensors = {f"encoder.{key}": torch.zeros(()).expand(value.shape) for key, value in names.items()}
    assert from_authors(tensors)[0] == cfg


@pytest.mark.parametrize("prefixes", [("module.encoder.", "module."), ("encoder.", ""), ("", None)])
def test_prefixes_of_wrappers_do_not_matter(prefixes: tuple[str, str | None]) -> None:
    tensors = vit_checkpoint(VIT)
    own = {f"{prefixes[0]}{name}": value for name, value in student_of(tensors).items()}
    beside = {
        f"{prefixes[1]}{name}": value for name, value in tensors.items() if prefixes[1] is not None and name in BESIDE
    }
    cfg, state = from_authors(own | beside)
    assert cfg == VIT
    assert state.keys() == from_authors(tensors)[1].keys()


def test_half_precision_becomes_single() -> None:
    _, state = from_authors({name: value.half() for name, value in vit_checkpoint(VIT).items()})
    assert {value.dtype for value in state.values()} == {torch.float32}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def changed(name: str, value: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: {}, "no student of the authors' among 0 tensors"),
        (lambda tensors: {"model.a": torch.zeros(2)}, "such as model.a; expected a ViT"),
        (without("encoder.norm.weight"), r"1 differ, such as norm.weight \(found none, expected \(128,\)"),
        (without("encoder.patch_embed.proj.weight"), "patch_embed.proj.weight is none, expected 4 dimensions"),
        (without("encoder.rel_pos_bias.relative_position_bias_table"), "pos_embed is none"),
        (without("encoder.blocks.0.mlp.fc1.weight"), "blocks.0.mlp.fc1.weight is none"),
        (changed("encoder.blocks.1.extra.weight", torch.zeros(3)), r"1.extra.weight \(found \(3,\), expected none"),
        (changed("encoder.blocks.1.gamma_1", torch.zeros(3)), r"found \(3,\), expected \(128,\)"),
        (changed("encoder.blocks.3.gamma_1", torch.zeros(128)), r"numbers \[0, 1, 3\], expected 0, 1"),
        (changed("encoder.blocks.999999999.gamma_1", torch.zeros(128)), r"numbers \[0, 1, 999999999\]"),
        (changed("encoder.norm.bias", torch.full((128,), float("nan"))), "norm.bias has values that are not finite"),
        (changed("encoder.rel_pos_bias.relative_position_bias_table", torch.zeros(52, 3)), "not a multiple of heads"),
        (changed("encoder.rel_pos_bias.relative_position_bias_table", torch.zeros(60, 2)), "expected"),
        (changed("encoder.cls_token", torch.zeros(1, 1, 64)), r"cls_token \(found"),
        (changed("optimizer.step", torch.zeros(1)), "neither student, teacher nor projector, such as optimizer.step"),
        (changed("encoder.head.weight", torch.zeros(10, 128)), "a classifier that the authors fine-tuned"),
        (changed("encoder.cls_token", torch.zeros(0, 0, 0)), "expected"),
        (changed("encoder.patch_embed.proj.weight", torch.zeros(128, 3, 0, 0)), r"proj.weight is \(128, 3, 0, 0\)"),
    ],
)  # fmt: skip
def test_what_is_no_student_is_refused(change: Callable[[Tensors], Tensors], said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_authors(change(vit_checkpoint(VIT)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("encoder.layers.0.blocks.0.attn.relative_coords_table", 0.9 * swinv2_table(4)), "stage 0 spaces its"),
        (changed("encoder.layers.1.blocks.1.attn_mask", torch.zeros(16, 16, 16)), "images of different sizes"),
        (without("encoder.layers.0.blocks.1.attn_mask"), "images of different sizes"),
        (changed("encoder.absolute_pos_embed", torch.zeros(1, 256, 8)), "absolute_pos_embed"),
        (changed("encoder.layers.0.blocks.0.enorm.weight", torch.zeros(8)), "enorm.weight"),
        (without("encoder.layers.1.downsample.norm.bias"), "layers.2.downsample.norm.bias"),
        (without("encoder.layers.0.blocks.0.attn.relative_coords_table"), "relative_coords_table is none"),
        (without("encoder.layers.2.blocks.0.attn.logit_scale"), "logit_scale is none"),
    ],
)  # fmt: skip
def test_a_swinv2_that_timm_does_not_have_is_refused(change: Callable[[Tensors], Tensors], said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_authors(change(swinv2_checkpoint(is_shared=False)))
