"""The Triton kernels without a GPU: their values and the code they compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests import ROOT

triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
ARCHITECTURES = ("90", "75", "80", "86", "89", "100", "120")
# Narrow accesses: values that a program reads or writes once, and lookups in tables of 64 and 1,024 bytes.
NARROW = {
    "cross entropy": {"ld.global.b64", "ld.global.b32", "ld.global.b16", "st.global.b32"},  # label, weight, logit; loss
    "norm, of 576": {"ld.global.v2.b32"},  # the weight, once for two rows
    "scale, backward": {"st.global.b32"},  # the sum of a column
    "apply_masks": {"ld.global.b64"},  # the token's key
    "apply_masks_backward": {"ld.global.b64"},
    "four bit": {"ld.global.b8", "ld.global.b32"},  # constants, and the value of each element
    "eight bit": {"ld.global.b32"},  # the row's scale
}


def run_python(*command: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@triton
def test_values_in_tritons_interpreter() -> None:
    """numerics.py, in a process that starts with the interpreter."""
    file = "tests/engine/kernels/cuda/numerics.py"
    output = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file, TRITON_INTERPRET="1")
    assert "100%" in output and "s" not in output.splitlines()[0]  # none was skipped


@pytest.mark.slow
@triton
def test_compiled_code_is_efficient(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each architecture has 16 bytes an access, no fp64, no spilled registers, and two programs a multiprocessor."""
    folder = tmp_path_factory.mktemp("compiled")
    compiled = json.loads(run_python("-m", "tests.support.ptx", *ARCHITECTURES, TRITON_CACHE_DIR=str(folder)))
    assert tuple(compiled) == ARCHITECTURES
    for arch, kernels in compiled.items():
        assert len(kernels) >= 13
        for name, stats in kernels.items():
            wide = {kind for kind in stats["accesses"] if ".v4.b32" in kind}
            assert wide == {"ld.global.v4.b32", "st.global.v4.b32"}, (arch, name, stats)
            assert set(stats["accesses"]) - wide == NARROW.get(name, set()), (arch, name, stats)
            assert stats["f64"] == stats["stack"] == stats["local"] == 0, (arch, name, stats)
            assert 2 * 32 * stats["warps"] * stats["reg"] <= 65536, (arch, name, stats)
            if arch != "75" and name != "apply_masks":  # which cannot round to bf16; and a copy
                assert stats["rounded"] > 0, (arch, name, stats)
    assert {stats["variants"] for stats in compiled[ARCHITECTURES[0]].values()} == {1}, (
        "other lengths compile no further variants"
    )
