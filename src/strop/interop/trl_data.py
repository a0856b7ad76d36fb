"""Import the data sets that a TRL or Unsloth script loads."""

from __future__ import annotations

import ast
from typing import Any

from strop.interop.draft import Draft, format_value, join_files
from strop.interop.script_parser import UNREADABLE, Call, Script, report_expression

DATASET_TRANSFORMS = (
    "map", "filter", "select", "shuffle", "remove_columns", "rename_column", "train_test_split", "concatenate_datasets",
    "standardize_sharegpt", "standardize_data_formats", "to_sharegpt", "cast_column", "set_transform",
    "with_transform",
)  # fmt: skip
_SPLIT = "train_test_split"
SAVE_ROWS_FIX = "save the rows with dataset.to_json and pass that file with --data"
# arguments of load_dataset that are read here, and those that do not choose rows
LOADING_KEYS = {
    "path", "name", "data_files", "split", "revision", "streaming", "cache_dir", "token", "trust_remote_code",
    "num_proc", "verification_mode", "download_mode", "keep_in_memory",
}  # fmt: skip
LOADERS = ("load_dataset", "from_json", "from_csv", "from_parquet")


def read_rows(draft: Draft, script: Script, trainer_arguments: dict[str, ast.expr]) -> None:
    """Import the data sets that the script loads."""
    loads = [call for call in script.calls if call.name in LOADERS]
    arguments = {key: trainer_arguments[key] for key in ("train_dataset", "eval_dataset") if key in trainer_arguments}
    sources = {key: script.find_sources([argument], loads) for key, argument in arguments.items()}
    eval_loads = sources.get("eval_dataset", [])
    for call in (call for call in eval_loads if "data_files" in call.keywords):
        files, key = script.value(call.keywords["data_files"]), script.find_key(arguments["eval_dataset"])
        if isinstance(files, dict) and str(key) in files and call.arguments:
            paths = join_files(script.value(call.arguments[0]), files[str(key)])
            draft.put_sources("data.eval", paths, f"load_dataset, line {call.line}, {key}")
    # of calls that are assigned to one name, the last
    train_loads = list({call.assigned_to or call.line: call for call in sources.get("train_dataset", [])}.values())
    for call in (*train_loads, *(call for call in loads if call not in train_loads)):
        source = _read_source(draft, script, call)
        if source and call in eval_loads and call not in train_loads and len(loads) > 1:
            draft.put("data.eval", source, f"load_dataset, line {call.line}")
        elif source and draft.get("data.train") is None:
            draft.put("data.train", source, f"load_dataset, line {call.line}")
        elif source:
            draft.add_unsupported("load_dataset", f"{format_value(source)}: another data set", call.line)
    for key, argument in arguments.items():
        _report_row_changes(draft, script, key, argument, loads)
    _read_splits(draft, script, **arguments)
    for call in script.calls:
        if call.name == "get_chat_template":
            draft.add_difference(call.name, "strop uses the model's chat template, or data.template")
        if call.name == "shuffle":
            draft.add_ignored(call.name, "strop shuffles rows with the seed", call.line)
        elif call.name in ("set_seed", "manual_seed", "seed_everything") and call.arguments:
            draft.note_seed(call.name, script.value(call.arguments[0]))
        elif call.name in DATASET_TRANSFORMS and call.name != _SPLIT:
            draft.add_unsupported(call.name, f"rows are changed by code: {SAVE_ROWS_FIX}", call.line)


def _report_row_changes(draft: Draft, script: Script, key: str, argument: ast.expr, loads: list[Call]) -> None:
    """Report what the script does to the rows between loading them and the trainer's argument, if it is not known."""
    for part in script.trace(argument, loads):
        is_known = isinstance(part, ast.Constant | ast.List | ast.Tuple | ast.IfExp)
        if isinstance(part, ast.Call):
            is_known = ast.unparse(part.func).rpartition(".")[2] in (*DATASET_TRANSFORMS, *LOADERS)
        elif isinstance(part, ast.Subscript):
            is_known = isinstance(part.slice, ast.Constant | ast.Name)
        elif isinstance(part, ast.Name):
            is_known = bool(script.assigned_values(part.id))
        if not is_known:
            report_expression(draft, key, part, f"rows are changed or made by code: {SAVE_ROWS_FIX}")
            return


def _read_splits(
    draft: Draft, script: Script, train_dataset: ast.expr | None = None, eval_dataset: ast.expr | None = None
) -> None:
    """Import the share of a `train_test_split` if its parts are the trainer's rows; report other rows."""
    nodes = [node for node in (train_dataset, eval_dataset) if node is not None and script.value(node) is not None]
    calls = [call for call in script.calls if call.name == _SPLIT]
    splits = [[call for call in calls if script.find_sources([node], [call])] for node in nodes]
    if (
        [script.find_key(node) for node in nodes] == ["train", "test"]
        and splits[0] == splits[1]
        and len(splits[0]) == 1
    ):
        call = splits[0][0]
        sizes = {**dict(zip(("test_size", "train_size"), call.arguments, strict=False)), **call.keywords}
        test, kept = (script.value(sizes[key]) if key in sizes else None for key in ("test_size", "train_size"))
        test = 1 - kept if test is None and isinstance(kept, float) else 0.25 if test is None and kept is None else test
        if not isinstance(test, float):
            draft.add_unsupported(_SPLIT, "not a share; set data.eval to a file or a share such as 5%", call.line)
            return
        draft.put_eval_share(_SPLIT, test)
        if kept is None or (isinstance(kept, float) and kept + test > 0.999):
            return
    elif draft.get("data.eval") is None and eval_dataset in nodes:
        report_expression(draft, "eval_dataset", nodes[-1], "set data.eval")
    for call in splits[0] if train_dataset in nodes else []:
        draft.add_unsupported("train_dataset", f"a part; strop trains on all rows: {SAVE_ROWS_FIX}", call.line)


def _read_source(draft: Draft, script: Script, call: Call) -> Any:
    """Return the file, the files or the Hub id that a call loads."""
    path = script.value(call.arguments[0]) if call.arguments else script.value(call.keywords.get("path", ast.Name("")))
    files = script.value(call.keywords["data_files"]) if "data_files" in call.keywords else None
    if call.name != "load_dataset":
        return path if path is not UNREADABLE else None
    if path is UNREADABLE or files is UNREADABLE:
        draft.add_unsupported("load_dataset", "not a literal value: pass --data", call.line)
        return None
    for key in call.keywords.keys() - LOADING_KEYS:
        draft.add_unsupported(
            f"load_dataset.{key}", "it may choose other rows: pass --data with their files", call.line
        )
    if "data_dir" in call.keywords:
        return None
    split = script.value(call.keywords["split"]) if "split" in call.keywords else "train"
    if not isinstance(split, str) or not split.startswith(("train", "test", "valid")) or "[" in split:
        text = "not literal" if split is UNREADABLE else format_value(split)
        draft.add_unsupported("load_dataset.split", f"{text}: all rows are used", call.line)
    elif split != "train" and files is None:
        draft.add_difference("load_dataset.split", f"{split}: give the file of the split: {path}/...")
    if len(call.arguments) > 1 or "name" in call.keywords:
        draft.add_unsupported("load_dataset.name", f"give the path of the configuration: {path}/...", call.line)
    revision = script.value(call.keywords["revision"]) if "revision" in call.keywords else None
    if files is None:
        return f"{path}@{revision}" if isinstance(revision, str) else path
    if isinstance(files, dict):
        files = files.get(str(split), next(iter(files.values())))
    paths = join_files(path, files)
    return paths[0] if len(paths) == 1 else paths
