"""The command line: the commands, their examples, and the handling of errors."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import inspect
import io
import itertools
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from strop import __version__
from strop.cli.commands.export import adapters, export_script, gguf, merge, ollama, push
from strop.cli.commands.generate import chat, evaluate, serve
from strop.cli.commands.interop import import_, kubernetes, ray, skypilot, slurm
from strop.cli.commands.prepare import check, doctor, modules, plan, schema
from strop.cli.commands.runs import cache, dash, runs
from strop.cli.commands.sweep import sweep
from strop.cli.commands.train import demo, resume, train
from strop.cli.options import BOOLEAN, CHAT_COMMANDS, OTHER_OPTIONS, OTHER_PANEL, add_recipe_options
from strop.config.names import is_data_file, use_short_forms
from strop.display.tables import console, messages, print_json, with_command_name
from strop.errors import (
    FIX,
    DiskError,
    FolderError,
    InputError,
    Location,
    PeerFailed,
    Stopped,
    StropError,
    closest,
    in_terminal,
)

COMMANDS: Mapping[str, Callable[..., None]] = {
    "doctor": doctor, "plan": plan, "check": check, "train": train, "resume": resume, "eval": evaluate, "chat": chat,
    "adapters": adapters, "merge": merge, "serve": serve, "modules": modules, "runs": runs, "dash": dash,
    "import": import_, "export-script": export_script, "push": push, "schema": schema, "demo": demo, "sweep": sweep,
    "cache": cache,
}  # fmt: skip
GROUPS: Mapping[str, tuple[str, Mapping[str, Callable[..., None]]]] = {
    "export": ("Export a run to llama.cpp or Ollama, and measure the result.", {"gguf": gguf, "ollama": ollama}),
    "launch": (
        "Write the job file that trains a recipe on a cluster.",
        {"slurm": slurm, "ray": ray, "kubernetes": kubernetes, "skypilot": skypilot},
    ),
}
# panels of `strop --help`: each command with its line there
PANELS: Mapping[str, Mapping[str, str]] = {
    "Prepare": {
        "doctor": "Check this machine, and show how to fix each problem.",
        "demo": "Fine-tune a small real model on this CPU in minutes.",
        "plan": "Predict memory and time, without weights or a GPU.",
        "check": "Show which rows and tokens would be trained on.",
        "modules": "List the linear layers of a model.",
        "import": "Convert another tool's config to a recipe.",
        "schema": "Print the JSON schema of a recipe.",
    },
    "Train": {
        "train": "Fine-tune a model, and write a run folder.",
        "resume": "Resume a run from its newest checkpoint.",
        "sweep": "Compare settings, and find out whether one is better.",
        "launch": "Write the job file that trains a recipe on a cluster.",
    },
    "Inspect": {
        "eval": "Compare base and tuned model on held-out rows.",
        "chat": "Chat with a model in the terminal.",
        "runs": "List the runs in a folder, or delete one.",
        "dash": "Show runs in a browser.",
        "adapters": "List, show, compare or add adapters.",
        "cache": "Show what takes space in the cache, or delete it.",
    },
    "Deliver": {
        "merge": "Merge an adapter into its base.",
        "export": "Export a run to llama.cpp or Ollama.",
        "serve": "Serve models with an OpenAI-compatible API.",
        "push": "Upload to the Hugging Face Hub, private by default.",
        "export-script": "Write a run as a plain transformers and peft script.",
    },
}
# names of options in other tools -> option of the commands that are not about a recipe, or what to do
MEANT_OPTIONS: Mapping[str, str] = {
    "temp": "--temperature", "gpus": "--devices", "num-gpus": "--devices", "quantize": "--type", "quant": "--type",
    "resume-from-checkpoint": "strop resume RUN", "model": "the run or model without an option",
    "run": "the run without an option", "prompt": "the prompt through a pipe: echo PROMPT | strop chat RUN",
}  # fmt: skip
# other words for commands
MEANT: Mapping[str, str] = {
    **dict.fromkeys(("finetune", "fine-tune", "sft", "dpo", "grpo", "fit", "tune", "lora", "qlora"), "train"),
    **dict.fromkeys(("compare", "evaluate", "test", "benchmark", "score"), "eval"),
    **dict.fromkeys(("infer", "inference", "generate", "run", "ask", "complete", "predict"), "chat"),
    **dict.fromkeys(("convert", "quantize"), "export gguf"), **dict.fromkeys(("list", "ls", "ps"), "runs"),
    **dict.fromkeys(("ui", "web", "dashboard"), "dash"), **dict.fromkeys(("estimate", "memory"), "plan"),
    **dict.fromkeys(("validate", "data", "inspect"), "check"), **dict.fromkeys(("info", "env"), "doctor"),
    **dict.fromkeys(("search", "hpo", "tune-settings", "optuna"), "sweep"),
    **dict.fromkeys(("clean", "prune", "clear", "gc"), "cache"),
    "fuse": "merge", "report": "dash", "upload": "push", "api": "serve", "continue": "resume", "quickstart": "demo",
    **{name: f"{group} {name}" for group, (_, commands) in GROUPS.items() for name in commands},
}  # fmt: skip
# recipe fields of the commands that accept only some of them
RECIPE_FIELDS: Mapping[str, tuple[str, ...]] = {"eval": ("data.format", "data.columns", "data.encoding")}

EXAMPLE_ROW = '{"prompt": "taxi, 31 eur", "completion": "travel"}'
# shown in the help of each command
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "doctor": ("strop doctor", "strop doctor --fix"),
    "plan": ("strop plan --model demo --data rows.jsonl", 'strop plan --model Qwen/Qwen3-8B --gpu "RTX 4090"'),
    "check": ("strop check --data rows.jsonl --show 3", "strop check --data rows.jsonl --fix clean.jsonl"),
    "train": (
        "strop train --model demo --data rows.jsonl --out runs/mine",
        "strop train recipe.yaml --lr 1e-4 --print-recipe",
    ),
    "resume": ("strop resume runs/mine", "strop resume runs/mine --epochs 5 --allow-changed train.epochs"),
    "sweep": (
        "strop sweep --model demo --data rows.jsonl --over lora.r=8,16,32",
        "strop sweep --resume runs/sweep-1",
    ),
    "eval": (
        "strop eval runs/mine --data held_out.jsonl --metric exact_json",
        "strop eval runs/a runs/b --data held_out.jsonl --general",
    ),
    "chat": ("strop chat runs/mine", 'echo "Add milk to the list" | strop chat runs/mine --temperature 0'),
    "adapters": ("strop adapters runs/a runs/b", "strop adapters runs/a runs/b --weights 0.7,0.3 --out mixed"),
    "merge": ("strop merge runs/mine --out mine-merged", "strop merge runs/mine --out mine-merged --dtype fp16"),
    "serve": ("strop serve runs/mine", "strop serve runs/a runs/b --port 9000 --slots 8"),
    "modules": ("strop modules demo", "strop modules Qwen/Qwen3-8B"),
    "runs": ("strop runs", "strop runs --delete mine --yes"),
    "cache": ("strop cache", "strop cache --delete layers --unused 30 --yes"),
    "dash": ("strop dash", "strop dash other-folder --port 9001"),
    "import": ("strop import axolotl config.yml --out recipe.yaml", "strop import trl train.py --out recipe.yaml"),
    "export-script": (
        "strop export-script runs/mine --out mine-script",
        "strop export-script runs/mine --out mine-script --json",
    ),
    "push": ("strop push runs/mine me/mine", "strop push mine-merged me/mine-merged --public"),
    "schema": ("strop schema", "strop schema > recipe.schema.json"),
    "demo": ("strop demo", "strop demo --out runs/first"),
    "launch slurm": (
        "strop launch slurm recipe.yaml --nodes 2 --devices 8",
        "strop launch slurm recipe.yaml --devices 4 --time 12:00:00 --file train.sbatch",
    ),
    "launch ray": (
        "strop launch ray recipe.yaml --nodes 2 --devices 8",
        "strop launch ray recipe.yaml --devices 4 --out runs/mine --file train_ray.py",
    ),
    "launch kubernetes": (
        "strop launch kubernetes recipe.yaml --image me/strop:1 --claim data --nodes 2 --devices 8",
        "strop launch kubernetes recipe.yaml --image me/strop:1 --claim data --file job.yaml",
    ),
    "launch skypilot": (
        "strop launch skypilot recipe.yaml --gpus H100 --devices 8 --volume data --nodes 2",
        "strop launch skypilot recipe.yaml --gpus L4 --bucket my-runs --spot",
    ),
    "export gguf": (
        "strop export gguf runs/mine --out mine.gguf --type q8_0",
        "strop export gguf runs/mine --out mine-lora.gguf --adapter",
    ),
    "export ollama": (
        "strop export ollama runs/mine --out mine-ollama",
        "strop export ollama runs/mine --out mine-ollama --type q4_k_m",
    ),
}  # fmt: skip


def main() -> None:
    """Run a command. An error prints one message, and exits with the code of its class (see errors.py)."""
    signals: list[int] = []
    token = in_terminal.set(True)
    console.use_stderr("--json" in sys.argv)

    def interrupt(number: int, frame: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # tolerate characters that the locale cannot decode or write
            stream.reconfigure(errors=errors)
    for number in (signal.SIGINT, signal.SIGTERM):  # `stop_signals` replaces the handlers while training
        signal.signal(number, interrupt)
    atexit.register(_shorten_exit)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it warns if parts are missing
    logging.getLogger("huggingface_hub.utils._http").addFilter(_ShortRetries())
    try:
        arguments = sys.argv[1:]
        if arguments[:1] == ["help"]:
            sys.argv[1:] = arguments = [*arguments[1:], "--help"]
        elif arguments in (["version"], ["-V"]):
            sys.argv[1:] = arguments = ["--version"]
        command = COMMANDS.get(arguments[0]) if arguments and arguments[0] not in RECIPE_FIELDS else None
        if command is None or "options" not in inspect.signature(command).parameters:  # --help shows all options
            sys.argv[1:] = arguments = ["--help" if word == "--help-all" else word for word in arguments]
        for name in ("COMP_WORDS", "_TYPER_COMPLETE_ARGS"):  # shell completion passes the command line in these
            arguments += os.environ.get(name, "").split()
        code = build(arguments)(standalone_mode=False, prog_name="strop") or 0
        if signals and code == 130:  # typer caught the interrupt and printed nothing
            _exit_interrupted()
        sys.exit(code)
    except PeerFailed as error:
        sys.exit(error.exit_code)
    except StropError as error:
        _exit_with_error(error.lines(), error.as_json(), error.exit_code, error.partial_result)
    except KeyboardInterrupt:
        _exit_interrupted()
    except Exception as error:  # the last place where an error can become one message; STROP_DEBUG=1 raises it
        if signals:  # an interrupt during the import of an extension module becomes an ImportError
            _exit_interrupted()
        if hasattr(error, "format_message"):  # click's UsageError, from click or from the copy in typer
            usage = _explain_usage(error)
            _exit_with_error(usage.lines() if usage.what else [], {**usage.as_json(), "kind": "UsageError"}, 2)
        if os.environ.get("STROP_DEBUG"):
            raise
        if (system_error := _convert_os_error(error)) is not None:
            _exit_with_error(system_error.lines(), system_error.as_json(), system_error.exit_code)
        message = f"{type(error).__name__}: {error}"
        lines = [message, f"{FIX}this is a bug in strop: set STROP_DEBUG=1 to see the traceback, and please report it"]
        _exit_with_error(lines, {"kind": "InternalError", "message": message}, 1)
    finally:  # an interrupt during Python's exit would print a traceback
        in_terminal.reset(token)
        console.use_stderr(False)
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # its reader has ended, such as `head`; Python's exit would print a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):
            pass
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def build(arguments: Sequence[str]) -> typer.Typer:
    """Return the app. Only commands in `arguments` get options for recipe fields, which take 0.1 s to generate."""
    app = typer.Typer(
        cls=_App,
        help=(
            "\bFine-tune open language models with LoRA and QLoRA on your own computer.\n \n"
            f"Start with rows such as {EXAMPLE_ROW}:\n"
            "  strop check --model demo --data rows.jsonl\n"
            "  strop train --model demo --data rows.jsonl --out runs/mine\n"
            "  strop eval runs/mine --data held_out.jsonl\n"
            "  strop chat runs/mine\n \n"
            "`strop COMMAND --help` shows examples and common options, `--help-all` all.\n"
            "Other options: --version, --install-completion, --show-completion, --help."
        ),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_version_option)
    for panel, lines in PANELS.items():
        for name, line in lines.items():
            if name in GROUPS:
                text, commands = GROUPS[name]
                examples = [EXAMPLES[f"{name} {inner}"][0] for inner in commands]
                group = typer.Typer(cls=_Group, help=text, no_args_is_help=True, epilog=_format_examples(examples))
                for inner, command in commands.items():
                    group.command(inner, cls=_Command, epilog=_format_examples(EXAMPLES[f"{name} {inner}"]))(command)
                app.add_typer(group, name=name, short_help=line, rich_help_panel=panel)
                continue
            command = COMMANDS[name]
            if "options" in inspect.signature(command).parameters:
                command = add_recipe_options(
                    command, arguments if name in arguments else (), RECIPE_FIELDS.get(name, ())
                )
            epilog = _format_examples(EXAMPLES[name])
            if name in ("check", "train", "sweep") and name in arguments:
                epilog += _describe_rows(name, arguments)
            if name == "chat":
                epilog += "\n\n\b\nIn a chat:\n" + "\n".join(f"  {key:9} {does}" for key, does in CHAT_COMMANDS.items())
            app.command(name, cls=_Command, epilog=epilog, short_help=line, rich_help_panel=panel)(command)
    return app


def _format_examples(examples: Sequence[str]) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)


def _describe_rows(command: str, arguments: Sequence[str]) -> str:
    """Return what rows look like, for the end of a command's help."""
    rows = f"\n \nRows, one per line: {EXAMPLE_ROW}"
    if not {"--help", "-h", "--help-all"} & set(arguments):  # the tables import numpy
        return rows
    from strop.data.formats import FORMATS, example_row
    from strop.objectives.table import OBJECTIVES

    kinds = {"sft": "turns", **{name: objective.data_kind for name, objective in OBJECTIVES.items()}}
    if command == "check":
        rows += "\n \nFormats and their columns (other names: --data.columns; docs/formats.md):\n"
        rows += "\n".join(f"  {entry.name:18} {', '.join(entry.example)}" for entry in FORMATS.values())
    if "--help-all" in arguments:
        by_kind = {kind: ", ".join(name for name in kinds if kinds[name] == kind) for kind in kinds.values()}
        rows += "\n \nRows of each objective:\n"
        rows += "\n".join(f"  {names}:\n    {example_row(kind)}" for kind, names in by_kind.items())
    elif command != "check":
        rows += "\nOther formats: `strop check --help`; rows of other objectives: `--help-all`"
    return rows


