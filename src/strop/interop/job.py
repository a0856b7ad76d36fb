"""Write job files for Slurm, Ray Train, Kubernetes and SkyPilot, as plain text without the systems' SDKs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from strop import __version__
from strop.config.load import resolve
from strop.config.schema import Recipe
from strop.errors import DeviceError, FolderError, RecipeError
from strop.objectives.table import check_devices
from strop.runs.folder import next_numbered, write_atomic

MAX_NAME_LENGTH = 40  # Kubernetes allows 63 characters and appends suffixes such as -node-0-0-abcde


@dataclass(frozen=True)
class Job:
    """A recipe to train on one or more nodes."""

    name: str  # letters, digits and dashes
    recipe: str  # path relative to `folder`
    folder: Path
    out: str  # run folder, relative to `folder`
    nodes: int
    devices: int  # per node
    cores: int  # per device
    gpus: bool  # devices are GPUs, not CPU processes
    needs: tuple[str, ...]  # local files that the recipe refers to

    @property
    def arguments(self) -> list[str]:
        """Return the arguments of `python -m strop.cli`; they are the same for every rank and restart."""
        return ["train", self.recipe, f"--out={self.out}", "--resume"]

    @property
    def size(self) -> str:
        nodes = f"{self.nodes} node{'s' * (self.nodes != 1)}"
        kind, plural = ("GPU", "GPUs") if self.gpus else ("CPU process", "CPU processes")
        return f"{nodes} with {self.devices} {kind if self.devices == 1 else plural} each"


@dataclass(frozen=True)
class JobFile:
    """A job file that was written. submit: the command that submits it. needs: files to copy to the cluster."""

    job: Job
    file: Path
    submit: str
    needs: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        job = self.job
        return {
            "file": str(self.file), "submit": self.submit, "nodes": job.nodes, "devices": job.devices, "run": job.out,
            "needs": list(self.needs),
        }  # fmt: skip


def make_job(recipe: Path, *, nodes: int, devices: int, cores: int, out: str | None) -> Job:
    """Validate a recipe and choose its run folder now, so that a restarted job resumes the same run."""
    resolved = resolve(recipe).recipe
    check_devices(resolved.train, nodes * devices)
    device = resolved.model.device
    if device == "mps":
        raise DeviceError("model.device mps: jobs run on CUDA GPUs or CPUs", fix="set it to cuda, cpu or auto")
    if device.startswith("cuda:") and nodes * devices > 1:
        raise DeviceError(f"model.device {device}: names a single GPU", fix="set model.device to cuda")
    path = os.path.relpath(recipe)
    folder = out or resolved.out or str(next_numbered(Path("runs"), _make_name(recipe.stem)))
    return Job(
        name=_make_name(Path(folder).name), recipe=f"./{path}" if path.startswith("-") else path, folder=Path.cwd(),
        out=folder, nodes=nodes, devices=devices, cores=cores, gpus=device != "cpu", needs=_find_local_files(resolved),
    )  # fmt: skip


def _write(job: Job, file: Path, text: str, submit: str, *, force: bool, needs: tuple[str, ...] = ()) -> JobFile:
    """Write a job file. Raises FolderError if it exists or is a folder, RecipeError for a path that is not UTF-8."""
    if file.is_dir():
        raise FolderError(f"{file}: is a folder", fix="give --file the name of a file")
    if file.exists() and not force:
        raise FolderError(f"{file}: already exists", fix="give --file another name, or --force to replace it")
    if not file.parent.is_dir():
        raise FolderError(f"{file.parent}: no such folder", fix="create it, or give --file another name")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RecipeError(f"{job.folder / job.recipe!r}: not a name in UTF-8", fix="rename the file") from None
    try:
        write_atomic(file, text)
    except OSError as error:
        raise FolderError(f"{file}: cannot be written: {error.strerror}", fix="give --file another name") from None
    return JobFile(job, file, submit, needs)


def _quote_path(path: Path) -> str:
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def _quote_arguments(arguments: list[str]) -> str:
    """Quote the arguments of a shell command, one per line."""
    return " \\\n    ".join(map(shlex.quote, arguments))


def _require_relative_out(job: Job, location: str) -> None:
    """Raise RecipeError if the run folder is not in the job's folder. location: where it is stored, for the message."""
    # ~ would be another home folder on the cluster
    if Path(job.out).expanduser().is_absolute() or ".." in Path(job.out).parts:
        raise RecipeError(f"--out {job.out}: the run folder is {location}", fix=f"set --out runs/{job.name}")


