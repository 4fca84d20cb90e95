"""Small weights files that ask for much memory or time are refused before they get it."""

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from extract.checkpoints import read_checkpoint
from storage.errors import InputError
from tests.fixtures.memory import PEAK_KB

Saver = Callable[[bytes, Path], Path]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x0b" + value.to_bytes(11, "little", signed=True)


def call(name: str, *arguments: bytes) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


def named(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"


def tensor(size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", storage: bytes = STORAGE) -> bytes:
    return call("torch._utils _rebuild_tensor_v2", storage, b"K\x00", size, stride, b"\x89", b"}")


def archive(content: bytes, path: Path, kind: str = "") -> Path:
    """As `torch.save` writes it, or TorchScript."""
    records = {"data.pkl": b"\x80\x02" + content + b".", "version": b"3\n", "data/0": bytes(16)}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (records | ({kind: b""} if kind else {})).items():
            file.writestr(f"w/{name}", data)
    return path


def torchscript(content: bytes, path: Path) -> Path:
    module = b"c__torch__\nM\n)\x81" + named(text("w"), content) + b"b"
    return archive(module, path, "constants.pkl")


def legacy(content: bytes, path: Path) -> Path:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    for _ in range(3):
        pickle.load(buffer)
    start = buffer.getvalue()[: buffer.tell()]
    storages = pickle.dumps(["0"], protocol=2) + struct.pack("<q", 4) + bytes(16)
    path.write_bytes(start + b"\x80\x02" + content + b"." + storages)
    return path


SAVERS: dict[str, Saver] = {"archive": archive, "legacy": legacy, "torchscript": torchscript}

DOUBLING = b")" + b"q\x00h\x00\x86" * 40
LONG_TUPLE = b"(" + b"N" * 200_000 + b"tq\x01"
LONG_DICT = named(b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(50_000))) + b"q\x01"


def items(*content: bytes) -> bytes:
    return b"](" + b"".join(content) + b"e"


BOMBS = {
    "a size of tuples of tuples": (tensor(size=DOUBLING), "no count below"),
    "many dimensions": (tensor(LONG_TUPLE, b"h\x01"), "200000 dimensions"),
    "larger than its storage": (tensor(size=b"J" + struct.pack("<i", 2**30) + b"\x85"), "larger than its storage of 4"),
    "numpy's scalar of any size": (
        call("numpy._core.multiarray scalar", call("numpy dtype", text("V3000000000"))), "",
    ),
    "bytearray": (call("builtins bytearray", b"J" + struct.pack("<i", 2**31 - 1)), "builtins.bytearray"),
    "tensor of any size": (call("torch FloatTensor", b"J" + struct.pack("<i", 2**30)), "torch.FloatTensor"),
    "copies of a tuple": (items(LONG_TUPLE, call("torch Size", b"h\x01") * 10_000), "200000 dimensions"),
    "copies of arguments": (items(LONG_TUPLE, b"ctorch\ndevice\nh\x01R" * 10_000), "200000 arguments"),
    "copies of arguments of a class": (items(LONG_TUPLE, b"cargparse\nNamespace\nh\x01\x81" * 10_000), "Namespace"),
    "copies of text": (
        items(text("x" * 1_000_000) + b"q\x01", call("_codecs encode", b"h\x01", text("l1")) * 9_000), "1000000 bytes",
    ),
    "copies of a dictionary": (items(LONG_DICT, b"ccollections\nOrderedDict\n)Rh\x01b" * 9_000), "50000 attributes"),
    "counters of a dictionary": (items(LONG_DICT, call("collections Counter", b"h\x01") * 9_000), "at most 8 items"),
    "equal hashes": (named(b"".join(number(i * (2**61 - 1)) + b"N" for i in range(20_000))), "a huge number as key"),
    "a key of tuples of tuples": (named(DOUBLING + b"N"), "a tuple as key"),
    "a long name": (b"c__torch__\n" + b"M" * 1_000_000 + b"\n", "__torch__.MMM"),
}  # fmt: skip
"""What the weights say to hold beside a tensor, and what is told."""

MEASURE = (
    PEAK_KB
    + """
import sys, time
from pathlib import Path
from extract.checkpoints import read_checkpoint
from storage.errors import InputError
import torch, numpy
before = peak_kb()
for path in map(Path, sys.argv[1:]):
    started = time.monotonic()
    try:
        read_checkpoint(path)
        outcome = "opened"
    except InputError as error:
        outcome = str(error)
    print(outcome, round(time.monotonic() - started, 2), (peak_kb() - before) // 1024)
    before = peak_kb()
"""
)


def test_bombs_are_refused_in_no_time_and_memory(tmp_path: Path) -> None:
    cases = {
        save(named(text("w"), content), tmp_path / f"{kind}, {bomb}"): told
        for kind, save in SAVERS.items()
        for bomb, (content, told) in BOMBS.items()
    }
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, cases)], capture_output=True, text=True, timeout=120, check=True
    )
    lines = [line.rsplit(" ", 2) for line in found.stdout.splitlines()]
    for (message, seconds, grown_mb), (path, told) in zip(lines, cases.items(), strict=True):
        assert str(path) in message
        assert told in message
        assert float(seconds) < 2, message
        assert int(grown_mb) < 50, message


def test_names_through_shared_modules_are_not_multiplied(tmp_path: Path) -> None:
    """Each module of a chain has the next one twice: as many names as paths, each with all of the parts before it."""

    def save(part: str, levels: int) -> Path:
        start = b"c__torch__\nM\n)\x81" + named(text("w"), tensor()) + b"bq\x00"
        level = b"c__torch__\nM\n)\x81" + named(text(f"{part}a"), b"h\x00", text(f"{part}b"), b"h\x00") + b"bq\x00"
        return archive(start + level * levels, tmp_path / "w.pt", "constants.pkl")

    assert len(read_checkpoint(save("x", 4))) == 16
    with pytest.raises(InputError, match="more than 100000 attributes or 20000 tensors"):
        read_checkpoint(save("x", 20))
    with pytest.raises(InputError, match="a name of more than 250 characters"):
        read_checkpoint(save("x" * 100, 4))
