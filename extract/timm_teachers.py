"""timm's networks: built without a head, tapped at any block or stage."""

import inspect
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d, RmsNorm2d
from torch import Tensor, nn

from extract.built import Built, Forward, State
from extract.cost import with_cost
from extract.spec import TeacherSpec
from storage.errors import ConfigError, InputError, unknown_name

_MAP_NORMS = (LayerNorm2d, RmsNorm2d, nn.GroupNorm, nn.BatchNorm2d)
"""Norms that want maps (B, C, H, W); all others normalise the last dimension."""


def build(spec: TeacherSpec) -> Built:
    """A timm network with the tap of its row.

    Raises:
        ConfigError: no such block, or no final norm to tap behind.
    """
    options = dict(spec.options)
    if spec.state_keys == "by_name":  # a file that is matched by position is matched as a whole
        options["num_classes"] = 0
    if timm.get_pretrained_cfg(spec.model).fixed_input_size:
        options["img_size"] = spec.input_px
    module: Any = timm.create_model(spec.model, **options)
    return Built(module, tap(module, spec), fit_of(module, spec.model))


def tap(module: Any, spec: TeacherSpec) -> Forward:
    """A network's tokens at `spec.block`, through its final norm or as they are. What comes after is removed.

    Raises:
        ConfigError: no such block, or no final norm to tap behind.
    """
    if not hasattr(module, "forward_intermediates"):
        raise ConfigError(
            f"timm's {spec.model} of teacher {spec.name!r} cannot be tapped: it has no forward_intermediates"
        )
    block = spec.block_index(len(module.feature_info))
    norm = final_norm(module) if spec.tap == "final_norm" else nn.Identity()
    if norm is None:
        raise ConfigError(
            f"{spec.model} of teacher {spec.name!r} has no final norm that is applied to every token; use "
            "extract.tap=block for its tokens as they are"
        )
    if getattr(module, "attn_pool", None) is not None:
        module.attn_pool = None
    if spec.state_keys == "by_name" and hasattr(module, "head"):
        module.head = nn.Identity()  # the norm behind the pooling of some; FCMAE's files have none
    is_sequence = _is_sequence(module)
    form = {"output_fmt": "NLC", "return_prefix_tokens": True} if is_sequence else {"output_fmt": "NCHW"}
    is_map_norm = isinstance(norm, _MAP_NORMS)

    def forward(images_BCHW: Tensor) -> Tensor:
        [found] = module.forward_intermediates(
            images_BCHW, indices=[block], stop_early=True, intermediates_only=True, **form
        )
        if is_sequence:
            grid_BTC, prefix_BTC = found if isinstance(found, tuple) else (found, found[:, :0])
            tokens_BTC: Tensor = norm(torch.cat([prefix_BTC, grid_BTC], dim=1))
            return tokens_BTC
        map_BCHW = norm(found) if is_map_norm else found
        tokens_BTC = map_BCHW.flatten(2).transpose(1, 2)
        return tokens_BTC if is_map_norm else norm(tokens_BTC)

    return forward


def final_norm(module: nn.Module, names: Iterable[str] = ("norm", "fc_norm")) -> nn.Module | None:
    """The norm behind the last block; None if there is none.

    timm calls it `norm`, or `fc_norm` in networks that it pools before it.
    """
    for name in names:
        norm = getattr(module, name, None)
        if norm is not None and not isinstance(norm, nn.Identity):
            return norm  # type: ignore[no-any-return]
    return None


def _is_sequence(module: Any) -> bool:
    """Whether it gives tokens, with prefix tokens apart; all others give maps."""
    return "return_prefix_tokens" in inspect.signature(module.forward_intermediates).parameters


def fit_of(module: nn.Module, model: str) -> Callable[[State], State]:
    """timm's own conversion of upstream files for this network, and of position embeddings to its grid."""
    source = sys.modules[type(module).__module__]
    convert = getattr(source, "checkpoint_filter_fn", None)
    if convert is None:
        return lambda state: state
    arguments = _conversion_arguments(model, getattr(source, "_RADIO_ALIGN_CORNERS", ()))

    def fit(state: State) -> State:
        _refuse_lost_biases(state, module, model)
        if not model.startswith("flexivit"):  # which is made for any patches
            _refuse_other_patches(state, module)
        fitted, wanted = convert(state, module, **arguments), module.state_dict()
        return {
            name: tensor
            for name, tensor in fitted.items()
            if name in wanted or not name.startswith(("attn_pool.", "head."))
        }

    return fit


