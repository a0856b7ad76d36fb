"""LoRA targets, refused settings, new tokens, dtypes and rounding."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

import strop
from strop.config.schema import LoraSection
from strop.engine.train.fast import FastLoss
from strop.engine.train.plain import PlainLoss
from strop.errors import InputError, ModelError, RecipeError
from strop.models.families.shape import target_names
from strop.models.introspect import count_path_kinds, find_modules_to_save, linear_kinds
from strop.models.load import load_base
from strop.models.lora import add_lora, check_lora, trainable_parameters
from strop.models.quantize import QuantizedLinear, quantizable_linears
from strop.models.source import locate
from tests.engine.train.test_fast import assert_same, step
from tests.support import tiny, tiny_families
from tests.support.families import tokenizer
from tests.support.random_models import tiny_of

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": (tiny.config(), 7),
    "mistral": (MistralConfig(**SIZES), 7),
    "qwen2": (Qwen2Config(**SIZES), 7),
    "qwen3": (Qwen3Config(**SIZES, head_dim=8), 7),
    "gemma": (GemmaConfig(**SIZES, head_dim=8), 7),
    "phi3": (Phi3Config(**SIZES), 4),
}


def section(**options: Any) -> LoraSection:
    return LoraSection(**{"r": 4, "alpha": 8, **options})


@pytest.mark.parametrize("field", ["dropout", "use_dora"])
def test_dense_layers_of_a_mixture_that_peft_adapts_as_parameters_refuse_dropout(field: str) -> None:
    """PEFT adapts layers with names of experts as parameters, in Llama 4 also dense ones."""
    options: dict[str, Any] = {field: 0.1 if field == "dropout" else True}
    model = tiny_families.build("llama4_text")
    with pytest.raises(ModelError, match=f"lora.{field}: peft adapts a mixture's experts and MLPs as parameters"):
        add_lora(model, section(**options), tokenizer("chatml"))
    add_lora(model, section(**options, target_modules="attention"), tokenizer("chatml"))


@pytest.mark.parametrize("family", FAMILIES)
def test_target_sets_in_each_family(family: str) -> None:
    config, linears = FAMILIES[family]
    with torch.device("meta"):
        kinds = linear_kinds(AutoModelForCausalLM.from_config(config))
    selected = target_names(kinds, "all-linear")
    assert len(selected) == linears and "lm_head" not in selected
    attention = target_names(kinds, "attention")
    assert set(attention) < set(selected) and "o_proj" in attention
    assert target_names(kinds, ["attention", "gate"]) == [
        *attention,
        "gate_up_proj" if family == "phi3" else "gate_proj",
    ]
    assert all(kind.count == 2 for kind in kinds if kind.name in selected)


def test_unknown_target_suggests_names() -> None:
    with pytest.raises(ModelError) as refused:
        check_lora(tiny.model(), section(target_modules=["q_prj"]))
    line = str(refused.value)
    assert "q_prj matches no linear layer (did you mean q_proj?)" in line and "down_proj" in line


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_without_match_is_refused(field: str) -> None:
    with pytest.raises(ModelError, match=f"lora.{field}: c_attn"):
        check_lora(tiny.model(), section(**{field: {"c_attn": 2}}))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_for_layer_without_adapter_is_refused(field: str) -> None:
    with pytest.raises(ModelError, match=f"lora.{field}: k_proj matches no layer with an adapter"):
        check_lora(tiny.model(), section(target_modules=["q_proj"], **{field: {"k_proj": 2}}))


def test_adapters_are_fp32_on_frozen_bf16_base() -> None:
    model = add_lora(tiny.model().to(torch.bfloat16), section(), tokenizer("chatml"))
    weights = trainable_parameters(model)
    assert weights and all(weight.dtype == torch.float32 and "lora_" in name for name, weight in weights.items())


def test_rank_pattern_and_rslora_take_effect() -> None:
    model = add_lora(tiny.model(), section(rank_pattern={"q_proj": 2}, use_rslora=True), tokenizer("chatml"))
    shapes = {name: weight.shape[0] for name, weight in trainable_parameters(model).items() if "lora_A" in name}
    assert {shapes[name] for name in shapes if "q_proj" in name} == {2}
    assert {shapes[name] for name in shapes if "v_proj" in name} == {4}
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    assert layer.scaling["default"] == pytest.approx(8 / 4**0.5)


def test_overlapping_patterns_are_the_same_after_peft_has_sorted_them(tmp_path: Path) -> None:
    """PEFT takes the first key that matches, and sorts the keys in adapter_config.json."""
    base = tiny.model()
    ranks = {"layers.1.mlp.up_proj": 1, "up_proj": 2, ".*": 3}
    alphas = {"layers.1.mlp.down_proj": 2, "[d]own_proj": 40, ".*_proj": 12}
    model = add_lora(copy.deepcopy(base), section(rank_pattern=ranks, alpha_pattern=alphas), tokenizer("chatml"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for adapted in (model, loaded):
        first, second = adapted.base_model.model.model.layers
        shapes = [
            len(x.lora_A["default"].weight) for x in (first.mlp.up_proj, second.mlp.up_proj, first.self_attn.q_proj)
        ]
        scales = [x.scaling["default"] for x in (first.mlp.down_proj, second.mlp.down_proj, second.self_attn.q_proj)]
        assert shapes == [2, 1, 3] and scales == [40 / 3, 2 / 3, 12 / 3]


@pytest.mark.parametrize(
    ("target", "number"), [("layers.0.self_attn.q_proj", 1), ("layers.7.self_attn.q_proj", 0), ("nonsense.q_proj", 0)]
)
def test_path_of_some_layers_is_refused_as_a_target(target: str, number: int, tiny_folder: Path) -> None:
    """All layers of a name get adapters, so that a path of one of them would be read as something else."""
    what = f"{target} is the end of {number} of the 2 paths of q_proj"
    with pytest.raises(ModelError, match=what):
        check_lora(tiny.model(), section(target_modules=["v_proj", target]))
    with pytest.raises(ModelError, match=what):
        strop.plan(model=str(tiny_folder), **{"lora.target_modules": ["v_proj", target]})
    assert check_lora(tiny.model(), section(target_modules=["self_attn.q_proj"])) == ["q_proj"]
    paths = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]  # as PEFT writes "all-linear" of a small model
    assert check_lora(tiny.model(), section(target_modules=paths)) == ["q_proj"]


def test_key_of_a_pattern_behind_a_more_general_one_is_refused() -> None:
    pattern = {"v_proj": 80, "layers.1.self_attn.v_proj": 1}
    with pytest.raises(ModelError, match="has no effect: v_proj is given before it") as caught:
        check_lora(tiny.model(), section(alpha_pattern=pattern))
    assert caught.value.fix == "give layers.1.self_attn.v_proj first"


def test_alpha_pattern_accepts_fractions() -> None:
    model = add_lora(tiny.model(), section(alpha_pattern={"v_proj": 1.5}), tokenizer("chatml"))
    attention = model.base_model.model.model.layers[0].self_attn
    assert (attention.v_proj.scaling["default"], attention.q_proj.scaling["default"]) == (1.5 / 4, 8 / 4)


def test_dora_has_magnitudes() -> None:
    model = add_lora(tiny.model(), section(use_dora=True), tokenizer("chatml"))
    assert any("lora_magnitude_vector" in name for name in trainable_parameters(model))


def test_bias_all_trains_biases() -> None:
    with torch.device("cpu"):
        base = AutoModelForCausalLM.from_config(FAMILIES["qwen2"][0]).requires_grad_(False)
    model = add_lora(base, section(bias="all"), tokenizer("chatml"))
    assert any(name.endswith(("q_proj.base_layer.bias", "q_proj.bias")) for name in trainable_parameters(model))


def test_training_tied_embeddings_in_full_is_refused() -> None:
    with pytest.raises(ModelError, match="shares its weights"):
        check_lora(tiny.model(), section(modules_to_save=["lm_head"]))
    untied = tiny.model(tie_word_embeddings=False)
    check_lora(untied, section(modules_to_save=["lm_head"]))
    for name in ("lm_head", "embed_tokens"):  # PEFT fails for both
        with pytest.raises(RecipeError, match=f"{name} is trained in full, and lora.new_tokens"):
            check_lora(untied, section(modules_to_save=[name], new_tokens=["<A>"]))


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("llama", "rotary_emb", "model.rotary_emb has no weights"),
        ("llama", "model", "model leaves no layer for an adapter"),
        ("llama", "", "no module"),
        ("llama", "orm", "no module orm"),
        ("gemma4_text", "norm", "v_norm has no weights\\nFix: give a longer path, such as .*, model.norm"),
        ("gemma4_text", "model.embed_tokens", "shares its weights"),
    ],
)
def test_untrainable_modules_to_save_are_refused(family: str, name: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        check_lora(tiny_of(family), section(modules_to_save=[name]))
    assert re.search(message, str(refused.value))


def test_modules_to_save_match_by_suffix_like_peft() -> None:
    """A suffix may begin within a path component: `norm` matches every norm."""
    skeleton = tiny.model()
    counts = count_path_kinds(find_modules_to_save(skeleton, "norm"))
    many = ("model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm")
    assert counts == {**dict.fromkeys(many, 2), "model.norm": 1}
    assert list(count_path_kinds(find_modules_to_save(skeleton, "model.norm"))) == ["model.norm"]
    model = add_lora(skeleton, section(modules_to_save=["norm"]), tokenizer("chatml"))
    assert sum("modules_to_save" in name for name in trainable_parameters(model)) == sum(counts.values())


def test_pattern_for_modules_to_save_is_refused() -> None:
    with pytest.raises(ModelError, match="v_proj matches no layer with an adapter"):
        check_lora(tiny.model(), section(modules_to_save=["v_proj"], rank_pattern={"v_proj": 2}))


@pytest.mark.parametrize("name", ["norm", "input_layernorm", "embed_tokens", "lm_head"])
def test_modules_to_save_keep_the_base_dtype_at_their_boundary(name: str) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny.model(tie_word_embeddings=False).to(dtype)
        model = add_lora(base, section(modules_to_save=[name]), tokenizer("chatml"))
        loss = PlainLoss(model).token_loss(tiny.examples(4))
        loss.backward()  # type: ignore[no-untyped-call]
        whole = {key: weight for key, weight in trainable_parameters(model).items() if "modules_to_save" in key}
        assert whole and all(w.dtype == torch.float32 and w.grad is not None and w.grad.any() for w in whole.values())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_new_tokens_train_only_their_rows() -> None:
    words = copy.deepcopy(tokenizer("chatml"))
    before = len(words)
    model = add_lora(tiny.model(), section(new_tokens=["<call>", "<done>"]), words)
    rows = [weight for name, weight in trainable_parameters(model).items() if "trainable_tokens" in name]
    assert len(words) == before + 2
    assert rows and all(row.shape[0] == 2 for row in rows)
    assert words("<call>", add_special_tokens=False)["input_ids"] == [before]
    ids = torch.tensor([[5, before, 6]])
    model(ids, labels=ids).loss.backward()
    assert all(row.grad is not None and row.grad.abs().sum() > 0 for row in rows)
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trainable_parameters(model))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("shape", [(600, 32), (20, 30, 32)])
def test_small_lora_updates_survive_bf16(tiny_folder: Path, quantization: str, shape: tuple[int, ...]) -> None:
    """The update (0.1 % here) is below half of the last bit of the base's output in bf16."""
    base = load_base(locate(str(tiny_folder)), torch.bfloat16, "cpu", quantization=quantization)
    model = add_lora(base, LoraSection(r=8, alpha=8.0, dropout=0.5), None).eval()
    ours, peft, expected = 0.0, 0.0, 0.0
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, PeftLinear) and module.in_features == 32:
            x, b = torch.randn(shape).bfloat16(), module.lora_B["default"].weight
            x.requires_grad_()
            without = module(x).detach().float()
            torch.nn.init.normal_(b, std=5e-5)
            our_output, peft_output = module(x), PeftLinear.forward(module, x)
            change = (module.get_delta_weight("default").float() @ x[..., None].float())[..., 0].detach()
            ours += float(((our_output.detach().float() - without) * change).sum())
            peft += float(((peft_output.detach().float() - without) * change).sum())
            expected += float(change.square().sum())
            upstream = torch.randn_like(our_output)
            torch.testing.assert_close(*(torch.autograd.grad(y, (x, b), upstream) for y in (our_output, peft_output)))
    assert ours / expected == pytest.approx(1.0, abs=0.15) and peft / expected < 0.5


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_dora_starts_as_its_quantized_base(tiny_folder: Path, scheme: str, dropout: float) -> None:
    """Magnitudes come from the dequantized weights, and the fast and the plain step agree afterwards."""
    base = load_base(locate(str(tiny_folder)), torch.float32, "cpu", quantization=scheme)
    examples = tiny.examples(4)
    untouched = PlainLoss(base).token_loss(examples).detach()
    model = add_lora(base, section(use_dora=True, dropout=dropout), None).train()
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    losses = [PlainLoss(model), FastLoss(model)]
    for loss in losses:
        assert loss.token_loss(examples).item() == pytest.approx(untouched.item(), rel=1e-4)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data *= 1.1 + 0.2 * torch.rand_like(weight)
            weight.data += 0.1 * torch.randn_like(weight) if "lora_B" in name else 0
    plain, fast = (step(model, loss, examples) for loss in losses)
    assert_same(fast, plain)


