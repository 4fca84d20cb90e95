"""The fine-tuning stage: every start with every seed, each member resumable and kept once it is done.

python -m pipeline finetune --seeds 3
"""

import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.checkpoint import save_weights
from distill.device import choose_device
from distill.loop import Training, finish, train
from distill.optim import build_optimizer, learning_rate
from distill.prefetch import ImageCache
from distill.state import TrainState
from distill.student import normalise_images
from distill.student_config import StudentConfig, read_student
from finetune.classifier import build_classifier, count_correct, layer_lr_scale
from finetune.config import FinetuneConfig, Start
from finetune.labelled import LabelledBatch, LabelledImages
from storage.atomic import read_json, write_json
from storage.errors import DamagedError, InputError
from storage.fingerprint import digest_file, digest_json
from storage.image_index import ImageIndex, load_index, require_labels
from storage.lock import hold_lock
from storage.stage import Progress, SilentProgress, StopRequest, stop_on_signals


def run(
    cfg: FinetuneConfig, inputs: Mapping[str, Path], out_dir: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Fine-tune and evaluate all members.

    Args:
        inputs: `data`, the image index; `distill`, the folder of the distilled student (`scratch` takes its shape),
            unless `cfg.student` names one.

    Returns:
        The stage's metrics; `members` has one row for each start and seed.

    Raises:
        ConfigError: no labels, or one class only.
        InputError: no evaluation images.
    """
    progress = progress or SilentProgress()
    torch.set_num_threads(cfg.run.threads or os.cpu_count() or 1)
    index = load_index(inputs["data"])
    train_images, eval_images = index.split("train"), index.split("eval")
    require_labels(train_images, "fine-tuning")
    if not len(eval_images):
        raise InputError("no image is held out for evaluation; set data.eval_fraction above 0, or add a val folder")
    require_labels(eval_images, "the evaluation of fine-tuning")
    weights = (Path(cfg.student) if cfg.student else inputs["distill"]) / "student.safetensors"
    student = student_shape(weights)
    budget = cfg.run.image_cache_mb << 20
    make = functools.partial(LabelledImages, cfg=cfg, input_px=student.input_px)
    train_cache, eval_cache = ImageCache(train_images, budget * 4 // 5), ImageCache(eval_images, budget // 5)

    if cfg.student:
        progress.say(f"the student is that of {cfg.student}")
    members = []
    with hold_lock(out_dir), stop_on_signals() as stop:
        for start in cfg.starts:
            for seed in cfg.seeds:
                data = make(images=train_cache, seed=seed), make(images=eval_cache, seed=seed)
                member_dir = out_dir / f"{start}-{seed}"
                members.append(_run_member(cfg, start, seed, index, student, weights, data, member_dir, progress, stop))
                stop.check()
    return {
        "members": members,
        "num_train": len(train_images),
        "num_eval": members[0]["num_eval"],
        "classes": list(index.classes),
        "majority_accuracy": majority_accuracy(eval_images.labels),
    }


def student_shape(weights: Path) -> StudentConfig:
    """The shape that a distilled student's file carries in its header.

    Raises:
        DamagedError: the file is missing or says nothing.
    """
    try:
        with safe_open(weights, framework="pt") as file:
            return read_student(weights, (file.metadata() or {})["student"].encode())
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise DamagedError(f"{weights} is not a distilled student ({error}); run `make distill FORCE=1`") from error


def majority_accuracy(labels: Sequence[int]) -> float:
    """What always guessing the most frequent class scores."""
    return max(Counter(labels).values()) / len(labels)


def _run_member(
    cfg: FinetuneConfig, start: Start, seed: int, index: ImageIndex, student: StudentConfig, weights: Path,
    data: tuple[LabelledImages, LabelledImages], out_dir: Path, progress: Progress, stop: StopRequest,
) -> dict[str, Any]:  # fmt: skip
    """Train and evaluate one start with one seed, unless it was done before."""
    digest = digest_json(
        [cfg.identity() | {"seeds": None, "starts": None}, start, seed, index.fingerprint, student.to_json(),
         digest_file(weights) if start == "distilled" else None]
    )  # fmt: skip
    result_path = out_dir / "result.json"
    if result_path.exists():
        earlier = read_json(result_path)
        if isinstance(earlier, dict) and earlier.get("digest") == digest:
            progress.say(f"{start}, seed {seed}: done before, {earlier['metrics']['accuracy']:.1%}")
            return dict(earlier["metrics"])
    progress.say(f"{start}, seed {seed}")
    train_data, eval_data = data
    torch.manual_seed(seed)
    device = choose_device(cfg.run.device)
    model = build_classifier(
        student, num_classes=len(index.classes), drop_path=cfg.drop_path,
        weights=weights if start == "distilled" else None,
    ).to(device)  # fmt: skip
    optimizer = build_optimizer(model, cfg.optim, lr_scale=layer_lr_scale(model, cfg.layer_decay))

    def set_lr(step: int) -> float:
        rate = functools.partial(
            learning_rate, step, cfg=cfg.optim, num_steps=train_data.steps,
            steps_per_epoch=len(train_data.images.images) / cfg.batch_size, batch_size=cfg.batch_size,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate(scale=group["lr_scale"])
        return rate()

    def loss(batch: LabelledBatch) -> Tensor:
        if not batch.keys:  # every image of the batch is unusable: a step without a gradient
            return torch.stack([parameter.sum() for parameter in model.parameters()]).sum() * 0.0
        logits_BN = model(normalise_images(batch.images_BHWC, device))
        return F.cross_entropy(logits_BN, batch.labels_B.to(device), label_smoothing=cfg.label_smoothing)

    training = Training(
        state=TrainState(model, optimizer), set_lr=set_lr, batches=train_data.train_batches, loss=loss,
        num_steps=train_data.steps, images_per_step=cfg.batch_size, clip_grad=cfg.optim.clip_grad, seed=seed,
        out_dir=out_dir, run_digest=digest, checkpoint_seconds=cfg.run.checkpoint_seconds,
    )  # fmt: skip
    out_dir.mkdir(parents=True, exist_ok=True)
    log = train(training, progress, stop)
    metrics = {"start": start, "seed": seed} | _evaluate(model, eval_data, device) | {
        "train_seconds": round(log.seconds, 2), "resumed_at": log.resumed_at, "history": log.history,
    }  # fmt: skip
    save_weights(out_dir / "classifier.safetensors", model.state_dict(), {"student": student.model_dump_json()})
    write_json(result_path, {"digest": digest, "metrics": metrics})
    finish(training)
    progress.say(f"{start}, seed {seed}: {metrics['accuracy']:.1%} of {metrics['num_eval']}")
    return metrics


def _evaluate(model: nn.Module, data: LabelledImages, device: torch.device) -> dict[str, Any]:
    """Exact counts over the evaluation images; unusable ones are counted apart."""
    model.eval()
    correct = seen = 0
    with torch.inference_mode():
        for batch in data.eval_batches():
            if batch.keys:
                logits_BN = model(normalise_images(batch.images_BHWC, device))
                correct += count_correct(logits_BN, batch.labels_B.to(device))
                seen += len(batch.keys)
    if not seen:
        raise InputError("none of the evaluation images can be decoded")
    return {"accuracy": correct / seen, "num_eval": seen, "num_bad": len(data.images.images) - seen}
