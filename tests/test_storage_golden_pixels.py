"""Every oddity of real image collections in miniature, with the pixels it has always had.

ImageNet-1k alone has a PNG named .JPEG, CMYK JPEGs, grey ones, unreadable EXIF blocks and pictures of extreme shapes.
When a digest changes, stores made before hold other pixels: raise the versions of the stages that render.
"""

import base64
import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from storage.decode import decode_image
from storage.image_index import ImageIndex
from storage.views import RandomResizedCrop, Renderer

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")
HEIGHT, WIDTH = 24, 40
JPEGS = {
    "baseline": (
        "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU"
        "`kO^PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2A01*fP7yu{(0U"
        "`hb5di}c0sq7R8UO(R0s{d60000000000000041p)>K1OLPTAP@in1OfsB0RR9100000000310s{mE5fUO3GC@)Q!~huq00RI600000000"
        "00000000RsgD1_%Gd03i_o0s;a71Oos700000000010ssR95d{(xAtEs{QUBTi3<CiG0ucid06ze_yg9}|T0UnVERJyvD{^h9+;rl-9@>v"
        "*Z7G*AugZ<a<TaZEQ<-D2vo_;))1X&R#sbPs2k}7hQ*4`P3RA7e99jfvW#V!y=S(#bk#}J|e8k7OMO!XPE@!Ysd2$z08)vycSyF90eOSqM"
        "V9oM6L{YfK4t=LkvZU=3sTH@RGJ6#wdvEX)zlezPb*eDw8k$W*s>TLucCSbzJ&GbAzYunl@_+x?"
    ),
    "progressive": (
        "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU"
        "`kO^PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2C01*fP7yu{(0U"
        "`hb5di}c0sq7R8UO(R0s{d60000000000000031OWvG0{_GS836zT00RI30000000000000331Oo*I|Jncy0|5X65CaeZ00FzB-1?Qdj-t"
        "G|kgUEMm?G*TkUC9h1OLPT9S{Hk1pos90000000000000310s|2eAtEs{|Jncu0RaF31p<GQMoNw|xc&;zT~#vl05S!nURKSQaOa!<!~hx"
        "*00RI60RR910000000000009C65+PCl+5iXv0|5a)0m$gddM*z;@Tppp+GeQ#!~h%-00II60{{R30000000000009Is0s|2eA^+L{2mt~C"
        "0Y3rF^`lgV>{}5Tb7Y)SehB}>02B}b0000000000000000000m|Jncu0RaF8KLUUM!~hu(00IL6000000000000000009vpF+u;@00;pA0"
        "0BQCxM1i_D5@J1v}x6lP-IHdWE~e^^V~oG+5ij#0RRF30{{R35Dw2i^Zx+<!~hr(00RL5000000000000000009wEVgK3y2mu2D0Y4C-C~"
        "1b+uHdjUng7H97!d#i0RaF20000000000000015g{@E+5iXv0s#R(5N48(VnP8<6rvm-|HJ?q5CH)J0RaI400000000000096IAu&Nw|Jn"
        "cu0RaF3KM)%P&?{hAF--nTxeQmAU4U4TGTY)u>@DjgdRy-NfV#i`*#"
    ),
    "grey": (
        "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU"
        "`kO^PyfIG3kU!h04M<g5di<h02%-Q0s;d70000000000000041p@{F0tf%Z03Z+m0R#d90|5X4000000000100IL91rZV=6EZ<j|Jncu0R"
        "aF2KLB-jbButf`J8;RIm9%j80>7#xZSkq71Qy6vXeplQA~T4hT4tCPAW&XquJX?FBLY)wt$LtxZ{gJjU}?=qUL)9q}q7;wUX??o8)wbZRr"
        "f2#SuNX_zB;|TeW&YA?#QG*#"
    ),
    "CMYK": (
        "|JeWT01iQ9Z(?NtWB>pF0095n07C!`2?`4e2n`Dg3l0tq4-+626A}^=CmbFZATB8}FfJ)AEHgSvJ~K8(H!LkcS3yQhPEu1+GCo>iT2Nq0Q"
        "BqI;zyK5o02lx$1Va%3O%VWD5dcdO0RO}Q8UO$T0RaI40000000000000051_uNK0{_GSB@h4t0s{a61OWvA000000003300RUC5fT$2B0"
        "&ZeF)~7N|Jnc!1VaE#09gP_002J#u-aG}hT-~+GLYDW3G=c-X>V_-r%cCtiuYXMM|&jq8k_74LKy?Gq>P3neZno(YHv)`c0<5q_9m|(b5s"
        ";O1~L48<xG?W{laP(d1*$tD;^Lgm8!;c!%#=m*>rg*aTIsz5`Q~kU#xyYdRaqxe$k(-352D*J%~i|$JkI@d9dWoFU+RZAQA5fp|!x><zo9"
        "sCnH;CKNzohC$?BVsAffk>T$28o(~@=qtL<qN0Nn!ak1~m$_>H*Fq2z++Z9{VKN#Yx@v5ht68lfPS}9d`=OH6<^Y1p1<Yz6r3{c<5M|J)~"
        "Pd)4qo2pc$faJ@q*xHInV=}x9>mKC{#uJxyNUI5*M-L||ZnA@qndkd0uxMMc!C~IQWck}$#>Cg=dD#00VQZ)*jON+k*IjJEM`0Q{^>BQf-"
        "12u{u(VQsMn&c2+g<Fa+~g#FVCF+f%&oP;!}BxDY;p(pFrWX~"
    ),
}
"""24 x 40 pixels, in base85: the next version of an encoder may write other bytes."""


