"""Answers of a teacher to rows without one (train.teacher)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strop.data.store import digest, dump_conversation
from strop.data.types import Conversation, Message
from strop.errors import DataError


@dataclass(frozen=True)
class NoAnswer:
    """A teacher has not answered a row. why: a sentence for the user."""

    why: str


@dataclass(frozen=True)
class TopTokens:
    """The most likely tokens at a place of a server's answer.

    begin, end: of the token that is there, in bytes from the start of the answer without the space around it. ids,
    logprobs: in the vocabulary of the student; of a token that is not in it there is none.
    """

    begin: int
    end: int
    ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True)
class Answer:
    """The answer of a teacher. tokens: from a server, if its probabilities are used."""

    text: str
    tokens: Sequence[TopTokens] = ()


Answers = Mapping[int, Answer | NoAnswer]  # by the hash of a conversation without an answer
PLACEHOLDER = "(the teacher's answer)"  # before the teacher has answered, as in `strop check`


class _Placeholders(dict[int, Answer | NoAnswer]):
    """A placeholder for the answer to any conversation."""

    def __missing__(self, key: int) -> Answer:
        return Answer(PLACEHOLDER)


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
    return replace(conversation, messages=(*conversation.messages, Message("assistant", answer.text)))


def find_answer(completed: Conversation, answers: Answers) -> Answer | None:
    """Return the answer that `complete` has added to a conversation, or None for one that had its own."""
    answer = answers.get(key_of(replace(completed, messages=completed.messages[:-1])))
    return answer if isinstance(answer, Answer) and answer.text == completed.answer else None


def write_answers(answers: Answers) -> str:
    """Return the answers as JSON Lines."""
    lines = ({"row": f"{key:016x}", **_to_json(answer)} for key, answer in answers.items())
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _to_json(answer: Answer | NoAnswer) -> dict[str, Any]:
    if isinstance(answer, NoAnswer):
        return {"why": answer.why}
    tokens = [[token.begin, token.end, token.ids, token.logprobs] for token in answer.tokens]
    return {"answer": answer.text, **({"tokens": tokens} if tokens else {})}


def read_answers(file: Path) -> Answers:
    """Read the answers that `write_answers` wrote. Raises DataError for a damaged file."""
    try:
        return dict(_read_lines(file))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged: {error!r}", fix="delete it, so that the teacher answers again") from None


def _read_lines(file: Path) -> Iterator[tuple[int, Answer | NoAnswer]]:
    with file.open(encoding="utf-8") as lines:  # str.splitlines also splits at U+2028 and others
        for row in map(json.loads, lines):
            tokens = [TopTokens(*token) for token in row.get("tokens", ())]
            yield int(row["row"], 16), NoAnswer(row["why"]) if "why" in row else Answer(row["answer"], tokens)
