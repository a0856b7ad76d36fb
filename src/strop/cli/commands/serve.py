"""`strop serve`: OpenAI's API on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from strop.cli.options import Force, Json, Quantization
from strop.cli.progress import alive
from strop.cli.terminal import console, print_json, print_notes
from strop.engine.kernels import warmup


def serve(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL...",
            help="As for chat; or several runs of one base.",
        ),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than this machine's own needs a key.")
    ] = "127.0.0.1",
    api_key: Annotated[str | None, typer.Option(help="Key that requests must bring; better in STROP_API_KEY.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name that clients may call the server by.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=256, help="Requests answered at once.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; beyond them: 429.")] = 64,
    context: Annotated[
        int | None, typer.Option(min=8, help="Tokens of prompt and answer; default: at most 4096.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request in MiB.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp32 or fp16.")] = "auto",
    engine: Annotated[str, typer.Option(help="strop; or vllm, which is then measured to answer alike.")] = "strop",
    vllm_python: Annotated[str | None, typer.Option(help="The Python of the environment that has vLLM.")] = None,
    quantization: Quantization = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Serve it as OpenAI's API does, with a page to talk to base and tuned side by side."""
    from strop.errors import RecipeError, nearest
    from strop.models.load import check_device_and_dtype
    from strop.serve.address import exit_code, open_address

    if engine not in ("strop", "vllm"):
        raise RecipeError(f"--engine {engine}: no such engine{nearest(engine, ['strop', 'vllm'])}", fix="strop or vllm")
    check_device_and_dtype(device, dtype)
    own = {"--queue": queue != 64, "--max-body": max_body != 4, "--allow-host": bool(allow_host), "--force": force}
    own["--quantization"] = quantization != "auto"
    unused = (
        [name for name, given in own.items() if given] if engine == "vllm" else ["--vllm-python"] * bool(vllm_python)
    )
    if unused:
        raise RecipeError(f"{unused[0]}: has no effect with --engine {engine}", fix="leave it out")
    address = open_address(host, port, api_key, allow_host or [])

    def ready(about: dict[str, Any]) -> None:
        sign.stop()
        print_notes(about["notes"])
        for same in about.get("parity", []):
            control = "" if same["control"] is None else f", to the base {same['control']:.2g}"
            console.print(
                f"[bold]parity[/]   {escape(same['model'])}: mean difference {same['mean']:.2g} nats a token{control}; "
                f"at most {same['max']:.2g}, of {same['tokens']:,}"
            )
        console.print(f"[bold]serving[/]  {about['url']}  models: {escape(', '.join(about['models']))}  (Ctrl-C ends)")
        print_json(about, as_json)

    with alive(console, "loading the libraries") as sign:
        if engine == "vllm":
            from strop.serve.vllm import serve_vllm

            ended = serve_vllm(
                names,
                address,
                python=vllm_python,
                slots=slots,
                context=context,
                device=device,
                dtype=dtype,
                ready=ready,
            )
        else:
            warmup.load(warmup.ANSWERS)
            from strop.serve.run import serve as run_server

            ended = run_server(
                names,
                address,
                slots=slots,
                queue=queue,
                context=context,
                max_body_bytes=max_body << 20,
                device=device,
                dtype=dtype,
                quantization=quantization,
                force=force,
                ready=ready,
            )
    console.print("[bold]stopped[/]")
    raise typer.Exit(exit_code(ended))
