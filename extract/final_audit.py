"""An audit by the teacher that a store was made with: of a few records before a store is called finished, or of more
whenever somebody asks."""

import secrets
from pathlib import Path

import torch

from extract.audit import Audit, audit_store
from extract.config import ExtractConfig
from extract.filling import Filling
from extract.whiten import Whitener
from extract.worker import load_store_teacher
from storage.errors import DamagedError
from storage.image_list import ImageList
from storage.reader import open_store
from storage.stage import Progress
from storage.store import FeatureReader


def audit_as_made(
    store: FeatureReader, root: Path, cfg: ExtractConfig, *, num_records: int, seed: int, images: ImageList | None
) -> Audit:
    """`audit_store` by the teacher and the whitening that the store in `root` was made with.

    Raises:
        ConfigError: that teacher is another one here.
        InputError, DamagedError: see `audit_store`.
    """
    teacher = load_store_teacher(cfg, store.plan)
    whitener = Whitener.of_store(root, store.plan, teacher.device)
    return audit_store(store, teacher, whitener, num_records=num_records, seed=seed, images=images)


def audit_filling(filling: Filling, progress: Progress) -> Audit | None:
    """Audit a store that is whole but for its manifest; None where it was finished before.

    Raises:
        DamagedError: it does not hold what its teacher says.
    """
    num_records = filling.cfg.run.audit_records
    if not num_records or (filling.root / "manifest.json").exists():
        return None
    store, seed = open_store(filling.root, allow_unfinished=True), secrets.randbelow(2**32)
    audit = audit_as_made(store, filling.root, filling.cfg, num_records=num_records, seed=seed, images=filling.images)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    progress.say(str(audit))
    if not audit.is_good:
        raise DamagedError(
            f"{filling.root} is not finished: {audit}. Perhaps a worker has other versions of the libraries than this "
            "process; make them alike, delete the folder and extract it again"
        )
    return audit
