"""The distillation stage: a student from a store.

python -m pipeline distill --student vit-b
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.checkpoint import save_weights
from distill.config import DistillConfig
from distill.loop import Training, choose_device, finish, train
from distill.objective import Objective
from distill.optim import build_optimizer, learning_rate, set_learning_rate
from distill.stream import DistillBatch, DistillStream
from distill.student import DistillModel, normalise_images
from storage.errors import ConfigError
from storage.fingerprint import digest_json
from storage.image_index import load_index
from storage.lock import hold_lock
from storage.reader import open_store
from storage.stage import Progress, SilentProgress, stop_on_signals


def run(
    cfg: DistillConfig, inputs: Mapping[str, Path], out_dir: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a student on a store and write `student.safetensors`.

    Args:
        inputs: `extract`, a finished store, unless `cfg.store` names one; `data`, the index that says where its images
            lie.

    Returns:
        The stage's metrics.

    Raises:
        ConfigError: the student does not fit the store.
    """
    progress = progress or SilentProgress()
    torch.set_num_threads(cfg.run.threads or os.cpu_count() or 1)
    index = load_index(inputs["data"])
    device = choose_device(cfg.run.device)
    readers = [open_store(cfg.store or inputs["extract"]), *(open_store(other.store) for other in cfg.also)]
    stream = DistillStream(
        readers, index.location, cfg, cache_dir=index.images.cache_dir, is_pinned=device.type == "cuda"
    )
    if stream.pixels.warning:
        progress.say(
            f"warning: {stream.pixels.warning}: the student may see slightly other pixels than the teacher did"
        )
    if len(stream.order) < 2:
        raise ConfigError(f"the store {readers[0].location} has {len(stream.order)} usable images; two are needed")

    torch.manual_seed(cfg.seed)
    teachers = [reader.plan.features for reader in readers]
    model = DistillModel(cfg.student, teachers, drop_path=cfg.drop_path, grid=cfg.grid).to(device)
    optimizer = build_optimizer(model, cfg.optim)
    objectives = [
        Objective(reader, cfg, has_cls=has_cls) for reader, has_cls in zip(readers, model.has_cls, strict=True)
    ]
    weights = [1.0, *(other.weight for other in cfg.also)]

    def loss(batch: DistillBatch) -> Tensor:
        predictions = model(normalise_images(batch.images_BHWC, device))
        losses = [
            weight * objective(pred_BTC, part.to(device))
            for weight, objective, pred_BTC, part in zip(weights, objectives, predictions, batch.stores, strict=True)
        ]
        return torch.stack(losses).sum() / sum(weights)

    def set_lr(step: int) -> float:
        lr = learning_rate(
            step, cfg=cfg.optim, num_steps=stream.num_steps, steps_per_epoch=len(stream.order) / cfg.batch_size,
            batch_size=cfg.batch_size,
        )  # fmt: skip
        set_learning_rate(optimizer, lr)
        return lr

    training = Training(
        model=model, optimizer=optimizer, set_lr=set_lr, batches=stream.batches, loss=loss,
        num_steps=stream.num_steps, clip_grad=cfg.optim.clip_grad, seed=cfg.seed, out_dir=out_dir,
        run_digest=digest_json([cfg.identity(), *(reader.manifest.fingerprint for reader in readers)]),
        checkpoint_seconds=cfg.run.checkpoint_seconds,
    )  # fmt: skip
    with hold_lock(out_dir), stop_on_signals() as stop:
        log = train(training, progress, stop)
        facts = {
            "student": cfg.student.model_dump_json(),
            "store": readers[0].manifest.fingerprint,
            "whitening": readers[0].plan.whitening.model_dump_json(),
        }
        save_weights(out_dir / "student.safetensors", model.student.state_dict(), facts)
        save_weights(out_dir / "projector.safetensors", model.projectors.state_dict(), facts)
        finish(training)
    return {
        "steps": stream.num_steps,
        "images": len(stream.order),
        "first_loss": log.history[0]["loss"],
        "final_loss": log.history[-1]["loss"],
        "train_seconds": round(log.seconds, 2),
        "images_per_second": round(stream.num_steps * cfg.batch_size / log.seconds, 1),
        "wait_fraction": round(log.wait_seconds / log.seconds, 4),
        "resumed_at": log.resumed_at,
        "parameters": sum(parameter.numel() for parameter in model.student.parameters()),
        "history": log.history,
    }
