"""Systems that no test machine has: no call that Windows or macOS lacks, without a guard that mypy understands."""

from __future__ import annotations

import re

import pytest
from mypy import api

from tests import ROOT

SYSTEM_MODULES = r"^(import|from) (os|signal|mmap|fcntl|resource|termios|pty|select|socket|subprocess|time|threading)\b"


def calls_missing_on(platform: str, files: list[str], cache: str) -> list[str]:
    """Return mypy's messages about attributes that the standard library lacks on a platform."""
    options = ["--platform", platform, "--follow-imports", "skip", "--ignore-missing-imports", "--config-file", ""]
    report, errors, _ = api.run([*options, "--cache-dir", cache, *files])
    assert not errors
    return [line for line in report.splitlines() if re.search(r': error: (Module|"\w+") has no attribute', line)]


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_no_call_is_missing(platform: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    sources = sorted((ROOT / "src" / "strop").rglob("*.py"))
    files = [str(file) for file in sources if re.search(SYSTEM_MODULES, file.read_text(encoding="utf-8"), re.M)]
    assert len(files) > 40
    assert not calls_missing_on(platform, files, str(tmp_path_factory.mktemp("mypy")))


@pytest.mark.parametrize(
    ("platform", "line", "found"),
    [("win32", "os.fork()", 1), ("darwin", "os.fork()", 0), ("darwin", "os.sched_getaffinity(0)", 1)],
)
def test_missing_calls_are_found(
    platform: str, line: str, found: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("calls")
    (folder / "calls.py").write_text(f"import os\n\n{line}\n", encoding="utf-8")
    assert len(calls_missing_on(platform, [str(folder / "calls.py")], str(folder / "cache"))) == found
