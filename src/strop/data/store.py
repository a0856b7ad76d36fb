"""Tokenized rows on disk, written once in order and then read through memory maps.

A store is a folder without pickle files: `ids.bin` (int32) and `weights.bin` (float32) hold the concatenated examples,
`examples.bin` and `rows.bin` an array of records each, and `rows.jsonl` one conversation per line. `facts.json` is
written last; a folder without it is incomplete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from strop.data.images import FIRST_IMAGE_ID, ImageTable, to_data_url
from strop.data.types import (
    Classes,
    Conversation,
    DataKind,
    Example,
    ExampleGroup,
    Image,
    Indices,
    Item,
    Label,
    LabelledText,
    Mask,
    Message,
    Prompt,
    Triplet,
    content_parts,
    label_names,
)

if TYPE_CHECKING:
    from strop.data.rendering.render import Renderer

# A record of examples.bin: the end of the example's tokens in ids.bin, its length, its number of supervised tokens, and
# the index of its row.
EXAMPLE = np.dtype([("end", "<i8"), ("length", "<i4"), ("supervised", "<i4"), ("row", "<i8")])
# A record of rows.bin: the end of the row's line in rows.jsonl; hashes of its content and its prompt; `group` (rows of
# one group are held out together); file (index into facts["files"]) and line; label (1 good, 0 bad, -1 none; of a text
# to classify the index into facts["labels"]); whether it has an answer (1, 0).
ROW = np.dtype([
    ("end", "<i8"), ("digest", "<u8"), ("prompt", "<u8"), ("group", "<u8"), ("file", "<i4"), ("line", "<i8"),
    ("label", "<i4"), ("has_answer", "<i4"),
])  # fmt: skip
_DTYPES = {"ids.bin": np.dtype("<i4"), "weights.bin": np.dtype("<f4"), "examples.bin": EXAMPLE, "rows.bin": ROW}
LOCK = "lock"  # file lock in the folder of a store that is being written
LOCK_GRACE_S = 60.0  # a more recent lock file may not have been acquired yet
MAX_KL_CANDIDATES = 1000  # KTO: maximum number of answers to other prompts of which one has to fit

T = TypeVar("T", covariant=True)


class Writer:
    """Write a store into a temporary folder next to `folder`; `commit` renames it to `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        self._folder = folder
        self._temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        self._lock = FileLock(self._temp / LOCK)  # released by the operating system even when the process is killed
        self._lock.acquire()
        self._out = {name: (self._temp / name).open("wb", buffering=1 << 20) for name in (*_DTYPES, "rows.jsonl")}
        self._checksums = dict.fromkeys(self._out, 0)
        self._files: dict[str, int] = {}
        self._labels: dict[Label, int] = {}
        self._num_tokens = self._num_bytes = self._num_rows = 0

    def add(self, conversation: Conversation, examples: Sequence[Example], prompt: int, group: int | None) -> int:
        """Append a row and return its group.

        prompt: hash of the prompt. group: rows of a group are held out together; default: the hash of the content.
        """
        text = dump_conversation(conversation, whole=True)
        file = self._files.setdefault(conversation.file, len(self._files))
        self._num_bytes += len(text) + 1
        self._write("rows.jsonl", text + b"\n")
        label = -1 if conversation.desirable is None else int(conversation.desirable)
        if conversation.label is not None:
            label = self._labels.setdefault(conversation.label, len(self._labels))
        content = digest(dump_conversation(conversation))
        group = content if group is None else group
        has_answer = conversation.answer is not None
        record = (self._num_bytes, content, prompt, group, file, conversation.line, label, has_answer)
        self._write("rows.bin", np.array(record, ROW).tobytes())
        for example in examples:
            self._num_tokens += len(example)
            self._write("ids.bin", example.ids.astype("<i4", copy=False).tobytes())
            self._write("weights.bin", example.weights.astype("<f4", copy=False).tobytes())
            example_record = (self._num_tokens, len(example), example.supervised, self._num_rows)
            self._write("examples.bin", np.array(example_record, EXAMPLE).tobytes())
        self._num_rows += 1
        return group

    def _write(self, name: str, data: bytes) -> None:
        self._checksums[name] = zlib.crc32(data, self._checksums[name])
        self._out[name].write(data)

    def commit(self, facts: dict[str, Any], images: ImageTable | None = None) -> Store:
        """Complete the store and return it, or the identical store that another process wrote first.

        images: the table in which the token ids of images are.
        """
        self._close()
        sizes = {name: (self._temp / name).stat().st_size for name in self._out}
        names = {"files": list(self._files), "labels": list(self._labels)}
        facts = {**facts, **names, "sizes": sizes, "sums": self._checksums}
        if images:
            facts["images"] = images.records()
        (self._temp / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        self._unlock()
        try:
            self._temp.rename(self._folder)
        except OSError:  # another run wrote the same rows first, or the existing folder is damaged
            if load_store(self._folder, images) is None:
                shutil.rmtree(self._folder)
                self._temp.rename(self._folder)
        store = load_store(self._folder, images)
        assert store is not None, "a store just written is not complete"
        return store

    def discard(self) -> None:
        """Remove the temporary folder, if there is one."""
        self._close()
        self._unlock()
        shutil.rmtree(self._temp, ignore_errors=True)

    def _close(self) -> None:
        for out in self._out.values():
            out.close()

    def _unlock(self) -> None:
        self._lock.release()
        (self._temp / LOCK).unlink(missing_ok=True)


class Store:
    """A complete store. facts: the content of facts.json (see `Writer.commit`). images: gets the store's images."""

    def __init__(self, folder: Path, facts: dict[str, Any], images: ImageTable | None = None) -> None:
        self.facts = facts
        self._image_ids = images.adopt(facts["images"]) if images is not None and facts.get("images") else None
        arrays = (_map(folder / name, dtype) for name, dtype in _DTYPES.items())
        self._ids, self._weights, self.example_records, self.row_records = arrays
        self._text = _map(folder / "rows.jsonl", np.dtype(np.uint8))

    @property
    def labels(self) -> list[Label]:
        """The different labels of texts to classify, in the order of the rows."""
        return [_read_label(label) for label in self.facts.get("labels", ())]

    def example(self, i: int) -> Example:
        record = self.example_records[i]
        end, row = int(record["end"]), self.row_records[record["row"]]
        span = slice(end - int(record["length"]), end)
        # copied, because memory maps are read-only and torch warns about read-only arrays
        ids, weights = np.array(self._ids[span]), np.array(self._weights[span])
        if self._image_ids is not None:  # those of the table in which they were written -> those of this one
            there, here = self._image_ids
            is_image = ids >= FIRST_IMAGE_ID
            number = np.searchsorted(there, ids[is_image], "right") - 1
            ids[is_image] += (here - there)[number].astype(np.int32)
        return Example(ids, weights, self.facts["files"][row["file"]], int(row["line"]))

    def conversation(self, i: int) -> Conversation:
        row = self.row_records[i]
        begin = int(self.row_records[i - 1]["end"]) if i else 0
        text = self._text[begin : int(row["end"])].tobytes()
        return load_conversation(text, self.facts["files"][row["file"]], int(row["line"]))


def load_store(folder: Path, images: ImageTable | None = None) -> Store | None:
    """Return the store in `folder`; None if there is none, or if it is incomplete or damaged.

    images: the table to which its images are added, so that its token ids are those of the table.
    """
    try:
        facts = read_facts(folder)
        intact = all((folder / name).stat().st_size == size for name, size in facts["sizes"].items())
        intact = intact and all(_checksum(folder / name) == checksum for name, checksum in facts["sums"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Store(folder, facts, images) if intact else None


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the content of a store's facts.json. Raises OSError or ValueError if it cannot be read."""
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return facts


def _remove_abandoned(folder: Path) -> None:
    """Remove unfinished stores whose processes were killed."""
    for lock in folder.glob(f".*-*/{LOCK}"):
        with suppress(OSError):  # filelock's Timeout is an OSError: the process is still running
            if time.time() - lock.stat().st_mtime > LOCK_GRACE_S:
                with FileLock(lock, timeout=0):
                    shutil.rmtree(lock.parent, ignore_errors=True)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if os.path.getsize(path) == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class LazySequence(Sequence[T]):
    """A sequence whose items are created on access by `item`."""

    @abstractmethod
    def item(self, i: int) -> T: ...

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        if isinstance(i, slice):
            return [self.item(k) for k in range(*i.indices(len(self)))]
        return self.item(range(len(self))[i])


class Examples(LazySequence[Example]):
    """Examples of a store, read on access. Array attributes have shape (n,)."""

    def __init__(self, store: Store, indices: Indices) -> None:
        self._store, self._indices = store, indices
        records = store.example_records[indices]
        self.lengths: Indices = records["length"].astype(np.int64)  # in tokens
        self.supervised: Indices = records["supervised"].astype(np.int64)  # in tokens
        self.rows: Indices = records["row"].astype(np.int64)  # indices of the store's rows
        # label of the answer: 1 good, 0 bad, -1 none; of a text to classify, an index into Store.labels
        self.labels: Indices = store.row_records["label"][records["row"]].astype(np.int64)
        self.prompts: npt.NDArray[np.uint64] = store.row_records["prompt"][records["row"]]  # hashes

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, i: int) -> Example:
        return self._store.example(int(self._indices[i]))

    def conversation(self, i: int) -> Conversation:
        """Return the row that example i is made from."""
        return self._store.conversation(int(self.rows[i]))

    def part(self, i: int) -> str:
        """Return what example i is in its row, such as "rejected", "labelled bad" or "class spam"; "" for all of it."""
        conversation, number = self.conversation(i), 0
        while number < i and self.rows[i - number - 1] == self.rows[i]:  # earlier examples of the row
            number += 1
        if conversation.rejected:
            return ("chosen", "rejected")[number % 2]
        if conversation.passages:
            number %= 1 + len(conversation.passages)
            return ("anchor", "positive", "negative")[min(number, 2)]
        if conversation.label is not None:
            names = conversation.label if isinstance(conversation.label, tuple) else (conversation.label,)
            return f"class {', '.join(names)}" if names else "no class"
        return {1: "labelled good", 0: "labelled bad"}.get(int(self.labels[i]), "")


class JoinedItems(LazySequence[Item]):
    """The recipe's rows, followed by those of train.keep that `chosen` names, possibly repeated.

    Each epoch has the next rows of train.keep.
    """

    def __init__(self, own: Sequence[Item], kept: Sequence[Example], chosen: Indices) -> None:
        self.own, self._kept, self._chosen = own, kept, chosen
        self.kept_tokens = sum(len(kept[int(i)]) for i in chosen)  # in the first epoch

    def __len__(self) -> int:
        return len(self.own) + len(self._chosen)

    def item(self, i: int, epoch: int = 0) -> Item:
        offset = i - len(self.own)
        if offset < 0:
            return self.own[i]
        return self._kept[(int(self._chosen[offset]) + epoch * len(self._chosen)) % len(self._kept)]

    def with_own(self, own: Sequence[Item]) -> JoinedItems:
        return JoinedItems(own, self._kept, self._chosen)


class Conversations(LazySequence[Conversation]):
    """Rows of a store as conversations, read on access.

    digests: hashes of their content, uint64, shape (n,). has_answer: whether they end with an answer, bool, shape (n,).
    """

    def __init__(self, store: Store, indices: Indices) -> None:
        self._store, self._indices = store, indices
        self.digests: npt.NDArray[np.uint64] = store.row_records["digest"][indices]
        self.has_answer: Mask = store.row_records["has_answer"][indices].astype(np.bool_)

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, i: int) -> Conversation:
        return self._store.conversation(int(self._indices[i]))


class ExampleGroups(LazySequence[ExampleGroup]):
    """Preference data as groups. examples: chosen and rejected alternating (pairs), or single answers (labels)."""

    def __init__(self, examples: Examples, data_kind: DataKind, max_length: int) -> None:
        assert data_kind == "labels" or len(examples) % 2 == 0
        self._examples, self._is_pairs, self._max_length = examples, data_kind == "pairs", max_length

    def __len__(self) -> int:
        return len(self._examples) // 2 if self._is_pairs else len(self._examples)

    def item(self, i: int) -> ExampleGroup:
        if self._is_pairs:
            return ExampleGroup((self._examples[2 * i], self._examples[2 * i + 1]))
        answer = self._examples[i]
        return ExampleGroup((answer,), self._kl_examples(i, answer), bool(self._examples.labels[i]))

    def _kl_examples(self, i: int, answer: Example) -> tuple[Example, ...]:
        """Combine this prompt with the next answer to another prompt that fits in `max_length`.

        The choice does not depend on epoch or batch, so the reference log-probabilities are computed only once.
        """
        prompt = answer.ids[: answer.prompt_length]
        for other in islice(self._other_prompts(i), MAX_KL_CANDIDATES):
            candidate = self._examples[other]
            begin = candidate.prompt_length
            completion = candidate.ids[begin:]
            fits = len(prompt) + len(completion) <= self._max_length
            if fits and not np.array_equal(candidate.ids[:begin], prompt):  # templates may trim a prompt
                weights = np.concatenate([np.zeros(len(prompt), np.float32), candidate.weights[begin:]])
                return (replace(answer, ids=np.concatenate([prompt, completion]), weights=weights),)
        return ()

    def _other_prompts(self, i: int) -> Iterator[int]:
        """Yield the indices of examples with another prompt, from i on and then from the start."""
        prompts, offset, size = self._examples.prompts, 1, 64
        while offset < len(self):
            indices = (i + np.arange(offset, min(offset + size, len(self)))) % len(self)
            yield from indices[prompts[indices] != prompts[i]].tolist()
            offset, size = offset + size, 2 * size


class LabelledTexts(LazySequence[LabelledText]):
    """Texts with their classes. labels: see Examples.labels."""

    def __init__(self, examples: Examples, labels: Sequence[Label], classes: Classes) -> None:
        self.classes = classes
        self.counts = count_labels(examples, labels, classes.names)  # number of texts of each class
        self._examples = examples
        self._indices = [classes.indices(label) for label in labels]  # by label

    def __len__(self) -> int:
        return len(self._examples)

    def item(self, i: int) -> LabelledText:
        return LabelledText((self._examples[i],), classes=self._indices[self._examples.labels[i]])


class Triplets(LazySequence[Triplet]):
    """Anchors with their positives and negatives, which are consecutive examples of one row each."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        starts = np.unique(examples.rows, return_index=True)[1]
        self._ends = [*starts[1:].tolist(), len(examples)]
        self._starts: list[int] = starts.tolist()

    def __len__(self) -> int:
        return len(self._starts)

    def item(self, i: int) -> Triplet:
        return Triplet(tuple(self._examples[self._starts[i] : self._ends[i]]))

    @property
    def negatives(self) -> int:
        """Number of negatives of all rows."""
        return len(self._examples) - 2 * len(self)


def count_labels(examples: Examples, labels: Sequence[Label], names: Sequence[str]) -> dict[str, int]:
    """Return the number of examples with each label. labels: see Examples.labels."""
    counts, known = dict.fromkeys(names, 0), examples.labels[examples.labels >= 0]
    for label, number in zip(labels, np.bincount(known, minlength=len(labels)).tolist(), strict=True):
        for name in label_names(label):
            counts[name] += number
    return counts


class Prompts(LazySequence[Prompt]):
    """Prompts with their reference answers. examples: the tokens of the prompt of each conversation."""

    def __init__(self, examples: Examples, conversations: Conversations, renderer: Renderer) -> None:
        assert len(examples) == len(conversations)
        self._examples, self._conversations, self._renderer = examples, conversations, renderer

    def __len__(self) -> int:
        return len(self._examples)

    def item(self, i: int) -> Prompt:
        conversation, renderer = self._conversations[i], self._renderer
        has_reasoning = conversation.answer is not None and renderer.shows_reasoning(conversation.messages[-1])
        reasoning_ends = tuple(renderer.reasoning_ends) if has_reasoning else ()
        gold = renderer.reference_answer(conversation)
        turns = conversation.messages[: None if conversation.answer is None else -1]
        messages = tuple(map(message_json, turns))
        return Prompt((self._examples[i],), gold=gold, row=i, reasoning_ends=reasoning_ends, messages=messages)


def dump_conversation(conversation: Conversation, *, whole: bool = False) -> bytes:
    """Return the conversation as JSON, without file and line. Equal conversations give equal bytes.

    whole: with the paths of images and the ids of tool calls, as load_conversation needs them. Conversations that
        differ only in these are equal: logs number the calls of a conversation anew, or at random.
    """
    to_json = partial(_stored_message, whole=whole)
    value: dict[str, Any] = {"text": conversation.text} if conversation.text is not None else {}
    value["messages"] = [*map(to_json, conversation.messages)]
    if conversation.tools:
        value["tools"] = conversation.tools
    if conversation.rejected:
        value["rejected"] = [*map(to_json, conversation.rejected)]
    if conversation.desirable is not None:
        value["desirable"] = conversation.desirable
    if conversation.label is not None:
        value["label"] = conversation.label
    if conversation.passages:
        value["passages"] = conversation.passages
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _stored_message(message: Message, *, whole: bool) -> dict[str, Any]:
    if not whole:
        calls = tuple({name: x for name, x in call.items() if name != "id"} for call in message.tool_calls)
        message = replace(message, tool_calls=calls, call_id=None)
    if not message.images:
        return message_json(message)
    images = [[x.digest, x.path, x.width, x.height, x.notes] if whole else [x.digest] for x in message.images]
    return {**message_json(replace(message, images=())), "images": images}


def message_json(message: Message) -> dict[str, Any]:
    """Return a message in the `messages` format."""
    fields = {
        "reasoning_content": message.reasoning,
        "tool_calls": list(message.tool_calls) or None,
        "name": message.name,
        "tool_call_id": message.call_id,
        "weight": message.weight if message.weight != 1.0 else None,
    }
    present = {name: value for name, value in fields.items() if value is not None}
    content: str | list[dict[str, Any]] = message.content
    if message.images:
        content = list(content_parts(message, lambda image: {"type": "image", "path": image.path}))
    return {"role": message.role, "content": content, **present}


def request_message(turn: Message) -> dict[str, Any]:
    """Return a message for a server, with its images as data URLs. Raises DataError if an image has changed."""
    value = {name: x for name, x in message_json(turn).items() if name != "weight"}
    if turn.images:
        value["content"] = list(
            content_parts(turn, lambda image: {"type": "image_url", "image_url": {"url": to_data_url(image)}})
        )
    return value


def load_conversation(text: bytes, file: str, line: int) -> Conversation:
    value = json.loads(text)
    messages, rejected = _messages(value["messages"]), _messages(value.get("rejected", ()))
    tools, desirable, label = tuple(value.get("tools", ())), value.get("desirable"), value.get("label")
    content, passages = value.get("text"), tuple(value.get("passages", ()))
    return Conversation(file, line, messages, tools, content, rejected, desirable, _read_label(label), passages)


def _read_label(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _read_image(fields: Sequence[Any]) -> Image:
    digest, path, width, height, notes = fields
    return Image(digest, path, width, height, tuple(notes))


def _messages(turns: Sequence[dict[str, Any]]) -> tuple[Message, ...]:
    return tuple(
        Message(
            turn["role"], turn["content"], turn.get("reasoning_content"), tuple(turn.get("tool_calls", ())),
            turn.get("name"), turn.get("weight", 1.0), turn.get("tool_call_id"),
            tuple(map(_read_image, turn.get("images", ()))),
        )
        for turn in turns
    )  # fmt: skip


def digest(text: bytes) -> int:
    """Return a 64-bit hash of `text`."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
