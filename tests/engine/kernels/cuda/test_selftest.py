"""The operations of a GPU are tried once, and those that fail or are wrong are replaced one by one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strop.config.schema import TrainSection
from strop.engine.kernels import dispatch, eager, operations
from strop.engine.kernels.cuda import attention, lora, selftest
from strop.engine.train import dropout
from strop.errors import DeviceError
from strop.training.optim import make_optimizer

CPU = torch.device("cpu")
triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def right(device: torch.device) -> selftest.Pairs:
    yield torch.ones(2), torch.ones(2)


def wrong(device: torch.device) -> selftest.Pairs:
    yield torch.ones(2), torch.ones(2)
    yield torch.ones(2), torch.tensor([1.0, 1.01])


def fails(error: BaseException) -> Any:
    def check(device: torch.device) -> selftest.Pairs:
        raise error
        yield

    return check


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find = selftest.find_failures  # a test may replace it
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    find.cache_clear()
    yield
    find.cache_clear()


def found(monkeypatch: pytest.MonkeyPatch, **checks: Any) -> dict[str, str]:
    """Return what fails of these checks, as a new process would find it."""
    monkeypatch.setattr(selftest, "CHECKS", checks)
    selftest.find_failures.cache_clear()
    return dict(selftest.find_failures(CPU))


def test_reasons_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")
    headers = subprocess.CalledProcessError(1, ["gcc", "main.c"])
    nan = iter([(torch.tensor([torch.nan]), torch.ones(1))])
    failures = found(
        monkeypatch, a=right, b=wrong, c=fails(missing), d=fails(headers), e=lambda device: nan,
        f=fails(ModuleNotFoundError("No module named 'triton'")),
    )  # fmt: skip
    assert failures == {
        "b": "its results are wrong",
        "c": "Failed to find C compiler. Please specify via CC environment variable.",
        "d": "the C compiler failed (are Python's headers installed?)",
        "e": "its results are wrong",
        "f": "No module named 'triton'",
    }
    assert selftest.describe({"b": "wrong", "c": "slow", "e": "wrong"}) == (
        "b, e cannot be used: wrong; c cannot be used: slow"
    )
    every = dict.fromkeys(operations.TRITON, "no compiler")
    assert selftest.describe(every) == "Triton cannot be used: no compiler"
    assert selftest.describe({}) == ""


def test_an_operation_is_tried_once_per_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def counted(device: torch.device) -> selftest.Pairs:
        tried.append("a")
        yield from wrong(device)

    assert found(monkeypatch, a=counted) == {"a": selftest.WRONG} == found(monkeypatch, a=counted)
    assert tried == ["a"]
    monkeypatch.setattr(selftest, "nvidia_smi", lambda fields: ("999.1",))
    assert found(monkeypatch, a=counted) == {"a": selftest.WRONG} and tried == ["a", "a"], "another driver"


def test_an_operation_that_ends_two_processes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it tries an operation leaves its number in the file."""
    file, key = selftest._results_file(), selftest._describe_versions(CPU)
    another = [selftest._this_process()[0], 0.0]  # has ended: this process has its number, and began later
    selftest._save(file, key, {"b": [*another, 0]})
    assert found(monkeypatch, a=right, b=right) == {}, "it may have been killed by somebody"
    selftest._save(file, key, {"b": [*another, 1]})
    assert found(monkeypatch, a=right, b=right) == {"b": "it ended 2 processes"}
    selftest._save(file, key, {"b": [*selftest._this_process(), 1]})
    assert found(monkeypatch, a=right, b=right) == {}, "another rank tries it now"
    selftest._save(file, key, {"b": [*another, 1]})
    monkeypatch.setattr(selftest.socket, "gethostname", lambda: "other")
    assert found(monkeypatch, a=right, b=right) == {}, "numbers of processes are those of a machine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_an_interrupted_try_says_nothing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        with pytest.raises(type(error)):
            found(monkeypatch, a=right, b=fails(error))
    assert found(monkeypatch, a=right, b=right) == {}


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "file"))
    assert found(monkeypatch, a=right, b=wrong) == {"b": selftest.WRONG}


