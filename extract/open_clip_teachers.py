"""open_clip's image towers: a ViT of its own, or one of timm's."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower, resize_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from extract import timm_teachers
from extract.built import Built, Forward, State
from extract.cost import with_cost
from extract.spec import TeacherSpec
from storage.errors import ConfigError, unknown_name

_TOWER = "visual."
"""What the image tower's tensors begin with in a file of a whole CLIP."""


def build(spec: TeacherSpec) -> Built:
    """The image tower of a CLIP with the tap of its row; the text tower is dropped.

    Raises:
        ConfigError: no such block, or no such tap of this tower.
    """
    visual: Any = _empty_tower(spec.model, spec.input_px, spec.options)
    if isinstance(visual, TimmModel):
        return _build_trunk(visual.trunk, spec)
    if not isinstance(visual, VisionTransformer):
        raise _not_a_vit(spec.model, visual)

    def fit(state: State) -> State:
        """The image tower's part of a whole CLIP, or the tower as it is."""
        part = {name: tensor for name, tensor in state.items() if name.startswith(_TOWER)}
        part = part or {_TOWER + name: tensor for name, tensor in state.items()}
        resize_pos_embed(part, SimpleNamespace(visual=visual))
        return {name.removeprefix(_TOWER): tensor for name, tensor in part.items()}

    return Built(visual, _tap(visual, spec), fit)


def _empty_tower(model: str, input_px: int | None = None, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The image tower alone: the text tower can be as large.

    Args:
        input_px: None is the model's own.
        options: changes to its `vision_cfg`.
    """
    config = open_clip.get_model_config(model)
    vision = CLIPVisionCfg(**(config["vision_cfg"] | {"timm_model_pretrained": False} | dict(options or {})))
    if input_px is not None:
        vision.image_size = input_px
    visual: nn.Module = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    if isinstance(visual, TimmModel) and input_px is not None:
        visual.set_input_size(input_px)
    return visual


def _build_trunk(trunk: Any, spec: TeacherSpec) -> Built:
    """A tower that is one of timm's networks, without the head that open_clip gave it."""
    if spec.tap == "projected":
        raise ConfigError(
            f"{spec.model} of teacher {spec.name!r} pools its tokens before it projects them; extract.tap can be "
            "final_norm or block"
        )
    trunk.reset_classifier(0)
    forward = timm_teachers.tap(trunk, spec)
    return Built(trunk, forward, timm_teachers.fit_of(trunk, trunk.default_cfg["architecture"]))


def _tap(visual: VisionTransformer, spec: TeacherSpec) -> Forward:
    block = spec.block_index(len(visual.transformer.resblocks))
    if spec.tap != "block" and visual.attn_pool is not None:
        raise ConfigError(
            f"{spec.model} of teacher {spec.name!r} pools its tokens before its final norm; use extract.tap=block for "
            "its tokens as they are"
        )

    def forward(images_BCHW: Tensor) -> Tensor:
        found = visual.forward_intermediates(
            images_BCHW, indices=[block], stop_early=True, intermediates_only=True, output_fmt="NLC",
            output_extra_tokens=True,
        )  # fmt: skip
        tokens_BTC = torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)
        if spec.tap != "block":
            tokens_BTC = visual.ln_post(tokens_BTC)
        return tokens_BTC @ visual.proj if spec.tap == "projected" else tokens_BTC

    return forward


def describe(model: str) -> TeacherSpec:
    """The row of any open_clip model with a ViT or one of timm's networks as its image tower, as `NAME/TAG`.

    Raises:
        ConfigError: open_clip has no such model or weights, or it cannot be tapped.
    """
    name, _, tag = model.partition("/")
    if name not in open_clip.list_models():
        raise unknown_name("open_clip model", name, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise unknown_name(f"weights tag of open_clip's {name} (open_clip:{name}/TAG)", tag, tags)
    with torch.device("meta"):
        visual: Any = _empty_tower(name)
    published = open_clip.get_pretrained_cfg(name, tag)
    if isinstance(visual, TimmModel):
        shape = timm_teachers.shape_of(visual.trunk, name)
    elif isinstance(visual, VisionTransformer):
        shape = {
            "patch_px": visual.patch_size[0], "channels": visual.conv1.out_channels, "num_prefix_tokens": 1,
            "projected_channels": visual.output_dim, "tap": "final_norm" if visual.attn_pool is None else "block",
        }  # fmt: skip
    else:
        raise _not_a_vit(name, visual)
    spec = TeacherSpec(
        name=f"open_clip:{model}", library="open_clip", model=name, weights=f"hub:{tag}", mean=published["mean"],
        std=published["std"], input_px=visual.image_size[0], **shape,
    )  # fmt: skip
    if isinstance(visual, TimmModel):
        return with_cost(spec, visual.trunk, timm_teachers.tap(visual.trunk, spec))
    return with_cost(spec, visual, _tap(visual, spec))


def _not_a_vit(model: str, visual: nn.Module) -> ConfigError:
    return ConfigError(
        f"the image tower of open_clip's {model} is a {type(visual).__name__}; only ViTs and timm's networks can be "
        "tapped"
    )
