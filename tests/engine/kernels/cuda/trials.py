"""The numbers of the kernels for cards against definitions in fp64, and whole steps of tiny models through them.

test_kernels.py runs this file in a process that has TRITON_INTERPRET=1 from its start: by Triton's interpreter, on a
CPU. Where there is a card, `pytest tests/engine/kernels/cuda/trials.py` runs it there.

The interpreter cuts bf16 off where a card rounds: there the bound is a whole last bit, not half of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from strop.engine.kernels import eager
from strop.engine.kernels.cuda import dequantize, rope
from strop.engine.kernels.cuda import dropout as drops
from strop.engine.kernels.cuda import elementwise as kernels
from strop.engine.kernels.cuda import heads as heads_
from strop.engine.kernels.cuda.attention import Turn
from strop.engine.kernels.dispatch import Processor
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
    "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available(), reason="no card, and no interpreter"
)
OPS = cast(Ops, kernels)
KINDS = [torch.float32, torch.bfloat16, torch.float16]
LAST_BIT = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(1, 1), (1, 5), (3, 130), (7, 576), (2, 4096)]


@pytest.fixture(autouse=True)
def where() -> Iterator[None]:
    """What a test makes lies on the card, where there is one."""
    with torch.device("cpu" if "TRITON_INTERPRET" in os.environ else "cuda"):
        yield


def made(*shape: int, dtype: torch.dtype = torch.float32, apart: bool = False) -> Tensor:
    """Random numbers; apart: rows that stand in a wider tensor, one number behind its begin."""
    wide = torch.randn(*shape[:-1], shape[-1] + 3, dtype=torch.float32).to(dtype)
    return wide[..., 1 : shape[-1] + 1] if apart else wide[..., : shape[-1]].contiguous()


def close(found: Tensor, expected: Tensor) -> None:
    """found is within its type's last bit of `expected` in fp64; fp32's of numbers that cancel, beside a row's
    greatest."""
    assert expected.dtype == torch.float64
    bound = LAST_BIT[found.dtype] * expected.abs() + 1e-6 * (1 + expected.abs().amax(-1, keepdim=True))
    assert (found.double() - expected).abs().sub(bound).max() <= 0


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(dtype: torch.dtype, apart: bool, offset: float) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        x, grad = (made(*shape, dtype=dtype, apart=apart) for _ in range(2))
        weight = made(shape[1], dtype=dtype)
        wide = (x.double(), weight.double(), 1e-5, offset)
        close(kernels.rms_norm(x, weight, 1e-5, offset), eager.rms_norm(*wide))
        room = torch.empty(shape, dtype=dtype)
        assert kernels.rms_norm(x, weight, 1e-5, offset, room) is room
        close(room, eager.rms_norm(*wide))
        close(kernels.rms_norm_backward(grad, x, weight, 1e-5, offset), eager.rms_norm_backward(grad.double(), *wide))
    x, weight = made(2, 3, 8, dtype=dtype).transpose(0, 1), made(8, dtype=dtype)
    close(kernels.rms_norm(x, weight, 1e-5, offset), eager.rms_norm(x.double(), weight.double(), 1e-5, offset))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # on a card it is inf, and 1 / (1 + inf) is 0
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_glu(dtype: torch.dtype, apart: bool, activation: str) -> None:
    torch.manual_seed(0)
    for rows, n in SHAPES:
        x, grad = 3 * made(rows, 2 * n, dtype=dtype, apart=apart), made(rows, n, dtype=dtype, apart=apart)
        x[0, 0] = -100.0
        expected = eager.glu(x.double(), activation)
        close(kernels.glu(x, activation), expected)
        of_x, again = kernels.glu_backward(grad, x, activation)
        close(again, expected)
        close(of_x, eager.glu_backward(grad.double(), x.double(), activation)[0])


@pytest.mark.parametrize("dtype", KINDS)
def test_gains(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, n in [(1, 1), (3, 130), (300, 7)]:
        x, grad = (made(rows, n, dtype=dtype, apart=True) for _ in range(2))
        gains, y = torch.rand(n), made(rows, n, dtype=dtype)
        expected = x.double() * gains
        assert kernels.scale_columns_(x, gains) is x
        close(x, expected)
        of_x, along = kernels.scale_columns_backward(grad, y, gains)
        close(of_x, grad.double() * gains)
        torch.testing.assert_close(along.double(), (grad.double() * y.double()).sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 97), (3, 8192), (2, 100003)])
def test_cross_entropy(dtype: torch.dtype, softcap: float, rows: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = made(rows, vocabulary, dtype=dtype, apart=True).mul_(8)
    logits[0, vocabulary // 2 :] += 100.0  # the greatest stands behind
    if vocabulary > 8192:
        logits[-1, :8200] = float("-inf")  # a block of what can never come
    labels = torch.randint(vocabulary // 2, vocabulary, (rows,))
    weights = torch.rand(rows) * (torch.arange(rows) != 1)  # a row that counts for nothing
    wide = logits.double()
    expected = eager.cross_entropy_(wide, labels, weights.double(), softcap, True)
    asked = kernels.cross_entropy_(logits, labels, weights, softcap, False)
    beside = logits.clone()
    found = kernels.cross_entropy_(logits, labels, weights, softcap, True)
    assert torch.equal(found, asked)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    bound = LAST_BIT[dtype] * wide.abs() + 1e-6 + (1e-7 if dtype == torch.float16 else 0)
    assert ((logits.double() - wide).abs() <= bound).all()
    assert not torch.equal(beside, logits) or vocabulary == 1


HEADS = [  # query, key_value, size, turned pairs, norms
    (4, 2, 16, 8, "head"), (3, 1, 10, 2, "none"), (5, 5, 12, 0, "head"), (2, 1, 6, 3, "all"), (32, 8, 128, 64, "head"),
    (7, 1, 80, 16, "none"), (1, 1, 6, 0, "none"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("query", "key_value", "size", "pairs", "norms"), HEADS)
def test_heads(dtype: torch.dtype, query: int, key_value: int, size: int, pairs: int, norms: str) -> None:
    """q, k, v and the joined gradient, whatever the gradients' strides; against autograd of the definition."""
    torch.manual_seed(0)

    def norm(many: int) -> Norm | None:
        weight = made(size if norms == "head" else many * size, dtype=dtype)
        return None if norms == "none" else Norm(OPS, weight, 1e-6, 1.0)

    shape = Heads(OPS, query, key_value, size, 1.0, 0, 0.0, norm(query), norm(key_value))
    for rows in (1, 5):
        qkv = made(rows, (query + 2 * key_value) * size, dtype=dtype).requires_grad_()
        angles = made(rows, pairs) if pairs else torch.empty(rows, 0)
        cos, sin = angles.cos(), angles.sin()
        wide = qkv.detach().double().requires_grad_()
        expected = list(shape.views(wide))
        for i, own in enumerate((shape.q_norm, shape.k_norm)):
            if own is not None:
                by = as_norm_input(expected[i], own)
                expected[i] = eager.rms_norm(by, own.weight.double(), own.eps, own.offset).view(expected[i].shape)
            expected[i] = eager.rotate(expected[i], cos.double(), sin.double())
        found = Turn.apply(qkv, shape, cos, sin, heads_)
        ups = [made(*x.shape[::-1], dtype=dtype).permute(2, 1, 0) for x in found]  # no two numbers side by side
        ups[0] = made(query, rows, size, dtype=dtype).transpose(0, 1)  # and as flash attention may give them
        share = 4 * LAST_BIT[dtype]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=share, atol=share)
        (mine,) = torch.autograd.grad(found, qkv, ups)
        (theirs,) = torch.autograd.grad(expected, wide, [up.double() for up in ups])
        bound = share * theirs.abs().max()
        torch.testing.assert_close(mine.double(), theirs, rtol=share, atol=float(bound))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("size", "pairs"), [(10, 2), (6, 3), (128, 64), (8, 0)])
