"""Commands that generate answers: eval, chat and serve."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from strop import api
from strop.cli.options import Devices, Dtype, Force, Json, ModelName, Quantization, console_for, is_main_process
from strop.display.tables import command_name, console, example_request, messages, print_json, print_next, print_notes
from strop.display.terminal import generation_progress, status_line
from strop.engine.kernels import warmup
from strop.errors import Stopped


def evaluate(
    names: Annotated[
        list[str],
        typer.Argument(metavar="RUN|MODEL", help="Runs or models to evaluate; several give a leaderboard."),
    ],
    data: Annotated[list[str], typer.Option("--data", help="Rows to evaluate on.")],
    metric: Annotated[
        str | None,
        typer.Option(
            help="exact, exact_json, contains, regex, choice, file.py:function; default: exact, or the model's."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of rows, evenly chosen; default: all.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum answer tokens; default: from the references, at least 80.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of answers to show.")] = 3,
    general: Annotated[
        bool, typer.Option("--general", help="Also evaluate on a general set, to find what training made worse.")
    ] = False,
    regression_data: Annotated[
        list[str] | None, typer.Option(help="Also evaluate on these rows, which should not get worse.")
    ] = None,
    regression_metric: Annotated[
        str | None, typer.Option(help="Metric of the regression rows; default: as --metric.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="lm-eval task, by name or .yaml file (needs lm-eval); may be repeated.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Number of documents per task.")] = None,
    devices: Devices = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Judge that picks the better answer of base and tuned: file.py:function, or a server's URL."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model of the judge's server.")] = None,
    quantization: Quantization = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    as_json: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Compare base and tuned model on rows that were not trained on."""
    from strop.distributed.launch import count_processes, launch_processes
    from strop.evaluation.tables import print_evaluation, print_leaderboard

    api.check_inputs(models=names, data=[data, regression_data], metrics=[metric, regression_metric])
    if num_processes := count_processes(devices):
        launch_processes(num_processes, sys.argv[1:])
        return
    is_main = is_main_process()
    with generation_progress(console_for(is_main)) as advance:
        warmup.load(warmup.DECODE if is_main else None)
        result = api.evaluate(
            names if len(names) > 1 else names[0], data, metric=metric, limit=limit, max_new_tokens=max_new_tokens,
            general=general,
            regression_data=regression_data or (), regression_metric=regression_metric, tasks=tasks or (),
            task_limit=task_limit, judge=judge, judge_model=judge_model, quantization=quantization, dtype=dtype,
            force=force, progress=advance, **(options or {}),
        )  # fmt: skip
    if not is_main:
        return
    from strop.data.types import IMAGE_TEXT
    from strop.evaluation.run import why_incomplete
    from strop.models.adapter_config import adapter_folder, read_adapter_config
    from strop.models.tokenizer import trained_token_rows
    from strop.runs.folder import is_run

    evaluations = result["runs"] if len(names) > 1 else [result]
    for evaluation in evaluations:
        print_evaluation(evaluation, samples)
    interrupted = list(filter(None, map(why_incomplete, evaluations)))
    if len(names) > 1:
        print_leaderboard(result["leaderboard"], evaluations[0]["metric"])
    if interrupted:
        stopped = Stopped(f"interrupted {interrupted[0]}", fix="start it again to evaluate all rows")
        stopped.partial_result = result
        raise stopped
    if len(names) == 1 and "rewards" not in result:
        name, label, folder = names[0], Path(names[0]).name, adapter_folder(names[0])
        delivery = [] if folder is None else [["merge", name, "--out", f"{label}-merged"]]
        is_on_images = any(IMAGE_TEXT in str(row.get("prompt")) for row in result.get("samples", ()))
        generates = not {"classes", "texts"} & result.keys() and not is_on_images
        has_tokens = folder is not None and trained_token_rows(read_adapter_config(folder))  # exported only when merged
        exported = f"{label}-merged" if has_tokens else name
        delivery += [["export", "gguf", exported, "--out", f"{label}.gguf"]] if generates else []
        if is_run(Path(name)):
            page = f"{command_name()} dash {shlex.quote(name)}"
            console.print(f"answers  {name}/report.html, or {page}", markup=False)
        chat = [] if "texts" in result else [["chat", name]]
        print_next(*chat, *(delivery if "tuned" in result else []), ["serve", name])
    print_json(result, as_json)


