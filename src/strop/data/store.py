"""Tokenised rows on disk: written once in order, then read through memory maps. Plain arrays and JSON, no pickle.

A folder holds ids.bin (int32) and weights.bin (float32), one after the other; examples.bin and rows.bin (records);
rows.jsonl (what was said, a line a row); facts.json, written last: a folder without it is not complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from strop.data.types import Conversation, Example, Message

# one example: where its tokens end, its length, number of supervised tokens, its row
EXAMPLE = np.dtype([("end", "<i8"), ("length", "<i4"), ("supervised", "<i4"), ("row", "<i8")])
# one row: where its line ends in rows.jsonl, the hashes of its content and of its prompt, the hash that it is held out
# by, its file (index into facts["files"]) and line, whether its answer was judged good (1), bad (0) or not at all (-1),
# and whether it has one (1, 0)
ROW = np.dtype([
    ("end", "<i8"), ("digest", "<u8"), ("prompt", "<u8"), ("group", "<u8"), ("file", "<i4"), ("line", "<i8"),
    ("judged", "<i4"), ("answered", "<i4"),
])  # fmt: skip
_EXAMPLE, _ROW = struct.Struct("<qiiq"), struct.Struct("<qQQQiqii")  # the same, to write one record
_PARTS = {"ids.bin": np.dtype("<i4"), "weights.bin": np.dtype("<f4"), "examples.bin": EXAMPLE, "rows.bin": ROW}
LOCK, YOUNG_S = "lock", 60.0  # of a store that is being written; so young a lock may not be held yet

Indices = npt.NDArray[np.int64]


class Writer:
    """Writes a store into a temporary folder beside `folder`; `commit` gives it its name."""

    def __init__(self, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        self._folder = folder
        self._temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        self._lock = FileLock(self._temp / LOCK)  # the system's own: it ends with the process, however that ends
        self._lock.acquire()
        self._out = {name: (self._temp / name).open("wb", buffering=1 << 20) for name in (*_PARTS, "rows.jsonl")}
        self._sums = dict.fromkeys(self._out, 0)
        self._files: dict[str, int] = {}
        self._tokens = self._chars = self._rows = 0

    def add(self, conversation: Conversation, examples: Sequence[Example], prompt: int, group: int | None) -> int:
        """One row that is used, and its examples. prompt: its hash. group: the hash that the row is held out by (None:
        that of its content), which is returned."""
        text = dumps(conversation)
        file = self._files.setdefault(conversation.file, len(self._files))
        self._chars += len(text) + 1
        self._write("rows.jsonl", text + b"\n")
        judged = -1 if conversation.desirable is None else int(conversation.desirable)
        answered = int(conversation.answer is not None)
        own = digest(text)
        group = own if group is None else group
        record = _ROW.pack(self._chars, own, prompt, group, file, conversation.line, judged, answered)
        self._write("rows.bin", record)
        for example in examples:
            self._tokens += len(example)
            self._write("ids.bin", example.ids.astype("<i4", copy=False).tobytes())
            self._write("weights.bin", example.weights.astype("<f4", copy=False).tobytes())
            record = _EXAMPLE.pack(self._tokens, len(example), example.supervised, self._rows)
            self._write("examples.bin", record)
        self._rows += 1
        return group

    def _write(self, name: str, data: bytes) -> None:
        self._sums[name] = zlib.crc32(data, self._sums[name])
        self._out[name].write(data)

    def commit(self, facts: dict[str, Any]) -> Store:
        for out in self._out.values():
            out.close()
        sizes = {name: (self._temp / name).stat().st_size for name in self._out}
        facts = {**facts, "files": list(self._files), "sizes": sizes, "sums": self._sums}
        (self._temp / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        self._unlock()
        try:
            self._temp.rename(self._folder)
        except OSError:  # another run wrote the same rows first, or an old folder there is damaged
            if load(self._folder) is None:
                shutil.rmtree(self._folder)
                self._temp.rename(self._folder)
            else:
                shutil.rmtree(self._temp)
        store = load(self._folder)
        assert store is not None, "a store just written is not complete"
        return store

    def discard(self) -> None:
        """Remove what was not committed."""
        for out in self._out.values():
            out.close()
        self._unlock()
        shutil.rmtree(self._temp, ignore_errors=True)

    def _unlock(self) -> None:
        self._lock.release()
        (self._temp / LOCK).unlink(missing_ok=True)


class Store:
    """A store that is complete. facts: what Writer.commit was given, and `files`."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.facts = facts
        ids, weights, examples, rows = (_map(folder / name, kind) for name, kind in _PARTS.items())
        self._ids, self._weights, self.example_records, self.row_records = ids, weights, examples, rows
        self._text = _map(folder / "rows.jsonl", np.dtype(np.uint8))

    def example(self, i: int) -> Example:
        record = self.example_records[i]
        end, row = int(record["end"]), self.row_records[record["row"]]
        span = slice(end - int(record["length"]), end)
        # copies: a memory map cannot be written to, and torch warns of that
        ids, weights = np.array(self._ids[span]), np.array(self._weights[span])
        return Example(ids, weights, self.facts["files"][row["file"]], int(row["line"]))

    def conversation(self, i: int) -> Conversation:
        row = self.row_records[i]
        begin = int(self.row_records[i - 1]["end"]) if i else 0
        text = self._text[begin : int(row["end"])].tobytes()
        return loads(text, self.facts["files"][row["file"]], int(row["line"]))


