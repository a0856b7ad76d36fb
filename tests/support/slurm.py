"""Run Slurm's daemons as a cluster of two nodes on this machine, from Debian's packages slurm-wlm and munge.

munge and slurmd need root. The names of the nodes are known only to the daemons, through a private /etc/hosts.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "mount")
CONFIG = """\
ClusterName=strop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster. env: environment variables for its commands."""

    folder: Path
    env: Mapping[str, str]

    def run(self, *words: str | Path, cwd: Path | None = None) -> str:
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=self.env, cwd=cwd, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return the output of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, states: Sequence[str], seconds: float = 600) -> dict[str, str]:
        """Return the job once it is in one of these states. Fails after a timeout, or if it ends in another state."""
        until = time.monotonic() + seconds
        while True:
            result = self.job(number)
            if result["JobState"] in states:
                return result
            over = result["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not over and time.monotonic() < until, Path(result["StdOut"]).read_text(encoding="utf-8")[-3000:]
            time.sleep(0.5)


def why_not() -> str:
    """Return why there can be no cluster on this machine, or an empty string."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{missing[0]} is not installed (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "needs root"


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Run the controller, authentication and both nodes as child processes until the block ends."""
    folder.chmod(0o755)
    secret = folder / "munge"
    secret.mkdir(mode=0o755)
    (secret / "key").write_bytes(os.urandom(128))
    (secret / "key").chmod(0o400)
    (folder / "state").mkdir()
    (folder / "hosts").write_text(
        Path("/etc/hosts").read_text(encoding="utf-8") + "".join(f"127.0.0.1 {node}\n" for node in NODES),
        encoding="utf-8",
    )
    conf = folder / "slurm.conf"
    host, cores = socket.gethostname().partition(".")[0], os.cpu_count() or 1
    text = CONFIG.format(host=host, port=_free_port(), folder=folder)
    for node in NODES:
        text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs={cores}\n"
    conf.write_text(text, encoding="utf-8")
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n", encoding="utf-8")
    env = {**os.environ, "SLURM_CONF": str(conf)}
    keys = [f"--{what}-file={secret}/{what}" for what in ("key", "pid", "seed", "log")]
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={secret}/socket", *keys],
        ["slurmctld", "-D", "-f", conf],
    ]
    named = 'mount --bind "$1" /etc/hosts && hostname "$3" && exec slurmd -D -f "$2" -N "$3"'
    daemons += [
        ["unshare", "--mount", "--uts", "sh", "-c", named, "sh", folder / "hosts", conf, node] for node in NODES
    ]
    with ExitStack() as stack:
        for number, words in enumerate(daemons):
            stack.enter_context(_daemon(list(map(str, words)), folder / f"daemon{number}.log", env))
            if number == 0:
                _until(lambda: (secret / "socket").exists())
        slurm = Slurm(folder, env)
        _until(lambda: _idle(env) == len(NODES))
        yield slurm


def _idle(env: Mapping[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return len(done.stdout.split())


@contextmanager
def _daemon(words: list[str], log: Path, env: Mapping[str, str]) -> Iterator[None]:
    with log.open("wb") as file, subprocess.Popen(words, stdout=file, stderr=file, env=env) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _until(holds: object, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < until, "the cluster did not come up"
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])
