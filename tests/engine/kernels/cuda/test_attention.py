"""Attention on a GPU: the inputs of flash attention, and the activation of flash attention 3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from strop.engine.kernels import eager
from strop.engine.kernels.cuda import attention
from strop.engine.kernels.cuda.attention import activate_flash3, attention_on_gpu, flash_backward, flash_forward
from strop.engine.train.attention import Attention, Heads
from strop.engine.train.norms import Norm
from strop.engine.train.packing import Varlen
from tests.support.attention import documents_of, heads, rand
from tests.support.meta_operations import correct_meta_backward

GPU = torch.device("cuda", 0)


def definition(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, heads: Heads) -> Tensor:
    """Compute flash attention of packed documents by its definition: the last query sees the last key."""
    out = []
    query_ends, key_ends = varlen.query_ends.tolist(), varlen.key_ends.tolist()
    for (begin, end), (first, last) in zip(pairwise(query_ends), pairwise(key_ends), strict=True):
        n, m = end - begin, last - first
        assert n <= varlen.longest_query and m <= varlen.longest_key
        mask = ~eager.causal_mask(n, m, m - n, heads.window, q.device)
        keys, values = (x[first:last].repeat_interleave(heads.group, 1).transpose(0, 1) for x in (k, v))
        queries = q[begin:end].transpose(0, 1)
        out.append(F.scaled_dot_product_attention(queries, keys, values, mask, scale=heads.scale).transpose(0, 1))
    return torch.cat(out)


def definition_backward(
    grad: Tensor, qkv: tuple[Tensor, ...], out: Tensor, saved: Any, varlen: Varlen, heads: Heads
) -> Any:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in qkv]
        again = definition(*inputs, varlen, heads)
    torch.testing.assert_close(again, out)
    return torch.autograd.grad(again, inputs, grad)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("window", [0, 2])
def test_packed_attention_matches_the_cpu(
    window: int, norms: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The definition of attention replaces its kernel; the inputs and gradients are tested."""
    for name in ("flash", "efficient"):
        monkeypatch.setattr(attention, f"supports_{name}", lambda like, heads, name=name: name == kernel)
    monkeypatch.setattr(attention, f"{kernel}_forward", lambda *arguments: (definition(*arguments),))
    monkeypatch.setattr(attention, f"{kernel}_backward", definition_backward)
    torch.manual_seed(0)
    shape, cos, sin = heads(window, norms, 1), rand(8, 2).cos(), rand(8, 2).sin()
    qkv = rand(8, 16, grad=True)
    for spans in ([(2, 3, 2), (5, 2, 2), (7, 1, 2), (0, 2, 0)], [(0, 5, 0), (5, 3, 0)]):
        documents = documents_of(8, *spans)
        result, expected = (compute(qkv, shape, cos, sin, documents) for compute in (attention_on_gpu, Attention.apply))
        torch.testing.assert_close(result, expected)
        upstream = rand(*expected.shape)
        grads = [torch.autograd.grad(out, qkv, upstream)[0] for out in (result, expected)]
        torch.testing.assert_close(*grads)


def scores_of(
    q: Tensor, k: Tensor, varlen: Varlen, heads: Heads
) -> Iterator[tuple[slice, slice, Tensor]]:  # fmt: skip
    """Yield the queries, the keys and the masked scores (num_query_heads, queries, keys) of each document."""
    query_ends, key_ends = varlen.query_ends.tolist(), varlen.key_ends.tolist()
    for queries, keys in zip(pairwise(query_ends), pairwise(key_ends), strict=True):
        rows, columns = slice(*queries), slice(*keys)
        n, m = queries[1] - queries[0], keys[1] - keys[0]
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * heads.scale
        yield rows, columns, scores.masked_fill(eager.causal_mask(n, m, m - n, heads.window, q.device), -torch.inf)


