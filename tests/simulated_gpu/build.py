"""The library of the card that is not there, compiled once a version of PyTorch."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from strop.runs.lock import sha256_file

SOURCE = Path(__file__).with_name("device.cpp")


class Missing(Exception):
    """Why no card can be played here."""


def library(folder: Path) -> Path:
    """The library, in this folder. Raises Missing where it cannot be made: no C++ compiler, or a PyTorch with CUDA."""
    import torch

    if torch.version.cuda or torch.version.hip:
        raise Missing("PyTorch is built for real cards here")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Missing("no C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"card-{torch.__version__}-{sha256_file(SOURCE)[:12]}.so"
    with FileLock(f"{made}.lock"):
        if not made.is_file():
            _compile(compiler, made)
    return made


def _compile(compiler: str, made: Path) -> None:
    import torch

    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    home, half = Path(spec.origin).parent, made.with_suffix(".half")
    include, libraries = home / "include", home / "lib"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [
        compiler, "-shared", "-fPIC", "-O0", "-std=c++20", abi,
        f"-I{include}", f"-I{include}/torch/csrc/api/include", str(SOURCE), "-o", str(half),
        f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"the card's library does not compile:\n{done.stderr[-3000:]}")
    half.rename(made)
