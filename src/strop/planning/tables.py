"""Output of `strop plan` and `strop doctor`, and the comparison of training methods across model sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from strop.config.schema import Recipe
from strop.models.families.shape import ModelShape
from strop.planning.activations import MicroBatch, peak_live_bytes
from strop.planning.memory import PARTS, framework_bytes, train_phase
from strop.planning.workload import Workload

if TYPE_CHECKING:
    from strop.machine.doctor import DoctorReport
    from strop.planning.multi_device import MultiDevicePlan
    from strop.planning.plan import Plan

GIB = 1 << 30
_ALTERNATIVES = {
    "evaluate": "use shorter rows, or a machine with more memory",
    "serve": "use a machine with more memory",
    "merge": "use a machine with more memory, or --no-parity, which skips the comparison",
    "export": "use a machine with more memory, or --no-parity, which skips the comparison",
}
_PART_NAMES = {"quantization_constants": "constants", "saved_activations": "activations", "mapped_files": "files"}
# Bytes per parameter of full mixed-precision training with AdamW: 16-bit weights and gradients, fp32 weights, and two
# moments (arXiv:1910.02054, section 3.1).
FULL_BYTES = 16


def print_plan(plan: Plan, out: Console) -> None:
    for label, text in _describe_model(plan):
        out.print(f"[bold]{label:<8}[/] {text}")
    for choice in plan.resolved.choices.values():
        if choice.origin == "plan":
            out.print(f"[bold]chosen[/]   {choice.field} = {escape(str(choice.value))}  [dim]{escape(choice.why)}[/]")
    out.print(_make_phase_table(plan))
    if plan.multi_device.link_times:
        print_devices(plan.multi_device, out)
    for text in plan.compromises:
        out.print(f"[yellow]given up[/] {escape(text)}")
    out.print(f"[bold]rows[/]     {_describe_rows(plan)}")
    for text in filter(None, (plan.data["refused"], plan.data["beyond"])):  # beyond: rows are too long
        out.print(f"[yellow]rows[/]     {escape(text)}", highlight=False)
    seconds = f", {_format_duration(plan.seconds)} in all" if plan.seconds else ""
    out.print(f"[bold]time[/]     {plan.tokens_per_s:,.0f} tokens/s{seconds}  [dim]from {plan.rate.source}[/]")
    length, tokens = plan.largest["max_length"], plan.largest["micro_batch_tokens"]
    largest = f"max_length {length:,}"
    if tokens:
        largest += f"; with the recipe's max_length, micro_batch_tokens {tokens:,}"
    out.print(f"[bold]largest[/]  {largest if length else 'not even one row'}")
    out.print(f"[bold]disk[/]     {plan.disk_bytes / 1e6:,.0f} MB")
    if plan.refused or plan.data["refused"]:
        out.print(f"[red]strop train would refuse this[/]{f': {escape(plan.refused)}' if plan.refused else ''}")
    if plan.fits:
        out.print("[green]it fits[/]")
        for name in plan.phases_too_large:
            out.print(f"[yellow]but not[/]  {name}: {_ALTERNATIVES[name]}", highlight=False)
        return
    out.print("[red]it does not fit[/]; the cheapest changes that would help:")
    for change in plan.suggestions:
        flags = " ".join(f"--{field} {value}" for field, value in change.options.items())
        fits = "[green]fits[/]" if change.fits else f"{_format_gib(change.peak_bytes)} GiB"
        out.print(f"  {change.what}: {fits}, {change.time:.2f} times the time; gives up: {change.gives_up}")
    if plan.suggestions[-1].fits:
        out.print(f"  {flags}", markup=False)


def _describe_model(plan: Plan) -> Iterator[tuple[str, str]]:
    workload, parameters = plan.workload, plan.workload.base.parameters
    trainable, on_experts = workload.adapter_weights, workload.expert_adapter_weights
    idle = workload.shape.idle_expert_weights
    active = f" ({(parameters - idle) / 1e6:,.0f} M per token)" if idle else ""
    experts = f", {on_experts / trainable:.0%} of them on experts" if on_experts else ""
    trained = f"{trainable / 1e6:,.1f} M trainable ({trainable / parameters:.2%}{experts})"
    engine, _, why = plan.engine.partition(": ")
    step = f"{engine} step ({why})" if why else f"{engine} step"
    yield "model", f"{parameters / 1e6:,.0f} M parameters{active}, {trained}; {step}"
    yield "machine", f"{plan.device}, {_format_gib(plan.memory_bytes)} GiB, {_format_gib(plan.usable_bytes)} usable"


def _describe_rows(plan: Plan) -> str:
    data = plan.data
    if data["rows"]:
        return f"{data['rows']:,}, the longest of {data['longest']:,} tokens"
    return f"of {plan.resolved.recipe.data.max_length:,} tokens each: {escape(data['unknown'] or 'none are given')}"


def print_devices(multi_device: MultiDevicePlan, out: Console) -> None:
    """Print a step's communication on each link. The predicted time of the run is for the first link."""
    devices = multi_device.devices
    out.print(
        f"[bold]devices[/]  {devices.count} ({devices.nodes} x {devices.per_node}), base {multi_device.mode}, "
        "memory above is per device; "
        f"per step: {multi_device.compute_s:.3g} s of computation, {multi_device.sent_bytes / 1e6:,.1f} MB sent by each"
    )
    table = Table()
    for head in ("link", "communication", "share of step", "tokens/s in all"):
        table.add_column(head, justify="left" if head == "link" else "right")
    for time in multi_device.link_times:
        share = time.seconds / (multi_device.compute_s + time.seconds)
        table.add_row(time.link.name, f"{1e3 * time.seconds:,.2f} ms", f"{share:.1%}", f"{time.tokens_per_s:,.0f}")
    out.print(table)
    for text in multi_device.notes:
        out.print(f"[bold]note[/]     {escape(text)}")