def test_turned_aside(dtype: torch.dtype, scaled: bool, neighbours: bool, size: int, pairs: int) -> None:
    torch.manual_seed(0)
    shape = Heads(OPS, 3, 2, size, 1.0, 0, 0.0, None, None)
    for rows in (1, 5):
        qkv, up = (made(rows, 7 * size, dtype=dtype).requires_grad_() for _ in range(2))
        cos, sin, scale = torch.randn(rows, pairs).cos(), torch.randn(rows, pairs).sin(), torch.rand(rows)
        wide = qkv.detach().double().requires_grad_()
        found = rope.ApplyRope.apply(qkv, shape, cos, sin, neighbours, scale if scaled else None)
        double = scale.double() if scaled else None
        expected = ApplyRope.apply(wide, shape, cos.double(), sin.double(), neighbours, double)
        close(found.detach(), expected.detach())
        (mine,), (theirs,) = torch.autograd.grad(found, qkv, up), torch.autograd.grad(expected, wide, up.double())
        close(mine, theirs.detach())


@pytest.mark.parametrize("dtype", KINDS[:2])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (1, 2056)])
@pytest.mark.parametrize("adapters", [1, 3, 5])
def test_dropout_has_the_bits_that_a_cpu_has(dtype: torch.dtype, rows: int, width: int, adapters: int) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(-(2**63), 2**63 - 1, (rows,))
    numbers = (3, 17, 2**31 - 1, 0, 5)[:adapters]
    for key in ((0, 0), (2**32 - 5, 2**31 + 7)):
        drawn = dropout.random_bits(tokens, torch.tensor(numbers), torch.tensor(key), width)
        levels = (int(drawn[0, 0, -1]), 0, 65535, 1, 40000)[:adapters]  # the first is drawn, and kept
        dropped = DropoutSpec(*key, tokens, numbers, levels)
        x = made(rows, width, dtype=dtype, apart=True)
        assert torch.equal(drops.apply_masks(x, dropped), dropout.apply_masks(x, dropped))
        grad = made(rows, adapters * width, dtype=dtype)
        close(drops.apply_masks_backward(grad, dropped), dropout.apply_masks_backward(grad.double(), dropped))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (33, 192), (3, 130), (70, 512)])
