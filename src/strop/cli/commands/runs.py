"""Commands for the folders that strop writes: runs, dash and cache."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from strop.cli.options import DEFAULT_FOLDER, Json, check_folder
from strop.display.tables import console, describe_caveat, messages, print_json
from strop.errors import InputError, suggest

if TYPE_CHECKING:
    from strop.runs.folder import RunFolder


MIN_WIDE = 110  # columns of a terminal in which a run fits on one line

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that contains run folders.")]


def runs(
    folder: Folder = DEFAULT_FOLDER,
    delete: Annotated[
        str | None, typer.Option(metavar="NAME", help="Delete this run; without --yes, only list its files.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm the deletion.")] = False,
    as_json: Json = False,
) -> None:
    """List the runs in a folder, or delete one of them."""
    from rich.table import Column, Table

    from strop.runs.folder import find_runs

    if yes and delete is None:
        raise InputError("--yes: has no effect without --delete NAME", fix="leave it out")
    if delete is not None:
        _delete(folder, delete, yes, as_json)
        return
    check_folder(folder)
    rows = [_summarize(run) for run in find_runs(folder)]
    is_narrow = console.width < MIN_WIDE  # model and data are then below the name
    sources, losses = ([], ["loss"]) if is_narrow else (["started", "model", "data"], ["train loss", "eval loss"])
    table = Table(Column("run", overflow="fold"), *sources, "score", *losses, "time", "state")
    for row in rows:
        name, model = escape(Path(row["run"]).name), escape(_shorten_name(row["model"]))
        data = escape(", ".join(map(_shorten_name, row["data"] or [None])))
        train, held_out = ("-" if row[f"{x}_loss"] is None else f"{row[f'{x}_loss']:.4g}" for x in ("train", "eval"))
        score = "-" if row["score"] is None else f"{row['score']:.1%} {row['metric']}"
        moment = None if row["started"] is None else time.localtime(row["started"])
        started = "" if moment is None else f"{moment.tm_mday} {time.strftime('%b %H:%M', moment)}"
        table.add_row(
            *([f"{name}\n[dim]{model}, {data}[/]"] if is_narrow else [name, started, model, data]),
            escape(f"{score}{chr(10) if is_narrow else ' '}{row['caveat']}".strip()),
            *([f"train {train}\neval {held_out}"] if is_narrow else [train, held_out]),
            "-" if row["seconds"] is None else _format_time(row["seconds"]),
            (",\n" if is_narrow else ", ").join(_describe_state(row)),
        )
    console.print(table if rows else escape(f"no runs in {folder}"))
    print_json({"runs": rows}, as_json)


def _delete(folder: Path, name: str, confirmed: bool, as_json: bool) -> None:
    """Delete a run's folder if it is confirmed. Raises FolderError if a process uses the run."""
    from strop.runs.folder import disk_errors, open_run

    path = folder / name if name == Path(name).name else Path(name)
    if path.name in ("", ".", "..") or path == folder or path.is_symlink():
        raise InputError(f"--delete {name}: not the name of a run in {folder}", fix="see `strop runs`")
    run = open_run(path)
    files = [file for file in sorted(path.rglob("*")) if file.is_symlink() or not file.is_dir()]
    size = sum(file.lstat().st_size for file in files)
    with run.claim(), disk_errors(path):
        if confirmed:
            shutil.rmtree(path)
    verb = "deleted" if confirmed else "would delete"
    console.print(f"[bold]{verb}[/] {escape(str(path))}: {len(files):,} files, {size / 2**20:,.1f} MiB")
    if not confirmed:
        counts = Counter(file.relative_to(path).parts[0] for file in files)
        contents = (f"{name} ({count} files)" if count > 1 else name for name, count in counts.items())
        console.print(f"  {', '.join(contents)}", markup=False)
        console.print("nothing was deleted: add --yes")
    print_json({"run": str(path), "deleted": confirmed, "files": len(files), "bytes": size}, as_json)


def cache(
    delete: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND|all", help="Delete entries of this kind; without --yes, only list them. Repeatable."
        ),
    ] = None,
    unused: Annotated[
        float, typer.Option(min=0, metavar="DAYS", help="Delete only what was not used for so many days.")
    ] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm the deletion.")] = False,
    as_json: Json = False,
) -> None:
    """Show what takes space in the cache, or delete it. What `--delete all` deletes is made again."""
    from strop.runs.cache import KINDS, delete_entries, list_entries, select_entries
    from strop.runs.folder import cache_folder

    if delete is None:
        if yes or unused:
            raise InputError("--yes and --unused: have no effect without --delete KIND", fix="leave them out")
        _show_cache(as_json)
        return
    if unknown := sorted(set(delete) - {*KINDS, "all"}):
        what = f"--delete {unknown[0]}: no such kind{suggest(unknown[0], KINDS)}"
        raise InputError(what, fix=f"give all, or one of {', '.join(KINDS)}")
    chosen = select_entries(list_entries(), delete, unused)
    if yes:
        delete_entries(chosen)
    else:
        for entry in chosen:
            console.print(f"  {entry.path}  {_format_size(entry.size)}, {_format_age(entry.unused_days)}", markup=False)
    size = sum(entry.size for entry in chosen)
    verb = "deleted" if yes else "would delete"
    console.print(f"[bold]{verb}[/] {len(chosen):,} entries, {_format_size(size)}{'' if yes else ': add --yes'}")
    files = [str(entry.path) for entry in chosen]
    print_json({"folder": str(cache_folder()), "deleted": yes, "entries": files, "bytes": size}, as_json)


