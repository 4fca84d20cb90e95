"""`export` and `import`: from a run, or from a checkpoint of the authors', to what others read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from storage.fingerprint import digest_file
from tests.fixtures.runs import Outcome, folder_of

Decant = Callable[..., Outcome]
Save = Callable[[str], Path]
Features = Callable[[Path, torch.Tensor], torch.Tensor]


def test_a_runs_student_is_exported(
    decant: Decant, finished_run: tuple[Path, Path], student_features: Features, tmp_path: Path
) -> None:
    run = folder_of(finished_run[1], "distill")
    done = decant("export", run, "out")
    assert done.code == 0, done.err
    assert "out: beitv2_base_patch16_224, timm reads it and gives the student's tokens exactly" in done.out
    card = (tmp_path / "out/README.md").read_text()
    assert "| teacher | toy |" in card  # found by the store's fingerprint
    assert "| made with | Decant " in card
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = timm.create_model("local-dir:out", pretrained=True).eval().forward_features(images)
    assert torch.equal(found, student_features(run, images))


def test_what_was_written_is_listed_with_digests(decant: Decant, saved_student: Save, tmp_path: Path) -> None:
    done = decant("export", saved_student("shared"), "out", "--format", "both")
    files = json.loads((tmp_path / "out/export.json").read_text())["files"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "model.onnx"}
    for name, file in files.items():
        assert f"{name} {file['num_bytes']:,} bytes {file['digest'][:10]}" in done.out
    assert "the ONNX graph's tokens differ from the student's by at most" in done.out


def test_where_there_is_no_runtime_it_says_so(
    decant: Decant, saved_student: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.onnx._RUNTIME", "no_such_module")
    done = decant("export", saved_student("shared"), "out", "--format", "onnx")
    assert done.code == 0
    assert "the ONNX graph was not run, because onnxruntime is not installed" in done.out
    assert "timm reads" not in done.out


def test_a_folder_with_other_things_is_left_to_force(decant: Decant, saved_student: Save, tmp_path: Path) -> None:
    run = saved_student("shared")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    refused = decant("export", run, "out")
    assert refused.code == 2
    assert "out holds mine.txt, which is no export of a student" in refused.err
    assert decant("export", run, "out", "--force").code == 0
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


def test_a_run_whose_student_was_changed_is_refused(decant: Decant, copy_run: tuple[Path, Path]) -> None:
    run = folder_of(copy_run[1], "distill")
    path = run / "student.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # still a file of the same tensors
    path.write_bytes(data)
    done = decant("export", run, "out")
    assert done.code == 6
    assert "student.safetensors is damaged; run `make distill FORCE=1`" in done.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("source", "told"),
    [("nothing", "nothing does not exist, expected the folder"), (".", r". has no student.safetensors, expected")],
)
def test_what_is_no_student_is_told(source: str, told: str, decant: Decant) -> None:
    done = decant("export", source, "out")
    assert done.code == 2
    assert told in done.err
    assert "then: " in done.err


# ---- the authors' checkpoints --------------------------------------------------------------------------------------


@pytest.fixture
def authors_file(saved_student: Save, tmp_path: Path) -> Path:
    """A checkpoint as their main_fd.py saves it, but for yacs' class: student, projector, teacher, and training."""
    from distill.saved_student import load_student

    state = load_student(saved_student("shared")).network.state_dict()
    model = {f"encoder.{name}": value for name, value in state.items()}
    model["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    model |= {"decoder.0.weight": torch.zeros(48, 32, 1), "decoder.0.bias": torch.zeros(48)}
    model |= {"feature_model.visual.ln_post.weight": torch.ones(48, dtype=torch.float16)}
    training: dict[str, Any] = {"optimizer": {"state": {}, "param_groups": []}, "lr_scheduler": {"t_in_epochs": False}}
    path = tmp_path / "ckpt_epoch_299.pth"
    torch.save({"model": model, "epoch": 299, "max_accuracy": 0.0, "scaler": {"scale": 65536.0}} | training, path)
    return path


def test_an_authors_checkpoint_becomes_a_student(
    authors_file: Path, decant: Decant, student_features: Features, random_images: Callable[[str], torch.Tensor],
    tmp_path: Path,
) -> None:  # fmt: skip
    done = decant("import", authors_file, "imported", "--teacher", "clip-b")
    assert done.code == 0, done.err
    assert "imported: w32-d2 at 32 px, from ckpt_epoch_299.pth" in done.out
    images = random_images("shared")
    assert torch.equal(student_features(Path("imported"), images), student_features(tmp_path / "run", images))
    assert decant("export", "imported", "out").code == 0
    card = Path("out/README.md").read_text()
    assert "| teacher | clip-b |" in card
    assert "| licence of the teacher's weights | MIT |" in card
    assert "| converted from | ckpt_epoch_299.pth |" in card
    assert decant("import", authors_file, "imported").code == 0  # the same again
    assert decant("import", authors_file, "out").code == 2  # something else


def test_fine_tuning_starts_from_an_imported_student(
    authors_file: Path, decant: Decant, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    images = make_images()
    decant("import", authors_file, "imported")
    finetune = ("finetune", "--preset", "smoke", "--data", images, "--set")
    done = decant(*finetune, "finetune.student=imported")
    assert done.code == 0, done.err
    assert "the student is that of imported" in done.out
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name == "students"] == []
    [result] = (tmp_path / "runs/finetune").glob("imported-*/result.json")
    found = json.loads(result.read_text())
    assert found["inputs"].keys() == {"student", "data"}
    assert found["inputs"]["student"] == digest_file(tmp_path / "imported/student.safetensors")
    assert {member["start"] for member in found["metrics"]["members"]} == {"scratch", "distilled"}
    missing = decant(*finetune, "finetune.student=nowhere")
    assert missing.code == 2
    assert "finetune.student is nowhere, which has no student.safetensors" in missing.err


@pytest.mark.parametrize(
    ("spoil", "code", "told"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            2,
            "is not a readable archive of weights, or is cut off",
        ),
        (lambda path: torch.save({"model": {"a.weight": torch.ones(2)}}, path), 2, "no student of the authors'"),
        (Path.unlink, 2, "ckpt_epoch_299.pth is not there, expected a checkpoint of the paper's authors"),
    ],
)
def test_what_is_no_checkpoint_is_told(
    spoil: Callable[[Path], None], code: int, told: str, authors_file: Path, decant: Decant
) -> None:
    spoil(authors_file)
    done = decant("import", authors_file, "imported")
    assert (done.code, told in done.err) == (code, True), done.err
    assert not Path("imported").exists()
