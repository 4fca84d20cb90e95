"""Encodings with arithmetic, on the teacher's device, so that only encoded bytes leave it.

storage/encodings.py says in numpy what is stored; this is the same arithmetic in torch, to the bit, on any device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from storage.encodings import FP16_MAX, Int8
from storage.errors import BadTokensError


class EncodedInt8(NamedTuple):
    """Tokens of a batch, as `Int8.encode` makes them token by token."""

    tokens_BTC: Tensor  # int8
    token_scale_BT: Tensor  # float16


class Int8Encoder:
    """`Int8.encode` with its scales on a device."""

    def __init__(self, encoding: Int8, device: torch.device | str = "cpu") -> None:
        self._scale_C = torch.tensor(encoding.channel_scale, dtype=torch.float32, device=device)
        # a tensor of the device: a GPU would multiply by the rounded inverse of a number
        self._largest = torch.tensor(127.0, device=device)

    def __call__(self, tokens_BTC: Tensor, keys: Sequence[str]) -> EncodedInt8:
        """Encode a batch. Tokens do not touch each other.

        Args:
            tokens_BTC: float16.
            keys: the image of each row, for the error.

        Raises:
            BadTokensError: a token is not finite, or too large for the channel scales.
        """
        scaled_BTC = tokens_BTC.float() / self._scale_C
        scale_BT = _round_up_to_fp16(scaled_BTC.abs().amax(-1) / self._largest)
        largest_BT = self._largest * scale_BT.float() * self._scale_C.max()  # that decoding could ever give
        is_bad_BT = ~(largest_BT < FP16_MAX)
        if is_bad_BT.any():
            bad = sorted({keys[row] for row in is_bad_BT.any(-1).nonzero().flatten().tolist()})
            raise BadTokensError(
                f"a token of {len(bad)} images of a batch ({', '.join(bad[:5])}) is not finite or beyond the int8 "
                "encoding's channel scales; fit these on more images (extract.fit_views), or keep the encoding fp16"
            )
        step_BT1 = torch.where(scale_BT > 0, scale_BT, torch.ones_like(scale_BT)).float().unsqueeze(-1)
        return EncodedInt8((scaled_BTC / step_BT1).round_().to(torch.int8), scale_BT)


def _round_up_to_fp16(values: Tensor) -> Tensor:
    """The smallest float16 not below each value; values are not negative, so the next one has the next bits."""
    nearest = values.half()
    is_below = (nearest.float() < values).to(torch.int16)
    return (nearest.view(torch.int16) + is_below).view(torch.float16)
