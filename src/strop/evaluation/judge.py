"""Compare the answers of base and tuned model with a judge: a user-defined function, or a model on a server.

Each pair is judged in both orders, because judges often prefer one position. Contradicting verdicts count as a tie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np

from strop.errors import RecipeError, RunError
from strop.evaluation.chat_server import ChatServer, RequestRefused, check_address, is_address, whole_text
from strop.evaluation.compare import Progress, Question
from strop.evaluation.metrics import USER_CODE_ERRORS, FunctionName, find_metric, paired_difference

PROMPT = """Two assistants have answered the same conversation. Which answer is better?

[conversation]
{conversation}

[right answer]
{gold}

[answer 1]
{first}

[answer 2]
{second}

Judge what is said, not its length or its place. End with one word: "first", "second" or "tie"."""
VERDICTS = {"first": 1, "second": -1, "tie": 0}
NUMBERS = {"1": "first", "2": "second"}  # after "answer", as in the prompt
# words that may stand next to a verdict; a sentence with others may mean the opposite
FILLERS = ("a", "answer", "assistant", "better", "best", "final", "is", "it", "my", "one", "the", "verdict", "winner")
FUNCTION_FIX = "use a judge that follows its instructions, or a function: --judge file.py:function"
KEY = "STROP_JUDGE_KEY"  # environment variable with the server's API key
ARGUMENTS = ("conversation", "right answer", "first answer", "second answer")  # positional arguments of a function

# (conversation, right answer, first answer, second answer) -> 1 if the first is better, -1 if the second is better, 0
# for a tie. Raises RequestRefused without a verdict.
Judge = Callable[[str, str, str, str], int]


def make_judge(name: str, model: str | None = None) -> Judge:
    """Return a judge for `file.py:function` or a server's URL. model: by default, the first one of the server."""
    if isinstance(name, FunctionName) or ".py:" in name:
        if model is not None:
            raise RecipeError("--judge-model: the judge is a function", fix="leave it out")
        return _make_function_judge(name)
    if not is_address(name):
        what = f"--judge {name}: neither file.py:function nor the address of a server"
        raise RecipeError(what, fix="write it as http://127.0.0.1:8000/v1")
    check_address("--judge", name, KEY)
    return _make_server_judge(name, model)


def compare_by_judge(
    judge: Judge,
    name: str,
    questions: Sequence[Question],
    base: Sequence[str],
    tuned: Sequence[str],
    advance: Progress | None,
) -> dict[str, Any]:
    """Measure how often the tuned model's answer is better than the base's, with 95 % intervals.

    `rows` are those that were judged, and all rates are of them; `unjudged` counts the others, for which a reply had no
    verdict or the server refused the request, and `unjudged_why` is the last reason. `win_rate` counts a tie as half a
    win. `order_decided` counts rows whose verdict changed with the order, which are ties. `lost` lists rows that the
    tuned model lost.

    Raises RunError if the judge fails, or judges no row.
    """
    outcomes: dict[int, int] = {}  # by row
    order_decided, refusal = 0, None
    for number, (question, base_answer, tuned_answer) in enumerate(zip(questions, base, tuned, strict=True), 1):
        try:
            first, second = _judge_in_both_orders(judge, question, tuned_answer, base_answer)
        except RequestRefused as error:  # such as a row that is too long for the judge
            refusal = error
        else:
            order_decided += first != -second
            outcomes[number - 1] = first if first == -second else 0
        if advance is not None:
            advance("judge", number, len(questions))
    if refusal is not None and not outcomes:
        raise RunError(f"judge {name}: no verdict on any of {len(questions)} rows: {refusal.what}", fix=refusal.fix)
    found = list(outcomes.values())
    difference = paired_difference([outcome < 0 for outcome in found], [outcome > 0 for outcome in found])
    lost = [questions[row].conversation for row, outcome in outcomes.items() if outcome < 0]
    return {
        "name": name, "rows": len(found), "unjudged": len(questions) - len(found),
        **({"unjudged_why": refusal.what} if refusal is not None else {}),
        "wins": found.count(1), "ties": found.count(0), "losses": found.count(-1),
        "win_rate": 0.5 + difference.value / 2,
        "interval": [0.5 + difference.low / 2, 0.5 + difference.high / 2],
        "difference": asdict(difference), "order_decided": order_decided,
        "lost": [row.place for row in lost],
    }  # fmt: skip


def _judge_in_both_orders(judge: Judge, question: Question, answer: str, other: str) -> tuple[int, int]:
    """Return the verdicts on (answer, other) and on (other, answer); see `Judge`. Equal answers are a tie."""
    if answer == other:
        return 0, 0
    messages = question.conversation.messages[:-1]
    context = "\n\n".join(f"{message.role}: {message.text}" for message in messages), question.gold
    return judge(*context, answer, other), judge(*context, other, answer)


def _make_function_judge(name: str) -> Judge:
    function = cast("Callable[[str, str, str, str], Any]", find_metric(name, ARGUMENTS).function)

    def judge(conversation: str, gold: str, first: str, second: str) -> int:
        try:
            result = function(conversation, gold, first, second)
            value = float(result)
        except USER_CODE_ERRORS as error:
            what = f"judge {name}: {type(error).__name__}: {error} (for {conversation[-80:]!r})"
            fix = (
                "it gets the texts (conversation, right answer, first, second); above 0 the first is better, "
                "below 0 the second"
            )
            raise RunError(what, fix=fix) from None
        if isinstance(result, bool | np.bool_):  # False would be a tie
            what = f"judge {name}: returns {result} (for {conversation[-80:]!r})"
            raise RunError(what, fix="return a number: above 0 if the first is better, below 0 if the second is")
        if math.isnan(value):
            what = f"judge {name}: returns nan (for {conversation[-80:]!r})"
            raise RunError(what, fix="return a number for any answers")
        return (value > 0) - (value < 0)

    return judge


def _make_server_judge(url: str, model: str | None) -> Judge:
    server = ChatServer("judge", url, KEY, model)

    def judge(conversation: str, gold: str, first: str, second: str) -> int:
        text = PROMPT.format(conversation=conversation, gold=gold, first=first, second=second)
        choice = server.choose([{"role": "user", "content": text}])
        if (reply := whole_text(choice)) is None:
            is_cut = choice.get("finish_reason") == "length"
            what = "a reply was cut at the server's limit of tokens" if is_cut else "a reply is not a text"
            raise RequestRefused(what, fix="raise that limit" if is_cut else FUNCTION_FIX)
        if (verdict := parse_verdict(reply)) is None:
            what = f'a reply does not end with "first", "second" or "tie": {reply[-100:]!r}'
            raise RequestRefused(what, fix=FUNCTION_FIX)
        return verdict

    return judge


def parse_verdict(reply: str) -> int | None:
    """Return the verdict at the end of a reply, such as "first" or "The answer is: second", or None."""
    parts = [re.findall(r"[^\W_]+", part) for part in re.split(r"[.:;!?\n]", reply.casefold())]
    words = next((part for part in reversed(parts) if part), list[str]())
    if {"answer", "assistant"} & {*words}:
        words = [NUMBERS.get(word, word) for word in words]
    verdicts = [VERDICTS[word] for word in words if word in VERDICTS]
    return verdicts[0] if len(verdicts) == 1 and {*words} <= {*VERDICTS, *FILLERS} else None
