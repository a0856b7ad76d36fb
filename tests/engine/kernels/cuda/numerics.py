"""The values of the Triton kernels, compared with definitions in fp64, and whole steps of tiny models through them.

test_elementwise.py runs this file in a process with TRITON_INTERPRET=1: on a CPU, in Triton's interpreter. On a machine
with a GPU, `pytest tests/engine/kernels/cuda/numerics.py` runs it there. The interpreter truncates bf16 where a GPU
rounds, so the bound is a whole last bit instead of half of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from strop.engine.kernels import eager
from strop.engine.kernels.cuda import dequantize, rope
from strop.engine.kernels.cuda import dropout as drops
from strop.engine.kernels.cuda import elementwise as kernels
from strop.engine.kernels.cuda.attention import RotateQk
from strop.engine.kernels.cuda.selftest import CHECKS, _is_close
from strop.engine.kernels.dispatch import Backend
from strop.engine.kernels.operations import EFFICIENT, FLASH, FP32_SUMS, SINKS, TRITON
from strop.engine.kernels.protocols import Ops
from strop.engine.train import dropout
from strop.engine.train.attention import ApplyRope, Heads, as_norm_input
from strop.engine.train.dropout import DropoutSpec
from strop.engine.train.fast import FastLoss
from strop.engine.train.norms import Norm
from strop.models.quantize import QuantizedLinear, quantize_weight
from tests.engine.train.test_fast import assert_same, some, step, with_prefix
from tests.support.random_models import adapted, example

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available(), reason="no GPU, and no interpreter"
)
OPS = cast(Ops, kernels)
KINDS = [torch.float32, torch.bfloat16, torch.float16]
LAST_BIT = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(1, 1), (1, 5), (3, 130), (7, 576), (2, 4096)]


@pytest.fixture(autouse=True)
def where() -> Iterator[None]:
    """Create tensors on the GPU, if there is one."""
    with torch.device("cpu" if "TRITON_INTERPRET" in os.environ else "cuda"):
        yield


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, apart: bool = False) -> Tensor:
    """Return random values; apart: as rows of a wider tensor, from its second column."""
    wide = torch.randn(*shape[:-1], shape[-1] + 3, dtype=torch.float32).to(dtype)
    return wide[..., 1 : shape[-1] + 1] if apart else wide[..., : shape[-1]].contiguous()


def close(result: Tensor, expected: Tensor) -> None:
    """Check that `result` is within the last bit of its dtype of `expected` in fp64, or, where values cancel, within
    the last bit in fp32 of the row's greatest value."""
    assert expected.dtype == torch.float64
    bound = LAST_BIT[result.dtype] * expected.abs() + 1e-6 * (1 + expected.abs().amax(-1, keepdim=True))
    assert (result.double() - expected).abs().sub(bound).max() <= 0


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_matches_fp64(dtype: torch.dtype, apart: bool, offset: float) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        x, grad = (random_tensor(*shape, dtype=dtype, apart=apart) for _ in range(2))
        weight = random_tensor(shape[1], dtype=dtype)
        wide = (x.double(), weight.double(), 1e-5, offset)
        close(kernels.rms_norm(x, weight, 1e-5, offset), eager.rms_norm(*wide))
        buffer = torch.empty(shape, dtype=dtype)
        assert kernels.rms_norm(x, weight, 1e-5, offset, buffer) is buffer
        close(buffer, eager.rms_norm(*wide))
        close(kernels.rms_norm_backward(grad, x, weight, 1e-5, offset), eager.rms_norm_backward(grad.double(), *wide))
    x, weight = random_tensor(2, 3, 8, dtype=dtype).transpose(0, 1), random_tensor(8, dtype=dtype)
    close(kernels.rms_norm(x, weight, 1e-5, offset), eager.rms_norm(x.double(), weight.double(), 1e-5, offset))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # on a GPU it is inf, and 1 / (1 + inf) is 0
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_glu_matches_fp64(dtype: torch.dtype, apart: bool, activation: str) -> None:
    torch.manual_seed(0)
    for rows, n in SHAPES:
        x, grad = (
            3 * random_tensor(rows, 2 * n, dtype=dtype, apart=apart),
            random_tensor(rows, n, dtype=dtype, apart=apart),
        )
        x[0, 0] = -100.0
        expected = eager.glu(x.double(), activation)
        close(kernels.glu(x, activation), expected)
        of_x, again = kernels.glu_backward(grad, x, activation)
        close(again, expected)
        close(of_x, eager.glu_backward(grad.double(), x.double(), activation)[0])