def _refuse_lost_biases(state: State, module: nn.Module, model: str) -> None:
    """timm drops DINOv3's biases of queries and values where its network has none, because those of the published ones
    are zero.

    Raises:
        InputError: they are not.
    """
    has_bias = any(name.endswith(("qkv.bias", "q_bias", "q_proj.bias")) for name, _ in module.named_parameters())
    for name, bias in state.items():
        if name.endswith(".qkv.bias") and not has_bias and "storage_tokens" in state:
            queries, _, values = bias.chunk(3)
            if queries.any() or values.any():
                architecture = model.partition(".")[0]
                raise InputError(
                    f"{name} is not zero, but {model} has no such bias; use timm:{architecture}_qkvb if timm has it"
                )


def _refuse_other_patches(state: State, module: nn.Module) -> None:
    """timm resamples a patch embedding to the network's patch size, as it does for another grid. But a network that was
    trained on other patches is another network: DINO publishes 8 x 8 beside 16 x 16, alike in all other shapes.

    Raises:
        InputError: says both sizes.
    """
    name = "patch_embed.proj.weight"
    found, wanted = state.get(name), dict(module.named_parameters()).get(name)
    if found is None or wanted is None or found.ndim != 4 or wanted.ndim != 4:
        return
    if found.shape[2:] != wanted.shape[2:]:
        sizes = [" x ".join(map(str, tensor.shape[2:])) for tensor in (found, wanted)]
        raise InputError(f"its patches are {sizes[0]} px, expected {sizes[1]}: it is another network's file")


def _conversion_arguments(model: str, align_corners: Iterable[str]) -> dict[str, Any]:
    """What timm tells its conversion about some families of plain ViTs."""
    if model.startswith("deit3"):
        return {"adapt_layer_scale": True}
    if model.startswith("flexivit"):
        return {"interpolation": "bilinear", "antialias": False}
    if model.startswith("vit_") and "_radio_" in model:
        is_aligned = any(part in model for part in align_corners)
        return {"interpolation": "bilinear", "antialias": False, "align_corners": is_aligned}
    return {}


def describe(model: str) -> TeacherSpec:
    """The row of any timm network, from timm's own table and the network built without memory.

    Its tap is the final norm where that was trained on every token, else the last block or stage as it is. A norm that
    timm has behind the pooling was, if the weights have no classes (EVA-02 and BEiT-3 before fine-tuning); those of
    classifiers saw means of tokens. Without a tag it is the one that timm takes.

    Raises:
        ConfigError: timm has no such network, or cannot tap it.
    """
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise unknown_name("timm model", architecture, timm.list_models())
    tags = [name.partition(".")[2] for name in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise unknown_name(f"weights tag of timm's {architecture}", tag, tags)
    published = timm.get_pretrained_cfg(model)
    with torch.device("meta"):
        module: Any = timm.create_model(model, num_classes=0)
    full = f"{architecture}.{published.tag}" if published.tag else model
    norms = ("norm",) if published.num_classes else ("norm", "fc_norm")
    spec = TeacherSpec(
        name=f"timm:{full}", library="timm", model=full,
        weights="hub" if published.has_weights else "file", left_out=_heads(published.classifier),
        input_px=published.input_size[-1], mean=published.mean, std=published.std,
        licence=published.license or "unknown", **shape_of(module, model, norms),
    )  # fmt: skip
    return with_cost(spec, module, tap(module, spec))


def shape_of(module: Any, model: str, norms: Iterable[str] = ("norm",)) -> dict[str, Any]:
    """The fields of a row that a network itself tells.

    Args:
        norms: names of those that were trained on every token.

    Raises:
        ConfigError: it cannot be tapped.
    """
    stages = getattr(module, "feature_info", None)
    if not stages or not hasattr(module, "forward_intermediates"):
        raise ConfigError(f"timm's {model} cannot be tapped: it has no forward_intermediates")
    reductions = [int(stage["reduction"]) for stage in stages]
    is_hierarchical = len(stages) > 1 and all(2 * fine == coarse for fine, coarse in itertools.pairwise(reductions))
    return {
        "patch_px": reductions[-1],
        "channels": stages[-1]["num_chs"],
        "num_prefix_tokens": getattr(module, "num_prefix_tokens", 0) if _is_sequence(module) else 0,
        "stage_channels": tuple(stage["num_chs"] for stage in stages) if is_hierarchical else (),
        "tap": "block" if final_norm(module, norms) is None else "final_norm",
    }


def _heads(classifier: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """What the classifier's tensors begin with in timm's own files."""
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    return (*(f"{name}." for name in names), "attn_pool.")
