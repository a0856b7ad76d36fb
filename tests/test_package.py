"""The built packages contain the needed files, and the public names are the documented ones."""

from __future__ import annotations

import inspect
import pydoc
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import strop
from tests import ROOT

PUBLIC = {
    "CheckpointError", "DataError", "DeviceError", "DiskError", "DivergedError", "FolderError", "GatedError",
    "InputError", "MemoryLimitError", "ModelError", "NonFiniteError", "ParityError", "PeerFailed", "QuantizerError",
    "RecipeError", "RunError", "Stopped", "StropError", "check", "compare_methods", "evaluate", "export", "load",
    "merge", "plan", "push", "resume", "sweep", "train",
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the source distribution, built from a clean copy of the source."""
    place, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for kind in ("sdist", "wheel"):
        build = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", build, str(out)], cwd=place, check=True, capture_output=True)
    return out


def of_the_package() -> set[str]:
    """Return every file below src/strop that Python has not generated."""
    files = (file for file in (ROOT / "src" / "strop").rglob("*") if file.is_file())
    sources = (file for file in files if "__pycache__" not in file.parts and file.suffix not in (".nbi", ".nbc"))
    return {str(file.relative_to(ROOT / "src")) for file in sources}


def test_the_wheel_holds_every_file(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert of_the_package() <= names
    assert any(name.endswith("licenses/LICENSE") for name in names) and "strop/py.typed" in names
    metadata = next(name for name in names if name.endswith("METADATA"))
    assert f"Version: {strop.__version__}" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_the_source_distribution_holds_every_file(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {f"src/{name}" for name in of_the_package()} | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_public_names() -> None:
    """Scripts rely on these names; change them only on purpose."""
    classes = {"Evaluation", "Model", "Plan", "Run", "Sampling", "Sweep"}  # not imported by `from strop import *`
    assert {name for name in dir(strop) if not name.startswith("_")} == PUBLIC | classes
    assert all(getattr(strop, name).__name__ == name for name in classes)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = strop.Trainer
    introduction = pydoc.render_doc(strop, renderer=pydoc.plaintext).partition("PACKAGE CONTENTS")[0]
    assert all(name in introduction for name in dir(strop) if name[0] != "_" and not name.endswith("Error"))
    assert set(strop.__all__) == PUBLIC
    places = ("strop.api", "strop.sweeping")
    defined = {
        name for name, value in vars(strop).items()
        if inspect.isfunction(value) and value.__module__ in places and not name.startswith("_")
    }  # fmt: skip
    assert defined == {name for name in PUBLIC if name[0].islower()}


@pytest.mark.parametrize("name", sorted(name for name in PUBLIC if name[0].islower()))
def test_public_functions_are_typed_and_documented(name: str) -> None:
    function = getattr(strop, name)
    signature = inspect.signature(function)
    assert inspect.getdoc(function) and signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_public_functions_are_not_hidden_by_packages_of_the_same_name() -> None:
    """Importing a package `strop.x` sets `strop.x`, so no package may have the name of a public function."""
    packages = {path.parent.name for path in (ROOT / "src" / "strop").glob("*/__init__.py")}
    assert not packages & PUBLIC
