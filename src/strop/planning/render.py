"""Plans and findings as a person reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from strop.machine.doctor import DoctorReport
    from strop.planning.compare import Row
    from strop.planning.devices import Spread
    from strop.planning.plan import Plan

GIB = 1 << 30
_OTHERWISE = {
    "evaluate": "ask shorter rows, or on a machine with more memory",
    "serve": "on a machine with more memory",
    "merge": "on a machine with more memory, or with --no-parity, which measures nothing",
    "export": "on a machine with more memory, or with --no-parity, which measures nothing",
}
_PART_NAMES = {"quantization_constants": "constants", "saved_activations": "activations", "mapped_files": "files"}


def print_plan(plan: Plan, out: Console) -> None:
    setting = plan.setting
    share = setting.adapter_weights / setting.parameters
    idle, held = setting.shape.idle_expert_weights, setting.expert_adapter_weights
    active = f" ({(setting.parameters - idle) / 1e6:,.0f} M for a token)" if idle else ""
    on_experts = f", {held / setting.adapter_weights:.0%} of them on experts" if held else ""
    trained = f"{setting.adapter_weights / 1e6:,.1f} M trainable ({share:.2%}{on_experts})"
    engine, _, why = plan.engine.partition(": ")
    step = f"{engine} step ({why})" if why else f"{engine} step"
    out.print(f"[bold]model[/]    {setting.parameters / 1e6:,.0f} M parameters{active}, {trained}; {step}")
    out.print(f"[bold]machine[/]  {plan.device}, {_gib(plan.memory_bytes)} GiB, {_gib(plan.usable_bytes)} usable")
    for choice in plan.resolved.choices.values():
        if choice.origin == "plan":
            out.print(f"[bold]chosen[/]   {choice.field} = {escape(str(choice.value))}  [dim]{escape(choice.why)}[/]")
    out.print(_phases(plan))
    if plan.spread.over:
        print_devices(plan.spread, out)
    for text in plan.gives_up:
        out.print(f"[yellow]given up[/] {escape(text)}")
    number = plan.data["rows"]
    said = f"{number:,}, the longest of {plan.data['longest']:,} tokens" if number else ""
    unknown = plan.data["unknown"] or "none are given"
    out.print(
        f"[bold]rows[/]     {said or f'of {plan.resolved.recipe.data.max_length:,} tokens each: {escape(unknown)}'}"
    )
    for text in filter(None, (plan.data["refused"], plan.data["beyond"])):
        out.print(f"[yellow]rows[/]     {escape(text)}", highlight=False)
    speed = f"{plan.tokens_per_s:,.0f} tokens/s" + (f", {_time(plan.seconds)} in all" if plan.seconds else "")
    out.print(f"[bold]time[/]     {speed}  [dim]by {plan.rate.source}[/]")
    length, tokens = plan.largest["max_length"], plan.largest["micro_batch_tokens"]
    largest = f"rows of {length:,} tokens" + (f", or {tokens:,} tokens of rows as long as these" if tokens else "")
    out.print(f"[bold]largest[/]  {largest if length else 'not even one row'}")
    out.print(f"[bold]disk[/]     {plan.disk_bytes / 1e6:,.0f} MB")
    if plan.refused or plan.data["refused"]:
        out.print(f"[red]strop train would refuse this[/]{f': {escape(plan.refused)}' if plan.refused else ''}")
    if plan.fits:
        out.print("[green]it fits[/]")
        for name in plan.beyond:
            out.print(f"[yellow]but not[/]  {name}: {_OTHERWISE[name]}", highlight=False)
        return
    out.print("[red]it does not fit[/]; the cheapest way to make it:")
    for rung in plan.ladder:
        flags = " ".join(f"--{field} {value}" for field, value in rung.options.items())
        fits = "[green]fits[/]" if rung.fits else f"{_gib(rung.peak_bytes)} GiB"
        out.print(f"  {rung.what}: {fits}, {rung.time:.2f} times the time; gives up: {rung.gives_up}")
    if plan.ladder[-1].fits:
        out.print(f"  {flags}", markup=False)


def print_devices(spread: Spread, out: Console) -> None:
    """Each link with what a step takes on it; the first is what the time below is about."""
    devices = spread.devices
    out.print(
        f"[bold]devices[/]  {devices.count} ({devices.nodes} x {devices.each}), base {spread.mode}, "
        "memory above is of each; "
        f"a step: {spread.compute_s:.3g} s of computing, {spread.sent_bytes / 1e6:,.1f} MB sent by each"
    )
    table = Table()
    for head in ("link", "communication", "of the step", "tokens/s in all"):
        table.add_column(head, justify="left" if head == "link" else "right")
    for one in spread.over:
        whole = spread.compute_s + one.seconds
        table.add_row(
            one.link.name, f"{1e3 * one.seconds:,.2f} ms", f"{one.seconds / whole:.1%}", f"{one.tokens_per_s:,.0f}"
        )
    out.print(table)
    for text in spread.notes:
        out.print(f"[bold]note[/]     {escape(text)}")


def _phases(plan: Plan) -> Table:
    used = [part for part in next(iter(plan.phases.values())).parts if any(p.parts[part] for p in plan.phases.values())]
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


def print_comparison(rows: Sequence[Row], out: Console) -> None:
    tokens = rows[0].tokens
    table = Table(title=f"peak of training on rows of {tokens:,} tokens, one at a time, layers computed again, in GB")
    for head in ("model", "parameters", "full", "16-bit LoRA", "QLoRA (nf4)"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for row in rows:
        cells = [_cell(size, row.usable) for size in (row.full, row.lora, row.qlora)]
        table.add_row(escape(row.model), f"{row.parameters / 1e9:.2f} B", *cells)
    out.print(table)


def _cell(size: int, usable: int | None) -> str:
    text = f"{size / 1e9:.1f}"
    return text if usable is None else f"[{'green' if size <= usable else 'red'}]{text}[/]"


def print_findings(found: DoctorReport, out: Console) -> None:
    for name, value in found.machine.items():
        is_bytes = name.endswith("_bytes")
        label = name.removesuffix("_bytes").replace("_", " ")
        out.print(f"[bold]{label:<12}[/] {f'{_gib(value)} GiB' if is_bytes else escape(_fact(value))}")
    colour = {"error": "red", "warning": "yellow", "ok": "green"}
    for finding in found.findings:
        out.print(f"[{colour[finding.level]}]{finding.level:<8}[/] {escape(finding.what)}")
        if finding.level != "ok":
            out.print(f"         {finding.why}", markup=False, style="dim")
            out.print(f"         {finding.fix}" if finding.fix else "", markup=False)


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _time(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
