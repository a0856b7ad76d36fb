"""`strop serve`: serve models with an OpenAI-compatible API."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from strop.cli.options import Force, Json, Quantization
from strop.cli.progress import status_line
from strop.cli.tables import console, print_json, print_notes
from strop.engine.kernels import warmup


def serve(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL...",
            help="Run, adapter or model folder, .gguf file, Hub id, or demo; or several runs of one base.",
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
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp32 or fp16.")] = "auto",
    engine: Annotated[
        str, typer.Option(help="strop, or vllm (its outputs are compared with the tuned model first).")
    ] = "strop",
    vllm_python: Annotated[str | None, typer.Option(help="Python of the environment with vLLM.")] = None,
    quantization: Quantization = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Serve models with an OpenAI-compatible API and a page that compares base and tuned answers."""
    from strop.errors import RecipeError, nearest
    from strop.models.load import check_device_and_dtype
    from strop.serve.server import exit_code, open_address

    if engine not in ("strop", "vllm"):
        raise RecipeError(f"--engine {engine}: no such engine{nearest(engine, ['strop', 'vllm'])}", fix="strop or vllm")
    check_device_and_dtype(device, dtype)
    strop_only = {
        "--queue": queue != 64, "--max-body": max_body != 4, "--allow-host": bool(allow_host), "--force": force,
        "--quantization": quantization != "auto",
    }  # fmt: skip
    given = [name for name, is_given in strop_only.items() if is_given]
    unused = given if engine == "vllm" else ["--vllm-python"] * bool(vllm_python)
    if unused:
        raise RecipeError(f"{unused[0]}: has no effect with --engine {engine}", fix="leave it out")
    address = open_address(host, port, api_key, allow_host or [])

    def ready(about: dict[str, Any]) -> None:
        status.stop()
        print_notes(about["notes"])
        for parity in about.get("parity", []):
            control = "" if parity["control"] is None else f", to the base {parity['control']:.2g}"
            console.print(
                f"[bold]parity[/]   {escape(parity['model'])}: mean difference {parity['mean']:.2g} nats per token"
                f"{control}; at most {parity['max']:.2g}, over {parity['tokens']:,} tokens"
            )
        console.print(
            f"[bold]serving[/]  {about['url']}  models: {escape(', '.join(about['models']))}  (Ctrl-C to stop)"
        )
        print_json(about, as_json)

    with status_line("loading the libraries") as status:
        if engine == "vllm":
            from strop.serve.vllm import serve_vllm

            ended = serve_vllm(
                names, address, python=vllm_python, slots=slots, context=context, device=device, dtype=dtype,
                ready=ready,
            )  # fmt: skip
        else:
            warmup.load(warmup.DECODE)
            from strop.serve.run import serve as run_server

            ended = run_server(
                names, address, slots=slots, queue=queue, context=context, max_body_bytes=max_body << 20, device=device,
                dtype=dtype, quantization=quantization, force=force, ready=ready,
            )  # fmt: skip
    console.print("[bold]stopped[/]")
    raise typer.Exit(exit_code(ended))
