"""Try strop on a tiny random model of every causal language model class of transformers.

python -m tests.models.walk                  all classes; writes docs/models.md
python -m tests.models.walk mixtral gemma3!  some of them (!: the multimodal class of the type)
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

import strop
from strop.errors import StropError
from strop.exporting.merge import merge
from strop.models.load import load_without_weights
from strop.models.source import locate
from strop.planning.plan import list_layers
from strop.training import run as run_module
from tests.support import seeing, tiny_families
from tests.support.tiny import write_rows

COLUMNS = ("modules", "plan", "train", "answer", "merge bf16", "merge fp32", "nf4")
QUICK: dict[str, Any] = {
    "model.dtype": "fp32", "model.device": "cpu", "lora.r": 4, "train.max_steps": 3, "train.batch_size": 2,
    "train.micro_batch": 2, "train.learning_rate": 1e-3, "train.warmup": 0, "data.max_length": 128,
}  # fmt: skip


def attempt(work: Callable[[], str]) -> str:
    """Return `ok ...`, `refused: reason` for one of strop's errors, or `FAULT: ...` for any other error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    except StropError as error:
        return f"refused: {error.what}"
    except Exception as error:  # finding these is the purpose
        at = traceback.extract_tb(error.__traceback__)[-1]
        lines = str(error).strip().splitlines() or [""]
        return f"FAULT: {type(error).__name__}: {lines[0][:160]} ({Path(at.filename).name}:{at.lineno})"


def walk(kind: str, folder: Path) -> dict[str, str]:
    """Return each column's result for a model type; a type ending with ! means its multimodal class."""
    multimodal, name = kind.endswith("!"), kind.rstrip("!")
    base, rows = folder / "base", write_rows(folder / "rows.jsonl", 6)
    results: dict[str, str] = {}

    def build() -> str:
        tiny_families.save(name, base, multimodal=multimodal)
        return "ok"

    def trainable_by_transformers() -> str:
        auto = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
        model = auto.from_pretrained(base)
        ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return "ok"

    def train(out: str, **more: Any) -> str:
        run = strop.train(model=base, data=rows, out=folder / out, **{**QUICK, **more})
        events = [json.loads(line) for line in (folder / out / "events.jsonl").read_text().splitlines()]
        start = next(event for event in events if event["event"] == "start")
        weights = sum(weight.numel() for weight in load_without_weights(locate(str(base))).parameters())
        assert start["parameters"]["all"] == weights, (start["parameters"], weights)
        assert run.report["loss"]["last"] == run.report["loss"]["last"]
        return f"ok {start['engine']}"

    def plan() -> str:
        shown = strop.plan(model=base, data=rows, memory=8 << 30, **QUICK)
        weights = sum(weight.numel() for weight in load_without_weights(locate(str(base))).parameters())
        off = shown.workload.base.parameters / weights - 1
        return f"ok {off:+.0%}" if abs(off) < 0.15 else f"FAULT: parameters off by {off:+.0%}"

    def modules() -> str:
        return f"ok {len(list_layers(str(base))[0])}"

    def answer() -> str:
        text = strop.load(folder / "run", dtype="fp32").generate(["what is 3"], max_new_tokens=4)
        return "ok" if len(text) == 1 else "FAULT: no answer"

    def merged(dtype: str) -> str:
        out = merge(str(folder / "run"), folder / f"merged-{dtype}", dtype=dtype)
        assert out.parity is not None
        return f"ok {out.parity.kl_mean:.1g}"

    results["made"] = attempt(build)
    if not results["made"].startswith("ok"):
        return results
    results["own"] = attempt(trainable_by_transformers)
    results["modules"] = attempt(modules)
    results["plan"] = attempt(plan)
    results["train"] = attempt(lambda: train("run"))
    if results["train"].startswith("ok"):
        results["answer"] = attempt(answer)
        results["merge bf16"] = attempt(lambda: merged("bf16"))
        results["merge fp32"] = attempt(lambda: merged("fp32"))
    results["nf4"] = attempt(lambda: train("run4", **{"model.quantization": "nf4"}))
    return results