def _make_phase_table(plan: Plan) -> Table:
    used = [part for part in PARTS if any(phase.parts[part] for phase in plan.phases.values())]
    table = Table(title="peak memory in MiB", title_justify="left")
    table.add_column("")
    for name in plan.phases:
        table.add_column(name, justify="right")
    for part in used:
        sizes = [f"{phase.parts[part] / 2**20:,.0f}" if phase.parts[part] else "" for phase in plan.phases.values()]
        table.add_row(_PART_NAMES.get(part, part.replace("_", " ")), *sizes)
    table.add_section()
    table.add_row("in all", *(f"{phase.peak_bytes / 2**20:,.0f}" for phase in plan.phases.values()), style="bold")
    return table


def print_findings(examination: DoctorReport, out: Console) -> None:
    for name, value in examination.machine.items():
        is_bytes = name.endswith("_bytes")
        label = name.removesuffix("_bytes").replace("_", " ")
        out.print(f"[bold]{label:<12}[/] {f'{_format_gib(value)} GiB' if is_bytes else escape(_format_fact(value))}")
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


def _format_gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _format_duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


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
    rows = []
    for name, shape, parameters in models:
        workload = Workload.from_recipe(recipe, shape, parameters=parameters)
        workload = workload.replace(scheme="none", resident_layers=0, checkpointed_layers=shape.layers)
        full = FULL_BYTES * parameters + peak_live_bytes(workload, batch).total + framework_bytes(workload)
        lora, qlora = (train_phase(workload.replace(scheme=scheme), batch).peak_bytes for scheme in ("none", "nf4"))
        rows.append(Row(name, parameters, tokens, full, lora, qlora, usable))
    return rows


def known_models() -> list[tuple[str, ModelShape, int]]:
    return [(name, shape := ModelShape.from_config(config), shape.parameters) for name, config in KNOWN.items()]


def print_comparison(rows: Sequence[Row], out: Console) -> None:
    tokens = rows[0].tokens
    table = Table(title=f"peak of training on rows of {tokens:,} tokens, one at a time, all layers checkpointed, in GB")
    for head in ("model", "parameters", "full", "16-bit LoRA", "QLoRA (nf4)"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for row in rows:
        cells = [f"{size / 1e9:.1f}" for size in (row.full, row.lora, row.qlora)]
        if row.usable is not None:
            fits = [size <= row.usable for size in (row.full, row.lora, row.qlora)]
            cells = [f"[{'green' if fit else 'red'}]{cell}[/]" for fit, cell in zip(fits, cells, strict=True)]
        table.add_row(escape(row.model), f"{row.parameters / 1e9:.2f} B", *cells)
    out.print(table)
