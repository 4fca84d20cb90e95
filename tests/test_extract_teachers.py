"""What is tapped of CLIPs, against their forward pass written out, and how another input size changes a network."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from extract.backends import load_teacher
from extract.resolve import identify_teacher
from extract.spec import TeacherSpec
from extract.teacher import Teacher, choose_device
from extract.teachers import find_teacher
from storage.errors import ConfigError, InputError


def some_pixels(side: int, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalise(pixels: Tensor, spec: TeacherSpec) -> Tensor:
    """uint8 pixels to what a network wants, one channel after the other."""
    planes = [(pixels[..., c].float() / 255 - spec.mean[c]) / spec.std[c] for c in range(3)]
    return torch.stack(planes, dim=1)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="use device=cpu"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def timm_spec(model: str, *, prefix: int, patch_px: int, channels: int) -> TeacherSpec:
    return find_teacher("dino-s").model_copy(
        update={
            "model": model, "weights": "random", "input_px": 3 * patch_px, "patch_px": patch_px, "channels": channels,
            "num_prefix_tokens": prefix,
        }
    )  # fmt: skip


PLAIN_VIT = timm_spec("test_vit", prefix=1, patch_px=16, channels=64)


@pytest.fixture
def clip_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TeacherSpec:
    """A very small CLIP that open_clip's own builder makes."""
    for table in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        known = getattr(open_clip.factory, table)
        monkeypatch.setattr(open_clip.factory, table, type(known)(known))
    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    return find_teacher("clip-b").model_copy(
        update={"model": "tiny-clip", "weights": "random", "input_px": 32, "patch_px": 8, "channels": 64}
    )


def clip_tokens(tower: Any, images: Tensor, num_blocks: int = 2) -> Tensor:
    """OpenAI's forward pass, written out, without the final norm, pooling and projection."""
    grid = tower.conv1(images).flatten(2).transpose(1, 2)
    cls = tower.class_embedding.expand(len(grid), 1, -1)
    tokens = tower.ln_pre(torch.cat([cls, grid], dim=1) + tower.positional_embedding)
    for block in tower.transformer.resblocks[:num_blocks]:
        normed = block.ln_1(tokens)
        tokens = tokens + block.attn(normed, normed, normed, need_weights=False)[0]
        hidden = block.mlp.c_fc(block.ln_2(tokens))
        tokens = tokens + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
    return tokens  # type: ignore[no-any-return]


def make_clip(spec: TeacherSpec, folder: Path) -> tuple[Any, Path]:
    """A whole CLIP with a final norm that does something, and its weights file as open_clip publishes it."""
    torch.manual_seed(4)
    model: Any = open_clip.create_model(spec.model, pretrained=None).eval()
    torch.nn.init.normal_(model.visual.ln_post.weight)
    safetensors.torch.save_file(model.state_dict(), folder / "clip.safetensors")
    return model, folder / "clip.safetensors"


def test_clip_gives_all_tokens_through_ln_post_before_the_projection(clip_spec: TeacherSpec, tmp_path: Path) -> None:
    """The file is a whole CLIP: only its image tower is the teacher."""
    model, path = make_clip(clip_spec, tmp_path)
    pixels = some_pixels(32)
    teacher = load_teacher(clip_spec, weights=path)
    tokens = teacher(pixels)
    assert tokens.shape == (2, 17, 64)
    with torch.inference_mode():
        expected = model.visual.ln_post(clip_tokens(model.visual, normalise(pixels, clip_spec)))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    safetensors.torch.save_file(model.visual.state_dict(), tmp_path / "tower.safetensors")
    assert load_teacher(clip_spec, weights=tmp_path / "tower.safetensors").fingerprint == teacher.fingerprint


