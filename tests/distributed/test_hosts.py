"""Two hosts, as network namespaces of this machine with a virtual cable, which is cut during a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.jobs import ASKED, FIRST, WHY_NOT, adapter, events, strop, until, write_recipe

NO_NETWORK = "" if shutil.which("ip") and os.geteuid() == 0 else "needs root and ip (Debian: iproute2)"
pytestmark = pytest.mark.skipif(not ASKED or bool(NO_NETWORK), reason=NO_NETWORK if ASKED else WHY_NOT)
TIMEOUT_S = 20  # of the recipe
NAMES, ADDRESSES, PORT = ("stropa", "stropb"), ("10.77.0.1", "10.77.0.2"), 29511


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    with ExitStack() as stack:
        for name in NAMES:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", NAMES[0], "netns", NAMES[0], "type", "veth", "peer", "name", NAMES[1], "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            for words in (["address", "add", f"{address}/24", "dev", name], ["link", "set", name, "up"]):
                ip("-netns", name, *words)
            ip("-netns", name, "link", "set", "lo", "up")
        yield


def start(folder: Path, node: int, *words: str) -> subprocess.Popen[bytes]:
    """Start torchrun with one process per host, configured by PET_ variables like a pod of Kubeflow Trainer."""
    agent = [sys.executable, "-m", "torch.distributed.run", "-m", "strop.cli"]
    facts = {"NNODES": 2, "NPROC_PER_NODE": 1, "NODE_RANK": node, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT}
    env = {**os.environ, **{f"PET_{name}": str(value) for name, value in facts.items()}}
    env["GLOO_SOCKET_IFNAME"] = NAMES[node]
    env.pop("OMP_NUM_THREADS", None)  # under torchrun 1 counts as unset
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', NAMES[node]]
    with (folder / f"log{node}").open("wb") as log:
        command = ["ip", "netns", "exec", NAMES[node], *named, *agent, *words]
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)


def both(folder: Path) -> list[subprocess.Popen[bytes]]:
    recipe = (folder / FIRST).read_text(encoding="utf-8")
    (folder / FIRST).write_text(recipe.replace("timeout: 60s", f"timeout: {TIMEOUT_S}s"), encoding="utf-8")
    return [start(folder, node, "train", FIRST, "--out", "run") for node in (0, 1)]


@pytest.mark.usefixtures("hosts")
def test_two_hosts_train_as_one(tmp_path: Path, tiny_folder: Path) -> None:
    write_recipe(tmp_path, tiny_folder, steps=20)
    codes = [host.wait(600) for host in both(tmp_path)]
    assert codes == [0, 0], (tmp_path / "log0").read_text(encoding="utf-8")[-3000:]
    (started,) = events(tmp_path / "run", "start")
    assert (started["devices"]["count"], started["devices"]["nodes"]) == (2, 2)
    strop("train", FIRST, "--out", "alone", cwd=tmp_path)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "alone")


@pytest.mark.usefixtures("hosts")
def test_cut_network_ends_both_hosts(tmp_path: Path, tiny_folder: Path) -> None:
    """Both hosts report the lost connection and end. One host resumes alone and equals the uninterrupted run."""
    write_recipe(tmp_path, tiny_folder, steps=150)
    started = both(tmp_path)
    try:
        until(tmp_path / "run", 6)
        ip("-netns", NAMES[0], "link", "set", NAMES[0], "down")
        codes = [host.wait(TIMEOUT_S + 100) for host in started]
    finally:
        for host in started:
            host.kill()
    assert codes == [1, 1]
    texts = [(tmp_path / f"log{node}").read_text(encoding="utf-8") for node in (0, 1)]
    assert all("rank" in text and f"{TIMEOUT_S}" in text for text in texts), texts
    strop("resume", "run", cwd=tmp_path)
    (again,) = events(tmp_path / "run", "resume")
    assert 5 <= again["step"] < 150
    strop("train", FIRST, "--out", "alone", cwd=tmp_path)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "alone")
