"""Exported students: what timm and the hub's layout make of them is the student; what is refused, and what stays."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill import export as exporting
from distill import export_folder
from distill.export import FILES, ExportRecord, export_student
from distill.model_card import Origin
from distill.saved_student import load_student, save_student
from distill.student import IMAGENET_MEAN, IMAGENET_STD
from distill.student_config import BeitStudent, StudentConfig, TimmStudent
from distill.timm_folder import timm_arguments
from storage.errors import ConfigError, DamagedError, InputError
from storage.fingerprint import digest_file

Save = Callable[[str], Path]
Features = Callable[[Path, torch.Tensor], torch.Tensor]
Images = Callable[[str], torch.Tensor]
NAMES = ("shared", "per_block", "absolute", "no_layer_scale", "swinv2", "convolution", "registers")
TIMM_FILES = {"config.json", "model.safetensors", "README.md", "export.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_timm_gives_the_students_features_exactly(
    name: str, saved_student: Save, student_features: Features, random_images: Images, tmp_path: Path
) -> None:
    run, target, images = saved_student(name), tmp_path / "out", random_images(name)
    record = export_student(run, target)
    config = json.loads((target / "config.json").read_text())
    from_folder = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    from_file = timm.create_model(
        config["architecture"], checkpoint_path=target / "model.safetensors", num_classes=0, **config["model_args"]
    ).eval()
    with torch.no_grad():
        for model in (from_folder, from_file):
            assert torch.equal(model.forward_features(images), student_features(run, images))
            assert model.num_classes == 0
    assert record.timm_difference == 0
    data = timm.data.resolve_model_data_config(from_folder)
    assert tuple(data["input_size"]) == tuple(images.shape[1:])
    assert (tuple(data["mean"]), tuple(data["std"])) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 0.875)


def test_by_its_name_alone_a_vits_images_are_prepared_the_same(saved_student: Save, tmp_path: Path) -> None:
    """timm's names for this class differ in the statistics of their images."""
    record = export_student(saved_student("shared"), tmp_path / "out")
    data = timm.data.resolve_model_data_config(timm.create_model(record.architecture, **record.model_args))
    assert (tuple(data["mean"]), tuple(data["std"])) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("name", ["shared", "swinv2", "convolution"])
def test_a_classifier_begins_with_the_student(
    name: str, saved_student: Save, random_images: Images, tmp_path: Path
) -> None:
    run = saved_student(name)
    export_student(run, tmp_path / "out")
    classifier = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=10, global_pool="avg")
    student, found = load_student(run).network.state_dict(), classifier.state_dict()
    shared = student.keys() & found.keys()
    assert len(shared) > 0.8 * len(student)
    assert all(torch.equal(found[key], student[key]) for key in shared)
    assert classifier.eval()(random_images(name)).shape == (2, 10)