def _make_name(text: str) -> str:
    """Return a job name made of lowercase letters, digits and dashes that begins with a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:MAX_NAME_LENGTH].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".rstrip("-")


def _find_local_files(recipe: Recipe) -> tuple[str, ...]:
    """Return the local files, folders and glob patterns that the recipe refers to."""
    data, model, rewards = recipe.data, recipe.model, recipe.train.rewards
    names: list[str | None] = [model.name, model.adapter, data.template]
    names.append((recipe.train.environment or "").rpartition(":")[0])
    for sources in (data.train, data.eval):
        names += [sources] if isinstance(sources, str) else sources or []
    for reward in rewards.split(",") if isinstance(rewards, str) else rewards or []:
        names.append(reward.strip().rpartition(":")[0])
    paths = {name: os.path.expanduser(name) for name in names if name}
    return tuple(name for name, path in paths.items() if os.path.exists(path) or glob(path, recursive=True))


class BlockText(str):
    """Text that YAML writes as a literal block where possible."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)  # indent lists below their key


def _represent_str(dumper: _Dumper, value: str) -> Any:
    # PyYAML preserves these line breaks of YAML 1.1 only in double quotes
    needs_quotes = any(line_break in value for line_break in "\x85\u2028\u2029")
    style = '"' if needs_quotes else "|" if isinstance(value, BlockText) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style=style)


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(BlockText, _represent_str)


def dump_with_comments(tree: Mapping[str, Any], comments: Mapping[tuple[str, ...], str]) -> str:
    """Return a YAML document with comments above keys. comments: by path, for example ("spec", "env", "0", "name")."""
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    lines = text.removesuffix("\n").split("\n")
    positions = dict(_key_positions(yaml.compose(text, Loader=yaml.SafeLoader), ()))
    for path in sorted(comments, key=lambda path: positions[path], reverse=True):
        line, column = positions[path]
        lines[line:line] = [f"{' ' * column}# {comment}" for comment in comments[path].splitlines()]
    return "\n".join(lines) + "\n"


def _key_positions(node: Any, path: tuple[str, ...]) -> Any:
    """Yield (path, (line, column)) for every key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            key_path = (*path, str(key.value))
            yield key_path, (key.start_mark.line, key.start_mark.column)
            yield from _key_positions(value, key_path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _key_positions(value, (*path, str(i)))


# --- Slurm --------------------------------------------------------------------------------------------------------

SLURM_WARNING_S = 120  # time between the signal that saves the run and the time limit (sbatch --signal)
SLURM_WAIT_S = 120  # time that other tasks have to end after the first one (srun --wait); rank 0 ends last


def write_slurm_job(job: Job, file: Path | None, *, time: str, force: bool) -> JobFile:
    """Write a batch script. time: minutes, H:MM:SS or D-HH:MM:SS. Raises RecipeError, FolderError."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise RecipeError(f"--time {time}: not a Slurm time limit", fix="write 30 (minutes), 12:00:00 or 2-00:00:00")
    # a job that is too short would be saved and requeued forever; 0 means no limit
    if 0 < _slurm_seconds(time) <= 2 * SLURM_WARNING_S:
        what = f"--time {time}: too short: the job saves {SLURM_WARNING_S // 60} minutes before the limit"
        raise RecipeError(what, fix="give it 10 minutes or more")
    file = file or Path(f"{job.name}.slurm.sh")
    return _write(job, file, slurm_script(job, time=time), f"sbatch {_quote_path(file)}", force=force)


