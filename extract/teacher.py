"""A frozen teacher: uint8 pixels in, float32 tokens out, in the precision that was asked for."""

import os
import sys
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from extract.built import Forward
from extract.spec import Precision, TeacherSpec
from extract.spread import spread
from extract.weights import tensor_fingerprint
from storage.errors import ConfigError, InputError, first_line

PRECISIONS: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Precision)}
"""Of matrix products and convolutions (torch's autocast, which on a GPU keeps layer norms and softmax in float32)."""


class Teacher:
    """A module with the normalisation and the tap of its row.

    Args:
        forward: the tap.
        is_compiled: let torch.compile make the forward pass; the first batches then take minutes.
        devices: several that the module is spread over, `device` first.
    """

    def __init__(
        self, spec: TeacherSpec, module: nn.Module, forward: Forward, device: torch.device, *,
        precision: str = "float32", is_compiled: bool = False, channels_last: bool = True,
        devices: Sequence[torch.device] = (),
    ) -> None:  # fmt: skip
        _make_float32_exact()
        self.spec, self.device, self.precision = spec, device, precision
        self.features = spec.feature_spec()
        self.fingerprint = tensor_fingerprint(module.state_dict())
        module.eval().requires_grad_(False)
        if not devices:
            module.to(device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        module.to(memory_format=self._memory_format)  # type: ignore[call-overload]
        if devices:
            spread(module, devices)
        self.module = module
        self._plain, self._fast = forward, torch.compile(forward) if is_compiled else forward
        self.is_exact = precision == "float32" and not is_compiled
        """Whether `in_float32` would give the same."""
        self.num_done_again = 0
        """Views that were done again in float32, and nobody has heard of yet."""
        self._most_views = dict.fromkeys(PRECISIONS, sys.maxsize)
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """Tokens of uint8 views of side `spec.input_px`: (B, T, C) float32, prefix tokens first, then the grid by rows.

        A batch that the GPU has no memory for is done in parts, and so are those that come after it. Views for which a
        lower precision overflows, or gives NaN, go through again in float32, each by itself.

        Raises:
            ConfigError: the teacher gives tokens of another shape than its row says, or cannot be compiled.
            InputError: one view alone does not fit into the GPU's memory.
        """
        tokens_BTC = self._finite(pixels_BHWC, self._in_parts(pixels_BHWC, self._fast, self.precision))
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
        return self._in_parts(pixels_BHWC, self._plain, "float32")

    def _finite(self, pixels_BHWC: Tensor, tokens_BTC: Tensor) -> Tensor:
        """With views done again where plain float32 may do better."""
        if self.is_exact:
            return tokens_BTC
        is_bad_B = ~torch.isfinite(tokens_BTC).flatten(1).all(1)
        for row in is_bad_B.nonzero().flatten().tolist():
            tokens_BTC[row] = self.in_float32(pixels_BHWC[row : row + 1])[0]
            self.num_done_again += 1
        return tokens_BTC

    def take_num_done_again(self) -> int:
        """Views that were done again in float32 since this was last asked."""
        number, self.num_done_again = self.num_done_again, 0
        return number

    @property
    def most_views(self) -> int:
        """That went through the fast path at a time, where the GPU had no memory for more."""
        return self._most_views[self.precision]

    def _in_parts(self, pixels_BHWC: Tensor, forward: Forward, precision: str) -> Tensor:
        parts: list[Tensor] = []
        first = 0
        while first < len(pixels_BHWC):
            part = pixels_BHWC[first : first + self._most_views[precision]]
            tokens_BTC = self._tokens_if_they_fit(part, forward, precision)
            if tokens_BTC is not None:
                parts.append(tokens_BTC)
                first += len(part)
                continue
            if len(part) == 1:
                raise InputError(
                    f"teacher {self.spec.name!r} does not fit into the memory of {self.device} with one view of "
                    f"{self.spec.input_px} px in {precision}; use another GPU, a lower extract.precision or a smaller "
                    "extract.input_px"
                )
            torch.cuda.empty_cache()
            self._most_views[precision] = (len(part) + 1) // 2
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tokens_if_they_fit(self, pixels_BHWC: Tensor, forward: Forward, precision: str) -> Tensor | None:
        """None where memory ran out. What the attempt held is free only when this has returned: an exception keeps the
        frames that it came through alive."""
        try:
            return self._tokens(pixels_BHWC, forward, precision)
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:
            if "CUBLAS_STATUS_ALLOC_FAILED" in str(error):  # out of memory by another name
                return None
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise ConfigError(
                    f"torch.compile cannot make the forward pass of teacher {self.spec.name!r}: {first_line(error)}; "
                    "set extract.run.compile=false"
                ) from error
            raise

    def _tokens(self, pixels_BHWC: Tensor, forward: Forward, precision: str) -> Tensor:
        images_BCHW = pixels_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
        images_BCHW = images_BCHW.sub_(self._mean).div_(self._std).contiguous(memory_format=self._memory_format)
        if precision == "float32":
            return forward(images_BCHW).float().to(self.device)
        with torch.autocast(self.device.type, PRECISIONS[precision]):
            return forward(images_BCHW).float().to(self.device)


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("device=cuda was asked for, but torch sees no GPU; use device=cpu, or check the driver")
    return torch.device("cuda" if name != "cpu" and has_gpu else "cpu")


def choose_devices(device: torch.device, count: int) -> list[torch.device]:
    """The GPUs that a teacher is spread over; none for a teacher on one device.

    Raises:
        ConfigError: this process does not see so many.
    """
    if count < 2 or device.type != "cuda":
        return []
    if torch.cuda.device_count() < count:
        raise ConfigError(
            f"a teacher over {count} GPUs was asked for (extract.run.gpus_per_worker), but this process sees "
            f"{torch.cuda.device_count()}"
        )
    return [torch.device("cuda", number) for number in range(count)]


def choose_precision(name: str, device: str) -> str:
    """`auto` is float16 on a GPU, as in the paper's code, and float32 on a CPU.

    Args:
        device: as in the settings.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if name != "auto":
        return name
    return "float16" if choose_device(device).type == "cuda" else "float32"


def _make_float32_exact() -> None:
    """Without this, convolutions on a GPU are in TF32 by default, with ten bits of mantissa, and in some containers
    matrix products too: a store that says float32 would hold something else."""
    os.environ.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
