"""Measure the peak memory of evaluate, merge, export and serve next to the prediction of `strop plan`.

    python benchmarks/phase_memory.py FOLDER [--snips test.jsonl] [--only TEXT] [--out FILE]

Random models (3 GB) and a run of two steps for each kind of adapter are written to FOLDER. Each case runs like the
command, in a new process with one thread and the default allocator. Its memory is the growth from the start of reading
weights to the peak. `python -m tests.planning.test_memory` writes the table into docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any

from measured import child, write
from plan_memory import GROUPS, MODELS, make_model, write_rows

ASKED = 40  # rows for base and tuned model, more than fit into one batch


PHASES = ("evaluate", "merge", "export", "serve")
NF4, INT8, FP32 = {"model.quantization": "nf4"}, {"model.quantization": "int8"}, {"model.dtype": "fp32"}
# Each phase of these is a case: model; rows of the demo, of SNIPS, or random rows of this maximum length; options of
# the recipe; type of the GGUF file; conversations served at once.
RUNS: list[tuple[str, str, dict[str, Any], str, int]] = [
    ("demo", "demo", {}, "q8_0", 1),
    ("demo", "demo", NF4, "f16", 4),
    ("gemma3-58m", "512", FP32, "bf16", 4),
    ("qwen3-125m", "256", INT8, "q8_0", 2),
    ("llama-362m", "256", {}, "q8_0", 4),
    ("demo", "snips", {}, "f16", 16),
    ("demo", "demo", FP32, "f32", 8),
    ("llama-49m", "1024", {"lora.r": 64}, "f16", 8),
]
# Names of cases on which a constant was fitted.
FITTED = (
    "serve demo, demo, 1 at once",
    "merge demo, demo",
    "merge demo, demo, quantization nf4",
    "export demo, demo, q8_0",
    "export demo, demo, quantization nf4, f16",
    "export demo, snips, f16",
    "export demo, demo, dtype fp32, f32",
)
CASES: list[dict[str, Any]] = [
    {"phase": phase, "model": model, "data": data, "options": options, "kind": kind, "texts": texts}
    for model, data, options, kind, texts in RUNS
    for phase in PHASES
]


def name_of(case: dict[str, Any]) -> str:
    data = f"rows to {case['data']}" if case["data"].isdigit() else case["data"]
    more = [f"{key.rpartition('.')[2]} {value}" for key, value in case["options"].items()]
    more += [str(case["kind"])] if case["phase"] == "export" else []
    more += [f"{case['texts']} at once"] if case["phase"] == "serve" else []
    return ", ".join([f"{case['phase']} {case['model']}", data, *more])


def rows_of(folder: Path, case: dict[str, Any], snips: Path | None) -> tuple[Path, Path]:
    """Return files of rows for training and for evaluation."""
    from strop.demo import data_files

    data, eval_file = case["data"], folder / f"asked-{case['data']}.jsonl"
    if data == "demo":
        train, rows = data_files()
    elif data == "snips":
        assert snips is not None
        train = rows = snips
    else:
        train = rows = folder / f"rows-{data}.jsonl"
        if not train.is_file():
            write_rows(train, int(data))
    eval_file.write_text("".join(rows.read_text("utf-8").splitlines(keepends=True)[:ASKED]), encoding="utf-8")
    return train, eval_file


def make_run(folder: Path, case: dict[str, Any], snips: Path | None) -> Path:
    """Train a run of two steps."""
    words = [
        case["model"],
        case["data"],
        *(f"{key.rpartition('.')[2]}-{value}" for key, value in case["options"].items()),
    ]
    out = folder / "runs" / "-".join(words)
    if not (out / "report.json").is_file():
        import strop

        shutil.rmtree(out, ignore_errors=True)
        model = "demo" if case["model"] == "demo" else str(make_model(folder, case["model"]))
        options = {"train.max_steps": 2, "model.device": "cpu", **case["options"]}
        if case["data"].isdigit():
            options["data.max_length"] = int(case["data"])
        strop.train(model=model, data=str(rows_of(folder, case, snips)[0]), out=str(out), **options)
    return out


class Mark(logging.Handler):
    """State of the process when it begins to read weights."""

    def __init__(self) -> None:
        super().__init__()
        self.since: Any = None

    def hear(self, text: str) -> None:
        from strop.machine.memory import start_peak

        if self.since is None and text.startswith(("loading the weights", "merging into", "writing")):
            self.since = start_peak("cpu")

    def emit(self, record: logging.LogRecord) -> None:
        self.hear(record.getMessage())


def run(folder: Path, case: dict[str, Any], snips: Path | None) -> dict[str, Any]:
    child([sys.executable, __file__, *sys.argv[1:], "--train"])
    run_folder, eval_file = make_run(folder, case, snips), rows_of(folder, case, snips)[1]
    peak = Mark()
    loading = logging.getLogger("strop.models.load")
    loading.addHandler(peak)
    loading.setLevel(logging.INFO)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder) as temp:
        if case["phase"] == "evaluate":
            from strop.evaluation.run import EvalOptions, evaluate_models

            metric = "exact" if case["data"].isdigit() else "exact_json"
            evaluate_models([str(run_folder)], str(eval_file), EvalOptions(metric=metric))
        elif case["phase"] == "merge":
            from strop.exporting.merge import merge

            merge(str(run_folder), Path(temp) / "merged", progress=peak.hear)
        elif case["phase"] == "export":
            from strop.exporting.gguf import export_gguf

            export_gguf(str(run_folder), Path(temp) / "model.gguf", kind=case["kind"], progress=peak.hear)
        else:
            result = _serve(run_folder, eval_file, case["texts"])
        result["measured_bytes"] = peak.since.peak_bytes()
    name = name_of(case)
    return {
        "name": name,
        "fitted": name in FITTED,
        "texts": case["texts"],
        **result,
        **_describe(case, run_folder, eval_file),
    }


def _serve(run_folder: Path, eval_file: Path, texts: int) -> dict[str, Any]:
    """Serve as the command does, and send the `texts` longest conversations (in characters) over HTTP at once."""
    from strop.serve.run import serve
    from strop.serve.server import open_address

    lines = sorted(eval_file.read_text("utf-8").splitlines(), key=len, reverse=True)[:texts]
    rows = [json.loads(line) for line in lines]

    def ask(url: str, model: str, row: dict[str, Any]) -> None:
        *prompt, last = row["messages"]
        if prompt == [{"role": "user", "content": "go"}]:  # random words: the long text is the prompt
            prompt = [{"role": "user", "content": last["content"]}]
        body = {"model": model, "messages": prompt, "max_tokens": 40, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        ):
            pass

    def ready(about: dict[str, Any]) -> None:
        threading.Thread(target=talk, args=(about["url"], about["models"][0])).start()

    def talk(url: str, model: str) -> None:
        asking = [threading.Thread(target=ask, args=(url, model, row)) for row in rows]
        for one in asking:
            one.start()
        for one in asking:
            one.join()
        os.kill(os.getpid(), signal.SIGINT)

    serve(
        [str(run_folder)], open_address("127.0.0.1", 0, None, []), slots=16, queue=64, context=None,
        max_body_bytes=1 << 20, on_ready=ready,
    )  # fmt: skip
    return {}


def _describe(case: dict[str, Any], run_folder: Path, eval_file: Path) -> dict[str, Any]:
    from strop.config.load import read_resolved, resolve
    from strop.engine.device import pick_generation_dtype
    from strop.planning.microbatch import measure_rows
    from strop.runs.folder import RunFolder

    recipe = read_resolved(RunFolder(run_folder).recipe).recipe
    options = {"model.dtype": recipe.model.dtype, "model.device": "cpu", "data.max_length": recipe.data.max_length}
    options |= case["options"]
    own = resolve(None, {**options, "model.name": recipe.model.name, "data.train": str(eval_file)}).recipe
    dtype, _ = pick_generation_dtype("cpu", recipe.model.dtype)
    return {"recipe": options, "rows": measure_rows(own), "answered_in": dtype}


def predicted_bytes(one: dict[str, Any]) -> int:
    """Return the current prediction for a case whose rows are known."""
    from strop.config.load import resolve
    from strop.models.families.shape import ModelShape, read_model_info
    from strop.planning.memory import (
        EvaluationLoad,
        decoding_workload,
        evaluate_phase,
        export_phase,
        load_phase,
        merge_phase,
        serve_phase,
    )
    from strop.planning.workload import Workload

    phase, model = one["name"].partition(",")[0].split()
    shape = read_model_info("demo").shape if model == "demo" else ModelShape.from_config(MODELS[model])
    recipe = resolve(None, {**one["recipe"], "model.name": "m", "data.train": "d"}).recipe
    workload = Workload.from_recipe(recipe, shape, threads=1)
    evaluation = EvaluationLoad.from_rows(one["rows"], recipe.data.max_length)
    if phase == "export":
        return export_phase(workload, evaluation.measured, one["name"].rpartition(", ")[2]).peak_bytes
    if phase == "merge":
        return merge_phase(workload, evaluation.measured).peak_bytes
    decoding = decoding_workload(workload, one["answered_in"])
    if phase == "evaluate":
        own = evaluate_phase(decoding, evaluation, 16 << 30)
    else:
        own = serve_phase(decoding, evaluation.longest, completions=one["texts"])
    return max(load_phase(decoding).peak_bytes, own.peak_bytes)


def error_of(one: dict[str, Any]) -> float:
    return predicted_bytes(one) / one["measured_bytes"] - 1


def table(results: list[dict[str, Any]]) -> str:
    def summarize(what: str, chosen: list[dict[str, Any]]) -> str:
        errors = [abs(error_of(one)) for one in chosen]
        return f"{len(chosen)} cases {what}: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}."

    groups = [(what, [one for one in results if one["fitted"] == fitted]) for what, fitted in GROUPS]
    summaries = [summarize(what, chosen) for what, chosen in groups if chosen]
    lines = [
        f"| {one['name']} | {'fitted' if one['fitted'] else ''} | {predicted_bytes(one) / 2**20:,.0f} "
        f"| {one['measured_bytes'] / 2**20:,.0f} | {error_of(one):+.1%} |"
        for one in results
    ]
    return "\n".join(["\n\n".join(summaries), "", "| case | | predicted, MiB | measured | error |",
                      "|---|---|---:|---:|---:|", *lines, ""])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the random models and the runs")
    parser.add_argument("--snips", type=Path, help="rows of messages, as long as SNIPS'")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        chosen = CASES[args.case]
        print(
            json.dumps(
                str(make_run(args.folder, chosen, args.snips)) if args.train else run(args.folder, chosen, args.snips)
            )
        )
        return
    previous = json.loads(args.out.read_text("utf-8"))["results"] if args.out and args.out.is_file() else []
    result = {one["name"]: one for one in previous}
    for number, chosen in enumerate(CASES):
        name = name_of(chosen)
        if args.only not in name or (chosen["data"] == "snips" and args.snips is None):
            continue
        try:
            one = child([sys.executable, __file__, *sys.argv[1:], "--case", str(number)], {"OMP_NUM_THREADS": "1"})
        except RuntimeError as error:
            print(str(error)[-1500:], file=sys.stderr)
            continue
        result[name] = one
        print(f"{name}: {error_of(one):+.1%} of {one['measured_bytes'] >> 20} MiB", file=sys.stderr, flush=True)
        if args.out:
            write(args.out, list(result.values()))


if __name__ == "__main__":
    main()
