"""train.method full: gradients of all weights, exact resume, and the saved model wherever a run is named."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import strop
from strop.cli import app
from strop.engine.step import step_for
from strop.engine.train.fast import FastLoss
from strop.engine.train.plain import PlainLoss
from strop.errors import InputError, ModelError, RecipeError
from strop.evaluation.tables import print_evaluation
from strop.exporting.hub import _read_model
from strop.models.lora import train_all_weights
from strop.serve.models import load_models
from strop.testing import tiny_rows
from tests import ROOT
from tests.support import tiny_families
from tests.support.families import tokenizer
from tests.support.pages import blocks
from tests.support.random_models import EXPERTS, FAMILY_CONFIGS, example, tiny_of
from tests.support.tiny import save_tiny

FULL: dict[str, Any] = {
    "train.method": "full", "train.max_steps": 12, "train.save_steps": 4, "train.batch_size": 4,
    "train.learning_rate": 1e-3, "model.device": "cpu", "model.dtype": "fp32", "lr_scheduler": "constant",
}  # fmt: skip
ROWS = [example(9, 0), example(14, 1, [0.0] * 5 + [1.0] * 9), example(20, 3)]
# These have small parts that the fast step does not train.
PLAIN = {"gemma4_text", "apertus", "gpt_oss"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24)


@pytest.fixture(scope="module")
def run(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "full"
    return strop.train(model=str(base), data=str(rows), out=str(out), **FULL).folder


def build(family: str) -> Any:
    model = tiny_of(family)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return train_all_weights(model, (), None).train()


def gradients(step: Any, model: Any) -> dict[str, torch.Tensor]:
    loss = step.token_loss(ROWS)
    loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return grads | {"loss": loss.detach()}


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS.keys() - PLAIN))
def test_all_gradients_equal_those_of_the_model_itself(family: str) -> None:
    model, reference = build(family), build(family)
    fast, plain = gradients(FastLoss(model, warm=False), model), gradients(PlainLoss(reference), reference)
    assert fast.keys() == plain.keys()
    largest = max(float(value.norm()) for name, value in plain.items() if name != "loss")
    for name, expected in plain.items():
        assert float((fast[name] - expected).norm()) < 2e-6 * largest + 1e-4 * float(expected.norm()), name


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "starcoder2"])
def test_bf16_computes_with_fp32_weights(family: str) -> None:
    model, reference = build(family), build(family)
    fast = gradients(step_for(model, dtype=torch.bfloat16), model)
    exact = gradients(PlainLoss(reference), reference)
    assert all(value.dtype == torch.float32 for value in fast.values())
    largest = max(float(value.norm()) for name, value in exact.items() if name != "loss")
    for name, expected in exact.items():
        assert float((fast[name] - expected).norm()) < 0.03 * float(expected.norm()) + 0.003 * largest, name


@pytest.mark.parametrize("family", sorted(PLAIN))
def test_other_parts_are_trained_by_the_plain_step(family: str) -> None:
    assert step_for(build(family)).name == "plain"


def test_mixtures_are_trained_in_fp32() -> None:
    model = tiny_of("mixtral", **EXPERTS)
    train_all_weights(model, (), None)
    assert step_for(model).name == "fast"
    assert step_for(model, dtype=torch.bfloat16).name == "plain"


def test_the_run_equals_a_loop_of_transformers_and_adamw(base: Path, rows: Path, run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    recorded = [event["loss"] for event in events(run) if event["event"] == "step"]
    from strop.config.load import read_resolved
    from strop.models.source import locate
    from strop.models.tokenizer import load_tokenizer
    from strop.objectives.table import prepare_rows
    from strop.training.state import batch_stream

    recipe = read_resolved(run / "recipe.yaml").recipe
    data = prepare_rows(recipe, load_tokenizer(locate(str(base))))
    losses = []
    for batch in batch_stream(recipe, len(data.train)):
        examples = [data.train[row] for row in batch.rows]
        total = sum(float(x.weights.sum()) for x in examples)
        loss = PlainLoss(model).token_loss(examples) / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (0.5 if not losses else 1.0)  # one step of warmup
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(recorded, rel=1e-4)
    assert losses[-1] < losses[0]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_saved_folder_is_the_trained_model(base: Path, run: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    newest = load_file(max((run / "checkpoints").glob("step-*")) / "weights.safetensors")
    own = dict(saved.named_parameters())
    dtype = torch.bfloat16 if "bfloat16" in (run / "model" / "config.json").read_text() else torch.float32
    assert newest.keys() == own.keys()
    for name, weight in newest.items():
        assert torch.equal(own[name].detach(), weight.to(dtype).float()), name
    before = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    assert all(not torch.equal(own[name].detach(), before[name].detach()) for name in own)
    assert "all weights of the text model" in (run / "model" / "README.md").read_text(encoding="utf-8")
    assert not (run / "adapter").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_gives_equal_bits(base: Path, rows: Path, tmp_path: Path, dtype: str) -> None:
    class Interrupted(Exception):
        pass

    options = {**FULL, "model": str(base), "data": str(rows), "model.dtype": dtype}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    strop.train(**options, out=str(whole))
    for stop in (3, 6, 10):

        def interrupt(event: dict[str, Any], stop: int = stop) -> None:
            if event["event"] == "step" and event["step"] == stop:
                raise Interrupted

        with pytest.raises(Interrupted):
            strop.train(**options, out=str(broken), resume_existing=True, callback=interrupt)
    strop.train(**options, out=str(broken), resume_existing=True)
    ends = [load_file(folder / "checkpoints" / "step-000012" / "weights.safetensors") for folder in (whole, broken)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    saved = load_file(broken / "model" / "model-00001.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32 if dtype == "fp32" else torch.bfloat16}


def test_eval_compares_with_the_untrained_base(run: Path, rows: Path, base: Path) -> None:
    result = strop.evaluate(str(run), str(rows))
    assert result["base"]["loss"] > result["tuned"]["loss"]
    assert {"base", "tuned", "base_hit", "tuned_hit"} <= result["samples"][0].keys()
    alone = strop.evaluate(str(base), str(rows), dtype="fp32")
    assert alone["base"]["loss"] == pytest.approx(result["base"]["loss"], rel=1e-5)
    assert result["train_rows"] == result["rows"]
    assert "evaluation" in json.loads((run / "report.json").read_text(encoding="utf-8"))


def test_a_run_names_its_model_everywhere(run: Path, rows: Path, tmp_path: Path) -> None:
    model = strop.load(str(run))
    tuned = model.generate("hi", max_new_tokens=3)
    assert tuned == strop.load(str(run / "model")).generate("hi", max_new_tokens=3)
    with model.base():
        untrained = model.module
    assert untrained is not model.module
    again = strop.train(
        model=str(run), data=str(rows), out=str(tmp_path / "lora"), max_steps=2, **{"model.device": "cpu"}
    )
    assert (again.folder / "adapter" / "adapter_config.json").is_file()
    assert json.loads((again.folder / "lock.json").read_text())["base"]["name"] == str((run / "model").resolve())
    with pytest.raises(ModelError, match="all weights were trained, so there is no adapter"):
        strop.merge(str(run), str(tmp_path / "merged"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train.objective": "grpo"}, "objective grpo"),
        ({"model.quantization": "nf4"}, "quantized weights cannot be trained"),
        ({"model.dtype": "fp16"}, "use bf16 or fp32"),
        ({"train.int8_matmul": True}, "frozen weights"),
        ({"train.lora_plus_ratio": 16}, "there are no adapters"),
        ({"model.placement": "sharded"}, "each device has all weights"),
        ({"lora.r": 8}, "lora.r 8: train.method full trains all weights"),
        ({"lora.dropout": 0.1}, "lora.dropout 0.1"),
    ],
)
def test_settings_without_effect_are_refused(
    base: Path, rows: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((RecipeError, InputError), match=message):
        strop.train(model=str(base), data=str(rows), out=str(tmp_path / "run"), **{**FULL, **options})
    assert not (tmp_path / "run").exists()


def test_presets_of_adapters_do_not_get_in_the_way(base: Path, rows: Path, tmp_path: Path) -> None:
    options = {**FULL, "preset": "low-memory", "train.max_steps": 2}
    done = strop.train(model=str(base), data=str(rows), out=str(tmp_path / "run"), **options)
    assert done.folder.joinpath("model", "config.json").is_file()


def test_new_tokens_are_trained_and_saved(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "completion": f"<A> {i}"}) + "\n" for i in range(8)), encoding="utf-8"
    )
    options = {**FULL, "lora.new_tokens": ["<A>"], "train.max_steps": 3}
    done = strop.train(model=str(base), data=str(rows), out=str(tmp_path / "run"), **options)
    model = strop.load(str(done.folder))
    number = model.tokenizer.convert_tokens_to_ids("<A>")
    assert model.module.get_input_embeddings().num_embeddings > number
    assert strop.evaluate(str(done.folder), str(rows))["base"]["loss"] > 0


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_preferences(base: Path, tmp_path: Path, objective: str) -> None:
    rows = tmp_path / "pairs.jsonl"
    pairs: list[dict[str, Any]] = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]
    labelled = [
        {"prompt": f"p{i}", "completion": f"{w} {i}", "label": w == "good"} for i in range(6) for w in ("good", "bad")
    ]
    rows.write_text(
        "".join(json.dumps(row) + "\n" for row in (labelled if objective == "kto" else pairs)), encoding="utf-8"
    )
    options = {**FULL, "train.objective": objective, "train.max_steps": 6, "train.save_steps": 2, "data": str(rows)}
    whole = strop.train(**options, model=str(base), out=str(tmp_path / "whole"))
    if objective != "kto":
        assert {"base", "tuned"} <= strop.evaluate(str(whole.folder), str(rows)).keys()

    class Interrupted(Exception):
        pass

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            raise Interrupted

    broken = {**options, "model": str(base), "out": str(tmp_path / "broken"), "resume_existing": True}
    with pytest.raises(Interrupted):
        strop.train(**broken, callback=interrupt)
    strop.train(**broken)
    ends = [
        load_file(tmp_path / name / "checkpoints" / "step-000006" / "weights.safetensors")
        for name in ("whole", "broken")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    if objective == "dpo":  # the reference is the model before training
        first = next(event for event in events(whole.folder) if event["event"] == "step")
        assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
        assert not any(name.startswith("weight/") for name in load_file(whole.folder / "reference.safetensors"))


def test_the_plan_counts_all_weights(base: Path, rows: Path) -> None:
    plans = {
        method: strop.plan(model=str(base), data=str(rows), **{"train.method": method, "model.device": "cpu"})
        for method in ("lora", "full")
    }
    parameters = plans["full"].workload.base.parameters
    assert plans["full"].workload.adapter_weights == parameters
    parts = plans["full"].phases["train"].parts
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (
        4 * parameters,
        4 * parameters,
        8 * parameters,
    )
    assert "merge" not in plans["full"].phases and "merge" in plans["lora"].phases
    rates = [plans[method].resolved.recipe.train.learning_rate for method in ("full", "lora")]
    assert rates[0] == pytest.approx(0.1 * rates[1], rel=0.05)


def test_the_guide_works_from_its_first_command_to_its_last(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of docs/full.md run in order, with a tiny model."""
    monkeypatch.chdir(tmp_path)
    tiny_rows(tmp_path / "rows.jsonl", 24)
    tiny_rows(tmp_path / "held-out.jsonl", 6)
    outputs = {}
    for block in blocks(ROOT / "docs" / "full.md"):
        for words in block.commands:
            words = [str(base) if word == "demo" else word for word in words[1:]]
            words += ["--max-steps", "2", "--batch-size", "4"] if words[0] == "train" else []
            monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["strop", *words])
                with pytest.raises(SystemExit) as ended:
                    app.main()
            outputs[words[0]] = "".join(capsys.readouterr())
            assert not ended.value.code, outputs[words[0]]
    assert "(100.00%)" in outputs["plan"]
    assert "model    runs/full/model" in outputs["train"]
    assert "base" in outputs["eval"] and "tuned" in outputs["eval"] and "strop merge" not in outputs["eval"]
    assert "system prompt" in outputs["chat"] or "Turn" in outputs["chat"] or outputs["chat"]


