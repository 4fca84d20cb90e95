"""`make precision` on the toy teacher."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.images import draw_images


def test_a_line_a_precision(decant: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extract.measure._LEAST_SECONDS", 0.01)
    images = draw_images(tmp_path / "images")
    outcome = decant("precision", "--preset", "smoke", "--data", images)
    assert outcome.code == 0, outcome.err  # type: ignore[attr-defined]
    words = outcome.out.split()  # type: ignore[attr-defined]
    assert words[:7] == ["precision", "mean", "cosine", "worst", "token", "views/s", "batch"]
    assert words[7:10] == ["float32", "1.000000", "1.000000"]
    for name in ("bfloat16", "float16"):
        mean, worst = map(float, words[words.index(name) + 1 :][:2])
        assert 0.99 < worst <= mean <= 1
    assert not (tmp_path / "runs" / "stores").exists(), "nothing is stored"
    assert not (tmp_path / "runs" / "current.json").exists(), "nothing is remembered"
