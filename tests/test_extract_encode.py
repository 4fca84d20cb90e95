"""int8 on the teacher's device: the bits of storage's arithmetic, and the same refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from extract.config import ExecutionConfig, ExtractConfig
from extract.encode import Int8Encoder
from extract.run import run
from storage.encodings import MIN_CHANNEL_SCALE, Int8
from storage.errors import DecantError
from storage.reader import open_store
from storage.records import ImageKey

CHANNELS = 12
SCALES = [
    tuple(float(np.float32(scale)) for scale in np.geomspace(MIN_CHANNEL_SCALE, 8, CHANNELS)),
    (1.0,) * CHANNELS,
    tuple(float(np.float32(scale)) for scale in np.linspace(0.3, 3.1, CHANNELS)),
]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
any_fp16 = st.floats(width=16, allow_nan=True, allow_infinity=True)
usual = st.one_of(
    st.floats(-28, 28, width=16), st.sampled_from([0.0, -0.0, 6e-8, -6e-8, 2**-14, 127.0, 63.5, 0.5, 1.5])
)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.just(CHANNELS))
batches = hnp.arrays(np.float16, shapes, elements=usual) | hnp.arrays(np.float16, shapes, elements=any_fp16)


def ties() -> NDArray[np.float16]:
    """Scales that are powers of two, and values half-way between two integers."""
    tokens_BTC = np.zeros((1, 2, CHANNELS), np.float16)
    tokens_BTC[..., 0] = 127
    tokens_BTC[..., 1:] = np.arange(CHANNELS - 1) - 5.5
    return tokens_BTC


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", SCALES, ids=["spread", "ones", "odd"])
def test_every_bit_is_that_of_storage(scale: tuple[float, ...], device: str) -> None:
    encoding = Int8(channel_scale=scale)
    encoder = Int8Encoder(encoding, device)

    @settings(max_examples=200, deadline=None)
    @given(batches)
    @example(ties())
    @example(np.zeros((2, 3, CHANNELS), np.float16))
    @example(np.full((1, 1, CHANNELS), 6e-8, np.float16))
    @example(np.full((1, 1, CHANNELS), 65504, np.float16))
    @example(np.full((1, 1, CHANNELS), np.inf, np.float16))
    @example(np.full((1, 1, CHANNELS), np.nan, np.float16))
    def check(tokens_BTC: NDArray[np.float16]) -> None:
        keys = [f"image-{row}" for row in range(len(tokens_BTC))]
        on_device = torch.from_numpy(tokens_BTC.copy()).to(device)
        try:
            with np.errstate(all="ignore"):
                fields = [encoding.encode(tokens_TC) for tokens_TC in tokens_BTC]
        except DecantError:
            with pytest.raises(DecantError, match="image-"):
                encoder(on_device, keys)
            return
        found = encoder(on_device, keys)
        assert found.tokens_BTC.dtype == torch.int8 and found.token_scale_BT.dtype == torch.float16
        assert found.tokens_BTC.cpu().numpy().tobytes() == np.stack([f["tokens"] for f in fields]).tobytes()
        assert found.token_scale_BT.cpu().numpy().tobytes() == np.stack([f["token_scale"] for f in fields]).tobytes()

    check()


@pytest.mark.parametrize("device", DEVICES)
def test_many_ordinary_tokens_too(device: str) -> None:
    generator = np.random.default_rng(0)
    tokens_BTC = generator.normal(size=(16, 64, CHANNELS)).astype(np.float16)
    encoding = Int8(channel_scale=SCALES[2])
    found = Int8Encoder(encoding, device)(torch.from_numpy(tokens_BTC).to(device), [""] * 16)
    fields = encoding.encode(tokens_BTC)
    assert (found.tokens_BTC.cpu().numpy() == fields["tokens"]).all()
    assert (found.token_scale_BT.cpu().numpy() == fields["token_scale"]).all()


def test_the_images_that_cannot_be_encoded_are_named() -> None:
    tokens_BTC = torch.zeros(3, 2, CHANNELS, dtype=torch.float16)
    tokens_BTC[1, 0, 4] = torch.inf
    with pytest.raises(DecantError, match=r"a token of 1 images of a batch \(b\) is not finite"):
        Int8Encoder(Int8(channel_scale=SCALES[0]))(tokens_BTC, ["a", "b", "c"])


@pytest.mark.parametrize("token_fraction", [1.0, 0.4])
@pytest.mark.parametrize("layout", ["zarr", "wds"])
def test_a_store_in_int8_holds_what_storage_makes_of_the_one_in_fp16(
    make_index: Callable[..., tuple[Path, object]], tmp_path: Path, layout: Literal["zarr", "wds"],
    token_fraction: float,
) -> None:  # fmt: skip
    data, _ = make_index()
    run_cfg = ExecutionConfig(executor="inline", batch_size=4, device="cpu", audit_records=0)
    cfg = ExtractConfig(
        teacher="toy", views=2, records_per_shard=6, layout=layout, token_fraction=token_fraction, run=run_cfg
    )
    run(cfg, {"data": data}, tmp_path / "fp16")
    run(cfg.model_copy(update={"encoding": Int8()}), {"data": data}, tmp_path / "int8")
    exact, small = open_store(tmp_path / "fp16"), open_store(tmp_path / "int8")
    for key in map(ImageKey, exact.images.keys):
        for view_index in range(2):
            batch = small.new_batch(1)
            small.read_encoded(np.array([small.images.position(key) * 2 + view_index]), batch)
            fields = small.plan.encoding.encode(exact.read(key, view_index).tokens_TC)
            for name, values in fields.items():
                assert values.tobytes() == batch[name][0].tobytes()