def test_a_server_gives_the_trained_model(run: Path) -> None:
    loaded = load_models([str(run)], device="cpu", dtype="fp32", quantization="none", force=False)
    assert list(loaded.models) == ["full"]
    trained = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.module.parameters(), trained.parameters(), strict=True))


def test_a_changed_or_missing_base(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(tmp_path / "base")
    options = {**FULL, "train.max_steps": 2}
    run = strop.train(model=str(base), data=str(rows), out=str(tmp_path / "run"), **options).folder
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}), encoding="utf-8")
    with pytest.raises(ModelError, match="has changed since training"):
        strop.evaluate(str(run), str(rows))
    shutil.rmtree(base)
    assert strop.load(str(run)).generate("hi", max_new_tokens=2)
    alone = strop.evaluate(str(run), str(rows), force=True)
    assert "tuned" in alone and "base" not in alone and any("not compared with it" in note for note in alone["notes"])
    print_evaluation(alone, 2)
    assert "base" not in json.loads((run / "report.json").read_text(encoding="utf-8"))["evaluation"]
    with pytest.raises(ModelError, match="its base is not there"):
        strop.evaluate(str(run), str(rows), force=True, general=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/base\nhi\n/tuned\nhi\n"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["strop", "chat", str(run), "--max-new-tokens", "2"])
        app.main()
    out, err = capsys.readouterr()
    assert (
        not ended.value.code and "no such run or model folder" in out + err and "answers: after training" in out + err
    )


def test_export_writes_the_trained_weights(run: Path, tmp_path: Path) -> None:
    strop.export("gguf", str(run), str(tmp_path / "full.gguf"), type="f32", measure=False)
    exported = strop.load(str(tmp_path / "full.gguf"), dtype="fp32")
    assert exported.generate("hi", max_new_tokens=4) == strop.load(str(run)).generate("hi", max_new_tokens=4)


def test_weights_that_need_fp32_are_saved_in_it(tmp_path: Path, rows: Path) -> None:
    """The bias that routes tokens to experts differs by less than a step of bf16."""
    base = save_family("glm4_moe", tmp_path / "base")
    state = load_file(base / "model.safetensors")
    [name] = [name for name in state if name.endswith("e_score_correction_bias")]
    state[name] = torch.tensor([8.0010, 8.0043, 8.0077, 8.0110])
    save_file(state, base / "model.safetensors", {"format": "pt"})
    for method in ("full", "lora"):
        out = tmp_path / method
        options = {**FULL, "train.method": method, "model.dtype": "bf16", "train.max_steps": 1}
        strop.train(model=str(base), data=str(rows), out=str(out), **options)
        folder = out / "model"
        if method == "lora":
            folder = tmp_path / "merged"
            strop.merge(str(out), str(folder), measure=False)
        saved = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
        assert torch.equal(saved[name], state[name])


@pytest.mark.parametrize(("family", "tokens"), [("llama", []), ("gemma4_text", ["<a1>", "<a2>"]), ("mllama", [])])
def test_the_saved_folder_loads_again(tmp_path: Path, rows: Path, family: str, tokens: list[str]) -> None:
    if family == "mllama":
        tiny_families.save(family, tmp_path / "base", multimodal=True)
    else:
        save_family(family, tmp_path / "base")
    if family == "llama":  # tied, and the checkpoint stores the head as well
        state = load_file(tmp_path / "base" / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    options = {**FULL, "lora.new_tokens": tokens, "train.max_steps": 1}
    run = strop.train(model=str(tmp_path / "base"), data=str(rows), out=str(tmp_path / "run"), **options).folder
    assert strop.load(str(run)).generate("hi", max_new_tokens=2)


def save_family(family: str, folder: Path) -> Path:
    text = tokenizer("chatml")
    tiny_of(
        family, vocab_size=len(text), tie_word_embeddings=True, vocab_size_per_layer_input=len(text)
    ).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def test_quantized_bases_are_refused_before_training(base: Path, rows: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "fp8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(
        ModelError, match=r"quantized by fp8, and cannot be trained.*\n.*train.method lora|method=.lora"
    ):
        strop.train(model=str(tmp_path / "fp8"), data=str(rows), out=str(tmp_path / "run"), **FULL)


def test_ollama_and_the_hub_get_the_prompt_and_no_path(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = ("system", "Be terse."), ("user", "hi"), ("assistant", "yes")
    row = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
    rows.write_text(f"{row}\n" * 4, encoding="utf-8")
    options = {**FULL, "train.max_steps": 1}
    run = strop.train(model=str(base), data=str(rows), out=str(tmp_path / "run"), **options).folder
    strop.export("ollama", str(run), str(tmp_path / "ollama"), measure=False)
    assert 'SYSTEM """Be terse."""' in (tmp_path / "ollama" / "Modelfile").read_text(encoding="utf-8")
    contents, _ = _read_model(run / "model", None)
    assert json.loads(contents["strop.json"])["base"]["name"] == base.name
    assert f"`{base.name}`" in (run / "model" / "README.md").read_text(encoding="utf-8")
