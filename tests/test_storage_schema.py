"""Content hashes, sealed records, the numbers of a plan, and the words of errors."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from storage import errors
from storage.errors import ConfigError, DamagedError, unknown_name
from storage.fingerprint import digest_bytes, digest_file, digest_json, digest_parts, digest_pieces, short
from storage.records import StorePlan
from storage.schema import Schema, Sealed
from storage.stage import Interrupted, stop_on_signals

Plan = Callable[..., StorePlan]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


class Inner(Schema):
    size_px: int = Field(default=4, ge=1)


class Settings(Sealed):
    not_identity: ClassVar[frozenset[str]] = frozenset({"threads"})

    rate: float = 0.5
    names: tuple[str, ...] = ()
    threads: int = 1
    inner: Inner = Inner()
    values: dict[str, Any] = {}


# Fingerprints


def test_digests_are_blake3() -> None:
    """Vectors of the BLAKE3 reference, cut to 128 bits."""
    assert digest_bytes(b"") == "af1349b9f5f9a1a6a0404dea36dcc949"
    assert digest_bytes(b"abc") == "6437b3ac38465133ffb63b75273a8db5"
    assert short(digest_bytes(b"")) == "af1349b9f5"


@pytest.mark.parametrize("size", [0, 1, 4096, 3_000_001])
def test_files_and_pieces_have_the_digest_of_their_bytes(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    pieces = [data[start : start + 1_000_000] for start in range(0, size, 1_000_000)]
    assert (
        digest_file(tmp_path / "file") == digest_pieces(pieces) == digest_bytes(memoryview(data)) == digest_bytes(data)
    )


@pytest.mark.timeout(20)
def test_a_forked_process_takes_digests_too(tmp_path: Path, fork: Any) -> None:
    """A digest by many threads waits for ever in a child, which has none of its parent's threads."""
    (tmp_path / "file").write_bytes(bytes(20_000_000))
    expected = digest_file(tmp_path / "file")
    seen = os.waitpid(fork(lambda: print(digest_file(tmp_path / "file") == expected or 1 / 0)), 0)
    assert seen[1] == 0


@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_the_boundaries_of_parts_count(one: list[bytes], other: list[bytes]) -> None:
    assert (digest_parts(one) == digest_parts(other)) == (one == other)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_the_order_of_keys_does_not_count(value: dict[str, Any]) -> None:
    assert (
        digest_json(value) == digest_json(dict(reversed(value.items()))) == digest_json(json.loads(json.dumps(value)))
    )
    assert digest_json(value) != digest_json(value | {"one more": 1})


def test_what_is_no_json_has_no_digest() -> None:
    for value in (float("nan"), float("inf"), {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            digest_json(value)
    assert digest_json({"é": (1, 2)}) == digest_json({"é": [1, 2]}) != digest_json({"é": [2, 1]})


# Schemas


def test_records_are_frozen_and_take_nothing_unknown() -> None:
    record = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        record.rate = 1.0  # type: ignore[misc]
    for values in ({"rat": 1.0}, {"rate": float("nan")}, {"rate": float("inf")}, {"inner": {"size": 1}}):
        with pytest.raises(ValidationError):
            Settings.model_validate(values)


def test_what_cannot_change_a_result_is_no_identity() -> None:
    assert Settings(threads=8).identity() == Settings().identity() != Settings(rate=0.1).identity()
    assert "threads" in Settings().to_json()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": "fast"}, "here: rate: Input should be a valid number.*, found 'fast'$"),
        ({"inner": {"size_px": 0}}, r"here: inner\.size_px: .*greater than or equal to 1, found 0$"),
        ({"rat": 1, "nam": 2}, r"here: rat: Extra inputs are not permitted \(and 1 more\)$"),
        ([], r"here: value: .*, found \[\]$"),
    ],
)
def test_wrong_settings_are_named(values: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings.checked(values, "here")


def test_plain_files_that_are_no_record_are_named() -> None:
    assert Inner.from_file(Path("x.json"), b'{"size_px": 7}') == Inner(size_px=7)
    for text in (b"", b"{", b'{"size_px": 0}', b'{"size": 1}'):
        with pytest.raises(DamagedError, match=r"x\.json is not a valid Inner: "):
            Inner.from_file(Path("x.json"), text)


# Seals


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.dictionaries(st.text(), JSON, max_size=3),
    st.none() | st.just(1),
)
def test_sealed_records_are_equal_to_their_file(rate: float, values: dict[str, Any], indent: int | None) -> None:
    record = Settings(rate=rate, values=values, names=("a", "}"))
    text = record.to_file(indent=indent)
    assert Settings.from_file(Path("x"), text) == record
    plain = json.loads(text)
    assert len(plain.pop("digest")) == 32 and plain == record.to_json()


