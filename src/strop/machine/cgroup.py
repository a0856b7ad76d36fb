"""Limits of this process's cgroups (of a container, a Slurm job, a systemd unit), in versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
NO_LIMIT = 1 << 60  # version 1 shows no limit as a number above this


def memory_limit() -> tuple[int, int] | None:
    """Return the limit and the free bytes of the cgroup with the least free memory, or None without a limit."""
    limits = []
    for folder in _folders("memory"):
        names = "memory.max", "memory.high", "memory.limit_in_bytes"
        limit = min(filter(None, (_read_number(folder / name) for name in names)), default=None)
        used = _read_number(folder / "memory.current") or _read_number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            limits.append((limit, limit - max(0, used - _cached_bytes(folder))))
    return min(limits, key=lambda pair: pair[1], default=None)


def cores() -> int | None:
    """Return the smallest CPU quota in whole cores, or None without one."""
    quotas = []
    for folder in _folders("cpu"):
        texts = _read(folder / "cpu.max").split()
        texts = texts or [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(texts) == 2 and all(text.isdigit() for text in texts):  # otherwise "max 100000", -1, or no such file
            quotas.append(max(1, int(texts[0]) // int(texts[1])))
    return min(quotas, default=None)


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of those that contain it.

    In a container, its own cgroup may be the root, whatever the path in OWN.
    """
    for line in _read(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = ROOT / controller if controllers else ROOT
        folder = base / path.strip("/")
        yield folder
        while folder != base:
            folder = folder.parent
            yield folder


def _cached_bytes(folder: Path) -> int:
    """Return the bytes of the file cache, which can be reclaimed."""
    lines = _read(folder / "memory.stat").splitlines()
    stat = dict(line.split(" ", 1) for line in lines if " " in line)
    return sum(int(stat.get(f"total_{kind}_file") or stat.get(f"{kind}_file") or 0) for kind in ("inactive", "active"))


def _read_number(file: Path) -> int | None:
    """Return the number in a file, if it has one, and it is below NO_LIMIT."""
    text = _read(file).strip()
    return int(text) if text.isdigit() and int(text) < NO_LIMIT else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
