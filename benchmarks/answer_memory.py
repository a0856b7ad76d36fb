"""What answering needed against what `strop plan` says of it: peak resident memory.

    python benchmarks/answer_memory.py FOLDER [--only TEXT] [--out FILE]

FOLDER gets the random models. Each case is a process of its own: a model, with an adapter or without, answers texts of
one length together, to their end. Memory is what the process grows by after its imports, as it is for a user.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import measured
from plan_memory import MODELS, make_model

CASES = [
    {"model": "demo", "dtype": "bf16", "texts": 1, "prompt": 1000, "answer": 24},
    {"model": "demo", "dtype": "bf16", "texts": 32, "prompt": 200, "answer": 40},
    {"model": "demo", "dtype": "fp32", "texts": 16, "prompt": 200, "answer": 40},
    {"model": "demo", "dtype": "bf16", "texts": 16, "prompt": 500, "answer": 12, "rank": 16},
    {"model": "demo", "dtype": "bf16", "texts": 16, "prompt": 200, "answer": 40, "quantization": "nf4"},
    {"model": "demo", "dtype": "bf16", "texts": 16, "prompt": 200, "answer": 40, "quantization": "int8", "rank": 16},
    {"model": "llama-49m", "dtype": "bf16", "texts": 64, "prompt": 100, "answer": 40, "rank": 64},
    {"model": "llama-362m", "dtype": "bf16", "texts": 8, "prompt": 500, "answer": 12},
    {"model": "llama-362m", "dtype": "bf16", "texts": 8, "prompt": 500, "answer": 12, "quantization": "nf4"},
    {"model": "qwen3-125m", "dtype": "bf16", "texts": 16, "prompt": 300, "answer": 20},
    {"model": "qwen3-125m", "dtype": "fp32", "texts": 16, "prompt": 300, "answer": 20, "rank": 16},
    {"model": "gemma3-58m", "dtype": "bf16", "texts": 16, "prompt": 700, "answer": 12},
]


def name_of(case: dict[str, Any]) -> str:
    more = [str(case["quantization"])] if "quantization" in case else []
    more += [f"r {case['rank']}"] if "rank" in case else []
    return ", ".join([
        f"{case['model']} {case['dtype']}", *more, f"{case['texts']} x {case['prompt']} + {case['answer']}"
    ])  # fmt: skip


def run(folder: Path, case: dict[str, Any]) -> int:
    """Bytes that the process grew by at its peak."""
    import numpy as np
    import peft
    import torch

    from strop.engine.answers.batch import answer_all
    from strop.engine.answers.held import batch_for
    from strop.engine.answers.text import Text
    from strop.machine.memory import mark
    from strop.model.facts import locate
    from strop.model.load import load_base

    model_name = case["model"] if case["model"] == "demo" else str(make_model(folder, case["model"]))
    since = mark("cpu")
    dtype = torch.bfloat16 if case["dtype"] == "bf16" else torch.float32
    model: Any = load_base(locate(model_name), dtype, "cpu", quantization=case.get("quantization", "none"))
    if "rank" in case:
        model = peft.get_peft_model(model, peft.LoraConfig(r=case["rank"], target_modules="all-linear"))
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 40_000, case["prompt"]).astype(np.int32) for _ in range(case["texts"])]
    texts = [Text(ids, "default" if "rank" in case else None, most=case["answer"]) for ids in prompts]
    for _ in answer_all(batch_for(model.eval(), texts), texts):
        pass
    return since.peak_bytes()


def predicted(case: dict[str, Any]) -> int:
    from strop.config.load import resolve
    from strop.model.shape import ModelShape, peek
    from strop.planning.memory import load, serve
    from strop.planning.setting import Setting

    shape = peek("demo").shape if case["model"] == "demo" else ModelShape.of(MODELS[case["model"]])
    given: dict[str, Any] = {
        "model.name": "m", "data.train": "d", "model.device": "cpu", "model.dtype": case["dtype"],
        "model.quantization": case.get("quantization", "none"), "model.resident_layers": 0,
        "lora.r": case.get("rank", 8),
    }  # fmt: skip
    setting = Setting.of(resolve(None, given).recipe, shape, None, 2)
    if "rank" not in case:
        setting = setting.but(ranks=tuple(0 for _ in setting.ranks))
    together = serve(setting, case["prompt"] + case["answer"], texts=case["texts"])
    return max(load(setting).peak_bytes, together.peak_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps({"bytes": run(args.folder, CASES[args.case])}))
        return
    rows = []
    for number, case in enumerate(CASES):
        if args.only not in name_of(case):
            continue
        words = [sys.executable, __file__, str(args.folder), "--case", str(number)]
        child = subprocess.run(words, capture_output=True, text=True, check=True)
        took, said = json.loads(child.stdout.splitlines()[-1])["bytes"], predicted(case)
        rows.append({"case": name_of(case), "measured_bytes": took, "predicted_bytes": said})
        print(f"{name_of(case):55} {took / 2**20:7,.0f} MiB measured, {said / 2**20:7,.0f} predicted, "
              f"{said / took - 1:+.1%}", flush=True)  # fmt: skip
    if args.out:
        measured.write(args.out, rows)


if __name__ == "__main__":
    main()