@pytest.mark.parametrize("dtype", KINDS)
def test_scale_columns_matches_fp64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, n in [(1, 1), (3, 130), (300, 7)]:
        x, grad = (random_tensor(rows, n, dtype=dtype, apart=True) for _ in range(2))
        gains, y = torch.rand(n), random_tensor(rows, n, dtype=dtype)
        expected = x.double() * gains
        assert kernels.scale_columns_(x, gains) is x
        close(x, expected)
        of_x, along = kernels.scale_columns_backward(grad, y, gains)
        close(of_x, grad.double() * gains)
        torch.testing.assert_close(along.double(), (grad.double() * y.double()).sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 97), (3, 8192), (2, 100003)])
def test_cross_entropy_matches_fp64(dtype: torch.dtype, softcap: float, rows: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = random_tensor(rows, vocabulary, dtype=dtype, apart=True).mul_(8)
    logits[0, vocabulary // 2 :] += 100.0  # the greatest is in the second half
    if vocabulary > 8192:
        logits[-1, :8200] = float("-inf")  # a block of impossible tokens
    labels = torch.randint(vocabulary // 2, vocabulary, (rows,))
    weights = torch.rand(rows) * (torch.arange(rows) != 1)  # a row with weight 0
    wide = logits.double()
    expected = eager.cross_entropy_(wide, labels, weights.double(), softcap, True)
    without_gradient = kernels.cross_entropy_(logits, labels, weights, softcap, False)
    before = logits.clone()
    result = kernels.cross_entropy_(logits, labels, weights, softcap, True)
    assert torch.equal(result, without_gradient)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    bound = LAST_BIT[dtype] * wide.abs() + 1e-6 + (1e-7 if dtype == torch.float16 else 0)
    assert ((logits.double() - wide).abs() <= bound).all()
    assert not torch.equal(before, logits) or vocabulary == 1


HEADS = [  # num_query_heads, num_kv_heads, size, rotated pairs, norms
    (4, 2, 16, 8, "head"), (3, 1, 10, 2, "none"), (5, 5, 12, 0, "head"), (2, 1, 6, 3, "all"), (32, 8, 128, 64, "head"),
    (7, 1, 80, 16, "none"), (1, 1, 6, 0, "none"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("num_query_heads", "num_kv_heads", "size", "pairs", "norms"), HEADS)
def test_rotate_qk_matches_autograd(
    dtype: torch.dtype, num_query_heads: int, num_kv_heads: int, size: int, pairs: int, norms: str
) -> None:
    """q, k, v and the joined gradient, for any strides, compared with autograd of the definition."""
    torch.manual_seed(0)

    def norm(many: int) -> Norm | None:
        weight = random_tensor(size if norms == "head" else many * size, dtype=dtype)
        return None if norms == "none" else Norm(OPS, weight, 1e-6, 1.0)

    shape = Heads(OPS, num_query_heads, num_kv_heads, size, 1.0, 0, 0.0, norm(num_query_heads), norm(num_kv_heads))
    if pairs == 8:  # Gemma 4 normalizes values too
        shape = replace(shape, v_norm=Norm(OPS, torch.ones(size, dtype=dtype), 1e-6, 0.0))
    for rows in (1, 5):
        qkv = random_tensor(rows, (num_query_heads + 2 * num_kv_heads) * size, dtype=dtype).requires_grad_()
        angles = random_tensor(rows, pairs) if pairs else torch.empty(rows, 0)
        cos, sin = angles.cos(), angles.sin()
        wide = qkv.detach().double().requires_grad_()
        expected = list(shape.views(wide))
        for i, own in enumerate((shape.q_norm, shape.k_norm, shape.v_norm)):
            if own is not None:
                by_head = as_norm_input(expected[i], own)
                expected[i] = eager.rms_norm(by_head, own.weight.double(), own.eps, own.offset).view(expected[i].shape)
            if i < 2:
                expected[i] = eager.rotate(expected[i], cos.double(), sin.double())
        result = RotateQk.apply(qkv, shape, cos, sin, rope)
        # No two elements are contiguous; and as flash attention may return them.
        upstreams = [random_tensor(*x.shape[::-1], dtype=dtype).permute(2, 1, 0) for x in result]
        upstreams[0] = random_tensor(num_query_heads, rows, size, dtype=dtype).transpose(0, 1)
        share = 4 * LAST_BIT[dtype]
        for actual, exact in zip(result, expected, strict=True):
            torch.testing.assert_close(actual.double(), exact, rtol=share, atol=share)
        (grad,) = torch.autograd.grad(result, qkv, upstreams)
        (expected_grad,) = torch.autograd.grad(expected, wide, [up.double() for up in upstreams])
        bound = share * expected_grad.abs().max()
        torch.testing.assert_close(grad.double(), expected_grad, rtol=share, atol=float(bound))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "pairs"), [(10, 2), (6, 3), (128, 64), (8, 0)])
def test_separate_rope_matches_fp64(dtype: torch.dtype, scaled: bool, interleaved: bool, size: int, pairs: int) -> None:
    torch.manual_seed(0)
    shape = Heads(OPS, 3, 2, size, 1.0, 0, 0.0, None, None)
    for rows in (1, 5):
        qkv, up = (random_tensor(rows, 7 * size, dtype=dtype).requires_grad_() for _ in range(2))
        cos, sin, scale = torch.randn(rows, pairs).cos(), torch.randn(rows, pairs).sin(), torch.rand(rows)
        wide = qkv.detach().double().requires_grad_()
        result = rope.ApplyRope.apply(qkv, shape, cos, sin, interleaved, scale if scaled else None)
        double = scale.double() if scaled else None
        expected = ApplyRope.apply(wide, shape, cos.double(), sin.double(), interleaved, double)
        close(result.detach(), expected.detach())
        (grad,) = torch.autograd.grad(result, qkv, up)
        (expected_grad,) = torch.autograd.grad(expected, wide, up.double())
        close(grad, expected_grad.detach())


@pytest.mark.parametrize("dtype", KINDS[:2])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (1, 2056)])
@pytest.mark.parametrize("adapters", [1, 3, 5])
def test_dropout_has_the_bits_of_a_cpu(dtype: torch.dtype, rows: int, width: int, adapters: int) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(-(2**63), 2**63 - 1, (rows,))
    numbers = (3, 17, 2**31 - 1, 0, 5)[:adapters]
    for key in ((0, 0), (2**32 - 5, 2**31 + 7)):
        bits = dropout.random_bits(tokens, torch.tensor(numbers), torch.tensor(key), width)
        levels = (int(bits[0, 0, -1]), 0, 65535, 1, 40000)[:adapters]  # a feature of the first level is kept
        dropped = DropoutSpec(*key, tokens, numbers, levels)
        x = random_tensor(rows, width, dtype=dtype, apart=True)
        assert torch.equal(drops.apply_masks(x, dropped), dropout.apply_masks(x, dropped))
        grad = random_tensor(rows, adapters * width, dtype=dtype)
        close(drops.apply_masks_backward(grad, dropped), dropout.apply_masks_backward(grad.double(), dropped))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (33, 192), (3, 130), (70, 512)])
