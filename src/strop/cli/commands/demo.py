"""`strop demo`: the whole story on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strop.cli.options import Json
from strop.cli.progress import alive
from strop.cli.terminal import console, print_json
from strop.engine.kernels import warmup


def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/demo-N.")] = None, as_json: Json = False
) -> None:
    """Fine-tune a small real model on this CPU in minutes, and see what it learned."""
    with alive(console, "loading the libraries"):
        warmup.load()
        from strop.demo.story import run_demo

    result = run_demo(out)
    print_json(result, as_json)
