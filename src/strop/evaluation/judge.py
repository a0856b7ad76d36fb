"""Compare the answers of base and tuned model with a judge: a user-defined function, or a model on a server.

Each pair is judged in both orders, because judges often prefer one position. Contradicting verdicts count as a tie.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from strop.errors import RecipeError, RunError
from strop.evaluation.compare import Progress, Question
from strop.evaluation.metrics import USER_CODE_ERRORS, find_metric, paired_difference

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
# words that may stand next to a verdict; a sentence with others may mean the opposite
FILLERS = ("a", "answer", "assistant", "better", "best", "final", "is", "it", "my", "one", "the", "verdict", "winner")
TRIES, TIMEOUT_S = 3, 300
KEY = "STROP_JUDGE_KEY"  # environment variable with the server's API key
ARGUMENTS = ("conversation", "right answer", "first answer", "second answer")  # positional arguments of a function
RETRIED_STATUSES = {408, 429, 500, 502, 503, 504}

# (conversation, right answer, first answer, second answer) -> 1 if the first is better, -1 if the second is better, 0
# for a tie, None without a verdict
Judge = Callable[[str, str, str, str], int | None]


def make_judge(name: str, model: str | None = None) -> Judge:
    """Return a judge for `file.py:function` or a server's URL. model: by default, the first one of the server."""
    if ".py:" in name:
        if model is not None:
            raise RecipeError("--judge-model: the judge is a function", fix="leave it out")
        return _make_function_judge(name)
    address = urllib.parse.urlsplit(name)
    if "@" in address.netloc:
        what = "--judge: the address has a name or a password in it, which would be in reports"
        raise RecipeError(what, fix=f"write it without, and put the key into {KEY}")
    if address.scheme not in ("http", "https"):
        what = f"--judge {name}: neither file.py:function nor the address of a server"
        raise RecipeError(what, fix="write it as http://127.0.0.1:8000/v1")
    judge = _ServerJudge(name.rstrip("/"), model)
    if model is None:
        judge.model = str(judge.request("/models", lambda data: data["data"][0]["id"]))
    return judge


def compare_by_judge(
    judge: Judge,
    name: str,
    questions: Sequence[Question],
    base: Sequence[str],
    tuned: Sequence[str],
    advance: Progress | None,
) -> dict[str, Any]:
    """Measure how often the tuned model's answer is better than the base's, with 95 % intervals.

    `win_rate` counts a tie as half a win. `order_decided` counts rows whose verdict changed with the order, which are
    ties. `unsaid` counts replies without a verdict; their rows are ties too. `lost` lists rows that the tuned model
    lost.
    """
    outcomes: list[int] = []
    order_decided = unsaid = 0
    for number, (question, base_answer, tuned_answer) in enumerate(zip(questions, base, tuned, strict=True), 1):
        outcome = 0
        if base_answer != tuned_answer:
            messages = question.conversation.messages[:-1]
            context = "\n\n".join(f"{message.role}: {message.content}" for message in messages), question.gold
            replies = [judge(*context, tuned_answer, base_answer), judge(*context, base_answer, tuned_answer)]
            unsaid += replies.count(None)
            verdicts = [replies[0], None if replies[1] is None else -replies[1]]
            if None not in verdicts:
                order_decided += verdicts[0] != verdicts[1]
                outcome = (verdicts[0] or 0) if verdicts[0] == verdicts[1] else 0
        outcomes.append(outcome)
        if advance is not None:
            advance("judge", number, len(questions))
    difference = paired_difference([outcome < 0 for outcome in outcomes], [outcome > 0 for outcome in outcomes])
    rows = [question.conversation for question in questions]
    return {
        "name": name, "rows": len(outcomes),
        "wins": outcomes.count(1), "ties": outcomes.count(0), "losses": outcomes.count(-1),
        "win_rate": 0.5 + difference.value / 2,
        "interval": [0.5 + difference.low / 2, 0.5 + difference.high / 2],
        "difference": asdict(difference), "order_decided": order_decided, "unsaid": unsaid,
        "lost": [f"{row.file}:{row.line}" for row, outcome in zip(rows, outcomes, strict=True) if outcome < 0],
    }  # fmt: skip


def _make_function_judge(name: str) -> Judge:
    function = cast("Callable[[str, str, str, str], Any]", find_metric(name, ARGUMENTS).function)

    def judge(conversation: str, gold: str, first: str, second: str) -> int:
        try:
            value = float(function(conversation, gold, first, second))
        except USER_CODE_ERRORS as error:
            what = f"judge {name}: {type(error).__name__}: {error} (for {conversation[-80:]!r})"
            fix = "it gets (conversation, right answer, first, second); above 0 the first is better, below 0 the second"
            raise RunError(what, fix=fix) from None
        if math.isnan(value):
            what = f"judge {name}: returns nan (for {conversation[-80:]!r})"
            raise RunError(what, fix="return a number for any answers")
        return (value > 0) - (value < 0)

    return judge


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects, because urllib would send the API key to the new address."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass
class _ServerJudge:
    """Judge that asks a model on an OpenAI-compatible server, with greedy decoding."""

    url: str
    model: str | None

    def __call__(self, conversation: str, gold: str, first: str, second: str) -> int | None:
        text = PROMPT.format(conversation=conversation, gold=gold, first=first, second=second)
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        choice = self.request("/chat/completions", _first_choice, body)
        reply = choice["message"].get("content")
        is_whole = isinstance(reply, str) and choice.get("finish_reason") != "length"
        return parse_verdict(reply) if is_whole else None

    def request(self, path: str, select: Callable[[Any], Any], body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        for remaining_tries in reversed(range(TRIES)):
            try:
                with _OPENER.open(request, timeout=TIMEOUT_S) as response:
                    content: Any = response.read().decode(errors="replace")
                content = json.loads(content)
                return select(content)
            except (LookupError, TypeError, AttributeError, json.JSONDecodeError):  # it answered, but something else
                what = f"judge {self.url}{path}: not a response of an OpenAI-compatible server: {content!r:.300}"
                raise RunError(what, fix="give the address up to /v1, and a model that the server has") from None
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED_STATUSES or not remaining_tries:
                    text = error.read(300).decode(errors="replace")
                    raise RunError(f"judge {self.url}{path}: {error.code}: {text}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not remaining_tries:
                    fix = "start it, or check the address"
                    raise RunError(f"judge {self.url}{path} does not answer: {error}", fix=fix) from None
            time.sleep(TRIES - remaining_tries)
        raise AssertionError("the last try returns or raises")


def _first_choice(data: Any) -> dict[str, Any]:
    """Return the choice of a response, after checking that it has a message."""
    choice: dict[str, Any] = data["choices"][0]
    choice["message"].get("content")
    return choice


def parse_verdict(reply: str) -> int | None:
    """Return the verdict at the end of a reply, such as "first" or "The answer is: second", or None."""
    parts = [re.findall(r"[^\W\d_]+", part) for part in re.split(r"[.:;!?\n]", reply.casefold())]
    words = next((part for part in reversed(parts) if part), list[str]())
    verdicts = [VERDICTS[word] for word in words if word in VERDICTS]
    return verdicts[0] if len(verdicts) == 1 and {*words} <= {*VERDICTS, *FILLERS} else None
