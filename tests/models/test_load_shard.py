"""Shares of a base, laid together: the weights that `load_base` reads, whatever lies on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from strop.errors import ModelError
from strop.machine.memory import trim_heap
from strop.models import tensor_files
from strop.models.experts import QuantizedExperts
from strop.models.load import load_base
from strop.models.quantize import QuantizedLinear
from strop.models.sharding import EMBEDDING, GRAIN, HEAD, ModelShards, ShardedTensor, ShardedUnit, digest, load_sharded
from strop.models.source import Source, locate
from tests.support import tiny, tiny_families

WORLD = 3


def gathered(source: Source, dtype: torch.dtype, **how: Any) -> tuple[nn.Module, list[ModelShards]]:
    """The first rank's model, with all shares in its memory."""
    loaded = [load_sharded(source, dtype, "cpu", rank, WORLD, **how) for rank in range(WORLD)]
    model, parts = loaded[0][0], [one for _, one in loaded]
    for where, unit in parts[0].units.items():
        unit.take().copy_(torch.cat([one.units[where].own for one in parts]))
    return model, parts


def same_weights(one: nn.Module, other: nn.Module) -> None:
    named = [dict(model.named_parameters()) for model in (one, other)]
    assert named[0].keys() == named[1].keys()
    for name, weight in named[0].items():
        assert weight.dtype == named[1][name].dtype and torch.equal(weight, named[1][name]), name
    for a, b in zip(one.modules(), other.modules(), strict=True):
        assert type(a).__name__ == type(b).__name__
        if isinstance(a, QuantizedLinear) and isinstance(b, QuantizedLinear):
            assert torch.equal(a.dequantize(), b.dequantize())
        if isinstance(a, QuantizedExperts) and isinstance(b, QuantizedExperts):
            assert all(
                torch.equal(packed.dequantize_all(), b.packed[name].dequantize_all())
                for name, packed in a.packed.items()
            )


@pytest.mark.parametrize(
    ("family", "dtype", "how"),
    [
        ("llama", torch.float32, {}),
        ("llama", torch.bfloat16, {}),  # another type than on the disk
        ("llama", torch.bfloat16, {"quantization": "nf4"}),
        ("llama", torch.float32, {"quantization": "fp4", "double": False, "resident_layers": 1}),
        ("gpt2", torch.float32, {}),  # weights the other way round, biases
        ("mixtral", torch.float32, {}),  # experts that are joined as they are read
        ("qwen3_moe", torch.bfloat16, {"quantization": "nf4", "resident_layers": 1}),
        ("qwen3_moe", torch.float32, {"quantization": "int8"}),
        ("gemma3!", torch.float32, {}),  # a text half
    ],
    ids=str,
)
def test_shares_make_the_base(family: str, dtype: torch.dtype, how: dict[str, Any], tmp_path: Path) -> None:
    if family == "llama":
        tiny.save_tiny(tmp_path)
    else:
        tiny_families.save(family.removesuffix("!"), tmp_path, multimodal=family.endswith("!"))
    source = locate(str(tmp_path))
    whole = load_base(source, dtype, "cpu", **how)
    model, parts = gathered(source, dtype, **how)
    same_weights(whole, model)
    for where in parts[0].forward:
        units = [one.units[where] for one in parts]
        assert sum(unit.own_digest() for unit in units) % (1 << 64) == units[0].digest()
    assert parts[0].forward == [EMBEDDING, 0, 1, HEAD]
    assert all(abs(one.held_bytes - one.whole_bytes / WORLD) <= GRAIN * len(one.distinct()) for one in parts)


def test_a_share_alone_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what lies in the file as it is wanted. Tied embeddings are one unit, in which they stand once."""
    tiny.save_tiny(tmp_path)
    read: list[int] = []
    from_file = np.fromfile

    def counted(*args: Any, **more: Any) -> Any:
        found = from_file(*args, **more)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(tensor_files.np, "fromfile", counted)
    _, parts = load_sharded(locate(str(tmp_path)), torch.float32, "cpu", 1, WORLD)
    assert sum(read) <= parts.held_bytes < parts.whole_bytes / WORLD + GRAIN * 3
    assert parts.units[EMBEDDING] is parts.units[HEAD]


def test_what_is_wrong_with_a_base_is_said(tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    source = locate(str(tmp_path / "nan"))
    found = []
    for rank in range(WORLD):
        try:
            load_sharded(source, torch.float32, "cpu", rank, WORLD)
        except ModelError as error:
            found.append(str(error))
    assert len(found) == 1 and "layers.1.mlp.up_proj.weight holds NaN" in found[0]
    del model.model.layers[0].mlp.down_proj
    model.save_pretrained(tmp_path / "less")
    with pytest.raises(ModelError, match=r"1 weights are missing .*layers\.0\.mlp\.down_proj"):
        load_sharded(locate(str(tmp_path / "less")), torch.float32, "cpu", 0, WORLD)


def test_views_stay_and_memory_goes() -> None:
    """What autograd has saved of a weight is right again when its bytes are back."""
    data, held = torch.randn(8, 16), list[torch.Tensor]()
    flat = data.flatten().view(torch.uint8)
    unit = ShardedUnit(
        "layer",
        [ShardedTensor("w", (8, 16), torch.float32, held.append, lambda low, high: flat[low:high])],
        0,
        1,
        "cpu",
    )
    assert not unit.there
    unit.take().copy_(unit.own)
    weight, x = nn.Parameter(held[0], requires_grad=False), torch.randn(3, 16, requires_grad=True)
    y = nn.functional.linear(x, weight)
    unit.drop()
    unit.take().copy_(unit.own)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, data.sum(0).expand(3, 16))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's count of resident pages")
def test_what_is_dropped_is_no_longer_resident() -> None:
    """A unit of 64 MiB of which this process keeps a quarter: measured."""
    size, zeros = 64 << 20, torch.zeros(1, dtype=torch.uint8)
    slot = ShardedTensor("w", (size,), torch.uint8, lambda view: None, lambda low, high: zeros.expand(high - low))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    trim_heap()  # what tests before this one have freed must not be taken for it
    before = resident()
    unit = ShardedUnit("layer", [slot], 1, 4, "cpu")
    kept = resident() - before
    unit.take().fill_(1)
    there = resident() - before
    unit.drop()
    after = resident() - before
    assert kept == pytest.approx(size / 4, abs=4 << 20) and after == pytest.approx(size / 4, abs=4 << 20)
    assert there == pytest.approx(size * 5 / 4, abs=4 << 20)


def test_one_bit_makes_another_digest() -> None:
    generator = np.random.default_rng(0)
    data = torch.from_numpy(generator.integers(0, 256, 4096, dtype=np.uint8))
    whole = digest(data, 0)
    cut = 4 * int(generator.integers(1, 1000))
    assert (digest(data[:cut], 0) + digest(data[cut:], cut)) % (1 << 64) == whole
    for place in generator.integers(0, 4096, 200):
        changed = data.clone()
        changed[place] ^= 1 << int(generator.integers(8))
        assert digest(changed, 0) != whole
    assert digest(data.view(-1, 8).flip(0).flatten().contiguous(), 0) != whole