class Examples(Sequence[Example]):
    """Examples of a store, read when asked for. lengths, supervised: int64 of shape (n,), in tokens. judged (n,): 1 for
    an answer that was judged good, 0 for a bad one, -1 where nobody judged."""

    def __init__(self, store: Store, indices: Indices) -> None:
        self._store = store
        self._indices = indices
        records = store.example_records[indices]
        self.lengths: Indices = records["length"].astype(np.int64)
        self.supervised: Indices = records["supervised"].astype(np.int64)
        self.judged: Indices = store.row_records["judged"][records["row"]].astype(np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self._store.example(int(k)) for k in self._indices[i]]
        return self._store.example(int(self._indices[i]))


class Conversations(Sequence[Conversation]):
    """Rows of a store as conversations, read when asked for. digests: uint64 of shape (n,), of their content."""

    def __init__(self, store: Store, indices: Indices) -> None:
        self._store = store
        self._indices = indices
        self.digests: npt.NDArray[np.uint64] = store.row_records["digest"][indices]

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, i: int) -> Conversation: ...
    @overload
    def __getitem__(self, i: slice) -> list[Conversation]: ...
    def __getitem__(self, i: int | slice) -> Conversation | list[Conversation]:
        if isinstance(i, slice):
            return [self._store.conversation(int(k)) for k in self._indices[i]]
        return self._store.conversation(int(self._indices[i]))

    def __iter__(self) -> Iterator[Conversation]:
        return (self._store.conversation(int(k)) for k in self._indices)


def load(folder: Path) -> Store | None:
    """The store in `folder`; None where there is none that is complete, byte for byte as it was written."""
    try:
        facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in facts["sizes"].items())
        whole = whole and all(_sum(folder / name) == sum for name, sum in facts["sums"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Store(folder, facts) if whole else None


def _sweep(folder: Path) -> None:
    """Removes stores that were never finished, as their processes were killed."""
    for lock in folder.glob(f".*-*/{LOCK}"):
        with suppress(OSError):  # Timeout is one: its process is alive
            if time.time() - lock.stat().st_mtime > YOUNG_S:
                with FileLock(lock, timeout=0):
                    shutil.rmtree(lock.parent, ignore_errors=True)


def _sum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def _map(path: Path, kind: np.dtype[Any]) -> npt.NDArray[Any]:
    if os.path.getsize(path) == 0:  # which cannot be mapped
        return np.zeros(0, kind)
    return np.memmap(path, dtype=kind, mode="r")


def dumps(conversation: Conversation) -> bytes:
    """What is said, as JSON that differs exactly where the content differs (place in the file left out)."""
    value: dict[str, Any] = {"text": conversation.text} if conversation.text is not None else {}
    value["messages"] = [message_json(message) for message in conversation.messages]
    if conversation.tools:
        value["tools"] = conversation.tools
    if conversation.rejected:
        value["rejected"] = [message_json(message) for message in conversation.rejected]
    if conversation.desirable is not None:
        value["desirable"] = conversation.desirable
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def message_json(message: Message) -> dict[str, Any]:
    """A message as the `messages` format has it."""
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        value["reasoning_content"] = message.reasoning
    if message.tool_calls:
        value["tool_calls"] = message.tool_calls
    if message.name is not None:
        value["name"] = message.name
    if message.call_id is not None:
        value["tool_call_id"] = message.call_id
    if message.weight != 1.0:
        value["weight"] = message.weight
    return value


def loads(text: bytes, file: str, line: int) -> Conversation:
    value = json.loads(text)
    messages, rejected = _messages(value["messages"]), _messages(value.get("rejected", ()))
    tools, judged = tuple(value.get("tools", ())), value.get("desirable")
    return Conversation(file, line, messages, tools, value.get("text"), rejected, judged)


def _messages(turns: Sequence[dict[str, Any]]) -> tuple[Message, ...]:
    return tuple(
        Message(
            turn["role"],
            turn["content"],
            turn.get("reasoning_content"),
            tuple(turn.get("tool_calls", ())),
            turn.get("name"),
            turn.get("weight", 1.0),
            turn.get("tool_call_id"),
        )
        for turn in turns
    )


def digest(text: bytes) -> int:
    """64 bits of the content."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
