"""The table that every lesson on fine-tuning begins with, by arithmetic: full, 16-bit LoRA and QLoRA, size by size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from strop.config.schema import Recipe
from strop.models.families.shape import ModelShape
from strop.planning.activations import MicroBatch, at_peak
from strop.planning.memory import CUDA_CONTEXT_BYTES, framework_bytes, train
from strop.planning.workload import Setting

# bytes a parameter of mixed-precision training with AdamW (arXiv:1910.02054, 3.1): 16-bit weights and gradients, and
# fp32 weights and two moments
FULL_BYTES = 16


def _llama(hidden: int, layers: int, heads: int, few: int, inner: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": few, "intermediate_size": inner, "vocab_size": 128256, "tie_word_embeddings": tied,
        "head_dim": 64 if hidden == 2048 else 128,
    }  # fmt: skip


def _qwen(hidden: int, layers: int, heads: int, inner: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": inner, "vocab_size": 151936,
        "tie_word_embeddings": tied,
    }  # fmt: skip


# Shapes as their makers publish them in config.json.
KNOWN = {
    "SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": _qwen(1024, 28, 16, 3072, True),
    "Llama-3.2-1B": _llama(2048, 16, 32, 8, 8192, True),
    "Llama-3.2-3B": _llama(3072, 28, 24, 8, 8192, True),
    "Qwen3-4B": _qwen(2560, 36, 32, 9728, True),
    "Llama-3.1-8B": _llama(4096, 32, 32, 8, 14336, False),
    "Qwen3-14B": _qwen(5120, 40, 40, 17408, False),
    "Llama-3.1-70B": _llama(8192, 80, 64, 8, 28672, False),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Bytes at the peak of training, by method, and whether they fit (None where no size was given)."""

    model: str
    parameters: int
    tokens: int
    full: int
    lora: int
    qlora: int
    usable: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(recipe: Recipe, models: Iterable[tuple[str, ModelShape, int]], usable: int | None = None) -> list[Row]:
    """One row of data.max_length tokens at a time, all layers computed again in the backward; else as the recipe."""
    return list(_rows(recipe, models, usable))


def _rows(recipe: Recipe, models: Iterable[tuple[str, ModelShape, int]], usable: int | None) -> Iterator[Row]:
    tokens = recipe.data.max_length
    batch = MicroBatch.rows([tokens])
    for name, shape, parameters in models:
        setting = Setting.of(recipe, shape, parameters).but(
            scheme="none", resident_layers=0, checkpoint_layers=shape.layers
        )
        alive = at_peak(setting, batch)
        around = framework_bytes(setting) if setting.device == "cpu" else CUDA_CONTEXT_BYTES
        yield Row(
            name,
            parameters,
            tokens,
            FULL_BYTES * parameters + alive.total + around,
            train(setting, batch).peak_bytes,
            train(setting.but(scheme="nf4"), batch).peak_bytes,
            usable,
        )


def known_models() -> list[tuple[str, ModelShape, int]]:
    shapes = [(name, ModelShape.from_config(config)) for name, config in KNOWN.items()]
    return [(name, shape, shape.parameters) for name, shape in shapes]


def table(rows: Iterable[Row]) -> str:
    """As Markdown, in GB of 10^9 bytes, as cards are sold."""
    lines = ["| model | parameters | full | 16-bit LoRA | QLoRA (nf4) |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        sizes = " | ".join(f"{size / 1e9:.1f} GB" for size in (row.full, row.lora, row.qlora))
        lines.append(f"| {row.model} | {row.parameters / 1e9:.2f} B | {sizes} |")
    return "\n".join(lines) + "\n"
