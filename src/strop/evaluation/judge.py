"""Compare base's and tuned's answers with a judge: a user-defined function, or a model behind a server."""

# The judge is asked twice, in either order, because judges prefer one position. Different verdicts are a tie.

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from strop.errors import RecipeError, RunError
from strop.evaluation.compare import Advance, Question
from strop.evaluation.metrics import FAULTS, metric, paired_difference

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
TRIES, TIMEOUT_S = 3, 300
KEY = "STROP_JUDGE_KEY"  # environment variable: sent as a bearer token
ARGUMENTS = ("conversation", "right answer", "first answer", "second answer")  # of a function, by position
RETRIED_STATUSES = {408, 429, 500, 502, 503, 504}

# (conversation, right answer, first, second answer) -> 1: the first is better, -1: the second, 0: a tie, None: unclear
Judge = Callable[[str, str, str, str], int | None]


def judge_for(name: str, model: str | None = None) -> Judge:
    """Return the judge of `file.py:function`, or of an OpenAI-compatible server (default: its first model)."""
    if ".py:" in name:
        if model is not None:
            raise RecipeError("--judge-model: the judge is a function", fix="leave it out")
        return _function_judge(name)
    address = urllib.parse.urlsplit(name)
    if "@" in address.netloc:
        what = "--judge: the address has a name or a password in it, which would be in reports"
        raise RecipeError(what, fix=f"write it without, and put the key into {KEY}")
    if address.scheme not in ("http", "https"):
        what = f"--judge {name}: neither file.py:function nor the address of a server"
        raise RecipeError(what, fix="write it as http://127.0.0.1:8000/v1")
    server = _ServerJudge(name.rstrip("/"), model)
    if model is None:
        return replace(server, model=str(server.request("/models", lambda data: data["data"][0]["id"])))
    return server


def compare_by_judge(
    judge: Judge,
    name: str,
    questions: Sequence[Question],
    base: Sequence[str],
    tuned: Sequence[str],
    advance: Advance | None,
) -> dict[str, Any]:
    """Measure how often the tuned answer beats the base's, with 95 % intervals."""
    # win_rate: wins and half of the ties, from the paired difference of wins and losses. order_decided: rows whose
    # verdict changed with the order. unsaid: replies without a verdict, counted as ties. lost: places of lost rows.
    outcomes, order_decided, unsaid = [], 0, 0
    for number, (question, before, after) in enumerate(zip(questions, base, tuned, strict=True), 1):
        verdicts = [0, 0]
        if before != after:
            messages = question.conversation.messages[:-1]
            context = "\n\n".join(f"{message.role}: {message.content}" for message in messages), question.gold
            replies = [judge(*context, after, before), judge(*context, before, after)]
            unsaid += replies.count(None)
            verdicts = [replies[0] or 0, -(replies[1] or 0)]
        order_decided += verdicts[0] * verdicts[1] < 0
        total = sum(verdicts)
        outcomes.append((total > 0) - (total < 0))
        if advance is not None:
            advance("judge", number, len(questions))
    difference = paired_difference([outcome < 0 for outcome in outcomes], [outcome > 0 for outcome in outcomes])
    places = [f"{question.conversation.file}:{question.conversation.line}" for question in questions]
    return {
        "name": name, "rows": len(outcomes),
        "wins": outcomes.count(1), "ties": outcomes.count(0), "losses": outcomes.count(-1),
        "win_rate": 0.5 + difference.value / 2,
        "interval": [0.5 + difference.low / 2, 0.5 + difference.high / 2],
        "difference": asdict(difference), "order_decided": order_decided, "unsaid": unsaid,
        "lost": [place for place, outcome in zip(places, outcomes, strict=True) if outcome < 0],
    }  # fmt: skip


def _function_judge(name: str) -> Judge:
    function = cast("Callable[[str, str, str, str], Any]", metric(name, ARGUMENTS).function)

    def judge(conversation: str, gold: str, first: str, second: str) -> int:
        try:
            value = float(function(conversation, gold, first, second))
        except FAULTS as fault:
            what = f"judge {name}: {type(fault).__name__}: {fault} (for {conversation[-80:]!r})"
            fix = "it gets (conversation, right answer, first, second); above 0 the first is better, below 0 the second"
            raise RunError(what, fix=fix) from None
        if math.isnan(value):
            what = f"judge {name}: returns nan (for {conversation[-80:]!r})"
            raise RunError(what, fix="return a number for any answers")
        return (value > 0) - (value < 0)

    return judge


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects, as urllib would send the key to the new address."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass
class _ServerJudge:
    """A model behind an OpenAI-compatible server, with greedy decoding."""

    url: str
    model: str | None

    def __call__(self, conversation: str, gold: str, first: str, second: str) -> int | None:
        text = PROMPT.format(conversation=conversation, gold=gold, first=first, second=second)
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        reply = self.request("/chat/completions", lambda data: data["choices"][0]["message"].get("content"), body)
        return verdict_in(reply if isinstance(reply, str) else "")

    def request(self, path: str, select: Callable[[Any], Any], body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        for left in reversed(range(TRIES)):
            try:
                with _OPENER.open(request, timeout=TIMEOUT_S) as response:
                    content = json.loads(response.read())
                return select(content)
            except (LookupError, TypeError, AttributeError):
                what = f"judge {self.url}{path}: not a response of an OpenAI-compatible server: {content!r:.300}"
                raise RunError(what, fix="give the address up to /v1, and a model that the server has") from None
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED_STATUSES or not left:
                    text = error.read(300).decode(errors="replace")
                    raise RunError(f"judge {self.url}{path}: {error.code}: {text}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not left:
                    fix = "start it, or check the address"
                    raise RunError(f"judge {self.url}{path} does not answer: {error}", fix=fix) from None
            time.sleep(TRIES - left)
        raise AssertionError("the last try returns or raises")


def verdict_in(reply: str) -> int | None:
    """Return the verdict of the last of the words first, second and tie in a reply, or None."""
    words = "".join(character if character.isalpha() else " " for character in reply.casefold()).split()
    return next((VERDICTS[word] for word in reversed(words) if word in VERDICTS), None)
