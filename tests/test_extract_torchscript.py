"""TorchScript archives are read as torch itself reads them, without running anything in them; bad ones are refused."""

import contextlib
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from extract.checkpoints import read_checkpoint
from extract.inert_pickle import RefusedError, read_inert
from extract.torchscript import list_records
from storage.errors import InputError
from tests.fixtures.upstream_clip import CLIP

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::DeprecationWarning")


class Odd(nn.Module):
    """Tensors as archives may have them: strides, views of one storage, shared modules, all types, and other things."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(5, 3).t())
        whole = torch.randn(10)
        self.register_buffer("left", whole[:4])
        self.register_buffer("right", whole[6:])
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("number", torch.tensor(224))
        for dtype in (torch.bfloat16, torch.float64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.int16):
            self.register_buffer(f"of_{str(dtype)[6:]}", torch.tensor([0, 1]).to(dtype))
        self.norm = nn.LayerNorm(3)
        self.again = self.norm
        self.words, self.sizes, self.pair = ["a"], {"x": 3}, (1.5, None)
        self.sign = -(2**40)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.norm(x)) + self.left.sum() + self.right.sum() + self.turned.sum() + self.sizes["x"]


def traced(module: nn.Module) -> Any:
    images = torch.randn(1, 3, 32, 32, dtype=next(module.parameters()).dtype)
    return torch.jit.trace(module, (images, torch.zeros(1, 5, dtype=torch.long)))


def half(module: nn.Module) -> nn.Module:
    """In half precision but for the norms, as OpenAI publishes it."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            part.half()
    return module


@pytest.fixture
def clip() -> CLIP:
    torch.manual_seed(2)
    return CLIP(side=32, patch=8, width=12, layers=2, heads=2).eval()


@pytest.fixture
def archive(clip: CLIP, tmp_path: Path) -> Path:
    path = tmp_path / "clip.pt"
    traced(clip).save(path)
    return path


@pytest.mark.parametrize("kind", ["scripted", "traced", "half", "scripted and odd", "all half"])
def test_tensors_are_those_of_torch(kind: str, clip: CLIP, tmp_path: Path) -> None:
    make: dict[str, Callable[[], Any]] = {
        "scripted": lambda: torch.jit.script(clip),
        "traced": lambda: traced(clip),
        "half": lambda: torch.jit.script(half(clip)),
        "scripted and odd": lambda: torch.jit.script(Odd().eval()),
        "all half": lambda: torch.jit.script(clip.half()),
    }
    make[kind]().save(tmp_path / "weights.pt")
    expected = torch.jit.load(tmp_path / "weights.pt").state_dict()
    found = read_checkpoint(tmp_path / "weights.pt")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride()), name
        assert torch.equal(found[name], tensor), name


def test_writing_to_a_tensor_leaves_the_file_as_it_is(archive: Path) -> None:
    before = archive.read_bytes()
    for tensor in read_checkpoint(archive).values():
        tensor.zero_()
    assert archive.read_bytes() == before


# ---- refused ---------------------------------------------------------------------------------------------------------


def repack(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive again with other records; None leaves one out."""
    with zipfile.ZipFile(path) as old:
        records = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records:
            changed = change(name, data)
            if changed is not None:
                new.writestr(name, changed)
    return path


def swap(suffix: str, data: bytes | None) -> Callable[[str, bytes], bytes | None]:
    return lambda name, old: data if name.endswith(suffix) else old


class Hostile:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_archive_never_runs(protocol: int, archive: Path, tmp_path: Path) -> None:
    payload = pickle.dumps(Hostile(tmp_path / "it-ran"), protocol=protocol)
    repack(archive, swap("/data.pkl", payload))
    with pytest.raises(InputError, match="more than tensors, and it is not opened"):
        read_checkpoint(archive)
    assert not (tmp_path / "it-ran").exists()
    pickle.loads(payload)
    assert (tmp_path / "it-ran").exists(), "the payload is a real one"


def test_code_in_the_archive_is_not_looked_at(archive: Path) -> None:
    expected = {name: tensor.clone() for name, tensor in read_checkpoint(archive).items()}
    repack(archive, lambda name, data: b"import os; os.abort()" if "/code/" in name else data)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_checkpoint(archive).items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (swap("/data/3", None), "has no record data/3"),
        (swap("/data.pkl", None), "has no record data.pkl"),
        (swap("/data/3", b"1234"), "record data/3 has 4 bytes, expected "),
        (swap("/byteorder", b"big"), "big-endian"),
        (swap("/data.pkl", b"\x80\x02."), "a damaged pickle"),
        (swap("/data.pkl", b""), "pickle"),
        (swap("/data.pkl", b"\x80\x02]."), "a list instead of a module"),
        (swap("/data.pkl", b"\x80\x02" + b"]" * (8 * 2**20)), "bytes of structure"),
    ],
)
def test_a_damaged_archive_is_told(change: Callable[[str, bytes], bytes | None], told: str, archive: Path) -> None:
    with pytest.raises(InputError, match=told):
        read_checkpoint(repack(archive, change))


def test_compressed_tensors_are_refused(archive: Path) -> None:
    """Nothing that is opened can be larger than the file."""
    with pytest.raises(InputError, match="is compressed or encrypted"):
        read_checkpoint(repack(archive, lambda name, data: data, zipfile.ZIP_DEFLATED))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name_are_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("clip/data/0", b"other")
    with pytest.raises(InputError, match="holds the record clip/data/0 twice"):
        read_checkpoint(archive)


def test_every_cut_and_every_flip_in_the_tensors_is_noticed(archive: Path) -> None:
    whole = archive.read_bytes()
    for cut in range(1, len(whole), len(whole) // 40):
        archive.write_bytes(whole[:-cut])
        with pytest.raises(InputError):
            read_checkpoint(archive)
    archive.write_bytes(whole)
    used = [record for name, record in list_records(archive).items() if name.startswith("data/")]
    for record in used[:: len(used) // 10]:
        at = record.start + record.num_bytes // 2
        archive.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputError, match="is damaged"):
            read_checkpoint(archive)


def module_of(tensor: bytes) -> bytes:
    """A pickle of a module with one tensor `w`, whose arguments are given."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + tensor + b"\x89)tR"
    return b"\x80\x02c__torch__\nM\n)\x81}(X\x01\x00\x00\x00w" + rebuilt + b"ub."


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


