"""Commands before training: doctor, modules, schema, plan and check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strop import api
from strop.cli.options import DevicesPerMachine, Json, Machines, RecipeOrData, RecipeOrModel, read_argument
from strop.config.names import option_words
from strop.display.tables import console, messages, print_json, print_next, print_notes
from strop.display.terminal import status_line
from strop.engine.kernels import warmup
from strop.errors import InputError, RecipeError

if TYPE_CHECKING:
    from strop.config.schema import Recipe
    from strop.data.types import Indices


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Print only the commands that fix the findings.")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: hardware, libraries, matmul rates, one 4-bit training step, and a write to the disk."""
    from strop.machine.doctor import examine
    from strop.planning.tables import print_findings

    def measure(machine: Any) -> Any:
        warmup.load()
        from strop.planning import calibrate

        return calibrate.examine(machine)

    messages.print("this takes about 15 s, and some minutes the first time or on a busy machine")
    with status_line("loading the libraries"):
        examination = examine(measure)
    findings = examination.findings
    errors = [finding for finding in findings if finding.level == "error"]
    result: dict[str, Any]
    if fix:
        fixes = list(dict.fromkeys(finding.fix for finding in findings if finding.fix))
        result = {"fixes": fixes}
        if fixes and not as_json:
            print("\n".join(fixes))
        elif not as_json:
            has_problems = any(finding.level != "ok" for finding in findings)
            messages.print("no command fixes the findings: see `strop doctor`" if has_problems else "nothing to fix")
    else:
        print_findings(examination, console)
        if not errors:
            print_next(["demo"])
        result = examination.as_json()
    if errors:
        first = errors[0]
        result["error"] = {"kind": "NotReady", "message": first.what, "fix": first.fix, "where": []}
    print_json(result, as_json)
    if errors:
        raise typer.Exit(1)


def modules(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local folder, .gguf file, run folder, or the word demo.")
    ],
    as_json: Json = False,
) -> None:
    """List the linear layers of a model, and the presets that adapt them."""
    from rich.table import Table

    with status_line("reading the model's config"):
        from strop.planning.plan import list_layers

        kinds, rows = list_layers(model)
    table = Table("name", "type", "in", "out", "count", "picked by preset", "quantized")
    for kind, row in zip(kinds, rows, strict=True):
        sizes = (str(kind.in_features), str(kind.out_features), str(kind.count))
        quantized = f"no: {kind.why_16_bit}" if kind.why_16_bit else "yes"
        table.add_row(kind.name, kind.type, *sizes, ", ".join(row["presets"]) or "none", quantized)
    console.print(table)
    print_json({"modules": rows}, as_json)


