"""Teachers without a row: a library's own name of a model, and a Python file of the user's own."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from extract.backends import load_teacher
from extract.config import ExtractConfig
from extract.resolve import identify_teacher, resolve_teacher
from extract.teachers import TEACHERS, find_teacher
from extract.weights import weights_identity
from pipeline.config import PipelineConfig
from pipeline.stages import teacher_label
from storage.errors import ConfigError, InputError
from storage.reader import open_store

ROOT = Path(__file__).resolve().parent.parent
Decant = Callable[..., Any]


def readme_file() -> str:
    """The Python file that the README shows."""
    section = (ROOT / "README.md").read_text().partition("### A teacher of your own")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


def write(folder: Path, text: str, name: str = "my_teacher.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


# ---- a library's own name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["dinov2-s-reg", "siglip2-b", "eva02-b", "swinv2-b", "sam-b", "convnextv2-b", "radio-b"]
)
def test_timm_itself_tells_what_the_rows_say(name: str) -> None:
    row = find_teacher(name)
    found = identify_teacher(f"timm:{row.model}")
    assert found.name == f"timm:{row.model}"
    assert found.licence.lower() == row.licence.lower()
    ours = {"name", "licence", "left_out", "checkpoint_branch"}
    assert found.model_dump(exclude=ours) == row.model_dump(exclude=ours)


@pytest.mark.parametrize("name", ["clip-b", "dfn-l"])
def test_open_clip_itself_tells_what_the_rows_say(name: str) -> None:
    row = find_teacher(name)
    found = identify_teacher(f"open_clip:{row.model}/{row.weights.removeprefix('hub:')}")
    ours = {"name", "licence", "paper"}  # open_clip knows no licences
    assert found.model_dump(exclude=ours) == row.model_dump(exclude=ours)


def test_a_model_without_a_tag_is_the_one_that_timm_takes() -> None:
    found = identify_teacher("timm:vit_base_patch14_reg4_dinov2")
    assert found.model == "vit_base_patch14_reg4_dinov2.lvd142m"
    assert found == identify_teacher("timm:vit_base_patch14_reg4_dinov2.lvd142m"), "under the same name too"
    assert (found.num_prefix_tokens, found.weights, found.tap) == (5, "hub", "final_norm")


@pytest.mark.parametrize(
    ("model", "tap"),
    [
        ("beit3_base_patch16_224.pt", "final_norm"),
        ("eva02_tiny_patch14_224.mim_in22k", "final_norm"),
        ("eva02_tiny_patch14_336.mim_in22k_ft_in1k", "block"),
        ("beit_base_patch16_224.in22k_ft_in22k", "block"),
        ("vit_little_patch16_reg1_gap_256.sbb_in12k", "block"),
        ("vit_tiny_patch16_224.augreg_in21k", "final_norm"),
    ],
)
def test_a_norm_that_was_trained_behind_the_pooling_is_not_applied_to_tokens(model: str, tap: str) -> None:
    """Unless it is asked for."""
    assert identify_teacher(f"timm:{model}").tap == tap
    assert resolve_teacher(ExtractConfig(teacher=f"timm:{model}", tap="final_norm")).tap == "final_norm"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:test_vit", (101, 64)), ("timm:test_convnext", (25, 64)), ("timm:focalnet_tiny_srf", (49, 768)),
        ("timm:xcit_nano_12_p16_224", (196, 128)), ("open_clip:ViT-B-16-SigLIP2/webli", (196, 768)),
        ("open_clip:convnext_base_w/laion2b_s13b_b82k", (64, 1024)),
        ("open_clip:coca_ViT-B-32/laion2b_s13b_b90k", (50, 768)),
    ],
)  # fmt: skip
def test_networks_of_all_kinds_have_the_tokens_that_are_told(name: str, shape: tuple[int, int]) -> None:
    assert identify_teacher(name).feature_spec().shape_TC == shape


def test_a_model_by_name_gives_its_tokens() -> None:
    teacher = load_teacher(identify_teacher("timm:test_vit"), weights="random", device="cpu")
    pixels = torch.randint(0, 256, (2, 160, 160, 3), dtype=torch.uint8)
    assert teacher(pixels).shape == (2, 101, 64)
    small = resolve_teacher(ExtractConfig(teacher="timm:test_vit", input_px=96, tap="block", block=2))
    assert load_teacher(small, weights="random", device="cpu")(pixels[:, :96, :96]).shape == (2, 37, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip-x", r"unknown teacher 'clip-x'; did you mean 'clip-.* timm:NAME, open_clip:NAME/TAG or FILE\.py"),
        ("zzzzzz", r"unknown teacher 'zzzzzz'; `make teachers` lists those .* timm:NAME"),
        ("timm:vit_bse_patch16_224", "unknown timm model 'vit_bse_patch16_224'; did you mean 'vit_base_patch16_224'"),
        (
            "timm:vit_base_patch16_224.dinoo",
            "unknown weights tag of timm's vit_base_patch16_224 'dinoo'; did you mean 'di",
        ),
        ("timm:levit_128", r"gives tokens \(16, 384\) at 224 px, expected \(9, 384\)"),
        ("timm:crossvit_tiny_240", "cannot be tapped at its final_norm"),
        ("open_clip:ViT-B-33/openai", "unknown open_clip model 'ViT-B-33'; did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32", r"unknown weights tag of open_clip's ViT-B-32 \(open_clip:ViT-B-32/TAG\)"),
        ("open_clip:RN50/openai", "is a ModifiedResNet; only ViTs and timm's networks"),
    ],
)
def test_names_that_cannot_be_are_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        identify_teacher(name)
    assert "\n" not in str(caught.value)


# ---- a Python file ---------------------------------------------------------------------------------------------------


def test_the_readmes_file_fills_a_store(decant: Decant, make_images: Callable[..., Path], tmp_path: Path) -> None:
    write(tmp_path, readme_file())
    arguments = ("--teacher", "my_teacher.py", "--data", make_images(per_class=3), "--views", 1, "--executor", "inline")
    made = decant("extract", *arguments)
    assert made.code == 0, made.err
    [folder] = (path for path in (tmp_path / "runs" / "stores").iterdir() if path.is_dir())
    assert folder.name.startswith("my_teacher.py-")
    store = open_store(folder)
    assert store.plan.features.shape_TC == (196, 64)
    assert store.plan.features.teacher == "mine"
    tokens_TC = store.read(store.images.keys[0], view_index=0).tokens_TC.astype(np.float32)
    np.testing.assert_allclose(tokens_TC.std(axis=1), 1, atol=2e-3)
    assert "extract skip up to date" in decant("extract", *arguments).out
    write(tmp_path, readme_file() + "\n# another word\n")
    assert "extract run" in decant("plan", *arguments).out


def test_who_it_is_covers_the_files_bytes_and_the_function_but_not_its_place(tmp_path: Path) -> None:
    text = readme_file() + "\n\ndef other():\n    return teacher()\n"
    (tmp_path / "elsewhere").mkdir()
    here, there = write(tmp_path, text), write(tmp_path / "elsewhere", text)
    spec = identify_teacher(str(here))
    assert spec.library == "python"
    assert spec.identity() == identify_teacher(str(there)).identity()
    assert spec.identity() != identify_teacher(f"{here}:other").identity()
    before = weights_identity(spec, None)
    write(tmp_path, text + "\n")
    changed = identify_teacher(str(here))
    assert changed.identity() != spec.identity()
    assert weights_identity(changed, None) != before
    with pytest.raises(ConfigError, match="was changed while it was in use"):
        load_teacher(spec, device="cpu")


def test_random_weights_of_such_a_file_are_the_same_in_every_process(tmp_path: Path) -> None:
    path = write(tmp_path, readme_file())
    torch.manual_seed(7)
    first = load_teacher(identify_teacher(str(path)), device="cpu").fingerprint
    torch.manual_seed(8)
    assert load_teacher(identify_teacher(str(path)), device="cpu").fingerprint == first


SPEC = "from extract.spec import TeacherSpec\nimport torch\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_such", r"py cannot be imported: ModuleNotFoundError: .*nothing_such.* \(line 1 of "),
        ("x = 1\ndef teacher(:", r"my_teacher.py cannot be imported: SyntaxError: .* \(line 2 of "),
        ("x = 1", r"my_teacher.py has no function 'teacher'; define `def teacher\(\)`"),
        ("teacher = 1", "has no function 'teacher'"),
        ("def teacher():\n    y = 1\n    return 1 / 0", r":teacher failed: ZeroDivisionError: .* \(line 3 of "),
        ("def teacher():\n    return 1", r":teacher returned int, expected \(module, TeacherSpec\)"),
        ("def teacher():\n    return 1, 2", r":teacher returned \(int, int\), expected \(torch.nn.Module, "),
        ("def teacher(name):\n    return 1", "failed: TypeError: .*missing 1 required positional argument"),
        (
            SPEC + "def teacher():\n    return torch.nn.Identity(), TeacherSpec(name='x')",
            r"ValidationError: input_px: Field required \(and 2 more\) \(line 4 of ",
        ),
        (
            SPEC + "def teacher():\n    return torch.nn.Identity(), "
            "TeacherSpec(name='x', input_px=32, patch_px=8, channels=3, weights='hub')",
            "says weights='hub', but only a library's own models are downloaded",
        ),
        (
            SPEC + "def teacher():\n    return torch.nn.Linear(2, 2, device='meta'), "
            "TeacherSpec(name='x', input_px=32, patch_px=8, channels=3)",
            "returned a module on the meta device, which has no values",
        ),
        (
            SPEC + "def teacher():\n    return torch.nn.Identity(), "
            "TeacherSpec(name='x', input_px=32, patch_px=8, channels=3, std=(0, 1, 1), weights='weird')",
            r"ValidationError: weights: .* \(and 1 more\) \(line 4 of ",
        ),
        ("import sys\nsys.exit(0)", r"cannot be imported: SystemExit: 0 \(line 2 of "),
        ("def teacher():\n    raise SystemExit", r":teacher failed: SystemExit: SystemExit \(line 2 of "),
    ],
)  # fmt: skip
def test_mistakes_in_the_file_are_one_line_that_names_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        identify_teacher(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("return images", r"gave \(1, 3, 32, 32\) for 1 images, expected tokens \(1, 16, 3\): its TeacherSpec says 0 "),
        ("return [images]", r"gave list for 1 images, expected tokens"),
        ("return images @ images.flatten()", r"failed on images \(1, 3, 32, 32\): RuntimeError: .* \(line 5 of "),
        ("raise SystemExit(0)", r"failed on images \(1, 3, 32, 32\): SystemExit: 0 \(line 5 of "),
        ("return images.to('meta')", r"gave a tensor on the meta device, without values, for 1 images"),
        ("return images.flatten(2)", r"gave \(1, 3, 1024\) for 1 images, expected tokens \(1, 16, 3\)"),
    ],
)
def test_mistakes_of_the_module_are_told(forward: str, message: str, tmp_path: Path) -> None:
    text = f"{SPEC}class Network(torch.nn.Module):\n    def forward(self, images):\n        {forward}\n"
    text += "def teacher():\n    return Network(), TeacherSpec(name='x', input_px=32, patch_px=8, channels=3)\n"
    loaded = load_teacher(identify_teacher(str(write(tmp_path, text))), device="cpu")
    with pytest.raises(ConfigError, match=message):
        loaded(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


FAILS_ON_WHITE = f"""{SPEC}class Network(torch.nn.Module):
    def forward(self, images):
        if images.flatten(1).amin(1).amax() > 0.99:
            raise ZeroDivisionError('too bright')
        return torch.nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)

