"""The kernels for cards without a card: their numbers by Triton's interpreter, what they are compiled to, and what
happens where they cannot be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from strop.engine.kernels import dispatch, eager
from strop.engine.kernels.cuda import available
from strop.engine.train import dropout
from tests import ROOT

triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
ARCHITECTURES = ("90", "75", "80", "86", "89", "100", "120")
# What a program reads or writes once, and what is looked up in tables of 64 and 1,024 bytes.
NARROW = {
    "cross entropy": {"ld.global.b64", "ld.global.b32", "ld.global.b16", "st.global.b32"},  # label, weight, logit; loss
    "norm, of 576": {"ld.global.v2.b32"},  # the weight, once for two rows
    "gains, back": {"st.global.b32"},  # what a column adds up to
    "spread": {"ld.global.b64"},  # the token's key
    "fold": {"ld.global.b64"},
    "four bit": {"ld.global.b8", "ld.global.b32"},  # constants, and the value of each number
    "eight bit": {"ld.global.b32"},  # the row's scale
}


def in_a_process(*command: str, **environment: str) -> str:
    known = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=known, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@triton
def test_numbers_by_the_interpreter() -> None:
    """trials.py, in a process that has the interpreter from its start."""
    file = "tests/engine/kernels/cuda/numerics.py"
    said = in_a_process("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file, TRITON_INTERPRET="1")
    assert "100%" in said and "s" not in said.splitlines()[0]  # none was skipped


@triton
def test_what_the_kernels_are_compiled_to(tmp_path_factory: pytest.TempPathFactory) -> None:
    """For each architecture a program that its assembler takes: 16 bytes an access, nothing in fp64, nothing spilled,
    and registers for two programs a multiprocessor at least."""
    folder = tmp_path_factory.mktemp("compiled")
    made = json.loads(in_a_process("-m", "tests.support.ptx", *ARCHITECTURES, TRITON_CACHE_DIR=str(folder)))
    assert tuple(made) == ARCHITECTURES
    for arch, kernels in made.items():
        assert len(kernels) >= 13
        for name, about in kernels.items():
            wide = {kind for kind in about["accesses"] if ".v4.b32" in kind}
            assert wide == {"ld.global.v4.b32", "st.global.v4.b32"}, (arch, name, about)
            assert set(about["accesses"]) - wide == NARROW.get(name, set()), (arch, name, about)
            assert about["f64"] == about["stack"] == about["local"] == 0, (arch, name, about)
            assert 2 * 32 * about["warps"] * about["reg"] <= 65536, (arch, name, about)
            if arch != "75" and name != "spread":  # which has no instruction for it, and copies
                assert about["rounded"] > 0, (arch, name, about)
    assert {about["variants"] for about in made[ARCHITECTURES[0]].values()} == {1}, "other lengths compile nothing more"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    known = available.why_not  # what a test puts in its place forgets nothing
    known.cache_clear()
    yield
    known.cache_clear()


@triton
def test_a_kernel_that_cannot_run_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """No card is here, so that its first launch fails; no C compiler, wrong numbers and no Triton are played."""
    from strop.engine.kernels.cuda import elementwise

    cpu = torch.device("cpu")
    if not torch.cuda.is_available():
        assert (available.why_not(cpu) or "").startswith("Triton cannot make kernels: ")

    def fails(error: Exception) -> Any:
        def norm(*_: object) -> torch.Tensor:
            raise error

        return norm

    missing = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
    headers = subprocess.CalledProcessError(1, ["gcc", "main.c"])
    for norm, said in (
        (fails(missing), "Triton cannot make kernels: Failed to find C compiler"),
        (fails(headers), "Triton cannot make kernels: the C compiler failed (are Python's headers installed?)"),
        (lambda x, *_: x, "Triton's kernels compute wrong numbers"),
        (eager.rms_norm, None),
    ):
        available.why_not.cache_clear()
        monkeypatch.setattr(elementwise, "rms_norm", norm)
        found = available.why_not(cpu)
        assert found == said if said is None else (found or "").startswith(said)
    available.why_not.cache_clear()
    monkeypatch.setitem(sys.modules, "strop.engine.kernels.cuda.elementwise", None)  # an import of it then fails
    assert (available.why_not(cpu) or "").startswith("Triton cannot be imported: ")


@triton
def test_a_card_takes_the_kernels_where_they_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from strop.engine.kernels.cuda import attention
    from strop.engine.kernels.cuda import dropout as drops
    from strop.engine.kernels.cuda import elementwise as kernels

    monkeypatch.setattr(attention, "why_not", lambda device: "it is for Hopper")
    card, reasons = torch.device("cuda", 1), {torch.device("cuda", 1): None}
    monkeypatch.setattr(available, "why_not", lambda device: reasons[device])
    taken = dispatch.backend_for(card, torch.bfloat16)
    assert taken.ops is kernels and taken.card and taken.kernels and not taken.why_no_triton
    like = torch.empty(0, dtype=torch.float16, device="meta")
    monkeypatch.setattr(dispatch, "why_no_triton", lambda device, dtype: None)
    assert dispatch.dropout_ops_for(like) is drops
    monkeypatch.undo()
    monkeypatch.setattr(attention, "why_not", lambda device: "it is for Hopper")
    monkeypatch.setattr(available, "why_not", lambda device: "no compiler")
    taken = dispatch.backend_for(card, torch.bfloat16)
    assert taken.ops is eager and taken.card and not taken.kernels and taken.why_no_triton == "no compiler"
    assert dispatch.backend_for(card, torch.float64).ops is eager
    assert dispatch.dropout_ops_for(like) is dropout