class _TidyOptions:
    """Show no type for options without a value, and separate a recipe's options from those of output and help."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            parameter.metavar = "" if getattr(parameter, "is_flag", False) else parameter.metavar
        if any(parameter.name == "help_all" for parameter in parameters):
            for parameter in parameters:
                if parameter.name in OTHER_OPTIONS:
                    parameter.rich_help_panel = OTHER_PANEL
        return parameters


class _Command(_TidyOptions, typer.core.TyperCommand):
    def parse_args(self, context: Any, words: list[str]) -> list[str]:
        """Give a recipe's boolean the value true if it has none (`--train.exact --json`, `--train.exact r.yaml`)."""
        switches = {name for parameter in self.params if parameter.metavar == BOOLEAN for name in parameter.opts}
        completed = list[str]()
        for word, following in itertools.zip_longest(words, words[1:], fillvalue="-"):
            completed.append(word)
            if word in switches and (following.startswith("-") or os.path.exists(following)):
                completed.append("true")
        try:
            return super().parse_args(context, [*completed])  # click empties its list
        except Exception as error:  # click's NoSuchOption, from click or from the copy in typer
            if hasattr(error, "option_name") and hasattr(error, "possibilities"):
                error.unknown = self._find_unknown(completed) or [error.option_name]  # type: ignore[attr-defined]
            raise

    def _find_unknown(self, words: Sequence[str]) -> list[str]:
        """Return all options of a command line that the command does not have; click reports only the first one."""
        takes_value = {
            name: not (getattr(parameter, "is_flag", False) or getattr(parameter, "count", False))
            for parameter in self.params
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        unknown, remaining = dict[str, None](), iter(words)
        for word in remaining:
            name, separator, _ = word.partition("=")
            if word == "--":
                break
            if name.startswith("--") and name not in (*takes_value, "--help"):
                unknown[name] = None
            elif takes_value.get(name) and not separator:
                next(remaining, None)
        return [*unknown]


class _Group(_TidyOptions, typer.core.TyperGroup): ...


class _App(_Group):
    def get_params(self, ctx: Any) -> list[Any]:
        """Hide the options from the first screen, which names them in a sentence."""
        parameters = super().get_params(ctx)
        for parameter in parameters:
            parameter.hidden = True
        return parameters


class _ShortRetries(logging.Filter):
    """Leave one readable line of the ten that huggingface_hub logs while it tries again."""

    is_first = True

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "thrown while requesting" not in text:
            return not text.startswith("Retrying in")
        record.msg, record.args = "the Hub does not answer; trying again for up to half a minute", ()
        is_first, self.is_first = self.is_first, False
        return is_first


def _shorten_exit() -> None:
    """Skip the last garbage collection, which takes 1.8 s with torch loaded, and hide the output of nanobind."""
    gc.freeze()
    # nanobind (in triton from 3.9) reports objects that are alive at exit as leaks, in about 100 lines on stderr
    if "triton" in sys.modules and not os.environ.get("STROP_DEBUG"):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _show_version(requested: bool) -> None:
    if requested:
        print(f"strop {__version__}")
        raise typer.Exit


def _version_option(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def _convert_os_error(error: Exception) -> StropError | None:
    """Convert an OSError that the user can fix (permissions, full disk) to a StropError; return None for others."""
    from strop.runs.folder import overlaps_cache  # imports psutil, which `strop --help` does not need

    try:
        working_folder = Path.cwd()
    except OSError:
        return FolderError("the working folder no longer exists", fix="change to an existing folder")
    if not isinstance(error, OSError) or error.errno is None:
        return None
    is_full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    if error.filename is None:  # errors of writes have no file name
        what = f"a file cannot be written: {os.strerror(error.errno)}"
        return DiskError(what, fix="free some space") if is_full else None
    what = f"{error.filename}: {os.strerror(error.errno).lower()}"
    if is_full:
        return DiskError(what, fix="free some space")
    if overlaps_cache(working_folder / os.fsdecode(error.filename)):
        return FolderError(what, fix="set STROP_CACHE to a writable folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FolderError(what, fix="change its permissions, or use a copy of it")
    return None


def _explain_usage(error: Any) -> InputError:
    """Convert an error of typer to one that names the option, with a fix: mostly an example of the command."""
    message = error.format_message()
    words = sys.argv[1:]
    path = next((path for path in (" ".join(words[:2]), *words[:1]) if path in {*EXAMPLES, *GROUPS}), "")
    fix = f"for example: {EXAMPLES[path][0]}" if path in EXAMPLES else ""
    if unknown := getattr(error, "unknown", None):
        hints = {option: _suggest_option(option, path, error) for option in unknown}
        shows_all = all(hints.values()) and any(x.name == "help_all" for x in error.ctx.command.get_params(error.ctx))
        fix = f"see `strop {path} --help{'-all' if shows_all else ''}`".replace("  ", " ")
        if len(hints) == 1:
            return InputError(f"{unknown[0]}: no such option{hints[unknown[0]]}", fix=fix)
        where = [Location(option, None, f"no such option{hint}") for option, hint in hints.items()]
        return InputError(str(where[0]), fix=fix, where=where)
    if match := re.match(r"No such command '(.*?)'", message):
        return _explain_command(match[1], path)
    parameter = getattr(error, "param", None)
    if message.startswith("Got unexpected extra"):
        fix = _fix_extra_arguments(path, words) or fix
    if getattr(error, "option_name", None) and not path:
        fix = "see `strop --help`"
    if parameter is None:
        return InputError(f"{message[:1].lower()}{message[1:].rstrip('.')}" if words else message, fix=fix)
    name = next((option for option in parameter.opts if option.startswith("--")), parameter.metavar or parameter.name)
    if message.startswith("Missing"):
        if path == "import" and len(words) > 1 and Path(words[1]).is_file():
            name = "TOOL, the program of which the file is,"
        return InputError(f"{name} is required", fix=fix)
    from strop.config.load import explain_issue

    # pydantic's error in today's typer
    issues = error.__cause__.errors() if hasattr(error.__cause__, "errors") else []
    problem = f"{explain_issue(name, issues[0])} (got {issues[0]['input']!r})" if issues else error.message
    return InputError(f"{name}: {problem}", fix=fix)


def _fix_extra_arguments(command: str, words: Sequence[str]) -> str:
    """Return a fix for more arguments than a command has, or "" if their meaning is unknown."""
    if command == "chat":
        return f"give the prompt through a pipe: echo {shlex.quote(words[-1])} | strop chat {shlex.quote(words[1])}"
    for start, end in itertools.combinations(range(1, len(words) + 1), 2):
        if end - start > 1 and Path(path := " ".join(words[start:end])).exists():
            return f"quote the path: strop {shlex.join([*words[:start], path, *words[end:]])}"
    is_recipe_command = "options" in inspect.signature(COMMANDS.get(command, main)).parameters
    if is_recipe_command and (data := next(filter(is_data_file, words[2:]), None)):
        return f"give it with --data {shlex.quote(data)}"
    return ""


def _suggest_option(option: str, command: str, error: Any) -> str:
    """Return what an unknown option of a command probably means, in a form to append to an error, or ""."""
    from strop.config.load import explain_name

    has_fields = "options" in inspect.signature(COMMANDS.get(command, main)).parameters
    known = [name for parameter in error.ctx.command.get_params(error.ctx) for name in parameter.opts]
    meant = MEANT_OPTIONS.get(option.lstrip("-").replace("_", "-"))
    if meant and (not meant.startswith("--") or meant in known):
        return f" (did you mean {meant}?)"
    if has_fields and command not in RECIPE_FIELDS and (hint := explain_name(option.lstrip("-"), "--", " ")):
        return hint
    names = [name.lstrip("-") for name in known if name.startswith("--")]
    near = closest(option.lstrip("-"), names)
    if len(option) == 2:  # -o of other tools is --out here
        near = next((name for name in sorted(names, key=len) if name.startswith(option[1])), None)
    return f" (did you mean --{near}?)" if near else ""


def _explain_command(word: str, group: str) -> InputError:
    """Return the error for an unknown command. group: the group of commands that it follows, such as "export"."""
    if group:
        commands = GROUPS[group][1]
        target = f"{group} {closest(word, commands) or next(iter(commands))}"
        what = f"`{group}` needs one of its commands first: {', '.join(commands)} (got {word})"
        example = EXAMPLES[target][0].replace("runs/mine", shlex.quote(word), 1 if Path(word).exists() else 0)
        return InputError(what, fix=f"for example: {example}")
    command = MEANT.get(word.lower()) or closest(word, [*COMMANDS, *GROUPS])
    if command is None:
        return InputError(f"{word}: no such command", fix="see `strop --help`")
    example = EXAMPLES.get(command, (f"strop {command} --help",))[0]
    return InputError(f"{word}: no such command (did you mean {command}?)", fix=f"for example: {example}")


def _exit_interrupted() -> None:
    lines = ["stopped; files that were complete before are kept", f"{FIX}type the same command to start again"]
    _exit_with_error(lines, {"kind": "Stopped", "message": "interrupted"}, 130)


def _exit_with_error(
    lines: list[str], error: dict[str, Any], code: int, partial_result: Mapping[str, Any] | None = None
) -> None:
    if code == Stopped.exit_code and lines:  # what the user asked for is not an error
        lines = ["; ".join(line.removeprefix(FIX) for line in lines)]
    else:
        lines = [line if line.startswith(FIX) else f"error: {line}" for line in lines]
    for line in lines:
        text = use_short_forms(with_command_name(line))
        messages.print(text, markup=False, style="red" if code != Stopped.exit_code else "yellow")
    with contextlib.suppress(OSError):  # the error may be that stdout cannot be written
        print_json({**(partial_result or {}), "error": error, "exit": code}, "--json" in sys.argv)
    sys.exit(code)
