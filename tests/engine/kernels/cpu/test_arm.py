"""The code that LLVM makes of the kernels' building blocks for ARM. `make arm` runs all kernels on an emulated CPU."""

from __future__ import annotations

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from strop.engine.kernels.cpu import compiled

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
