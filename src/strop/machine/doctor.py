"""`strop doctor`: facts about this machine, and checks that do something. Facts need no torch; checks say so without.

Each finding names what is so, why it matters, and the command that mends it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal
from urllib.request import getproxies

from packaging.requirements import Requirement

from strop.machine.probe import Machine, probe
from strop.machine.rates import Rates

Level = Literal["ok", "warning", "error"]
LEAST_DISK_BYTES = 5 << 30
LEAST_MEMORY_BYTES = 2 << 30
HUB_S = 5.0


@dataclass(frozen=True)
class Finding:
    """fix: a command, or a comment ("# ...") where no command mends it."""

    level: Level
    what: str
    why: str = ""
    fix: str = ""


TryOut = Callable[[Machine], tuple[list[Finding], Rates]]


@dataclass(frozen=True)
class Examination:
    """The fields of `strop doctor --json`. rates: None where torch is missing."""

    machine: dict[str, Any]
    findings: list[Finding]
    rates: Rates | None

    def as_json(self) -> dict[str, Any]:
        rates = asdict(self.rates) if self.rates else {"bf16_flops": None, "fp32_flops": None}
        return {"machine": self.machine, "findings": [asdict(f) for f in self.findings], "rates": rates}


def examine(try_out: TryOut, folder: Path | None = None) -> Examination:
    """try_out: what is done with torch, where it is installed (planning.calibrate). folder: where runs will be written;
    default: the current one."""
    machine, folder = probe(), folder or Path.cwd()
    findings = [*_versions(), *_resources(machine, folder), _hub(), _disk(folder)]
    rates = None
    if installed("torch"):
        try:
            more, rates = try_out(machine)
        except (ImportError, OSError) as error:
            why = "nothing can be trained with it; docs/troubleshooting.md#cuda"
            fix = f"{pip()} install --force-reinstall torch"
            more = [Finding("error", f"torch cannot be loaded: {error}", why, fix)]
        except Exception as error:  # a check that crashes has found something
            more = [crashed("a check with torch", error)]
        findings += more
    return Examination(_facts(machine, folder), findings, rates)


def crashed(check: str, error: Exception, fix: str = "") -> Finding:
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    what = f"{check} ends with {type(error).__name__}: {said.strip()}"
    return Finding("error", what, "a run would end with it too", fix or f"{pip()} install --force-reinstall torch")


def _facts(machine: Machine, folder: Path) -> dict[str, Any]:
    free = shutil.disk_usage(folder).free
    return {
        "system": machine.system,
        "python": machine.python,
        "cpu": machine.cpu,
        "vector": list(machine.vector),
        "cores": machine.cores,
        "memory_bytes": machine.memory_bytes,
        "free_bytes": machine.free_bytes,
        "gpus": gpu_lines(),
        "disk_free_bytes": free,
        "versions": {name: found for name, found, _ in libraries() if found},
        "hub_token": _has_token(),
    }


def gpu_lines() -> list[str]:
    """Name, memory, driver and compute capability of each card, as the NVIDIA driver says."""
    if not shutil.which("nvidia-smi"):
        return []
    fields = "name,memory.total,driver_version,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:  # a driver that hangs
        return []
    return [line.strip() for line in found.stdout.splitlines()] if found.returncode == 0 else []


def libraries() -> Iterator[tuple[str, str | None, str]]:
    """(name, version found, range supported) of each library that strop asks for here."""
    try:
        asked = requires("strop") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        asked = []
    for line in asked:
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield need.name, version(need.name) if installed(need.name) else None, str(need.specifier)


def installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _versions() -> Iterator[Finding]:
    bad = False
    for name, found, wanted in libraries():
        if found is None:
            bad = True
            fix = f"{pip()} install '{name}{wanted}'"
            yield Finding("error", f"{name} is not installed", f"strop needs {name}{wanted}", fix)
        elif not Requirement(f"{name}{wanted}").specifier.contains(found, prereleases=True):
            bad = True
            fix = f"{pip()} install -U '{name}{wanted}'"
            yield Finding("error", f"{name} {found}", f"strop is tested with {name}{wanted}", fix)
    if not bad:
        yield Finding("ok", "every library is in the range that strop supports")


def pip() -> str:
    return f"{sys.executable} -m pip"


def _resources(machine: Machine, folder: Path) -> Iterator[Finding]:
    if machine.free_bytes < LEAST_MEMORY_BYTES:
        what = f"{machine.free_bytes / 2**30:.1f} GiB of memory are free"
        yield Finding("warning", what, "a run of the smallest model takes about 1.5 GiB", "# close other programs")
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK_BYTES:
        what = f"{free / 2**30:.1f} GiB of disk are free in {folder}"
        why = "a model and its checkpoints take several; see docs/troubleshooting.md#disk"
        yield Finding("warning", what, why, "# free some space, or give --out another disk")


def _hub() -> Finding:
    """Whether the Hub answers; the token is looked for, and never shown."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("ok", "offline by HF_HUB_OFFLINE: models come from folders and the local cache")
    if getproxies().get("https"):
        return Finding("ok", "the Hub is behind a proxy, which was not asked")
    host = re.sub(r"^https?://", "", os.environ.get("HF_ENDPOINT", "https://huggingface.co")).partition("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=HUB_S).close()
    except OSError as error:
        why = "models must then be folders or .gguf files on this machine"
        return Finding("warning", f"the Hub ({host}) does not answer: {error}", why, "export HF_HUB_OFFLINE=1")
    token = "with a token" if _has_token() else "without a token: gated models need one (hf auth login)"
    return Finding("ok", f"the Hub answers, {token}")


def _has_token() -> bool:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()


def _disk(folder: Path) -> Finding:
    """16 MiB written and synced where runs go."""
    runs = next(place for place in (folder / "runs", folder) if place.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=runs) as file:
            started = time.perf_counter()
            file.write(b"\0" * (16 << 20))
            file.flush()
            os.fsync(file.fileno())
            rate = 16 / (time.perf_counter() - started)
    except OSError as error:
        why = "a run could not save; see docs/troubleshooting.md#disk"
        return Finding("error", f"{runs} cannot be written: {error.strerror}", why, "# give --out another folder")
    return Finding("ok", f"wrote and synced 16 MiB in {runs} at {rate:,.0f} MiB/s")
