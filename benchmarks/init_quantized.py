"""Measure whether LoftQ (arXiv:2310.08659) and PiSSA (arXiv:2404.02948) help LoRA on an NF4 base.

    python benchmarks/init_quantized.py --data TRAIN.jsonl --eval TEST.jsonl [--steps 88 --seeds 0,1,2] [--out R.json]

All variants start from the 16-bit model. default: NF4 base, the usual A and B = 0. loftq: A and B approximate the
quantization error, with several iterations of its algorithm (peft's implementation needs a GPU and ignores LoRA's
scale). pissa: as in peft, A and B are the first singular directions, and the rest of the base is quantized. Prints the
loss on held-out rows before the first step and after the last. --rate: larger A and B learn faster, so each variant has
its own best rate.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import measured
import peft
import torch

from strop.config.load import resolve
from strop.config.schema import DataSection
from strop.data.prepare import prepare
from strop.engine.device import prepare_process
from strop.engine.step import step_for
from strop.evaluation.compare import mean_loss
from strop.models.load import load_base
from strop.models.lora import cast_trainable_to_fp32, trainable_parameters
from strop.models.quantize import dequantize_weight, quantizable_linears, quantize_weight
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.planning.choose import objective_base_rate
from strop.runs.events import EventLog
from strop.runs.folder import RunFolder
from strop.training.loop import fit
from strop.training.optim import make_optimizer
from strop.training.state import Job, Progress, TrainState

WAYS: dict[str, dict[str, Any]] = {
    "16 bit": {},
    "default": {},
    "loftq, 1 round": {},
    "loftq, 5 rounds": {},
    "pissa": {"init_lora_weights": "pissa_niter_16"},
}


def quantized(weight: torch.Tensor) -> torch.Tensor:
    return dequantize_weight(quantize_weight(weight, "nf4"), "nf4", weight.shape, weight.dtype)


def loftq(weight: torch.Tensor, rank: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the quantized base, A and B, by fitting the base and B A in turn to the remainder of the weight."""
    rest = weight.float()
    for _ in range(rounds):
        base = quantized(rest.to(weight.dtype))
        u, s, v = torch.svd_lowrank(weight.float() - base.float(), q=rank, niter=16)
        a, b = s.sqrt()[:, None] * v.t(), u * s.sqrt()
        rest = weight.float() - b @ a
    return base, a, b


def build(model: str, way: str, rank: int, seed: int) -> peft.PeftModel:
    base = load_base(locate(model), torch.bfloat16, "cpu")
    chosen = quantizable_linears(base)
    names = [name for name, _ in base.named_modules() if f"{name}.weight" in chosen]
    torch.manual_seed(seed)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=leaves, task_type="CAUSAL_LM", **WAYS[way])
    adapted = cast_trainable_to_fp32(peft.get_peft_model(base, config))
    for name in names if way != "16 bit" else []:
        module = adapted.get_base_model().get_submodule(name)
        weight = module.base_layer.weight
        if way.startswith("loftq"):
            weight.data, a, b = loftq(weight.data, rank, int(way.split()[1]))
            scale = module.scaling["default"] ** 0.5
            module.lora_A["default"].weight.data, module.lora_B["default"].weight.data = a / scale, b / scale
        else:
            weight.data = quantized(weight.data)
    return adapted


def train(options: argparse.Namespace, way: str, seed: int) -> dict[str, float]:
    source = locate(options.model)
    data = prepare(DataSection(train=options.data, eval=options.eval), load_tokenizer(source))
    model, rows = build(options.model, way, options.rank, seed), data.eval
    assert rows is not None
    rate = options.rate * objective_base_rate(sum(weight.numel() for weight in model.get_base_model().parameters()))
    settings = {
        "model": options.model, "data": options.data, "seed": seed, "lora.r": options.rank,
        "train.max_steps": options.steps, "train.learning_rate": rate, "train.micro_batch_tokens": 2048,
    }  # fmt: skip
    recipe, step, weights = resolve(None, settings).recipe, step_for(model), trainable_parameters(model)

    def loss() -> float:
        return mean_loss(step.token_loss, rows, lambda some: [[number] for number in range(len(some))])

    with tempfile.TemporaryDirectory() as folder:
        state = TrainState(weights, make_optimizer(weights, recipe.train), Progress())
        log = EventLog(Path(folder) / "events.jsonl", [])
        before = loss()
        fit(Job(recipe, RunFolder(Path(folder)), model, step, data.train, None, state, log))
        return {"before": before, "after": loss()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--steps", type=int, default=88)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default=";".join(WAYS))
    parser.add_argument("--rate", type=float, default=1.0, help="learning rate, times 1e-3 (for 135M)")
    parser.add_argument("--out")
    options = parser.parse_args()
    prepare_process()
    results: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds.split(","):
        for way in options.ways.split(";"):
            results.setdefault(way, []).append(train(options, way, int(seed)))
            result = results[way][-1]
            print(f"{way:16} seed {seed}: {result['before']:.4f} before, {result['after']:.4f} after", flush=True)
    if options.out:
        measured.write(options.out, results)


if __name__ == "__main__":
    main()
