"""Adapters that begin as what quantization lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import strop
from strop.config.schema import LoraSection
from strop.errors import InputError
from strop.models import lora
from strop.models.load import load_base
from strop.models.lora import add_lora
from strop.models.quantize import QuantizedLinear
from strop.models.source import locate

SECTION = LoraSection(r=8, alpha=32.0)


def moved(folder: Path, scheme: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(weight, what the quantized layer holds, what its adapter adds) for each quantized layer."""
    weights = load_file(folder / "model.safetensors")
    model = add_lora(load_base(locate(str(folder)), torch.float32, "cpu", quantization=scheme), SECTION, None)
    lora.init_loftq(model, locate(str(folder)))
    found = []
    for path, module in model.get_base_model().named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, QuantizedLinear):
            added = module.get_delta_weight("default").detach()
            found.append((weights[f"{path}.weight"], base.dequantize().detach(), added))
    return found


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_it_is_the_nearest_of_its_rank_to_what_was_lost(tiny_folder: Path, scheme: str) -> None:
    torch.manual_seed(0)
    layers = moved(tiny_folder, scheme)
    assert len(layers) == 14
    for weight, held, added in layers:
        lost = weight - held
        least = torch.linalg.svdvals(lost)[8:].norm()  # no matrix of rank 8 is nearer (Eckart and Young)
        assert (lost - added).norm() < 1.01 * least < lost.norm()


def test_a_run_begins_nearer_to_16_bit(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    common = {"model": tiny_folder, "data": rows_file, "lora": {"r": 8}, "model.dtype": "fp32", "train.max_steps": 1}

    def first_loss(name: str, **given: object) -> float:
        report = strop.train(**{**common, **given, "out": tmp_path / name}).report
        return float(report["loss"]["first"])

    full, usual = first_loss("full"), first_loss("nf4", **{"model.quantization": "nf4"})
    filled = first_loss("loftq", **{"model.quantization": "nf4", "lora.init": "loftq"})
    assert abs(filled - full) < abs(usual - full)


def test_refused_where_nothing_was_lost(tiny_folder: Path, rows_file: Path) -> None:
    with pytest.raises(InputError, match="nothing was lost"):
        strop.train(model=tiny_folder, data=rows_file, lora={"init": "loftq"})
