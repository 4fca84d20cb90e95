"""What a teacher costs: its parameters, and the floating-point operations of one view, counted without memory."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from extract.built import Forward
from extract.spec import TeacherSpec
from storage.errors import ConfigError, first_line


def with_cost(spec: TeacherSpec, module: nn.Module, forward: Forward) -> TeacherSpec:
    """A row completed by its network, which is built on torch's meta device; it is run, and so the row is checked.

    Raises:
        ConfigError: the network cannot be run, or gives tokens of another shape than the row says.
    """
    module.eval()
    try:
        with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
            tokens_BTC = forward(torch.empty(1, 3, spec.input_px, spec.input_px))
    except Exception as error:  # whatever a network of any kind may say
        raise ConfigError(
            f"{spec.library}'s {spec.model} cannot be tapped at its {spec.tap}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    found, expected = tuple(tokens_BTC.shape[1:]), spec.feature_spec().shape_TC
    if found != expected:
        raise ConfigError(
            f"{spec.library}'s {spec.model} gives tokens {found} at {spec.input_px} px, expected {expected} from what "
            f"{spec.library} says of it ({spec.num_prefix_tokens} prefix tokens, a patch of {spec.patch_px} px, "
            f"{spec.channels} channels); give it as a Python file of your own"
        )
    parameters = sum(parameter.numel() for parameter in module.parameters())
    cost = {"million_parameters": round(parameters / 1e6, 1), "gflops": round(counter.get_total_flops() / 1e9, 1)}
    return spec.model_copy(update=cost)
