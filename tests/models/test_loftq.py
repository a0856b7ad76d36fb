"""LoftQ initialization: adapters start as the quantization error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import strop
from strop.config.schema import LoraSection
from strop.errors import InputError, ModelError
from strop.exporting.adapters import combine
from strop.models import lora
from strop.models.load import load_base
from strop.models.lora import add_lora
from strop.models.quantize import QuantizedLinear
from strop.models.source import locate
from strop.serve.vllm import _check_adapter
from tests.support import tiny, tiny_families

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


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])  # weights of experts are (out, in) and (in, out)
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_adapters_of_experts_approximate_each_error(kind: str, scheme: str, tmp_path: Path) -> None:
    tiny_families.save(kind, tmp_path)
    torch.manual_seed(0)
    source = locate(str(tmp_path))
    section = LoraSection(r=2, alpha=8.0, target_modules="experts")
    whole = dict(load_base(source, torch.float32, "cpu").named_parameters())
    model = add_lora(load_base(source, torch.float32, "cpu", quantization=scheme), section, None)
    lora.init_loftq(model, source)
    wrappers = {
        f"{path.partition('.base_layer')[0]}.{module.parameter_name}": module
        for path, module in model.get_base_model().named_modules()
        if isinstance(module, ParamWrapper)
    }
    assert {name.rpartition(".")[2] for name in wrappers} == {"gate_up_proj", "down_proj"}
    for name, wrapper in wrappers.items():
        packed = wrapper.get_base_layer().packed[wrapper.parameter_name]
        errors = whole[name].detach() - packed.dequantize_all()
        for error, delta in zip(errors, wrapper.get_delta_weight("default").detach(), strict=True):
            optimum = torch.linalg.svdvals(error)[2:].norm()
            assert (error - delta).norm() < 1.01 * optimum < error.norm(), name


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


def test_adapter_stays_on_its_quantized_base(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """Also one that continues it. The card's code loads that base; what has it in 16 bit refuses the adapter."""
    options = {"model": tiny_folder, "data": rows_file, "model.quantization": "nf4", "train.max_steps": 2}
    first = strop.train(**{**options, "lora.init": "loftq", "out": tmp_path / "first"})
    more = strop.train(**{**options, "model.adapter": first.folder, "out": tmp_path / "more"})
    usual = strop.train(**options, out=tmp_path / "usual")
    for run, needs_it in ((first, True), (more, True), (usual, False)):
        adapter = run.folder / "adapter"
        card = (adapter / "README.md").read_text(encoding="utf-8")
        assert ('bnb_4bit_quant_type="nf4"' in card) == needs_it and ("vllm serve" in card) != needs_it
        if needs_it:
            with pytest.raises(ModelError, match="belongs to its base in nf4; a GGUF file has it in 16 bit"):
                strop.export("gguf", run.folder, tmp_path / "a.gguf", adapter=True, measure=False)
            with pytest.raises(ModelError, match="vLLM has it in 16 bit"):
                _check_adapter(adapter, locate(str(tiny_folder)))
        else:
            assert _check_adapter(adapter, locate(str(tiny_folder))) == 16
    other = strop.train(**{**options, "model.quantization": "int8", "out": tmp_path / "other"})
    with pytest.raises(ModelError, match=r"began with LoftQ on its base in nf4, and .*other.* has another base"):
        combine([str(other.folder), str(first.folder)], [0.5, 0.5], tmp_path / "mixed")
    combine([str(usual.folder), str(first.folder)], [0.5, 0.5], tmp_path / "sum")
    with pytest.raises(ModelError, match="vLLM has it in 16 bit"):
        _check_adapter(tmp_path / "sum", locate(str(tiny_folder)))


def test_code_of_the_card_loads_the_model_that_was_trained(rows_file: Path, tmp_path: Path) -> None:
    base = tiny.save_tiny(tmp_path / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.config(hidden_size=64, intermediate_size=128)).save_pretrained(base)  # rows of whole blocks
    options = {"model.quantization": "nf4", "lora.init": "loftq", "train.max_steps": 4, "model.dtype": "fp32"}
    run = strop.train(model=base, data=rows_file, out=tmp_path / "run", **options)
    card = (run.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    code = card.split("```python")[2].partition("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("BASE", str(base)).replace("THIS_FOLDER", str(run.folder / "adapter")), scope)
    tuned, ids = strop.load(run.folder), torch.tensor([[3, 7, 11, 5, 9]])
    with torch.no_grad():
        theirs, ours = (model(input_ids=ids).logits for model in (scope["model"].train(), tuned.module))
    assert torch.allclose(theirs, ours, atol=1e-3)
