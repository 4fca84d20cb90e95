"""Images never take much memory: not large ones, not those that claim to be, not bombs."""

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import simplejpeg
from PIL import Image

from storage.decode import MAX_IMAGE_PIXELS, decode_image
from storage.errors import BadImageError
from tests.fixtures.memory import PEAK_KB
from tests.fixtures.pictures import HEIGHT, RGB, WIDTH, encoded

ROOT = Path(__file__).resolve().parent.parent
BOMB = """
import io, sys, warnings
from PIL import Image
from storage.decode import decode_image
from storage.errors import BadImageError

def refused(side):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    assert len(file.getvalue()) < 40_000
    before = peak_kb()
    try:
        decode_image(file.getvalue())
    except BadImageError as error:
        print(side, peak_kb() - before, error)

refused(14_000)
refused(11_000)
file = io.BytesIO()
Image.new("P", (9, 9)).save(file, "PNG", transparency=bytes(9))
decode_image(file.getvalue())
warnings.warn("others still warn", stacklevel=1)
"""


def test_bombs_are_refused_from_their_header_and_pillows_warnings_are_not_shown() -> None:
    child = subprocess.run([sys.executable, "-c", PEAK_KB + BOMB], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = child.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["14000", "11000"]
    assert all(int(line.split()[1]) < 20_000 for line in lines), lines  # in kB; the pixels would be 363,000 and more
    assert f"limit of {MAX_IMAGE_PIXELS:,}" in lines[1]
    assert "others still warn" in child.stderr and child.stderr.count("Warning") == 1


MEASURE = """
import io, sys
from PIL import Image
from storage.decode import decode_image

for kind in ("JPEG", "PNG"):
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, kind)
    decode_image(small.getvalue())
data = sys.stdin.buffer.read()
before = peak_kb()
pixels = decode_image(data)
print((peak_kb() - before) * 1024 / pixels.nbytes)
"""
LARGE: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "JPEG": ("RGB", "JPEG", {}, 1.1),
    "grey JPEG": ("L", "JPEG", {}, 1.1),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True}, 2.2),  # keeps two bytes a coefficient
    "PNG": ("RGB", "PNG", {"compress_level": 1}, 3.6),  # Pillow keeps four bytes a pixel, and copies twice
    "PNG with alpha": ("RGBA", "PNG", {"compress_level": 1}, 3.6),
    "palette": ("P", "PNG", {"compress_level": 1}, 3.6),
    "16-bit PNG": ("I;16", "PNG", {"compress_level": 1}, 6.3),
    "1-bit PNG": ("1", "PNG", {}, 3.3),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_image_takes_a_small_multiple_of_its_pixels(name: str) -> None:
    mode, kind, options, multiple = LARGE[name]
    data = encoded(Image.new(mode, (4000, 3000)), kind, **options)
    child = subprocess.run(
        [sys.executable, "-c", PEAK_KB + MEASURE], cwd=ROOT, input=data, capture_output=True, check=True
    )
    assert float(child.stdout) < multiple


@pytest.mark.parametrize("change_px", [0, 1])
def test_the_limit_holds_for_jpegs_before_any_memory_is_taken(change_px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.decode.MAX_IMAGE_PIXELS", HEIGHT * WIDTH - change_px)
    for image in (RGB, RGB.convert("L"), RGB.convert("CMYK")):
        if change_px:
            monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
            with pytest.raises(BadImageError, match="40 x 24 pixels, more than the limit of 959"):
                decode_image(encoded(image, "JPEG"))
        else:
            decode_image(encoded(image, "JPEG"))


def test_a_small_jpeg_that_claims_a_gigabyte_is_refused_from_its_header() -> None:
    data = bytearray(encoded(RGB, "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = (20_000).to_bytes(2, "big") * 2
    tracemalloc.start()
    try:
        with pytest.raises(BadImageError, match="20000 x 20000 pixels, more than the limit"):
            decode_image(bytes(data))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
