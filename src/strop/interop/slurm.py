"""Batch scripts for Slurm: one task per device, saved and requeued near the time limit (sbatch(1), --signal)."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from strop.errors import RecipeError
from strop.interop.job import Job, Launched, quote_path, quote_words, write

WARNING_S = 120  # seconds before the time limit
WAIT_S = 120  # seconds that srun waits for other tasks after the first has ended; rank 0 ends last


def launch(job: Job, file: Path | None, *, time: str, force: bool) -> Launched:
    """Write a batch script. time: minutes, H:MM:SS or D-HH:MM:SS. Raises RecipeError, FolderError."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise RecipeError(f"--time {time}: not a Slurm time limit", fix="write 30 (minutes), 12:00:00 or 2-00:00:00")
    if 0 < _seconds(time) <= 2 * WARNING_S:  # it would save and be requeued forever; 0: no limit
        what = f"--time {time}: too short: the job saves {WARNING_S // 60} minutes before the limit"
        raise RecipeError(what, fix="give it 10 minutes or more")
    file = file or Path(f"{job.name}.slurm.sh")
    return write(job, file, script(job, time=time), f"sbatch {quote_path(file)}", force=force)


def _seconds(time: str) -> int:
    """Convert MINUTES, MINUTES:SECONDS, H:MM:SS, or D-H[:MM[:SS]] to seconds (sbatch(1), --time)."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def script(job: Job, *, time: str, python: str = sys.executable) -> str:
    """Return the text of the batch script. python: a path that exists on every node."""
    gpu_line = f"#SBATCH --gpus-per-node={job.devices}\n" if job.gpus else ""
    return f"""\
#!/bin/bash
# strop on {job.size}, written by `strop launch slurm`. Edit as needed.
# Your cluster may require more options, such as --partition, --account or --mem.
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node={job.devices}
{gpu_line}#SBATCH --cpus-per-task={job.cores}
#SBATCH --time={time}
# Signal this script {WARNING_S} s before the limit: the run is saved and the job is requeued.
#SBATCH --signal=B:TERM@{WARNING_S}
# After a node failure or preemption, Slurm restarts the job.
#SBATCH --requeue
# One log for all restarts.
#SBATCH --output={job.name}-%j.log
#SBATCH --open-mode=append

# This folder must exist on every node: recipe, data and run folder are relative to it.
cd -- {shlex.quote(str(job.folder))} || exit 2
python={shlex.quote(python)}

# Rendezvous on the first node. The port depends on the job id, so that two jobs can share a node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"

# One process per device; each reads its rank from Slurm's variables.
# The command is the same at every restart: an existing run is resumed.
# Since Slurm 22.05, srun does not inherit --cpus-per-task and may give a process one core.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait={WAIT_S} "$python" -m strop.cli \\
    {quote_words(job.words)} &
steps=$!

warned=
trap 'warned=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM # forward to every process; srun itself would kill them
wait "$steps"
code=$?
if [ -n "$warned" ]; then
    wait "$steps" # the first wait was interrupted by the signal
    code=$?
    if [ "$code" -ne 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
"""
