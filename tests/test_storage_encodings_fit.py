"""Int8 is fitted on a sample: the spread of each channel, good enough on real features."""

import json
import tracemalloc
from pathlib import Path

import elpv_dataset
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from storage.encodings import (
    MIN_CHANNEL_SCALE,
    BitRound,
    Fp16,
    Int8,
    Zstd,
    fit_encoding,
    is_fitted,
)
from storage.errors import InputError
from storage.whitening import LayerNorm


def test_fitting_takes_the_spread_of_each_channel() -> None:
    generator = np.random.default_rng(0)
    spread_C = np.array([1.0, 3.0, 0.5, 1e-4])
    sample_RTC = (generator.normal(size=(50, 20, 4)) * spread_C).astype(np.float16)
    fitted = fit_encoding(Int8(), sample_RTC)
    assert isinstance(fitted, Int8) and is_fitted(fitted) and not is_fitted(Int8())
    np.testing.assert_allclose(fitted.channel_scale[:3], spread_C[:3], rtol=0.1)
    assert fitted.channel_scale[3] == MIN_CHANNEL_SCALE
    assert Int8.model_validate(json.loads(json.dumps(fitted.to_json()))) == fitted
    assert fit_encoding(fitted, sample_RTC * 2) is fitted
    for other in (Fp16(), Zstd(), BitRound()):
        assert fit_encoding(other, sample_RTC) is other and is_fitted(other)


@pytest.mark.parametrize("shape", [(40, 17, 24), (9, 50, 768), (3, 1, 5), (300, 7, 2)])
def test_a_sample_in_parts_gives_the_bits_of_one_array(shape: tuple[int, int, int]) -> None:
    """Stores that are begun already were fitted with numpy's own standard deviation."""
    generator = np.random.default_rng(1)
    offset_C, spread_C = generator.normal(size=shape[-1]) * 3, generator.uniform(0.1, 5, shape[-1])
    sample_RTC = (generator.normal(size=shape) * spread_C + offset_C).astype(np.float16)
    expected = tuple(sample_RTC.reshape(-1, shape[-1]).astype(np.float32).std(axis=0).tolist())
    for parts in (sample_RTC, [sample_RTC], np.array_split(sample_RTC, 3), list(sample_RTC[:, None])):
        fitted = fit_encoding(Int8(), parts)
        assert isinstance(fitted, Int8) and fitted.channel_scale == expected


def test_a_large_sample_is_never_copied_whole() -> None:
    parts = [np.ones((4, 64, 512), np.float16) for _ in range(32)]
    tracemalloc.start()
    fit_encoding(Int8(), parts)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10 * parts[0].nbytes


def test_nothing_is_fitted_on_nothing() -> None:
    with_nan = np.zeros((2, 3, 4), np.float16)
    with_nan[1, 1, 1] = np.nan
    for sample in (np.empty((0, 3, 4), np.float16), with_nan):
        with pytest.raises(InputError, match="int8 cannot be fitted on"):
            fit_encoding(Int8(), sample)


PHOTOGRAPHS = sorted(Path(elpv_dataset.__file__).parent.glob("data/images/*.png"))[::220]


@pytest.fixture(scope="module")
def real_tokens() -> NDArray[np.float16]:
    """Whitened tokens of photographs, as extraction makes them: (R, T, C)."""
    import torch

    from extract.backends import load_teacher
    from extract.teachers import find_teacher
    from extract.whiten import Whitener
    from storage.views import RandomResizedCrop, Renderer

    teacher = load_teacher(find_teacher("efficientnet-lite0"), device="cpu")
    sampler, renderer = RandomResizedCrop(), Renderer()
    pixels = []
    for path in PHOTOGRAPHS:
        image = np.asarray(Image.open(path).convert("RGB"))
        pixels.append(renderer.render_view(image, sampler.view(path.name, 0, image.shape[:2]), 224))
    with torch.inference_mode():
        tokens_RTC = teacher(torch.from_numpy(np.stack(pixels)))
    return np.asarray(Whitener(LayerNorm())(tokens_RTC, [path.name for path in PHOTOGRAPHS]).tokens_BTC)


def test_int8_is_good_enough_on_real_features(real_tokens: NDArray[np.float16]) -> None:
    fitted = fit_encoding(Int8(), real_tokens[::2])
    held_out = real_tokens[1::2]
    true_NC = held_out.reshape(-1, held_out.shape[-1])
    fields = fitted.encode(true_NC)
    found_NC = np.full_like(true_NC, np.nan)
    fitted.decode(fields, found_NC)
    found_NC, true_NC = found_NC.astype(np.float64), true_NC.astype(np.float64)
    relative = ((found_NC - true_NC) ** 2).sum() / (true_NC**2).sum()
    norms_N = np.linalg.norm(found_NC, axis=1) * np.linalg.norm(true_NC, axis=1)
    cosine_N = (found_NC * true_NC).sum(axis=1) / norms_N
    print(f"relative squared error {relative:.2e}, worst cosine {cosine_N.min():.6f}, {len(true_NC)} tokens")
    assert relative <= 2e-4 and cosine_N.min() >= 0.999
    assert sum(values.nbytes for values in fields.values()) <= 0.51 * held_out.nbytes
