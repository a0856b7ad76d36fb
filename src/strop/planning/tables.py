"""Output of `strop doctor`, and the comparison of training methods across model sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from strop.config.schema import Recipe
from strop.display.tables import Printed
from strop.models.families.shape import ModelShape
from strop.planning.activations import MicroBatch
from strop.planning.memory import train_phase
from strop.planning.workload import Workload

if TYPE_CHECKING:
    from strop.machine.doctor import DoctorReport

GIB = 1 << 30


def print_findings(examination: DoctorReport, out: Console) -> None:
    for name, value in examination.machine.items():
        is_bytes = name.endswith("_bytes")
        label = name.removesuffix("_bytes").replace("_", " ")
        out.print(f"[bold]{label:<12}[/] {f'{value / GIB:.1f} GiB' if is_bytes else escape(_format_fact(value))}")
    colour = {"error": "red", "warning": "yellow", "ok": "green"}
    for finding in examination.findings:
        out.print(f"[{colour[finding.level]}]{finding.level:<8}[/] {escape(finding.what)}")
        if finding.level != "ok":
            out.print(f"         {finding.why}", markup=False, style="dim")
            out.print(f"         {finding.fix}" if finding.fix else "", markup=False)


def _format_fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)


# Configs of well-known models, from their config.json files.
_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_CONFIGS = {
    "SmolLM2-135M": ("llama", 576, 30, 9, 3, 64, 1536, 49152, True),
    "Qwen3-0.6B": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True),
    "Llama-3.2-1B": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "Llama-3.2-3B": ("llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
    "Qwen3-4B": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True),
    "Llama-3.1-8B": ("llama", 4096, 32, 32, 8, 128, 14336, 128256, False),
    "Qwen3-14B": ("qwen3", 5120, 40, 40, 8, 128, 17408, 151936, False),
    "Llama-3.1-70B": ("llama", 8192, 80, 64, 8, 128, 28672, 128256, False),
}
KNOWN: dict[str, dict[str, Any]] = {name: dict(zip(_FIELDS, values, strict=True)) for name, values in _CONFIGS.items()}


@dataclass(frozen=True)
class Row:
    """Peak bytes of training one model with each method. usable: bytes that the machine has, if known."""

    model: str
    parameters: int
    tokens: int
    full: int
    lora: int
    qlora: int
    usable: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_methods(
    recipe: Recipe, models: Iterable[tuple[str, ModelShape, int]], usable: int | None = None
) -> list[Row]:
    """Compare the peak memory of each method on one row of `data.max_length` tokens, with all layers checkpointed."""
    tokens = recipe.data.max_length
    batch = MicroBatch.rows([tokens])
    full_recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"method": "full"})})
    rows = []
    for name, shape, parameters in models:
        workload = Workload.from_recipe(recipe, shape, parameters=parameters)
        workload = workload.replace(scheme="none", resident_layers=0, checkpointed_layers=shape.layers)
        all_weights = Workload.from_recipe(full_recipe, shape, parameters=parameters)
        full = train_phase(all_weights.replace(checkpointed_layers=shape.layers), batch).peak_bytes
        lora, qlora = (train_phase(workload.replace(scheme=scheme), batch).peak_bytes for scheme in ("none", "nf4"))
        rows.append(Row(name, parameters, tokens, full, lora, qlora, usable))
    return rows


def known_models() -> list[tuple[str, ModelShape, int]]:
    return [(name, shape := ModelShape.from_config(config), shape.parameters) for name, config in KNOWN.items()]


class Comparison(Printed, list[Row]):
    """Rows of `compare_methods`, which `print` and a notebook show as a table."""

    def _print(self, out: Console) -> None:
        print_comparison(self, out)


def print_comparison(rows: Sequence[Row], out: Console) -> None:
    tokens = rows[0].tokens
    table = Table(
        title=f"peak of training on rows of {tokens:,} tokens, one at a time, all layers checkpointed, in GiB"
    )
    for head in ("model", "parameters", "full", "16-bit LoRA", "QLoRA (nf4)"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for row in rows:
        cells = [f"{size / GIB:.1f}" for size in (row.full, row.lora, row.qlora)]
        if row.usable is not None:
            fits = [size <= row.usable for size in (row.full, row.lora, row.qlora)]
            cells = [f"[{'green' if fit else 'red'}]{cell}[/]" for fit, cell in zip(fits, cells, strict=True)]
        table.add_row(escape(row.model), f"{row.parameters / 1e9:.2f} B", *cells)
    out.print(table)
