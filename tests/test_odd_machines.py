"""What the system does not let a user do is told with what to do, and is no fault of strop's."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from strop.cli.app import _by_the_system
from strop.errors import DiskError, FolderError
from strop.runs.folder import cache_folder, disk_errors, new_folder


@pytest.mark.skipif(os.name != "posix", reason="rights of another kind")
@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_have_the_rights_that_the_umask_gives(tmp_path: Path, umask: int, rights: int) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "adapter") as made:
            save_file({"a": torch.zeros(1)}, made / "adapter_model.safetensors")
            (made / "adapter_config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").iterdir()} == {rights}


def test_a_file_of_another_user_is_no_fault_of_strops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    of_another = _by_the_system(PermissionError(errno.EACCES, "denied", "runs/mine/.claim.lock"))
    assert isinstance(of_another, FolderError) and of_another.what == "runs/mine/.claim.lock: permission denied"
    cached = _by_the_system(FileNotFoundError(errno.ENOENT, "none", str(tmp_path / "cache" / "data")))
    assert isinstance(cached, FolderError) and "STROP_CACHE" in cached.fix
    assert isinstance(_by_the_system(OSError(errno.ENOSPC, "full", "x")), DiskError)
    assert isinstance(_by_the_system(OSError(errno.ENOSPC, "full")), DiskError)  # of a write
    assert _by_the_system(FileNotFoundError(errno.ENOENT, "none", "x")) is None
    assert _by_the_system(ValueError("x")) is None


def test_a_cache_below_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STROP_CACHE", "~/kept")  # as a container or a service has it: no shell has read it
    assert cache_folder() == tmp_path / "kept"


def test_without_a_home_folder_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user that no list of users has."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("STROP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(FolderError, match="no home folder"):
        cache_folder()


def test_a_full_disk_that_numpy_met(tmp_path: Path) -> None:
    """As it writes the tensors of a GGUF file: without a number."""
    with pytest.raises(DiskError, match="No space left"), disk_errors(tmp_path):
        raise OSError("13600 requested and 5488 written")


def test_a_full_cache_is_not_taken_for_a_full_run(tmp_path: Path) -> None:
    for file, named in (
        (tmp_path / "cache" / "x", tmp_path / "cache" / "x"),
        (tmp_path / "run" / "x", tmp_path / "run"),
    ):
        with pytest.raises(DiskError) as raised, disk_errors(tmp_path / "run"):
            raise OSError(errno.ENOSPC, "full", str(file))
        assert raised.value.what == f"{named}: cannot be written: {os.strerror(errno.ENOSPC)}"


@pytest.mark.parametrize("made", ["", ".cache", ".cache/strop/data"])
def test_where_the_cache_cannot_be_it_says_what_to_set(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's home that is read-only, or not this user's: the folder that cannot be made may be above it."""
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / ".cache" / "strop"))
    place = str(tmp_path / made)
    with pytest.raises(DiskError) as raised, disk_errors(tmp_path / "run"):
        raise OSError(errno.EROFS, "read-only", place)
    assert "STROP_CACHE" in raised.value.fix
    refused = _by_the_system(PermissionError(errno.EACCES, "no", place))
    assert refused is not None and "STROP_CACHE" in refused.fix


@pytest.mark.skipif(sys.platform != "linux", reason="a folder in use can be removed there")
def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    script = f"mkdir gone && cd gone && rmdir ../gone && {sys.executable} -m strop plan --model demo"
    ended = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "is gone: cd to one that is there" in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_an_output_that_is_full_shows_no_traceback(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "strop", "runs", str(tmp_path), "--json"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode and "No space left" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no way to be told")
def test_a_process_that_strop_starts_takes_no_module_of_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a json.py of the working folder')")
    program = (
        "import subprocess, sys; sys.path.remove(''); from strop.runs.child_env import apart; import os;"
        "sys.exit(subprocess.call([sys.executable, '-m', 'strop.cli', '--version'], env={**os.environ, **apart()}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and ended.stdout.startswith("strop "), ended.stderr
