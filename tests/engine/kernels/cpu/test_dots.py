"""Dot products, and the code that LLVM makes of them for ARM. `make arm` runs these tests on emulated CPUs."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from llvmlite import ir

from strop.engine.kernels.cpu import compiled, dots
from strop.engine.kernels.cpu.compiled import subroutine

BF16_VECTOR, FP32_VECTOR = ir.VectorType(compiled.BFloat(), 16), ir.VectorType(compiled.F32, 8)


def test_bf16_pairs_are_multiplied_by_one_instruction_a_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ARM_BF16", True)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(FP32_VECTOR, [FP32_VECTOR, BF16_VECTOR, BF16_VECTOR]), "dots")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(compiled.pair_dots(builder, *function.args))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("aarch64-linux-gnu").create_target_machine(features="+bf16")
    module.triple = machine.triple
    assembly = [line.split() for line in machine.emit_assembly(llvm.parse_assembly(str(module))).splitlines()]
    instructions = [words[0] for words in assembly if words and not words[0].startswith(".") and words[0] != "dots:"]
    assert instructions == ["bfdot", "bfdot", "ret"]


@subroutine
def _block(a: Any, x: Any, c: Any) -> None:
    rows, count = x.shape
    dots.block(a.ravel(), 0, count, x.ravel(), 0, count, c.ravel(), 0, dots.LANES, rows, count, a.ravel(), 0, 0)


@pytest.mark.parametrize("count", [64, 72])
@pytest.mark.parametrize("kinds", ["bf16 bf16", "bf16 fp32"])
def test_dots_equal_those_in_fp64(kinds: str, count: int) -> None:
    if kinds == "bf16 bf16" and not compiled.HAS_BF16:
        pytest.skip("this CPU multiplies no bf16")
    draw = torch.Generator().manual_seed(0)
    a, x = (
        torch.randn(rows, count, generator=draw).to(torch.bfloat16 if kind == "bf16" else torch.float32)
        for rows, kind in zip((dots.LANES, 7), kinds.split(), strict=True)
    )
    c = np.zeros((7, dots.LANES), np.float32)
    _block(compiled.array(a), compiled.array(x), c)
    expected = x.double() @ a.double().T
    assert np.abs(c - expected.numpy()).max() <= 1e-6 * float(x.double().abs().sum(1).max() * a.double().abs().max())
