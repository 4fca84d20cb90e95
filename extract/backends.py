"""A teacher's row of data to a frozen module that gives its tokens. One builder a library."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from extract.spec import TeacherSpec
from extract.teacher import Forward, Teacher, choose_device
from extract.weights import WeightsSource, load_weights_file, locate_weights
from storage.errors import InputError

State = dict[str, Tensor]


class _Built(NamedTuple):
    module: nn.Module
    forward: Forward
    fit: Callable[[State], State] = lambda state: state
    """Tensors of a weights file to those of the module, as the library itself does it for its own files."""


def load_teacher(
    spec: TeacherSpec, *, weights: WeightsSource | None = None, device: str = "auto", precision: str = "float32",
    is_compiled: bool = False, channels_last: bool = True,
) -> Teacher:  # fmt: skip
    """Build a teacher and fill in its weights.

    Args:
        spec: with the wanted input size and tap (`TeacherSpec.at`); position embeddings are resampled.
        weights: a local file instead of the row's own source, or `random`.

    Raises:
        InputError: weights that cannot be had or do not fit.
    """
    path = locate_weights(spec, weights)
    from_hub = spec.weights.startswith("hub") and weights is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same everywhere
        built = BUILDERS[spec.library](spec, from_hub)
    if path is not None:
        load_weights_file(built.module, spec, path, built.fit)
    return Teacher(
        spec, built.module, built.forward, choose_device(device), precision=precision, is_compiled=is_compiled,
        channels_last=channels_last,
    )  # fmt: skip


def _build_timm(spec: TeacherSpec, from_hub: bool) -> _Built:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    is_map = spec.tap == "block"
    size = {} if is_map else {"img_size": spec.input_px}
    module: Any = _from_hub(spec, lambda: timm.create_model(spec.model, pretrained=from_hub, **size))

    def last_stage(images_BCHW: Tensor) -> Tensor:
        maps = module.forward_intermediates(images_BCHW, indices=1, intermediates_only=True)
        tokens_BTC: Tensor = maps[-1].flatten(2).transpose(1, 2)
        return tokens_BTC

    if is_map:
        return _Built(module, last_stage)
    return _Built(module, module.forward_features, lambda state: checkpoint_filter_fn(state, module))


def _build_open_clip(spec: TeacherSpec, from_hub: bool) -> _Built:
    import open_clip
    from open_clip.model import resize_pos_embed

    tag = spec.weights.partition(":")[2] if from_hub else None
    size = spec.input_px
    model: Any = _from_hub(
        spec, lambda: open_clip.create_model(spec.model, pretrained=tag, precision="fp32", force_image_size=size)
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


def _build_toy(spec: TeacherSpec, from_hub: bool) -> _Built:
    module = ToyTeacher(spec)
    return _Built(module, module)


BUILDERS: dict[str, Callable[[TeacherSpec, bool], _Built]] = {
    "timm": _build_timm,
    "open_clip": _build_open_clip,
    "toy": _build_toy,
}
