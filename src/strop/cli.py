"""The command line. One short function a command; heavy imports stay inside."""

from __future__ import annotations

import inspect
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from strop import __version__
from strop.errors import InputError, StropError
from strop.flags import recipe_options
from strop.terminal import answering, console, print_general, print_notes, print_samples, print_scores, watching

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
ModelName = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="Run, adapter or model folder, .gguf file, Hub id, or demo.")
]
Memory = Annotated[str | None, typer.Option(help="Use at most this much memory, such as 8GB.", metavar="SIZE")]
Quantization = Annotated[str, typer.Option(help="none, nf4, fp4, int8; auto: what the adapter was trained on.")]
Force = Annotated[bool, typer.Option("--force", help="Load an adapter on another base; says what differs.")]
RecipeFile = Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe file (YAML).")]


def main() -> None:
    """Runs a command. Whatever goes wrong ends as one message and the exit code of its kind (see errors.py)."""
    signal.signal(signal.SIGTERM, _interrupt)  # ends like Ctrl-C; while training, `stop_signals` takes its place
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # peft imports it; what it lacks is no concern of this run
    try:
        sys.exit(build(sys.argv[1:])(standalone_mode=False) or 0)
    except StropError as error:
        _fail(error.lines(), error.as_json(), error.exit_code, error.so_far)
    except KeyboardInterrupt:
        _fail(["stopped at once; the last checkpoint is intact"], {"kind": "Stopped", "message": "interrupted"}, 130)
    except Exception as error:  # the one place for faults of ours: never a traceback unless asked
        if hasattr(error, "format_message"):  # click's UsageError and its kin, which typer vendors or imports
            _fail(
                [line for line in [error.format_message()] if line],
                {"kind": "UsageError", "message": error.format_message()},
                2,
            )
        if os.environ.get("STROP_DEBUG"):
            raise
        said = f"{type(error).__name__}: {error}"
        lines = [said, "this is a fault of strop's: set STROP_DEBUG=1 to see where, and please report it"]
        _fail(lines, {"kind": "InternalError", "message": said}, 1)


