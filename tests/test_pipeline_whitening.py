"""Fitted whitening from the command line to the report: whatever is compared was whitened by the same statistics."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.backends import load_teacher
from extract.teachers import find_teacher
from pipeline.presets import load_preset
from pipeline.stages import STAGES, needs, upstream
from pipeline.workspace import Workspace
from storage.decode import decode_image
from storage.reader import open_store
from storage.store import FeatureReader
from storage.views import Renderer
from storage.whitening import STATISTICS_FILE, MeanStd, NoWhitening, Pca
from tests.fixtures.runs import folder_of

Decant = Callable[..., Any]
FITTED = {"mean_std": MeanStd(), "pca": Pca()}


def stores(work: Path) -> tuple[FeatureReader, FeatureReader]:
    return open_store(folder_of(work, "extract")), open_store(folder_of(work, "extract_eval"))


def teachers_tokens(store: FeatureReader, images: Path, record: int) -> Any:
    """By the teacher itself, from the image."""
    import torch

    key = store.images.keys[record // store.plan.views_per_image]
    view = store.views(np.array([record]))[0]
    pixels_HWC = Renderer().render_view(decode_image((images / key).read_bytes()), view, 32)
    return load_teacher(find_teacher("toy"), device="cpu")(torch.from_numpy(pixels_HWC.copy())[None])[0].numpy()


@pytest.fixture(scope="module", params=FITTED)
def fitted_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The kind of a whitening, and images and work folder of a whole run with it."""
    from pipeline import cli
    from tests.fixtures.images import draw_images

    folder = tmp_path_factory.mktemp("fitted")
    images, work = draw_images(folder / "images"), folder / "runs"
    arguments = ["run", "--preset", "smoke", "--data", images, "--work", work, "--whitening", request.param]
    cli.cli.main([str(word) for word in arguments], standalone_mode=False)
    return request.param, images, work


@pytest.fixture
def copied_run(fitted_run: tuple[str, Path, Path], tmp_path: Path) -> Path:
    """A work folder of one's own, over the same images."""
    return Path(shutil.copytree(fitted_run[2], tmp_path / "copied"))


def test_training_and_held_out_tokens_are_whitened_alike(fitted_run: tuple[str, Path, Path]) -> None:
    kind, images, work = fitted_run
    train, held_out = stores(work)
    assert train.plan.whitening == held_out.plan.whitening and train.plan.whitening.kind == kind
    np.testing.assert_array_equal(train.statistics, held_out.statistics)
    assert not np.array_equal(train.images.keys, held_out.images.keys)
    result = Workspace(work).results(STAGES["extract_eval"])[0][1]
    assert result.inputs["extract"] == Workspace(work).results(STAGES["extract"])[0][1].fingerprint
    for store in (train, held_out):
        for record in (0, store.plan.num_records - 1):
            raw_TC = store.raw_tokens(np.array([record]))[0]
            np.testing.assert_allclose(raw_TC, teachers_tokens(store, images, record), atol=2e-2)


def test_the_student_is_compared_with_what_it_learnt(fitted_run: tuple[str, Path, Path]) -> None:
    """Against tokens that are whitened otherwise the loss would be another: here it is worked out from the teacher."""
    _, images, work = fitted_run
    train, held_out = stores(work)
    found = Workspace(work).results(STAGES["evaluate"])[0][1].metrics["held_out"]
    losses = []
    for record in range(held_out.plan.num_records):
        raw_TC = teachers_tokens(held_out, images, record).astype(np.float64)
        mean_C, *scale = train.statistics.astype(np.float64)
        centred_TC = raw_TC - mean_C
        white_TC = centred_TC / scale[0] if len(scale) == 1 else centred_TC @ np.array(scale).T
        size_TC = np.abs(white_TC)
        losses.append(np.where(size_TC < 2, size_TC**2 / 4, size_TC - 1).mean())
    assert found["zero_loss"] == pytest.approx(np.mean(losses), rel=1e-3)


def test_a_second_run_does_nothing(fitted_run: tuple[str, Path, Path], copied_run: Path, decant: Decant) -> None:
    outcome = decant("run", "--work", copied_run)
    assert (outcome.code, outcome.out.count(" skip up to date")) == (0, len(STAGES)), outcome.err


def test_another_whitening_is_another_store(
    fitted_run: tuple[str, Path, Path], copied_run: Path, decant: Decant
) -> None:
    outcome = decant("plan", "--work", copied_run, "--whitening", "layer_norm")
    assert "extract run extract.whitening." in outcome.out
    assert "extract_eval run" in outcome.out and "distill run extract changed" in outcome.out
    outcome = decant("plan", "--work", copied_run, "--set", "extract.sampler.seed=5")
    assert "extract_eval run extract changed" in outcome.out, "its tokens are whitened by what the other has learnt"