def by_logsumexp(kernel: str) -> tuple[Any, Any]:
    """Return forward and backward as the kernels compute them: probabilities from the saved logsumexp and output."""

    def forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, heads: Heads) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(heads.group, 1) for x in (k, v))
        out, totals = torch.empty_like(q), list[Tensor]()
        for rows, keys, scores in scores_of(q, k, varlen, heads):
            totals.append(scores.logsumexp(2))
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(2), v[keys])
        if kernel == "flash":
            return out, torch.cat(totals, 1)
        padded = q.new_full((len(totals), heads.num_query_heads, 32), torch.inf)
        for document, total in zip(padded, totals, strict=True):
            document[:, : total.shape[1]] = total
        return out, padded

    def backward(grad: Tensor, qkv: tuple[Tensor, ...], out: Tensor, saved: Any, varlen: Varlen, heads: Heads) -> Any:
        (logsumexp,), grads = saved, [torch.zeros_like(x) for x in qkv]
        q, (k, v) = qkv[0], (x.repeat_interleave(heads.group, 1) for x in qkv[1:])
        for number, (rows, keys, scores) in enumerate(scores_of(q, k, varlen, heads)):
            own = logsumexp[:, rows] if kernel == "flash" else logsumexp[number, :, : scores.shape[1]]
            probs = (scores - own[..., None]).exp()
            delta = (grad[rows] * out[rows]).sum(2).T[..., None]
            ds = probs * (torch.einsum("qhd,khd->hqk", grad[rows], v[keys]) - delta) * heads.scale
            grads[0][rows] = torch.einsum("hqk,khd->qhd", ds, k[keys])
            parts = torch.einsum("hqk,qhd->khd", ds, q[rows]), torch.einsum("hqk,qhd->khd", probs, grad[rows])
            for target, part in zip(grads[1:], parts, strict=True):
                target[keys] += part.unflatten(1, (-1, heads.group)).sum(2)
        return grads

    return forward, backward


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("window", [0, 2])
def test_sinks_and_norms_of_values_match_the_cpu(window: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels save is changed so that their own backward computes the gradients with sinks."""
    for name in ("flash", "efficient"):
        monkeypatch.setattr(attention, f"supports_{name}", lambda like, heads, name=name: name == kernel)
    for direction, function in zip(("forward", "backward"), by_logsumexp(kernel), strict=True):
        monkeypatch.setattr(attention, f"{kernel}_{direction}", function)
    torch.manual_seed(0)
    shape, cos, sin = heads(window, True, 1), rand(8, 2).cos(), rand(8, 2).sin()
    shape = replace(shape, v_norm=Norm(shape.ops, torch.ones(4, dtype=torch.float64), 1e-5, 0.0))
    qkv, results = rand(8, 16, grad=True), list[Tensor]()
    for spans in ([(2, 3, 2), (5, 2, 2), (7, 1, 2), (0, 2, 0)], [(0, 5, 0), (5, 3, 0)]):
        documents, upstream = documents_of(8, *spans), rand(8, 8)
        for sinks in (None, torch.tensor([0.5, -1.0])):
            own = replace(shape, sinks=sinks)
            for compute in (attention_on_gpu, Attention.apply):
                out = compute(qkv, own, cos, sin, documents)
                results += [out, *torch.autograd.grad(out, qkv, upstream)]
            for result, expected in zip(results[-4:-2], results[-2:], strict=True):
                torch.testing.assert_close(result, expected)
    assert not torch.allclose(results[0], results[4], rtol=0.1)


@pytest.mark.parametrize("changes", [{"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0])}])
def test_scores_that_no_kernel_computes_use_matmuls(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A soft cap with any kernel, and attention sinks where no kernel works, or none does with them."""
    for name in ("flash", "efficient"):
        monkeypatch.setattr(attention, f"supports_{name}", lambda like, heads: "softcap" in changes)
    shape, angles, documents = replace(heads(0, True), **changes), (rand(8, 2), rand(8, 2)), documents_of(8, (0, 8, 0))
    qkv = rand(8, 16)
    expected = Attention.apply(qkv, shape, *angles, documents)
    assert torch.equal(attention_on_gpu(qkv, shape, *angles, documents), expected)
    monkeypatch.setattr(attention, "supports_flash", lambda like, heads: True)
    assert torch.equal(attention_on_gpu(qkv, shape, *angles, documents, sinks=False), expected)


def test_heads_are_repeated_and_their_gradients_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory-efficient attention has no grouped heads; the definition on single heads replaces its operations."""
    single, saved = replace(heads(0, False), num_query_heads=4, num_kv_heads=4, size=8), list[Tensor]()
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    varlen = Varlen(ends, ends, 5, 5, None)

    def forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        return definition(q[0], k[0], v[0], varlen, single)[None], q, q, q, 5, 5

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, *_: Any, **__: Any) -> Any:
        saved.append(k)
        grads = definition_backward(grad[0], (q[0], k[0], v[0]), out[0], (), varlen, single)
        return (*(x[None] for x in grads), None)

    operations = SimpleNamespace(_efficient_attention_forward=forward, _efficient_attention_backward=backward)
    monkeypatch.setattr(torch.ops, "aten", operations)
    shape = replace(single, num_kv_heads=2)
    q, k, v, grad = (rand(8, many, 8) for many in (4, 2, 2, 4))
    out, *rest = attention.efficient_forward(q, k, v, varlen, shape)
    result = attention.efficient_backward(grad, (q, k, v), out, rest, varlen, shape)
    expected = definition_backward(grad, (q, k, v), definition(q, k, v, varlen, shape), (), varlen, shape)
    assert saved[0].shape == (1, 8, 4, 8)
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("capability", "dtype", "supported"),
    [((7, 5), torch.float16, True), ((7, 5), torch.bfloat16, False), ((8, 0), torch.bfloat16, True),
     ((7, 5), torch.float32, True), ((9, 0), torch.float64, False)],
)  # fmt: skip
def test_memory_efficient_attention_in_bf16_needs_ampere(
    capability: tuple[int, int], dtype: torch.dtype, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    like: Any = SimpleNamespace(device=GPU, dtype=dtype)
    assert attention.supports_efficient(like, replace(heads(0, False), size=64)) is supported
    assert not attention.supports_efficient(like, replace(heads(0, False), size=20))


def test_pytorchs_efficient_operations_accept_the_arguments() -> None:
    """torch 2.13 has no out and no window in its backward on meta tensors (pytorch's _meta_registrations.py)."""
    correct_meta_backward()
    ends = torch.tensor([0, 8], dtype=torch.int32, device="meta")
    varlen = Varlen(ends, ends, 8, 8, None)
    q, k = (torch.empty(8, n, 8, dtype=torch.float16, device="meta") for n in (4, 2))
    for window in (0, 3):
        shape = replace(heads(window, False), num_query_heads=4, num_kv_heads=2, size=8)
        out, *saved = attention.efficient_forward(q, k, k, varlen, shape)
        assert out.shape == q.shape
        grads = attention.efficient_backward(out, (q, k, k), out, saved, varlen, shape)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]


def test_pytorchs_flash_operations_accept_the_arguments() -> None:
    """The schema of the installed PyTorch decides; from 2.8 on the first ten arguments and the windows are the same."""
    ends = torch.tensor([0, 8], dtype=torch.int32)
    varlen = Varlen(ends, ends, 8, 8, None)
    q, k = (torch.empty(8, n, 8, dtype=torch.bfloat16, device="meta") for n in (4, 2))
    for window in (0, 3):
        shape = replace(heads(window, False), num_query_heads=4, num_kv_heads=2, size=8)
        out, *saved = flash_forward(q, k, k, varlen, shape)
        assert out.shape == q.shape
        dq, dk, dv = flash_backward(out, (q, k, k), out, saved, varlen, shape)
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


@pytest.fixture
def flash3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Simulate a Hopper GPU with a flash attention 3 whose results differ by `error`, or that raises it."""
    state: dict[str, Any] = {"active": None, "error": 0.0}

    def activate(name: str) -> None:
        state["active"] = name
        if isinstance(state["error"], Exception):
            raise state["error"]

    def results(device: torch.device) -> list[torch.Tensor]:
        return [torch.zeros(2), torch.ones(3) + (state["error"] if state["active"] else 0.0)]

    module: Any = torch.nn.attention
    monkeypatch.setattr(module, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(module, "restore_flash_attention_impl", lambda: state.update(active=None), raising=False)
    monkeypatch.setattr(module, "list_flash_attention_impls", lambda: ["FA3"], raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setattr(attention, "_compute_flash_results", results)
    activate_flash3.cache_clear()
    yield state
    activate_flash3.cache_clear()


def test_flash3_is_used_where_its_results_are_right(flash3: dict[str, Any]) -> None:
    flash3["error"] = 0.01
    assert activate_flash3(GPU) is None and flash3["active"] == "FA3"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(0.5, "results are wrong"), (float("nan"), "results are wrong"), (OSError("no symbol"), "no symbol")],
)
def test_flash3_is_not_used_where_it_fails(
    flash3: dict[str, Any], error: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    flash3["error"] = error
    assert reason in (activate_flash3(GPU) or "") and flash3["active"] is None
    assert reason in caplog.text


def test_flash3_is_not_tried_where_it_is_unavailable(flash3: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert "not installed" in (activate_flash3(GPU) or "")
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", list, raising=False)
    activate_flash3.cache_clear()
    assert "PyTorch version" in (activate_flash3(GPU) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    activate_flash3.cache_clear()
    assert "Hopper" in (activate_flash3(GPU) or "") and flash3["active"] is None
