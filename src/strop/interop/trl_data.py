"""The rows of a training script: which files or data set it loads, and where its code changes them."""

from __future__ import annotations

import ast
from typing import Any

from strop.interop.draft import Draft, shown
from strop.interop.script_parser import UNREAD, Call, Script, text_of

_FILES = ("json", "csv", "parquet", "text")
CHANGES = (
    "map",
    "filter",
    "select",
    "shuffle",
    "remove_columns",
    "rename_column",
    "train_test_split",
    "concatenate_datasets",
    "standardize_sharegpt",
    "standardize_data_formats",
    "to_sharegpt",
    "cast_column",
)
WRITE_ROWS = "save the rows once with dataset.to_json and give that file with --data"


def read_rows(draft: Draft, script: Script, keywords: dict[str, ast.expr]) -> None:
    loads = [call for call in script.calls if call.name in ("load_dataset", "from_json", "from_csv", "from_parquet")]
    held_out = script.root(keywords["eval_dataset"]) if "eval_dataset" in keywords else ""
    share = [call for call in script.calls if call.name == "train_test_split"]
    by_name = {call.into: call for call in loads if call.into}
    if "eval_dataset" in keywords and (part := _part_of(script, by_name, keywords["eval_dataset"])):
        draft.put("data.eval", *part)
    trained, asked = (_loads_of(script, loads, keywords.get(key)) for key in ("train_dataset", "eval_dataset"))
    for call in sorted(loads, key=lambda call: call not in trained):
        source = _source(draft, script, call)
        if source and call in asked and call not in trained and len(loads) > 1:
            draft.put("data.eval", source, f"load_dataset, line {call.line}")
        elif source and draft.get("data.train") is None:
            draft.put("data.train", source, f"load_dataset, line {call.line}")
        elif source:
            draft.lack("load_dataset", f"{shown(source)}: a further data set", call.line)
    if held_out and share and draft.get("data.eval") is None:
        given = share[0].keywords.get("test_size", next(iter(share[0].arguments), None))
        size = 0.25 if given is None else script.value(given)
        if isinstance(size, float) and 0 < size < 1:
            draft.put("data.eval", f"{100 * size:g}%", "train_test_split")
            draft.differ("train_test_split", "which rows are held out is decided by their content here, not by a seed")
        else:
            draft.lack("train_test_split", "a number of rows; give data.eval a file or a share", share[0].line)
    elif held_out and draft.get("data.eval") is None:
        draft.lack(
            "eval_dataset", f"{text_of(keywords['eval_dataset'])}: give data.eval", keywords["eval_dataset"].lineno
        )
    for call in script.calls:
        if call.name == "get_chat_template":
            draft.differ(call.name, "a name of unsloth's own; strop takes the model's chat template (or data.template)")
        if call.name == "shuffle":
            draft.skip(call.name, "rows are shuffled by the seed anyhow", call.line)
        elif call.name in CHANGES and call.name != "train_test_split":
            draft.lack(call.name, f"rows are changed by code, which is not run: {WRITE_ROWS}", call.line)


def _part_of(script: Script, by_name: dict[str, Call], node: ast.expr) -> tuple[Any, str] | None:
    """The files of `data["test"]`, where the script loads a map of files by split into `data`; and who says so."""
    if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in by_name):
        return None
    call = by_name[node.value.id]
    files, split = script.value(call.keywords.get("data_files", node)), script.value(node.slice)
    if not isinstance(files, dict) or split not in files or script.value(call.arguments[0]) not in _FILES:
        return None
    return files[split], f"load_dataset, line {call.line}, {split}"


def _loads_of(script: Script, loads: list[Call], node: ast.expr | None) -> list[Call]:
    """The calls that load what the trainer is given here: within the expression, or what its name was made from."""
    names = [call.into for call in loads if call.into]
    for _ in range(8):
        inside = [getattr(part, "args", None) for part in ast.walk(node)] if node is not None else []
        found = [call for call in loads if any(call.arguments is given for given in inside)]
        name = ast.Name(script.root(node) if node is not None else "")
        if found or name.id in names:
            return found or [call for call in loads if call.into == name.id]
        node = script.stands_for(name)
    return []


def _source(draft: Draft, script: Script, call: Call) -> Any:
    path = script.value(call.arguments[0]) if call.arguments else script.value(call.keywords.get("path", ast.Name("")))
    files = script.value(call.keywords["data_files"]) if "data_files" in call.keywords else None
    if call.name != "load_dataset":
        return path if path is not UNREAD else None
    if path is UNREAD or files is UNREAD:
        draft.lack("load_dataset", "of a value that is not literal: give --data", call.line)
        return None
    split = script.value(call.keywords["split"]) if "split" in call.keywords else "train"
    if (
        split is UNREAD
        or not (isinstance(split, str) and split.startswith(("train", "test", "valid")))
        or "[" in str(split)
    ):
        draft.lack(
            "load_dataset.split",
            f"{shown(split) if split is not UNREAD else 'not literal'}: all rows are taken",
            call.line,
        )
    elif split != "train" and files is None:
        draft.differ("load_dataset.split", f"{split}: name the split's file within the data set: {path}/...")
    if len(call.arguments) > 1 or "name" in call.keywords:
        draft.lack("load_dataset.name", f"a part of the data set: give its path within it: {path}/...", call.line)
    if files is None:
        return path
    if isinstance(files, dict):
        files = files.get(str(split), next(iter(files.values())))
    listed = [files] if isinstance(files, str) else list(files)
    found = [str(file) if path in _FILES else f"{path}/{file}" for file in listed]
    return found[0] if len(found) == 1 else found
