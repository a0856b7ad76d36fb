"""Content of job files with any file name, and jobs that are refused before a file is written."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.interop import job as job_files
from strop.interop.job import BlockText, Job, dump_with_comments, make_job
from tests.support.runs import run

SYSTEMS = {
    "slurm": [],
    "ray": [],
    "kubernetes": ["--image", "example.org/strop:1", "--claim", "disk"],
    "skypilot": ["--volume", "disk"],
}
# Valid file names, and what a job file without quoting would make of them.
HOSTILE = [
    "two words", "it's", 'say "no"', "$(touch planted)", "`touch planted`", "$HOME", "a;touch planted", "-rf",
    "line\nbreak", "#SBATCH --nodes=9", "back\\slash", "${x}", "{name}", "$(POD_IP)", "$$", "*", "ünïcode", "!!", "%j",
    "'''", '"""', "a: b", "- a", "&x", "tab\tbed", "\x07bell",
]  # fmt: skip
LETTERS = st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"])
NAMES = st.text(LETTERS, min_size=1, max_size=20).filter(lambda name: name not in (".", ".."))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with a recipe for CPUs and its rows."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n", encoding="utf-8")
    write_recipe(Path("recipe.yaml"))
    return tmp_path


def write_recipe(file: Path, device: str = "cpu") -> Path:
    file.write_text(
        f"# mine: $(x)\nmodel: {{name: demo, device: '{device}'}}\ndata: {{train: rows.jsonl}}\n", encoding="utf-8"
    )
    return file


def job(name: str = "x", **changes: Any) -> Job:
    plain = Job("x", f"{name}/{name}.yaml", Path(f"/{name}"), f"runs/{name}", 2, 3, 4, False, ())
    return replace(plain, **changes)


