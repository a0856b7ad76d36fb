"""Measure the peak memory of runs next to the prediction before the first step.

    python benchmarks/plan_memory.py FOLDER [--snips train.jsonl] [--only TEXT] [--missing] [--narrow] [--out FILE]

Each run is a new process with the default allocator and one thread, and takes 6 steps of 8 rows with different lengths,
unless its name gives another number. Random models (3 GB) are written to FOLDER. --narrow: as on a CPU without AVX512,
whose instructions are hidden from PyTorch, numba and strop; results are stored next to the others. Constants of
`strop.planning.memory` were fitted on the runs marked as fitted, and on no other. `python -m
tests.planning.test_memory` writes the table into docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from measured import child, write

WORDS = [" the", " of", " and", " to", " in", " is", " was", " for", " on", " as", " with", " by", " at", " from"]
LLAMA = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 16384}
QWEN3 = {**LLAMA, "model_type": "qwen3", "vocab_size": 151936}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "sliding_window": 512}


def shape(family: dict[str, Any], hidden: int, layers: int, heads: int, few: int, inner: int, **more: Any) -> Any:
    sizes = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": few,
        "intermediate_size": inner,
    }  # fmt: skip
    return {**family, **sizes, **more}


MODELS = {
    "llama-17m": shape(LLAMA, 256, 4, 4, 2, 704),
    "llama-49m": shape(LLAMA, 512, 8, 8, 4, 1408),
    "llama-362m": shape(LLAMA, 960, 32, 15, 5, 2560),
    "qwen3-42m": shape(QWEN3, 256, 4, 4, 2, 768, head_dim=64),
    "qwen3-125m": shape(QWEN3, 512, 12, 8, 4, 1536, head_dim=128),
    "qwen3-596m": shape(QWEN3, 1024, 28, 16, 8, 3072, head_dim=128),
    "gemma3-12m": shape(GEMMA3, 256, 6, 4, 1, 768, head_dim=64, vocab_size=49152),
    "gemma3-58m": shape(GEMMA3, 512, 10, 4, 1, 1536, head_dim=128, vocab_size=65536),
    "gemma3-268m": shape(GEMMA3, 640, 18, 4, 1, 2048, head_dim=256, vocab_size=262144),
}
# Mixtures, hybrids and Gemma 4, whose layers are partly computed by the model's modules
OTHERS = {**LLAMA, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
          "head_dim": 64, "intermediate_size": 1408}  # fmt: skip
MODELS |= {
    "mixtral-96m": {**OTHERS, "model_type": "mixtral", "num_local_experts": 8, "intermediate_size": 704},
    "qwen3moe-96m": {**OTHERS, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
                     "moe_intermediate_size": 704},
    "olmoe-96m": {**OTHERS, "model_type": "olmoe", "num_experts": 16, "num_experts_per_tok": 4,
                  "intermediate_size": 352},
    "gptoss-96m": {**OTHERS, "model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2,
                   "intermediate_size": 704, "sliding_window": 128},
    "qwen35-50m": {**OTHERS, "model_type": "qwen3_5_text", "linear_num_key_heads": 8, "linear_num_value_heads": 8,
                   "linear_key_head_dim": 64, "linear_value_head_dim": 64,
                   "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2},
    "lfm2-44m": {**OTHERS, "model_type": "lfm2", "layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "gemma4-71m": {**OTHERS, "model_type": "gemma4_text", "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 64,
                   "vocab_size_per_layer_input": 49152, "global_head_dim": 128, "num_global_key_value_heads": 4,
                   "sliding_window": 512, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2},
}  # fmt: skip
# Bases stored in another dtype than bf16: weights of the run's dtype stay in mapped files, others are converted.
MODELS |= {f"llama-49m-{dtype}": {**MODELS["llama-49m"], "dtype": dtype} for dtype in ("float32", "float16")}
STREAMED = {"model.quantization": "nf4", "model.resident_layers": 0}
RESIDENT = {"model.quantization": "nf4", "model.resident_layers": 1000}
INT8 = {"model.quantization": "int8", "model.resident_layers": 0}
BF16 = {"model.dtype": "bf16"}
AGAIN = {"train.gradient_checkpointing": "on"}
ATTENTION = {"lora.target_modules": "attention"}
NEW_TOKENS = {"lora.new_tokens": ["<note>"]}
PLAIN = {"lora.modules_to_save": ["layers.0.self_attn.k_proj"]}  # it is trained by the plain step
FP32 = {"model.dtype": "fp32"}
GROUPS = [("that nothing was fitted on", False), ("that constants were fitted on", True)]
REWARDS = {
    "train.objective": "grpo", "train.rewards": "exact_json", "train.group": 4, "train.answer_tokens": 32,
    "train.max_steps": 3,
}  # fmt: skip
STEPS, ROWS = 6, 8
NARROW = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "NUMBA_CPU_NAME": "haswell"}


def case(model: str, longest: int, at_once: int, *, fitted: bool = False, **options: Any) -> dict[str, Any]:
    """Return a case with rows of `longest` / 4 to `longest` tokens and micro-batches of `at_once` tokens."""
    return {"model": model, "longest": longest, "at_once": at_once, "fitted": fitted, "options": options}


def pairs(objective: str, **options: Any) -> dict[str, Any]:
    return {"model": "demo", "pairs": objective, "fitted": False, "options": options}


CASES: list[dict[str, Any]] = [
    {"model": "demo", "data": "demo", "fitted": False, "options": {}},
    {"model": "demo", "data": "snips", "fitted": False, "options": {}},
    {"model": "demo", "data": "demo", "fitted": False, "options": RESIDENT},
    {"model": "demo", "data": "snips", "fitted": False, "options": {"lora.dropout": 0.05}},
    case("demo", 256, 512),
    case("demo", 512, 1024, fitted=True),
    case("demo", 1024, 1024),
    case("demo", 1024, 2048, **AGAIN),
    case("demo", 512, 512, fitted=True, **RESIDENT),
    case("demo", 512, 512, **STREAMED),
    case("demo", 512, 512, fitted=True, **INT8),
    case("demo", 512, 1024, **{"lora.r": 128}),
    case("demo", 512, 512, **ATTENTION, **{"lora.r": 8}),
    case("demo", 512, 512, **FP32),
    case("demo", 256, 256, **{"lora.use_dora": True}),
    case("llama-17m", 2048, 8192),
    case("llama-17m", 2048, 8192, fitted=True, **AGAIN),
    case("llama-17m", 512, 2048),
    case("llama-49m", 512, 2048, fitted=True),
    case("llama-49m", 128, 512),
    case("llama-49m", 2048, 2048),
    case("llama-49m", 512, 2048, **AGAIN),
    case("llama-49m", 512, 1024, fitted=True, **FP32),
    case("llama-49m", 512, 1024, fitted=True, **{"lora.dropout": 0.1}),
    case("llama-49m", 512, 1024, **{"lora.r": 128}),
    case("llama-49m", 512, 1024, fitted=True, **{"lora.r": 128, "train.optimizer": "adamw_8bit"}),
    case("llama-49m", 512, 1024, **{"train.optimizer": "lion"}),
    case("llama-49m", 512, 1024, **NEW_TOKENS),
    case("llama-362m", 256, 512),
    case("llama-362m", 512, 1024, fitted=True, **STREAMED, **AGAIN),
    case("qwen3-42m", 512, 2048),
    case("qwen3-125m", 512, 1024, fitted=True),
    case("qwen3-125m", 512, 1024, **RESIDENT, **ATTENTION),
    case("qwen3-125m", 256, 512, **PLAIN),
    case("qwen3-596m", 256, 512),
    case("qwen3-596m", 512, 512, **STREAMED),
    case("gemma3-12m", 512, 2048, fitted=True),
    case("gemma3-58m", 512, 1024),
    case("gemma3-58m", 512, 1024, **INT8, **AGAIN),
    case("gemma3-268m", 256, 512, **STREAMED),
    pairs("dpo"), pairs("ipo"), pairs("kto"), pairs("orpo"), pairs("simpo"), pairs("reward"),
    pairs("dpo", **RESIDENT), pairs("dpo", **{"train.batch_size": 16}),
    case("llama-49m", 512, 1024, **{"lora.bias": "all"}),
    case("demo", 512, 512, **RESIDENT, **{"lora.dropout": 0.05}),
    case("llama-49m", 512, 1024, **RESIDENT, **{"lora.init": "loftq"}),
    case("qwen3-125m", 512, 1024, **{"train.optimizer": "adafactor", "lora.use_rslora": True}),
    case("llama-49m", 4096, 4096, **AGAIN, **{"train.optimizer": "adamw_8bit"}),
    case("gemma3-58m", 512, 1024, **{"lora.dropout": 0.05}, **AGAIN),
    case("llama-17m", 512, 2048, **{"train.batch_size": 1, "data.eval": "20%", "train.eval_steps": 3}),
    {"model": "demo", "data": "demo", "fitted": False, "options": REWARDS},
    case("mixtral-96m", 512, 1024), case("qwen3moe-96m", 512, 1024), case("qwen3moe-96m", 512, 1024, **FP32),
    case("olmoe-96m", 512, 1024), case("gptoss-96m", 512, 1024), case("lfm2-44m", 512, 1024),
    case("gemma4-71m", 512, 1024), case("qwen35-50m", 512, 1024, fitted=True), case("qwen35-50m", 256, 512),
    *(case(f"llama-49m-{kind}", 512, 1024, **dtype) for kind in ("float32", "float16") for dtype in (BF16, FP32)),
]  # fmt: skip
NARROW_CASES = [4, 9, 15, 17, 18, 19, 20, 21, 22, 27, 31, 37]  # of CASES


def name_of(case: dict[str, Any]) -> str:
    what = case.get("data") or case.get("pairs") or f"rows to {case['longest']}, {case['at_once']} at once"
    return ", ".join(
        [case["model"], what, *(f"{key.partition('.')[2]} {value}" for key, value in case["options"].items())]
    )


def make_model(folder: Path, name: str) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from strop.models.source import locate
    from strop.models.tokenizer import load_tokenizer

    if not (folder / name / "tokenizer_config.json").is_file():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**MODELS[name])
        dtype = getattr(torch, MODELS[name].get("dtype", "bfloat16"))
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder / name)
        load_tokenizer(locate("demo")).save_pretrained(folder / name)
    return folder / name


def write_rows(file: Path, longest: int) -> None:
    """Write random words; with the demo's template a row has `longest` / 4 to `longest` tokens."""
    rng = random.Random(0)

    def row(tokens: int) -> dict[str, Any]:
        text = "x" + "".join(rng.choices(WORDS, k=tokens - 45))
        return {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": text}]}

    rows = [row(rng.randint(longest // 4, longest)) for _ in range(STEPS * ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def random_rows(file: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Write the rows of a case, and return the options of its run."""
    write_rows(file, case["longest"])
    return {
        "data.max_length": case["longest"], "train.batch_size": ROWS, "train.learning_rate": 1e-4,
        "train.micro_batch_tokens": case["at_once"], "train.gradient_checkpointing": "off",
        "model.quantization": "none",
    }  # fmt: skip


def hide_instructions() -> None:
    """Hide AVX512 and AMX from strop; the environment hides them from PyTorch and numba."""
    from strop.machine import probe

    name, flags = probe._cpu()
    probe._cpu = lambda: (name, [flag for flag in flags if not flag.startswith(("avx512", "amx"))])  # type: ignore


def run(folder: Path, case: dict[str, Any], snips: Path | None) -> dict[str, Any]:
    import strop
    from strop.demo import data_files
    from strop.demo import pairs as demo_pairs

    model = case["model"] if case["model"] == "demo" else str(make_model(folder, case["model"]))
    with tempfile.TemporaryDirectory() as temp:
        rows = Path(temp) / "rows.jsonl"
        options: dict[str, Any] = {"train.max_steps": STEPS, "model.device": "cpu"}
        if "data" in case:
            rows = data_files()[0] if case["data"] == "demo" else snips or rows
            options["train.max_steps"] = 40
        elif "pairs" in case:
            demo_pairs.write_pairs(rows, Path(temp) / "held.jsonl")
            options |= {"train.objective": case["pairs"]}
        else:
            options |= random_rows(rows, case)
        report = strop.train(model=model, data=str(rows), out=f"{temp}/run", **{**options, **case["options"]}).report
    memory, prefixes = report["memory"], ("model.", "lora.", "train.")
    recipe = {one["field"]: one["value"] for one in report["recipe"] if one["origin"] != "default"}
    return {
        "name": name_of(case), "fitted": case["fitted"], "measured_bytes": memory["measured_peak_bytes"],
        "predicted_then": memory["predicted_peak_bytes"], "micro_batch": memory["micro_batch"],
        "recipe": {name: value for name, value in recipe.items() if name.startswith(prefixes) and name != "model.name"},
        "tiles": setting_of(case["model"], recipe).compute.attention_tiles,
        "step": setting_of(case["model"], recipe).compute.step,
        "steps": report["steps"],
    }  # fmt: skip


@cache
def report_settings(model: str) -> Any:
    from strop.models.families.shape import ModelInfo, ModelShape, read_model_info
    from strop.models.introspect import refine_with_model

    if model == "demo":
        return read_model_info("demo")
    shape = ModelShape.from_config(MODELS[model])
    return refine_with_model(ModelInfo(model, shape, shape.parameters, MODELS[model]))


def setting_of(model: str, recipe: dict[str, Any]) -> Any:
    from strop.config.load import resolve
    from strop.planning.workload import Workload

    options = {name: value for name, value in recipe.items() if name.startswith(("model.", "lora.", "train."))}
    result = report_settings(model)
    resolved = resolve(None, {**options, "model.name": "m", "data.train": "d"}).recipe
    return Workload.from_recipe(resolved, result.shape, parameters=result.parameters, threads=1)


def predicted_bytes(one: dict[str, Any]) -> int:
    """Return the current prediction for a run with a known micro-batch and the step that it was measured with."""
    from strop.planning.activations import MicroBatch
    from strop.planning.memory import load_phase, train_phase

    setting = setting_of(one["name"].partition(",")[0], one["recipe"])
    setting = setting.replace(attention_tiles=one["tiles"], step=one.get("step", setting.compute.step))
    batch = MicroBatch(**{**one["micro_batch"], "documents": tuple(map(tuple, one["micro_batch"]["documents"]))})
    return max(phase.peak_bytes for phase in (load_phase(setting), train_phase(setting, batch)))


def error_of(one: dict[str, Any]) -> float:
    return predicted_bytes(one) / one["measured_bytes"] - 1


def table(results: list[dict[str, Any]]) -> str:
    def summarize(what: str, chosen: list[dict[str, Any]]) -> str:
        errors = [abs(error_of(one)) for one in chosen]
        return f"{len(chosen)} runs {what}: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}."

    lines = [
        f"| {one['name']}{', without AVX512' if one['narrow'] else ''} | {'fitted' if one['fitted'] else ''} "
        f"| {predicted_bytes(one) / 2**20:,.0f} | {one['measured_bytes'] / 2**20:,.0f} | {error_of(one):+.1%} |"
        for one in results
    ]
    summaries = [summarize(what, [one for one in results if one["fitted"] == fitted]) for what, fitted in GROUPS]
    head = ["| run | | predicted, MiB | measured | error |", "|---|---|---:|---:|---:|"]
    return "\n".join(["\n\n".join(summaries), "", *head, *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the random models")
    parser.add_argument("--snips", type=Path, help="rows of messages, as long as SNIPS'")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--fitted", action="store_true", help="only those that constants are fitted on")
    parser.add_argument("--missing", action="store_true", help="only those that are not in --out yet")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        if args.narrow:  # and in fp32, which such a CPU would choose, since the rates of this one are cached
            hide_instructions()
            CASES[args.case]["options"] = {**FP32, **CASES[args.case]["options"]}
        print(json.dumps(run(args.folder, CASES[args.case], args.snips)))
        return
    previous = json.loads(args.out.read_text("utf-8"))["results"] if args.out and args.out.is_file() else []
    result = {(one["name"], one["narrow"]): one for one in previous}
    for number in NARROW_CASES if args.narrow else range(len(CASES)):
        name = name_of(CASES[number])
        if (args.fitted and not CASES[number]["fitted"]) or (args.missing and (name, args.narrow) in result):
            continue
        if args.only not in name or (CASES[number].get("data") == "snips" and args.snips is None):
            continue
        try:
            one = child(
                [sys.executable, __file__, *sys.argv[1:], "--case", str(number)],
                {"OMP_NUM_THREADS": "1", **(NARROW if args.narrow else {})},
            )
        except RuntimeError as error:
            print(str(error)[-600:], file=sys.stderr)
            continue
        fitted = one["fitted"] and not args.narrow
        result[name, args.narrow] = {**one, "name": name, "fitted": fitted, "narrow": args.narrow}
        print(
            f"{name}: {error_of(one):+.1%} of {one['measured_bytes'] >> 20}",
            file=sys.stderr,
        )
        if args.out:
            write(args.out, list(result.values()))


if __name__ == "__main__":
    main()