@pytest.mark.parametrize(
    ("family", "leaf"), [("jamba", "dt_proj"), ("bamba", "out_proj"), ("granitemoehybrid", "out_proj")]
)
def test_directly_read_layers_get_no_adapter_and_stay_in_16_bit(family: str, leaf: str) -> None:
    """Jamba's own loop and the others' fused kernels would ignore an adapter there."""
    model = tiny_of(family)
    paths = [path for path, _ in model.named_modules() if path.endswith(f"mamba.{leaf}")]
    assert paths and not any(f"{path}.weight" in quantizable_linears(model) for path in paths)
    (kind,) = (kind for kind in linear_kinds(model) if kind.name.endswith(leaf))
    assert not kind.sets and kind.why_16_bit == "read by the model itself"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        (["mlp.c_proj"], ["mlp.c_proj"]),
        (["transformer.h.0.attn.c_proj", "c_attn"], ["attn.c_proj", "c_attn"]),
    ],
)
def test_targets_are_ends_of_names_as_in_peft(targets: list[str], expected: list[str]) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100))
    assert target_names(linear_kinds(model), targets) == expected


def test_new_tokens_on_a_head_with_a_bias_are_refused() -> None:
    """TrainableTokensLayer of peft 0.21 leaves the bias out."""
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=len(tokenizer("chatml")), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4,
        )
    )  # fmt: skip
    assert check_lora(model, section())
    with pytest.raises(ModelError, match="leaves out the bias"):
        check_lora(model, section(new_tokens=["<A>"]))


def test_dense_layers_of_a_mixture_without_experts_get_adapters() -> None:
    config = tiny_families.config_of("deepseek_v3")
    assert config.first_k_dense_replace > config.num_hidden_layers  # peft takes the names of its MLPs for experts'
    model = add_lora(AutoModelForCausalLM.from_config(config), section(), tokenizer("chatml"))
    adapted = {path.rpartition(".")[2] for path, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {"gate_proj", "up_proj", "down_proj", "o_proj"} <= adapted
