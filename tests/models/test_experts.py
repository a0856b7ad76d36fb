"""Adapters on a mixture's experts: PEFT's values and format, gradients of chosen experts, 4 and 8 bit, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import strop
from strop.config.schema import LoraSection
from strop.engine.train.plain import PlainLoss
from strop.errors import ModelError
from strop.exporting.adapters import combine, compare, compute_norm
from strop.exporting.merge import merge
from strop.models.experts import QuantizedExperts
from strop.models.introspect import linear_kinds
from strop.models.load import load_base, load_without_weights, restore_packed_weights
from strop.models.lora import add_lora, check_lora, trainable_parameters
from strop.models.source import locate
from strop.models.tensor_files import CheckpointLayout, CheckpointTensors
from tests.support import tiny_families
from tests.support.tiny import examples, write_rows

MIXTURES = ("gpt_oss", "qwen3_moe", "mixtral")
IDS = torch.randint(5, 500, (2, 24), generator=torch.Generator().manual_seed(0))


def tuned(kind: str, folder: Path | None = None, **load: Any) -> Any:
    """Return a mixture with adapters on all targets and nonzero B."""
    if folder is not None:
        base: Any = load_base(locate(str(folder)), torch.float32, "cpu", **load)
    else:
        base = tiny_families.build(kind)
    torch.manual_seed(1)
    model = add_lora(base, LoraSection(r=2, alpha=4), None)
    for name, weight in trainable_parameters(model).items():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)
    return model.eval()


@pytest.mark.parametrize("kind", MIXTURES)
def test_output_equals_peft_and_chosen_experts_get_gradients(kind: str) -> None:
    model = tuned(kind)
    ours = model(input_ids=IDS).logits
    ours.square().mean().backward()
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper) and module.num_experts > 1]
    assert len(wrappers) == 4
    moved = torch.stack([w.lora_A["default"].weight.grad.view(w.num_experts, -1).abs().sum(1) > 0 for w in wrappers])
    for module in wrappers:
        module.__dict__.pop("forward", None)  # back to PEFT's implementation, which adds B A to the whole parameter
    theirs = model(input_ids=IDS).logits
    assert torch.allclose(ours, theirs, atol=2e-5) and not torch.equal(ours, theirs)
    model.zero_grad()
    theirs.square().mean().backward()
    chosen = torch.stack([w.lora_A["default"].weight.grad.view(w.num_experts, -1).abs().sum(1) > 0 for w in wrappers])
    assert torch.equal(moved, chosen) and moved.any(0).all()


def test_small_lora_updates_survive_bf16() -> None:
    """B is so small that W + B A rounds to W in bf16 almost everywhere; two separate matmuls keep the update."""
    model = tuned("mixtral")
    wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper) and module.num_experts > 1)
    experts: Any = wrapper.get_base_layer()
    for name, weight in wrapper.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(1e-3)
    torch.manual_seed(2)
    index, share = torch.stack([torch.arange(4000) % 4, (torch.arange(4000) + 1) % 4], 1), torch.full((4000, 2), 0.5)
    x = torch.randn(4000, 32).bfloat16()
    experts.bfloat16()
    experts.float()  # the same values in fp32
    with torch.no_grad():
        expected = wrapper(x.float(), index, share) - experts(x.float(), index, share)
        experts.bfloat16()
        before = experts.down_proj.clone()
        assert (before + wrapper.get_delta_weight("default") == before).float().mean() > 0.9
        change = (wrapper(x, index, share.bfloat16()) - experts(x, index, share.bfloat16())).float()
    kept_share = float((change * expected).sum() / expected.square().sum())
    assert 0.7 < kept_share < 1.3


@pytest.mark.parametrize(("kind", "dtype"), [("gpt_oss", "fp32"), ("qwen3_moe", "bf16")])
def test_router_can_be_trained_in_full(kind: str, dtype: str, tmp_path: Path) -> None:
    """It returns three values, of which one is no number that a gradient could have."""
    base, rows = tmp_path / "base", write_rows(tmp_path / "rows.jsonl", 6)
    tiny_families.save(kind, base)
    name = "router" if kind == "gpt_oss" else "gate"
    strop.train(
        model=base, data=rows, out=tmp_path / "run", train={"max_steps": 2, "learning_rate": 1e-2},
        **{"model.dtype": dtype, "lora.r": 2, "lora.modules_to_save": [name]},
    )  # fmt: skip
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    before = load_file(base / "model.safetensors")
    routers = {key.removeprefix("base_model.model."): weight for key, weight in saved.items() if f"{name}.w" in key}
    assert len(routers) == 2 and all((before[key] != weight).any() for key, weight in routers.items())
    ours = strop.load(tmp_path / "run", dtype="fp32").module
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "run/adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=2e-5)
    merge(str(tmp_path / "run"), tmp_path / "merged", dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=2e-5)


@pytest.mark.parametrize("kind", MIXTURES)
def test_run_trains_loads_in_peft_and_merges(kind: str, tmp_path: Path) -> None:
    base, rows = tmp_path / "base", write_rows(tmp_path / "rows.jsonl", 6)
    tiny_families.save(kind, base)
    run = strop.train(
        model=base, data=rows, out=tmp_path / "run", train={"max_steps": 2, "learning_rate": 1e-2},
        **{"model.dtype": "fp32", "lora.r": 2},
    )  # fmt: skip
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    changed = [key for key, weight in saved.items() if "experts" in key and "lora_B" in key and weight.any()]
    assert len(changed) == 4
    ours = strop.load(tmp_path / "run", dtype="fp32").module
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "run/adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=2e-5)
    merged = merge(str(tmp_path / "run"), tmp_path / "merged", dtype="fp32")
    assert merged.parity is not None and merged.parity.passed
    assert run.report["steps"] == 2
    comparison = compare(str(run.folder), str(run.folder))
    assert comparison["cosine"] == pytest.approx(1) and {"gate_up_proj", "down_proj"} <= set(comparison["modules"])
    changes = [m.get_delta_weight("default") for m in theirs.modules() if isinstance(m, LoraLayer)]
    expected_norm = sum(float(change.detach().square().sum()) for change in changes) ** 0.5
    assert compute_norm(str(run.folder)) == pytest.approx(expected_norm, rel=1e-4)
    with pytest.raises(ModelError, match="mixture's experts"):
        combine([str(run.folder)] * 2, [1, 1], tmp_path / "sum")


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_packed_and_dequantized_experts_agree(kind: str, scheme: str, tmp_path: Path) -> None:
    tiny_families.save(kind, tmp_path / "base")
    streamed, resident = (tuned(kind, tmp_path / "base", quantization=scheme, resident_layers=n) for n in (0, 2))
    packed = [module for module in streamed.modules() if isinstance(module, QuantizedExperts)]
    assert len(packed) == 2 and not any(isinstance(module, QuantizedExperts) for module in resident.modules())
    results = []
    for model in (streamed, resident):
        logits = model(input_ids=IDS).logits
        logits.square().mean().backward()
        results.append((logits.detach(), {name: weight.grad for name, weight in trainable_parameters(model).items()}))
    assert torch.allclose(results[0][0], results[1][0], atol=2e-5)
    assert all(torch.allclose(grad, results[1][1][name], atol=1e-5) for name, grad in results[0][1].items())
    with torch.no_grad():
        restore_packed_weights(resident.get_base_model(), locate(str(tmp_path / "base")), scheme, True, torch.float32)
        assert any(isinstance(module, QuantizedExperts) for module in resident.modules())
        assert torch.allclose(resident(input_ids=IDS).logits, results[0][0], atol=2e-5)
    full = tuned(kind, tmp_path / "base")(input_ids=IDS).logits
    assert not torch.allclose(results[0][0], full, atol=1e-4)  # quantization changed the weights


def test_target_sets_of_mixture_and_unsupported_options() -> None:
    model = tiny_families.build("qwen3_moe")
    kinds = {kind.name: kind for kind in linear_kinds(model)}
    assert kinds["experts.gate_up_proj"].type == "Experts" and kinds["experts.down_proj"].count == 8
    assert "experts.down_proj" not in check_lora(model, LoraSection(target_modules="attention"))
    assert {"experts.gate_up_proj", "q_proj"} <= set(check_lora(model, LoraSection()))
    assert "experts.down_proj" in check_lora(model, LoraSection(target_modules=["experts"]))
    for option in ({"dropout": 0.05}, {"use_dora": True}):
        with pytest.raises(ModelError, match="mixture's experts"):
            check_lora(model, LoraSection(**option))
    check_lora(model, LoraSection(target_modules="attention", dropout=0.05))


def test_training_notes_and_counts_expert_parameters(tmp_path: Path) -> None:
    tiny_families.save("qwen3_moe", tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 6)

    def train(name: str, targets: str) -> tuple[list[str], dict[str, int]]:
        events: list[dict[str, Any]] = []
        strop.train(
            model=tmp_path / "base", data=rows, out=tmp_path / name, train={"max_steps": 1}, callback=events.append,
            **{"model.dtype": "fp32", "lora.target_modules": targets},
        )  # fmt: skip
        notes = [event["text"] for event in events if event["event"] == "note"]
        return notes, next(event["parameters"] for event in events if event["event"] == "start")

    notes, parameters = train("attention", "attention")
    assert any("have no adapters" in note for note in notes) and "experts" not in parameters
    assert any("load-balancing loss: off" in note for note in notes)
    notes, parameters = train("all", "all-linear")
    assert not any("have no adapters" in note for note in notes)
    assert 0 < parameters["experts"] < parameters["trainable"] and parameters["active"] < parameters["all"]


def test_load_balancing_loss_follows_config() -> None:
    rows = examples(4)
    model = tiny_families.build("mixtral")
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    with_it = PlainLoss(model)
    model.config.output_router_logits = False
    without = PlainLoss(model)
    model.config.output_router_logits = True
    model.eval()
    assert torch.equal(with_it.token_loss(rows), without.token_loss(rows))
    model.train()
    weight = sum(float(example.weights.sum()) for example in rows)
    longest = max(len(example) for example in rows)
    ids, mask = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest, dtype=torch.long)
    for n, example in enumerate(rows):
        ids[n, : len(example)], mask[n, : len(example)] = torch.from_numpy(example.ids), 1
    aux = model(input_ids=ids, attention_mask=mask).aux_loss
    assert (
        torch.allclose(with_it.token_loss(rows) - without.token_loss(rows), 0.5 * aux * weight, rtol=1e-4) and aux > 0
    )


def test_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    tiny_families.save("gpt_oss", tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    common = {"model.dtype": "fp32", "lora.r": 2, "train.batch_size": 2, "train.lr_scheduler": "constant"}
    whole, cut = (
        strop.train(
            model=tmp_path / "base", data=rows, out=tmp_path / str(n), **common, **{"train.max_steps": n}
        ).folder
        for n in (4, 2)
    )
    (cut / "report.json").unlink()
    (cut / "report.html").unlink()
    strop.resume(cut, allow_changed=["max_steps"], **{"train.max_steps": 4})
    saved = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(weight, saved[1][name]) for name, weight in saved[0].items())


def test_expert_tensors_round_trip_between_checkpoint_and_model(tmp_path: Path) -> None:
    tiny_families.save("mixtral", tmp_path)
    tensors = CheckpointTensors(tmp_path)
    layout = CheckpointLayout(load_without_weights(locate(str(tmp_path))), tensors)
    group = layout.group_of("model.layers.0.mlp.experts.gate_up_proj")
    assert len(group.names) == 8 and "model.layers.0.block_sparse_moe.experts.3.w1.weight" in group.names
    read = layout.read(group, tensors.get)
    assert read["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 96, 32)
    written = layout.write(group, read)
    assert all(torch.equal(tensors.get(name), tensor) for name, tensor in written.items())
    with pytest.raises(KeyError):
        layout.group_of("model.layers.9.mlp.experts.gate_up_proj")
