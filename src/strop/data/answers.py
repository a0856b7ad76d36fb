"""Answers of a teacher to rows without one (train.teacher)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from strop.data.store import digest, dump_conversation
from strop.data.types import Conversation, Message
from strop.errors import DataError


@dataclass(frozen=True)
class NoAnswer:
    """A teacher has not answered a row. why: a sentence for the user."""

    why: str


Answers = Mapping[int, str | NoAnswer]  # by the hash of a conversation without an answer
PLACEHOLDER = "(the teacher's answer)"  # before the teacher has answered, as in `strop check`


class _Placeholders(dict[int, str | NoAnswer]):
    """A placeholder for the answer to any conversation."""

    def __missing__(self, key: int) -> str:
        return PLACEHOLDER


PLACEHOLDERS: Answers = _Placeholders()


def key_of(conversation: Conversation) -> int:
    return digest(dump_conversation(conversation))


def lacks_answer(conversation: Conversation) -> bool:
    return conversation.text is None and conversation.answer is None


def complete(conversation: Conversation, answers: Answers) -> Conversation | NoAnswer:
    """Return the conversation with its answer, or why the teacher has none."""
    if not lacks_answer(conversation):
        return conversation
    answer = answers[key_of(conversation)]
    if isinstance(answer, NoAnswer):
        return answer
    return replace(conversation, messages=(*conversation.messages, Message("assistant", answer)))


def write_answers(answers: Answers) -> str:
    """Return the answers as JSON Lines."""
    lines = (
        {"row": f"{key:016x}", **({"why": answer.why} if isinstance(answer, NoAnswer) else {"answer": answer})}
        for key, answer in answers.items()
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_answers(file: Path) -> Answers:
    """Read the answers that `write_answers` wrote. Raises DataError for a damaged file."""
    try:
        return dict(_read_lines(file))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged: {error!r}", fix="delete it, so that the teacher answers again") from None


def _read_lines(file: Path) -> Iterator[tuple[int, str | NoAnswer]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield int(row["row"], 16), NoAnswer(row["why"]) if "why" in row else row["answer"]
