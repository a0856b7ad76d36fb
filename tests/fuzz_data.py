"""Read random and mutated data files: only a DataError may be raised, without a hang.

python tests/fuzz_data.py --files 20000 [--seed N]
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow
import zstandard
from pyarrow import parquet

from strop.data.formats import FORMATS, ConversationReader
from strop.data.reading.sources import read_rows
from strop.data.row_errors import READING_REASONS, RowError
from strop.errors import DataError

LIMIT_S = 20
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
SPICE = (
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\n",
    b"\r",
    b"\t",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xe9",
    b"NaN",
)
SPICE += (
    b"\\ud800",
    b"null",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b'{"data":',
    b'"messages":',
    b'"role":"usr"',
    b"true",
    b":",
)


def _rows(chance: random.Random) -> list[dict[str, object]]:
    names = list(FORMATS)
    first = chance.choice(names)
    count = chance.randint(0, 6)
    return [FORMATS[first if chance.random() < 0.95 else chance.choice(names)].example for _ in range(count)]


def _content(chance: random.Random, suffix: str) -> bytes:
    if chance.random() < 0.05:
        return chance.randbytes(chance.randint(0, 300))
    rows = _rows(chance)
    if suffix in (".csv", ".tsv"):
        out = io.StringIO()
        writer = csv.writer(out, delimiter="," if suffix == ".csv" else "\t")
        writer.writerow(chance.choice([["prompt", "completion"], ["text"], ["a", "b"], ["question", "answer", "id"]]))
        writer.writerows([json.dumps(value) for value in row.values()] for row in rows)
        return out.getvalue().encode()
    if suffix == ".parquet":
        sink = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist([row for row in rows if row.keys() == rows[0].keys()]), sink)
        return sink.getvalue()
    if suffix == ".json":
        value = chance.choice([rows, {"data": rows}, {"a": rows, "b": rows}, rows[0] if rows else 0])
        return json.dumps(value, indent=chance.choice([None, 1])).encode()
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return lines.encode(chance.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]))


def _mutated(chance: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice([0, 0, 1, 1, 2, 5, 20])):
        at = chance.randint(0, len(data))
        match chance.randrange(4):
            case 0:
                data[at:at] = chance.choice(SPICE)
            case 1:
                del data[at : at + chance.randint(1, 8)]
            case 2:
                data[at : at + 1] = chance.randbytes(1)
            case _:
                data[at:at] = data[chance.randint(0, len(data)) :][: chance.randint(1, 60)]
    return bytes(data[: chance.randint(0, len(data))] if chance.random() < 0.1 else data)


def try_file(chance: random.Random, folder: Path) -> str:
    """Write one file, read it, and return the result: read, faults or refused. Other errors are raised."""
    suffix = chance.choice(SUFFIXES)
    content = _mutated(chance, _content(chance, suffix))
    if suffix != ".parquet" and chance.random() < 0.2:
        pack, more = chance.choice([(gzip.compress, ".gz"), (zstandard.compress, ".zst")])
        content, suffix = pack(content), suffix + more
        content = _mutated(chance, content) if chance.random() < 0.5 else content
    path = folder / f"fuzz{suffix}"
    path.write_bytes(content)
    columns = chance.choice([*[None] * 8, {"prompt": "1", "completion": "2"}, {"prompt": "a", "completion": "b"}])
    options = {"encoding": chance.choice([*["utf-8"] * 8, "latin-1", "utf-16-le"]), "columns": columns}
    spec = str(path) + chance.choice(["", "", "@0.5", "@2"])
    bad: list[RowError] = []
    try:
        reader = ConversationReader(
            read_rows(spec, errors=bad, **options),
            format=chance.choice([*["auto"] * 30, *FORMATS]),
            columns=columns,
            errors=bad,
        )
        for conversation in reader:
            assert conversation.line >= 1
            assert conversation.messages or conversation.text
            json.dumps([message.content for message in conversation.messages], ensure_ascii=False).encode()
    except DataError as error:
        assert error.lines()
        return "refused"
    assert reader.num_rows - reader.num_used + sum(fault.code in READING_REASONS for fault in bad) >= len(bad)
    return "faults" if bad else "read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcomes: Counter[str] = Counter()
    started_s, longest_s = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for place in range(args.files):
            before_s = time.monotonic()
            if hasattr(signal, "alarm"):
                signal.alarm(LIMIT_S)  # a hang kills the process
            try:
                outcomes[try_file(random.Random(f"{args.seed}-{place}"), Path(folder))] += 1
            except BaseException:
                print(f"file {place} of seed {args.seed}:", next(Path(folder).glob("fuzz*")).read_bytes()[:2000])
                raise
            longest_s = max(longest_s, time.monotonic() - before_s)
            for file in Path(folder).glob("fuzz*"):
                file.unlink()
    print(f"{args.files} files in {time.monotonic() - started_s:.0f} s, longest {longest_s:.2f} s: {dict(outcomes)}")


if __name__ == "__main__":
    main()
