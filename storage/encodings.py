"""How whitened tokens become bytes. An encoding is a frozen record equal to its JSON, as a store's plan holds it.

    fp16        the tokens as they are                                           exact
    int8        a static scale a channel, then an absmax scale a token           half the bytes
    bit_round   fewer mantissa bits, then Blosc                                  for archives
    zstd        the tokens as they are, then Zstandard                           for archives

Every encoding says how far a decoded value may be from the true one (`error_bound`). Letters: R records, T tokens
(those that are kept, where a store keeps a subset), C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Setting

from storage.errors import BadTokensError, DamagedError, InputError, look_up
from storage.schema import Schema

Fields = dict[str, NDArray[Any]]
"""The encoded tokens of some records: `tokens` (R, T, C), and `token_scale` (R, T) where the encoding has one."""


class Field(NamedTuple):
    """One record's part of an encoded array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class _Float16(Schema):
    """What the encodings have in common whose decoded form is the float16 tokens themselves."""

    @property
    def is_exact(self) -> bool:
        """Decoding gives back every bit."""
        return True

    def fields(self, shape_TC: tuple[int, int]) -> dict[str, Field]:
        return {"tokens": Field("<f2", shape_TC)}

    def encode(self, tokens_TC: NDArray[np.float16]) -> Fields:
        return {"tokens": np.ascontiguousarray(tokens_TC, "<f2")}

    def decode(self, fields: Mapping[str, NDArray[Any]], out_BTC: NDArray[np.float16]) -> None:
        """Encoded tokens to float16."""
        if fields["tokens"] is not out_BTC:
            out_BTC[:] = fields["tokens"]

    def error_bound(self, tokens_TC: NDArray[np.floating], fields: Mapping[str, NDArray[Any]]) -> NDArray[np.floating]:
        """The largest |decoded - true| that is allowed, for each value."""
        return np.zeros(tokens_TC.shape, np.float32)

    def compressor(self) -> Any | None:
        """The numcodecs codec that a record's bytes go through; None where records have a fixed size."""
        return None


class Fp16(_Float16):
    """Raw little-endian float16. Whitened features do not compress, so this is also the fastest way to store them."""

    kind: Literal["fp16"] = "fp16"


class Zstd(_Float16):
    """Raw float16 in a Zstandard frame: 9 % fewer bytes at a tenth of the speed."""

    kind: Literal["zstd"] = "zstd"
    level: int = Setting(default=3, ge=1, le=19)

    def compressor(self) -> Any | None:
        import numcodecs

        return numcodecs.Zstd(level=self.level)

    def content_bytes(self, data: bytes | bytearray) -> int:
        """How long a compressed record says that it will be; -1 where it does not say. Source: RFC 8878, 3.1.1.1."""
        if len(data) < 9 or data[:4] != b"\x28\xb5\x2f\xfd":
            return -1
        is_single_segment, flag = data[4] >> 5 & 1, data[4] >> 6
        start = 6 - is_single_segment + (0, 1, 2, 4)[data[4] & 3]
        size = (is_single_segment, 2, 4, 8)[flag]
        found = int.from_bytes(data[start : start + size], "little")
        return found + 256 * (size == 2) if size else -1


class BitRound(_Float16):
    """Float16 rounded to fewer mantissa bits, bit-shuffled and compressed by Blosc."""

    kind: Literal["bit_round"] = "bit_round"
    keep_bits: int = Setting(default=5, ge=1, le=9)
    """Of the ten mantissa bits."""
    compressor_name: Literal["zstd", "lz4"] = "zstd"
    level: int = Setting(default=1, ge=1, le=9)

    @property
    def is_exact(self) -> bool:
        return False

    def encode(self, tokens_TC: NDArray[np.float16]) -> Fields:
        """Tokens with their last bits rounded away.

        Raises:
            BadTokensError: a token is not finite, or rounds to infinity.
        """
        from numcodecs import BitRound as Rounding

        rounded: Any = Rounding(self.keep_bits).encode(np.array(tokens_TC, "<f2"))
        rounded_TC = np.asarray(rounded).view("<f2").reshape(tokens_TC.shape)
        if not np.isfinite(rounded_TC).all():
            raise BadTokensError("a token is not finite or beyond the bit_round encoding; keep the encoding fp16")
        return {"tokens": rounded_TC}

    def error_bound(self, tokens_TC: NDArray[np.floating], fields: Mapping[str, NDArray[Any]]) -> NDArray[np.floating]:
        """Half a step of the kept bits; below float16's normal range the step is that of its smallest normal number."""
        magnitude_TC = np.maximum(np.abs(tokens_TC.astype(np.float32)), np.float32(2**-14))
        return magnitude_TC * np.float32(2.0 ** -(self.keep_bits + 1))

    def compressor(self) -> Any | None:
        import numcodecs

        return numcodecs.Blosc(cname=self.compressor_name, clevel=self.level, shuffle=numcodecs.Blosc.BITSHUFFLE)

    def content_bytes(self, data: bytes | bytearray) -> int:
        """How long a compressed record says that it will be; -1 where it does not say."""
        return int.from_bytes(data[4:8], "little") if len(data) >= 16 else -1


