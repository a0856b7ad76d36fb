"""Print results: tables, summaries, notes and JSON, on a console that shows control characters as codes."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from strop.config.names import option_words
from strop.errors import in_python

if TYPE_CHECKING:
    from strop.data.prepare import Prepared

# environment variables of the processes that --devices starts: the command that the user gave, and their number
STARTED_AS, STARTED_DEVICES = "STROP_STARTED_AS", "STROP_STARTED_DEVICES"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape_control(text: str) -> str:
    """Replace control characters with their hexadecimal codes, except line breaks and tabs."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class SafeConsole(Console):
    """A console for untrusted text (names, rows, templates): control characters are shown as codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, emoji=False)  # "rows.jsonl:100:" is a file and a line, not an emoji code

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escape_control(segment.text))

    @property
    def is_terminal(self) -> bool:
        """Whether output is updated in place. A notebook stores all updates of the terminal that `!strop` has in it."""
        return super().is_terminal and (self._force_terminal is True or "JPY_PARENT_PID" not in os.environ)

    def use_stderr(self, enabled: bool) -> None:
        """Print on stderr if enabled, otherwise on stdout, in colour if that stream is a terminal."""
        self.stderr = enabled
        self._color_system = self._detect_color_system()


class PythonConsole(SafeConsole):
    """A console for results of the Python functions, which writes options as in Python."""

    def print(self, *objects: Any, **options: Any) -> None:
        texts = (Text(in_python(x.plain), x.style) if isinstance(x, Text) and not x.spans else x for x in objects)
        super().print(*(in_python(x) if isinstance(x, str) else x for x in texts), **options)


console = SafeConsole(highlight=False, soft_wrap=True)  # results, on stdout, or with --json on stderr
messages = SafeConsole(stderr=True, highlight=False, soft_wrap=True)  # progress, notes and errors


class HtmlConsole(PythonConsole):
    """A console that collects HTML: tables become tables of HTML, and other lines wrap at the width of the page."""

    def __init__(self) -> None:
        super().__init__(
            record=True, file=io.StringIO(), width=110, highlight=False, soft_wrap=True, force_terminal=True,
            force_jupyter=False,
        )  # fmt: skip
        self.parts: list[str] = []

    def print(self, *objects: Any, **options: Any) -> None:
        if len(objects) == 1 and isinstance(objects[0], Table):
            self.parts.append(self._table(objects[0]))
        else:
            self.parts.append(
                f'<div style="font-family:monospace;white-space:pre-wrap">{self._html(*objects, **options)}</div>'
            )

    def _html(self, *objects: Any, **options: Any) -> str:
        super().print(*objects, **options)
        return self.export_html(inline_styles=True, code_format="{code}").rstrip("\n")

    def _table(self, table: Table) -> str:
        styles = [f"text-align:{'right' if column.justify == 'right' else 'left'}" for column in table.columns]

        def row(tag: str, cells: Iterable[RenderableType]) -> str:
            pairs = zip(cells, styles, strict=True)
            return (
                "<tr>"
                + "".join(f'<{tag} style="{style}">{self._html(cell)}</{tag}>' for cell, style in pairs)
                + "</tr>"
            )

        title = f'<caption style="text-align:left">{self._html(table.title)}</caption>' if table.title else ""
        head = f"<thead>{row('th', (column.header for column in table.columns))}</thead>" if table.show_header else ""
        rows = zip(*(column.cells for column in table.columns), strict=True)
        return f"<table>{title}{head}<tbody>{''.join(row('td', cells) for cells in rows)}</tbody></table>"


def render_html(print_result: Callable[[SafeConsole], None]) -> str:
    """Return what a function prints to a console as HTML."""
    console = HtmlConsole()
    print_result(console)
    return "".join(console.parts)


class Printed:
    """A result that a notebook and `print` show as the table of the command line."""

    def _print(self, out: SafeConsole) -> None:
        raise NotImplementedError  # each result prints its own table

    def _repr_html_(self) -> str:
        return render_html(self._print)

    def __repr__(self) -> str:  # of dictionaries and lists; the others have one line
        return str(self)

    def __str__(self) -> str:
        out = PythonConsole(file=io.StringIO(), width=110, highlight=False, soft_wrap=True, force_jupyter=False)
        with out.capture() as captured:
            self._print(out)
        return captured.get().rstrip()


def print_json(value: dict[str, Any], enabled: bool) -> None:
    """Print one JSON object on stdout if enabled (`--json`); characters that stdout cannot encode are escaped."""
    if enabled:
        text = json.dumps(value, ensure_ascii=False)
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(value)
        print(text, flush=True)  # a server prints it long before it ends


def print_notes(notes: Sequence[str], out: Console = messages) -> None:
    for note in notes:
        out.print("note    ", note, markup=False, style="yellow")


def abbreviate(rows: Sequence[str]) -> str:
    """Join the first three row names with commas, followed by "..." if there are more."""
    return ", ".join([*rows[:3], *(["..."] if len(rows) > 3 else [])])


def command_name() -> str:
    """Return the command that runs strop: `strop` if it is on the PATH, otherwise a path or `python -m strop`."""
    if name := os.environ.get(STARTED_AS):
        return name
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"{_shortest_path(Path(sys.executable))} -m strop"
    return _shortest_path(program) if program.name == "strop" else "strop"


def _shortest_path(program: Path) -> str:
    """Return the name of a program that is found by its name, else its path, relative to this folder if it is in it."""
    try:
        folder = Path.cwd()
    except OSError:  # it was deleted
        return str(program)
    on_path, program = shutil.which(program.name), program.absolute()
    if on_path is not None and Path(on_path).absolute() == program:
        return program.name
    return str(program.relative_to(folder)) if program.is_relative_to(folder) else str(program)


def with_command_name(text: str) -> str:
    """Replace `strop` with `command_name()` in the commands that a message contains, and add --devices to `resume`."""
    if devices := os.environ.get(STARTED_DEVICES):
        text = re.sub(r"(?<=`)strop resume [^`]+(?=`)", rf"\g<0> --devices {devices}", text)
    name = command_name()
    return text if name == "strop" else re.sub(r"(?<=`)strop (?=[a-z])|(?<=example: )strop ", f"{name} ", text)


def print_next(*commands: Sequence[str]) -> None:
    """Print commands to run next, each given by its words without `strop`."""
    for lead, words in zip(("next", *[""] * len(commands)), commands, strict=False):
        messages.print(f"{lead:8} {command_name()} {shlex.join(words)}", markup=False)


def example_request(server: Mapping[str, Any]) -> str:
    """Return a command that sends a request to the server."""
    hello: dict[str, Any] = {"model": server["models"][0], "messages": [{"role": "user", "content": "Hello"}]}
    path, body = ("/v1/chat/completions", hello)
    if "labels" in server:
        path, body = "/classify", {"input": "Hello"}
    elif "dimensions" in server:
        path, body = "/v1/embeddings", {"input": "Hello"}
    key = '-H "Authorization: Bearer $STROP_API_KEY" ' if server.get("key") else ""
    return f"curl {server['url']}{path} {key}-H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"


def describe_memory_scope(report: Mapping[str, Any]) -> str:
    """Return what the peak memory of a run leaves out, as words that follow "measured"; "" for GPU memory."""
    device = next((choice["value"] for choice in report.get("recipe", []) if choice["field"] == "model.device"), "")
    return " besides Python and its libraries" if device == "cpu" else ""


def print_run_summary(report: dict[str, Any], as_json: bool) -> None:
    run = report["run"]
    console.print(
        f"[bold]done[/]     {report['steps']} steps, {report['tokens']:,} tokens in {report['seconds']:.0f} s "
        f"({report['tokens_per_s']:.0f} tokens/s; {report['supervised_tokens']:,} of the tokens are supervised)"
    )
    if (step := report.get("adapter_step")) and step != report["steps"]:
        console.print(f"         the weights are those of step {step:,}, with the lowest evaluation loss")
    others = {"evaluation and samples": report.get("eval_seconds", 0), "saving": report.get("save_seconds", 0)}
    if rest := ", ".join(f"{name} {seconds:.0f} s" for name, seconds in others.items() if round(seconds)):
        console.print(f"         and {rest}")
    if memory := report.get("memory"):
        measured, predicted = memory["measured_peak_bytes"], memory["predicted_peak_bytes"]
        prediction = f", {predicted / 2**30:.2f} predicted ({measured / predicted - 1:+.0%})" if predicted else ""
        console.print(
            f"[bold]memory[/]   {measured / 2**30:.2f} GiB measured{describe_memory_scope(report)}{prediction}"
        )
    for finding in report.get("diagnosis", []):
        console.print(f"[yellow]finding[/]  {escape(finding)}")
    kind = "adapter" if "adapter" in report else "model"
    console.print(f"[bold]{kind:<8}[/] {escape(str(report[kind]))}\n[bold]report[/]   {escape(run)}/report.html")
    from strop.data.reading.sources import read_eval_share  # `strop --help` does not need the readers

    values = {choice["field"]: choice["value"] for choice in report.get("recipe", [])}
    evaluated = [values["data.eval"]] if isinstance(values.get("data.eval"), str) else values.get("data.eval") or []
    files = [] if read_eval_share(values.get("data.eval")) else evaluated
    objective = report.get("objective", {}).get("name")
    is_judged = objective == "kto"  # its rows may have an answer that is bad
    measure = [["eval", run, *option_words({"data.train": files})]] if files and not is_judged else []
    chat = [["chat", run]] if objective not in ("reward", "embed") else []
    print_next(*measure, *chat, ["dash", run])
    if is_judged:
        messages.print(
            f"measure  {command_name()} eval {shlex.quote(run)} --data PAIRS.jsonl, or rows with right answers"
        )
    elif not files:
        advice = "" if evaluated else "; --eval 5% keeps some back in the next run"
        command = f"{command_name()} eval {shlex.quote(run)} --data ROWS.jsonl"
        messages.print(f"measure  {command}, on rows that it was not trained on{advice}", markup=False)
    hidden = ("recipe", "lock", "machine", "data_report")
    print_json({key: value for key, value in report.items() if key not in hidden}, as_json)


def print_adapters(adapters: Sequence[dict[str, Any]], out: Console = console) -> None:
    table = Table(Column("adapter", overflow="fold"), "base", "rank", "modules", "size", "score")
    for adapter in adapters:
        if "problem" in adapter:
            continue
        size = f"{adapter['size_bytes'] / 2**20:.1f} MiB"
        modules = abbreviate(adapter["target_modules"])
        base = "demo" if adapter["base"].startswith("demo:") else adapter["base"]
        cells = (adapter["folder"], base, str(adapter["rank"]), modules, size, adapter["score"])
        table.add_row(*map(escape, cells))
    out.print(table if table.rows else "no adapters found")
    print_notes([f"{adapter['folder']}: {adapter['problem']}" for adapter in adapters if "problem" in adapter], out)


def describe_caveat(evaluation: Mapping[str, Any]) -> str:
    """Return why a score does not show what a run learned, as a few words next to it; "" for no reason."""
    counts = {
        "rows trained on": evaluation.get("train_rows"),
        "references cut": (evaluation.get("answers") or {}).get("references_cut"),
    }
    return ", ".join(f"{count:,} of {evaluation['rows']:,} {what}" for what, count in counts.items() if count)


def print_fields(values: dict[str, Any]) -> None:
    for name, value in values.items():
        console.print(f"{name.removesuffix('_bytes'):14} {_format_value(name, value)}", markup=False)


def _format_value(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value / 2**20:.1f} MiB" if name.endswith("_bytes") else f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)


class CheckReport(Printed, dict[str, Any]):
    """The fields of `strop check --json`. `print` and a notebook show them as the table of the command line."""

    def __init__(self, prepared: Prepared, show: int, copy: str | None = None) -> None:
        """show: number of rows that `print` shows. copy: a line about a cleaned copy."""
        super().__init__(prepared.report.as_json())
        self._prepared, self._show, self._copy = prepared, show, copy

    def _print(self, out: SafeConsole) -> None:
        from strop.data.check import print_examples, print_report

        print_report(self, out, is_copied=self._copy is not None)
        if self._show:
            print_examples(self._prepared, self._show, out)
        if self._copy is not None:
            out.print(self._copy, markup=False, highlight=False)
