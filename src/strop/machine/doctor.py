"""The report of `strop doctor`: facts about this machine, and problems with their consequences and fixes."""

from __future__ import annotations

import os
import re
import shutil
import socket
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

from strop.machine.probe import Machine, nvidia_smi, probe
from strop.machine.rates import Rates

Level = Literal["ok", "warning", "error"]
MIN_DISK_BYTES = 5 << 30
MIN_MEMORY_BYTES = 2 << 30
HUB_TIMEOUT_S = 5.0
OLD_GPU_INDEX = "https://download.pytorch.org/whl/cu126"  # builds for GPUs before Turing, until torch 2.14


@dataclass(frozen=True)
class Finding:
    """One result of a check. fix: a command, or a comment ("# ...") if no command helps."""

    level: Level
    what: str
    why: str = ""
    fix: str = ""


TorchChecks = Callable[[Machine], tuple[list[Finding], Rates]]


@dataclass(frozen=True)
class DoctorReport:
    """The result of `strop doctor`. rates: None without torch."""

    machine: dict[str, Any]
    findings: list[Finding]
    rates: Rates | None

    def as_json(self) -> dict[str, Any]:
        rates = asdict(self.rates) if self.rates else {"bf16_flops": None, "fp32_flops": None}
        return {"machine": self.machine, "findings": [asdict(f) for f in self.findings], "rates": rates}


def examine(check_torch: TorchChecks, folder: Path | None = None) -> DoctorReport:
    """Examine this machine. check_torch: the checks that need torch. folder: the folder for runs."""
    machine, folder = probe(), folder or Path.cwd()
    findings = [*_check_versions(), *_check_resources(machine, folder), _check_hub(), _check_disk(folder)]
    rates = None
    if is_installed("torch"):
        try:
            torch_findings, rates = check_torch(machine)
        except (ImportError, OSError) as error:
            why = "nothing can be trained with it; docs/troubleshooting.md#cuda"
            fix = f"{pip_command()} install --force-reinstall torch"
            torch_findings = [Finding("error", f"torch cannot be loaded: {error}", why, fix)]
        except Exception as error:  # a crash is a finding too
            torch_findings = [crash_finding("a check with torch", error)]
        findings += torch_findings
    return DoctorReport(_collect_facts(machine, folder), findings, rates)


def crash_finding(check: str, error: Exception, fix: str = "") -> Finding:
    message = next((line for line in str(error).splitlines() if line.strip()), "")
    what = f"{check} ends with {type(error).__name__}: {message.strip()}"
    reinstall = f"{pip_command()} install --force-reinstall torch"
    return Finding("error", what, "a run would fail in the same way", fix or reinstall)


def _collect_facts(machine: Machine, folder: Path) -> dict[str, Any]:
    return {
        **{name: value for name, value in asdict(machine).items() if name != "card_free_bytes"},
        "vector": list(machine.vector),
        "gpus": list(nvidia_smi("name,memory.total,driver_version,compute_cap")),
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "versions": {name: installed for name, installed, _ in libraries() if installed},
        "hub_token": _has_token(),
    }


def libraries() -> Iterator[tuple[str, str | None, str]]:
    """Yield (name, installed version or None, supported range) of each library that strop requires."""
    try:
        lines = requires("strop") or []
    except PackageNotFoundError:  # strop runs from source code without being installed
        lines = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name = requirement.name
            yield name, version(name) if is_installed(name) else None, str(requirement.specifier)


def is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _check_versions() -> list[Finding]:
    findings, install = [], f"{pip_command()} install"
    for name, installed, supported in libraries():
        required = f"{name}{supported}"
        if installed is None:
            why = f"strop needs {required}"
            findings.append(Finding("error", f"{name} is not installed", why, f"{install} '{required}'"))
        elif not Requirement(required).specifier.contains(installed, prereleases=True):
            why = f"strop is tested with {required}"
            findings.append(Finding("error", f"{name} {installed}", why, f"{install} -U '{required}'"))
    return findings or [Finding("ok", "every library is in the range that strop supports")]


def pip_command() -> str:
    return f"{sys.executable} -m pip"


def why_no_code(index: int = 0) -> tuple[str, str] | None:
    """Return why torch has no code for a GPU, and what helps, or None if it has, or if there is no GPU."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    capability, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if not built or any(_runs_code(capability, architecture) for architecture in built):
        return None
    name, version = torch.cuda.get_device_name(index), ".".join(map(str, capability))
    what = f"torch {torch.__version__} has no code for {name}, of compute capability {version} ({', '.join(built)})"
    old = (5, 0) <= capability < (7, 5)  # pytorch#157517, #190385
    return what, f"{pip_command()} install " + (f"'torch<2.15' --index-url {OLD_GPU_INDEX}" if old else "-U torch")


def _runs_code(capability: tuple[int, int], architecture: str) -> bool:
    """Return whether a GPU runs code for an architecture such as sm_86, sm_90a, or compute_120 (compiled at start)."""
    kind, _, number = architecture.partition("_")
    digits, suffix = number.rstrip("af"), number[len(number.rstrip("af")) :]
    built = int(digits[:-1]), int(digits[-1])
    if kind == "compute" and not suffix:
        return capability >= built
    return capability == built if suffix == "a" else capability[0] == built[0] and capability >= built


def _check_resources(machine: Machine, folder: Path) -> Iterator[Finding]:
    if machine.free_bytes < MIN_MEMORY_BYTES:
        what = f"{machine.free_bytes / 2**30:.1f} GiB of memory are free"
        yield Finding("warning", what, "a run of the smallest model takes about 1.5 GiB", "# close other programs")
    free = shutil.disk_usage(folder).free
    if free < MIN_DISK_BYTES:
        what = f"{free / 2**30:.1f} GiB of disk are free in {folder}"
        why = "a model and its checkpoints take several GiB; see docs/troubleshooting.md#disk"
        yield Finding("warning", what, why, "# free some space, or give a folder on another disk with --out")


def _check_hub() -> Finding:
    """Check whether the Hub can be reached, and whether there is a token, which is not shown."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("ok", "offline by HF_HUB_OFFLINE: models come from folders and the local cache")
    if getproxies().get("https"):
        return Finding("ok", "the Hub is behind a proxy, so it was not contacted")
    host = re.sub(r"^https?://", "", os.environ.get("HF_ENDPOINT", "https://huggingface.co")).partition("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=HUB_TIMEOUT_S).close()
    except OSError as error:
        why = "models must then be folders or .gguf files on this machine"
        return Finding("warning", f"the Hub ({host}) does not answer: {error}", why, "export HF_HUB_OFFLINE=1")
    token = "with a token" if _has_token() else "without a token: gated models need one (hf auth login)"
    return Finding("ok", f"the Hub answers, {token}")


def _has_token() -> bool:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()


def _check_disk(folder: Path) -> Finding:
    """Write and sync 16 MiB to the folder for runs."""
    runs = folder / "runs" if (folder / "runs").is_dir() else folder
    try:
        with tempfile.NamedTemporaryFile(dir=runs) as file:
            started = time.perf_counter()
            file.write(b"\0" * (16 << 20))
            file.flush()
            os.fsync(file.fileno())
            rate = 16 / (time.perf_counter() - started)
    except OSError as error:
        why = "a run could not save; see docs/troubleshooting.md#disk"
        return Finding("error", f"{runs} cannot be written: {error.strerror}", why, "# give another folder with --out")
    return Finding("ok", f"wrote and synced 16 MiB in {runs} at {rate:,.0f} MiB/s")
