"""Manifests for Kubernetes: the recipe as a ConfigMap, and a Kubeflow Trainer v2 TrainJob that runs torchrun."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from strop.errors import RecipeError
from strop.interop.job import BlockText, Job, Launched, dump_with_comments, quote_path, require_relative_out, write

VOLUME, RECIPES = "/work", "/etc/strop"
GRACE_S = 120  # seconds between TERM and KILL, for the last checkpoint
NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
LARGEST_RECIPE = 1 << 20  # bytes, the limit of a ConfigMap


def launch(job: Job, file: Path | None, *, image: str, claim: str, force: bool) -> Launched:
    """Write the manifests. image: contains strop. claim: the PersistentVolumeClaim for data and run folder."""
    require_relative_out(job, "on the volume")
    if not re.fullmatch(NAME, claim):
        fix = "give the claim's name, as `kubectl get pvc` has it"
        raise RecipeError(f"--claim {claim}: not a Kubernetes name", fix=fix)
    if not re.fullmatch(r"\S+", image):
        what = f"--image {image!r}: not a container image"
        raise RecipeError(what, fix="give its name, such as registry/team/strop:1")
    recipe = (job.folder / job.recipe).read_text(encoding="utf-8")
    if len(recipe.encode("utf-8")) > LARGEST_RECIPE:
        raise RecipeError(f"{job.recipe}: too large for a ConfigMap (1 MiB)", fix="put it on the volume")
    file = file or Path(f"{job.name}.trainjob.yaml")
    text = manifests(job, recipe, image=image, claim=claim)
    return write(job, file, text, f"kubectl apply -f {quote_path(file)}", force=force, needs=job.needs)


def manifests(job: Job, recipe: str, *, image: str, claim: str) -> str:
    """Return the text of both manifests."""
    settings = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": job.name},
        "data": {"recipe.yaml": BlockText(recipe)},
    }  # fmt: skip
    comments: dict[tuple[str, ...], str] = {
        ("apiVersion",): f"strop on {job.size}, written by `strop launch kubernetes`. Edit as needed.\n"
        "The recipe, unchanged; the job below reads it.",
    }
    documents = dump_with_comments(settings, comments), dump_with_comments(_train_job(job, image, claim), _COMMENTS)
    return "---\n".join(documents)


def _train_job(job: Job, image: str, claim: str) -> dict[str, Any]:
    kind = {"nvidia.com/gpu": job.devices} if job.gpus else {}
    resources = {"cpu": job.cores * job.devices, **kind}
    # Kubernetes expands $(NAME) in a container's args
    words = [word.replace("$", "$$") for word in replace(job, recipe=f"{RECIPES}/recipe.yaml").words]
    volumes: list[dict[str, Any]] = [
        {"name": "work", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "recipe", "configMap": {"name": job.name}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "work", "mountPath": VOLUME},
        {"name": "recipe", "mountPath": RECIPES, "readOnly": True},
    ]
    if job.gpus and job.devices > 1:  # a pod has 64 MiB by default; NCCL needs more between GPUs
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    pod = {
        "terminationGracePeriodSeconds": GRACE_S,
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }
    patch = {
        "template": {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]}}
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": job.name},
        "spec": {
            # sets PET_NNODES and others for torchrun, which restarts nothing, so that all pods count equal restarts
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": "torch-distributed",
            },
            "trainer": {
                "image": image, "numNodes": job.nodes, "numProcPerNode": job.devices,
                "resourcesPerNode": {"requests": resources, "limits": resources},
                "env": [{"name": "OMP_NUM_THREADS", "value": str(job.cores)}],
                "command": ["bash", "-c", f'cd {VOLUME} && exec "$@"', "strop"],
                "args": ["torchrun", "-m", "strop.cli", *words],
            },
            "runtimePatches": [{"manager": "strop.launch/manager", "trainingRuntimeSpec": patch}],
        },
    }  # fmt: skip


_COMMENTS = {
    ("spec", "runtimeRef"): "Installed with Kubeflow Trainer: sets up the pods for torchrun.",
    ("spec", "trainer", "image"): "An image with strop, and PyTorch for your devices.",
    ("spec", "trainer", "numProcPerNode"): "One process per device.",
    ("spec", "trainer", "command"): "Relative paths in the recipe (data, run folder) start at the volume.",
    ("spec", "trainer", "args"): "The same at every restart: an existing run is resumed.",
    ("spec", "runtimePatches"): "The volume, the recipe and shared memory for every pod, and time for a last "
    "checkpoint.\n"
    "All pods write to the volume: with several nodes its access mode must be ReadWriteMany.",
}  # fmt: skip
