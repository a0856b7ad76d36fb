"""Compare the greedy answers of a merged folder in plain transformers with those of the adapter on its base.

    python benchmarks/merged_answers.py RUN... --data ROWS.jsonl [--dtypes fp32,bf16 --compute fp32,bf16] [--out R.json]

Merges each run in each dtype, and stores strop's measurements of the merge with the results. The adapter computes in
the dtype of the merged model, on the base that the merge chose. Rows are batched by length with left padding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import measured
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import strop
from strop.evaluation.compare import make_questions
from strop.evaluation.run import read_conversations
from strop.models.load import DTYPES


def answers(model: Any, tokenizer: Any, chats: list[list[dict[str, str]]], stop_ids: list[int]) -> list[str]:
    results: dict[int, str] = {}
    order = sorted(range(len(chats)), key=lambda row: len(str(chats[row])))
    for start in range(0, len(order), 30):
        rows = order[start : start + 30]
        texts = [tokenizer.apply_chat_template(chats[row], tokenize=False, add_generation_prompt=True) for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
        with torch.inference_mode():
            out = model.generate(
                **batch, max_new_tokens=80, do_sample=False, pad_token_id=pad, eos_token_id=stop_ids,
                repetition_penalty=1.0,
            )  # fmt: skip
        for row, new in zip(rows, out[:, batch["input_ids"].shape[1] :], strict=True):
            results[row] = tokenizer.decode(new, skip_special_tokens=True)
    return [results[row] for row in range(len(chats))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--compute", default="fp32,bf16", help="types to answer in; empty: no answers")
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = make_questions(read_conversations(options.data))
    chats = [[vars_of(message) for message in row.conversation.messages[:-1]] for row in rows]
    results = []
    for run, dtype in product(options.runs, options.dtypes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            merged = strop.merge(run, Path(folder) / "merged", dtype=dtype, data=options.data)
            tokenizer = AutoTokenizer.from_pretrained(merged.out)
            same = {}
            for compute in filter(None, options.compute.split(",")):
                how = "none" if merged.base == "original" else "auto"
                tuned = strop.load(run, dtype=compute, quantization=how)
                stop_ids = list(tuned.renderer.stop_ids)
                ours = answers(tuned.module, tokenizer, chats, stop_ids)
                del tuned
                model = AutoModelForCausalLM.from_pretrained(merged.out, dtype=DTYPES[compute])
                theirs = answers(model, tokenizer, chats, stop_ids)
                del model
                same[compute] = sum(a == b for a, b in zip(ours, theirs, strict=True))
            row_result = {"run": Path(run).name, "dtype": dtype, "rows": len(rows), "same": same, **merged.as_json()}
            results.append({key: value for key, value in row_result.items() if key not in ("out", "files")})
            print(json.dumps(results[-1]), flush=True)
    if options.out:
        measured.write(options.out, results)


def vars_of(message: Any) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


if __name__ == "__main__":
    main()