class Int8(Schema):
    """Tokens divided by a static scale of each channel, then by their own absmax: no outlier is ever clipped.

    On real features the relative squared error is about 1e-4 and the worst token keeps a cosine above 0.999. Decoding
    is one multiplication by each scale, which the training device does.
    """

    kind: Literal["int8"] = "int8"
    channel_scale: tuple[Annotated[float, Setting(gt=0)], ...] = ()
    """Standard deviation of each channel on a sample, rounded to float32; fitted when a store is planned."""

    @property
    def is_exact(self) -> bool:
        return False

    def fields(self, shape_TC: tuple[int, int]) -> dict[str, Field]:
        return {"tokens": Field("|i1", shape_TC), "token_scale": Field("<f2", shape_TC[:1])}

    def encode(self, tokens_TC: NDArray[np.float16]) -> Fields:
        """Tokens to integers and a scale a token.

        Raises:
            BadTokensError: a token is not finite, or too large for the channel scales.
        """
        scale_C = self._scale_C(tokens_TC.shape[-1])
        scaled_TC = tokens_TC.astype(np.float32) / scale_C
        scale_T = round_up_to_fp16(np.abs(scaled_TC).max(axis=-1) / 127)
        largest_T = 127 * scale_T.astype(np.float32) * scale_C.max()  # that decoding could ever give
        if not (largest_T < FP16_MAX).all():
            raise BadTokensError(
                "a token is not finite or beyond the int8 encoding's channel scales; fit these on more images "
                "(extract.fit_views), or keep the encoding fp16"
            )
        step_T1 = np.where(scale_T > 0, scale_T, 1).astype(np.float32)[..., None]
        return {"tokens": np.rint(scaled_TC / step_T1).astype(np.int8), "token_scale": scale_T}

    def decode(self, fields: Mapping[str, NDArray[Any]], out_BTC: NDArray[np.float16]) -> None:
        """Encoded tokens to float16."""
        token_scale = fields["token_scale"].astype(np.float32)[..., None]
        out_BTC[:] = fields["tokens"] * token_scale * self._scale_C(out_BTC.shape[-1])

    def error_bound(self, tokens_TC: NDArray[np.floating], fields: Mapping[str, NDArray[Any]]) -> NDArray[np.floating]:
        """Half a step of the integers, and the rounding of the result to float16 (relative 2**-11, at least 2**-25)."""
        step_TC = fields["token_scale"].astype(np.float32)[..., None] * self._scale_C(tokens_TC.shape[-1])
        rounding_TC = np.abs(tokens_TC.astype(np.float32)) * np.float32(2**-11) + np.float32(2**-25)
        return step_TC * np.float32(0.5 * (1 + 2**-10)) + rounding_TC

    def compressor(self) -> Any | None:
        """Integers are stored as they are, so that their place can be computed."""
        return None

    def _scale_C(self, channels: int) -> NDArray[np.float32]:
        if len(self.channel_scale) != channels:
            raise DamagedError(f"int8 with {len(self.channel_scale)} channel scales for tokens of {channels} channels")
        return np.array(self.channel_scale, np.float32)


Encoding = Fp16 | Zstd | BitRound | Int8
ENCODINGS: dict[str, Encoding] = {encoding.kind: encoding for encoding in (Fp16(), Int8(), BitRound(), Zstd())}
"""By the name that the command line takes, with their defaults."""
AnyEncoding = Annotated[Encoding, Setting(discriminator="kind")]

FP16_MAX = float(np.finfo(np.float16).max)
MIN_CHANNEL_SCALE = 1 / 64
"""A channel that hardly varies gets this scale, so that one unusual token cannot take all its neighbours' precision."""


def find_encoding(name: str) -> Encoding:
    """Look an encoding up.

    Raises:
        ConfigError: no such name; offers the nearest ones.
    """
    return look_up("encoding", name, ENCODINGS)


def fit_encoding(encoding: Encoding, sample: Sequence[NDArray[np.float16]] | NDArray[np.float16]) -> Encoding:
    """Fill in what an encoding learns from a sample of whitened tokens; others come back as they are.

    Args:
        sample: parts of (..., C); how it is divided makes no difference.

    Raises:
        InputError: there is no token to learn from, or one is not finite.
    """
    if not isinstance(encoding, Int8) or encoding.channel_scale:
        return encoding
    num_tokens = sum(part.size // part.shape[-1] for part in sample)
    if not num_tokens or not all(np.isfinite(part).all() for part in sample):
        raise InputError(f"int8 cannot be fitted on {num_tokens} tokens: none, or some that are not finite")
    scale_C = np.maximum(_spread(sample, num_tokens), MIN_CHANNEL_SCALE).astype(np.float32)
    return encoding.model_copy(update={"channel_scale": tuple(scale_C.tolist())})


def _spread(sample: Sequence[NDArray[np.float16]] | NDArray[np.float16], num_tokens: int) -> NDArray[np.float32]:
    """Standard deviation of each channel: to the bit what numpy says of one float32 array, which would be large."""
    channels = sample[0].shape[-1]

    def mean_C(of: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> NDArray[np.float32]:
        sum_C = np.zeros(channels, np.float32)
        for part in sample:
            values_NC = of(part.reshape(-1, channels).astype(np.float32))
            sum_C = np.add.reduce(np.concatenate([sum_C[None], values_NC]), axis=0)
        return sum_C / np.float32(num_tokens)

    centre_C = mean_C(lambda tokens_NC: tokens_NC)
    return np.sqrt(mean_C(lambda tokens_NC: np.square(tokens_NC - centre_C)))


def is_fitted(encoding: Encoding) -> bool:
    """Whether an encoding has all that it learns from a sample."""
    return not isinstance(encoding, Int8) or bool(encoding.channel_scale)


def unfitted(encoding: Encoding) -> Encoding:
    """The same without what it learnt from a sample."""
    return encoding.model_copy(update={"channel_scale": ()}) if isinstance(encoding, Int8) else encoding


def round_up_to_fp16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The smallest float16 not below each value: an absmax scale that is rounded down would clip."""
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float16)
        return np.where(nearest < values, np.nextafter(nearest, np.float16(np.inf)), nearest)
