"""The evaluation stage: what frozen features are worth, and how near the student came to its teacher on unseen images.

python -m pipeline evaluate
"""

import io
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.checkpoint import load_facts, load_weights
from distill.device import choose_device
from distill.loss import feature_loss
from distill.student import DistillModel, normalise_images
from distill.targets import select_targets
from finetune.config import EvaluateConfig
from finetune.features import PooledFeatures, iter_views, pool_student, pool_teacher
from finetune.linear_probe import linear_probe
from finetune.run import student_shape
from storage.atomic import write_file
from storage.errors import InputError
from storage.image_index import ImageList, load_index, require_labels
from storage.lock import hold_lock
from storage.reader import open_store
from storage.stage import Progress, SilentProgress, StopRequest, stop_on_signals
from storage.store import FeatureReader
from storage.whitening import LayerNorm


def run(
    cfg: EvaluateConfig, inputs: Mapping[str, Path], out_dir: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Probe teacher and student, compare their tokens, keep a few for pictures.

    Args:
        inputs: `data`; `extract` and `extract_eval`, stores of the training and the held-out images; `distill`.

    Returns:
        The stage's metrics.

    Raises:
        ConfigError: no labels, or one class only.
        InputError: the stores are not those of these images, or not whitened as the student learnt.
    """
    progress = progress or SilentProgress()
    torch.set_num_threads(cfg.run.threads or os.cpu_count() or 1)
    index = load_index(inputs["data"])
    train_images, eval_images = index.split("train"), index.split("eval")
    train_store, eval_store = open_store(inputs["extract"]), open_store(inputs["extract_eval"])
    for store, images in ((train_store, train_images), (eval_store, eval_images)):
        require_labels(images, "a linear probe")
        _check_images(store, images)
    weights = inputs["distill"] / "student.safetensors"
    student = student_shape(weights)
    is_raw = _learnt_raw_tokens(weights, eval_store)
    device = choose_device(cfg.run.device)
    model = DistillModel(student, [eval_store.plan.features], drop_path=0.0, grid="resample")
    model.student.load_state_dict(load_weights(weights))
    projectors = load_weights(inputs["distill"] / "projector.safetensors")
    model.projectors.load_state_dict({name: projectors[name] for name in ("0.weight", "0.bias")})
    model.eval().to(device)

    def probe(train: PooledFeatures, evaluation: PooledFeatures) -> dict[str, Any]:
        started = time.monotonic()
        result = linear_probe(
            train, evaluation, penalties=cfg.penalties, iterations=cfg.iterations, seed=cfg.seed
        )._asdict()
        stop.check()
        return result | {"seconds": round(time.monotonic() - started, 2)}

    with hold_lock(out_dir), stop_on_signals() as stop:
        progress.say("linear probe on the teacher's frozen features")
        teacher_probe = probe(
            pool_teacher(train_store, train_images, stop), pool_teacher(eval_store, eval_images, stop)
        )
        progress.say("linear probe on the student's frozen features")
        pooled = (
            pool_student(model, store, images, student.input_px, device, stop)
            for store, images in ((train_store, train_images), (eval_store, eval_images))
        )
        student_probe = probe(*pooled)
        progress.say("student against teacher on held-out images")
        distance = compare_tokens(model, eval_store, eval_images, student.input_px, device, stop, is_raw=is_raw)
        _keep_pictures(cfg, model, eval_store, eval_images, student.input_px, device, out_dir, is_raw=is_raw)
        stop.check()
    return {"teacher_probe": teacher_probe, "student_probe": student_probe, "held_out": distance}


def _check_images(store: FeatureReader, images: ImageList) -> None:
    """A store is used for its tokens only: labels come from the data, where they may be newer than the store."""
    if images.fingerprint != store.plan.images_fingerprint:
        raise InputError(
            f"{store.location} holds tokens of other images (fingerprint {store.plan.images_fingerprint}) than "
            f"{images.location} ({images.fingerprint}); run `make evaluate`, which lists the images anew"
        )


def _learnt_raw_tokens(weights: Path, store: FeatureReader) -> bool:
    """Whether a student predicts the teacher's own tokens, instead of whitened ones.

    Raises:
        InputError: it learnt from tokens that are whitened unlike the store's, which say nothing about it.
    """
    facts = load_facts(weights)
    learnt = facts.get("whitening", LayerNorm().model_dump_json())
    found = store.plan.whitening.model_dump_json()
    if learnt != found:
        raise InputError(
            f"the tokens of {store.location} are whitened by {found}, the student learnt from tokens whitened by "
            f"{learnt}; run `make evaluate` with the WHITENING and STORE that the student was distilled with"
        )
    return facts.get("whiten") == "false"


@torch.inference_mode()
def compare_tokens(
    model: DistillModel, store: FeatureReader, images: ImageList, image_px: int, device: torch.device,
    stop: StopRequest | None = None, *, is_raw: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Mean loss (beta 2) and cosine between predicted and true tokens, whitened or (`is_raw`) the teacher's own; and
    the loss of predicting zero."""
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    for batch in iter_views(store, images, image_px=image_px, stop=stop, is_raw=is_raw):
        assert batch.images_BHWC is not None
        target_BTC = select_targets(batch.tokens_BTC, store.plan.features, has_cls=model.has_cls[0]).to(device)
        [pred_BTC] = model(normalise_images(batch.images_BHWC, device))
        size = len(batch.positions_B)
        cosine = F.cosine_similarity(pred_BTC, target_BTC, dim=-1).mean()
        zero = feature_loss(torch.zeros_like(target_BTC), target_BTC, beta=2.0)
        sums += size * torch.stack([feature_loss(pred_BTC, target_BTC, beta=2.0), cosine, zero]).double().cpu()
        count += size
    loss, cosine, zero_loss = (sums / count).tolist()
    return {"loss": loss, "cosine": cosine, "zero_loss": zero_loss, "views": count}


@torch.inference_mode()
def _keep_pictures(
    cfg: EvaluateConfig, model: DistillModel, store: FeatureReader, images: ImageList, image_px: int,
    device: torch.device, out_dir: Path, *, is_raw: bool,
) -> None:  # fmt: skip
    """A few views, spread over the list, with the grid tokens of teacher and student: `pictures.npz`."""
    views = list(_first_views(store, images, image_px, cfg.pictures, is_raw=is_raw))
    if not views:
        return
    pixels_BHWC = torch.stack([pixels for _, pixels, _ in views])
    [pred_BTC] = model(normalise_images(pixels_BHWC, device))
    grid_tokens = store.plan.features.grid_hw[0] * store.plan.features.grid_hw[1]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        keys=np.array([key for key, _, _ in views]),
        images_BHWC=pixels_BHWC.numpy(),
        teacher_BTC=torch.stack([tokens for _, _, tokens in views])[:, -grid_tokens:].numpy(),
        student_BTC=pred_BTC[:, -grid_tokens:].cpu().numpy(),
        grid_hw=np.array(store.plan.features.grid_hw),
    )
    write_file(out_dir / "pictures.npz", buffer.getvalue())


def _first_views(
    store: FeatureReader, images: ImageList, image_px: int, count: int, *, is_raw: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(key, pixels, tokens) of `count` images, evenly spread."""
    usable = store.usable_images()
    wanted = set(usable[np.linspace(0, len(usable) - 1, min(count, len(usable))).astype(int)].tolist())
    if not wanted:
        return
    for batch in iter_views(store, images, image_px=image_px, is_raw=is_raw):
        assert batch.images_BHWC is not None
        for number, position in enumerate(batch.positions_B.tolist()):
            if position in wanted:
                wanted.discard(position)
                yield images.keys[position], batch.images_BHWC[number], batch.tokens_BTC[number]
        if not wanted:
            return