def main(kinds: Sequence[str], processes: int) -> dict[str, dict[str, str]]:
    with ProcessPoolExecutor(processes, initializer=_quiet) as pool:
        return dict(zip(kinds, pool.map(_walk_one, kinds), strict=True))


def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    run_module.write_report = lambda *_: None  # pages with plots, which take a third of the time


def _walk_one(kind: str) -> dict[str, str]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = walk(kind, Path(folder))
    summary = "; ".join(f"{name}: {result}" for name, result in results.items())
    print(f"{kind} ({time.monotonic() - started:.1f} s) {summary}", flush=True)
    return results


PAGE = Path(__file__).parents[2] / "docs/models.md"
HEAD = """# Models

This table shows how strop works with each class that transformers {version} maps to a causal language model, and with
multimodal checkpoints whose language model is trained. `python -m tests.models.walk` wrote each row: it saves a tiny
random checkpoint of the class, then runs `plan`, three steps of training with adapters on all linear layers and
experts, one generation, merges in bf16 and fp32 that are compared with the adapter, and training on the base in nf4.
The table shows that the code is correct for the class, not how good a model becomes.

- **train**: the step that trains it, fast or plain (docs/performance.md), or why it is refused. If the reason begins
  with transformers or peft, the error is theirs: plain transformers fails on the same checkpoint.
  Models like BERT are tested with `is_decoder: true` in their config; without it a token attends to later tokens, and
  training is refused.
  Some configs of a fast class need the plain step, which the run reports: rotary embeddings of type `dynamic` or
  `longrope` (Phi-3 and Phi-4-mini with 128k), whose angles depend on the longest row computed together, dropout in the
  model, a loss that balances experts.
- **merge**: ok if the merged model equals the tuned one ([limits](after.md#merging)).
- **nf4**: ok if the model was trained on the base in 4 bit.

{counts}

| type | class | train | plan | answer | merge bf16 | merge fp32 | nf4 |
|---|---|---|---|---|---|---|---|
"""


def page(results: Mapping[str, Mapping[str, str]]) -> str:
    """Return docs/models.md from the results by model type."""
    classes = {**tiny_families.text_types(), **{f"{k}!": c for k, c in tiny_families.multimodal_types().items()}}
    rows = []
    for kind, row in results.items():
        outcome = row.get("made", "")
        train = row.get("train", outcome) if outcome.startswith("ok") else f"no tiny one: {outcome.partition(': ')[2]}"
        cells = [row.get(name, "") for name in ("plan", "answer", "merge bf16", "merge fp32", "nf4")]
        name = kind.rstrip("!") + (" (sees)" if kind.endswith("!") else "")
        rows.append(f"| {name} | {classes[kind]} | {_cell(train)} | {' | '.join(map(_cell, cells))} |\n")
    counts = [f"{len(results)} classes"]
    for name in ("plan", "train", "answer", "merge bf16", "merge fp32", "nf4"):
        attempts = [row[name] for row in results.values() if name in row]
        counts.append(f"{name}: {sum(result.startswith('ok') for result in attempts)} of {len(attempts)}")
    return (
        HEAD.format(version=transformers.__version__, counts="; ".join(counts) + ".")
        + "".join(rows)
        + "\n"
        + seeing.table()
    )


def _cell(result: str) -> str:
    state, _, rest = result.partition(" ")
    if state == "ok":
        return rest if rest in ("fast", "plain") else "ok"
    return re.sub(r"/\S*/(base|adapter|merged-\w+)(: )?", "", result.replace("|", "/")).strip()[:200]


if __name__ == "__main__":
    selected = sys.argv[1:]
    all_results = main(
        selected or [*tiny_families.text_types(), *tiny_families.MULTIMODAL], processes=os.cpu_count() or 1
    )
    if not selected:
        PAGE.write_text(page(all_results), encoding="utf-8")
