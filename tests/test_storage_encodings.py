"""Encodings keep what they promise: their bounds, their bytes, their JSON."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydantic import ValidationError

from storage.encodings import (
    MIN_CHANNEL_SCALE,
    BitRound,
    Encoding,
    Fields,
    Fp16,
    Int8,
    Zstd,
    round_up_to_fp16,
)
from storage.errors import DamagedError, DecantError
from storage.fingerprint import digest_json
from storage.records import StorePlan

CHANNELS = 12
SCALE = tuple(float(np.float32(scale)) for scale in np.geomspace(MIN_CHANNEL_SCALE, 8, CHANNELS))
KINDS: list[Encoding] = [
    Fp16(), Zstd(), Zstd(level=19), Int8(channel_scale=SCALE), Int8(channel_scale=(1.0,) * CHANNELS),
    *(BitRound(keep_bits=bits) for bits in range(1, 10)), BitRound(compressor_name="lz4", level=9),
]  # fmt: skip
names = pytest.mark.parametrize("encoding", KINDS, ids=[digest_json(kind.to_json())[:4] + kind.kind for kind in KINDS])


@st.composite
def tokens(draw: st.DrawFn) -> NDArray[np.float16]:
    """Whitened-like tokens with outlier channels and tokens, constants, zeros, extremes and subnormals."""
    shape = draw(st.integers(1, 9)), CHANNELS
    if draw(st.booleans()):
        values = hnp.arrays(np.float16, shape, elements=st.floats(-28, 28, width=16))
        return draw(values)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens_TC = generator.normal(size=shape) * draw(st.sampled_from([1.0, 1e-3, 1e-5, 6e-8, 0.0]))
    for _ in range(draw(st.integers(0, 3))):
        row, channel = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, CHANNELS - 1))
        where = draw(st.sampled_from([(row, channel), (row, slice(None)), (slice(None), channel)]))
        tokens_TC[where] = draw(st.sampled_from([0.0, 28.0, -28.0, 1e-7, 2**-14, 6e-8, -0.0, 1.0]))
    return np.clip(tokens_TC, -28, 28).astype(np.float16)


def decoded(encoding: Encoding, fields: Fields) -> NDArray[np.float16]:
    out = np.full(fields["tokens"].shape, np.nan, np.float16)
    encoding.decode(fields, out)
    return out


# ---- bounds ----------------------------------------------------------------------------------------------------------


@names
def test_every_value_is_within_its_bound(encoding: Encoding) -> None:
    @settings(max_examples=150)
    @given(tokens())
    @example(np.full((2, CHANNELS), 28, np.float16))
    @example(np.zeros((3, CHANNELS), np.float16))
    @example(np.full((1, CHANNELS), 6e-8, np.float16))
    def check(tokens_TC: NDArray[np.float16]) -> None:
        before = tokens_TC.copy()
        fields = encoding.encode(tokens_TC)
        assert tokens_TC.tobytes() == before.tobytes()
        assert {name: (array.dtype.str, array.shape) for name, array in fields.items()} == {
            name: (field.dtype, field.shape) for name, field in encoding.fields(tokens_TC.shape).items()
        }
        found_TC = decoded(encoding, fields)
        bound_TC = encoding.error_bound(tokens_TC, fields)
        assert bound_TC.shape == tokens_TC.shape and np.isfinite(bound_TC).all()
        error_TC = np.abs(found_TC.astype(np.float64) - tokens_TC.astype(np.float64))
        assert (error_TC <= bound_TC).all()
        assert encoding.is_exact == (found_TC.tobytes() == tokens_TC.tobytes()) or not encoding.is_exact
        if encoding.is_exact:
            assert not bound_TC.any()

    check()


@names
def test_the_bound_is_worth_something(encoding: Encoding) -> None:
    """A bound of a hundred would hold as well: the worst error comes near the stated one."""
    tokens_TC = np.random.default_rng(0).normal(size=(2000, CHANNELS)).astype(np.float16)
    fields = encoding.encode(tokens_TC)
    error_TC = np.abs(decoded(encoding, fields).astype(np.float64) - tokens_TC)
    bound_TC = encoding.error_bound(tokens_TC, fields)
    if not encoding.is_exact:
        assert (error_TC / bound_TC).max() > 0.75


def test_int8_clips_nothing() -> None:
    """The largest value of a token is the end of the scale, so it comes back best of all."""

    @given(tokens(), st.sampled_from([kind for kind in KINDS if isinstance(kind, Int8)]))
    def check(tokens_TC: NDArray[np.float16], encoding: Int8) -> None:
        fields = encoding.encode(tokens_TC)
        scaled_TC = np.abs(tokens_TC.astype(np.float64)) / np.array(encoding.channel_scale)
        assert fields["tokens"].min() >= -127
        assert (scaled_TC.max(axis=1) <= 127 * fields["token_scale"].astype(np.float64) * (1 + 1e-6)).all()
        assert not (fields["token_scale"][~tokens_TC.any(axis=1)]).any()

    check()


@given(hnp.arrays(np.float32, 20, elements=st.floats(0, 70_000, width=32)))
def test_scales_are_rounded_up(values: NDArray[np.float32]) -> None:
    found = round_up_to_fp16(values)
    assert (found >= values).all()
    below = np.nextafter(found, np.float16(-np.inf))
    assert ((below < values) | (values == 0)).all()


@names
def test_batches_are_decoded_like_single_records(encoding: Encoding) -> None:
    tokens_RTC = np.random.default_rng(1).normal(size=(5, 4, CHANNELS)).astype(np.float16)
    parts = [encoding.encode(tokens_TC) for tokens_TC in tokens_RTC]
    batch = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    found = decoded(encoding, batch)
    for row, part in enumerate(parts):
        assert found[row].tobytes() == decoded(encoding, part).tobytes()


@names
def test_a_part_of_the_tokens_is_encoded_like_the_whole(encoding: Encoding) -> None:
    """Token by token: what lets a store be thinned out without decoding it."""
    tokens_TC, kept = np.random.default_rng(2).normal(size=(9, CHANNELS)).astype(np.float16), [0, 3, 8]
    whole, part = encoding.encode(tokens_TC), encoding.encode(tokens_TC[kept])
    for name, values in part.items():
        np.testing.assert_array_equal(whole[name][kept], values)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", [BitRound(), Int8(channel_scale=SCALE)])
def test_what_is_not_finite_is_refused(encoding: Encoding, value: float) -> None:
    tokens_TC = np.zeros((3, CHANNELS), np.float16)
    tokens_TC[1, 2] = value
    with pytest.raises(DecantError, match="a token is not finite"):
        encoding.encode(tokens_TC)


@pytest.mark.parametrize("encoding", [BitRound(keep_bits=1), BitRound(), Int8(channel_scale=SCALE)])
def test_what_would_come_back_as_infinity_is_refused(encoding: Encoding) -> None:
    for value in np.float16([20_000, 60_000, 65_000, 65_504]):
        tokens_TC = np.zeros((1, CHANNELS), np.float16)
        tokens_TC[0, -1] = value
        try:
            fields = encoding.encode(tokens_TC)
        except DecantError as error:
            assert "keep the encoding fp16" in str(error)
            continue
        assert np.isfinite(decoded(encoding, fields)).all()
    with pytest.raises(DecantError):
        encoding.encode(np.full((1, CHANNELS), 65_504, np.float16))


def test_int8_of_other_channels_is_refused() -> None:
    for encoding in (Int8(), Int8(channel_scale=(1.0, 1.0))):
        with pytest.raises(
            DamagedError, match=f"{len(encoding.channel_scale)} channel scales for tokens of 3 channels"
        ):
            encoding.encode(np.zeros((2, 3), np.float16))


# ---- settings --------------------------------------------------------------------------------------------------------


@names
def test_an_encoding_is_equal_to_its_json(encoding: Encoding, image_list: Any, store_plan: Any) -> None:
    plan = store_plan(image_list(1), encoding=encoding)
    text = plan.to_file()
    again = StorePlan.from_file(Path("plan.json"), text)
    assert again == plan and again.encoding == encoding and type(again.encoding) is type(encoding)
    assert again.to_file() == text and hash(again.encoding) == hash(encoding)
    with pytest.raises(ValidationError, match="frozen"):
        encoding.kind = "other"  # type: ignore[assignment, misc]


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "fp8"}, {}, {"kind": "fp16", "level": 1}, {"kind": "zstd", "level": 0}, {"kind": "zstd", "level": 20},
        {"kind": "bit_round", "keep_bits": 0}, {"kind": "bit_round", "keep_bits": 10},
        {"kind": "bit_round", "compressor_name": "gzip"}, {"kind": "int8", "channel_scale": [0.0]},
        {"kind": "int8", "channel_scale": [-1.0]}, {"kind": "int8", "channel_scale": [float("nan")]},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(values: Any, image_list: Any, store_plan: Any) -> None:
    plan = store_plan(image_list(1)).to_json()
    with pytest.raises(ValidationError):
        StorePlan.model_validate(plan | {"encoding": values})


def test_every_encoding_is_tested_here() -> None:
    assert {type(kind) for kind in KINDS} == set(get_args(Encoding))


# ---- compressed bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding", [kind for kind in KINDS if kind.compressor() is not None], ids=lambda kind: digest_json(kind.to_json())
)
def test_compressed_bytes_are_those_of_zarr_itself(encoding: Encoding) -> None:
    codec: Any = None
    if isinstance(encoding, Zstd):
        codec = zarr.codecs.ZstdCodec(level=encoding.level)
    elif isinstance(encoding, BitRound):
        cname = encoding.compressor_name
        codec = zarr.codecs.BloscCodec(typesize=2, cname=cname, clevel=encoding.level, shuffle="bitshuffle")
    fields = encoding.encode(np.random.default_rng(3).normal(size=(40, CHANNELS)).astype(np.float16))
    store: dict[str, Any] = {}
    array = zarr.create_array(
        zarr.storage.MemoryStore(store), shape=(40, CHANNELS), chunks=(40, CHANNELS), dtype="<f2", filters=None,
        compressors=codec,
    )  # fmt: skip
    array[:] = fields["tokens"]
    compressor = encoding.compressor()
    assert compressor is not None
    ours, theirs = bytes(compressor.encode(fields["tokens"])), store["c/0/0"].to_bytes()
    assert bytes(compressor.decode(theirs)) == fields["tokens"].tobytes()
    assert ours == theirs
