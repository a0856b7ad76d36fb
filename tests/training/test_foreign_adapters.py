"""Adapters saved by plain peft, some of them edited: trained further, loaded, merged, or refused with a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import strop
from strop.errors import ModelError
from strop.exporting.adapter_weights import load_merger
from strop.exporting.adapters import combine
from strop.models.source import locate
from tests.models.walk import QUICK
from tests.support import tiny, tiny_families


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save_tiny(tmp_path / "base")


def saved(base: Path, folder: Path, **options: Any) -> Path:
    """Save a plain peft adapter with nonzero B on a tiny base."""
    model = tiny.model()
    model.name_or_path = str(base)
    torch.manual_seed(1)
    tuned: Any = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    for weight in tuned.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    tuned.save_pretrained(folder)
    return folder


def edit(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def goes_on(base: Path, adapter: Path, folder: Path) -> dict[str, Any]:
    """Return the recipe's lora section of a run that starts from an adapter; check that the plan agrees."""
    rows = tiny.write_rows(folder.parent / "rows.jsonl", 4)
    strop.train(model=base, data=rows, out=folder, adapter=str(adapter), **QUICK)
    text: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text())["lora"]
    planned = strop.plan(model=base, data=rows, adapter=str(adapter), memory=8 << 30, **QUICK).resolved.recipe.lora
    assert planned.target_modules == text["target_modules"]
    return text


def test_adapter_with_a_regex_of_layers_can_be_trained(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=r".*layers\.1.*(q_proj|up_proj)")
    assert goes_on(base, adapter, tmp_path / "run")["target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize("targets", ["experts", ["experts.down_proj", "q_proj"]])
def test_adapter_on_experts_can_be_trained(targets: Any, tmp_path: Path) -> None:
    tiny_families.save("qwen3_moe", tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 4)
    strop.train(model=tmp_path / "base", data=rows, out=tmp_path / "a", **{**QUICK, "lora.target_modules": targets})
    result = goes_on(tmp_path / "base", tmp_path / "a", tmp_path / "b")["target_modules"]
    assert result == (["experts.down_proj", "experts.gate_up_proj"] if targets == "experts" else targets)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_name_or_path": None}, "does not say which model it was trained on"),
        ({"r": None}, "r is None, not a number"),
        ({"r": 9}, r"does not fit .*size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', not a number"),
        ({"alora_invocation_tokens": [5, 6]}, "does not act on every token"),
        ({"arrow_config": {"top_k": 1}}, "does not act on every token"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers of its base"),
        ({"kasa_config": {"beta": 1e-4}}, "changes the weights of its base"),
    ],
)
def test_invalid_adapter_config_is_refused(fields: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, **fields)
    with pytest.raises(ModelError, match=message):
        strop.load(adapter, dtype="fp32", device="cpu")


@pytest.mark.parametrize(
    ("name", "message"), [("adapter_config.json", "not an object"), ("strop.json", "strop.json: damaged")]
)
def test_damaged_adapter_files_are_named(name: str, message: str, base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / name).write_text("[]" if name == "adapter_config.json" else "{")
    with pytest.raises(ModelError, match=message):
        strop.load(adapter, dtype="fp32", device="cpu")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_merging_a_trained_embedding_with_an_untrained_tied_head_is_refused(base: Path, tmp_path: Path) -> None:
    """The head is not trained, and a merged model has one weight for both."""
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight was trained in full"):
        load_merger(locate(str(base)), adapter)