def test_a_gpu_that_has_failed_ends_the_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access no operation works in this process. The next one leaves the operation out."""
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    def synchronize(device: torch.device) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(selftest, "CHECKS", {"dropout": fails(error), "DoRA": right})
    with pytest.raises(DeviceError, match=r"dropout made the GPU fail: .*illegal memory access") as raised:
        selftest.find_failures(torch.device("cuda", 0))
    assert "start again" in raised.value.fix
    selftest.find_failures.cache_clear()
    (reason,) = selftest.find_failures(torch.device("cuda", 0)).values()
    assert reason.startswith("dropout made the GPU fail")
    monkeypatch.undo()


@triton
def test_only_what_fails_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from strop.engine.kernels.cuda import dequantize, elementwise, rope
    from strop.engine.kernels.cuda import dropout as cuda_dropout

    gpu, failures = torch.device("cuda", 1), dict[str, str]()
    monkeypatch.setattr(attention, "activate_flash3", lambda device: "it needs a Hopper GPU")
    monkeypatch.setattr(selftest, "find_failures", lambda device: failures)
    like = torch.empty(0, dtype=torch.float16, device="meta")
    backend = dispatch.backend_for(gpu, torch.bfloat16)
    assert backend.ops is elementwise and backend.gpu and backend.kernels == operations.TRITON and not backend.failures
    assert backend.rope() is rope.ApplyRope
    assert dispatch._dequantize_kernels("nf4", gpu, torch.bfloat16) is dequantize
    assert dispatch.backend_for(gpu, torch.float64).ops is eager

    failures |= {operations.GLU: "wrong", operations.ROPE: "wrong", operations.EIGHT_BIT: "wrong"}
    backend = dispatch.backend_for(gpu, torch.bfloat16)
    assert backend.ops.glu is eager.glu and backend.ops.glu_backward is eager.glu_backward
    assert backend.ops.rms_norm is elementwise.rms_norm and backend.ops.cross_entropy_ is elementwise.cross_entropy_
    assert backend.ops.to_heads is eager.to_heads and backend.rope() is not rope.ApplyRope
    assert dispatch._dequantize_kernels("int8", gpu, torch.bfloat16) is None
    assert dispatch._dequantize_kernels("nf4", gpu, torch.bfloat16) is dequantize
    assert "gated activations, rotary embedding, 8-bit weights cannot be used: wrong" in backend.failures
    monkeypatch.setattr(dispatch, "gpu_failures", lambda device: failures)
    monkeypatch.setattr(dispatch, "triton_kernels", lambda device, dtype: operations.TRITON)
    assert dispatch.dropout_ops_for(like) is cuda_dropout
    monkeypatch.setattr(dispatch, "triton_kernels", lambda device, dtype: frozenset())
    assert dispatch.dropout_ops_for(like) is dropout
    failures |= dict.fromkeys(operations.TRITON, "no compiler")
    monkeypatch.undo()


def test_products_and_optimizer_without_the_fast_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {operations.FP32_SUMS: "not implemented", operations.FUSED_ADAMW: "wrong"}
    monkeypatch.setattr(selftest, "find_failures", lambda device: failures)
    a, b = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(8, 2, dtype=torch.bfloat16)
    assert torch.equal(lora._matmul_fp32(a, b), a.float() @ b.float())
    weight = nn.Parameter(torch.zeros(2, device="meta"))
    monkeypatch.setattr("strop.training.optim.gpu_failures", lambda device: failures)
    monkeypatch.setattr(nn.Parameter, "device", torch.device("cuda", 0), raising=False)
    assert make_optimizer({"w": weight}, TrainSection()).param_groups[0]["fused"] is False
    failures.clear()
    assert make_optimizer({"w": weight}, TrainSection()).param_groups[0]["fused"] is True


def test_attention_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    monkeypatch.setattr(attention, "activate_flash3", lambda device: "it needs a Hopper GPU")
    monkeypatch.setattr(attention, "supports_flash", lambda like, heads: True)
    monkeypatch.setattr(attention, "supports_efficient", lambda like, heads: True)
    monkeypatch.setattr(attention, "apply", lambda *arguments: used.append(arguments[-1]))
    monkeypatch.setattr(attention, "padded_attention", lambda *_: used.append("padded"))
    failures: dict[str, str] = {}
    monkeypatch.setattr(selftest, "find_failures", lambda device: failures)
    for wrong_one in ("", operations.FLASH, operations.EFFICIENT):
        failures |= {wrong_one: "its results are wrong"} if wrong_one else {}
        compute = dispatch.backend_for(torch.device("cuda", 0), torch.bfloat16).attention(64)
        compute(torch.zeros(1), *[SimpleNamespace(varlen=None, softcap=0.0, sinks=None)] * 4)  # type: ignore[arg-type]
    assert used == [operations.FLASH, operations.EFFICIENT, "padded"]


@pytest.mark.parametrize(("shift", "passes"), [(0.0, True), (0.1, False)])
@pytest.mark.parametrize("kernel", [operations.FLASH, operations.EFFICIENT])
def test_attention_is_compared_with_the_definition(
    kernel: str, shift: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operation is replaced by loops over documents, queries and heads."""

    def forward(q: Tensor, k: Tensor, v: Tensor, varlen: Any, heads: Any) -> tuple[Tensor, ...]:
        out, spans = torch.zeros(q.shape), zip(pairwise(varlen.query_ends), pairwise(varlen.key_ends), strict=True)
        for (begin, end), (first_key, last_key) in spans:
            for row in range(begin, end):
                last = last_key - (end - row) + 1
                first = max(first_key, last - heads.window) if heads.window else first_key
                for head in range(heads.num_query_heads):
                    own = head // heads.group
                    scores = (k[first:last, own].float() @ q[row, head].float()) * heads.scale
                    out[row, head] = scores.softmax(0) @ v[first:last, own].float()
        return (out + shift).to(q.dtype), q, k, v

    def backward(grad: Tensor, qkv: Any, out: Tensor, saved: Any, varlen: Any, heads: Any) -> Any:
        q, k, v = wide = [x.float().requires_grad_() for x in qkv]
        spans = zip(pairwise(varlen.query_ends), pairwise(varlen.key_ends), strict=True)
        parts = [selftest._masked_attention(q[a:b], k[c:d], v[c:d], heads.window) for (a, b), (c, d) in spans]
        return [x.to(grad.dtype) for x in torch.autograd.grad(torch.cat(parts), wide, grad.float())]

    monkeypatch.setattr(attention, "has_flash", lambda device: True)
    for name in ("flash", "efficient"):
        monkeypatch.setattr(attention, f"{name}_forward", forward)
        monkeypatch.setattr(attention, f"{name}_backward", backward)
    pairs = list(selftest.CHECKS[kernel](CPU))
    assert len(pairs) == (16 if kernel == operations.FLASH else 32)
    assert all(selftest._is_close(*pair) for pair in pairs) is passes


def test_checks_notice_wrong_results_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of torch's operations compare with others: a product of 16-bit sums is not close enough."""
    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out_dtype=None: mm(a, b).to(out_dtype) + 0.05 * (out_dtype is not None)
    )
    assert not all(selftest._is_close(*pair) for pair in selftest.CHECKS[operations.FP32_SUMS](CPU))
    assert all(selftest._is_close(*pair) for pair in selftest.CHECKS[operations.FUSED_ADAMW](CPU))
