"""Compare ways to merge an adapter with the adapter on its base, both computing in fp32.

    python benchmarks/merge_rounding.py RUN... [--out RESULT.json]

The rows are the run's evaluation rows, or else its training rows, as in `strop merge`. `nearest` rounds merged weights
to the nearest value, `random` rounds them stochastically (as strop does), `bf16 compute` runs the adapter on its base
in bf16. `4 bit` is peft's merge_and_unload on a model that transformers loaded in 4 bit, which writes merged weights
back into NF4.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measured
import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from strop.exporting import merge
from strop.exporting.merge import TunedModel
from strop.exporting.parity import LIMITS, compare
from strop.models.adapters import attach_adapter
from strop.models.load import load_base, weights_folder
from strop.models.source import Source

Round = Callable[[str, Tensor, Tensor], Tensor]  # (name, merged, base) -> the stored tensor, in fp32
WAYS: dict[str, Round] = {
    "fp32": lambda name, merged, base: merged,
    "fp16, random": lambda name, merged, base: merge.round_weight(name, merged, base, torch.float16).float(),
    "fp16, nearest": lambda name, merged, base: merged.half().float(),
    "bf16, random": lambda name, merged, base: merge.round_weight(name, merged, base, torch.bfloat16).float(),
    "bf16, nearest": lambda name, merged, base: merged.bfloat16().float(),
}


def load_merged(tuned: TunedModel, way: Round) -> Any:
    """Return the merged model in fp32, with weights as the given way stores them."""
    model = load_base(tuned.source, torch.float32, "cpu")
    merge_tensor = tuned.load_merger()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(way(name, *merge_tensor(name, weight)))
    return model


def load_bf16(tuned: TunedModel, folder: Path) -> Any:
    options = {"quantization": tuned.storage.scheme, "double": tuned.storage.double, "resident_layers": 1 << 30}
    base = load_base(tuned.source, torch.bfloat16, "cpu", **options)
    return attach_adapter(base, folder, tuned.source)[0].eval()


def merge_into_4bit(source: Source, folder: Path) -> Any:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(weights_folder(source), quantization_config=nf4, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload().train()  # eval() repacks on some CPUs


def measure(run: str) -> dict[str, dict[str, Any]]:
    folder = Path(run) / "adapter"
    tuned = TunedModel.open(run).load_rows(None, choose_base=False)

    def compare_with(load: Callable[[], Any]) -> dict[str, Any]:
        return compare(tuned.load, load, tuned.examples, LIMITS["bf16"]).as_json()

    results = {name: compare_with(lambda way=way: load_merged(tuned, way)) for name, way in WAYS.items()}
    results["bf16 compute"] = compare_with(lambda: load_bf16(tuned, folder))
    results["4 bit"] = compare_with(lambda: merge_into_4bit(tuned.source, folder))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out")
    options = parser.parse_args()
    results = {}
    for run in options.runs:
        results[Path(run).name] = measure(run)
        print(f"| {Path(run).name} | mean KL | max KL | top-1 agreement | loss difference | kept by strop |")
        print("|---" * 6 + "|")
        for way, one in results[Path(run).name].items():
            figures = f"{one['kl_mean']:.1e} | {one['kl_max']:.1e} | {one['top1_agreement']:.2%}"
            print(
                f"| {way} | {figures} | {one['loss_difference']:+.4f} | {'yes' if one['passed'] else 'no'} |",
                flush=True,
            )
    if options.out:
        measured.write(options.out, results)


if __name__ == "__main__":
    main()
