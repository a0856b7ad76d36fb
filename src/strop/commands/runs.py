"""`strop runs`: the runs in a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from strop.errors import InputError
from strop.flags import Json
from strop.terminal import console, print_json


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds run folders.")] = Path("runs"),
    delete: Annotated[
        str | None, typer.Option(metavar="NAME", help="Delete this run; without --yes only say what would go.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    as_json: Json = False,
) -> None:
    """List the runs in a folder, or delete one of them."""
    from strop.runs.folder import find_runs

    if yes and delete is None:
        raise InputError("--yes: has no effect without --delete NAME", fix="leave it out")
    if delete is not None:
        _delete(folder, delete, yes, as_json)
        return
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
    print_json({"runs": rows}, as_json)


def _delete(folder: Path, name: str, sure: bool, as_json: bool) -> None:
    """Removes a run's folder, unless a process holds it."""
    from strop.runs.folder import disk_faults, open_run

    path = folder / name
    if name != Path(name).name or name in ("", ".", "..") or path.is_symlink():
        raise InputError(f"--delete {name}: not the name of a run in {folder}", fix="see `strop runs`")
    run = open_run(path)
    files = [file for file in sorted(path.rglob("*")) if file.is_symlink() or not file.is_dir()]
    size = sum(file.lstat().st_size for file in files)
    with run.claim(), disk_faults(path):
        if sure:
            shutil.rmtree(path)
    told = "deleted" if sure else "would delete"
    console.print(f"[bold]{told}[/] {path}: {len(files):,} files, {size / 1e6:,.1f} MB")
    if not sure:
        for file in files:
            console.print(f"  {file}", markup=False)
        console.print("nothing was deleted: add --yes")
    print_json({"run": str(path), "deleted": sure, "files": len(files), "bytes": size}, as_json)
