"""A task for SkyPilot, to be run as a managed job: it goes on elsewhere when its machines are taken away.

SkyPilot gives each node SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES and SKYPILOT_NODE_RANK, and syncs the folder `workdir`.
The run folder is in a bucket or on a volume, because the machines' own disks go with them. Several nodes need a volume:
what one writes to a bucket the others see later.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strop import __version__
from strop.errors import RecipeError
from strop.interop.commented_yaml import Text, document
from strop.interop.job import Job, Launched, must_be_relative, shell, shown, write

KEPT, MAX_RESTARTS = "/strop", 3


@dataclass(frozen=True)
class Store:
    """Where the run folder is kept: a bucket, made where it is not there, or a volume that is (`sky volumes ls`)."""

    bucket: str | None = None
    volume: str | None = None

    @property
    def mount(self) -> dict[str, Any]:
        if self.volume is not None:
            return {"volumes": {KEPT: self.volume}}
        return {"file_mounts": {KEPT: {"name": self.bucket, "mode": "MOUNT_CACHED"}}}


def launch(job: Job, file: Path | None, *, gpus: str | None, store: Store, spot: bool, force: bool) -> Launched:
    """gpus: what SkyPilot calls the card (`sky show-gpus`). spot: machines that may be taken away, for less money.

    Raises RecipeError, FolderError.
    """
    must_be_relative(job, "in the bucket or on the volume")
    if (store.bucket is None) == (store.volume is None):
        raise RecipeError("--bucket, --volume: one of them keeps the run", fix="give --bucket NAME or --volume NAME")
    if store.bucket is not None and job.nodes > 1:
        what = f"--bucket {store.bucket}: {job.nodes} nodes would not see each other's files in time"
        raise RecipeError(what, fix="give --volume NAME, or one node with more --devices")
    if job.cards and not gpus:
        raise RecipeError("--gpus: which card?", fix="give its name, such as --gpus H100; or set model.device to cpu")
    if gpus and not job.cards:
        raise RecipeError(f"--gpus {gpus}: the recipe asks for no cards", fix="leave it out, or change model.device")
    if gpus and not re.fullmatch(r"[\w.-]+", gpus):
        what = f"--gpus {gpus}: not the name of one card"
        raise RecipeError(what, fix="give --gpus the name alone, such as H100; --devices says how many")
    if Path(job.recipe).is_absolute() or ".." in Path(job.recipe).parts:
        raise RecipeError(f"{job.recipe}: not in this folder, which SkyPilot syncs", fix="go to the recipe's folder")
    file = file or Path(f"{job.name}.sky.yaml")
    text = task(job, gpus=gpus, store=store, spot=spot)
    outside = tuple(name for name in job.needs if os.path.relpath(Path(name).expanduser()).startswith(".."))
    return write(job, file, text, f"sky jobs launch -n {job.name} {shown(file)}", force=force, needs=outside)


def task(job: Job, *, gpus: str | None, store: Store, spot: bool) -> str:
    """The text of the task."""
    inside = replace(job, out=f"{KEPT}/{job.out}")
    kind = {"accelerators": f"{gpus}:{job.devices}"} if job.cards else {"cpus": f"{job.devices * job.cores}+"}
    resources: dict[str, Any] = {**kind, "job_recovery": {"max_restarts_on_errors": MAX_RESTARTS}}
    if spot:
        resources["use_spot"] = True
    run = f"""\
# SkyPilot says how many nodes there are and which one this is; torchrun starts a process for each device.
export OMP_NUM_THREADS={job.cores}
torchrun \\
    --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" --nproc-per-node={job.devices} \\
    --master-addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port=29500 \\
    -m strop.cli \\
    {shell(inside.words)}
"""
    tree = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": resources,
        "workdir": ".",
        **store.mount,
        "setup": Text(f"pip install strop=={__version__}\n"),
        "run": Text(run),
    }
    comments: dict[tuple[str, ...], str] = {
        ("name",): f"strop on {job.size}, written by `strop launch skypilot`. It is yours to edit.",
        (
            "resources",
            "job_recovery",
        ): "Machines that are lost are replaced; after an error the job is tried again so often.",
        ("workdir",): "Recipe and data: this folder, without what .gitignore (or .skyignore) leaves out.",
        ("setup",): "Or the wheel that you built.",
        ("run",): "The same at every start: a run that began is gone on with.",
    }
    if store.volume is not None:
        comments["volumes",] = (
            "For the run folder, which outlives the machines. Every node must be able to write to it."
        )
    else:
        comments["file_mounts",] = "For the run folder, which outlives the machines. Saving renames: MOUNT_CACHED can."
    if spot:
        comments["resources", "use_spot"] = "Cheaper machines, which may be taken away: the job goes on on others."
    return document(tree, comments)