def noise(*shape: int, high: int = 256) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, high, shape)


def lossless(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(name: str) -> bytes:
    return base64.b85decode(JPEGS[name])


def with_orientation(data: bytes, orientation: int) -> bytes:
    """A JPEG with an EXIF block that asks for the picture to be turned."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    block = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


def sixteen_bit_png(pixels: NDArray[np.uint16]) -> bytes:
    """Written here: Pillow has no 16-bit colours."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = pixels.shape[:2]
    colours = 2 if pixels.ndim == 3 else 0
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rgb() -> Image.Image:
    return Image.fromarray(noise(HEIGHT, WIDTH, 3).astype(np.uint8))


def palette() -> Image.Image:
    image = Image.fromarray(noise(HEIGHT, WIDTH, high=16).astype(np.uint8)).convert("P")
    image.putpalette(noise(16, 3).astype(np.uint8).tobytes())
    return image


def animation(kind: str, **options: Any) -> bytes:
    frames = [palette(), palette().transpose(Image.Transpose.ROTATE_180)]
    frames = frames if kind == "GIF" else [frame.convert("RGB") for frame in frames]
    return lossless(frames[0], kind, save_all=True, append_images=frames[1:], **options)


ODDITIES: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: jpeg("baseline"),
    "progressive JPEG": lambda: jpeg("progressive"),
    "grey JPEG": lambda: jpeg("grey"),
    "CMYK JPEG": lambda: jpeg("CMYK"),
    "JPEG with EXIF orientation 6": lambda: with_orientation(jpeg("baseline"), 6),
    "PNG": lambda: lossless(rgb()),
    "16-bit grey PNG": lambda: sixteen_bit_png(noise(HEIGHT, WIDTH, high=65536).astype(np.uint16)),
    "16-bit RGB PNG": lambda: sixteen_bit_png(noise(HEIGHT, WIDTH, 3, high=65536).astype(np.uint16)),
    "palette with a transparent colour": lambda: lossless(palette(), transparency=3),
    "palette with alpha": lambda: lossless(palette(), transparency=bytes(range(0, 256, 16))),
    "RGBA PNG": lambda: lossless(Image.fromarray(noise(HEIGHT, WIDTH, 4).astype(np.uint8))),
    "grey PNG with alpha": lambda: lossless(Image.fromarray(noise(HEIGHT, WIDTH, 2).astype(np.uint8))),
    "1-bit PNG": lambda: lossless(Image.fromarray(noise(HEIGHT, WIDTH, high=2).astype(bool))),
    "CMYK TIFF": lambda: lossless(
        Image.frombytes("CMYK", (WIDTH, HEIGHT), noise(HEIGHT, WIDTH, 4).astype(np.uint8).tobytes()), "TIFF"
    ),
    "animated GIF": lambda: animation("GIF"),
    "animated WebP": lambda: animation("WEBP", lossless=True),
    "1 x 1": lambda: lossless(Image.new("RGB", (1, 1), (1, 2, 3))),
    "1 x 5000": lambda: lossless(Image.fromarray(noise(1, 5000, 3).astype(np.uint8))),
    "5000 x 1": lambda: lossless(Image.fromarray(noise(5000, 1, 3).astype(np.uint8))),
}

