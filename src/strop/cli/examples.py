"""Two examples of each command, for the end of its help; tests hold them against the commands."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "doctor": ("strop doctor", "strop doctor --fix"),
    "plan": ("strop plan --model demo --data rows.jsonl", 'strop plan --model Qwen/Qwen3-8B --gpu "RTX 4090"'),
    "check": ("strop check --data rows.jsonl --show 3", "strop check --data rows.jsonl --fix clean.jsonl"),
    "train": (
        "strop train --model demo --data rows.jsonl --out runs/mine",
        "strop train recipe.yaml --train.learning_rate 1e-4 --print-recipe",
    ),
    "resume": ("strop resume runs/mine", "strop resume runs/mine --train.epochs 5 --allow-changed schedule"),
    "eval": (
        "strop eval runs/mine --data held_out.jsonl --metric exact_json",
        "strop eval runs/a runs/b --data held_out.jsonl --general",
    ),
    "chat": ("strop chat runs/mine", 'echo "Add milk to the list" | strop chat runs/mine --temperature 0'),
    "adapters": ("strop adapters runs/a runs/b", "strop adapters runs/a runs/b --weights 0.7,0.3 --out mixed"),
    "merge": ("strop merge runs/mine --out mine-merged", "strop merge runs/mine --out mine-merged --dtype fp16"),
    "serve": ("strop serve runs/mine", "strop serve runs/a runs/b --port 9000 --slots 8"),
    "modules": ("strop modules demo", "strop modules Qwen/Qwen3-8B"),
    "runs": ("strop runs", "strop runs other-folder --json"),
    "dash": ("strop dash", "strop dash other-folder --port 9001"),
    "import": (
        "strop import axolotl config.yml --out recipe.yaml",
        "strop import trl train.py --out recipe.yaml",
    ),
    "export-script": (
        "strop export-script runs/mine --out mine-script",
        "strop export-script runs/mine --out mine-script --json",
    ),
    "push": ("strop push runs/mine me/mine", "strop push mine-merged me/mine-merged --public"),
    "schema": ("strop schema", "strop schema > recipe.schema.json"),
    "demo": ("strop demo", "strop demo --out runs/first"),
    "launch slurm": (
        "strop launch slurm recipe.yaml --nodes 2 --devices 8",
        "strop launch slurm recipe.yaml --devices 4 --time 12:00:00 --file train.sbatch",
    ),
    "launch ray": (
        "strop launch ray recipe.yaml --nodes 2 --devices 8",
        "strop launch ray recipe.yaml --devices 4 --out runs/mine --file train_ray.py",
    ),
    "launch kubernetes": (
        "strop launch kubernetes recipe.yaml --image me/strop:1 --claim data --nodes 2 --devices 8",
        "strop launch kubernetes recipe.yaml --image me/strop:1 --claim data --file job.yaml",
    ),
    "launch skypilot": (
        "strop launch skypilot recipe.yaml --gpus H100 --devices 8 --volume data --nodes 2",
        "strop launch skypilot recipe.yaml --gpus L4 --bucket my-runs --spot",
    ),
    "export gguf": (
        "strop export gguf runs/mine --out mine.gguf --type q8_0",
        "strop export gguf runs/mine --out mine-lora.gguf --adapter",
    ),
    "export ollama": (
        "strop export ollama runs/mine --out mine-ollama",
        "strop export ollama runs/mine --out mine-ollama --type q4_k_m",
    ),
}


def epilog(name: str) -> str:
    """The examples as the last lines of a command's help; "" for a command without any."""
    found = EXAMPLES.get(name, ())
    return "Examples:\n\n" + "\n\n".join(found) if found else ""