@pytest.mark.parametrize("system", SYSTEMS)
def test_job_file_is_not_overwritten_without_force(
    system: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["launch", system, "recipe.yaml", "--nodes", "2", "--devices", "3", *SYSTEMS[system]]
    code, out, _ = run(*words, "--json", capsys=capsys)
    report = json.loads(out)
    assert (code, report["nodes"], report["devices"], report["run"]) == (0, 2, 3, "runs/recipe-1")
    file = Path(report["file"])
    text = file.read_text(encoding="utf-8")
    assert file.name in report["submit"]
    assert "2 nodes with 3 CPU processes each" in text
    file.write_text("edited by hand", encoding="utf-8")
    code, _, output = run(*words, capsys=capsys)
    assert code == 2 and "--force" in output
    assert file.read_text(encoding="utf-8") == "edited by hand"
    assert run(*words, "--force", capsys=capsys)[0] == 0
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["slurm", "no.yaml"], "no such recipe"),
        (["slurm", "bad.yaml"], "unknown key train.epoch"),
        (["slurm", "recipe.yaml", "--time", "1h; x"], "--time"),
        (["slurm", "recipe.yaml", "--time", "4"], "too short"),
        (["slurm", "recipe.yaml", "--time", "3:30"], "too short"),
        (["slurm", "recipe.yaml", "--time", "0-0:04"], "too short"),
        (["slurm", "recipe.yaml", "--file", "nowhere/x.sh"], "no such folder"),
        (["slurm", "recipe.yaml", "--file", ".", "--force"], "is a folder"),
        (["slurm", "mps.yaml"], "model.device"),
        (["ray", "second.yaml", "--devices", "2"], "model.device"),
        (["slurm", "rewards.yaml", "--nodes", "2"], "grpo"),
        (["skypilot", "auto.yaml", "--volume", "v"], "--gpus"),
        (["skypilot", "auto.yaml", "--volume", "v", "--gpus", "H100:8"], "--gpus"),
        (["skypilot", "auto.yaml", "--volume", "v", "--gpus", "H100, A100"], "--gpus"),
        (["skypilot", "recipe.yaml", "--volume", "v", "--gpus", "H100"], "--gpus"),
        (["skypilot", "recipe.yaml"], "--bucket"),
        (["skypilot", "recipe.yaml", "--bucket", "b", "--nodes", "2"], "--volume"),
        (["skypilot", "../recipe.yaml", "--bucket", "b"], "../recipe.yaml"),
        (["kubernetes", "recipe.yaml", "--image", "i", "--claim", "c", "--out", "/runs/x"], "on the volume"),
        (["kubernetes", "recipe.yaml", "--image", "i", "--claim", "c", "--out", "~/runs/x"], "on the volume"),
        (["skypilot", "recipe.yaml", "--bucket", "b", "--out", "~/runs/x"], "in the bucket"),
        (["kubernetes", "recipe.yaml", "--image", "i", "--claim", "A_B c"], "--claim"),
        (["kubernetes", "recipe.yaml", "--image", "", "--claim", "c"], "--image"),
    ],
)
def test_invalid_job_is_refused_without_writing(
    words: list[str], output: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.yaml").write_text("model: {name: demo}\ndata: {train: a}\ntrain: {epoch: 1}\n", encoding="utf-8")
    rewards = "model: {name: demo}\ndata: {train: a}\ntrain: {objective: grpo, rewards: 'r.py:own'}\n"
    Path("rewards.yaml").write_text(rewards, encoding="utf-8")
    for name, device in (("mps", "mps"), ("second", "cuda:1"), ("auto", "auto")):
        write_recipe(Path(f"{name}.yaml"), device)
    write_recipe(folder.parent / "recipe.yaml")
    before = set(folder.iterdir())
    code, _, text = run("launch", *words, capsys=capsys)
    assert code == 2 and output in text.replace("\n", " ")
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("time", ["5", "0", "4:01", "1:00:00", "0-1", "0-00:05", "0-00:04:01"])
def test_usable_slurm_times_are_accepted(time: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("launch", "slurm", "recipe.yaml", "--time", time, capsys=capsys)[0] == 0


def test_needed_files_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run("launch", "kubernetes", "recipe.yaml", *SYSTEMS["kubernetes"], "--json", capsys=capsys)[1])
    assert report["needs"] == ["rows.jsonl"]
    assert json.loads(run("launch", "slurm", "recipe.yaml", "--json", capsys=capsys)[1])["needs"] == []
    Path("own.py").write_text("def right(answer, gold):\n    return 1.0\n", encoding="utf-8")
    rewards = (
        "model: {name: demo}\ndata: {train: '*.jsonl'}\ntrain: {objective: grpo, rewards: ['own.py:right=2', exact]}"
    )
    Path("rewards.yaml").write_text(rewards, encoding="utf-8")
    report = json.loads(run("launch", "kubernetes", "rewards.yaml", *SYSTEMS["kubernetes"], "--json", capsys=capsys)[1])
    assert report["needs"] == ["*.jsonl", "own.py"]


def pods(*jobs: Job) -> Iterator[Any]:
    """Yield the pod that each job patches, for Kubernetes."""
    for one in jobs:
        train_job = list(yaml.safe_load_all(job_files.kubernetes_manifests(one, "", image="i", claim="c")))[1]
        [patch] = train_job["spec"]["runtimePatches"]
        [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod = node["template"]["spec"]["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        yield pod


def test_gpus_are_requested() -> None:
    with_cards = job(gpus=True)
    assert "#SBATCH --gpus-per-node=3\n" in job_files.slurm_script(with_cards, time="1")
    assert "use_gpu=True" in job_files.ray_script(with_cards) and "'GPU': 1" in job_files.ray_script(with_cards)
    train_job = list(yaml.safe_load_all(job_files.kubernetes_manifests(with_cards, "", image="i", claim="c")))[1]
    assert train_job["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"cpu": 12, "nvidia.com/gpu": 3}
    volumes = [str(of_pod["volumes"]) for of_pod in pods(with_cards, job(gpus=True, devices=1), job())]
    assert ["'medium': 'Memory'" in text for text in volumes] == [True, False, False]  # shared memory of the GPUs
    task = yaml.safe_load(job_files.skypilot_task(with_cards, gpus="H100", bucket="b", spot=True))
    assert task["resources"]["accelerators"] == "H100:3" and task["resources"]["use_spot"] is True
    assert "gpu" not in job_files.slurm_script(job(), time="1")


@pytest.mark.parametrize("name", HOSTILE)
def test_job_words_find_the_recipe(name: str, folder: Path) -> None:
    """The recipe's file name is passed on unchanged to the words of the job."""
    result = make_job(write_recipe(Path(f"{name}.yaml")), nodes=1, devices=1, cores=1, out=None)
    assert Path(result.recipe).resolve() == folder / f"{name}.yaml"
    assert not result.recipe.startswith("-")
    assert set(result.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and result.name[0].isalpha()


@settings(max_examples=20)
@given(name=NAMES)
def test_any_file_name_reaches_strop(name: str, tmp_path: Path) -> None:
    names_reach_strop(name, tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_reaches_strop(name: str, tmp_path: Path) -> None:
    names_reach_strop(name, tmp_path)


def names_reach_strop(name: str, tmp_path: Path) -> None:
    result = job(name, folder=tmp_path / name)
    result.folder.mkdir(exist_ok=True)
    words = ["-m", "strop.cli", *result.arguments]
    place, started = started_by_slurm(result, tmp_path)
    assert place == str(result.folder) and started == words
    tree = ast.parse(job_files.ray_script(result))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert (values["FOLDER"], values["TRAIN"]) == (str(result.folder), result.arguments)
    recipe, train_job = yaml.safe_load_all(
        job_files.kubernetes_manifests(result, f"# {name}\n", image=name, claim=name)
    )
    assert recipe["data"]["recipe.yaml"] == f"# {name}\n"
    trainer = train_job["spec"]["trainer"]
    assert trainer["image"] == name
    inside = ["train", "/etc/strop/recipe.yaml", *result.arguments[2:]]
    assert [word.replace("$$", "$") for word in trainer["args"]] == ["torchrun", "-m", "strop.cli", *inside]
    assert not [word for word in trainer["args"] if "$" in word.replace("$$", "")]
    task = yaml.safe_load(job_files.skypilot_task(result, gpus=None, bucket=name, spot=False))
    assert task["file_mounts"]["/strop"]["name"] == name
    environment = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    _, output = started_by(task["run"], "torchrun", environment, tmp_path)
    expected = replace(result, out=f"/strop/{result.out}").arguments
    assert output[-len(expected) :] == expected
    assert "--master-addr=10.0.0.1" in output and "--node-rank=1" in output
    assert not list(tmp_path.rglob("planted"))


def started_by(script: str, program: str, variables: dict[str, str], tmp_path: Path) -> tuple[str, list[str]]:
    """Return the folder and arguments that a shell script starts a stand-in program with."""
    place = tmp_path / "in its place"
    place.mkdir(exist_ok=True)
    for name in {program, "scontrol"}:
        file = place / name
        output = r'printf "%s\0" "$PWD" "$@"' if name == program else "echo first.example"
        file.write_text(f"#!/bin/bash\n{output}\n", encoding="utf-8")
        file.chmod(0o755)
    env = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", **variables}
    done = subprocess.run(["bash", "-c", script], capture_output=True, env=env, cwd=tmp_path, check=True)
    assert not done.stderr
    folder, *words = done.stdout.decode("utf-8").split("\0")[:-1]
    return folder, words


def started_by_slurm(result: Job, tmp_path: Path) -> tuple[str, list[str]]:
    """Return the folder and the arguments after Python of a batch script."""
    script = job_files.slurm_script(result, time="1:00", python=f"/{result.name}/python")
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len(directives) == 9 and "#SBATCH --nodes=2" in directives
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "4"}
    folder, output = started_by(script, "srun", variables, tmp_path)
    assert output[:3] == ["--cpus-per-task=4", f"--wait={job_files.SLURM_WAIT_S}", f"/{result.name}/python"]
    return folder, output[3:]


@pytest.mark.parametrize("name", [name for name in HOSTILE if not set(name) & set("\n\t")])
def test_folder_name_survives_the_ray_shells(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name passes through the user's shell and the cluster's shell. Between them Ray joins the words with
    list2cmdline (ray.dashboard.modules.job.cli)."""
    Path(name).mkdir()
    report = json.loads(run("launch", "ray", "recipe.yaml", "--file", f"{name}/x.py", "--json", capsys=capsys)[1])
    words = shlex.split(report["submit"])
    assert words[:4] == ["ray", "job", "submit", "--"]
    command = subprocess.list2cmdline(["printf", "%s", *words[5:]])
    assert subprocess.check_output(command, shell=True, text=True) == str(folder / name / "x.py")


def test_slurm_signal_saves_and_requeues(tmp_path: Path) -> None:
    """The script forwards TERM, waits for strop and requeues the job; after any other exit it does not requeue."""
    srun = 'trap "exit 130" TERM; echo $$ > "$CALLS.pid"; echo ready; while :; do sleep 0.1; done'
    command = ["show hostnames n1", "--signal=TERM 7"]
    assert ended_by_slurm(srun, tmp_path, warn=True) == (130, [*command, "requeue 7"])
    assert ended_by_slurm(srun.replace("130", "0"), tmp_path, warn=True) == (0, command)
    assert ended_by_slurm("echo ready; exit 1", tmp_path, warn=False) == (1, ["show hostnames n1"])


def ended_by_slurm(srun: str, tmp_path: Path, *, warn: bool) -> tuple[int, list[str]]:
    """Return the exit code and the scontrol calls of a batch script."""
    calls = tmp_path / "calls"
    calls.write_text("", encoding="utf-8")
    report = 'echo "$*" >> "$CALLS"'
    for name, text in (("srun", srun), ("scontrol", report), ("scancel", f'{report}; kill "$(cat "$CALLS.pid")"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip
    script = job_files.slurm_script(job(folder=tmp_path), time="1")
    with subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, env=env, text=True) as shell:
        assert shell.stdout is not None and shell.stdout.readline() == "ready\n"
        if warn:
            shell.terminate()
        code = shell.wait(60)
    return code, calls.read_text(encoding="utf-8").splitlines()


def test_comments_are_placed_above_their_key() -> None:
    tree = {"a": {"b": 1, "list": [{"c": 2}]}, "text": BlockText("a:\n  b: 3\n"), "z": "x"}
    result = dump_with_comments(
        tree, {("a", "b"): "of b", ("a", "list", "0", "c"): "of c", ("text",): "two\nlines", ("z",): "last"}
    )
    assert yaml.safe_load(result) == tree
    lines = result.splitlines()
    assert lines[1:3] == ["  # of b", "  b: 1"]
    assert lines[lines.index("# two") : lines.index("# two") + 3] == ["# two", "# lines", "text: |"]
    assert lines[-2:] == ["# last", "z: x"]
    with pytest.raises(KeyError):
        dump_with_comments(tree, {("a", "nothing"): "x"})