@pytest.mark.parametrize(
    ("offset", "size", "stride", "told"),
    [
        (0, 5, 1, "larger than its storage"),
        (1, 4, 1, "larger than its storage"),
        (0, 2, 4, "larger than its storage"),
        (0, 2**31 - 1, 0, "larger than its storage"),
        (-1, 4, 1, "a tensor of a size"),
        (0, 4, -1, "a tensor of a size"),
    ],
)
def test_tensors_outside_of_their_records_are_refused(
    offset: int, size: int, stride: int, told: str, tmp_path: Path
) -> None:
    def save(arguments: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
            for name, data in (("data.pkl", module_of(arguments)), ("data/0", bytes(16)), ("constants.pkl", b"")):
                file.writestr(f"w/{name}", data)
        return tmp_path / "w.pt"

    good = save(number(0) + number(4) + b"\x85" + number(1) + b"\x85")
    assert torch.equal(read_checkpoint(good)["w"], torch.zeros(4))
    with pytest.raises(InputError, match=told):
        read_checkpoint(save(number(offset) + number(size) + b"\x85" + number(stride) + b"\x85"))


def test_what_would_take_for_ever_is_refused(tmp_path: Path) -> None:
    """Modules inside themselves, tuples that double thirty times as a key, numbers of memo places."""
    doubling = b"\x80\x02}(" + b")" + b"q\x00h\x00\x86" * 60 + b"K\x01u."
    endless = b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00mh\x00sb."
    with pytest.raises(RefusedError, match="as key"):
        read_inert(doubling)
    assert read_inert(b"\x80\x02]r\xff\xff\xff\x7f.") == []
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
        for name, data in (("data.pkl", endless), ("constants.pkl", b"")):
            file.writestr(f"w/{name}", data)
    with pytest.raises(InputError, match="modules inside modules"):
        read_checkpoint(tmp_path / "w.pt")


def test_every_pickle_of_random_changes_ends(archive: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        [data] = [file.read(name) for name in file.namelist() if name.endswith("/data.pkl")]
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        at, value = torch.randint(len(data), (1,), generator=generator), torch.randint(256, (1,), generator=generator)
        with contextlib.suppress(RefusedError):
            read_inert(data[:at] + bytes([int(value)]) + data[at + 1 :])


def test_a_storage_that_is_not_aligned_is_copied_once(tmp_path: Path) -> None:
    """Archives packed again by other programs are without torch's gaps."""
    odd = tmp_path / "odd.pt"
    torch.jit.script(Odd().eval()).save(odd)
    expected = torch.jit.load(odd).state_dict()
    with zipfile.ZipFile(odd) as file:
        records = {name: file.read(name) for name in file.namelist()}
    for pad in range(4):
        with zipfile.ZipFile(odd, "w") as file:
            for name, data in ({"odd/pad": bytes(pad)} | records).items():
                file.writestr(name, data)
        found = read_checkpoint(odd)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert found["left"].untyped_storage().data_ptr() == found["right"].untyped_storage().data_ptr()


def test_records_in_one_another_are_refused(archive: Path) -> None:
    """Each would be copied, or read for its checksum, as often as the archive's directory names it."""
    with zipfile.ZipFile(archive, "a") as file:
        first, second = file.getinfo("clip/data/0"), file.getinfo("clip/data/1")
        for field in ("header_offset", "file_size", "compress_size", "CRC"):
            setattr(second, field, getattr(first, field))
        file.comment = b"so that the directory is written again"
    with pytest.raises(InputError, match="records lie in one another"):
        read_checkpoint(archive)