def _show_cache(as_json: bool) -> None:
    from rich.table import Table

    from strop.runs.cache import KINDS, OTHER, list_entries
    from strop.runs.folder import cache_folder

    entries, kinds = list_entries(), list[dict[str, Any]]()
    table = Table("kind", "what", "entries", "size", "last used")
    for kind, what in {**KINDS, OTHER: "measurements of this machine and of earlier runs"}.items():
        if not (own := [entry for entry in entries if entry.kind == kind]):
            continue
        size, newest = sum(entry.size for entry in own), max(own, key=lambda entry: entry.used)
        kinds.append({"kind": kind, "entries": len(own), "bytes": size, "used": newest.used})
        table.add_row(kind, what, f"{len(own):,}", _format_size(size), _format_age(newest.unused_days))
    total = sum(entry.size for entry in entries)
    console.print(f"[bold]cache[/]    {cache_folder()}: {_format_size(total)}", soft_wrap=True)
    if kinds:
        console.print(table)
        console.print("[bold]delete[/]   strop cache --delete KIND --unused 30")
        console.print(
            "         gguf: plain PEFT reads the base of adapters that were trained on a GGUF file from there"
        )
    print_json({"folder": str(cache_folder()), "bytes": total, "kinds": kinds}, as_json)


def _summarize(run: RunFolder) -> dict[str, Any]:
    """Return a row of the table. Values are None if the files of the run lack them."""
    from strop.dash.runs import read_last_events

    report, recipe = run.read_report(), _read_yaml(run.recipe)
    state, why, started = _find_state(run)
    sources, metric = _get(recipe, "data", "train"), _get(report, "evaluation", "metric")
    last, evaluated, _ = read_last_events(run.events, live=False)
    steps = _number_or_none(report.get("steps", last.get("step")))
    train_loss = _number_or_none(_get(report, "loss", "last") if report else last.get("loss"))
    eval_loss = _number_or_none(report.get("eval_loss", evaluated.get("loss")))
    score = _number_or_none(_get(report, "evaluation", "tuned", metric))
    return {
        "run": str(run.path),
        "model": _get(recipe, "model", "name"),
        "data": sources if sources is None or isinstance(sources, list) else [sources],
        "finished": run.finished,
        "state": state,
        "why": why,
        "started": started,
        "step": max([step for step, _ in run.checkpoints()], default=0) if steps is None else steps,
        "metric": metric,
        "score": score,
        "caveat": "" if score is None else describe_caveat(report["evaluation"]),
        "loss": train_loss if eval_loss is None else eval_loss,
        "train_loss": train_loss,
        "eval_loss": eval_loss,
        "seconds": _number_or_none(_get(report, "seconds")),
    }


def _describe_state(row: dict[str, Any]) -> list[str]:
    """Return the state, its reason, and the step if it is not the last of the recipe."""
    step = [] if row["finished"] and not row["why"] else [f"step {row['step']:,}"]
    return [escape(part) for part in (row["state"], row["why"], *step) if part]


def _find_state(run: RunFolder) -> tuple[str, str, float | None]:
    """Return the state as the page shows it, its reason or "", and the Unix time at which the run started."""
    from strop.dash.runs import RunTable
    from strop.errors import FolderError

    path = run.path.resolve()  # of a link
    try:
        row = RunTable(path.parent).row(path.name)
    except FolderError:  # a name that the page does not show
        row = None
    row = row or {"state": "not finished", "why": "", "started": None}
    return "finished" if run.finished else str(row["state"]), str(row["why"]), row["started"]


def _get(tree: Any, *keys: Any) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _number_or_none(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _shorten_name(name: Any) -> str:
    """Return the file name of a path; return Hub ids unchanged."""
    if not isinstance(name, str):
        return "-" if name is None else str(name)
    return Path(name).name if Path(name).is_absolute() or name.count("/") > 1 else name


def _format_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _format_size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _format_age(days: float) -> str:
    days = int(days)
    return "today" if days < 1 else "yesterday" if days == 1 else f"{days:,} days ago"


def dash(
    folder: Folder = DEFAULT_FOLDER,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8800,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Additional host name that browsers may use; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show runs in a browser: view, compare, start, stop and export them."""
    check_folder(folder)
    from strop.dash.app import dash as run_server
    from strop.serve.server import exit_code

    def ready(server: dict[str, Any]) -> None:
        messages.print(f"[bold]page[/]     {server['url']}", soft_wrap=True)
        messages.print("the address contains the access key: keep it secret  (Ctrl-C stops the page; runs continue)")
        print_json(server, as_json)

    signal_number = run_server(folder, host=host, port=port, more_hosts=allow_host or [], ready=ready)
    messages.print("[bold]stopped[/]")
    raise typer.Exit(exit_code(signal_number))
