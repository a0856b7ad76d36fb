"""A batch script for Slurm: one task a device, and a job that goes on by itself after its time is up.

Slurm sends the batch shell a TERM two minutes before the limit (sbatch(1), --signal=B:). The script hands it on to
every process (scancel(1), --signal), all ranks stop, rank 0 saves, and the script puts the job back into the queue
(scontrol(1), requeue). After a node has failed, or another job took its place, Slurm does that by itself (--requeue).
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from strop.errors import RecipeError
from strop.interop.job import Job, Launched, shell, shown, write

WARNING_S = 120  # before the time is up
WAIT_S = 120  # for the other tasks, once the first has ended: rank 0 is the last, it writes


def launch(job: Job, file: Path | None, *, time: str, force: bool) -> Launched:
    """time: as sbatch takes it: minutes, H:MM:SS or D-HH:MM:SS. Raises RecipeError, FolderError."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise RecipeError(f"--time {time}: not a time of Slurm's", fix="write 30 (minutes), 12:00:00 or 2-00:00:00")
    if 0 < _seconds(time) <= 2 * WARNING_S:  # it would save, and be queued again, for ever; 0: no limit
        what = (
            f"--time {time}: too short to get anywhere: the job saves {WARNING_S // 60} minutes before its time is up"
        )
        raise RecipeError(what, fix="give it 10 minutes or more")
    file = file or Path(f"{job.name}.slurm.sh")
    return write(job, file, script(job, time=time), f"sbatch {shown(file)}", force=force)


def _seconds(time: str) -> int:
    """Of MINUTES, MINUTES:SECONDS or H:MM:SS; behind `D-` of H, H:MM or H:MM:SS (sbatch(1), --time)."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def script(job: Job, *, time: str, python: str = sys.executable) -> str:
    """The text of the batch script. python: must be the same path on every node."""
    cards = f"#SBATCH --gpus-per-node={job.devices}\n" if job.cards else ""
    return f"""\
#!/bin/bash
# strop on {job.size}, written by `strop launch slurm`. It is yours to edit.
# Your cluster may want more of these: --partition, --account, --mem.
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node={job.devices}
{cards}#SBATCH --cpus-per-task={job.cores}
#SBATCH --time={time}
# A warning {WARNING_S} s before the time is up, to this script alone: it saves, and queues the job again.
#SBATCH --signal=B:TERM@{WARNING_S}
# After a node has failed, or a job of higher priority took its place, Slurm starts the job again by itself.
#SBATCH --requeue
# One log for all starts.
#SBATCH --output={job.name}-%j.log
#SBATCH --open-mode=append

# This folder must be there on every node: recipe, data and run folder are found from it.
cd -- {shlex.quote(str(job.folder))} || exit 2
python={shlex.quote(python)}

# Where the processes meet: the first node. The port is the job's own, so that two jobs can share a node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"

# One process a device; each learns from Slurm which one it is.
# The command is the same at every start: a run that began is gone on with.
# From Slurm 22.05 on, srun may give a process one core unless it is told how many, too.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait={WAIT_S} "$python" -m strop.cli \\
    {shell(job.words)} &
steps=$!

warned=
trap 'warned=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM # to every process; srun itself would kill them
wait "$steps"
code=$?
if [ -n "$warned" ]; then
    wait "$steps" # the signal ended the first wait, not strop
    code=$?
    if [ "$code" -ne 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
"""