def test_the_hubs_layout_is_read_by_the_hubs_name(
    saved_student: Save, student_features: Features, random_images: Images, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As if the folder had been uploaded: its files by their names there."""
    import timm.models._hub as hub

    run, images = saved_student("shared"), random_images("shared")
    export_student(run, tmp_path / "out")
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / "out" / filename))
    loaded = timm.create_model("hf-hub:someone/student", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded.forward_features(images), student_features(run, images))


def test_the_record_has_every_files_digest(saved_student: Save, tmp_path: Path) -> None:
    target = tmp_path / "out"
    record = export_student(saved_student("shared"), target)
    assert ExportRecord.from_file("export.json", (target / "export.json").read_bytes()) == record
    assert set(record.files) | {"export.json"} == set(contents(target)) == TIMM_FILES
    for name, file in record.files.items():
        assert (file.num_bytes, file.digest) == ((target / name).stat().st_size, digest_file(target / name))
    with safe_open(target / "model.safetensors", framework="pt") as weights:
        assert weights.metadata()["format"] == "pt"  # without it Hugging Face's libraries refuse the file
        assert weights.metadata()["store"] == "0123abcd"


def test_the_same_student_is_the_same_bytes_wherever_it_lies(saved_student: Save, tmp_path: Path) -> None:
    run = saved_student("shared")
    for parent in ("one", "two"):
        export_student(run, tmp_path / parent / "out")
    files = contents(tmp_path / "one" / "out")
    assert contents(tmp_path / "two" / "out") == files
    places = {str(tmp_path), str(Path(timm.__file__).parent.parent), str(Path.home()), os.getcwd()} - {"/"}
    assert not [name for name, data in files.items() for place in places if place.encode() in data]


def test_the_card_tells_where_it_comes_from(saved_student: Save, tmp_path: Path) -> None:
    origin = Origin(teacher="clip-b", licence="MIT", made_with="timm 1")
    export_student(saved_student("shared"), tmp_path / "my-student", origin=origin)
    front, _, body = (tmp_path / "my-student/README.md").read_text().removeprefix("---\n").partition("---\n")
    assert "library_name: timm" in front
    for part in (
        "# my-student", "| teacher | clip-b |", "weights | MIT |", "0123abcd", "kind layer_norm",
        "17 tokens of 32 channels: CLS, then a grid of 4 x 4", "| made with | timm 1 |",
    ):  # fmt: skip
        assert part in body
    assert "onnx" not in body


def test_a_fact_cannot_break_the_cards_table(saved_student: Save, tmp_path: Path) -> None:
    run = saved_student("shared")
    saved = load_student(run)
    save_student(run, saved.cfg, saved.network.state_dict(), {"store": "a | b\n\n# c"})
    export_student(run, tmp_path / "out")
    assert "| a / b  # c |\n" in (tmp_path / "out/README.md").read_text()


# ---- where it is written -------------------------------------------------------------------------------------------


def test_a_second_export_replaces_the_first(saved_student: Save, tmp_path: Path) -> None:
    run, target = saved_student("shared"), tmp_path / "out"
    export_student(run, target)
    (target / "model.onnx").write_text("of an older export")
    export_student(run, target)
    assert set(contents(target)) == TIMM_FILES
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_a_folder_with_other_things_is_left_alone(saved_student: Save, tmp_path: Path) -> None:
    run, target = saved_student("shared"), tmp_path / "out"
    target.mkdir()
    (target / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds README\.md, which is no export .* FORCE=1"):
        export_student(run, target)
    (target / "notes.txt").write_text("mine")
    (target / "model.onnx").write_text("of an older export")
    export_student(run, target, force=True)
    assert set(contents(target)) == {"notes.txt", *TIMM_FILES}
    assert (target / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"holds notes\.txt"):
        export_student(run, target)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_no_place_for_a_folder(force: bool, saved_student: Save, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="is a file; choose another folder"):
        export_student(saved_student("shared"), tmp_path / "out", force=force)


@pytest.mark.parametrize("step", ["timm_config", "_timm_difference", "publish_folder"])
def test_an_interrupted_export_leaves_the_earlier_one(
    step: str, saved_student: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    run, target = saved_student("shared"), tmp_path / "out"
    export_student(run, target)
    before = contents(target)
    monkeypatch.setattr(exporting, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_student(run, target)
    assert contents(target) == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, target = tmp_path / "private", tmp_path / "out"
    private.mkdir()
    (private / "config.json").write_text("ours")
    real_rename = os.rename

    def rename(source: Path, place: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("theirs")
        real_rename(source, place)

    monkeypatch.setattr(export_folder.os, "rename", rename)
    with pytest.raises(ConfigError, match="another command wrote"):
        export_folder.publish_folder(private, target, FILES)
    assert contents(target) == {"config.json": b"theirs"}


# ---- what is refused -----------------------------------------------------------------------------------------------


def rewrite(path: Path, cfg: StudentConfig) -> None:
    save_student(path.parent, cfg, load_student(path.parent).network.state_dict(), {})


SMALL: dict[str, Any] = {"input_px": 32, "patch_px": 8, "width": 32, "depth": 2, "heads": 2}


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (Path.unlink, InputError, r"has no student\.safetensors, expected the folder of a finished distillation"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), DamagedError, "cannot be read"),
        (lambda path: path.write_bytes(b""), DamagedError, "cannot be read"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b'\\"kind\\"', b'\\"kinb\\"', 1)),
            DamagedError, "does not say which student it holds: .*kinb",
        ),
        (lambda path: save_file({"a": torch.zeros(1)}, path), InputError, "says nothing of a student's shape"),
        (
            lambda path: rewrite(path, BeitStudent(**SMALL | {"width": 16})),
            DamagedError, "does not hold the tensors of its own student",
        ),
        (
            lambda path: rewrite(path, BeitStudent(**SMALL | {"depth": 2000})),
            DamagedError, "too few for the student that it describes",
        ),
        (
            lambda path: rewrite(path, TimmStudent(model="resnet10x")),
            ConfigError, "unknown timm model 'resnet10x'; did you mean 'resnet10t'",
        ),
    ],
)  # fmt: skip
def test_what_is_no_student_is_told(
    spoil: Callable[[Path], None], error: type[Exception], told: str, saved_student: Save, tmp_path: Path
) -> None:
    run = saved_student("shared")
    spoil(run / "student.safetensors")
    with pytest.raises(error, match=told):
        export_student(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("folder", "told"), [("nothing", "does not exist"), ("run/student.safetensors", "is a file")])
def test_a_path_that_is_no_folder_is_told(folder: str, told: str, saved_student: Save, tmp_path: Path) -> None:
    saved_student("shared")
    with pytest.raises(InputError, match=f"{told}, expected the folder of a finished distillation"):
        export_student(tmp_path / folder, tmp_path / "out")


@pytest.mark.parametrize("wrong", [{"mlp_ratio": 2}, {"init_values": 0}, {"no_such": 1}])
def test_what_timm_cannot_read_is_not_published(
    wrong: dict[str, Any], saved_student: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(cfg: StudentConfig) -> tuple[str, dict[str, Any]]:
        architecture, right = timm_arguments(cfg)
        return architecture, right | wrong

    monkeypatch.setattr(exporting, "timm_arguments", arguments)
    with pytest.raises(InputError, match=r"cannot read what was exported .* install a newer timm"):
        export_student(saved_student("shared"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_what_timm_computes_otherwise_is_not_published(
    saved_student: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other windows have the same weights."""

    def arguments(cfg: StudentConfig) -> tuple[str, dict[str, Any]]:
        architecture, right = timm_arguments(cfg)
        return architecture, right | {"window_size": 8}

    monkeypatch.setattr(exporting, "timm_arguments", arguments)
    with pytest.raises(InputError, match="gives other tokens for the exported student than its own"):
        export_student(saved_student("swinv2"), tmp_path / "out")
