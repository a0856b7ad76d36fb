"""Compare GRPO in strop and in TRL's GRPOTrainer with 8 completions per prompt, in prompts/s.

    python benchmarks/grpo_speed.py --trl PYTHON [--steps 2] [--answer 48] [--out FILE]    PYTHON: one that has trl

Both train SmolLM2-135M (the demo model) in bf16 with LoRA r 16 on all linear layers: 4 prompts of about 40 tokens per
step, 8 completions of at most --answer tokens each, a KL coefficient of 0.04 and the same reward. The first step, which
compiles or warms up, is not counted. TRL generates with transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import child, peak_rss_bytes, write
from preferences import TARGETS

PROMPTS, GROUP, MICRO = 4, 8, 8


def distinct_words(gold: str, answer: str) -> float:
    """Return the share of distinct words, as the reward."""
    return len(set(answer.split())) / max(1, len(answer.split()))


def write_prompts(path: Path, number: int) -> None:
    words = "Write one short sentence about the number {} and the colour of the river in winter, and then stop."
    path.write_text("".join(json.dumps({"prompt": words.format(n)}) + "\n" for n in range(number)), encoding="utf-8")


def strop_run(data: str, steps: int, answer: int) -> dict[str, Any]:
    import strop
    from strop.runs.events import read_events

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "train.objective": "grpo", "train.rewards": f"{__file__}:varied", "train.group": GROUP,
            "train.answer_tokens": answer, "train.batch_size": PROMPTS, "train.max_steps": steps + 1,
            "model.dtype": "bf16",
        }  # fmt: skip
        strop.train(model="demo", data=data, out=f"{folder}/run", **options)
        step_events = [e for e in read_events(Path(folder) / "run" / "events.jsonl") if e["event"] == "step"]
    seconds = step_events[-1]["time"] - step_events[0]["time"]
    return {
        "prompts_per_s": steps * PROMPTS / seconds, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes(),
        "answer_length": sum(e["answer_length"] for e in step_events[1:]) / steps,
    }  # fmt: skip


def trl_run(model: str, data: str, steps: int, answer: int) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    lengths: list[int] = []
    ends: list[float] = []

    def reward(completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
        return [distinct_words("", turns[0]["content"]) for turns in completions]

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    rows = load_dataset("json", data_files=data, split="train")
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
            per_device_train_batch_size=MICRO, gradient_accumulation_steps=PROMPTS * GROUP // MICRO,
            max_steps=steps + 1, num_generations=GROUP, max_completion_length=answer, beta=0.04,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), args=args, train_dataset=rows,
            reward_funcs=reward, callbacks=[Ends()],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS),
        )  # fmt: skip
        trainer.train()
    seconds = ends[-1] - ends[0]
    return {
        "prompts_per_s": steps * PROMPTS / seconds, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes(),
        "answer_length": sum(lengths[-steps:]) / steps,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="a Python with trl")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "MODEL", "DATA"))
    args = parser.parse_args()
    if args.child:
        tool, model, data = args.child
        sizes = (args.steps, args.answer)
        print(json.dumps(strop_run(data, *sizes) if tool == "strop" else trl_run(model, data, *sizes)))
        return
    from strop.models.load import weights_folder
    from strop.models.source import locate
    from strop.models.tokenizer import load_tokenizer

    source = locate("demo")
    with tempfile.TemporaryDirectory() as folder:
        data, model = Path(folder) / "prompts.jsonl", Path(folder) / "model"
        write_prompts(data, PROMPTS * (args.steps + 1))
        load_tokenizer(source).save_pretrained(model)
        for file in weights_folder(source).iterdir():
            (model / file.name).symlink_to(file)
        common = [__file__, "--steps", str(args.steps), "--answer", str(args.answer)]
        results = {"strop": child([sys.executable, *common, "--child", "strop", str(model), str(data)])}
        print("strop", json.dumps(results["strop"]), flush=True)
        if args.trl:
            results["trl"] = child([args.trl, *common, "--child", "trl", str(model), str(data)])
            print("trl", json.dumps(results["trl"]), flush=True)
    if args.out:
        write(args.out, results)


if __name__ == "__main__":
    main()