def teacher():
    return Network(), TeacherSpec(name='x', input_px=32, patch_px=8, channels=3, mean=(0, 0, 0), std=(1, 1, 1))
"""


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_a_module_that_fails_on_one_image_costs_its_shard_only(
    executor: str, decant: Decant, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    path, images = write(tmp_path, FAILS_ON_WHITE), make_images()
    Image.new("RGB", (50, 50), "white").save(images / "light" / "001.png")
    outcome = decant(
        "extract", "--teacher", path, "--data", images, "--views", 1, "--executor", executor,
        "--set", "extract.records_per_shard=4", "--set", "data.eval_fraction=0.1",
    )  # fmt: skip
    assert outcome.code == 3
    assert "1 of 5 shards" in outcome.err
    assert "ZeroDivisionError: too bright (line 6 of" in outcome.err


def test_a_missing_file_is_told_and_settings_that_the_file_decides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file nowhere\.py, which TEACHER=nowhere\.py:make names"):
        identify_teacher("nowhere.py:make")
    path = write(tmp_path, readme_file())
    with pytest.raises(ConfigError, match=r"decides its input size .* leave out extract\.input_px, extract\.block"):
        resolve_teacher(ExtractConfig(teacher=str(path), input_px=256, block=3))


def test_stage_channels_that_do_not_fit_are_told(tmp_path: Path) -> None:
    text = SPEC + "def teacher():\n    return torch.nn.Identity(), TeacherSpec(\n"
    text += "        name='x', input_px=32, patch_px=8, channels=3, stage_channels=(8, 16){more})\n"
    for more in ("", ", block=2"):
        path = write(tmp_path, text.replace("{more}", more))
        with pytest.raises(ConfigError, match=r"stage_channels are \[8, 16\], but channels is 3 and block (-1|2); "):
            identify_teacher(str(path))


# ---- names as folders, and light listings ----------------------------------------------------------------------------


def test_every_teachers_folder_has_a_plain_readable_name() -> None:
    def label(teacher: str) -> str:
        return teacher_label(PipelineConfig(preset="", extract=ExtractConfig(teacher=teacher)))

    assert {name: label(name) for name in TEACHERS} == {name: name for name in TEACHERS}
    assert label("timm:vit_base_patch16_224.dino") == "timm-vit_base_patch16_224.dino"
    assert label("open_clip:ViT-B-32/laion2b_s34b_b79k") == "open_clip-ViT-B-32-laion2b_s34b_b79k"
    assert label("/home/me/my teachers/../x/my_teacher.py:big") == "my_teacher.py-big"
    assert label("../..") == ""


def test_a_teacher_with_a_row_is_planned_without_a_deep_learning_library() -> None:
    code = (
        "import sys; from extract.resolve import identify_teacher; "
        "identify_teacher('swinv2-g').at(tap='block', block=1); print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
