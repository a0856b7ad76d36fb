"""Manifests for Kubernetes: the recipe as a ConfigMap, and a TrainJob of Kubeflow Trainer v2 that runs torchrun.

The runtime `torch-distributed`, which Kubeflow Trainer installs, gives each pod PET_NNODES, PET_NPROC_PER_NODE,
PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT; torchrun reads them as its own options. A pod that fails is started
again by Kubernetes; torchrun itself starts nothing again, so that all pods count their starts alike.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from strop.errors import RecipeError
from strop.interop.commented_yaml import Text, document
from strop.interop.job import Job, Launched, must_be_relative, shown, write

VOLUME, RECIPES = "/work", "/etc/strop"
GRACE_S = 120  # between TERM and KILL, for the last checkpoint
NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
LARGEST_RECIPE = 1 << 20  # bytes of a ConfigMap


def launch(job: Job, file: Path | None, *, image: str, claim: str, force: bool) -> Launched:
    """image: a container image with strop in it. claim: the PersistentVolumeClaim with the data, for the run folder.

    Raises RecipeError, FolderError.
    """
    must_be_relative(job, "on the volume")
    if not re.fullmatch(NAME, claim):
        fix = "give the claim's name, as `kubectl get pvc` has it"
        raise RecipeError(f"--claim {claim}: not a name of Kubernetes'", fix=fix)
    if not re.fullmatch(r"\S+", image):
        raise RecipeError(
            f"--image {image!r}: not a container image", fix="give its name, such as registry/team/strop:1"
        )
    recipe = (job.folder / job.recipe).read_text(encoding="utf-8")
    if len(recipe.encode("utf-8")) > LARGEST_RECIPE:
        raise RecipeError(f"{job.recipe}: larger than a ConfigMap may be (1 MiB)", fix="put it on the volume")
    file = file or Path(f"{job.name}.trainjob.yaml")
    text = manifests(job, recipe, image=image, claim=claim)
    return write(job, file, text, f"kubectl apply -f {shown(file)}", force=force, needs=job.needs)


def manifests(job: Job, recipe: str, *, image: str, claim: str) -> str:
    """The text of both manifests."""
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name},
        "data": {"recipe.yaml": Text(recipe)},
    }
    said: dict[tuple[str, ...], str] = {
        ("apiVersion",): f"strop on {job.size}, written by `strop launch kubernetes`. It is yours to edit.\n"
        "The recipe, as it was; the job below reads it.",
    }
    return document(settings, said) + "---\n" + document(_train_job(job, image, claim), _COMMENTS)


def _train_job(job: Job, image: str, claim: str) -> dict[str, Any]:
    kind = {"nvidia.com/gpu": job.devices} if job.cards else {}
    resources = {"cpu": job.cores * job.devices, **kind}
    inside = replace(job, recipe=f"{RECIPES}/recipe.yaml")
    volumes: list[dict[str, Any]] = [
        {"name": "work", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "recipe", "configMap": {"name": job.name}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "work", "mountPath": VOLUME},
        {"name": "recipe", "mountPath": RECIPES, "readOnly": True},
    ]
    if job.cards and job.devices > 1:  # a pod has 64 MiB of it; NCCL's buffers between cards want more
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
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": "torch-distributed",
            },
            "trainer": {
                "image": image,
                "numNodes": job.nodes,
                "numProcPerNode": job.devices,
                "resourcesPerNode": {"requests": resources, "limits": resources},
                "env": [{"name": "OMP_NUM_THREADS", "value": str(job.cores)}],
                "command": ["bash", "-c", f'cd {VOLUME} && exec "$@"', "strop"],
                "args": ["torchrun", "-m", "strop.cli", *(_literal(word) for word in inside.words)],
            },
            "runtimePatches": [{"manager": "strop.launch/manager", "trainingRuntimeSpec": patch}],
        },
    }


_COMMENTS = {
    ("spec", "runtimeRef"): "Comes with Kubeflow Trainer: pods that find each other, ready for torchrun.",
    ("spec", "trainer", "image"): "An image with strop, and PyTorch for your devices.",
    ("spec", "trainer", "numProcPerNode"): "One process a device.",
    ("spec", "trainer", "command"): "Recipe paths (data, run folder) are found from the volume.",
    ("spec", "trainer", "args"): "The same at every start: a run that began is gone on with.",
    ("spec", "runtimePatches"): "The volume, the recipe, and what the cards share, in every pod; and time for a last "
    "checkpoint.\n"
    "All pods write to the volume: with several nodes its access mode must be ReadWriteMany.",
}  # fmt: skip


def _literal(word: str) -> str:
    """Kubernetes puts variables into a container's args: $(NAME). $$ is a dollar."""
    return word.replace("$", "$$")
