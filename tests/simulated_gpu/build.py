"""Compile the library of the simulated GPU, once for each version of PyTorch."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from strop.runs.lock import sha256_file

SOURCE = Path(__file__).with_name("device.cpp")


class Unavailable(Exception):
    """Raised when no GPU can be simulated on this machine."""


def library(folder: Path) -> Path:
    """Return the library in this folder; raises Unavailable without a C++ compiler, or if PyTorch has CUDA."""
    import torch

    if torch.version.cuda or torch.version.hip:
        raise Unavailable("this PyTorch is built for real GPUs")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("no C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"simulated-gpu-{torch.__version__}-{sha256_file(SOURCE)[:12]}.so"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    import torch

    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    home, temporary = Path(spec.origin).parent, path.with_suffix(".half")
    include, libraries = home / "include", home / "lib"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [
        compiler, "-shared", "-fPIC", "-O0", "-std=c++20", abi,
        f"-I{include}", f"-I{include}/torch/csrc/api/include", str(SOURCE), "-o", str(temporary),
        f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise AssertionError(f"the library of the simulated GPU does not compile:\n{done.stderr[-3000:]}")
    temporary.rename(path)
