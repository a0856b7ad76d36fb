"""Rows that compare or judge answers -> what they say: pairs, rankings, answers with a label. Each raises BadRow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

from strop.data import converters
from strop.data.converters import BadRow, Keys, Said, Value, given, row_of, task_of, turns_of
from strop.data.types import Message

# What a label may be, case aside. Numbers count only in a column that can hold nothing else.
GOOD = frozenset({"true", "up", "thumbs_up", "good", "desirable", "chosen", "\N{THUMBS UP SIGN}", "+1"})
BAD = frozenset({"false", "down", "thumbs_down", "bad", "undesirable", "rejected", "\N{THUMBS DOWN SIGN}", "-1"})
RANKED: tuple[Keys, ...] = tuple(
    (asked, said, "scores") for asked in ("prompt", "question") for said in ("answers", "responses", "completions")
)
LABELS = ("label", "kto_tag", "thumbs")
_EARLIER = ("messages", "conversation")  # a prompt only where the answers do not hold it themselves
_PROMPTS = ("conversations", "prompt", "question", "instruction", *_EARLIER)
_JUDGED: dict[Keys, Any] = {
    ("messages",): converters.messages,
    ("conversations",): converters.messages,
    ("prompt", "completion"): converters.columns,
    ("prompt", "response"): converters.columns,
    ("query", "response"): converters.columns,
    ("question", "answer"): converters.columns,
    ("instruction", "output"): converters.alpaca,
}
LABELLED: tuple[Keys, ...] = tuple((*keys, label) for keys in _JUDGED for label in LABELS)


def preference(value: Value, keys: Keys) -> list[Said]:
    """A better and a worse answer to a prompt or a conversation, or whole conversations with a common beginning."""
    better, worse = keys
    if worse == "rejected_response":  # beside the messages whose last turn is the better one
        turns = turns_of(value, better, "assistant")
        return [_pair(turns, [*turns[:-1], *turns_of(value, worse, "assistant")], value)]
    asked = _asked(value, value[better])
    chosen, rejected = (_whole(asked, turns_of(value, name, "assistant")) for name in keys)
    return [_pair(chosen, rejected, value)]


def ranking(value: Value, keys: Keys) -> list[Said]:
    """Several answers to a prompt, each with its score: a pair of each two whose scores differ."""
    prompt, answers, scores = (value[key] for key in keys)
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        raise BadRow("bad-ranking", f"{keys[1]} and {keys[2]} are not two lists of one length")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        raise BadRow("bad-ranking", f"{keys[2]} holds something else than numbers")
    asked = _asked(value, prompt)
    said = [_whole(asked, turns_of({"answer": answer}, "answer", "assistant")) for answer in answers]
    ordered = [(i, j) for i, j in permutations(range(len(said)), 2) if scores[i] > scores[j] and said[i] != said[j]]
    if not ordered:
        raise BadRow("bad-ranking", "no two answers that differ have scores that differ")
    return [_pair(said[i], said[j], value) for i, j in ordered]


def labelled(value: Value, keys: Keys) -> list[Said]:
    """One answer that was judged good or bad. Only the last turn was judged: earlier answers are given."""
    *columns, label = keys
    judged = _judgement(value[label], numbers=True)
    if judged is None:
        raise BadRow(
            "bad-label", f"{label} is {str(value[label])[:40]!r}, not good or bad (true, false, up, down, ...)"
        )
    found = []
    for said in _JUDGED[tuple(columns)](value, tuple(columns)):
        if said.messages[-1].role != "assistant":
            raise BadRow("no-assistant", "the last turn, which the label judges, is not the assistant's")
        answer = _unweighted([said.messages[-1]])
        found.append(replace(said, messages=(*given([*said.messages[:-1]]), *answer), desirable=judged))
    return found


def is_labelled(value: Value, keys: Keys) -> bool:
    """Whether the label of a row can only be a judgement; a number in `label` may be a class."""
    return value[keys[-1]] is not None and _judgement(value[keys[-1]], numbers=keys[-1] != "label") is not None


def _judgement(label: Any, *, numbers: bool) -> bool | None:
    if isinstance(label, bool):
        return label
    word = str(label).strip().casefold() if isinstance(label, str | int) else ""
    known = {**dict.fromkeys(GOOD, True), **dict.fromkeys(BAD, False)}
    return known.get(word, {"1": True, "0": False}.get(word) if numbers else None)


def _asked(value: Value, answer: Any) -> list[Message]:
    key = next((key for key in _PROMPTS if value.get(key) is not None), "")
    if key in _EARLIER and _begins_itself(answer):
        key = ""
    if not key and isinstance(answer, str):
        raise BadRow("no-prompt", "chosen is a string and there is no prompt")
    if key == "instruction":
        return [*converters.earlier(value), Message("user", task_of(value))]
    turns = turns_of(value, key, "user") if key else []
    if key in _EARLIER and turns and turns[-1].role == "assistant":
        raise BadRow("no-question", f"{key} ends with an answer, so what chosen and rejected answer is not clear")
    return turns


def _begins_itself(answer: Any) -> bool:
    """Whether an answer is a whole conversation: beside it `messages` often repeats one side, answer included."""
    first = answer[0] if isinstance(answer, list) and answer else answer
    role = first.get("role", first.get("from")) if isinstance(first, dict) else "assistant"
    return role in ("system", "user", "human")


def _whole(asked: list[Message], side: list[Message]) -> list[Message]:
    """The prompt and one side, which in many sets repeats the prompt (and may put a system text before it). Raises
    BadRow where a side asks something else than the prompt does."""
    system = 1 if side and side[0].role == "system" and (not asked or asked[0].role != "system") else 0
    own = side[system:]
    if _trimmed(own[: len(asked)]) == _trimmed(asked):
        return side
    if asked[-1].role == "user" and own and own[0].role == "user":
        raise BadRow("prompts-differ", "an answer begins with a user's turn that is not the prompt's")
    return [*asked, *side]


def _trimmed(turns: Sequence[Message]) -> list[Message]:
    return [replace(turn, content=turn.content.strip()) for turn in turns]


def _pair(better: list[Message], worse: list[Message], value: Value) -> Said:
    if better == worse:
        raise BadRow("same-answers", "chosen and rejected are the same")
    common = next(
        (i for i, (a, b) in enumerate(zip(better, worse, strict=False)) if a != b), min(len(better), len(worse))
    )
    sides = [_answered(side, common, value) for side in (better, worse)]
    return replace(sides[0], rejected=sides[1].messages)


def _answered(side: Sequence[Message], common: int, value: Value) -> Said:
    """One side whose first `common` turns are the prompt."""
    if len(side) == common or side[common].role != "assistant":
        raise BadRow("prompts-differ", "chosen and rejected do not answer the same prompt")
    return row_of([*given([*side[:common]]), *_unweighted(side[common:])], value)


def _unweighted(answer: Sequence[Message]) -> Sequence[Message]:
    """The turns of an answer as they are: a weight would multiply its log-probability, and the loss be another one."""
    for turn in answer:
        if turn.role == "assistant" and turn.weight not in (0.0, 1.0):
            raise BadRow("answer-weight", f"a turn of the answer has the weight {turn.weight:g}; here it is 1 or 0")
    return answer
