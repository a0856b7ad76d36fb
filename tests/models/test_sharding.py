"""The shares of a sharded base together equal the weights that `load_base` reads."""

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
from strop.models.sharding import EMBEDDING, GRAIN, HEAD, ModelShards, ShardedLayer, ShardedTensor, digest, load_sharded
from strop.models.source import Source, locate
from tests.support import tiny, tiny_families

WORLD = 3


def gather(source: Source, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, list[ModelShards]]:
    """Return the first rank's model with all shares gathered, and the shards of all ranks."""
    loaded = [load_sharded(source, dtype, "cpu", rank, WORLD, **options) for rank in range(WORLD)]
    model, shards = loaded[0][0], [part for _, part in loaded]
    for where, unit in shards[0].layers.items():
        unit.allocate().copy_(torch.cat([part.layers[where].shard for part in shards]))
    return model, shards


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    named = [dict(model.named_parameters()) for model in (first, second)]
    assert named[0].keys() == named[1].keys()
    for name, weight in named[0].items():
        assert weight.dtype == named[1][name].dtype and torch.equal(weight, named[1][name]), name
    for a, b in zip(first.modules(), second.modules(), strict=True):
        assert type(a).__name__ == type(b).__name__
        if isinstance(a, QuantizedLinear) and isinstance(b, QuantizedLinear):
            assert torch.equal(a.dequantize(), b.dequantize())
        if isinstance(a, QuantizedExperts) and isinstance(b, QuantizedExperts):
            assert all(
                torch.equal(packed.dequantize_all(), b.packed[name].dequantize_all())
                for name, packed in a.packed.items()
            )


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("llama", torch.float32, {}),
        ("llama", torch.bfloat16, {}),  # another dtype than on disk
        ("llama", torch.bfloat16, {"quantization": "nf4"}),
        ("llama", torch.float32, {"quantization": "fp4", "double": False, "resident_layers": 1}),
        ("gpt2", torch.float32, {}),  # transposed weights, biases
        ("mixtral", torch.float32, {}),  # experts are joined while loading
        ("qwen3_moe", torch.bfloat16, {"quantization": "nf4", "resident_layers": 1}),
        ("qwen3_moe", torch.float32, {"quantization": "int8"}),
        ("gemma3!", torch.float32, {}),  # the text half of a multimodal model
        ("gemma3!", torch.float32, {"quantization": "nf4"}),  # its vision tower is not sharded
    ],
    ids=str,
)
def test_shares_equal_the_base(family: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    if family == "llama":
        tiny.save_tiny(tmp_path)
    else:
        tiny_families.save(family.removesuffix("!"), tmp_path, multimodal=family.endswith("!"))
    source = locate(str(tmp_path))
    whole = load_base(source, dtype, "cpu", **options)
    model, shards = gather(source, dtype, **options)
    assert_same_weights(whole, model)
    for where in shards[0].forward_order:
        units = [part.layers[where] for part in shards]
        assert sum(unit.shard_digest() for unit in units) % (1 << 64) == units[0].digest()
    assert shards[0].forward_order == [EMBEDDING, 0, 1, HEAD]
    assert all(abs(part.held_bytes - part.whole_bytes / WORLD) <= GRAIN * len(part.distinct()) for part in shards)


def test_only_the_share_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds for weights stored in the needed dtype. Tied embeddings are one unit."""
    tiny.save_tiny(tmp_path)
    read: list[int] = []
    from_file = np.fromfile

    def count_bytes(*args: Any, **kwargs: Any) -> Any:
        data = from_file(*args, **kwargs)
        read.append(data.nbytes)
        return data

    monkeypatch.setattr(tensor_files.np, "fromfile", count_bytes)
    _, parts = load_sharded(locate(str(tmp_path)), torch.float32, "cpu", 1, WORLD)
    assert sum(read) <= parts.held_bytes < parts.whole_bytes / WORLD + GRAIN * 3
    assert parts.layers[EMBEDDING] is parts.layers[HEAD]


def test_invalid_weights_are_refused(tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    source = locate(str(tmp_path / "nan"))
    messages = []
    for rank in range(WORLD):
        try:
            load_sharded(source, torch.float32, "cpu", rank, WORLD)
        except ModelError as error:
            messages.append(str(error))
    assert len(messages) == 1 and "layers.1.mlp.up_proj.weight holds NaN" in messages[0]
    del model.model.layers[0].mlp.down_proj
    model.save_pretrained(tmp_path / "less")
    with pytest.raises(ModelError, match=r"1 weights are missing .*layers\.0\.mlp\.down_proj"):
        load_sharded(locate(str(tmp_path / "less")), torch.float32, "cpu", 0, WORLD)


def test_saved_views_are_valid_after_regathering() -> None:
    """A weight that autograd has saved is correct again once its bytes are gathered again."""
    data, views = torch.randn(8, 16), list[torch.Tensor]()
    flat = data.flatten().view(torch.uint8)
    unit = ShardedLayer(
        "layer",
        [ShardedTensor("w", (8, 16), torch.float32, views.append, lambda low, high: flat[low:high])],
        0,
        1,
        "cpu",
    )
    assert not unit.is_gathered
    unit.allocate().copy_(unit.shard)
    weight, x = nn.Parameter(views[0], requires_grad=False), torch.randn(3, 16, requires_grad=True)
    y = nn.functional.linear(x, weight)
    unit.free()
    unit.allocate().copy_(unit.shard)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, data.sum(0).expand(3, 16))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's count of resident pages")
def test_dropped_unit_is_not_resident() -> None:
    """Measured with a unit of 64 MiB of which this process keeps a quarter."""
    size, zeros = 64 << 20, torch.zeros(1, dtype=torch.uint8)
    slot = ShardedTensor("w", (size,), torch.uint8, lambda view: None, lambda low, high: zeros.expand(high - low))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    trim_heap()  # memory freed by earlier tests must not count
    before = resident()
    unit = ShardedLayer("layer", [slot], 1, 4, "cpu")
    after_load = resident() - before
    unit.allocate().fill_(1)
    gathered = resident() - before
    unit.free()
    after_drop = resident() - before
    assert after_load == pytest.approx(size / 4, abs=4 << 20) and after_drop == pytest.approx(size / 4, abs=4 << 20)
    assert gathered == pytest.approx(size * 5 / 4, abs=4 << 20)


def test_one_changed_bit_changes_the_digest() -> None:
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
