"""LoftQ initialization: adapters start as the quantization error."""

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


def init_layers(folder: Path, scheme: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return (weight, dequantized weight, adapter delta) for each quantized layer."""
    weights = load_file(folder / "model.safetensors")
    model = add_lora(load_base(locate(str(folder)), torch.float32, "cpu", quantization=scheme), SECTION, None)
    lora.init_loftq(model, locate(str(folder)))
    layers = []
    for path, module in model.get_base_model().named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, QuantizedLinear):
            delta = module.get_delta_weight("default").detach()
            layers.append((weights[f"{path}.weight"], base.dequantize().detach(), delta))
    return layers


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_adapter_is_best_low_rank_approximation_of_quantization_error(tiny_folder: Path, scheme: str) -> None:
    torch.manual_seed(0)
    layers = init_layers(tiny_folder, scheme)
    assert len(layers) == 14
    for weight, dequantized, delta in layers:
        error = weight - dequantized
        optimum = torch.linalg.svdvals(error)[8:].norm()  # over all matrices of rank 8 (Eckart and Young)
        assert (error - delta).norm() < 1.01 * optimum < error.norm()


def test_first_loss_is_nearer_to_16_bit(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    common = {"model": tiny_folder, "data": rows_file, "lora": {"r": 8}, "model.dtype": "fp32", "train.max_steps": 1}

    def first_loss(name: str, **options: object) -> float:
        report = strop.train(**{**common, **options, "out": tmp_path / name}).report
        return float(report["loss"]["first"])

    full, usual = first_loss("full"), first_loss("nf4", **{"model.quantization": "nf4"})
    filled = first_loss("loftq", **{"model.quantization": "nf4", "lora.init": "loftq"})
    assert abs(filled - full) < abs(usual - full)


def test_unquantized_base_is_refused(tiny_folder: Path, rows_file: Path) -> None:
    with pytest.raises(InputError, match="without a quantization error"):
        strop.train(model=tiny_folder, data=rows_file, lora={"init": "loftq"})
