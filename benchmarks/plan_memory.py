"""What `strop train` needed against what was predicted: peak resident memory, and tokens a second with --time.

    python benchmarks/plan_memory.py FOLDER [--only TEXT] [--time] [--out docs/plan_runs.json] [--page docs/plan.md]

FOLDER gets the random models (3 GB). Each case is a run of its own in a process of its own: two steps on rows of one
length, three with --time. Memory does not depend on speed; measure time on a quiet machine, after `strop doctor`. The
results are kept in --out, and the tables of --page are written anew from all of them.

Memory is measured with an allocator that gives back what is freed (glibc keeps blocks below 32 MiB otherwise, in pieces
that may fit nothing; the runs of --time are as runs have it). That costs 6 % of the speed, which is why runs do not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
STREAMED = {"model.quantization": "nf4", "model.resident_layers": 0}
RESIDENT = {"model.quantization": "nf4", "model.resident_layers": 1000}
INT8 = {"model.quantization": "int8", "model.resident_layers": 0}
AGAIN = {"train.gradient_checkpointing": "on"}
ATTENTION = {"lora.target_modules": "attention"}


def case(model: str, rows: int, tokens: int, **options: Any) -> dict[str, Any]:
    return {"model": model, "rows": rows, "tokens": tokens, "options": options}


CASES = [
    case("demo", 1, 256),
    case("demo", 2, 512),
    case("demo", 1, 1024),
    case("demo", 1, 1024, **AGAIN),
    case("demo", 1, 512, **RESIDENT),
    case("demo", 1, 512, **STREAMED),
    case("demo", 1, 512, **INT8),
    case("demo", 1, 512, **{"lora.r": 128}),
    case("demo", 1, 512, **ATTENTION, **{"lora.r": 8}),
    case("llama-17m", 1, 8192),
    case("llama-17m", 1, 8192, **AGAIN),
    case("llama-17m", 1, 4096),
    case("llama-49m", 4, 512),
    case("llama-49m", 16, 128),
    case("llama-49m", 1, 2048),
    case("llama-49m", 4, 512, **AGAIN),
    case("llama-49m", 4, 512, **{"train.gradient_checkpointing": 3}),
    case("llama-49m", 4, 512, **ATTENTION),
    case("llama-49m", 2, 512, **{"model.dtype": "fp32"}),
    case("llama-49m", 2, 512, **{"model.quantization": "int8", "model.resident_layers": 4}),
    case("llama-49m", 4, 512, **{"train.micro_batch_tokens": 512}),
    case("llama-49m", 2, 256, **{"lora.dropout": 0.1}),
    case("llama-49m", 1, 512, **{"lora.r": 128}),
    *(
        case("llama-49m", 1, 512, **{"lora.r": 128, "train.optimizer": name})
        for name in ("adamw_8bit", "paged_adamw_8bit", "adafactor", "lion", "sgd")
    ),
    case("llama-362m", 1, 256),
    case("llama-362m", 1, 512, **STREAMED, **AGAIN),
    case("qwen3-42m", 4, 512),
    case("qwen3-125m", 2, 512),
    case("qwen3-125m", 2, 512, **RESIDENT, **ATTENTION, **{"lora.r": 8}),
    case("qwen3-596m", 1, 256),
    case("qwen3-596m", 1, 512, **STREAMED),
    case("gemma3-12m", 4, 512),
    case("gemma3-58m", 2, 512),
    case("gemma3-58m", 2, 512, **INT8, **AGAIN),
    case("gemma3-268m", 1, 256),
    case("gemma3-268m", 1, 512, **STREAMED),
]
TIMED = [0, 1, 2, 3, 4, 5, 8, 13, 31, 36]  # of CASES


def name_of(case: dict[str, Any]) -> str:
    options = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in case["options"].items())
    return f"{case['model']}, {case['rows']} x {case['tokens']}{', ' + options if options else ''}"


def make_model(folder: Path, name: str) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from strop.model.facts import locate
    from strop.model.tokenizer import load_tokenizer

    if not (folder / name / "tokenizer_config.json").is_file():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**MODELS[name])
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
        load_tokenizer(locate("demo")).save_pretrained(folder / name)
    return folder / name


def write_rows(file: Path, number: int, tokens: int) -> None:
    """Random words after the same system prompt; each row has this many tokens with the demo's template."""
    from strop.model.facts import locate
    from strop.model.tokenizer import load_tokenizer

    tokenizer, rng = load_tokenizer(locate("demo")), random.Random(0)

    def row(words: int) -> tuple[list[dict[str, str]], int]:
        said = [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "x" + "".join(rng.choices(WORDS, k=words))},
        ]
        return said, len(tokenizer.apply_chat_template(said, return_dict=False))

    around = row(10)[1] - 10
    rows = [row(tokens - around) for _ in range(number)]
    assert {length for _, length in rows} == {tokens}
    file.write_text("".join(json.dumps({"messages": said}) + "\n" for said, _ in rows), encoding="utf-8")


