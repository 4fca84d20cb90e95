"""The look at a few records that every extraction ends with, before its store is called finished."""

import secrets

import torch

from extract.audit import Audit, audit_store
from extract.filling import Filling
from extract.whiten import Whitener
from extract.worker import load_store_teacher
from storage.errors import DamagedError
from storage.reader import open_store
from storage.stage import Progress


def audit_filling(filling: Filling, progress: Progress) -> Audit | None:
    """Audit a store that is whole but for its manifest; None where it was finished before.

    Raises:
        DamagedError: it does not hold what its teacher says.
    """
    num_records = filling.cfg.run.audit_records
    if not num_records or (filling.root / "manifest.json").exists():
        return None
    teacher = load_store_teacher(filling.cfg, filling.plan)
    whitener = Whitener.of_store(filling.root, filling.plan, teacher.device)
    store = open_store(filling.root, allow_unfinished=True)
    audit = audit_store(
        store, teacher, whitener, num_records=num_records, seed=secrets.randbelow(2**32), images=filling.images
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    progress.say(str(audit))
    if not audit.is_good:
        raise DamagedError(
            f"{filling.root} is not finished: {audit}. Perhaps a worker has other versions of the libraries than this "
            "process; make them alike, delete the folder and extract it again"
        )
    return audit
