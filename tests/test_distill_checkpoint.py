"""Checkpoints: the newest whole one of this very run wins, and any damage is noticed."""

import functools
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from distill.checkpoint import load_checkpoint, load_weights, remove_checkpoints, save_checkpoint, save_weights
from distill.config import OptimConfig
from distill.optim import build_optimizer, optimizer_tensors
from distill.state import TrainState
from storage.errors import DamagedError, DiskError

Fork = Callable[[Callable[[], object]], int]
FACTS = {"history": [{"step": 1, "loss": 0.1 + 0.2, "lr": 1e-17}], "resumed_at": [3], "seconds": 1.5}


class State:
    """A model and its optimiser after some steps."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        self.optimizer = build_optimizer(self.model, OptimConfig())
        for _ in range(steps):
            self.model(torch.randn(2, 4)).square().sum().backward()
            self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict() | dict(optimizer_tensors(self.optimizer))

    def save(self, folder: Path, step: int, run: str = "run") -> None:
        save_checkpoint(folder, step, TrainState(self.model, self.optimizer).tensors(), run, FACTS)


def load(folder: Path, run: str = "run") -> tuple[int | None, list[str]]:
    """Step of the checkpoint that is found, and what was said."""
    said: list[str] = []
    found = load_checkpoint(folder, run, said.append)
    return (None if found is None else found.step), said


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    state, other = State(3), State(0)
    state.save(tmp_path, 3)
    found = load_checkpoint(tmp_path, "run", pytest.fail)
    assert found is not None
    assert found.step == 3
    assert found.facts == FACTS
    TrainState(other.model, other.optimizer).load(found.tensors)
    expected = state.tensors()
    assert set(other.tensors()) == set(expected)
    for name, value in other.tensors().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert load(tmp_path / "none") == (None, [])
    for step in (5, 10, 100):
        State(1).save(tmp_path, step)
    assert names(tmp_path) == [f"step-{s:08d}.{e}" for s in (10, 100) for e in ("json", "safetensors")]
    assert load(tmp_path) == (100, [])
    remove_checkpoints(tmp_path)
    remove_checkpoints(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_any_flipped_bit_is_noticed(suffix: str, tmp_path: Path) -> None:
    for step in (3, 7):
        State(1).save(tmp_path, step)
    path = tmp_path / f"step-00000007{suffix}"
    whole = path.read_bytes()
    for offset in range(0, len(whole), 7 if suffix == ".safetensors" else 1):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        found, said = load(tmp_path)
        assert found == 3, f"bit flipped in byte {offset}"
        assert len(said) == 1
        assert said[0].startswith("checkpoint step-00000007.json is damaged (")
        assert said[0].endswith("; falling back to the one before")
    path.write_bytes(whole)
    assert load(tmp_path) == (7, [])


@pytest.mark.parametrize("cut", [0, 1, 50, -1])
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_cut_file_is_noticed(suffix: str, cut: int, tmp_path: Path) -> None:
    for step in (3, 7):
        State(1).save(tmp_path, step)
    path = tmp_path / f"step-00000007{suffix}"
    path.write_bytes(path.read_bytes()[:cut])
    found, said = load(tmp_path)
    assert found == 3
    assert len(said) == 1


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("put", [os.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_passed_over_and_is_in_nobodys_way(
    put: Callable[[Path], None], suffix: str, tmp_path: Path
) -> None:
    for step in (3, 7):
        State(1).save(tmp_path, step)
    path = tmp_path / f"step-00000007{suffix}"
    path.unlink()
    put(path)
    found, said = load(tmp_path)
    assert (found, len(said)) == (3, 1)
    State(2).save(tmp_path, 5)
    assert load(tmp_path) == (5, [])
    put(path)
    for step in (7, 8, 9):
        State(2).save(tmp_path, step)
        assert load(tmp_path) == (step, [])
    assert len(names(tmp_path)) == 4


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(DiskError, match="checkpoints"):
        State(1).save(tmp_path / "checkpoints", 3)


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    for step in (3, 7):
        State(1).save(tmp_path, step)
    (tmp_path / "step-00000007.safetensors").unlink()
    found, said = load(tmp_path)
    assert (found, len(said)) == (3, 1)
    (tmp_path / "step-00000007.json").unlink()
    assert load(tmp_path) == (3, [])
    (tmp_path / "step-00000003.json").unlink()  # as when killed before it was written
    assert load(tmp_path) == (None, [])


def test_another_run_is_another_run(tmp_path: Path) -> None:
    """Settings or data have changed: what lies there serves nobody, and must not push out what is new."""
    for step in (900, 1000):
        State(1).save(tmp_path, step, "before")
    assert load(tmp_path) == (None, [])
    for step in (10, 20, 30):
        State(1).save(tmp_path, step)
        assert load(tmp_path) == (step, [])
    assert load(tmp_path, "before") == (None, [])
    assert len(names(tmp_path)) == 4


def test_after_a_damaged_one_the_good_ones_stay(tmp_path: Path) -> None:
    """10 and 20 were saved, 20 is damaged; the run goes on from 10 and saves 15."""
    for step in (10, 20):
        State(1).save(tmp_path, step)
    (tmp_path / "step-00000020.safetensors").write_bytes(b"")
    assert load(tmp_path)[0] == 10
    State(2).save(tmp_path, 15)
    assert load(tmp_path) == (15, [])
    (tmp_path / "step-00000015.safetensors").write_bytes(b"")
    assert load(tmp_path)[0] == 10


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(
    fork: Fork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        State(1).save(tmp_path, step)
    unlink, replace = Path.unlink, os.replace

    def die_at(number: int) -> None:
        calls = itertools.count(1)

        def count(act: Callable[..., None], *arguments: object, **more: object) -> None:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            act(*arguments, **more)

        monkeypatch.setattr(os, "replace", functools.partial(count, replace))
        monkeypatch.setattr(Path, "unlink", lambda *a, **m: count(unlink, *a, **m))
        State(2).save(tmp_path, 3)

    found = []
    for number in itertools.count(1):
        _, status = os.waitpid(fork(functools.partial(die_at, number)), 0)
        newest, said = load(tmp_path)
        found.append(newest)
        assert not said
        if not os.WIFSIGNALED(status):
            break
    assert found == [2] * found.count(2) + [3] * found.count(3), "it is there from one moment on"
    assert set(found) == {2, 3}
    State(3).save(tmp_path, 4)
    assert not list(tmp_path.glob(".*")), "what killed writers left is swept"


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_published_weights_come_back(tmp_path: Path) -> None:
    state = State(1).model.state_dict() | {"transposed": torch.arange(6.0).view(2, 3).T}
    facts = {"student": '{"name": "é"}', "store": "0123"}
    save_weights(tmp_path / "w.safetensors", state, facts)
    found = load_weights(tmp_path / "w.safetensors")
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == facts


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """The library's own order of facts changes from call to call."""
    facts = {f"fact {number}": f"é {number}" for number in range(12)}
    contents = []
    for number, order in enumerate((facts, dict(reversed(facts.items()))) * 4):
        save_weights(tmp_path / f"{number}", State(1).model.state_dict(), order)
        contents.append((tmp_path / f"{number}").read_bytes())
    assert len(set(contents)) == 1
    assert len(set(load_weights(tmp_path / "0"))) == 4


@pytest.mark.parametrize("content", [None, b"", b"no weights at all, but long enough for a header"])
def test_weights_that_cannot_be_read_say_what_to_do(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"w\.safetensors cannot be read .*run the stage that writes it again"):
        load_weights(path)