def test_the_same_command_gives_the_same_store_again(
    fitted_run: tuple[str, Path, Path], copied_run: Path, decant: Decant, tree_bytes: Any
) -> None:
    before = tree_bytes(copied_run / "stores")
    shutil.rmtree(copied_run / "stores")
    assert decant("run", "--work", copied_run).code == 0
    assert tree_bytes(copied_run / "stores") == before


@pytest.mark.parametrize("stage", ["extract", "extract_eval"])
def test_repair_brings_the_statistics_back(copied_run: Path, decant: Decant, stage: str) -> None:
    root = folder_of(copied_run, stage)
    before = (root / STATISTICS_FILE).read_bytes()
    (root / STATISTICS_FILE).write_bytes(before[:-1] + b"x")
    outcome = decant("verify", "--work", copied_run)
    assert outcome.code == 6 and f"{STATISTICS_FILE}: damaged" in outcome.out
    outcome = decant("repair", "--work", copied_run)
    assert (outcome.code, (root / STATISTICS_FILE).read_bytes()) == (0, before), outcome.err
    assert decant("verify", "--work", copied_run).code == 0


def test_a_repair_without_the_other_store(copied_run: Path, decant: Decant) -> None:
    """What the training images say can be learnt again; what the held-out images share with them cannot."""
    train, held_out = folder_of(copied_run, "extract"), folder_of(copied_run, "extract_eval")
    before = (train / STATISTICS_FILE).read_bytes()
    for root in (train, held_out):
        (root / STATISTICS_FILE).unlink()
    outcome = decant("repair", held_out, "--work", copied_run)
    assert outcome.code == 6 and "copy it from another store" in outcome.err
    outcome = decant("repair", train, "--work", copied_run)
    assert (outcome.code, (train / STATISTICS_FILE).read_bytes()) == (0, before), outcome.err
    assert decant("repair", held_out, "--work", copied_run).code == 0
    assert (held_out / STATISTICS_FILE).read_bytes() == before


def test_a_student_from_a_store_made_elsewhere(
    fitted_run: tuple[str, Path, Path], decant: Decant, tmp_path: Path
) -> None:
    """Its held-out tokens are whitened by that store's statistics, not by those of a store that is made here."""
    kind, images, work = fitted_run
    store = shutil.copytree(folder_of(work, "extract"), tmp_path / "elsewhere")
    words = ("run", "--preset", "smoke", "--data", images, "--work", tmp_path / "new", "--store", store)
    seeded = ("--set", "extract.sampler.seed=5")
    refused = decant(*words, *seeded)
    assert refused.code == 2 and f"give WHITENING={kind}" in refused.err
    outcome = decant(*words, *seeded, "--whitening", kind)
    assert outcome.code == 0, outcome.err
    here, held_out = stores(tmp_path / "new")
    assert held_out.plan.whitening == open_store(store).plan.whitening != here.plan.whitening


def test_tokens_that_are_whitened_otherwise_are_refused(fitted_run: tuple[str, Path, Path], tmp_path: Path) -> None:
    """Should an evaluation ever meet them."""
    from finetune import evaluate
    from finetune.config import EvaluateConfig
    from storage.errors import InputError

    _, _, work = fitted_run
    student = shutil.copytree(folder_of(work, "distill"), tmp_path / "student")
    from distill.checkpoint import load_facts, load_weights, save_weights

    weights = student / "student.safetensors"
    facts = load_facts(weights) | {"whitening": NoWhitening().model_dump_json()}
    save_weights(weights, load_weights(weights), facts)
    inputs = {name: folder_of(work, name) for name in ("extract", "extract_eval")} | {"distill": student}
    data = next((work / "data").iterdir())
    with pytest.raises(InputError, match="the student learnt from tokens whitened by"):
        evaluate.run(EvaluateConfig(), inputs | {"data": data}, tmp_path / "out")


def test_only_what_is_fitted_makes_the_held_out_store_wait() -> None:
    config = load_preset("smoke")
    stage = STAGES["extract_eval"]
    assert needs(stage, config) == () and upstream(("extract_eval",), config) == ["extract_eval"]
    for whitening in FITTED.values():
        fitted = config.model_copy(update={"extract": config.extract.model_copy(update={"whitening": whitening})})
        assert needs(stage, fitted) == ("extract",)
        distill = fitted.distill.model_copy(update={"store": "s3://b/x"})
        elsewhere = fitted.model_copy(update={"distill": distill})
        assert (needs(stage, elsewhere), stage.elsewhere(elsewhere)) == ((), {"store": "s3://b/x"})
