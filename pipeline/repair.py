"""Which shards of a store are damaged, and how they are made again."""

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from extract.config import ExtractConfig
from extract.resolve import names_code, resolve_teacher
from extract.weights import WeightsSource, weights_identity
from pipeline.config import PipelineConfig
from pipeline.workspace import Workspace, load_current, read_result
from storage.errors import ConfigError, DamagedError, DecantError, InputError
from storage.folder import find_plan
from storage.image_index import load_index
from storage.lock import hold_lock
from storage.reader import open_store
from storage.records import StorePlan
from storage.stage import Progress, StageResult
from storage.verify import STORE, Damage, check_structure, discard_shard, iter_data_damage, sample_shards


class Health(NamedTuple):
    """What verification found out about a store."""

    damage: list[Damage]

    @property
    def damaged_shards(self) -> list[int]:
        """In order; with `STORE` for what belongs to no shard."""
        return sorted({damage.shard for damage in self.damage})


def examine_store(location: Path | str, *, fraction: float, seed: int, progress: Progress) -> Health:
    """Check a store's structure, then compare `fraction` of its shards with their digests.

    Raises:
        InputError: no store there.
    """
    structure = check_structure(location)
    damage = list(structure.damage)
    for found in damage:
        progress.say(describe(location, found))
    num_shards = structure.plan.num_shards if structure.plan else 0
    progress.say(
        f"{location}: structure {'damaged' if damage else 'whole'}: {len(structure.shards)} of {num_shards} shards, "
        f"{sum(entry.num_bytes for entry in structure.shards.values()) / 1e9:,.2f} GB"
    )
    chosen = sample_shards(structure.shards, fraction, seed)
    if chosen:
        sizes = {index: entry.num_bytes for index, entry in structure.shards.items()} | {STORE: 0}
        progress.start(-(-sum(sizes[index] for index in chosen) // 10**6), "MB")
        for index, found_in_shard in iter_data_damage(structure, chosen):
            for found in found_in_shard:
                progress.say(describe(location, found))
            damage += found_in_shard
            progress.advance(sizes[index] // 10**6, shard=index if index != STORE else "-")
    return Health(damage)


def describe(location: Path | str, damage: Damage) -> str:
    """A line for the screen."""
    where = "" if damage.shard == STORE else f"shard {damage.shard}: "
    return f"{location}: {where}{damage.name}: {damage.found}"


def repair_store(workspace: Workspace, root: Path, health: Health, progress: Progress) -> None:
    """Forget what is damaged of a store and extract it again, with the settings that the store was made with.

    Raises:
        ConfigError: nothing tells how the store was made, or where its images are.
        DamagedError: some damage is still there.
    """
    plan = find_plan(root)
    cfg, data_path = settings_of(workspace, root, plan), find_images(workspace, root, plan)
    if plan is not None and (plan.backend, plan.encoding.kind, plan.token_subset) != (
        cfg.layout, cfg.encoding.kind, cfg.token_subset
    ):  # fmt: skip
        raise ConfigError(
            f"{root} is {plan.backend}, {plan.encoding.kind}, not what these settings extract: it was converted; "
            "convert its source again, into another folder"
        )
    with hold_lock(root):  # an extraction at work there is about to write it
        for index in health.damaged_shards:
            discard_shard(root, index)
    inputs = {"data": data_path} | _same_whitening(workspace, root, cfg, plan)
    importlib.import_module("extract.run").run(cfg, inputs, root, progress)
    left = check_structure(root).damage
    if left:
        raise DamagedError(f"after the repair {describe(root, left[0])}; delete {root} and extract it again")


def _same_whitening(workspace: Workspace, root: Path, cfg: ExtractConfig, plan: StorePlan | None) -> dict[str, Path]:
    """A store from which the whitening can be had that this one shares; none where it learns nothing.

    Raises:
        ConfigError: it is shared, and nothing tells with which store.
    """
    if cfg.whitening.is_fitted or cfg.whitening_from:
        return {}
    for other in workspace.stores():
        with contextlib.suppress(DecantError, OSError):
            reader = open_store(other)
            if other.resolve() != root.resolve() and plan and reader.plan.whitening == plan.whitening:
                reader.load_statistics()
                return {"extract": other}
    if plan is None and cfg.split == "eval":
        raise ConfigError(
            f"{root} is whitened by what another store learnt, and nothing tells any more by which; delete it and run "
            "`make evaluate`"
        )
    return {}


def settings_of(workspace: Workspace, root: Path, plan: StorePlan | None) -> ExtractConfig:
    """The settings that a store was extracted with; how to work comes from the last command.

    Raises:
        ConfigError: nothing tells them, or where the weights are.
    """
    current = load_current(workspace)
    before = PipelineConfig.checked(current, str(workspace.current_path)) if current else None
    variants = [before.led_by(name) for name in before.teachers] if before else []
    result = read_result(root)
    if result is not None:
        cfg = ExtractConfig.checked(result.config, f"{root}/result.json")
        _refuse_code(workspace, root, cfg.teacher, [variant.extract.teacher for variant in variants])
        weights = _find_weights(root, cfg, result, [variant.extract.weights for variant in variants])
        cfg = cfg.model_copy(update={"weights": weights})
    else:
        candidates = [cfg for variant in variants for cfg in (variant.extract, variant.extract_eval)]
        fitting = [cfg for cfg in candidates if plan is not None and _is_made_with(cfg, plan)]
        if not fitting:
            raise ConfigError(
                f"{root} has no readable result.json and is not of the last command's settings, so nothing tells how "
                "it was made; give the command that made it, with its options and --work, then `make repair` again"
            )
        cfg = fitting[0]
    changes: dict[str, object] = {"max_bad_fraction": 1.0}  # the store's bad images were accepted once
    if before is not None:
        changes["run"] = before.extract.run
    if plan is not None and "precision" in plan.teacher:
        changes["precision"] = plan.teacher["precision"]
    return cfg.model_copy(update=changes)


def _refuse_code(workspace: Workspace, root: Path, teacher: str, named: Iterable[str]) -> None:
    """A store may come from anybody; a Python file that it names is not run unless the user has named it.

    Raises:
        ConfigError: says which file.
    """
    is_ours = root.resolve() in [path.resolve() for path in workspace.stores()]
    if names_code(teacher) and not is_ours and teacher not in named:
        raise ConfigError(
            f"the teacher of {root} is made by the Python file {teacher}, which would be run; look at it, and give a "
            "command with TEACHER=<file> here first, if that is to be"
        )


def _is_made_with(cfg: ExtractConfig, plan: StorePlan) -> bool:
    """Whether settings are those of a store, as far as its plan tells."""
    with contextlib.suppress(DecantError):
        features = resolve_teacher(cfg).feature_spec()
        return (features, cfg.views, cfg.sampler.to_json()) == (plan.features, plan.views_per_image, plan.sampler)
    return False


def _find_weights(
    root: Path, cfg: ExtractConfig, result: StageResult, named: Iterable[WeightsSource | None]
) -> WeightsSource | None:
    """Where the weights are that a store was made with: the teacher's own source, or what commands gave instead.

    Args:
        named: by the last command.

    Raises:
        ConfigError: none of these is it any more.
    """
    spec, made_with = resolve_teacher(cfg), result.metrics.get("weights")
    for source in (None, "random", *named, Path(made_with) if made_with else None):
        with contextlib.suppress(InputError):
            if weights_identity(spec, source) == result.inputs["weights"]:
                return source
    what = "weights or code" if spec.code_digest else "weights"
    raise ConfigError(
        f"{root} was made with other {what}{f' ({made_with})' if made_with else ''} of teacher {cfg.teacher!r} than "
        "are there now; give the command that made it, with WEIGHTS=<file> (--weights), then `make repair` again"
    )


def find_images(workspace: Workspace, root: Path, plan: StorePlan | None) -> Path:
    """The index file of the images that a store was made from."""
    for path in _indexes(workspace):
        index = load_index(path)
        if plan and plan.images_fingerprint in (index.split("train").fingerprint, index.split("eval").fingerprint):
            return path
    raise ConfigError(f"no image list in {workspace.root / 'data'} is that of {root}; run `make extract DATA=...`")


def _indexes(workspace: Workspace) -> Iterator[Path]:
    """Index files, newest first."""
    yield from sorted((workspace.root / "data").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
