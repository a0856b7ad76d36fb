"""Errors of the operating system (permissions, full disks, missing home folders) become errors with a fix."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from strop.cli.app import _convert_os_error
from strop.errors import DiskError, FolderError
from strop.runs.folder import cache_folder, disk_errors, new_folder
from tests.support.families import tokenizer


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize(("umask", "permissions"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weight_files_have_the_permissions_of_the_umask(tmp_path: Path, umask: int, permissions: int) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "adapter") as folder:
            save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").iterdir()} == {permissions}


def test_os_errors_become_folder_and_disk_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    denied = _convert_os_error(PermissionError(errno.EACCES, "denied", "runs/mine/.claim.lock"))
    assert isinstance(denied, FolderError) and denied.what == "runs/mine/.claim.lock: permission denied"
    cached = _convert_os_error(FileNotFoundError(errno.ENOENT, "none", str(tmp_path / "cache" / "data")))
    assert isinstance(cached, FolderError) and "STROP_CACHE" in cached.fix
    assert isinstance(_convert_os_error(OSError(errno.ENOSPC, "full", "x")), DiskError)
    assert isinstance(_convert_os_error(OSError(errno.ENOSPC, "full")), DiskError)  # errors of writes have no file name
    assert _convert_os_error(FileNotFoundError(errno.ENOENT, "none", "x")) is None
    assert _convert_os_error(ValueError("x")) is None


def test_cache_path_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STROP_CACHE", "~/kept")  # containers and services set it without a shell
    assert cache_folder() == tmp_path / "kept"


def test_missing_home_folder_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have no entry in the user database."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("STROP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(FolderError) as raised:
        cache_folder()
    assert "STROP_CACHE" in raised.value.fix


def test_full_disk_error_of_numpy_becomes_a_disk_error(tmp_path: Path) -> None:
    """numpy raises it without an error number when it writes the tensors of a GGUF file."""
    with pytest.raises(DiskError, match="No space left"), disk_errors(tmp_path):
        raise OSError("13600 requested and 5488 written")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
def test_full_disk_error_of_tokenizers_becomes_a_disk_error(tmp_path: Path) -> None:
    """It is a bare Exception, here of a real one on a file that is always full."""
    full = tokenizer("chatml").backend_tokenizer
    with pytest.raises(DiskError, match="No space left"), disk_errors(tmp_path):
        full.save("/dev/full")


def test_error_of_a_read_only_disk_does_not_say_to_free_space(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as raised, disk_errors(tmp_path):
        raise OSError(errno.EROFS, "read-only", str(tmp_path / "x"))
    assert "make it writable" in raised.value.fix and "free" not in raised.value.fix


def test_full_disk_error_names_the_cache_or_the_run(tmp_path: Path) -> None:
    for file, expected in (
        (tmp_path / "cache" / "x", tmp_path / "cache" / "x"),
        (tmp_path / "run" / "x", tmp_path / "run"),
    ):
        with pytest.raises(DiskError) as raised, disk_errors(tmp_path / "run"):
            raise OSError(errno.ENOSPC, "full", str(file))
        assert raised.value.what == f"{expected}: cannot be written: {os.strerror(errno.ENOSPC)}"


@pytest.mark.parametrize("folder", ["", ".cache", ".cache/strop/data"])
def test_unwritable_cache_error_names_the_variable_to_set(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a read-only home folder, the folder that cannot be created may be a parent of the cache."""
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / ".cache" / "strop"))
    place = str(tmp_path / folder)
    with pytest.raises(DiskError) as raised, disk_errors(tmp_path / "run"):
        raise OSError(errno.EROFS, "read-only", place)
    assert "STROP_CACHE" in raised.value.fix
    error = _convert_os_error(PermissionError(errno.EACCES, "no", place))
    assert error is not None and "STROP_CACHE" in error.fix


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can remove a folder in use")
def test_deleted_working_folder_is_reported(tmp_path: Path) -> None:
    script = f"mkdir gone && cd gone && rmdir ../gone && {sys.executable} -m strop demo"
    ended = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "working folder" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_stdout_shows_no_traceback(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "strop", "runs", str(tmp_path), "--json"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode and "No space left" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 ignores PYTHONSAFEPATH")
def test_child_processes_ignore_modules_in_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a json.py of the working folder')")
    program = (
        "import os, subprocess, sys; sys.path.remove(''); from strop.runs.child_env import safe_path_env;"
        "command = [sys.executable, '-m', 'strop.cli', '--version'];"
        "sys.exit(subprocess.call(command, env={**os.environ, **safe_path_env()}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and ended.stdout.startswith("strop "), ended.stderr
