"""Quantized bases compute what plain PyTorch computes with the dequantized weights."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import strop
from strop.config.load import resolve
from strop.config.schema import LoraSection
from strop.engine.step import step_for
from strop.engine.train.fast import FastLoss
from strop.engine.train.plain import PlainLoss
from strop.errors import ModelError
from strop.models.families.shape import read_model_info
from strop.models.load import load_base, load_without_weights, quantized_folder
from strop.models.lora import add_lora, trainable_parameters
from strop.models.quantize import (
    QuantizedLinear,
    _quantize_by_torch,
    dequantize_layers,
    quantizable_linears,
    quantize_weight,
)
from strop.models.sharding import load_sharded
from strop.models.source import locate, prequantized
from strop.models.tensor_files import has_all_weights, quantize_folder
from strop.runs.events import read_events
from strop.runs.folder import RunFolder
from strop.training import state as checkpoints
from strop.training.optim import make_optimizer
from strop.training.state import Progress, TrainState
from tests.support import tiny

SCHEMES = ("nf4", "fp4", "int8")
ALL = 1 << 20


def make_layer(
    scheme: str, out: int = 96, into: int = 64, *, double: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    torch.manual_seed(0)
    like = nn.Linear(into, out)
    layer = QuantizedLinear(like, scheme, dtype)
    layer.load_packed(quantize_weight(like.weight.detach().to(dtype), scheme, double=double))
    return layer, like.weight.detach()


def nf4_reference(weight: Tensor, codes: Tensor) -> Tensor:
    """Quantize blockwise by absmax to the nearest code (QLoRA, arXiv:2305.14314), with fp32 constants."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale)[..., None].sub(codes).abs().argmin(-1)
    return (codes[nearest] * scale).view_as(weight)


@pytest.mark.parametrize("into", [64, 32, 80, 96])
def test_nf4_equals_reference(into: int) -> None:
    quantized_layer, weight = make_layer("nf4", into=into, double=False)
    codes = quantized_layer.constants["quant_map"]
    torch.testing.assert_close(quantized_layer.dequantize(), nf4_reference(weight, codes), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("out", "into"), [(96, 32), (96, 80), (96, 96), (64, 128), (33, 100), (130, 65)])
def test_4_bit_weights_equal_codes_times_block_constants(scheme: str, double: bool, out: int, into: int) -> None:
    """Decoded here from the packed bytes, for rows that are whole blocks and others."""
    quantized_layer, _ = make_layer(scheme, out, into, double=double)
    known = quantized_layer.constants
    scale = known["absmax"]
    if double:
        scale = known["nested_quant_map"][scale.long()] * known["nested_absmax"].repeat_interleave(256)[: len(scale)]
        scale = scale + quantized_layer._state["nested_offset"]
    packed = quantized_layer.weight.flatten()
    codes = known["quant_map"][torch.stack([packed >> 4, packed & 15], 1).flatten().long()][: out * into]
    expected = (codes * scale.repeat_interleave(64)[: out * into]).view(out, into)
    torch.testing.assert_close(quantized_layer.dequantize(), expected, rtol=1e-6, atol=1e-7)


