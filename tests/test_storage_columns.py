"""Columns in one sealed file: the same as plain tuples, and no damaged or hostile file gets through."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.columns import MAGIC, Digests, Keys, as_run, cut_columns, encode_columns, open_columns
from storage.errors import DamagedError
from storage.fingerprint import FINGERPRINT_CHARS, digest_bytes

PATH = Path("folder/columns.bin")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.lists(
    TEXT | st.sampled_from(["", "é", "e\u0301", "\x00", "a\x00", "\U0001f600", "\uffff", "z"]), unique=True
)


def sealed(text: bytes) -> bytes:
    """What somebody who knows the format can make of any bytes."""
    return text + digest_bytes(text).encode()


# Keys, against a sorted tuple


@given(names=NAMES, others=NAMES, data=st.data())
def test_keys_are_a_sorted_tuple(names: list[str], others: list[str], data: st.DataObject) -> None:
    truth = tuple(sorted(names))
    keys = Keys.encode(truth)
    assert keys == truth and tuple(keys) == truth and len(keys) == len(truth)
    for position, key in enumerate(truth):
        assert keys[position] == keys[position - len(truth)] == key
        assert keys.find(key) == keys.index(key) == position and key in keys
    for other in others:
        assert (other in keys) == (other in truth) == (keys.find(other) is not None)
    places = st.none() | st.integers(-12, 12)
    where = slice(data.draw(places), data.draw(places), data.draw(places.filter(lambda step: step != 0)))
    assert keys[where] == truth[where]
    is_taken = data.draw(st.lists(st.booleans(), min_size=len(truth), max_size=len(truth)))
    taken = tuple(key for key, is_one in zip(truth, is_taken, strict=True) if is_one)
    is_taken_N = np.array(is_taken, np.bool_)
    assert keys.select(is_taken_N) == keys.select(as_run(is_taken_N)) == taken
    first, end = sorted(data.draw(st.tuples(st.integers(0, len(truth)), st.integers(0, len(truth)))))
    assert keys.select(slice(first, end)) == truth[first:end]
    asked = sorted(others)
    assert keys.match(Keys.encode(asked)).tolist() == [truth.index(key) if key in truth else -1 for key in asked]
    assert keys.match(Keys.encode(truth)).tolist() == list(range(len(truth)))


def test_more_keys_than_are_decoded_at_once() -> None:
    truth = tuple(f"{number:06d}" for number in range(70_000))
    assert tuple(Keys.encode(truth)) == truth


def test_positions_that_are_not_there_and_other_kinds_of_things() -> None:
    keys = Keys.encode(("a", "b"))
    for position in (2, -3):
        with pytest.raises(IndexError):
            keys[position]
    with pytest.raises(ValueError, match="'c' is not there"):
        keys.index("c")
    with pytest.raises(ValueError, match="'a' is not there"):
        keys.index("a", 1)
    assert 3 not in keys and keys not in [("a",), ("a", "c"), 5]
    assert repr(keys) == "<2 keys, first 'a'>"


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a"), ("z", "é", "a")])
def test_keys_are_in_ascending_order(names: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError, match="not in ascending order"):
        Keys.encode(names)


@pytest.mark.parametrize(
    ("block", "lengths", "found"),
    [
        (b"ab", [1, 2], "keys of 3 bytes in a block of 2"),
        (b"ab", [1], "keys of 1 bytes in a block of 2"),
        (b"", [2**32 - 1] * 3, "keys of 12,884,901,885 bytes in a block of 0"),
        (b"\xff", [1], "no text"),
        ("é".encode(), [1, 1], "no text"),
        (b"\xed\xa0\x80", [3], "no text"),  # half of a surrogate pair
        (b"ba", [1, 1], "not in ascending order"),
        (b"", [0, 0], "not in ascending order"),
    ],
)
def test_strings_of_a_file_are_not_believed(block: bytes, lengths: list[int], found: str) -> None:
    assert found in Keys(np.frombuffer(block, np.uint8), np.array(lengths, np.uint32)).problem()


@given(st.lists(st.binary(min_size=16, max_size=16)))
def test_digests_are_a_tuple_of_hex(rows: list[bytes]) -> None:
    truth = tuple(row.hex() for row in rows)
    digests = Digests.encode(truth)
    assert digests == truth and tuple(digests) == truth and digests[::-1] == truth[::-1]


def test_digests_have_one_length() -> None:
    with pytest.raises(AssertionError, match="32 hex digits"):
        Digests.encode(["00"])


# The file


@given(header=st.binary(max_size=20), first=st.lists(st.integers(0, 2**32 - 1)), second=st.binary(max_size=20))
@example(header=b"", first=[], second=b"")
def test_a_file_gives_back_what_was_written(header: bytes, first: list[int], second: bytes) -> None:
    columns = [np.array(first, "<u4"), np.frombuffer(second, np.uint8)]
    data = encode_columns(header, columns)
    found, body = open_columns(PATH, data)
    assert found.rstrip(b" ") == header.rstrip(b" ") and (len(data) - FINGERPRINT_CHARS) % 8 == 0
    one, other = cut_columns(PATH, body, [("<u4", (len(first),)), ("u1", (len(second),))])
    assert one.tolist() == first and other.tobytes() == second
    assert not one.flags.writeable and (one.base is not None or not first)


def test_the_bytes_are_those_that_are_described() -> None:
    """Written out by hand: another program must be able to read and write these files."""
    text = b"DECANTC1" + b"\x08" + bytes(7) + b'{"n":3} '
    text += b"\x01\0\0\0\x02\0\0\0\x03\0\0\0" + bytes(4) + b"abc" + bytes(5)
    assert encode_columns(b'{"n":3}', [np.array([1, 2, 3], "<u4"), np.frombuffer(b"abc", "u1")]) == sealed(text)


def test_every_flipped_bit_and_every_cut_is_found() -> None:
    data = encode_columns(b"{}", [np.arange(3, dtype="<u4")])
    for position in range(len(data)):
        for bit in range(8):
            flipped = data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
            with pytest.raises(DamagedError, match=r"columns\.bin does not match its own digest"):
                open_columns(PATH, flipped)
    for size in range(len(data)):
        with pytest.raises(DamagedError, match="does not match"):
            open_columns(PATH, data[:size])
    with pytest.raises(DamagedError, match="does not match"):
        open_columns(PATH, data + b"0")


@given(st.binary(max_size=80))
def test_any_bytes_with_a_right_digest_are_damage_or_columns(text: bytes) -> None:
    for data in (sealed(text), sealed(MAGIC + text)):
        try:
            _, body = open_columns(PATH, data)
            cut_columns(PATH, body, [("<u4", (len(body) // 16,))])
        except DamagedError:
            pass


@pytest.mark.parametrize("count", [2**30, 2**40, 2**62, 2**64 + 1])
def test_claimed_sizes_take_no_memory(count: int) -> None:
    text = MAGIC + (count % 2**64 + 100).to_bytes(8, "little") + b"{}"
    _, body = open_columns(PATH, encode_columns(b"{}", [np.arange(4, dtype="<u4")]))
    tracemalloc.start()
    with pytest.raises(DamagedError, match="has a header of"):
        open_columns(PATH, sealed(text))
    with pytest.raises(DamagedError, match="its header tells of"):
        cut_columns(PATH, body, [("<u4", (count,)), ("u1", (count, 16))])
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