def test_unpacking_gives_the_bits_of_bitsandbytes(
    scheme: str, double: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 and fp16; bf16 to its last bit, by the interpreter. Numbers behind the place stay as they are."""
    torch.manual_seed(0)
    packed = quantize_weight(torch.randn(shape), scheme, double=double)
    for dtype in KINDS:
        layer = QuantizedLinear(torch.nn.Linear(shape[1], shape[0], bias=False), scheme, dtype)
        layer.load_packed(packed)
        place = torch.full((shape[0] + 1, shape[1]), 7.0, dtype=dtype)
        expected = layer.dequantize()
        with monkeypatch.context() as patch:
            patch.setattr("strop.models.quantize.dequantize_kernels", lambda device, dtype: dequantize)
            found = layer.dequantize()
            assert layer.dequantize(place[:-1]).data_ptr() == place.data_ptr()
        assert torch.equal(place[:-1], found) and (place[-1] == 7).all()
        if dtype == torch.bfloat16:
            close(found, expected.double())
        else:
            assert torch.equal(found, expected)


def by(monkeypatch: pytest.MonkeyPatch, *, kernels: bool) -> None:
    """Has the fast step compute as on a card whose kernels work, or do not."""
    processor = Processor(OPS if kernels else cast(Ops, eager), card=True, kernels=kernels)
    monkeypatch.setattr("strop.engine.train.fast.processor_for", lambda *_, **__: processor)
    monkeypatch.setattr("strop.engine.train.fast.drops_for", lambda x: drops if kernels else dropout)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"lora": {"use_dora": True}}),
        ("qwen3", {"attention_bias": True}),  # norms of each head
        ("gemma3_text", {"hidden_act": "gelu_pytorch_tanh"}),  # offset 1, window, norms behind the blocks
        ("olmo2", {}),  # norms over all heads
        ("glm", {}),  # neighbours turn together
        ("nanochat", {}),  # softcap; turned in front of the norms
    ],
)
def test_a_whole_step_is_as_near_to_the_truth_as_the_plain_operations(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of a tiny model in fp32, through the kernels and through eager.py, against fp64."""
    model, wide = adapted(family, **changes), adapted(family, **changes).double()
    examples = with_prefix(some(weighted=True)[:2])
    by(monkeypatch, kernels=False)
    truth, plain = step(wide, FastLoss(wide), examples), step(model, FastLoss(model), examples)
    by(monkeypatch, kernels=True)
    found = step(model, FastLoss(model), examples)
    assert abs(found[0] - truth[0]) <= 1e-6 * truth[0]
    for name, grad in truth[1].items():
        off, of_plain = ((way[1][name].double() - grad).norm() / grad.norm() for way in (found, plain))
        assert 0 < off <= max(1e-5, 2 * of_plain), name


def test_dropout_and_checkpointing_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"lora_dropout": 0.4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model, rows = adapted(lora=chosen, num_hidden_layers=1).train(), [example(4, 1), example(3, 2)]

    def both(layers: int) -> Any:
        loss = FastLoss(model, checkpoint_layers=layers)
        loss.masks.begin(5, 7)
        return step(model, loss, rows)

    by(monkeypatch, kernels=False)
    expected = both(0)
    by(monkeypatch, kernels=True)
    assert_same(both(0), expected)
    assert_same(both(1), expected)