def run(folder: Path, case: dict[str, Any], steps: int) -> dict[str, Any]:
    import strop
    from strop.machine.probe import probe
    from strop.machine.rates import known_rates
    from strop.planning.speed import Rate

    model = case["model"] if case["model"] == "demo" else str(make_model(folder, case["model"]))
    rows, tokens = case["rows"], case["tokens"]
    with tempfile.TemporaryDirectory() as temp:
        data = Path(temp) / "rows.jsonl"
        write_rows(data, rows * steps, tokens)
        options = {
            "model.name": model, "data.train": str(data), "out": f"{temp}/run", "train.batch_size": rows,
            "train.max_steps": steps, "data.max_length": tokens, "train.micro_batch_tokens": rows * tokens,
            "train.learning_rate": 1e-4, "train.gradient_checkpointing": "off", "model.dtype": "bf16",
            "model.quantization": "none", "model.device": "cpu", **case["options"],
        }  # fmt: skip
        report = strop.train(**options).report
        steps_taken = [event for event in _events(Path(temp) / "run") if event["event"] == "step"]
        memory = report["memory"]
        result = {
            "measured_bytes": memory["measured_peak_bytes"],
            "micro_batch": memory["micro_batch"],
            "tiles": setting_of(case).tiles,  # as this machine's attention runs
            "tokens_per_s": statistics.median(event["tokens_per_s"] for event in steps_taken[1:]),
        }
        rates = known_rates(probe(), "cpu")
        if rates is not None:
            result["rate"] = asdict(Rate.measured(rates, "bf16"))
    return result


def _events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def setting_of(case: dict[str, Any]) -> Any:
    from strop.config.load import resolve
    from strop.model.shape import ModelShape, peek
    from strop.planning.setting import Setting

    shape = peek("demo").shape if case["model"] == "demo" else ModelShape.of(MODELS[case["model"]])
    given = {"model.name": "m", "data.train": "d", "model.device": "cpu", "model.dtype": "bf16", **case["options"]}
    return Setting.of(resolve(None, given).recipe, shape, None, 1)


def predicted(case: dict[str, Any], found: dict[str, Any]) -> tuple[float, float]:
    """Peak bytes, and tokens/s where the machine's rate was known, of a case whose micro-batch is known: of the rows'
    tokens, as runs count them, though the prefix that rows share is computed once."""
    from strop.planning.activations import MicroBatch
    from strop.planning.memory import load, train
    from strop.planning.speed import Rate, step_seconds

    setting = setting_of(case).but(tiles=found.get("tiles", False))
    batch = MicroBatch(**{**found["micro_batch"], "documents": tuple(map(tuple, found["micro_batch"]["documents"]))})
    peak = max(phase.peak_bytes for phase in (load(setting), train(setting, batch)))
    if "rate" not in found:
        return peak, 0.0
    return peak, case["rows"] * case["tokens"] / step_seconds(setting, batch, 1, Rate(**found["rate"]))


def tables(results: dict[str, Any]) -> tuple[str, str]:
    """Of memory and of time, as Markdown: measured figures beside what the formulas say now."""
    cases = {name_of(case): case for case in CASES}
    memory, time = [], []
    errors: dict[str, list[float]] = {"memory": [], "kept": [], "time": []}

    def beside(kind: str, expected: float, measured: float, form: str) -> str:
        errors[kind].append(expected / measured - 1)
        return f"{form.format(measured)} | {errors[kind][-1]:+.1%}"

    for name, found in results.items():
        timed, cells, kept = found.get("time"), " | ", " | "
        expected = predicted(cases[name], found.get("memory") or found["time"])[0] / 2**20
        if "memory" in found:
            cells = beside("memory", expected, found["memory"]["measured_bytes"] / 2**20, "{:,.0f}")
        if timed:
            kept = beside("kept", expected, timed["measured_bytes"] / 2**20, "{:,.0f}")
            rate = predicted(cases[name], timed)[1]
            time.append(f"| {name} | {rate:,.0f} | {beside('time', rate, timed['tokens_per_s'], '{:,.0f}')} |")
        memory.append(f"| {name} | {expected:,.0f} | {cells} | {kept} |")

    def said(kind: str, what: str) -> str:
        sizes = [abs(error) for error in errors[kind]]
        if not sizes:
            return ""
        return f"{len(sizes)} runs{what}: median error {statistics.median(sizes):.1%}, worst {max(sizes):.1%}.\n\n"

    rule = "\n|---|---:|---:|---:|"
    head = f"| run | predicted, MiB | measured | error | as runs have it | error |{rule}---:|---:|\n"
    return (
        said("memory", "") + said("kept", ", as runs have it") + head + "\n".join(memory) + "\n",
        said("time", "") + f"| run | predicted, tokens/s | measured | error |{rule}\n" + "\n".join(time) + "\n",
    )


def write_page(page: Path, results: dict[str, Any]) -> None:
    """Puts the tables between the page's marks."""
    text = page.read_text(encoding="utf-8")
    for mark, table in zip(("memory", "time"), tables(results), strict=True):
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        text = f"{before}<!-- {mark} -->\n{table}<!-- end -->{rest.partition('<!-- end -->')[2]}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the random models")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--numbers", default="", help="cases by their place in CASES, from 0: 3,7")
    parser.add_argument("--time", action="store_true", help="measure ten cases' tokens/s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "plan_runs.json")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "plan.md")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    kind, steps = ("time", 3) if options.time else ("memory", 2)
    if options.case is not None:
        print(json.dumps(run(options.folder, CASES[options.case], steps)))
        return
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for number in TIMED if options.time else range(len(CASES)):
        name = name_of(CASES[number])
        if options.only not in name or (options.numbers and str(number) not in options.numbers.split(",")):
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--case", str(number)]
        trimmed = {} if options.time else {"MALLOC_MMAP_THRESHOLD_": "131072"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **trimmed})
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        results.setdefault(name, {})[kind] = found = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {found}", file=sys.stderr)
        ordered = {key: results[key] for key in map(name_of, CASES) if key in results}
        options.out.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    write_page(options.page, results)


if __name__ == "__main__":
    main()