def test_dequantization_has_the_bits_of_bitsandbytes(
    scheme: str, double: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 and fp16 are identical, bf16 to its last bit in the interpreter; memory after the result is unchanged."""
    torch.manual_seed(0)
    packed = quantize_weight(torch.randn(shape), scheme, double=double)
    for dtype in KINDS:
        layer = QuantizedLinear(torch.nn.Linear(shape[1], shape[0], bias=False), scheme, dtype)
        layer.load_packed(packed)
        place = torch.full((shape[0] + 1, shape[1]), 7.0, dtype=dtype)
        expected = layer.dequantize()
        with monkeypatch.context() as patch:
            patch.setattr("strop.models.quantize._find_kernels", [lambda scheme, device, dtype: dequantize])
            result = layer.dequantize()
            assert layer.dequantize(place[:-1]).data_ptr() == place.data_ptr()
        assert torch.equal(place[:-1], result) and (place[-1] == 7).all()
        if dtype == torch.bfloat16:
            close(result, expected.double())
        else:
            assert torch.equal(result, expected)


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in (FLASH, EFFICIENT, SINKS, FP32_SUMS)])
def test_each_operation_passes_its_check(name: str) -> None:
    device = torch.empty(0).device
    pairs = list(CHECKS[name](device))
    assert pairs and all(_is_close(*pair) for pair in pairs)


def use_kernels(monkeypatch: pytest.MonkeyPatch, *, kernels: bool) -> None:
    """Have the fast step compute as on a GPU whose kernels work, or do not."""
    backend = Backend(OPS if kernels else cast(Ops, eager), gpu=True, kernels=TRITON if kernels else frozenset())
    monkeypatch.setattr("strop.engine.train.fast.backend_for", lambda *_, **__: backend)
    monkeypatch.setattr("strop.engine.train.fast.dropout_ops_for", lambda x: drops if kernels else dropout)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"lora": {"use_dora": True}}),
        ("qwen3", {"attention_bias": True}),  # norms of each head
        ("gemma3_text", {"hidden_act": "gelu_pytorch_tanh"}),  # offset 1, window, norms behind the blocks
        ("olmo2", {}),  # norms over all heads
        ("glm", {}),  # interleaved rotary embedding
        ("nanochat", {}),  # soft cap; rotary embedding before the norms
        ("gemma2", {}),  # soft cap of attention's scores
        ("gemma4_text", {}),  # norms of values, layers that share them
        ("gpt_oss", {}),  # attention sinks
    ],
)
def test_step_is_as_close_to_fp64_as_eager_operations(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of a tiny model in fp32, with the kernels and with eager.py, compared with fp64."""
    model, wide = adapted(family, **changes), adapted(family, **changes).double()
    examples = with_prefix(some(weighted=True)[:2])
    use_kernels(monkeypatch, kernels=False)
    truth, plain = step(wide, FastLoss(wide), examples), step(model, FastLoss(model), examples)
    use_kernels(monkeypatch, kernels=True)
    result = step(model, FastLoss(model), examples)
    assert abs(result[0] - truth[0]) <= 1e-6 * truth[0]
    for name, grad in truth[1].items():
        off, eager_error = ((run[1][name].double() - grad).norm() / grad.norm() for run in (result, plain))
        assert 0 < off <= max(1e-5, 2 * eager_error), name


def test_dropout_and_checkpointing_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"lora_dropout": 0.4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model, rows = adapted(lora=chosen, num_hidden_layers=1).train(), [example(4, 1), example(3, 2)]

    def both(layers: int) -> Any:
        loss = FastLoss(model, checkpoint_layers=layers)
        loss.masks.begin(5, 7)
        return step(model, loss, rows)

    use_kernels(monkeypatch, kernels=False)
    expected = both(0)
    use_kernels(monkeypatch, kernels=True)
    assert_same(both(0), expected)
    assert_same(both(1), expected)