def build(words: Sequence[str]) -> typer.Typer:
    """The command line for these arguments. The flags of a recipe are made only for a command that is among them:
    they cost a tenth of a second, which `strop --help` need not wait for."""
    app = typer.Typer(
        help="Fine-tunes open language models with LoRA on your own hardware, and proves the result.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_version_option)
    for name, command in COMMANDS.items():
        takes_recipe = "options" in inspect.signature(command).parameters
        app.command(name)(recipe_options(command, name in words) if takes_recipe else command)
    return app


def train(
    recipe: RecipeFile = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Show every value with its origin; train nothing.")
    ] = False,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Fine-tune a model; writes a run folder."""
    from strop.config.load import resolve

    resolved = resolve(recipe, options)
    if print_recipe:
        from strop.training.setup import preview

        print(preview(resolved, memory=_bytes(memory)).as_yaml(), end="")
        return
    from strop.training.run import train as run_training

    with watching() as watch:
        run = run_training(resolved, [watch], memory=_bytes(memory))
    _end_of_run(run.report, as_json)


def resume(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            help="What may differ from the run's start: lr, schedule, base, data, template, versions, a field."
        ),
    ] = None,
    memory: Memory = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Go on with a run from its newest complete checkpoint. Recipe flags change a value, where that is allowed."""
    from strop.runs.folder import open_run
    from strop.training.run import resume as go_on

    if open_run(run).finished:
        console.print(f"{run} is finished; nothing to resume")
    with watching() as watch:
        report = go_on(run, [watch], options=options, allow_changed=allow_changed or (), memory=_bytes(memory)).report
    _end_of_run(report, as_json)


def evaluate(
    name: ModelName,
    data: Annotated[list[str], typer.Option("--data", help="Rows to answer.")],
    metric: Annotated[str, typer.Option(help="exact, exact_json, contains, regex, or file.py:function.")] = "exact",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 80,
    samples: Annotated[int, typer.Option(min=0, help="Answers to show.")] = 3,
    general: Annotated[bool, typer.Option("--general", help="Ask a general set too: what did training break?")] = False,
    quantization: Quantization = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare base and tuned on rows that were not trained on."""
    from strop.evaluation.run import evaluate_model

    with answering() as advance:
        result = evaluate_model(
            name,
            data,
            metric=metric,
            max_new_tokens=max_new_tokens,
            advance=advance,
            quantization=quantization,
            force=force,
            general=general,
        )
    print_notes(result["notes"])
    print_scores(result)
    if "general" in result:
        print_general(result["general"])
    print_samples(result["samples"][:samples])
    _print_json(result, as_json)


def chat(
    name: ModelName,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base, without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Sample among the likeliest tokens of this total share.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    quantization: Quantization = "auto",
    force: Force = False,
) -> None:
    """Talk to a model in the terminal, or through a pipe: one line a turn."""
    from strop.chat import converse

    converse(
        name,
        system=system,
        base=base,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        quantization=quantization,
        force=force,
    )


def check(
    recipe: RecipeFile = None,
    show: Annotated[int, typer.Option(min=0, help="Rows to show token by token.")] = 0,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids too.")] = False,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Write a cleaned copy, with a log of each change.")
    ] = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """See what would be trained on: rows, drops, masks, stop tokens (without --model: with the demo's tokenizer)."""
    from strop.config.load import resolve
    from strop.data import check as account
    from strop.data.prepare import prepare
    from strop.model.facts import locate
    from strop.model.tokenizer import load_tokenizer

    chosen = resolve(recipe, options if recipe else {"model.name": "demo", **(options or {})}).recipe
    tokenizer = load_tokenizer(locate(chosen.model.name, chosen.model.revision))
    prepared = prepare(chosen.data, tokenizer, strict=False)
    account.print_report(prepared.report.as_json(), console)
    if show:
        account.show(prepared, show, console, ids=ids)
    if fix is not None:
        account.fix(chosen.data, tokenizer, fix)
    _print_json(prepared.report.as_json(), as_json)
    if prepared.report.would_refuse:
        raise typer.Exit(InputError.exit_code)


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run or adapter folder.")],
    out: Annotated[Path, typer.Option(help="The new model folder.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    data: Annotated[str | None, typer.Option("--data", help="Rows to measure on; default: the run's own.")] = None,
    as_json: Json = False,
) -> None:
    """Merge the adapter into its base, and measure that it is still the same model."""
    from strop.export.merge import merge as merge_into

    merged = merge_into(run, out, dtype=dtype, data=data)
    for base, loss in merged.base_losses.items():
        console.print(f"[bold]base[/]     {base}: loss {loss:.4f}{' (taken)' if base == merged.base else ''}")
    parity = merged.parity
    console.print(
        f"[bold]parity[/]   mean KL {parity.kl_mean:.2g}, at most {parity.kl_max:.2g}; top-1 agreement "
        f"{parity.top1_agreement:.2%} of {parity.positions:,} positions; loss {parity.loss_difference:+.1e}"
    )
    console.print(f"[bold]merged[/]   {merged.out}")
    _print_json(merged.as_json(), as_json)


def modules(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, run folder, or demo.")],
    as_json: Json = False,
) -> None:
    """List the linear layers an adapter can sit on, and what picks them."""
    from dataclasses import asdict

    from rich.table import Table

    from strop.config.load import resolve
    from strop.model.facts import locate
    from strop.model.load import skeleton
    from strop.model.lora import linear_kinds, target_names

    kinds = linear_kinds(skeleton(locate(model)))
    presets = {
        preset: target_names(
            kinds, resolve(None, {"model": model, "data": "-", "preset": preset}).recipe.lora.target_modules
        )
        for preset in ("auto", "low-memory", "balanced", "max-quality")
    }
    rows = [{**asdict(k), "presets": [preset for preset, names in presets.items() if k.name in names]} for k in kinds]
    table = Table("name", "type", "in", "out", "count", "picked by preset", "quantized")
    for kind, row in zip(kinds, rows, strict=True):
        sizes = (str(kind.in_features), str(kind.out_features), str(kind.count))
        quantized = f"no: {kind.kept_16_bit}" if kind.kept_16_bit else "yes"
        table.add_row(kind.name, kind.type, *sizes, ", ".join(row["presets"]) or "none", quantized)
    console.print(table)
    _print_json({"modules": rows}, as_json)


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs in a folder."""
    from strop.runs.folder import find_runs

    rows = []
    for run in find_runs(folder):
        report = json.loads(run.report.read_text(encoding="utf-8")) if run.report.is_file() else {}
        steps = [step for step, _ in run.checkpoints()]
        rows.append(
            {"run": str(run.path), "finished": run.finished, "step": report.get("steps", max(steps, default=0))}
        )
    for row in rows:
        console.print(f"{row['run']}  {'finished' if row['finished'] else 'not finished'}, step {row['step']}")
    if not rows:
        console.print(f"no runs in {folder}")
    _print_json({"runs": rows}, as_json)


def schema() -> None:
    """Print the JSON schema of a recipe."""
    from strop.config.schema import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/demo-N.")] = None, as_json: Json = False
) -> None:
    """Fine-tune a small real model on this CPU in minutes, and see what it learned."""
    from strop.demo.story import run_demo

    with watching() as watch:
        result = run_demo(out, watch)
    _print_json(result, as_json)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"strop {__version__}")
        raise typer.Exit


def _end_of_run(report: dict[str, Any], as_json: bool) -> None:
    out = report["run"]
    console.print(
        f"[bold]done[/]     {report['steps']} steps, {report['tokens']:,} tokens in {report['seconds']:.0f} s "
        f"({report['tokens_per_s']:.0f} tokens/s, {report['supervised_tokens_per_s']:.0f} supervised)"
    )
    for finding in report.get("diagnosis", []):
        console.print(f"[yellow]finding[/]  {finding}")
    console.print(f"[bold]adapter[/]  {report['adapter']}\n[bold]report[/]   {out}/report.html")
    _print_json(
        {key: value for key, value in report.items() if key not in ("recipe", "lock", "machine", "data_report")},
        as_json,
    )


COMMANDS: Mapping[str, Callable[..., None]] = {
    "check": check,
    "train": train,
    "resume": resume,
    "eval": evaluate,
    "chat": chat,
    "merge": merge,
    "modules": modules,
    "runs": runs,
    "schema": schema,
    "demo": demo,
}


def _version_option(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def _print_json(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(value, ensure_ascii=False))


def _bytes(memory: str | None) -> int | None:
    from strop.machine.memory import parse_bytes

    return None if memory is None else parse_bytes(memory)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(lines: list[str], error: dict[str, Any], code: int, so_far: Mapping[str, Any] | None = None) -> None:
    for line in lines:
        console.print(f"error: {line}", markup=False, style="red" if code != 130 else "yellow")
    _print_json({**(so_far or {}), "error": error, "exit": code}, "--json" in sys.argv)
    sys.exit(code)


if __name__ == "__main__":
    main()
