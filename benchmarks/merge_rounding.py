"""What each way to merge an adapter loses: against the adapter on its base, both computing in fp32.

    python benchmarks/merge_rounding.py RUN... [--out RESULT.json]

The rows are the run's own (its evaluation rows, else its training rows), as `strop merge` measures them. `nearest`
rounds merged weights to the nearest, `random` up or down in proportion (what strop does), `bf16 compute` runs the
adapter on its base in bf16. `4 bit` is peft's merge_and_unload on a model that transformers loaded in 4 bit, which
writes the merged weights back into NF4.
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
from strop.exporting.merge import Trained
from strop.exporting.parity import LIMITS, compare
from strop.models.adapter_config import read_adapter_config
from strop.models.adapters import attach_adapter
from strop.models.load import load_base, weights_folder
from strop.models.source import Source, locate

Round = Callable[[str, Tensor, Tensor], Tensor]  # name, merged, base -> what a reader of the file gets
WAYS: dict[str, Round] = {
    "fp32": lambda name, merged, base: merged,
    "fp16, random": lambda name, merged, base: merge.rounded(name, merged, base, torch.float16).float(),
    "fp16, nearest": lambda name, merged, base: merged.half().float(),
    "bf16, random": lambda name, merged, base: merge.rounded(name, merged, base, torch.bfloat16).float(),
    "bf16, nearest": lambda name, merged, base: merged.bfloat16().float(),
}


def merged(source: Source, folder: Path, trained: Trained, way: Round) -> Any:
    """The merged model in fp32, with its weights as that way leaves them."""
    model = load_base(source, torch.float32, "cpu")
    change, as_trained = merge.changes(source, folder), trained.rounding(source)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            base = as_trained(name, weight)
            weight.copy_(way(name, change(name, base), base))
    return model


def in_bf16(source: Source, folder: Path, trained: Trained) -> Any:
    how = {"quantization": trained.scheme, "double": trained.double, "resident_layers": 1 << 30}
    return attach_adapter(load_base(source, torch.bfloat16, "cpu", **how), folder, source)[0].eval()


def into_4_bit(source: Source, folder: Path) -> Any:
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(weights_folder(source), quantization_config=four, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload().train()  # eval() repacks on some CPUs


def measure(run: str) -> dict[str, dict[str, Any]]:
    folder = Path(run) / "adapter"
    source = locate(str(read_adapter_config(folder)["base_model_name_or_path"]))
    trained, examples = Trained.read(folder), merge.rows_to_measure(run, folder, source, None)

    def against(other: Callable[[], Any]) -> dict[str, Any]:
        return compare(lambda: merge.tuned_model(source, folder, trained), other, examples, LIMITS["bf16"]).as_json()

    found = {name: against(lambda way=way: merged(source, folder, trained, way)) for name, way in WAYS.items()}
    found["bf16 compute"] = against(lambda: in_bf16(source, folder, trained))
    found["4 bit"] = against(lambda: into_4_bit(source, folder))
    return found


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
