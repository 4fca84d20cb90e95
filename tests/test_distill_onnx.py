"""Students as ONNX graphs: an independent runtime gives their tokens, for any batch."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch

from distill import export as exporting
from distill import onnx as graphs
from distill.export import ExportRecord, export_student
from distill.saved_student import load_student
from storage.errors import ConfigError, InputError

Save = Callable[[str], Path]
Features = Callable[[Path, torch.Tensor], torch.Tensor]
Images = Callable[[str], torch.Tensor]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ExportRecord]:
    """A ViT's run and its export with everything: run, folder, record. Not to be written to."""
    from tests.fixtures.saved_students import write_student

    root = tmp_path_factory.mktemp("exported")
    run = write_student(root / "run", "shared")
    return run, root / "out", export_student(run, root / "out", format="both")


def test_the_graphs_tokens_are_the_students(
    exported: tuple[Path, Path, ExportRecord], student_features: Features, random_images: Images
) -> None:
    run, folder, record = exported
    assert record.onnx_difference is not None
    assert record.onnx_difference < 1e-4
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for images in (random_images("shared"), random_images("shared")[:1], torch.zeros(5, 3, 32, 32)):
        [tokens] = session.run(["tokens"], {"images": images.numpy()})
        np.testing.assert_allclose(tokens, student_features(run, images).numpy(), atol=1e-4)


def test_the_graph_says_what_it_is(exported: tuple[Path, Path, ExportRecord]) -> None:
    model = onnx.load(exported[1] / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    facts = {each.key: each.value for each in model.metadata_props}
    assert facts["store"] == "0123abcd"
    assert '"width":32' in facts["student"]
    session = onnxruntime.InferenceSession(exported[1] / "model.onnx")
    [images], [tokens] = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape) == ("images", ["batch", 3, 32, 32])
    assert (tokens.name, tokens.shape) == ("tokens", ["batch", 17, 32])


@pytest.mark.parametrize("name", ["per_block", "absolute", "swinv2", "convolution"])
def test_every_kind_of_student_is_expressed(
    name: str, saved_student: Save, student_features: Features, random_images: Images, tmp_path: Path
) -> None:
    run, images = saved_student(name), random_images(name)
    export_student(run, tmp_path / "out", format="onnx")
    features = student_features(run, images)
    if name == "swinv2":  # (B, H, W, C)
        features = features.flatten(1, 2)
    if name == "convolution":  # (B, C, H, W)
        features = features.flatten(2).transpose(1, 2)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    [tokens] = session.run(["tokens"], {"images": images.numpy()})
    np.testing.assert_allclose(tokens, features.numpy(), atol=1e-4)


def test_the_same_student_is_the_same_bytes_wherever_it_lies(
    exported: tuple[Path, Path, ExportRecord], tmp_path: Path
) -> None:
    run, folder, _ = exported
    export_student(run, tmp_path / "out", format="both")
    for path in folder.iterdir():
        data = path.read_bytes()
        assert data == (tmp_path / "out" / path.name).read_bytes(), path.name
        places = {str(folder.parent), str(Path(timm.__file__).parent.parent), str(Path.home()), os.getcwd()} - {"/"}
        assert not [place for place in places if place.encode() in data], path.name


def test_the_cards_lines_load_the_student(
    exported: tuple[Path, Path, ExportRecord], student_features: Features, random_images: Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, folder, _ = exported
    card = (folder / "README.md").read_text()
    images = random_images("shared")
    expected = student_features(run, images)
    blocks = [block.replace("FOLDER", str(folder)) for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL)]
    assert len(blocks) == 3
    for block in blocks[:2]:
        names: dict[str, Any] = {"images": images, "timm": timm}
        with torch.no_grad():
            exec(block, names)
            assert torch.equal(names["student"].forward_features(images), expected)
    monkeypatch.chdir(folder)
    names = {"images": images.numpy()}
    exec(blocks[2], names)
    np.testing.assert_allclose(names["tokens"], expected.numpy(), atol=1e-4)
    assert "opset 18" in card


def test_large_weights_lie_beside_the_graph(
    saved_student: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_MOST_BYTES_INSIDE", 1000)
    record = export_student(saved_student("shared"), tmp_path / "out", format="onnx")
    assert set(record.files) == {"README.md", "model.onnx", "model.onnx.data"}
    assert record.files["model.onnx.data"].num_bytes > 90_000
    assert record.files["model.onnx"].num_bytes < 90_000
    assert record.onnx_difference is not None


def test_the_student_is_as_it_was_afterwards(
    exported: tuple[Path, Path, ExportRecord], random_images: Images, tmp_path: Path
) -> None:
    """The exporter needs attention by single operations, which rounds otherwise."""
    saved = load_student(exported[0])
    graphs.write_onnx(saved.network, 32, tmp_path, {})
    fused = [module.fused_attn for module in saved.network.modules() if hasattr(module, "fused_attn")]
    assert fused == [
        module.fused_attn for module in load_student(exported[0]).network.modules() if hasattr(module, "fused_attn")
    ]
    assert any(fused)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_without_the_libraries_it_is_refused_before_anything_is_done(
    saved_student: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved_student("shared")
    monkeypatch.setattr(graphs, "_MODULES", ("onnx", "no_such_module"))
    monkeypatch.setattr(exporting, "load_student", None)
    with pytest.raises(ConfigError, match=r"needs no_such_module, not installed here; pip install 'decant-fd\[onnx\]'"):
        export_student(run, tmp_path / "out", format="both")


def test_without_a_runtime_it_is_written_and_not_compared(
    exported: tuple[Path, Path, ExportRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_RUNTIME", "no_such_module")
    assert graphs.onnx_difference(load_student(exported[0]).network, 32, exported[1]) is None


def test_a_graph_of_another_student_is_noticed(exported: tuple[Path, Path, ExportRecord]) -> None:
    other: Any = load_student(exported[0]).network
    with torch.no_grad():
        other.norm.weight.mul_(1.1)
    with pytest.raises(InputError, match=r"differ from the student's by .* at most"):
        graphs.onnx_difference(other, 32, exported[1])
    with torch.no_grad():
        other.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"differ from the student's by nan"):
        graphs.onnx_difference(other, 32, exported[1])


def test_a_network_that_torch_cannot_express_is_told(tmp_path: Path) -> None:
    class Strange(torch.nn.Module):
        num_features = 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward_features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            is_bright = bool(images_BCHW.mean() > 0.5)
            return images_BCHW.flatten(2) * self.weight if is_bright else images_BCHW.flatten(2)

    with pytest.raises(InputError, match=r"cannot write this student as ONNX .* FORMAT=timm"):
        graphs.write_onnx(Strange(), 32, tmp_path, {})