def _slurm_seconds(time: str) -> int:
    """Convert MINUTES, MINUTES:SECONDS, H:MM:SS, or D-H[:MM[:SS]] to seconds (sbatch(1), --time)."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def slurm_script(job: Job, *, time: str, python: str = sys.executable) -> str:
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
# Signal this script {SLURM_WARNING_S} s before the limit: the run is saved and the job is requeued.
#SBATCH --signal=B:TERM@{SLURM_WARNING_S}
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
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait={SLURM_WAIT_S} "$python" -m strop.cli \\
    {_quote_arguments(job.arguments)} &
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


# --- Ray Train ----------------------------------------------------------------------------------------------------

RAY_MAX_FAILURES = 3


def write_ray_job(job: Job, file: Path | None, *, force: bool) -> JobFile:
    """Write a Python file for Ray. Raises RecipeError, FolderError."""
    file = file or Path(f"{job.name}.ray.py")
    submit = f"ray job submit -- python {_quote_for_two_shells(file.absolute())}"
    return _write(job, file, ray_script(job), submit, force=force)


def _quote_for_two_shells(path: Path) -> str:
    """Quote a path for the user's shell, and for the cluster's, where Ray adds double quotes if there are spaces."""
    special_characters = r"[$`\\]" if " " in str(path) else r'[^\w@%+=:,./"-]'
    return shlex.quote(re.sub(special_characters, r"\\\g<0>", str(path)))


def ray_script(job: Job) -> str:
    """Return the text of the Python file. Workers run strop as a child process, because threads receive no signals."""
    resources = {"CPU": job.cores, **({"GPU": 1} if job.gpus else {})}
    arguments = ",\n    ".join(repr(argument) for argument in job.arguments)
    return f'''\
"""strop on {job.size}, written by `strop launch ray`. Edit as needed."""

import os
import shutil
import socket
import subprocess
import sys

import ray.train
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

# This folder must exist on every node: recipe, data and run folder are relative to it.
FOLDER = {str(job.folder)!r}
NODES, DEVICES, CORES = {job.nodes}, {job.devices}, {job.cores}  # devices per node, cores per device

# The command is the same at every restart: an existing run is resumed.
TRAIN = [
    {arguments},
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def work() -> None:
    """Run strop on one worker, as a child process that joins the other ranks and ends with this worker."""
    context = ray.train.get_context()
    port = [free_port() if context.get_world_rank() == 0 else 0]
    torch.distributed.broadcast_object_list(port)
    ranks = {{
        "RANK": context.get_world_rank(), "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(), "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "MASTER_PORT": port[0], "OMP_NUM_THREADS": CORES,
    }}
    environment = {{**os.environ, **{{name: str(value) for name, value in ranks.items()}}}}
    command = [sys.executable, "-m", "strop.cli", *TRAIN]
    if shutil.which("setpriv"):  # Linux: strop is killed with its worker
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    done = subprocess.run(command, cwd=FOLDER, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"strop ended with {{done.returncode}} on rank {{context.get_world_rank()}}; see above")


if __name__ == "__main__":
    TorchTrainer(
        work,
        # Ray's process group provides MASTER_ADDR; the workers use it only to agree on a port.
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=NODES * DEVICES,
            use_gpu={job.gpus},
            resources_per_worker={resources},
            placement_strategy={"STRICT_PACK" if job.nodes == 1 else "SPREAD"!r},
        ),
        # If a worker or node is lost, all restart from the last checkpoint.
        run_config=RunConfig(
            storage_path=os.path.join(FOLDER, ".ray"),
            failure_config=FailureConfig(max_failures={RAY_MAX_FAILURES}),
        ),
    ).fit()
'''


# --- Kubernetes ---------------------------------------------------------------------------------------------------

VOLUME_PATH, RECIPE_PATH = "/work", "/etc/strop"  # where the volume and the ConfigMap are mounted
GRACE_S = 120  # time between TERM and KILL, for the last checkpoint
CLAIM_NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
MAX_RECIPE_BYTES = 1 << 20  # limit of a ConfigMap


def write_kubernetes_job(job: Job, file: Path | None, *, image: str, claim: str, force: bool) -> JobFile:
    """Write a ConfigMap with the recipe, and a Kubeflow Trainer v2 TrainJob. Raises RecipeError, FolderError.

    image: container image with strop. claim: PersistentVolumeClaim for data and run folder.
    """
    _require_relative_out(job, "on the volume")
    if not re.fullmatch(CLAIM_NAME, claim):
        raise RecipeError(f"--claim {claim}: not a Kubernetes name", fix="give a name from `kubectl get pvc`")
    if not re.fullmatch(r"\S+", image):
        raise RecipeError(f"--image {image!r}: not a container image", fix="use a name such as team/strop:1")
    recipe = (job.folder / job.recipe).read_text(encoding="utf-8")
    if len(recipe.encode("utf-8")) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{job.recipe}: too large for a ConfigMap (1 MiB)", fix="put it on the volume")
    file = file or Path(f"{job.name}.trainjob.yaml")
    text = kubernetes_manifests(job, recipe, image=image, claim=claim)
    return _write(job, file, text, f"kubectl apply -f {_quote_path(file)}", force=force, needs=job.needs)


def kubernetes_manifests(job: Job, recipe: str, *, image: str, claim: str) -> str:
    config_map = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": job.name},
        "data": {"recipe.yaml": BlockText(recipe)},
    }  # fmt: skip
    header = f"strop on {job.size}, written by `strop launch kubernetes`. Edit as needed.\n"
    header += "The recipe, unchanged; the job below reads it."
    train_job = _train_job(job, image, claim)
    return "---\n".join([
        dump_with_comments(config_map, {("apiVersion",): header}), dump_with_comments(train_job, _TRAIN_JOB_COMMENTS),
    ])  # fmt: skip


def _train_job(job: Job, image: str, claim: str) -> dict[str, Any]:
    resources = {"cpu": job.cores * job.devices, **({"nvidia.com/gpu": job.devices} if job.gpus else {})}
    # Kubernetes expands $(NAME) in a container's args
    mounted = replace(job, recipe=f"{RECIPE_PATH}/recipe.yaml")
    arguments = [argument.replace("$", "$$") for argument in mounted.arguments]
    volumes: list[dict[str, Any]] = [
        {"name": "work", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "recipe", "configMap": {"name": job.name}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "work", "mountPath": VOLUME_PATH}, {"name": "recipe", "mountPath": RECIPE_PATH, "readOnly": True},
    ]  # fmt: skip
    if job.gpus and job.devices > 1:  # a pod has 64 MiB by default; NCCL needs more between GPUs
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    pod = {
        "terminationGracePeriodSeconds": GRACE_S, "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }  # fmt: skip
    patch = {
        "template": {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]}}
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": job.name},
        "spec": {
            # sets PET_NNODES and other variables for torchrun, without restarts by torchrun itself: if one pod
            # restarted its processes, its restart count would differ from that of the other pods
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": "torch-distributed",
            },
            "trainer": {
                "image": image, "numNodes": job.nodes, "numProcPerNode": job.devices,
                "resourcesPerNode": {"requests": resources, "limits": resources},
                "env": [{"name": "OMP_NUM_THREADS", "value": str(job.cores)}],
                "command": ["bash", "-c", f'cd {VOLUME_PATH} && exec "$@"', "strop"],
                "args": ["torchrun", "-m", "strop.cli", *arguments],
            },
            "runtimePatches": [{"manager": "strop.launch/manager", "trainingRuntimeSpec": patch}],
        },
    }  # fmt: skip


_TRAIN_JOB_COMMENTS = {
    ("spec", "runtimeRef"): "Installed with Kubeflow Trainer: sets up the pods for torchrun.",
    ("spec", "trainer", "image"): "An image with strop, and PyTorch for your devices.",
    ("spec", "trainer", "numProcPerNode"): "One process per device.",
    ("spec", "trainer", "command"): "Relative paths in the recipe (data, run folder) start at the volume.",
    ("spec", "trainer", "args"): "The same at every restart: an existing run is resumed.",
    ("spec", "runtimePatches"): "The volume, the recipe and shared memory for every pod, and time for a last "
    "checkpoint.\n"
    "All pods write to the volume: with several nodes its access mode must be ReadWriteMany.",
}  # fmt: skip


# --- SkyPilot -----------------------------------------------------------------------------------------------------

MOUNT_PATH, MAX_RESTARTS = "/strop", 3


def write_skypilot_job(
    job: Job, file: Path | None, *, gpus: str | None, bucket: str | None, volume: str | None, spot: bool, force: bool
) -> JobFile:
    """Write a task for SkyPilot's managed jobs. Raises RecipeError, FolderError.

    gpus: SkyPilot's name of the GPU (`sky show-gpus`). bucket, volume: storage of the run folder; exactly one is
    needed, because the job may continue on another machine.
    """
    _require_relative_out(job, "in the bucket or on the volume")
    if (bucket is None) == (volume is None):
        raise RecipeError("--bucket, --volume: give one of them for the run folder", fix="add --bucket NAME")
    if bucket is not None and job.nodes > 1:
        what = f"--bucket {bucket}: {job.nodes} nodes would see each other's files with a delay"
        raise RecipeError(what, fix="give --volume NAME, or one node with more --devices")
    if job.gpus and not gpus:
        raise RecipeError("--gpus: missing", fix="name the GPU, such as --gpus H100, or set model.device to cpu")
    if gpus and not job.gpus:
        raise RecipeError(f"--gpus {gpus}: the recipe uses the CPU", fix="remove it, or change model.device")
    if gpus and not re.fullmatch(r"[\w.-]+", gpus):
        raise RecipeError(f"--gpus {gpus}: not a GPU name", fix="use a name such as H100; --devices is the number")
    if Path(job.recipe).is_absolute() or ".." in Path(job.recipe).parts:
        raise RecipeError(f"{job.recipe}: not in this folder, which SkyPilot copies", fix="run this in its folder")
    file = file or Path(f"{job.name}.sky.yaml")
    text = skypilot_task(job, gpus=gpus, bucket=bucket, volume=volume, spot=spot)
    # SkyPilot copies the working folder
    needs = tuple(name for name in job.needs if os.path.relpath(Path(name).expanduser()).startswith(".."))
    return _write(job, file, text, f"sky jobs launch -n {job.name} {_quote_path(file)}", force=force, needs=needs)


def skypilot_task(
    job: Job, *, gpus: str | None, bucket: str | None = None, volume: str | None = None, spot: bool = False
) -> str:
    devices = {"accelerators": f"{gpus}:{job.devices}"} if job.gpus else {"cpus": f"{job.devices * job.cores}+"}
    resources: dict[str, Any] = {**devices, "job_recovery": {"max_restarts_on_errors": MAX_RESTARTS}}
    if spot:
        resources["use_spot"] = True
    run = f"""\
# SkyPilot sets the number of nodes and this node's rank; torchrun starts one process per device.
export OMP_NUM_THREADS={job.cores}
torchrun \\
    --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" --nproc-per-node={job.devices} \\
    --master-addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port=29500 \\
    -m strop.cli \\
    {_quote_arguments(replace(job, out=f"{MOUNT_PATH}/{job.out}").arguments)}
"""
    file_mount = {MOUNT_PATH: {"name": bucket, "mode": "MOUNT_CACHED"}}
    mount = {"volumes": {MOUNT_PATH: volume}} if volume is not None else {"file_mounts": file_mount}
    tree = {
        "name": job.name, "num_nodes": job.nodes, "resources": resources, "workdir": ".", **mount,
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
    text = "The run folder is stored here, because the machines may be replaced."
    if volume is not None:
        comments["volumes",] = f"{text} Every node must be able to write to it."
    else:
        comments["file_mounts",] = f"{text} Checkpoints need rename, which MOUNT_CACHED supports."
    if spot:
        comments["resources", "use_spot"] = "Cheaper machines that may be preempted: the job continues on others."
    return dump_with_comments(tree, comments)