def test_router_of_experts_as_a_target_parameter_can_be_trained(tmp_path: Path) -> None:
    tiny_families.save("qwen3_moe", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_parameters=["mlp.gate.weight"], target_modules=[])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert goes_on(tmp_path / "base", tmp_path / "adapter", tmp_path / "run")["target_modules"] == ["gate"]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapter_on_an_untied_head_has_the_bases_weights_beside_it(tmp_path: Path) -> None:
    tiny_families.save("qwen3", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tuned: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    torch.manual_seed(1)
    for weight in tuned.parameters():
        weight.data += 0.1 * torch.randn_like(weight) * weight.requires_grad
    tuned.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored, name = load_file(file), "base_model.model.lm_head.base_layer.weight"
    assert name in stored
    ids = torch.tensor([[5, 6, 7, 8]])
    for dtype in ("fp32", "bf16"):
        loaded = strop.load(tmp_path / "adapter", dtype=dtype, device="cpu")
        if dtype == "fp32":
            assert torch.equal(loaded.module(ids).logits, tuned.eval()(ids).logits)
    combine([str(tmp_path / "adapter")], [0.5], tmp_path / "half")
    half = change(strop.load(tmp_path / "half", dtype="fp32", device="cpu").module)
    torch.testing.assert_close(half["lm_head"], 0.5 * change(tuned)["lm_head"], rtol=1e-4, atol=1e-6)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 4)
    assert strop.merge(tmp_path / "adapter", tmp_path / "merged", dtype="fp32", data=rows).parity is not None
    options = {**QUICK, "lora.r": 2}
    strop.train(model=tmp_path / "base", data=rows, out=tmp_path / "run", adapter=str(tmp_path / "adapter"), **options)
    save_file({**stored, name: stored[name] + 1}, file)
    with pytest.raises(ModelError, match=r"lm_head\.base_layer\.weight has other values than the base"):
        strop.load(tmp_path / "adapter", dtype="fp32", device="cpu")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapter_on_the_embedding_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ModelError, match="has LoRA matrices on the embedding"):
        strop.load(adapter)
    with pytest.raises(ModelError, match="has LoRA matrices on the embedding"):
        strop.merge(adapter, tmp_path / "merged", measure=False)


def change(model: Any) -> dict[str, torch.Tensor]:
    """Return the change of each weight by the active adapter."""
    layers = model.base_model.model.named_modules()
    return {
        name: layer.get_delta_weight(model.active_adapter)
        for name, layer in layers
        if isinstance(layer, peft.tuners.lora.LoraLayer) and model.active_adapter in layer.lora_A
    }


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_sum_of_adapters_with_different_ways_to_name_targets(
    order: tuple[int, ...], base: Path, tmp_path: Path
) -> None:
    every: dict[str, Any] = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
    ways = [{**every, "exclude_modules": ["o_proj"]}, every, {"target_modules": r".*layers\.1.*(o_proj|up_proj)"}]
    folders = [str(saved(base, tmp_path / str(number), **ways[number])) for number in order]
    weights = [0.5, 2.0, -1.0]
    combine(folders, weights, tmp_path / "sum")
    parts = [change(strop.load(folder, dtype="fp32", device="cpu").module) for folder in folders]
    total = change(strop.load(tmp_path / "sum", dtype="fp32", device="cpu").module)
    assert total.keys() == {name for part in parts for name in part}
    for name, weight in total.items():
        expected = sum(factor * part[name] for factor, part in zip(weights, parts, strict=True) if name in part)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter .default.* invalid shape")
def test_adapter_with_lora_biases_has_no_sum(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ModelError, match="have no weighted sum"):
        combine([str(adapter)], [0.5], tmp_path / "half")


def test_sum_that_differs_from_its_parts_is_not_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    monkeypatch.setattr("strop.exporting.adapters.MAX_SUM_ERROR", 1e-12)
    with pytest.raises(ModelError, match=r"the sum differs from its parts in .*(q|o)_proj"):
        combine([str(adapter), str(adapter)], [0.3, 0.1], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


def test_adapter_that_cannot_be_added_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    first, bad, good = (saved(base, tmp_path / name, target_modules=["q_proj"]) for name in ("first", "bad", "good"))
    edit(bad, r=9)
    model = strop.load(first, dtype="fp32", device="cpu")
    answer = model.generate("what is 3", max_new_tokens=4)
    with pytest.raises(ModelError):
        model.add(str(bad))
    model.add(str(good))
    assert model.generate("what is 3", max_new_tokens=4) == answer
    model.use(str(good))
    assert model.generate("what is 3", max_new_tokens=4) == strop.load(good, dtype="fp32").generate(
        "what is 3", max_new_tokens=4
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_that_train_embeddings_share_a_base_only_where_peft_can(base: Path, tmp_path: Path) -> None:
    plain = saved(base, tmp_path / "plain", target_modules=["q_proj"])
    tokens = saved(base, tmp_path / "tokens", target_modules=["q_proj"], trainable_token_indices=[5, 6])
    full = saved(base, tmp_path / "full", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = strop.load(plain, dtype="fp32", device="cpu")
    model.add(str(tokens))
    model.use(str(tokens))
    assert model.generate("what is 3", max_new_tokens=4)
    for first, second, message in (
        (tokens, plain, "load the adapter with tokens last"),
        (tokens, full, "load the adapter with tokens last"),
        (full, tokens, "one adapter trains rows of embed_tokens, and another trains all of it"),
    ):
        with pytest.raises(ModelError, match=message):
            strop.load(first, dtype="fp32", device="cpu").add(str(second))
