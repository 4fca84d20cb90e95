"""A student as timm and Hugging Face's hub lay out a model: what `config.json` says beside `model.safetensors`.

timm reads it by `create_model("local-dir:FOLDER", pretrained=True)`, and by `hf-hub:USER/NAME` once it is on the hub.
"""

from typing import Any

import timm
import torch
from torch import nn

from distill.student import IMAGENET_MEAN, IMAGENET_STD
from distill.student_config import BeitStudent, StudentConfig, TimmStudent
from storage.errors import ConfigError, unknown_name

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BEIT_ARCHITECTURE = "beitv2_base_patch16_224"
"""Of timm's names for the class `Beit` the one whose images are normalised as ours are. Its sizes are replaced."""
_CROP_FRACTION = 0.875
"""Of the short side: the centre crop that students are evaluated on."""


def timm_arguments(cfg: StudentConfig) -> tuple[str, dict[str, Any]]:
    """timm's name of a student's network, and what `timm.create_model` takes beside it and `num_classes=0`.

    Raises:
        ConfigError: this timm has no such network, or not with these arguments.
    """
    if isinstance(cfg, BeitStudent):
        return _known(BEIT_ARCHITECTURE), _beit_arguments(cfg)
    architecture = _known(cfg.model.partition(".")[0])
    return architecture, _accepted_arguments(architecture, cfg)


def _known(architecture: str) -> str:
    if not timm.is_model(architecture):
        error = unknown_name("timm model", architecture, timm.list_models())
        raise ConfigError(f"{error}; this is timm {timm.__version__}: install the one that the student was made with")
    return architecture


def _beit_arguments(cfg: BeitStudent) -> dict[str, Any]:
    """Every argument by which timm's ViTs of this class differ; None would be timm's default."""
    return {
        "img_size": cfg.input_px, "patch_size": cfg.patch_px, "embed_dim": cfg.width, "depth": cfg.depth,
        "num_heads": cfg.heads, "mlp_ratio": cfg.mlp_ratio, "init_values": cfg.layer_scale,
        "use_shared_rel_pos_bias": cfg.positions == "shared", "use_rel_pos_bias": cfg.positions == "per_block",
        "use_abs_pos_emb": cfg.positions == "absolute", "global_pool": "",
    }  # fmt: skip


def _accepted_arguments(architecture: str, cfg: TimmStudent) -> dict[str, Any]:
    """Some networks have no fixed input size, some no pooling."""
    both = {"img_size": cfg.input_px, "global_pool": ""}
    for left_out in ((), ("img_size",), ("global_pool",), ("img_size", "global_pool")):
        arguments = {name: value for name, value in both.items() if name not in left_out} | cfg.arguments
        try:
            with torch.device("meta"):
                timm.create_model(architecture, num_classes=0, **arguments)
        except TypeError as error:
            refused = error
            continue
        return arguments
    raise ConfigError(
        f"timm {timm.__version__} does not build {architecture} with {cfg.arguments}: {refused}; install the timm that "
        "the student was made with"
    )


def timm_config(cfg: StudentConfig, architecture: str, arguments: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """`config.json`. The student is a network without a head, which gives its tokens unpooled."""
    known: dict[str, Any] = dict(getattr(network, "pretrained_cfg", None) or {})
    of_network = {name: known[name] for name in ("first_conv", "classifier", "fixed_input_size") if name in known}
    if isinstance(cfg, BeitStudent):
        of_network = {"first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": network.num_features,
        "global_pool": "",
        "model_args": arguments,
        "pretrained_cfg": of_network | {
            "num_classes": 0, "input_size": [3, cfg.input_px, cfg.input_px], "interpolation": "bicubic",
            "crop_pct": _CROP_FRACTION, "crop_mode": "center", "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD),
        },
    }  # fmt: skip
