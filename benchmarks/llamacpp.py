"""Compare a run's answers in llama.cpp with strop's by GGUF type: exact match, parity and size.

python benchmarks/llamacpp.py RUN --data test.jsonl --metric exact_json --types f16 q8_0 q4_k_m lora
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import measured

import strop
from strop.evaluation.compare import make_questions
from strop.evaluation.metrics import score
from strop.evaluation.run import read_conversations
from strop.exporting.gguf import export_gguf
from strop.exporting.llama_cpp import LlamaCpp
from strop.models.adapter_config import read_adapter_config
from strop.models.source import locate

NEW_TOKENS = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--metric", default="exact")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_k_m", "lora"], help="lora: the adapter file")
    parser.add_argument("--out", type=Path, help="results as JSON")
    args = parser.parse_args()
    model = strop.load(args.run, dtype="fp32")
    rows = make_questions(read_conversations(args.data))
    prompts = [model.renderer.prompt(row.conversation.messages[:-1], row.conversation.tools) for row in rows]
    golds = [row.gold for row in rows]
    expected = [answer.text for answer in generate_batched(model, prompts)]
    results: list[dict[str, Any]] = []

    def tell(name: str, texts: list[str], **more: Any) -> None:
        rates = score(args.metric, golds, texts).rates
        same = sum(ours == theirs for ours, theirs in zip(texts, expected, strict=True)) / len(rows)
        results.append({"type": name, "rows": len(rows), **rates, "answers_equal": same, **more})
        print(json.dumps(results[-1]), flush=True)
        if args.out:
            measured.write(args.out, results)

    tell("strop, fp32", expected)
    for kind in args.types:
        with tempfile.TemporaryDirectory() as folder:
            file, started = Path(folder) / "model.gguf", time.perf_counter()
            lora = kind == "lora"
            exported = export_gguf(args.run, file, kind=None if lora else kind, adapter=lora)
            took, parity = time.perf_counter() - started, exported.as_json()["parity"]
            base = locate(str(read_adapter_config(model.adapter or Path())["base_model_name_or_path"])).path
            size = max(map(len, prompts)) + NEW_TOKENS
            with LlamaCpp(base if lora else file, adapter=file if lora else None, context=size) as llama:
                ids = [llama.generate(prompt.tolist(), NEW_TOKENS) for prompt in prompts]
            texts = [model.tokenizer.decode(new, skip_special_tokens=True) for new in ids]
            stopped = sum(new[-1] in model.renderer.stop_ids for new in ids) / len(rows)
            tell(kind, texts, stopped=stopped, size_bytes=file.stat().st_size, export_s=took, parity=parity)


def generate_batched(model: Any, prompts: list[Any]) -> list[Any]:
    """Return greedy answers in the order of the prompts; short prompts are batched."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    results: dict[int, Any] = {}
    for start in range(0, len(order), 32):
        some = order[start : start + 32]
        answers = model.answer([prompts[row] for row in some], max_new_tokens=NEW_TOKENS)
        results.update(zip(some, answers, strict=True))
    return [results[row] for row in range(len(prompts))]


if __name__ == "__main__":
    main()