def chat(
    name: ModelName,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Start without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Sampling temperature; 0 decodes greedily. Default: from the model's config."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Sample from the most likely tokens with this total probability."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from this many most likely tokens; 0: from all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of the sampling.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Another run or adapter of the same base, to switch to with /adapter; may be repeated."),
    ] = None,
    quantization: Quantization = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Talk to a model in the terminal, or through a pipe with one line per turn."""
    api.check_inputs(models=[name], adapters=adapter or ())

    from strop.data.rendering.template_source import missing_template_error
    from strop.models.adapter_config import adapter_folder
    from strop.models.source import is_on_disk, locate
    from strop.models.tokenizer import has_template

    if is_on_disk(name) and adapter_folder(name) is None and not has_template(locate(name)):
        raise missing_template_error()
    with status_line("loading the libraries"):
        warmup.load(warmup.DECODE)
        from strop.cli.chat import chat_in_terminal

    chat_in_terminal(
        name, system=system, base=base, max_new_tokens=max_new_tokens,
        sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}, adapters=adapter or (),
        quantization=quantization, dtype=dtype, force=force,
    )  # fmt: skip


def serve(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL",
            help="Run, adapter or model folder, .gguf file, Hub id, or the word demo; or several runs of one base.",
        ),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any other than 127.0.0.1 needs an API key.")
    ] = "127.0.0.1",
    api_key: Annotated[
        str | None, typer.Option(help="API key that requests must send; safer in the variable STROP_API_KEY.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Additional host name that clients may use; may be repeated.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=256, help="Number of requests answered concurrently.")] = 16,
    queue: Annotated[
        int, typer.Option(min=0, help="Number of waiting requests; further ones are refused with status 429.")
    ] = 64,
    context: Annotated[
        int | None, typer.Option(min=8, help="Maximum tokens of prompt and answer; default: up to 4096.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Maximum request size in MiB.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Dtype = "auto",
    engine: Annotated[
        str, typer.Option(help="strop, or vllm (its outputs are compared with the tuned model first).")
    ] = "strop",
    vllm_python: Annotated[str | None, typer.Option(help="Python of the environment with vLLM.")] = None,
    quantization: Quantization = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Serve models with an OpenAI-compatible API and a page that compares base and tuned answers."""
    from strop.errors import RecipeError, suggest

    if engine not in ("strop", "vllm"):
        raise RecipeError(f"--engine {engine}: no such engine{suggest(engine, ['strop', 'vllm'])}", fix="strop or vllm")
    ignored_by_vllm = {
        "--queue": queue != 64, "--max-body": max_body != 4, "--allow-host": bool(allow_host), "--force": force,
        "--quantization": quantization != "auto",
    }  # fmt: skip
    ignored = ignored_by_vllm if engine == "vllm" else {"--vllm-python": bool(vllm_python)}
    ignored_options = [name for name, is_set in ignored.items() if is_set]
    if ignored_options:
        raise RecipeError(f"{ignored_options[0]}: has no effect with --engine {engine}", fix="leave it out")
    api.check_inputs(models=names)
    from strop.models.load import check_device_and_dtype
    from strop.serve.server import exit_code, open_address

    check_device_and_dtype(device, dtype)
    address = open_address(host, port, api_key, allow_host or [])

    def on_ready(server: dict[str, Any]) -> None:
        status.stop()
        print_notes(server["notes"])
        for parity in server.get("parity", []):
            from_base = "" if parity["control"] is None else f", from strop's base model {parity['control']:.2g}"
            messages.print(
                f"[bold]parity[/]   {escape(parity['model'])}: mean difference from strop {parity['mean']:.2g} nats "
                f"per token (largest {parity['max']:.2g}){from_base}, over {parity['tokens']:,} tokens"
            )
        messages.print(
            f"[bold]serving[/]  {server['url']}  models: {escape(', '.join(server['models']))}  (Ctrl-C to stop)"
        )
        messages.print(f"try      {example_request(server)}", markup=False)
        print_json(server, as_json)

    with status_line("loading the libraries") as status:
        if engine == "vllm":
            from strop.serve.vllm import serve_vllm

            signal_number = serve_vllm(
                names, address, python=vllm_python, slots=slots, context=context, device=device, dtype=dtype,
                on_ready=on_ready,
            )  # fmt: skip
        else:
            warmup.load(warmup.DECODE)
            from strop.serve.run import serve as run_server

            signal_number = run_server(
                names, address, slots=slots, queue=queue, context=context, max_body_bytes=max_body << 20, device=device,
                dtype=dtype, quantization=quantization, force=force, on_ready=on_ready,
            )  # fmt: skip
    messages.print("[bold]stopped[/]")
    raise typer.Exit(exit_code(signal_number))
