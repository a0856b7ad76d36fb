"""Tokens a second of `strop train` against what was predicted.

    python benchmarks/plan_time.py FOLDER [--only TEXT] [--out docs/plan_runs.json]

FOLDER gets the random models. Each case is a process of its own, three steps on rows of one length: on a quiet machine,
after `strop doctor`. The results are kept in --out; `python -m tests.planning.test_memory` puts them into docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measured import child
from plan_memory import AGAIN, ATTENTION, RESIDENT, STREAMED, WORDS, make_model, setting_of

STEPS = 3


def case(model: str, rows: int, tokens: int, **options: Any) -> dict[str, Any]:
    return {"model": model, "rows": rows, "tokens": tokens, "options": options}


CASES = [
    case("demo", 1, 256),
    case("demo", 2, 512),
    case("demo", 1, 1024),
    case("demo", 1, 1024, **AGAIN),
    case("demo", 1, 512, **RESIDENT),
    case("demo", 1, 512, **STREAMED),
    case("demo", 1, 512, **ATTENTION, **{"lora.r": 8}),
    case("llama-49m", 16, 128),
    case("qwen3-125m", 2, 512),
    case("gemma3-58m", 2, 512),
]


def name_of(case: dict[str, Any]) -> str:
    options = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in case["options"].items())
    return f"{case['model']}, {case['rows']} x {case['tokens']}{', ' + options if options else ''}"


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


def run(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    import strop
    from strop.machine.probe import probe
    from strop.machine.rates import known_rates
    from strop.planning.speed import Rate

    model = case["model"] if case["model"] == "demo" else str(make_model(folder, case["model"]))
    rows, tokens = case["rows"], case["tokens"]
    with tempfile.TemporaryDirectory() as temp:
        data = Path(temp) / "rows.jsonl"
        write_rows(data, rows * STEPS, tokens)
        options = {
            "model.name": model, "data.train": str(data), "out": f"{temp}/run", "train.batch_size": rows,
            "train.max_steps": STEPS, "data.max_length": tokens, "train.micro_batch_tokens": rows * tokens,
            "train.learning_rate": 1e-4, "train.gradient_checkpointing": "off", "model.dtype": "bf16",
            "model.quantization": "none", "model.device": "cpu", **case["options"],
        }  # fmt: skip
        report = strop.train(**options).report
        events = [json.loads(line) for line in (Path(temp) / "run" / "events.jsonl").read_text("utf-8").splitlines()]
    speeds = [event["tokens_per_s"] for event in events if event["event"] == "step"]
    rates = known_rates(probe(), "cpu")
    if rates is None:
        raise RuntimeError("strop doctor has not measured this machine")
    return {
        "micro_batch": report["memory"]["micro_batch"],
        "tiles": setting_of(case["model"], case["options"]).tiles,  # as this machine's attention runs
        "tokens_per_s": statistics.median(speeds[1:]),
        "rate": asdict(Rate.measured(rates, "bf16")),
    }


def predicted(case: dict[str, Any], found: dict[str, Any]) -> float:
    """Tokens/s of a case whose micro-batch is known: of the rows' tokens, as runs count them, though the prefix that
    rows share is computed once."""
    from strop.planning.activations import MicroBatch
    from strop.planning.speed import Rate, step_seconds

    setting = setting_of(case["model"], case["options"]).but(tiles=found["tiles"])
    batch = MicroBatch(**{**found["micro_batch"], "documents": tuple(map(tuple, found["micro_batch"]["documents"]))})
    return case["rows"] * case["tokens"] / step_seconds(setting, batch, 1, Rate(**found["rate"]))


def table(results: dict[str, Any]) -> str:
    """Markdown: measured figures beside what the formulas say now."""
    cases, lines, errors = {name_of(case): case for case in CASES}, list[str](), list[float]()
    for name, found in results.items():
        expected, measured = predicted(cases[name], found), found["tokens_per_s"]
        errors.append(expected / measured - 1)
        lines.append(f"| {name} | {expected:,.0f} | {measured:,.0f} | {errors[-1]:+.1%} |")
    sizes = list(map(abs, errors))
    said = f"{len(sizes)} runs: median error {statistics.median(sizes):.1%}, worst {max(sizes):.1%}."
    return "\n".join([said, "", "| run | predicted, tokens/s | measured | error |", "|---|---:|---:|---:|", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the random models")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "plan_runs.json")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run(options.folder, CASES[options.case])))
        return
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for number, case in enumerate(CASES):
        name = name_of(case)
        if options.only not in name:
            continue
        try:
            results[name] = child([sys.executable, __file__, *sys.argv[1:], "--case", str(number)])
        except RuntimeError as error:
            print(f"{name}: {str(error)[-300:]}", file=sys.stderr)
            continue
        print(f"{name}: {results[name]['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
        ordered = {key: results[key] for key in map(name_of, CASES) if key in results}
        options.out.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
