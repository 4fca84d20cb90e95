"""Pictures of the report: colours that mean the same on both sides, curves of all members, files that are damaged."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.pictures import COLOURS, curve_svg, finetune_curve, principal_colours, token_pictures
from storage.errors import DamagedError


@pytest.fixture
def tokens() -> NDArray[np.float32]:
    """Two views of nine tokens of eight channels, with very different spreads."""
    spread = np.array([9, 5, 3, 1, 0.5, 0.1, 0.1, 0.1])
    return (np.random.default_rng(0).normal(size=(2, 9, 8)) * spread).astype(np.float32)


def write(path: Path, teacher: NDArray[np.float32], student: NDArray[np.float32]) -> Path:
    images = np.random.default_rng(1).integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
    keys = np.array(["a/<b>.png", "c.png"])
    np.savez(path, keys=keys, images_BHWC=images, teacher_BTC=teacher, student_BTC=student, grid_hw=np.array((3, 3)))
    return path


def pixels_of(uri: str) -> NDArray[np.uint8]:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_equal_tokens_have_equal_colours(tokens: NDArray[np.float32]) -> None:
    teacher, student = principal_colours(tokens, tokens.copy())
    np.testing.assert_array_equal(teacher, student)
    assert teacher.shape == (2, 9, 3)
    assert teacher.dtype == np.uint8
    assert [teacher[..., channel].min() for channel in range(3)] == [0, 0, 0]
    assert [teacher[..., channel].max() for channel in range(3)] == [255, 255, 255]


def test_colours_are_the_teachers_first_components(tokens: NDArray[np.float32]) -> None:
    """The widest channel is the first component: its order of tokens is that of the first colour, up to a sign."""
    teacher, _ = principal_colours(tokens, tokens)
    flat, colours = tokens.reshape(-1, 8).astype(np.float64), teacher.reshape(-1, 3).astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    for component in range(3):
        projected = flat @ vectors[:, np.argsort(values)[::-1][component]]
        inside = (colours[:, component] > 0) & (colours[:, component] < 255)
        correlation = np.corrcoef(projected[inside], colours[inside, component])[0, 1]
        assert abs(correlation) > 0.999


def test_the_student_is_drawn_on_the_teachers_scale(tokens: NDArray[np.float32]) -> None:
    """A student that predicts nothing but the mean is one flat colour, not stretched to look alive."""
    flat = np.broadcast_to(tokens.reshape(-1, 8).mean(0), tokens.shape)
    _, student = principal_colours(tokens, flat)
    assert len(np.unique(student.reshape(-1, 3), axis=0)) == 1
    _, far = principal_colours(tokens, tokens * 1000)
    assert set(np.unique(far)) <= {*range(256)}


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 8), (1, 4, 2), (2, 3, 1)])
def test_few_tokens_or_channels_still_give_three_colours(shape: tuple[int, int, int]) -> None:
    made = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    teacher, student = principal_colours(made, made)
    assert teacher.shape == student.shape == (*shape[:2], 3)


def test_token_pictures_hold_what_the_file_holds(tmp_path: Path, tokens: NDArray[np.float32]) -> None:
    path = write(tmp_path / "pictures.npz", tokens, np.concatenate([tokens[:1], -tokens[1:]]))
    first, second = token_pictures(path)
    assert (first.key, second.key) == ("a/<b>.png", "c.png")
    assert first.cosine == pytest.approx(1)
    assert second.cosine == pytest.approx(-1)
    teacher, _ = principal_colours(tokens, tokens)
    np.testing.assert_array_equal(pixels_of(first.teacher), teacher[0].reshape(3, 3, 3))
    np.testing.assert_array_equal(pixels_of(first.student), pixels_of(first.teacher))
    np.testing.assert_array_equal(pixels_of(second.image), np.load(path)["images_BHWC"][1])


def test_no_file_no_pictures(tmp_path: Path) -> None:
    assert token_pictures(tmp_path / "pictures.npz") == []


@pytest.mark.parametrize("kind", ["empty", "cut", "text", "another array"])
def test_a_damaged_file_is_named(tmp_path: Path, tokens: NDArray[np.float32], kind: str) -> None:
    path = write(tmp_path / "pictures.npz", tokens, tokens)
    if kind == "another array":
        np.savez(path, something=tokens)
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-50], "text": b"<html>"}[kind])
    with pytest.raises(DamagedError, match=r"pictures\.npz cannot be read .*run `make evaluate`"):
        token_pictures(path)


def test_every_member_has_a_curve_and_every_start_one_label() -> None:
    history = [{"step": step, "loss": 1 / step, "lr": 0.1} for step in (1, 2, 3)]
    starts = ("scratch", "distilled")
    members = [{"start": start, "seed": seed, "history": history} for start in starts for seed in (0, 1, 2)]
    svg = finetune_curve({"members": members})
    for start in starts:
        lines = re.findall(rf"<path [^>]*clip-path[^>]*stroke: {COLOURS[start].lower()}", svg)
        assert len(lines) == 3
    assert svg.count(">from scratch<") == 1
    assert svg.count(">after feature distillation<") == 1


def test_curves_are_the_same_bytes_each_time_and_stand_alone() -> None:
    curves = [("student", "#0072B2", [{"step": 1, "loss": 0.5}])]
    first = curve_svg("One point", "loss", curves)
    assert first == curve_svg("One point", "loss", curves)
    assert first.startswith("<svg")
    assert "One point" in first, "text stays text"
    assert not re.search(r"<(script|image|foreignObject|style[^>]*>[^<]*@import)", first)
