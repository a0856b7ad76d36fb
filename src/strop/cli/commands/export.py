"""Commands for adapters and models: adapters, merge, export, export-script and push."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from strop import api
from strop.cli.options import DEFAULT_FOLDER, AdapterName, Data, Json, NoParity, check_folder, parse_numbers
from strop.display.tables import console, messages, print_adapters, print_fields, print_json, print_next, print_notes
from strop.display.terminal import status_line
from strop.engine.kernels import warmup
from strop.errors import RecipeError


def adapters(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FOLDER|ADAPTER", help="A folder to list (default: runs), or one or two adapters to show."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a weighted sum of the adapters to this folder.")] = None,
    weights: Annotated[
        str, typer.Option(help="Weights of the sum, one per adapter, such as 0.7,0.3. For one adapter: how much of it.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List adapters, show one, compare two, or write a weighted sum of several."""
    names = names or [str(DEFAULT_FOLDER)]
    if weights and out is None:
        raise RecipeError("--weights: has no effect without --out", fix="give --out")
    if out is None and len(names) > 2:
        raise RecipeError(f"{len(names)} adapters: only two can be compared", fix="add them with --out and --weights")
    if out is None and len(names) == 1:
        check_folder(Path(names[0]))
    else:
        api.check_inputs(adapters=names, out=out)
    result: dict[str, Any]
    with status_line("loading the libraries") as status:
        warmup.load(None)
        from strop.exporting import adapters as adapter_folders
        from strop.runs.folder import is_run

        status.update("reading the adapters")
        if out is not None:
            combined = adapter_folders.combine(names, parse_numbers(weights), out)
            result = {**combined, "notes": adapter_folders.find_prompt_differences(names)}
        elif len(names) == 2:
            result = adapter_folders.compare(*names)
        elif adapter_folders.is_adapter(names[0]) or is_run(Path(names[0])):
            result = {**adapter_folders.read_info(names[0]), "norm": adapter_folders.compute_norm(names[0])}
            result["not_measured"] = adapter_folders.why_not_measured(names[0])
        else:
            result = {"adapters": adapter_folders.find_adapters(Path(names[0]))}
    if out is not None:
        print_notes(result["notes"])
        console.print(f"[bold]wrote[/]    {escape(str(result['folder']))}: rank {result['rank']}")
    elif "adapters" in result:
        print_adapters(result["adapters"])
    else:
        print_fields(result)
    print_json(result, as_json)


def merge(
    run: AdapterName,
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    data: Data = None,
    no_parity: NoParity = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, and compare the merged model with the tuned one."""
    api.check_inputs(adapters=[run], data=[data], out=out)
    with status_line("loading the libraries") as status:
        warmup.load(warmup.DECODE)
        merged = api.merge(run, out, dtype=dtype, data=data, measure=not no_parity, progress=status.print)
    _print_unfinished(run)
    from strop.exporting.merge import print_merged

    print_merged(merged, console)
    _print_uses(merged.out)
    print_json(merged.as_json(), as_json)


def _print_uses(model: Path) -> None:
    """Print how to use a new model; one without a chat template cannot chat."""
    from strop.models.load import is_classifier, is_embedder
    from strop.models.source import locate
    from strop.models.tokenizer import has_template

    if is_classifier(locate(str(model))):
        messages.print(f'next     transformers.pipeline("text-classification", model="{model}")', markup=False)
        return
    if is_embedder(locate(str(model))):
        messages.print(f'next     sentence_transformers.SentenceTransformer("{model}")', markup=False)
        return
    chat = [["chat", str(model)]] if has_template(locate(str(model))) else []
    print_next(*chat, ["serve", str(model)])


GgufType = Annotated[
    str | None,
    typer.Option("--type", help="f32, f16, bf16 or q8_0 (default); with llama.cpp also q6_k, q5_k_m, q4_k_m."),
]


def gguf(
    run: AdapterName,
    out: Annotated[Path, typer.Option(help="File to write; its name ends in .gguf.")],
    gguf_type: GgufType = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the LoRA adapter, for a base that is already in GGUF.")
    ] = False,
    data: Data = None,
    no_parity: NoParity = False,
    as_json: Json = False,
) -> None:
    """Write a GGUF file for llama.cpp, and compare its output there with the tuned model."""
    api.check_inputs(models=[run], data=[data], out=out, suffix=".gguf")
    with status_line("loading the libraries") as status:
        warmup.load(warmup.DECODE)
        exported = api.export(
            "gguf", run, out, type=gguf_type, adapter=adapter, data=data, measure=not no_parity, progress=status.print
        )
    _print_unfinished(run)
    from strop.exporting.gguf import print_exported

    print_exported(exported, console)
    if not adapter:
        _print_uses(exported.out)
    print_json(exported.as_json(), as_json)


def ollama(
    run: AdapterName,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    gguf_type: GgufType = None,
    data: Data = None,
    no_parity: NoParity = False,
    as_json: Json = False,
) -> None:
    """Write a folder for `ollama create` (GGUF and Modelfile), and compare its prompts with those of training."""
    api.check_inputs(models=[run], data=[data], out=out)
    with status_line("loading the libraries") as status:
        warmup.load(warmup.DECODE)
        prepared = api.export(
            "ollama", run, out, type=gguf_type, data=data, measure=not no_parity, progress=status.print
        )
    _print_unfinished(run)
    from strop.exporting.ollama import print_prepared

    print_prepared(prepared, console)
    print_json(prepared.as_json(), as_json)


def _print_unfinished(run: str) -> None:
    from strop.models.adapter_config import unfinished_notes

    print_notes(unfinished_notes(run))


def export_script(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write: train.py, rows.jsonl, tokenizer/.")],
    as_json: Json = False,
) -> None:
    """Write a run as a plain transformers and peft script that trains the same way without strop."""
    from strop.runs.folder import check_new_run, open_run

    open_run(run)
    check_new_run(out)
    with status_line("loading the libraries"):
        warmup.load(None)
        from strop.exporting.script import export_script as write

        written = write(run, out)
    rows = "rendered by the script with the chat template" if written.encoded else "stored as tokens"
    console.print(
        f"[bold]wrote[/]    {escape(str(written.out))}: {', '.join(written.files)}; {written.rows} rows, {rows}"
    )
    print_notes(written.notes)
    messages.print(f"next     python {shlex.quote(str(written.out))}/train.py", markup=False)
    print_json(written.as_json(), as_json)


def push(
    run: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="Run, adapter folder, or merged model.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository; created if it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; default: private.")] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Hub id of the base, if it was trained from a folder or a file.", metavar="OWNER/NAME"),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    as_json: Json = False,
) -> None:
    """Upload an adapter or a merged model with its model card to the Hugging Face Hub, private by default."""
    with status_line("loading the libraries") as status:
        pushed = api.push(run, repo, public=public, base=base, message=message, progress=status.print)
    for file in pushed.left_out:
        console.print(f"not sent {file}", markup=False)
    for file in pushed.removed:
        console.print(f"removed  {file}, left by an earlier push", markup=False)
    if pushed.system:
        start = pushed.system if len(pushed.system) <= 60 else f"{pushed.system[:60]}..."
        print_notes([f"strop.json there has the system prompt of the training rows: {start!r}"])
    console.print(
        f"[bold]pushed[/]   {pushed.url} ({'private' if pushed.private else 'public'}): {len(pushed.files)} files, "
        f"{pushed.size_bytes / 2**20:.1f} MiB, each verified against the Hub's copy"
    )
    print_json(pushed.as_json(), as_json)
