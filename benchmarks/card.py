"""One card: tokens/s and peak memory of strop's step beside TRL's, 16 bit, nf4, int8, by length; and what was planned.

    python benchmarks/card.py FOLDER --shape 8b [--schemes none,nf4,int8 --lengths 1024,4096,16384] [--out RESULT.json]

FOLDER gets random weights in the shape (16 GB for 8b). The environment needs trl, and liger-kernel for "trl, liger".
Each figure is a process of its own: one step to warm up, then the median of three, of one row of that length, r 16 on
all linear layers, the whole row in the loss. TRL checkpoints its activations, as is its default; strop as --checkpoint
says (off by default). `--device cpu --shape tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measured

SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 49152),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
STEPS = 4


def make(folder: Path, shape: str) -> None:
    from big_model import write_model
    from transformers import LlamaConfig

    from strop.model.facts import locate
    from strop.model.tokenizer import load_tokenizer

    hidden, inner, layers, heads, few, words = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=few, tie_word_embeddings=False,
        max_position_embeddings=32768, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    write_model(folder, config)
    load_tokenizer(locate("demo")).save_pretrained(folder)


def timed(step: Any, device: str) -> float:
    """Median seconds of a step behind the first."""
    import torch

    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def strop(options: argparse.Namespace, scheme: str, length: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from strop.config.load import resolve
    from strop.config.schema import LoraSection
    from strop.data.conversation import Example
    from strop.engine.cpu.precision import measure
    from strop.engine.device import prepare_process
    from strop.engine.step import step_for
    from strop.model.facts import locate
    from strop.model.load import load_base
    from strop.model.lora import add_lora, trainable
    from strop.model.shape import peek
    from strop.planning.activations import MicroBatch
    from strop.planning.memory import train
    from strop.planning.setting import Setting
    from strop.planning.speed import flops

    prepare_process()
    more = {} if scheme == "none" else {"resident_layers": options.resident_layers}
    base = load_base(locate(str(options.folder)), torch.bfloat16, options.device, quantization=scheme, **more)
    model = add_lora(base, LoraSection(r=16, alpha=32.0), None).train()
    step, weights = step_for(model), list(trainable(model).values())
    step.checkpoint(options.checkpoint)
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    ids = np.random.default_rng(0).integers(1, 49000, length).astype(np.int32)
    row = Example(ids, np.float32(np.arange(length) > 0), "", 0)

    def one() -> None:
        (step.token_loss([row]) / row.supervised).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = timed(one, options.device)
    given = {
        "model.name": "m", "data.train": "d", "model.device": options.device, "model.dtype": "bf16",
        "model.quantization": scheme, "train.gradient_checkpointing": options.checkpoint or "off",
        **({"model.resident_layers": options.resident_layers} if scheme != "none" else {}),
    }  # fmt: skip
    setting = Setting.of(resolve(None, given).recipe, peek(str(options.folder)).shape)
    batch = MicroBatch.rows([length])
    planned = train(setting, batch)
    rate = measure(options.device).bf16_flops
    return {
        "tokens_per_s": length / seconds, "peak_bytes": peak(options.device), "step": step.name,
        "planned_bytes": planned.peak_bytes - (planned.parts["framework"] if options.device == "cuda" else 0),
        "matmul_flops": rate, "share_of_matmul": flops(setting, batch).total / seconds / rate,
    }  # fmt: skip


def trl(options: argparse.Namespace, scheme: str, length: int, liger: bool = False) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    quantization = {
        "none": {},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
    }[scheme]
    if scheme == "nf4":
        quantization["bnb_4bit_compute_dtype"] = torch.bfloat16
    more = {"quantization_config": BitsAndBytesConfig(**quantization)} if quantization else {}
    model = AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=torch.bfloat16, device_map=options.device, **more
    )
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if options.device == "cuda":
                torch.cuda.synchronize()
            marks[-1] += time.perf_counter()

    rows = Dataset.from_dict({"input_ids": [list(range(1, length + 1))] * STEPS})
    SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.folder / "trl"), per_device_train_batch_size=1, max_steps=STEPS, bf16=True,
            max_length=length, save_strategy="no", report_to="none", use_cpu=options.device == "cpu",
            use_liger_kernel=liger,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[Clock()],
    ).train()  # fmt: skip
    return {"tokens_per_s": length / statistics.median(marks[1:]), "peak_bytes": peak(options.device)}


def peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


TOOLS = {"strop": strop, "trl": trl, "trl, liger": lambda *what: trl(*what, liger=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tools", default=";".join(TOOLS))
    parser.add_argument("--schemes", default="none,nf4,int8")
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--checkpoint", type=int, default=0, help="layers that strop computes again in the backward")
    parser.add_argument("--resident-layers", type=int, default=0, help="layers that strop dequantizes once")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        tool, scheme, length = options.run
        print(json.dumps(TOOLS[tool](options, scheme, int(length))))
        return
    if not (options.folder / "config.json").is_file():
        make(options.folder, options.shape)
    results = []
    for length in options.lengths.split(","):
        for scheme in options.schemes.split(","):
            for tool in options.tools.split(";"):
                command = [sys.executable, __file__, *sys.argv[1:], "--run", tool, scheme, length]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
                found = {"failed": lines[-1]} if done.returncode else json.loads(lines[-1])
                results.append({"shape": options.shape, "tool": tool, "scheme": scheme, "tokens": int(length), **found})
                print(json.dumps(results[-1]), flush=True)
    if options.out:
        measured.write(options.out, results)


if __name__ == "__main__":
    main()