GOLDEN: dict[str, tuple[tuple[int, ...], str, str]] = {
    "JPEG": ((24, 40, 3), "8aadf203ccb592e3", "cf908cead88a88ad"),
    "progressive JPEG": ((24, 40, 3), "8aadf203ccb592e3", "cf908cead88a88ad"),
    "grey JPEG": ((24, 40), "17c49d8e71e385b5", "fc79147928544924"),
    "CMYK JPEG": ((24, 40, 3), "a37a7aa35b5840ca", "433c8cdb35f98732"),
    "JPEG with EXIF orientation 6": ((24, 40, 3), "8aadf203ccb592e3", "cf908cead88a88ad"),
    "PNG": ((24, 40, 3), "40af2c293c307ffc", "a1aea9580ab76eb4"),
    "16-bit grey PNG": ((24, 40), "6c7fb4c814e649ea", "fd1292195ee48e0d"),
    "16-bit RGB PNG": ((24, 40, 3), "40af2c293c307ffc", "a1aea9580ab76eb4"),
    "palette with a transparent colour": ((24, 40, 3), "9003e9e1dbd27194", "cec0779117ba017e"),
    "palette with alpha": ((24, 40, 3), "9003e9e1dbd27194", "cec0779117ba017e"),
    "RGBA PNG": ((24, 40, 3), "58aa554c4a482b8c", "c4402806629d7384"),
    "grey PNG with alpha": ((24, 40, 3), "adaadab0967ad3e7", "56fb47a9f045dd74"),
    "1-bit PNG": ((24, 40), "0a056314cd641f8a", "0c54ff06124172dd"),
    "CMYK TIFF": ((24, 40, 3), "7f749456659d98f3", "224b7a10f5c79be8"),
    "animated GIF": ((24, 40, 3), "9003e9e1dbd27194", "cec0779117ba017e"),
    "animated WebP": ((24, 40, 3), "9003e9e1dbd27194", "cec0779117ba017e"),
    "1 x 1": ((1, 1, 3), "e11e496ae579df35", "51119e9b5aea2e17"),
    "1 x 5000": ((1, 5000, 3), "c10111aefe62f776", "955e56544c4a34a0"),
    "5000 x 1": ((5000, 1, 3), "c10111aefe62f776", "955e56544c4a34a0"),
}
"""Shape and digest of the decoded pixels; digest of a flipped bilinear view of 32 px."""


def digest(pixels: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(pixels.tobytes(), digest_size=8).hexdigest()


def rendered(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    view = RandomResizedCrop(min_scale=0.3, flip_probability=1).view("golden", 0, (pixels.shape[0], pixels.shape[1]))
    return Renderer().render_view(pixels, view, 32)


@pytest.mark.parametrize("name", ODDITIES)
def test_pixels_are_what_they_were(name: str) -> None:
    shape, of_pixels, of_view = GOLDEN[name]
    pixels = decode_image(ODDITIES[name]())
    assert pixels.shape == shape
    assert digest(pixels) == of_pixels
    assert digest(rendered(pixels)) == of_view


def test_the_miniatures_show_what_they_are_called() -> None:
    """A golden value of the wrong thing would be worth nothing."""
    shown = {name: Image.open(io.BytesIO(make())) for name, make in ODDITIES.items()}
    modes = {
        "grey JPEG": "L", "CMYK JPEG": "CMYK", "RGBA PNG": "RGBA", "grey PNG with alpha": "LA", "1-bit PNG": "1",
        "CMYK TIFF": "CMYK", "16-bit grey PNG": "I;16",
    }  # fmt: skip
    assert {name: shown[name].mode for name in modes} == modes
    assert shown["JPEG with EXIF orientation 6"].getexif()[0x0112] == 6
    assert shown["progressive JPEG"].info["progressive"] == 1
    assert shown["palette with a transparent colour"].info["transparency"] == 3
    assert all(shown[name].n_frames == 2 for name in ("animated GIF", "animated WebP"))


def test_equal_pictures_have_equal_pixels() -> None:
    """An orientation is ignored, transparency and later frames are left out, 16 bits keep the high ones."""
    assert GOLDEN["JPEG with EXIF orientation 6"] == GOLDEN["JPEG"]
    plain = np.asarray(palette().convert("RGB"))
    for name in ("palette with a transparent colour", "palette with alpha", "animated GIF", "animated WebP"):
        np.testing.assert_array_equal(decode_image(ODDITIES[name]()), plain)
    for name, shape in (("16-bit grey PNG", (HEIGHT, WIDTH)), ("16-bit RGB PNG", (HEIGHT, WIDTH, 3))):
        np.testing.assert_array_equal(decode_image(ODDITIES[name]()), noise(*shape, high=65536) >> 8)


def test_a_png_named_jpeg_is_read_as_what_it_is(
    tmp_path: Path, make_index: Callable[[Path], tuple[Path, ImageIndex]]
) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    for number, name in enumerate(ODDITIES):
        (tmp_path / "set" / "a" / f"{number:02d}.JPEG").write_bytes(ODDITIES[name]())
    index = make_index(tmp_path / "set")[1]
    found = {}
    for images in (index.split("train"), index.split("eval")):
        found |= {key: digest(images.read_image(position)) for position, key in enumerate(images.keys)}
    assert found == {f"a/{number:02d}.JPEG": GOLDEN[name][1] for number, name in enumerate(ODDITIES)}