def test_clip_taps_before_the_norm_at_an_earlier_block_and_in_the_space_of_text(
    clip_spec: TeacherSpec, tmp_path: Path
) -> None:
    model, path = make_clip(clip_spec, tmp_path)
    pixels, images = some_pixels(32), normalise(some_pixels(32), clip_spec)
    visual: Any = model.visual
    clip_spec = clip_spec.model_copy(update={"projected_channels": 16})
    with torch.inference_mode():
        cases = [
            (clip_spec.at(tap="block"), clip_tokens(visual, images)),
            (clip_spec.at(tap="block", block=0), clip_tokens(visual, images, 1)),
            (clip_spec.at(block=-2), visual.ln_post(clip_tokens(visual, images, 1))),
            (clip_spec.at(tap="projected"), visual.ln_post(clip_tokens(visual, images)) @ visual.proj),
        ]
    for spec, expected in cases:
        tokens = load_teacher(spec, weights=path, device="cpu")(pixels)
        assert tuple(tokens.shape[1:]) == spec.feature_spec().shape_TC
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    pooled = model.encode_image(images)  # its CLS token is what CLIP compares with text
    projected = load_teacher(clip_spec.at(tap="projected"), weights=path, device="cpu")(pixels)
    torch.testing.assert_close(projected[:, 0], pooled, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"has 2 blocks; extract\.block can be 0 to 1, or -1 to -2 .* found 2"):
        load_teacher(clip_spec.at(block=2), weights=path)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_clip_runs_in_lower_precision(clip_spec: TeacherSpec, tmp_path: Path, precision: str) -> None:
    _, path = make_clip(clip_spec, tmp_path)
    for tap in ("final_norm", "projected"):
        spec = clip_spec.model_copy(update={"projected_channels": 16}).at(tap=tap)
        teacher, pixels = load_teacher(spec, weights=path, device="cpu", precision=precision), some_pixels(32)
        similar = torch.nn.functional.cosine_similarity(teacher(pixels), teacher.in_float32(pixels), dim=-1)
        assert similar.min() > 0.99


def test_a_tower_of_timms_in_open_clip_is_timms_network(tmp_path: Path) -> None:
    """SigLIP: the file is a whole open_clip model, the tokens are those of its trunk."""
    as_timm = load_teacher(find_teacher("siglip2-b").at(input_px=48), weights="random", device="cpu")
    state = {f"visual.trunk.{name}": tensor.contiguous() for name, tensor in as_timm.module.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "siglip.safetensors")
    spec = identify_teacher("open_clip:ViT-B-16-SigLIP2/webli")
    as_clip = load_teacher(spec.at(input_px=48), weights=tmp_path / "siglip.safetensors", device="cpu")
    assert as_clip.fingerprint == as_timm.fingerprint
    assert torch.equal(as_clip(some_pixels(48, 1)), as_timm(some_pixels(48, 1)))
    with pytest.raises(ConfigError, match="no projection into a space shared with text"):
        spec.at(tap="projected")


def test_clip_weights_that_do_not_fit_are_listed(clip_spec: TeacherSpec, tmp_path: Path) -> None:
    _, path = make_clip(clip_spec, tmp_path)
    state = safetensors.torch.load_file(path)
    del state["visual.ln_post.bias"]
    safetensors.torch.save_file(state, path)
    with pytest.raises(InputError, match=r"missing 1 \(ln_post\.bias\); unexpected none"):
        load_teacher(clip_spec, weights=path)


def grid_embedding(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A position embedding as its prefix and its square grid (1, C, H, W)."""
    values = state[name].reshape(-1, state[name].shape[-1])
    side = int((len(values) - 1) ** 0.5)
    return values[:1], values[1:].T.reshape(1, -1, side, side)


def test_another_input_size_resamples_position_embeddings(clip_spec: TeacherSpec, tmp_path: Path) -> None:
    """As the libraries do it for weights of their own: bicubic, antialiased, the CLS token's left alone."""
    _, clip_file = make_clip(clip_spec, tmp_path)
    vit: Any = timm.create_model(PLAIN_VIT.model, img_size=PLAIN_VIT.input_px)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    cases = [
        (clip_spec, clip_file, 56, "visual.positional_embedding", "positional_embedding"),
        (PLAIN_VIT, tmp_path / "vit.safetensors", 96, "pos_embed", "pos_embed"),
    ]
    for spec, path, input_px, name_in_file, name in cases:
        teacher: Teacher = load_teacher(spec.at(input_px=input_px), weights=path, device="cpu")
        side = input_px // spec.patch_px
        assert teacher.features.grid_hw == (side, side)
        assert teacher(some_pixels(input_px)).shape[1:] == teacher.features.shape_TC
        prefix, grid = grid_embedding(safetensors.torch.load_file(path), name_in_file)
        expected = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        found = grid_embedding(teacher.module.state_dict(), name)
        assert torch.equal(found[0], prefix)
        torch.testing.assert_close(found[1], expected)
