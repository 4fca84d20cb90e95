"""One of the processes that train a student together: python -m distill.worker JOB, started by a launcher that sets
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (torchrun, Ray Train, Slurm with torchrun)."""

import os
import sys
from pathlib import Path

from distill.job import OUTCOME_FILE, PROGRESS_FILE, STOP_FILE, Job, Outcome
from distill.parent import end_with_parent
from distill.relay import FileProgress, FileStop
from distill.session import distill
from storage.atomic import create_file, write_file
from storage.errors import DecantError
from storage.stage import Interrupted, Progress, SilentProgress, stop_on_signals


def work(job_path: Path) -> None:
    """Do this process's share of a job.

    Raises:
        SystemExit: something was wrong, and says so in the job's outcome; or in that of an earlier attempt.
    """
    job = Job.from_file(job_path, job_path.read_bytes())
    outcome_path = job.out_dir / OUTCOME_FILE
    if outcome_path.exists():  # this is another attempt, and nothing has changed
        sys.exit(1)
    is_first = os.environ.get("RANK", "0") == "0"
    progress: Progress = FileProgress(job.out_dir / PROGRESS_FILE) if is_first else SilentProgress()
    try:
        # whoever ends all processes of a machine tells this one, and torchrun tells it again: that is no second wish
        with stop_on_signals(FileStop(job.out_dir / STOP_FILE), second_ends=False) as stop:
            outcome = Outcome(metrics=distill(job, progress, stop))
    except Interrupted:
        outcome = Outcome(interrupted=True)
    except DecantError as error:  # whoever is first says it; a launcher ends the others
        create_file(outcome_path, Outcome(error=str(error), exit_code=error.exit_code).model_dump_json().encode())
        sys.exit(1)
    finally:
        if isinstance(progress, FileProgress):
            progress.close()
    if is_first:
        write_file(outcome_path, outcome.model_dump_json().encode())


if __name__ == "__main__":
    end_with_parent()
    work(Path(sys.argv[1]))
