"""A teacher's row of data to a frozen module that gives its tokens. One builder a library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from extract.teachers import TeacherSpec
from extract.weights import load_weights_file, locate_weights, tensor_fingerprint
from storage.errors import ConfigError, InputError

Forward = Callable[[Tensor], Tensor]
"""Normalised images (B, 3, H, W) to tokens (B, T, C)."""


State = dict[str, Tensor]


class _Built(NamedTuple):
    module: nn.Module
    forward: Forward
    fit: Callable[[State], State] = lambda state: state
    """Tensors of a weights file to those of the module, as the library itself does it for its own files."""


class Teacher:
    """A frozen teacher: uint8 pixels in, float32 tokens out."""

    def __init__(
        self, spec: TeacherSpec, module: nn.Module, forward: Forward, input_px: int, device: torch.device
    ) -> None:
        self.spec, self.input_px, self.device = spec, input_px, device
        self.features = spec.feature_spec(input_px)
        self.fingerprint = tensor_fingerprint(module.state_dict())
        module.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.module, self._forward = module, forward
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """Tokens of uint8 views of side `input_px`: (B, T, C) float32, prefix tokens first, then the grid by rows."""
        images_BCHW = pixels_BHWC.to(self.device).permute(0, 3, 1, 2).float().div_(255)
        images_BCHW = images_BCHW.sub_(self._mean).div_(self._std).contiguous(memory_format=torch.channels_last)
        tokens_BTC = self._forward(images_BCHW).float()
        if tokens_BTC.shape[1:] != self.features.shape_TC:
            raise ConfigError(
                f"teacher {self.spec.name!r} gave tokens {tuple(tokens_BTC.shape[1:])} at {self.input_px} px, expected "
                f"{self.features.shape_TC}: choose an input size that its patch of {self.spec.patch_px} px divides"
            )
        return tokens_BTC


def load_teacher(
    spec: TeacherSpec, *, weights: Path | None = None, input_px: int | None = None, device: str = "auto"
) -> Teacher:
    """Build a teacher and fill in its weights.

    Args:
        weights: a local file instead of the row's own source.
        input_px: another input size; position embeddings are resampled.

    Raises:
        InputError: weights that cannot be had or do not fit.
    """
    path = locate_weights(spec, weights)
    built = BUILDERS[spec.library](spec, input_px or spec.input_px, spec.weights.startswith("hub") and path is None)
    if path is not None:
        load_weights_file(built.module, spec, path, built.fit)
    return Teacher(spec, built.module, built.forward, input_px or spec.input_px, choose_device(device))


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("device=cuda was asked for, but torch sees no GPU; use device=cpu, or check the driver")
    return torch.device("cuda" if name != "cpu" and has_gpu else "cpu")


def _build_timm(spec: TeacherSpec, input_px: int, from_hub: bool) -> _Built:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    is_map = spec.tap == "last_stage"
    size = {} if is_map else {"img_size": input_px}
    module: Any = _from_hub(spec, lambda: timm.create_model(spec.model, pretrained=from_hub, **size))

    def last_stage(images_BCHW: Tensor) -> Tensor:
        maps = module.forward_intermediates(images_BCHW, indices=1, intermediates_only=True)
        tokens_BTC: Tensor = maps[-1].flatten(2).transpose(1, 2)
        return tokens_BTC

    if is_map:
        return _Built(module, last_stage)
    return _Built(module, module.forward_features, lambda state: checkpoint_filter_fn(state, module))


def _build_open_clip(spec: TeacherSpec, input_px: int, from_hub: bool) -> _Built:
    import open_clip
    from open_clip.model import resize_pos_embed

    tag = spec.weights.partition(":")[2] if from_hub else None
    model: Any = _from_hub(
        spec, lambda: open_clip.create_model(spec.model, pretrained=tag, precision="fp32", force_image_size=input_px)
    )
    visual = model.visual

    def forward(images_BCHW: Tensor) -> Tensor:
        found = visual.forward_intermediates(
            images_BCHW, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC",
            output_extra_tokens=True,
        )  # fmt: skip
        return torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)

    def fit(state: State) -> State:
        """The image tower's part of a whole CLIP."""
        resize_pos_embed(state, model)
        tower = "visual."
        part = {name.removeprefix(tower): tensor for name, tensor in state.items() if name.startswith(tower)}
        return part or state

    return _Built(visual, forward, fit)


def _from_hub(spec: TeacherSpec, build: Callable[[], nn.Module]) -> nn.Module:
    """Run a library's builder; its many ways to say "no network" become one."""
    try:
        return build()
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the weights of teacher {spec.name!r} ({spec.model}, {spec.weights}) could not be had: {first}; "
            "with no network, download them elsewhere and give WEIGHTS=<file>"
        ) from error


class ToyTeacher(nn.Module):
    """A tiny fixed network for tests: patches, one mixing step, a norm. Its weights come from a seed."""

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, spec.channels, spec.patch_px, stride=spec.patch_px)
        self.mix = nn.Linear(spec.channels, spec.channels)
        self.norm = nn.LayerNorm(spec.channels)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        grid_BTC = self.patch(images_BCHW).flatten(2).transpose(1, 2)
        prefix_B1C = grid_BTC.mean(1, keepdim=True)
        tokens_BTC = torch.cat([prefix_B1C, grid_BTC], dim=1)
        normed_BTC: Tensor = self.norm(tokens_BTC + self.mix(tokens_BTC.tanh()))
        return normed_BTC


def _build_toy(spec: TeacherSpec, input_px: int, from_hub: bool) -> _Built:
    module = ToyTeacher(spec)
    return _Built(module, module)


BUILDERS: dict[str, Callable[[TeacherSpec, int, bool], _Built]] = {
    "timm": _build_timm,
    "open_clip": _build_open_clip,
    "toy": _build_toy,
}
