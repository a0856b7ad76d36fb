"""How kernels are compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba.core.codegen import JITCodeLibrary

from strop.engine.kernels.cpu.compiled import kernel, kernel_sequence, subroutine


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))


def double(x: Any) -> None:
    for i in numba.prange(len(x)):
        x[i] *= 2


def test_loops_of_kernels_are_compiled_once_and_those_of_other_functions_as_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """numba compiles the body of a loop four times. A function of the program's own is left to numba."""
    compiled: list[str] = []
    finalize = JITCodeLibrary._finalize_specific

    def record(library: Any) -> None:
        compiled.append(library.name)
        finalize(library)

    monkeypatch.setattr(JITCodeLibrary, "_finalize_specific", record)
    for decorate, parts in ((kernel, 0), (numba.njit(parallel=True), 3)):
        compiled.clear()
        x = np.arange(1000, dtype=np.float32)
        decorate(double)(x)
        assert (x == 2 * np.arange(1000)).all()
        assert compiled.count("double") == 1
        assert sum("gufunc" in name.lower() for name in compiled) == parts


def test_kernels_call_their_own_copies_of_subroutines() -> None:
    """A process that has compiled a subroutine would call that one, and other bits than the next process may result."""

    @subroutine
    def slow(x: Any) -> Any:
        total = np.float32(0)
        for value in x:
            total += np.sqrt(value) if value > 1 else np.exp(value)
        return total

    compiled = kernel_sequence(lambda x: slow(x) + slow(x[1:]))
    compiled(np.ones(9, np.float32))
    [library] = compiled.overloads.values()
    linkages = {function.linkage.name for function in library.library._final_module.functions}
    assert "internal" in linkages and "linkonce_odr" not in linkages
