"""Check strop on a GPU, and measure its speed and memory next to TRL and Unsloth, nine minutes at a time.

    python benchmarks/card.py FOLDER [--shapes 1b,8b] [--minutes 9] [--out RESULT.json]

Runs, most informative first: correctness (benchmarks/card_checks.py), rates of large matmuls and of memory copies, then
tokens/s and peak memory of a training step next to the plan's prediction and to TRL, TRL with Liger and Unsloth, if
they are installed; answers to one prompt and to 64 together, and a step of GRPO; at last training steps of other
lengths. The same command again continues with what RESULT.json lacks. RESULT.md has the tables. Models with random
weights (3 GB and 16 GB) are written to FOLDER. Each item runs in its own process on one GPU. An item that fails or
takes longer than three minutes is listed with its last output, as are items for which no time was left. A result is
the median of ten steps after three warm-up steps, on one row of the given length, with r 16 on all linear layers and
the loss on the whole row. The peak covers the steps only. TRL and Unsloth checkpoint activations, which is their
default; strop does so if its plan does. strop dequantizes layers of nf4 and int8 bases once if memory allows; "strop,
packed" never does, like the other tools. `--device cpu --shapes tiny` tests this script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import measured

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
WARM, STEPS = 3, 10
MOST_S = 180.0  # per item
CHECKED = ("agree", "waits", "resumes")
PROMPT, ANSWER = 128, 64  # tokens, of answers and GRPO
GROUP, PROMPTS = 8, 8  # completions of each prompt in a step of GRPO, and prompts


def make_model(folder: Path, shape: str) -> None:
    """Create a model whose layers all have the same random weights, which affect neither time nor memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from strop.models.source import locate
    from strop.models.tokenizer import load_tokenizer

    hidden, inner, layers, heads, few, words = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    random, narrow = torch.Generator().manual_seed(0), hidden // heads * few

    def weight(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random).mul_(0.02).bfloat16()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    layer = {
        "self_attn.q_proj": weight(hidden, hidden), "self_attn.k_proj": weight(narrow, hidden),
        "self_attn.v_proj": weight(narrow, hidden), "self_attn.o_proj": weight(hidden, hidden),
        "mlp.gate_proj": weight(inner, hidden), "mlp.up_proj": weight(inner, hidden),
        "mlp.down_proj": weight(hidden, inner), "input_layernorm": ones, "post_attention_layernorm": ones,
    }  # fmt: skip
    index: dict[str, str] = {}
    for number in range(layers):
        file = f"model-{number:03d}.safetensors"
        tensors = {f"model.layers.{number}.{name}.weight": tensor for name, tensor in layer.items()}
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
    ends = {"model.embed_tokens.weight": weight(words, hidden), "model.norm.weight": ones}
    ends["lm_head.weight"] = ends["model.embed_tokens.weight"].clone()
    save_file(ends, folder / "model-ends.safetensors", {"format": "pt"})
    index.update(dict.fromkeys(ends, "model-ends.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    load_tokenizer(locate("demo")).save_pretrained(folder)
    LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=few, tie_word_embeddings=False,
        max_position_embeddings=32768, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip


def rates(options: argparse.Namespace) -> dict[str, Any]:
    """Return the median FLOP/s of a matmul that fills the GPU, and the median bytes/s of a copy, reads and writes
    counted.
    """
    import torch

    n, times = (8192, 20) if options.device == "cuda" else (512, 1)  # the GPU's clock rises for a while
    a, b = (torch.randn(n, n, device=options.device).bfloat16() for _ in range(2))
    x = torch.empty((1 << 30) if options.device == "cuda" else 1 << 20, dtype=torch.uint8, device=options.device)
    y = torch.empty_like(x)

    def rate(of_one: float, one: Any) -> float:
        return times * of_one / measure_seconds(lambda: [one() for _ in range(times)], options.device)

    result: dict[str, Any] = {
        "matmul_flops": rate(2 * n**3, lambda: torch.mm(a, b)),
        "bytes_per_s": rate(2 * x.numel(), lambda: y.copy_(x)),
    }
    if options.device == "cuda":
        from strop.engine.kernels.cuda import attention

        about = torch.cuda.get_device_properties(0)
        of = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
        attention.activate_flash3(torch.device("cuda"))  # as in a run
        result |= {
            "flash_attention": of() or "FA2",
            "card": about.name,
            "memory_bytes": about.total_memory,
            "capability": f"{about.major}.{about.minor}",
        }
    return result


def measure_seconds(one: Any, device: str) -> float:
    """Return the median seconds of a call after warm-up calls."""
    seconds = []
    for _ in range(WARM + STEPS):
        wait(device)
        started = time.perf_counter()
        one()
        wait(device)
        seconds.append(time.perf_counter() - started)
        if len(seconds) == WARM:
            forget_peak(device)
    return statistics.median(seconds[WARM:])


def wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def forget_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def peaks(device: str) -> dict[str, int]:
    if device != "cuda":
        return {"peak_bytes": measured.peak_rss_bytes()}
    import torch

    return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def strop(options: argparse.Namespace, scheme: str, length: int, packed: bool = False) -> dict[str, Any]:
    """Measure strop. packed: never keep dequantized layers of a quantized base."""
    import numpy as np
    import torch

    from strop.config.load import resolve
    from strop.config.schema import LoraSection
    from strop.data.types import Example
    from strop.engine.device import pick_dtype, prepare_process
    from strop.engine.step import step_for
    from strop.machine.probe import probe
    from strop.models.families.shape import read_model_info
    from strop.models.load import DTYPES, load_base
    from strop.models.lora import add_lora, trainable_parameters
    from strop.models.source import locate
    from strop.planning.activations import MicroBatch
    from strop.planning.choose import choose
    from strop.planning.memory import train_phase
    from strop.planning.time import count_flops
    from strop.planning.workload import Workload

    prepare_process()
    shape = read_model_info(str(options.folder)).shape
    settings = {
        "model.name": "m", "data.train": "d", "model.device": options.device, "model.quantization": scheme,
        "lora.r": 16, "data.max_length": length, "train.micro_batch_tokens": length,
        **({"model.resident_layers": 0} if packed else {}),
    }  # fmt: skip
    dtype = pick_dtype(options.device)
    recipe = choose(resolve(None, settings), probe(), shape, options.device, dtype).recipe
    resident = recipe.model.resident_layers or 0
    base = load_base(
        locate(str(options.folder)), DTYPES[dtype[0]], options.device, quantization=scheme, resident_layers=resident
    )
    model = add_lora(base, LoraSection(r=16, alpha=32.0), None).train()
    step, weights = step_for(model), list(trainable_parameters(model).values())
    workload, batch = Workload.from_recipe(recipe, shape), MicroBatch.rows([length], more=False)
    step.checkpoint(workload.compute.checkpointed_layers)
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    ids = np.random.default_rng(0).integers(1, 49000, length).astype(np.int32)
    row = Example(ids, np.float32(np.arange(length) > 0), "", 0)

    def one() -> None:
        (step.token_loss([row]) / row.supervised).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, planned = measure_seconds(one, options.device), train_phase(workload, batch)
    return {
        "tokens_per_s": length / seconds, **peaks(options.device),
        "planned_bytes": planned.peak_bytes - (planned.parts["framework"] if options.device == "cuda" else 0),
        "flops_per_s": count_flops(workload, batch).total / seconds,
        "checkpointed": workload.compute.checkpointed_layers,
        "resident": resident, "step": step.name, "without_kernels": step.gpu_failures,
    }  # fmt: skip


def answers(options: argparse.Namespace, scheme: str, number: int) -> dict[str, Any]:
    """Measure greedy answers to `number` prompts together, with an adapter that is not merged."""
    import numpy as np

    from strop.config.schema import LoraSection
    from strop.engine.decode.generate import generate
    from strop.engine.device import pick_dtype, prepare_process
    from strop.models.load import DTYPES, load_base
    from strop.models.lora import add_lora
    from strop.models.source import locate
    from strop.models.tokenizer import load_tokenizer

    prepare_process()
    source = locate(str(options.folder))
    base = load_base(source, DTYPES[pick_dtype(options.device)[0]], options.device, quantization=scheme)
    model, tokenizer = add_lora(base, LoraSection(r=16, alpha=32.0), None).eval(), load_tokenizer(source)
    model.generation_config.eos_token_id = None  # answers of random weights must not end early
    prompts = np.random.default_rng(0).integers(1, 49000, (number, PROMPT)).astype(np.int32)

    tokens: list[int] = []

    def one() -> None:
        completions = generate(model, tokenizer, [*prompts], stop_ids=(), max_new_tokens=ANSWER)
        tokens.append(sum(completion.tokens for completion in completions))

    seconds = measure_seconds(one, options.device)
    return {"answer_tokens_per_s": statistics.median(tokens) / seconds, "tokens": tokens[-1], **peaks(options.device)}


def grpo(options: argparse.Namespace, scheme: str, number: int) -> dict[str, Any]:
    """Measure steps of GRPO, with sampling and the update, on `number` prompts."""
    import strop as package

    rows, out = options.folder / "prompts.jsonl", options.folder / "runs" / scheme
    words = [" the", " of", " and", " to", " in", " is"]
    texts = ["".join(words[(n + place) % len(words)] for place in range(PROMPT)) for n in range(4 * number)]
    rows.write_text("".join(json.dumps({"prompt": text, "completion": "{}"}) + "\n" for text in texts))
    shutil.rmtree(out, ignore_errors=True)
    seconds: list[float] = []

    def note(event: dict[str, Any]) -> None:
        seconds.extend([event["seconds"]] if event["event"] == "step" else [])

    package.train(
        model=str(options.folder), data=str(rows), out=str(out), callback=note, progress=False,
        **{
            "model.device": options.device, "model.quantization": scheme, "train.objective": "grpo",
            "train.rewards": f"{__file__}:varied", "train.group": GROUP, "train.answer_tokens": ANSWER,
            "train.batch_size": number, "train.max_steps": 3, "train.log_steps": 1,
        },
    )  # fmt: skip
    return {"seconds_per_step": (seconds[-1] - seconds[0]) / (len(seconds) - 1), **peaks(options.device)}


def varied(completion: str, row: dict[str, Any]) -> float:
    """Return a reward that differs between completions."""
    return len(completion) % 7 / 7


USES = {"answers": answers, "grpo": grpo}


def trl(options: argparse.Namespace, scheme: str, length: int, liger: bool = False) -> dict[str, Any]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return train_with(options, model, length, peft_config=lora, use_liger_kernel=liger)


def unsloth(options: argparse.Namespace, scheme: str, length: int) -> dict[str, Any]:
    from unsloth import FastLanguageModel  # before transformers, which it changes

    packed = {"load_in_4bit": scheme == "nf4", "load_in_8bit": scheme == "int8"}
    model, _ = FastLanguageModel.from_pretrained(str(options.folder), max_seq_length=length, **packed)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, target_modules=names, use_gradient_checkpointing="unsloth"
    )
    return train_with(options, model, length)


def train_with(
    options: argparse.Namespace, model: Any, length: int, peft_config: Any = None, **more: Any
) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if len(marks) == WARM:
                forget_peak(options.device)
            wait(options.device)
            marks.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(options.device)
            marks[-1] += time.perf_counter()

    rows = Dataset.from_dict({"input_ids": [list(range(1, length + 1))] * (WARM + STEPS)})
    config = SFTConfig(
        output_dir=str(options.folder / "trl"), per_device_train_batch_size=1, max_steps=WARM + STEPS, bf16=True,
        max_length=length, save_strategy="no", report_to="none", use_cpu=options.device == "cpu", **more,
    )  # fmt: skip
    SFTTrainer(model=model, args=config, train_dataset=rows, peft_config=peft_config, callbacks=[Clock()]).train()
    return {"tokens_per_s": length / statistics.median(marks[WARM:]), **peaks(options.device)}


TOOLS = {
    "strop": strop, "strop, packed": lambda *what: strop(*what, packed=True), "trl": trl,
    "trl, liger": lambda *what: trl(*what, liger=True), "unsloth": unsloth,
}  # fmt: skip
NEEDS = {"trl": ("trl",), "trl, liger": ("trl", "liger_kernel"), "unsloth": ("unsloth",)}


def items(shapes: list[str], lengths: list[int], schemes: list[str]) -> Iterator[tuple[str, str, str, int]]:
    """Yield (shape, tool, scheme, tokens), most informative first: all tools at the middle length, then strop at the
    others, then the other tools there.
    """
    from importlib.util import find_spec

    there = [tool for tool in TOOLS if all(find_spec(name) for name in NEEDS.get(tool, ()))]
    middle = lengths[len(lengths) // 2]
    others = [length for length in lengths if length != middle]
    own = sum(tool not in NEEDS for tool in there)
    for tools, at in ((there, [middle]), (there[:own], others), (there[own:], others)):
        for length in at:
            for scheme in schemes:
                for shape in shapes:
                    packed = scheme != "none"
                    yield from ((shape, tool, scheme, length) for tool in tools if packed or tool != "strop, packed")


def child(words: Sequence[str], seconds: float) -> dict[str, Any]:
    """Return what this script prints with these arguments in its own process, or `failed` with the last output."""
    if seconds <= 0:
        return {"failed": "there was no time left for it"}
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # other tools would use all GPUs
    with subprocess.Popen(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"it took longer than {seconds:.0f} s"}
        finally:
            with suppress(ProcessLookupError):  # with its children, which would keep GPU memory allocated
                os.killpg(process.pid, signal.SIGKILL)
    output = out.strip().splitlines()
    if process.returncode == 0 and output and output[-1].startswith("{"):
        result: dict[str, Any] = json.loads(output[-1])
        return result
    lines = [line for line in (error or out).strip().splitlines() if line.strip()] or ["no word"]
    return {"failed": lines[-1], "exit": process.returncode, "told": lines[-20:]}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--schemes", default="none,nf4,int8")
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, help="results of an earlier call there are kept")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.run:
        print(json.dumps(run(options, *options.run)))
        return
    os.environ["STROP_CACHE"] = str(options.folder.absolute() / "cache")  # quantized models with random weights
    end = time.monotonic() + 60 * options.minutes
    results: list[dict[str, Any]] = []
    if options.out and options.out.is_file():
        results = [one for one in json.loads(options.out.read_text("utf-8"))["results"] if "failed" not in one]

    def item(about: dict[str, Any], folder: str, *words: str) -> None:
        if any(about.items() <= one.items() for one in results):
            return
        command = [str(options.folder / folder), "--device", options.device, "--run", *words]
        results.append({**about, **child(command, min(MOST_S, end - time.monotonic()))})
        print(json.dumps(results[-1]), flush=True)

    try:
        for name in CHECKED:
            item({"check": name}, "tiny", "check", name)
        item({"rates": "of products and memory"}, "tiny", "rates")
        shapes, schemes = options.shapes.split(","), options.schemes.split(",")
        lengths = [int(length) for length in options.lengths.split(",")]
        steps = list(items(shapes, lengths, schemes))
        first = [step for step in steps if step[3] == lengths[len(lengths) // 2]]
        uses = [("answers", 1), ("answers", 64), ("grpo", PROMPTS)]
        for part in (first, [step for step in steps if step not in first]):
            for shape, tool, scheme, length in part:
                about = {"shape": shape, "tool": tool, "scheme": scheme, "tokens": length}
                item(about, shape, "tool", tool, scheme, str(length))
            for (use, number), scheme, shape in product(uses, schemes, shapes) if part is first else ():
                item({"shape": shape, "use": use, "scheme": scheme, "prompts": number}, shape, use, scheme, str(number))
    finally:  # the results so far, also after an interruption
        print(table(results))
        if options.out:
            measured.write(options.out, results)
            options.out.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")


def run(options: argparse.Namespace, kind: str, *words: str) -> dict[str, Any]:
    """Run one item in its own process."""
    if not (options.folder / "config.json").is_file():
        make_model(options.folder, options.folder.name)
    if kind == "check":
        from card_checks import CHECKS

        return CHECKS[words[0]](options.folder, options.device)
    if kind == "rates":
        return rates(options)
    if kind in USES:
        return USES[kind](options, words[0], int(words[1]))
    tool, scheme, length = words
    return TOOLS[tool](options, scheme, int(length))


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as tables, after the checks and failures."""
    lines = [f"{one['check']}: {'right' if one.get('passed') else 'WRONG'}" for one in results if "check" in one]
    for one in results:
        if "failed" in one:
            what = ", ".join(str(value) for key, value in one.items() if key not in ("failed", "exit", "told"))
            lines.append(f"failed: {what}: {one['failed']}")
    peak = next((one["matmul_flops"] for one in results if "matmul_flops" in one), None)
    lines += ["", "| shape | scheme | tokens | tool | tokens/s | of the matmul rate | peak | planned |"]
    lines += ["|---|---|---:|---|---:|---:|---:|---:|"]
    for one in results:
        if "tokens_per_s" in one:
            share = f"{one['flops_per_s'] / peak:.0%}" if peak and "flops_per_s" in one else ""
            planned = f"{one['planned_bytes'] / 1e9:.1f} GB" if "planned_bytes" in one else ""
            what = f"{one['shape']} | {one['scheme']} | {one['tokens']:,} | {one['tool']} | {one['tokens_per_s']:,.0f}"
            lines.append(f"| {what} | {share} | {one['peak_bytes'] / 1e9:.1f} GB | {planned} |")
    lines += ["", "| shape | scheme | prompts together | what | speed | peak |", "|---|---|---:|---|---:|---:|"]
    for one in results:
        if "use" in one and "failed" not in one:
            speed = f"{one['answer_tokens_per_s']:,.0f} tokens/s" if "answer_tokens_per_s" in one else ""
            speed = speed or f"{one['seconds_per_step']:.2f} s a step of {GROUP} completions each"
            what = f"{one['shape']} | {one['scheme']} | {one['prompts']} | {one['use']} | {speed}"
            lines.append(f"| {what} | {one['peak_bytes'] / 1e9:.1f} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
