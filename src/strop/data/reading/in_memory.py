"""Write rows in memory (a DataFrame, a Dataset, a list of dicts) to a JSON Lines file, which is read as any other."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from strop.config.names import is_data_file
from strop.data.images import encode_png, is_pil_image, keep_bytes
from strop.data.reading.tables import without_nulls
from strop.data.row_errors import InvalidRow
from strop.errors import DataError, first_line
from strop.runs.folder import cache_folder


def find_rows(value: Any) -> Iterable[Any] | None:
    """Return the rows of a table or a list of dicts, or None for other values.

    Missing cells of a DataFrame (NaN, NaT) are null. Raises DataError for columns with equal names.
    """
    if isinstance(value, list | tuple):
        return value if any(isinstance(row, Mapping) for row in value) else None
    if hasattr(value, "iterrows"):  # pandas.DataFrame
        if not value.columns.is_unique:
            raise DataError("two columns of the DataFrame have the same name", fix="rename one")
        records = value.astype(object).where(value.notna(), None).to_dict("records")
    elif hasattr(value, "with_format") and hasattr(value, "features"):  # datasets.Dataset and IterableDataset
        records = _without_decoding(value.with_format(None))
    elif hasattr(value, "to_pylist") or hasattr(value, "to_dicts"):  # pyarrow.Table, polars.DataFrame
        records = value.to_pylist() if hasattr(value, "to_pylist") else value.to_dicts()
    else:
        return None
    return ({key: without_nulls(cell) for key, cell in row.items()} for row in records)


def refuse_other_rows(name: str, values: Sequence[Any]) -> None:
    """Raise DataError for a list of rows that are not dicts: conversations, tuples or texts. name: of the argument."""
    for number, value in enumerate(values, 1):
        if isinstance(value, str) and not _may_be_file(value):
            what = f"{name}: {value[:40]!r} is not a file, and a row is a dict, not a str"
            fix = 'give rows such as [{"prompt": "hi", "completion": "yo"}], or texts as [{"text": "..."}]'
            raise DataError(what, fix=fix)
        if not isinstance(value, list | tuple) or not value:
            continue
        what = f"{name}: row {number} is a {type(value).__name__}, not a dict"
        if all(isinstance(part, Mapping) and {"role", "from"} & part.keys() for part in value):
            raise DataError(what, fix='give conversations as [{"messages": messages} for messages in rows]')
        if all(isinstance(part, str | int | float) for part in value):
            pairs = len(value) == 2
            fix = (
                '[{"prompt": a, "completion": b} for a, b in rows]'
                if pairs
                else '[{"prompt": "hi", "completion": "yo"}]'
            )
            raise DataError(what, fix=f"give rows such as {fix}")


def _may_be_file(text: str) -> bool:
    """Return whether a text can name files or a data set, and is not a row."""
    name = text.rpartition("@")[0] or text  # FILE@2
    return is_data_file(name) or any(sign in name for sign in "/\\*?[") or any(map(os.path.exists, name.split("+")))


def _without_decoding(dataset: Any) -> Any:
    """Return a Dataset or IterableDataset whose images are bytes and paths, as in its files, instead of PIL images."""
    if hasattr(dataset, "decode"):  # IterableDataset
        return dataset.decode(False)
    pending: list[Any] = [dataset.features]  # a copy, which with_format made
    while pending:
        feature = pending.pop()
        if hasattr(feature, "decode"):
            feature.decode = False
        inner = feature.values() if isinstance(feature, Mapping) else feature if isinstance(feature, list) else ()
        pending += [*inner, *([feature.feature] if hasattr(feature, "feature") else [])]
    return dataset


def write_rows(name: str, rows: Iterable[Any]) -> str:
    """Write rows to the cache, in a file named after their content, and return its path.

    Dates become ISO 8601 text, arrays lists. Raises DataError for a value that JSON cannot represent; NaN is refused
    when the file is read.
    """
    folder, digest = cache_folder() / "rows", hashlib.sha256()
    folder.mkdir(parents=True, exist_ok=True)
    handle, temp = tempfile.mkstemp(prefix=".", dir=folder)
    try:
        with open(handle, "wb") as file:
            for number, row in enumerate(rows, 1):
                try:
                    line = json.dumps(row, default=to_json).encode() + b"\n"
                except (TypeError, ValueError, RecursionError) as error:
                    what = f"{name}: row {number}: {first_line(error)}"
                    fix = "convert it to text, a number, a list or a dict"
                    fix = "correct or remove the image" if isinstance(error, InvalidRow) else fix
                    raise DataError(what, fix=fix) from None
                digest.update(line)
                file.write(line)
        path = folder / f"rows-{digest.hexdigest()[:12]}.jsonl"
        os.replace(temp, path)
    finally:
        Path(temp).unlink(missing_ok=True)
    return str(path)


def describe_file(path: str) -> str | None:
    """Return how to show a file of `write_rows` to the user, or None for another file."""
    folder, name = os.path.split(path)
    match = re.fullmatch(r"rows-([0-9a-f]{12})\.jsonl", name)
    return f"rows in memory ({match[1][:6]})" if match and Path(folder) == cache_folder() / "rows" else None


def find_described(text: str) -> str | None:
    """Return the file that `describe_file` has described so, or None if there is none."""
    match = re.fullmatch(r"rows in memory \(([0-9a-f]{6})\)", text)
    files = sorted((cache_folder() / "rows").glob(f"rows-{match[1]}*.jsonl")) if match else []
    return str(files[0]) if len(files) == 1 else None


def to_json(value: Any) -> Any:
    """Convert dates to text, arrays and scalars of NumPy and torch to lists and numbers, and images to files.

    A file is an object, so that bytes are not used as text.
    """
    if isinstance(value, bytes | bytearray | memoryview) or is_pil_image(value):
        return {"path": str(keep_bytes(encode_png(value) if is_pil_image(value) else bytes(value)))}
    if isinstance(value, os.PathLike):
        return {"path": os.fspath(value)}
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return without_nulls(value.tolist())
    raise TypeError(f"a {type(value).__name__} has no form in JSON")
