"""One process's work on a distillation: all of it, or its share."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.checkpoint import save_weights
from distill.device import autocast, choose_device, choose_precision, repeatable
from distill.ema import Ema
from distill.job import Job
from distill.loop import Training, TrainingLog, train
from distill.objective import Objective
from distill.optim import build_optimizer, learning_rate, set_learning_rate
from distill.parallel import Team, distribute, join_team, settle
from distill.state import TrainState, gather
from distill.stream import DistillBatch, DistillStream, Share, unlike_pixels
from distill.student import DistillModel, checkpoint_activations, normalise_images
from distill.trackers import open_trackers
from distill.transfer import on_device
from storage.errors import ConfigError, DecantError, first_line
from storage.fingerprint import digest_json
from storage.image_index import load_index
from storage.reader import open_store
from storage.stage import Progress, StopRequest


def distill(job: Job, progress: Progress, stop: StopRequest) -> dict[str, Any]:
    """Train a student and write `student.safetensors` and `projector.safetensors`.

    Returns:
        The stage's metrics.

    Raises:
        ConfigError: the student does not fit the store.
        DecantError: nor does the training fit the GPU's memory.
    """
    cfg = job.cfg
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(cfg.run.threads or max(1, (os.cpu_count() or 1) // processes_here))
    device = choose_device(cfg.run.device)
    with join_team(device) as team, repeatable(device, wanted=cfg.run.deterministic):
        if team.size != cfg.run.processes:
            raise ConfigError(
                f"{cfg.run.processes} processes were asked for (distill.run.gpus, nodes), {team.size} were started; "
                "give GPUS=... and let this program start them"
            )
        try:
            session = prepare(job, team, device, progress)
            log = train(session.training, progress, stop)
        except torch.OutOfMemoryError as error:
            raise DecantError(
                f"the memory of {device} does not suffice: {first_line(error)}; set ACCUMULATE="
                f"{2 * cfg.run.accumulate}, or distill.run.checkpoint_activations=true; what was learnt so far is kept"
            ) from error
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise ConfigError(
                f"torch.compile cannot make this training step: {first_line(error)}; set distill.run.compile=false"
            ) from error
        _save(session, job)
        return _metrics(session, log)


class Session(NamedTuple):
    """A training that is about to begin."""

    training: Training
    model: DistillModel
    stream: DistillStream
    facts: dict[str, str]
    """What the files of weights say about themselves."""


def prepare(job: Job, team: Team, device: torch.device, progress: Progress) -> Session:
    """Open the stores, build the model, and say what a step is.

    Raises:
        ConfigError: the student does not fit the store.
    """
    # ---- data --------------------------------------------------------------------------------------------------------
    cfg = job.cfg
    index = load_index(job.inputs["data"])
    live = job.live.open(index.split("train"), device) if job.live and cfg.online else None
    if cfg.online and live is None:
        raise ConfigError("an online run needs a teacher; start it as `make distill ONLINE=1`")
    first = live.reader if live else open_store(cfg.store or job.inputs["extract"])
    readers = [first, *(open_store(other.store) for other in cfg.also)]
    is_cuda = device.type == "cuda"
    share = Share(team.rank, team.size, cfg.run.accumulate)
    stream = DistillStream(
        readers, index.location, cfg, cache_dir=index.images.cache_dir, share=share, is_pinned=is_cuda,
        is_live=live is not None,
    )  # fmt: skip
    for reason in filter(None, (stream.pixels.warning, *unlike_pixels(readers))):
        progress.say(f"warning: {reason}: the student may see slightly other pixels than the teacher did")
    if live is not None:
        live.reader.shares_pixels = live.reader.input_px == cfg.student.input_px and not stream.pixels.are_stored
    if len(stream.order) < 2:
        raise ConfigError(f"the store {first.location} has {len(stream.order)} usable images; two are needed")

    if cfg.batch_size > len(stream.order):
        progress.say(
            f"warning: a step of {cfg.batch_size:,} images is more than an epoch of {len(stream.order):,}; lower "
            "distill.batch_size"
        )

    # ---- model -------------------------------------------------------------------------------------------------------
    torch.manual_seed(cfg.seed)
    teachers = [reader.plan.features for reader in readers]
    model = DistillModel(cfg.student, teachers, drop_path=cfg.drop_path, grid=cfg.grid)
    model.to(device)
    for note in model.notes:
        progress.say(note)
    if cfg.run.checkpoint_activations:
        checkpoint_activations(model.student)
    precision = choose_precision(cfg.run.precision, device)
    is_compiled = is_cuda if cfg.run.compile is None else cfg.run.compile
    if is_compiled:
        model.compile()
    forward = distribute(model, team, device, cfg.run.strategy)
    optimizer = build_optimizer(model, cfg.optim)
    ema = Ema(model, cfg.ema_decay) if cfg.ema_decay else None

    # ---- objective ---------------------------------------------------------------------------------------------------
    decoders = [live, *(None for _ in cfg.also)]
    objectives = [
        Objective(reader, cfg, has_cls=has_cls, decode=decode)
        for reader, has_cls, decode in zip(readers, model.has_cls, decoders, strict=True)
    ]
    weights = [1.0, *(other.weight for other in cfg.also)]

    def loss(batch: DistillBatch) -> Tensor:
        with autocast(device, precision):
            predictions = forward(normalise_images(batch.images_BHWC, device))
        parts = batch.stores
        if live is not None and live.reader.shares_pixels:
            parts = parts[0]._replace(encoded={"pixels": batch.images_BHWC}), *parts[1:]
        losses = [
            weight * objective(pred_BTC, part)
            for weight, objective, pred_BTC, part in zip(weights, objectives, predictions, parts, strict=True)
        ]
        return torch.stack(losses).sum() / sum(weights)

    def set_lr(step: int) -> float:
        lr = learning_rate(
            step, cfg=cfg.optim, num_steps=stream.num_steps, steps_per_epoch=len(stream.order) / cfg.batch_size,
            batch_size=cfg.batch_size,
        )  # fmt: skip
        set_learning_rate(optimizer, lr)
        return lr

    def predict_nothing() -> Sequence[Tensor]:
        side = cfg.student.input_px
        with autocast(device, precision):
            outputs: Sequence[Tensor] = forward(torch.zeros(stream.part_size, 3, side, side, device=device))
        return outputs

    settle(forward, predict_nothing)

    # ---- train -------------------------------------------------------------------------------------------------------
    fingerprints = [reader.manifest.fingerprint for reader in readers]
    run_digest = digest_json([cfg.identity(), *fingerprints])
    training = Training(
        state=TrainState(model, optimizer, ema), set_lr=set_lr,
        batches=lambda start: on_device(stream.batches(start), device), loss=loss, forward=forward,
        num_steps=stream.num_steps, images_per_step=cfg.batch_size, parts=cfg.run.accumulate,
        clip_grad=cfg.optim.clip_grad, seed=cfg.seed, out_dir=job.out_dir, run_digest=run_digest,
        checkpoint_seconds=cfg.run.checkpoint_seconds, team=team,
        trackers=lambda start: open_trackers(
            cfg.run.trackers, job.out_dir, run=job.out_dir.name, settings=cfg.to_json(), start=start
        ),
    )  # fmt: skip
    facts = {
        "student": cfg.student.model_dump_json(),
        "store": fingerprints[0],
        "teacher": ", ".join(features.teacher for features in teachers),
        "whitening": first.plan.whitening.model_dump_json(),
        "whiten": str(cfg.whiten).lower(),
    }
    return Session(training, model, stream, facts)


def _save(session: Session, job: Job) -> None:
    """Write the weights. The checkpoints stay, for whoever is cut off before the stage has its result."""
    training, model = session.training, session.model
    if training.state.ema is not None:
        training.state.ema.apply()
    for name, module in (("student", model.student), ("projector", model.projectors)):
        state = gather(module.state_dict().items(), wanted=training.team.is_first)
        if training.team.is_first:
            save_weights(job.out_dir / f"{name}.safetensors", state, session.facts)


def _metrics(session: Session, log: TrainingLog) -> dict[str, Any]:
    training = session.training
    return {
        "steps": training.num_steps,
        "images": len(session.stream.order),
        "first_loss": log.history[0]["loss"],
        "final_loss": log.history[-1]["loss"],
        "train_seconds": round(log.seconds, 2),
        "images_per_second": round(training.num_steps * training.images_per_step / log.seconds, 1),
        "wait_fraction": round(log.wait_seconds / log.seconds, 4),
        "resumed_at": log.resumed_at,
        "parameters": sum(value.numel() for value in session.model.student.parameters()),
        "processes": training.team.size,
        "history": log.history,
    }
