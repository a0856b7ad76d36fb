"""Tasks for SkyPilot, run as managed jobs: they continue on other machines, so local disks hold no run folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strop import __version__
from strop.errors import RecipeError
from strop.interop.job import (
    BlockText,
    Job,
    Launched,
    dump_with_comments,
    quote_path,
    quote_words,
    require_relative_out,
    write,
)

MOUNT, MAX_RESTARTS = "/strop", 3


@dataclass(frozen=True)
class Store:
    """Storage for the run folder: a bucket, created if needed, or an existing volume (`sky volumes ls`)."""

    bucket: str | None = None
    volume: str | None = None

    @property
    def mount(self) -> dict[str, Any]:
        if self.volume is not None:
            return {"volumes": {MOUNT: self.volume}}
        return {"file_mounts": {MOUNT: {"name": self.bucket, "mode": "MOUNT_CACHED"}}}


def launch(job: Job, file: Path | None, *, gpus: str | None, store: Store, spot: bool, force: bool) -> Launched:
    """Write a SkyPilot task. gpus: SkyPilot's name of the GPU (`sky show-gpus`)."""
    require_relative_out(job, "in the bucket or on the volume")
    if (store.bucket is None) == (store.volume is None):
        what = "--bucket, --volume: one of them is needed for the run folder"
        raise RecipeError(what, fix="give --bucket NAME or --volume NAME")
    if store.bucket is not None and job.nodes > 1:
        what = f"--bucket {store.bucket}: {job.nodes} nodes would see each other's files with a delay"
        raise RecipeError(what, fix="give --volume NAME, or one node with more --devices")
    if job.gpus and not gpus:
        raise RecipeError("--gpus: missing", fix="name the GPU, such as --gpus H100, or set model.device to cpu")
    if gpus and not job.gpus:
        raise RecipeError(f"--gpus {gpus}: the recipe uses the CPU", fix="remove it, or change model.device")
    if gpus and not re.fullmatch(r"[\w.-]+", gpus):
        what = f"--gpus {gpus}: not a GPU name"
        raise RecipeError(what, fix="give --gpus a name only, such as H100; --devices sets the number")
    if Path(job.recipe).is_absolute() or ".." in Path(job.recipe).parts:
        what = f"{job.recipe}: outside this folder, which SkyPilot syncs"
        raise RecipeError(what, fix="run the command in the recipe's folder")
    file = file or Path(f"{job.name}.sky.yaml")
    text = task(job, gpus=gpus, store=store, spot=spot)
    outside = tuple(name for name in job.needs if os.path.relpath(Path(name).expanduser()).startswith(".."))
    return write(job, file, text, f"sky jobs launch -n {job.name} {quote_path(file)}", force=force, needs=outside)


def task(job: Job, *, gpus: str | None, store: Store, spot: bool) -> str:
    """Return the text of the task."""
    inside = replace(job, out=f"{MOUNT}/{job.out}")
    kind = {"accelerators": f"{gpus}:{job.devices}"} if job.gpus else {"cpus": f"{job.devices * job.cores}+"}
    resources: dict[str, Any] = {**kind, "job_recovery": {"max_restarts_on_errors": MAX_RESTARTS}}
    if spot:
        resources["use_spot"] = True
    run = f"""\
# SkyPilot sets the number of nodes and this node's rank; torchrun starts one process per device.
export OMP_NUM_THREADS={job.cores}
torchrun \\
    --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" --nproc-per-node={job.devices} \\
    --master-addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port=29500 \\
    -m strop.cli \\
    {quote_words(inside.words)}
"""
    tree = {
        "name": job.name, "num_nodes": job.nodes, "resources": resources, "workdir": ".", **store.mount,
        "setup": BlockText(f"pip install strop=={__version__}\n"), "run": BlockText(run),
    }  # fmt: skip
    comments: dict[tuple[str, ...], str] = {
        ("name",): f"strop on {job.size}, written by `strop launch skypilot`. Edit as needed.",
        ("resources", "job_recovery"): "Lost machines are replaced; after an error the job is restarted up to this "
        "many times.",
        ("workdir",): "Recipe and data: this folder, except files excluded by .gitignore or .skyignore.",
        ("setup",): "Or install your own wheel.",
        ("run",): "The same at every restart: an existing run is resumed.",
    }
    text = "For the run folder, which outlives the machines."
    if store.volume is not None:
        comments["volumes",] = f"{text} Every node must be able to write to it."
    else:
        comments["file_mounts",] = f"{text} Checkpoints need rename, which MOUNT_CACHED supports."
    if spot:
        comments["resources", "use_spot"] = "Cheaper machines that may be preempted: the job continues on others."
    return dump_with_comments(tree, comments)