def test_int8_equals_reference() -> None:
    quantized_layer, weight = make_layer("int8")
    scale = weight.abs().amax(1, keepdim=True)
    torch.testing.assert_close(
        quantized_layer.dequantize(), (weight / scale * 127).round() * scale / 127, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("double", [True, False])
def test_double_quantization_error_is_small(double: bool) -> None:
    quantized_layer, weight = make_layer("nf4", 512, 512, double=double)
    assert quantized_layer.constants["absmax"].dtype == (torch.uint8 if double else torch.float32)
    error = (quantized_layer.dequantize() - weight).norm() / weight.norm()
    assert 0.08 < error < 0.11  # 4 bits on uniform weights


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("out", "into"), [(96, 64), (33, 100), (7, 640), (130, 65)])  # not only multiples of 64
def test_matmul_and_gradient_equal_dequantized_weight(scheme: str, out: int, into: int) -> None:
    quantized_layer, _ = make_layer(scheme, out, into)
    weight = quantized_layer.dequantize()
    x = torch.randn(5, into, requires_grad=True)
    x_copy = x.detach().clone().requires_grad_()
    grad = torch.randn(5, out)
    (quantized_layer(x) * grad).sum().backward()
    (F.linear(x_copy, weight, quantized_layer.bias) * grad).sum().backward()
    torch.testing.assert_close(quantized_layer(x), F.linear(x_copy, weight, quantized_layer.bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, x_copy.grad, rtol=1e-5, atol=1e-5)


@pytest.fixture
def quantized(tiny_folder: Path) -> Callable[..., nn.Module]:
    def load(scheme: str, resident: int = 0, dtype: torch.dtype = torch.float32, **lora: Any) -> nn.Module:
        base = load_base(locate(str(tiny_folder)), dtype, "cpu", quantization=scheme, resident_layers=resident)
        torch.manual_seed(1)
        model = add_lora(base, LoraSection(r=4, alpha=8, **lora), None)
        for name, weight in trainable_parameters(model).items():
            if "lora_B" in name:
                nn.init.normal_(weight, 0, 0.05)
        return model

    return load


def gradients(model: nn.Module, loss: Callable[[Any], Tensor], seed: int = 0) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    value = loss(tiny.examples(6, seed=seed))
    value.backward()
    return value.item(), {
        name: weight.grad.clone() for name, weight in trainable_parameters(model).items() if weight.grad is not None
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fast_and_plain_step_equal_dequantized_model(quantized: Callable[..., nn.Module], scheme: str) -> None:
    """Loss and gradients agree to 1e-5 in fp32; streamed and resident layers are bit-identical."""
    truth_model = quantized(scheme)
    dequantize_layers(truth_model, ALL)
    assert not any(isinstance(module, QuantizedLinear) for module in truth_model.modules())
    loss, truth = gradients(truth_model, PlainLoss(truth_model).token_loss)
    results = {}
    for resident in (0, 1, ALL):
        model = quantized(scheme, resident)
        quantized_count = sum(isinstance(module, QuantizedLinear) for module in model.modules())
        assert quantized_count == 7 * {0: 2, 1: 1, ALL: 0}[resident]
        step = step_for(model)
        assert step.name == "fast", step.why
        results[resident] = gradients(model, step.token_loss)
    model = quantized(scheme)
    plain_loss, plain = gradients(model, PlainLoss(model).token_loss)
    assert results[0][0] == pytest.approx(loss, rel=1e-5) and plain_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in truth.items():
        for other_gradient in (results[0][1][name], plain[name]):
            assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm(), name
        for resident in (1, ALL):
            assert torch.equal(results[0][1][name], results[resident][1][name])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bf16_error_is_that_of_eager_bf16(quantized: Callable[..., nn.Module], scheme: str) -> None:
    """The reference is fp32 on the bf16 weights. Errors are summed over 12 batches, since single ones vary."""
    eager, whole = quantized(scheme, ALL, torch.bfloat16), quantized(scheme, ALL, torch.bfloat16).float()
    models = {resident: quantized(scheme, resident, torch.bfloat16) for resident in (0, ALL)}
    losses: dict[Any, tuple[nn.Module, Any]] = {"eager": (eager, PlainLoss(eager).token_loss)}
    losses |= {resident: (model, step_for(model).token_loss) for resident, model in models.items()}
    errors = dict.fromkeys(losses, 0.0)
    for seed in range(12):
        _, truth = gradients(whole, PlainLoss(whole).token_loss, seed)
        for name, (model, loss) in losses.items():
            result = gradients(model, loss, seed)[1]
            errors[name] += sum(float((result[weight] - truth[weight]).norm() ** 2) for weight in truth)
    assert errors[0] == errors[ALL] <= 1.1 * errors["eager"], errors


@pytest.mark.parametrize("resident", [0, ALL])
@pytest.mark.parametrize("path", ["fast", "plain"])
def test_evaluation_and_save_do_not_change_gradients(
    quantized: Callable[..., nn.Module], path: str, resident: int, tmp_path: Path
) -> None:
    model: Any = quantized("nf4", resident, torch.bfloat16)
    loss: Any = FastLoss(model) if path == "fast" else PlainLoss(model)
    _, before = gradients(model.train(), loss.token_loss)
    model.eval()
    with torch.no_grad():
        loss.token_loss(tiny.examples(3))
        model.generate(torch.arange(5, 12)[None], max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    weights = trainable_parameters(model)
    state = TrainState(
        weights, make_optimizer(weights, resolve(None, {"model": "m", "data": "d"}).recipe.train), Progress()
    )
    (tmp_path / "run").mkdir()
    checkpoints.save_checkpoint(RunFolder(tmp_path / "run"), state)
    _, after = gradients(model.train(), loss.token_loss)
    assert before and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
def test_linear4bit_of_bitsandbytes_loses_its_gradient() -> None:
    """Show why strop has its own layer: on AVX512-BF16, Linear4bit loses its gradient after a forward in eval mode."""
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("needs a CPU with AVX512-BF16")
    theirs = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    theirs.to("cpu")

    def gradient() -> Tensor | None:
        x = torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True)
        y = theirs.train()(x)
        if not y.requires_grad:
            return None
        y.sum().backward()
        return x.grad

    before = gradient()
    assert before is not None
    with torch.no_grad():
        theirs.eval()(torch.ones(1, 64, dtype=torch.bfloat16))
    after = gradient()
    assert after is None or not torch.equal(before, after)


def test_head_and_embedding_stay_in_16_bit(tiny_folder: Path) -> None:
    names = quantizable_linears(load_without_weights(locate(str(tiny_folder))))
    assert len(names) == 14 and not any("lm_head" in name or "embed" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_quantization_equals_bitsandbytes_on_cpu(scheme: str, double: bool, dtype: torch.dtype) -> None:
    """Covers random values, codes, midpoints between codes, and blocks of zeros."""
    torch.manual_seed(0)
    weight = torch.randn(130, 128)
    code = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    weight[0, :16], weight[1, :15], weight[2] = code, (code[1:] + code[:-1]) / 2, 0
    weight[0, 16:], weight[1, 15:] = 1, 1
    typed = weight.to(dtype)
    expected, result = quantize_weight(typed, scheme, double=double), _quantize_by_torch(typed, scheme, double, "cpu")
    assert expected.keys() == result.keys()
    for name, part in expected.items():
        assert torch.equal(part, result[name]) and part.dtype == result[name].dtype, name


def test_quantization_falls_back_to_cpu_without_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []

    def full(weight: Tensor, scheme: str, double: bool, device: str) -> Any:
        requests.append(device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("strop.models.quantize._quantize_by_torch", full)
    weight, odd = torch.randn(3, 64), torch.randn(3, 65)
    for matrix in (weight, odd):  # the second ends within a block
        result = quantize_weight(matrix, "nf4", device="cuda:1")
        assert all(torch.equal(part, result[name]) for name, part in quantize_weight(matrix, "nf4").items())
    assert requests == ["cuda:1"]
    monkeypatch.setattr("strop.models.quantize._quantize_by_torch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize_weight(weight, "int8", device="cuda")


def test_concurrent_loads_quantize_once(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes share the cache: one writes while the others wait."""
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    source = locate(str(tiny_folder))
    written = []

    def quantize_slowly(*args: Any) -> None:
        written.append(args[2])
        time.sleep(0.2)
        quantize_folder(*args)

    monkeypatch.setattr("strop.models.load.quantize_folder", quantize_slowly)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(quantized_folder, source, "nf4", True, torch.float32) for _ in range(3)]
        folders = {future.result() for future in futures}
    assert written == list(folders) and has_all_weights(written[0])


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "index"])
def test_damaged_cache_is_rebuilt(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    arguments = (locate(str(tiny_folder)), "nf4", True, torch.float32)
    folder = quantized_folder(*arguments)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    file = folder / ("model.safetensors.index.json" if damage == "index" else "model-00001.safetensors")
    file.write_bytes(b"" if damage in ("empty", "index") else whole[file.name][:-100])
    if damage == "gone":
        file.unlink()
    assert quantized_folder(*arguments) == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


@pytest.mark.parametrize("scheme", SCHEMES)
def test_second_load_reads_the_cache(
    tiny_folder: Path, scheme: str, monkeypatch: pytest.MonkeyPatch, own_cache: None
) -> None:
    source = locate(str(tiny_folder))
    first = load_base(source, torch.bfloat16, "cpu", quantization=scheme)
    monkeypatch.setattr("strop.models.load.quantize_folder", pytest.fail)
    second = load_base(source, torch.bfloat16, "cpu", quantization=scheme)
    for (name, weight), (_, again) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(weight, again), name
    kinds = {type(module) for module in second.modules()}
    assert QuantizedLinear in kinds
    assert {p.dtype for p in second.parameters()} == {torch.bfloat16, torch.int8 if scheme == "int8" else torch.uint8}


@pytest.mark.parametrize("skipped", [[], ["lm_head", "q_proj"]])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bitsandbytes_checkpoint_loads(tiny_folder: Path, tmp_path: Path, scheme: str, skipped: list[str]) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind: dict[str, Any] = {"load_in_8bit": True}
    if scheme != "int8":
        kind = {"load_in_4bit": True, "bnb_4bit_quant_type": scheme, "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**kind, llm_int8_skip_modules=skipped or None)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "q")
    tiny.tokenizer("chatml").save_pretrained(tmp_path / "q")
    source = locate(str(tmp_path / "q"))
    assert prequantized(source.config()) == scheme
    loaded: Any = load_base(source, torch.bfloat16, "cpu", quantization=scheme)
    ours: Any = load_base(locate(str(tiny_folder)), torch.bfloat16, "cpu", quantization=scheme)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        result, same = loaded.get_submodule(name), ours.get_submodule(name).dequantize()
        if name.rpartition(".")[2] in skipped:
            assert type(result) is nn.Linear and result.weight.dtype == torch.bfloat16
            assert 0 < (result.weight - same).abs().max() < 0.2
            continue
        # bitsandbytes rounds to 8 bit from fp16, strop from fp32
        assert torch.allclose(result.dequantize(), same, atol=0.02 if scheme == "int8" else 0)
    with pytest.raises(ModelError, match="already"):
        load_base(source, torch.bfloat16, "cpu")
    assert strop.load(source.name, device="cpu").quantization == scheme


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_packed_bytes_stored_as_floats_load(tiny_folder: Path, tmp_path: Path, storage: str) -> None:
    # FSDP needs this storage (bnb_4bit_quant_storage).
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    how: dict[str, Any] = {"quantization": "nf4", "double": False}
    loaded = load_base(locate(str(tmp_path)), torch.bfloat16, "cpu", **how)
    ours = load_base(locate(str(tiny_folder)), torch.bfloat16, "cpu", **how)
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(*(cast(Any, model).get_submodule(name).dequantize() for model in (loaded, ours)))


def _edit_state(old: bytes, new: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda state: torch.tensor(list(bytes(state.tolist()).replace(old, new)), dtype=torch.uint8)


WEIGHT = "model.layers.0.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
DAMAGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "half of its layers": ("nf4", {"config": {"num_hidden_layers": 1}}, "not part of the model"),
    "a bias too many": ("nf4", {"model.layers.0.mlp.up_proj.bias": lambda _: torch.ones(64)}, "are not part of the"),
    "nothing quantized": ("nf4", {"plain": True}, "its weights are quantized, but none is"),
    "NaN": ("nf4", {f"{WEIGHT}.nested_absmax": lambda it: it * torch.nan}, "holds NaN"),
    "few constants": ("nf4", {f"{WEIGHT}.absmax": lambda it: it[:-4].clone()}, "absmax has 28 elements, 32 expected"),
    "no constants": ("nf4", {f"{WEIGHT}.absmax": None}, "absmax has 0 elements, 32 expected"),
    "no constants of constants": ("nf4", {f"{WEIGHT}.nested_absmax": None}, "nested_absmax has 0 elements"),
    "few bytes": ("nf4", {WEIGHT: lambda it: it[:-8].clone()}, "weight has 1016 elements, 1024 expected"),
    "other blocks": ("nf4", {STATE: _edit_state(b": 64,", b": 128,")}, "absmax has 32 elements, 16 expected"),
    "no blocks": ("nf4", {STATE: _edit_state(b": 64,", b": 0,")}, "blocks of 0"),
    "an invalid state": ("nf4", {STATE: lambda _: torch.tensor([91, 93]).byte()}, "is not an object"),
    "int8, NaN": ("int8", {"model.layers.0.mlp.up_proj.SCB": lambda it: it * torch.nan}, "holds NaN"),
    "int8, one scale": (
        "int8",
        {"model.layers.0.mlp.up_proj.SCB": lambda it: it[:1].clone()},
        "SCB has 1 elements, 64",
    ),
    "int8, no scale": ("int8", {"model.layers.0.mlp.up_proj.SCB": None}, "is stored as I8"),
    "int8, on its side": ("int8", {WEIGHT: lambda it: it.t().contiguous()}, "of another shape, first model.layers.0"),
    "int8, an old layout": ("int8", {f"{WEIGHT}_format": lambda _: torch.tensor(2).byte()}, "in an old 8-bit layout"),
}


@pytest.mark.parametrize("way", ["streamed", "share"])
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_damaged_quantized_checkpoint_is_refused(kind: str, way: str, tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    scheme, changes, message = DAMAGE[kind]
    how: dict[str, Any] = {"load_in_8bit": True}
    if scheme == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path)
    file, about = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights = load_file(tiny_folder / file.name if changes.get("plain") else file)
    about.write_text(json.dumps({**json.loads(about.read_text()), **changes.get("config", {})}))
    for name, change in changes.items():
        if name.startswith("model."):
            changed = None if change is None else change(weights.get(name))
            weights = {key: tensor for key, tensor in weights.items() if key != name}
            weights |= {} if changed is None else {name: changed}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        if way == "share":
            load_sharded(locate(str(tmp_path)), torch.float32, "cpu", 0, 1, quantization=scheme)
        else:
            load_base(locate(str(tmp_path)), torch.float32, "cpu", quantization=scheme)


def test_missing_weight_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "m"
    tiny.save_tiny(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"first model\.layers\.0\.mlp\.up_proj\.weight"):
        load_base(locate(str(folder)), torch.float32, "cpu", quantization="nf4")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_streamed_and_resident_runs_agree(tiny_folder: Path, rows_file: Path, tmp_path: Path, scheme: str) -> None:
    losses = {}
    for resident in (0, 2):
        out = tmp_path / str(resident)
        strop.train(
            model=str(tiny_folder), data=str(rows_file), out=out, train={"max_steps": 4}, lora={"r": 4},
            **{"model.quantization": scheme, "model.resident_layers": resident, "model.dtype": "fp32"},
        )  # fmt: skip
        (start,) = [e for e in read_events(out / "events.jsonl") if e["event"] == "start"]
        assert start["parameters"]["all"] == read_model_info(str(tiny_folder)).parameters  # elements, not packed bytes
        losses[resident] = [e["loss"] for e in read_events(out / "events.jsonl") if e["event"] == "step"]
    assert losses[0] == losses[2] and losses[0][-1] < losses[0][0]
    prompt = torch.arange(5, 25)[None]
    with torch.no_grad():
        same = strop.load(out, dtype="fp32").module(prompt).logits
        streamed = strop.load(out, dtype="fp32", quantization=scheme).module(prompt).logits
        other = strop.load(out, dtype="fp32", quantization="none").module(prompt).logits
    torch.testing.assert_close(same, streamed, rtol=1e-5, atol=1e-5)
    assert (same - other).abs().max() > 1e-4  # the 16-bit base differs from the one trained on


def test_out_of_memory_falls_back_to_streaming(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If dequantized weights do not fit, the run streams them with the same losses, also after a resume."""
    options: dict[str, Any] = {
        "model": str(tiny_folder), "data": str(rows_file), "lora": {"r": 4}, "model.quantization": "nf4",
        "model.resident_layers": 2, "model.dtype": "fp32", "train": {"max_steps": 4, "save_steps": 1, "micro_batch": 1},
    }  # fmt: skip

    def losses(run: str) -> list[float]:
        return [event["loss"] for event in read_events(tmp_path / run / "events.jsonl") if event["event"] == "step"]

    strop.train(out=tmp_path / "whole", **options)
    compute, tight = FastLoss.token_loss, []

    def starved(loss: FastLoss, examples: Any) -> torch.Tensor:
        resident = any(type(base) is torch.nn.Linear for layer in loss._layers for base in layer.mlp.down.bases)
        tight.append(resident)
        if resident:
            raise torch.OutOfMemoryError("out of memory")
        return compute(loss, examples)

    def killed(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(FastLoss, "token_loss", starved)
    with pytest.raises(strop.errors.Stopped, match="2 steps are complete, 2 of them saved"):
        strop.train(out=tmp_path / "cut", callback=killed, **options)
    shrunk = [event["to"] for event in read_events(tmp_path / "cut" / "events.jsonl") if event["event"] == "shrink"]
    assert "when they are needed" in shrunk[-1] and tight[-1] is False
    tight.clear()
    strop.resume(tmp_path / "cut")
    assert losses("cut") == losses("whole") and True not in tight


def test_missing_bitsandbytes_names_a_fix(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError, match="bitsandbytes") as raised:
        quantize_weight(torch.randn(64, 64), "nf4")
    assert "--model.quantization none" in raised.value.fix


def test_adapter_loads_with_its_quantization_settings(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    strop.train(
        model=str(tiny_folder), data=str(rows_file), out=tmp_path / "r", train={"max_steps": 1},
        **{"model.quantization": "nf4", "model.double_quantization": False, "model.dtype": "fp32"},
    )  # fmt: skip
    loaded = strop.load(tmp_path / "r", dtype="fp32").module.get_base_model().model.layers[0].mlp.down_proj.base_layer
    weights = {
        double: load_base(locate(str(tiny_folder)), torch.float32, "cpu", quantization="nf4", double=double)
        .get_submodule("model.layers.0.mlp.down_proj")
        .dequantize()
        for double in (False, True)
    }
    assert torch.equal(loaded.weight, weights[False]) and not torch.equal(loaded.weight, weights[True])