def test_every_change_of_a_sealed_file_is_found() -> None:
    text = Settings(names=("a", "b"), values={"n": 11}).to_file()
    changed = [text[:n] for n in range(len(text))] + [text + b"\n", text + text, text[1:], b" " + text]
    for offset in range(len(text)):
        changed += [text[:offset] + bytes([text[offset] ^ 1 << bit]) + text[offset + 1 :] for bit in range(8)]
    for other in changed:
        with pytest.raises(
            DamagedError, match=r"x\.json does not match its own digest.*`make verify`, then `make extract`"
        ):
            Settings.from_file(Path("x.json"), other)


class Other(Sealed):
    something: int = 1


def test_a_whole_seal_on_something_else_is_refused() -> None:
    with pytest.raises(DamagedError, match="x is not a valid Settings: something: Extra inputs are not permitted"):
        Settings.from_file(Path("x"), Other().to_file())


# Plans


@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 60))
def test_shards_divide_the_images(num_images: int, views: int, images_per_shard: int) -> None:
    plan = StorePlan.model_construct(num_images=num_images, views_per_image=views, images_per_shard=images_per_shard)
    positions = [position for index in range(plan.num_shards) for position in plan.images_of_shard(index)]
    assert positions == list(range(num_images))
    assert all(0 < len(plan.images_of_shard(index)) <= images_per_shard for index in range(plan.num_shards))
    assert plan.num_records == num_images * views and plan.records_per_shard == images_per_shard * views


def test_sizes_of_known_teachers(image_list: Any, store_plan: Plan) -> None:
    clip = store_plan(
        image_list(1), features={"teacher": "b", "num_prefix_tokens": 1, "grid_hw": (14, 14), "channels": 768}
    )
    assert clip.features.shape_TC == (197, 768) and clip.features.record_bytes == 302_592


def test_every_field_of_a_plan_is_part_of_its_identity(image_list: Any, store_plan: Plan) -> None:
    plan = store_plan(image_list(4))
    changes: dict[str, Any] = {
        "format_version": 1, "backend": "wds",
        "features": {"teacher": "x", "num_prefix_tokens": 1, "grid_hw": (2, 3), "channels": 8},
        "whitening": {"kind": "none"}, "encoding": {"kind": "int8"}, "token_subset": {"fraction": 0.5},
        "stored_views": {"px": 8, "codec": {}}, "labels_fingerprint": "x",
        "sampler": {}, "renderer": {}, "images_fingerprint": "x",
        "teacher_fingerprint": "x", "teacher": {"x": 1}, "num_images": 5, "views_per_image": 3, "images_per_shard": 4,
    }  # fmt: skip
    assert set(changes) == set(StorePlan.model_fields)
    others = [StorePlan.model_validate(plan.to_json() | {name: value}) for name, value in changes.items()]
    assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1
    for name, other in zip(changes, others, strict=True):
        assert plan.differences(other).startswith(name) and not other.differences(other)


def test_identities_do_not_change_between_releases(image_list: Any, store_plan: Plan) -> None:
    """A change here makes every store of every user another store."""
    images = image_list(4)
    plan = store_plan(images, renderer={"kernel": "bilinear"})
    assert images.fingerprint == "ece2f199a038441a1e6f1ef89eff1549"
    assert plan.fingerprint == "5afe74bead7a25b29b2330b29ab26e30"


# Errors and signals


def test_exit_codes() -> None:
    codes = {name: kind.exit_code for name, kind in vars(errors).items() if hasattr(kind, "exit_code")}
    assert codes == {
        "DecantError": 1, "ConfigError": 2, "InputError": 2, "DiskError": 2, "BadTokensError": 2, "OwnTeacherError": 2,
        "QuarantineError": 3, "StoreBusyError": 4,
        "DamagedError": 6,
    }  # fmt: skip


def test_unknown_names_offer_the_nearest() -> None:
    assert str(unknown_name("teacher", "clip_b", ["clip-b", "dino-s"])) == (
        "unknown teacher 'clip_b'; did you mean 'clip-b'?"
    )
    assert str(unknown_name("teacher", "zzz", ["b", "a"])) == "unknown teacher 'zzz'; known: a, b"


def test_the_first_signal_asks_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        stop.check()
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.signal_name == "SIGTERM"
        with pytest.raises(Interrupted, match="SIGTERM"):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    seen = []

    def work() -> None:
        with stop_on_signals() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_changed_copy_has_a_fingerprint_of_its_own(store_plan: Any, image_list: Any) -> None:
    plan = store_plan(image_list(3))
    before = plan.fingerprint
    changed = plan.model_copy(update={"teacher_fingerprint": "others"})
    assert changed.fingerprint != before == plan.fingerprint
    assert changed.fingerprint == type(plan).model_validate(changed.to_json()).fingerprint
    assert plan.model_copy() == plan
