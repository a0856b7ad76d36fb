"""Which of two answers is better, base's or tuned's, by a judge of one's own: a function, or a model behind a server.

A judge is asked twice, with the two answers in either order: who wins by standing first does not win. Where the two
verdicts differ, it is a tie.
"""

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

ASK = """Two assistants have answered the same conversation. Which answer is better?

[conversation]
{asked}

[right answer]
{gold}

[answer 1]
{first}

[answer 2]
{second}

Judge what is said, not its length or its place. End with one word: "first", "second" or "tie"."""
WORDS = {"first": 1, "second": -1, "tie": 0}
TRIES, TIMEOUT_S = 3, 300
KEY = "STROP_JUDGE_KEY"  # environment variable: sent as a bearer token
GETS = ("conversation", "right answer", "first answer", "second answer")  # of a function, by position
AGAIN = {408, 429, 500, 502, 503, 504}

Judge = Callable[[str, str, str, str], int | None]
"""(conversation, right answer, first answer, second answer) -> 1: the first is better, -1: the second, 0: neither,
None: it did not say."""


def judge_for(name: str, model: str | None = None) -> Judge:
    """The function of `file.py:function`, or the model behind an OpenAI-compatible server (`http://.../v1`).

    model: which one of the server's; None: the first that it lists. Raises RecipeError for a name that is neither;
    RunError where the server does not answer.
    """
    if ".py:" in name:
        if model is not None:
            raise RecipeError("--judge-model: the judge is a function", fix="leave it out")
        return _of_function(name)
    address = urllib.parse.urlsplit(name)
    if "@" in address.netloc:
        what = "--judge: an address with a name or a password in it, which would stand in reports"
        raise RecipeError(what, fix=f"write it without, and put the key into {KEY}")
    if address.scheme not in ("http", "https"):
        what = f"--judge {name}: neither file.py:function nor the address of a server"
        raise RecipeError(what, fix="write it as http://127.0.0.1:8000/v1")
    server = _Server(name.rstrip("/"), model)
    return server if model is not None else replace(server, model=server.first())


def compare_by_judge(
    judge: Judge,
    name: str,
    asked: Sequence[Question],
    base: Sequence[str],
    tuned: Sequence[str],
    advance: Advance | None,
) -> dict[str, Any]:
    """How often the tuned answer beats the base's: {name, rows, wins, ties, losses, win_rate, interval, difference,
    order_decided, unsaid, changed}.

    win_rate: wins and half of the ties; interval: its 95 % interval, of the paired difference of wins and losses.
    order_decided: rows where each order gave the other verdict. unsaid: answers without a verdict, which count as ties.
    """
    found, order_decided, unsaid = [], 0, 0
    for number, (question, before, after) in enumerate(zip(asked, base, tuned, strict=True), 1):
        said = [0, 0]
        if before != after:
            context = _told(question), question.gold
            verdicts = [judge(*context, after, before), judge(*context, before, after)]
            unsaid += verdicts.count(None)
            said = [verdicts[0] or 0, -(verdicts[1] or 0)]
        order_decided += said[0] * said[1] < 0
        total = sum(said)
        found.append((total > 0) - (total < 0))
        if advance is not None:
            advance("judge", number, len(asked))
    difference = paired_difference([one < 0 for one in found], [one > 0 for one in found])
    places = [f"{question.conversation.file}:{question.conversation.line}" for question in asked]
    return {
        "name": name,
        "rows": len(found),
        "wins": found.count(1),
        "ties": found.count(0),
        "losses": found.count(-1),
        "win_rate": 0.5 + difference.value / 2,
        "interval": [0.5 + difference.low / 2, 0.5 + difference.high / 2],
        "difference": asdict(difference),
        "order_decided": order_decided,
        "unsaid": unsaid,
        "lost": [place for place, one in zip(places, found, strict=True) if one < 0],
    }


def _told(question: Question) -> str:
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in question.conversation.messages[:-1])


def _of_function(name: str) -> Judge:
    own = cast("Callable[[str, str, str, str], Any]", metric(name, GETS).own)

    def judge(asked: str, gold: str, first: str, second: str) -> int:
        try:
            said = float(own(asked, gold, first, second))
        except FAULTS as fault:
            what = f"judge {name}: {type(fault).__name__}: {fault} (for {asked[-80:]!r})"
            fix = "it takes (conversation, right answer, first, second); above 0 the first is better, below 0 the other"
            raise RunError(what, fix=fix) from None
        if math.isnan(said):
            raise RunError(f"judge {name}: gives nan (for {asked[-80:]!r})", fix="give a number for any answers")
        return (said > 0) - (said < 0)

    return judge


class _Stay(urllib.request.HTTPRedirectHandler):
    """urllib would hand the key on to wherever it is sent."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)


@dataclass
class _Server:
    """A model behind an OpenAI-compatible server, asked greedily."""

    url: str
    model: str | None

    def __call__(self, asked: str, gold: str, first: str, second: str) -> int | None:
        text = ASK.format(asked=asked, gold=gold, first=first, second=second)
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        answer = self._ask("/chat/completions", lambda said: said["choices"][0]["message"].get("content"), body)
        return verdict_in(answer if isinstance(answer, str) else "")

    def first(self) -> str:
        """The first of its models."""
        return str(self._ask("/models", lambda said: said["data"][0]["id"]))

    def _ask(self, path: str, part: Callable[[Any], Any], body: dict[str, Any] | None = None) -> Any:
        """part: takes what is wanted out of the answer. Raises RunError where there is none, or it is another's."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        for left in reversed(range(TRIES)):
            try:
                with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
                    said = json.loads(answer.read())
                return part(said)
            except (LookupError, TypeError, AttributeError):
                what = f"judge {self.url}{path}: not what OpenAI's servers answer: {said!r:.300}"
                raise RunError(what, fix="give the address up to /v1, and a model that the server has") from None
            except urllib.error.HTTPError as error:
                if error.code not in AGAIN or not left:
                    said = error.read(300).decode(errors="replace")
                    raise RunError(f"judge {self.url}{path}: {error.code}: {said}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not left:
                    fix = "start it, or check the address"
                    raise RunError(f"judge {self.url}{path} does not answer: {error}", fix=fix) from None
            time.sleep(TRIES - left)
        raise AssertionError("the last try returns or raises")


def verdict_in(answer: str) -> int | None:
    """The last of the words first, second, tie in an answer; None where there is none."""
    words = "".join(sign if sign.isalpha() else " " for sign in answer.casefold()).split()
    return next((WORDS[word] for word in reversed(words) if word in WORDS), None)
