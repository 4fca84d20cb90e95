"""A frozen teacher: uint8 pixels in, float32 tokens out, in the precision that was asked for."""

import torch
from torch import Tensor, nn

from extract.built import Forward
from extract.spec import TeacherSpec
from extract.weights import tensor_fingerprint
from storage.errors import ConfigError, InputError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of matrix products and convolutions. Norms and softmax are in float32 whatever this says (torch's autocast)."""


class Teacher:
    """A module with the normalisation and the tap of its row.

    Args:
        forward: the tap.
        is_compiled: let torch.compile make the forward pass; the first batch then takes minutes.
    """

    def __init__(
        self, spec: TeacherSpec, module: nn.Module, forward: Forward, device: torch.device, *,
        precision: str = "float32", is_compiled: bool = False, channels_last: bool = True,
    ) -> None:  # fmt: skip
        self.spec, self.device, self.precision = spec, device, precision
        self.features = spec.feature_spec()
        self.fingerprint = tensor_fingerprint(module.state_dict())
        module.eval().requires_grad_(False).to(device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        module.to(memory_format=self._memory_format)  # type: ignore[call-overload]
        self.module = module
        self._plain, self._fast = forward, torch.compile(forward) if is_compiled else forward
        self.is_exact = precision == "float32" and not is_compiled
        """Whether `in_float32` would give the same."""
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """Tokens of uint8 views of side `spec.input_px`: (B, T, C) float32, prefix tokens first, then the grid by rows.

        A batch that the GPU has no memory for is done in two halves.

        Raises:
            ConfigError: the teacher gives tokens of another shape than its row says.
            InputError: one view alone does not fit into the GPU's memory.
        """
        try:
            tokens_BTC = self._tokens(pixels_BHWC, self._fast, self.precision)
        except torch.OutOfMemoryError as error:
            count = len(pixels_BHWC)
            if count == 1:
                raise InputError(
                    f"teacher {self.spec.name!r} does not fit into the memory of {self.device} with one view of "
                    f"{self.spec.input_px} px in {self.precision}; use another GPU, or a lower extract.precision"
                ) from error
            torch.cuda.empty_cache()
            return torch.cat([self(pixels_BHWC[: count // 2]), self(pixels_BHWC[count // 2 :])])
        if tokens_BTC.shape[1:] != self.features.shape_TC:
            raise ConfigError(
                f"teacher {self.spec.name!r} gave tokens {tuple(tokens_BTC.shape[1:])} at {self.spec.input_px} px, "
                f"expected {self.features.shape_TC}: choose an input size that its patch of {self.spec.patch_px} px "
                "divides"
            )
        return tokens_BTC

    @torch.inference_mode()
    def in_float32(self, pixels_BHWC: Tensor) -> Tensor:
        """The same tokens by the plain forward pass in float32: what the fast path is compared with."""
        return self._tokens(pixels_BHWC, self._plain, "float32")

    def _tokens(self, pixels_BHWC: Tensor, forward: Forward, precision: str) -> Tensor:
        images_BCHW = pixels_BHWC.to(self.device).permute(0, 3, 1, 2).float().div_(255)
        images_BCHW = images_BCHW.sub_(self._mean).div_(self._std).contiguous(memory_format=self._memory_format)
        if precision == "float32":
            return forward(images_BCHW).float()
        with torch.autocast(self.device.type, PRECISIONS[precision]):
            return forward(images_BCHW).float()


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("device=cuda was asked for, but torch sees no GPU; use device=cpu, or check the driver")
    return torch.device("cuda" if name != "cpu" and has_gpu else "cpu")


def choose_precision(name: str, device: str) -> str:
    """`auto` is float16 on a GPU, as in the paper's code, and float32 on a CPU.

    Args:
        device: as in the settings; a driver without a GPU may direct workers that have one.
    """
    if name != "auto":
        return name
    is_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return "float16" if is_gpu else "float32"