def schema() -> None:
    """Print the JSON schema of a recipe."""
    from strop.config.schema import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def plan(
    recipe: RecipeOrModel = None,
    memory: Annotated[
        str | None, typer.Option(help="Plan for this much memory, such as 8GB (with --device cuda: GPU memory).")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help='Plan for this GPU, such as "RTX 4090".')] = None,
    devices: DevicesPerMachine = 1,
    nodes: Machines = 1,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare full fine-tuning, 16-bit LoRA and QLoRA for several model sizes.")
    ] = False,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Predict whether training fits, how long it takes, and which settings to use, without weights or a GPU."""
    from strop.planning.microbatch import NO_DATA
    from strop.planning.plan import print_plan
    from strop.planning.tables import print_comparison

    if compare and devices * nodes > 1:
        raise RecipeError("--compare: works for one device only", fix="leave out --devices and --nodes")
    file, options = read_argument(recipe, "model.name", options)
    if compare:
        rows = api.compare_methods(file, memory=memory, gpu=gpu, **options)
        print_comparison(rows, console)
        print_json({"rows": [row.as_json() for row in rows]}, as_json)
        return
    planned = api.plan(file, memory=memory, gpu=gpu, devices=devices, nodes=nodes, **options)
    print_plan(planned, console)
    if planned.device == "cpu" and not (gpu or devices * nodes > 1) and warmup.is_missing(warmup.TRAIN):
        note = "the first training also compiles kernels for this CPU, once: about half a minute on two idle cores"
        print_notes([note])
    is_refused = planned.refused or planned.data["refused"]
    if (
        planned.fits
        and not is_refused
        and planned.resolved.recipe.data.train != NO_DATA
        and not (memory or gpu or devices * nodes > 1)
    ):
        print_next(["train", *([str(file)] if file else []), *option_words(options)])
    result = planned.as_json()
    if not planned.fits:
        fixes = "; ".join(suggestion.what for suggestion in planned.suggestions)
        result["error"] = {"kind": "DoesNotFit", "message": planned.verdict, "fix": fixes, "where": []}
    print_json(result, as_json)
    if not planned.fits:
        raise typer.Exit(1)


def check(
    recipe: RecipeOrData = None,
    show: Annotated[int, typer.Option(min=0, help="Rows to show token by token.")] = 0,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids with --show.")] = False,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Write a cleaned copy, and a log of each change.")
    ] = None,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Show the rows that would be trained on: drops, masks, stop tokens. The default tokenizer is the demo model's."""
    recipe_file, options = read_argument(recipe, "data.train", options)
    with status_line("loading the libraries"):
        from strop.data import check as data_check

        checked = api.check_rows(recipe_file, options)
    report = checked.prepared.report
    name = checked.recipe.model.name
    data_check.print_report(report.as_json(), console, tokenizer=name, is_copied=fix is not None)
    note = _note_on_length(checked.recipe, checked.prepared.train.lengths)
    notes = [note] if note else []
    if checked.recipe.train.environment is not None:
        notes.append(
            "prompts are counted without the environment's tools; --show 1 counts and shows them with the tools"
        )
    print_notes(notes)
    if show and checked.recipe.train.environment is not None and not report.refusal:
        _show_traces(checked, show, ids)
    elif show:
        data_check.print_examples(checked.prepared, show, console, ids=ids)
    if fix is not None:
        console.print(checked.write_copy(fix), markup=False, highlight=False)
        print_next(["train", *_options_of_copy(checked.recipe, recipe_file, options), "--data", str(fix)])
    refusal = report.refusal or (report.eval.refusal if report.eval else None)
    if not checked.recipe.model.adapter and not refusal and fix is None:
        named = {} if recipe_file else {"model.name": checked.recipe.model.name}
        words = [*([str(recipe_file)] if recipe_file else []), *option_words({**named, **options})]
        print_next(["plan", *words], ["train", *words])
    print_json({**report.as_json(), **({"error": refusal.as_json()} if refusal else {})}, as_json)
    if refusal and fix is None:
        raise typer.Exit(InputError.exit_code)


def _options_of_copy(recipe: Recipe, recipe_file: Path | None, options: Mapping[str, Any]) -> list[str]:
    """Return the words that train on a cleaned copy as on the rows: the same options, without how these are read."""
    read = {"data.columns": None, "data.format": "auto", "data.encoding": "utf-8"}
    kept = {name: value for name, value in options.items() if name not in {*read, "data.train", "data.bad_rows"}}
    if recipe_file is None:
        return option_words({"model.name": recipe.model.name, **kept})
    values = {name: attrgetter(name)(recipe) for name in read}
    reset = {name: default or "none" for name, default in read.items() if values[name] != default}
    return [str(recipe_file), *option_words({**kept, **reset})]


def _show_traces(checked: api.CheckedRows, show: int, ids: bool) -> None:
    """Print traces in the recipe's environment, token by token."""
    from strop.data.check import print_tokens
    from strop.evaluation.trace_preview import preview_traces

    with status_line("sampling traces"):
        traces, notes = preview_traces(checked.recipe, checked.prepared, show)
    print_notes(notes)
    examples = [trace.as_example() for trace in traces]
    print_tokens(examples, checked.prepared.renderer, console, ids=ids)


def _note_on_length(recipe: Recipe, lengths: Indices) -> str | None:
    """Return a note if rows are longer than the context length in the model's config."""
    from strop.errors import ModelError
    from strop.models.families.shape import read_model_info
    from strop.objectives.table import max_completion_tokens

    try:
        shape = read_model_info(recipe.model.name, recipe.model.revision).shape
    except ModelError:
        return None
    return shape.too_long_message(lengths, max_completion_tokens(recipe.train))
