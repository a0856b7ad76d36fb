"""Judges: a user-defined function, strop's server, and servers with other responses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from strop.data.types import Conversation, Message
from strop.errors import RecipeError, RunError
from strop.evaluation import chat_server, judge
from strop.evaluation.chat_server import RequestRefused
from strop.evaluation.compare import Question
from strop.evaluation.judge import compare_by_judge, make_judge, parse_verdict
from tests.support import tiny
from tests.support.runs import run
from tests.support.serving import Server


def make_questions(number: int) -> list[Question]:
    turns = (Message("user", "hi"), Message("assistant", "yo"))
    return [Question("hi", "yo", Conversation("f", line + 1, turns)) for line in range(number)]


def longer(conversation: str, gold: str, first: str, second: str) -> int:
    return (len(first) > len(second)) - (len(first) < len(second))


def test_wins_ties_and_losses_are_counted_with_an_interval() -> None:
    result = compare_by_judge(longer, "f", make_questions(4), ["a", "bb", "ccc", "dd"], ["aa", "bb", "c", "dddd"], None)
    assert (result["wins"], result["ties"], result["losses"], result["rows"]) == (2, 1, 1, 4)
    assert result["win_rate"] == pytest.approx((2 + 0.5) / 4) and result["lost"] == ["f:3"]
    low, high = result["interval"]
    assert 0 <= low < result["win_rate"] < high <= 1 and result["order_decided"] == 0


def test_judge_that_prefers_a_position_gives_ties() -> None:
    always = compare_by_judge(lambda *_: 1, "f", make_questions(3), ["a", "b", "c"], ["x", "y", "c"], None)
    assert (always["wins"], always["ties"], always["losses"]) == (0, 3, 0) and always["win_rate"] == 0.5
    assert always["order_decided"] == 2  # equal answers are ties without a request
    half = iter([1, 0] * 3)
    once = compare_by_judge(lambda *_: next(half), "f", make_questions(3), ["a", "b", "c"], ["x", "y", "z"], None)
    assert (once["ties"], once["order_decided"]) == (3, 3)  # better in one order and a tie in the other


def test_rows_without_a_verdict_are_left_out() -> None:
    """As ties, they would make a small difference look certain."""
    with judge_server("first", "neither", "first", "second", "second", "second") as (url, _):
        rows = ["a", "b", "c", "d"], [*"xyz", "d"]
        result = compare_by_judge(make_judge(url), url, make_questions(4), *rows, None)
    assert result["unjudged_why"] == 'a reply does not end with "first", "second" or "tie": \'neither\''
    assert (result["rows"], result["unjudged"]) == (3, 1)  # the last one is a tie without a question
    assert (result["wins"], result["ties"], result["losses"]) == (1, 2, 0)
    alone = iter([1, -1, -1, -1])
    same = compare_by_judge(lambda *_: next(alone), "f", make_questions(3), ["b", "c", "d"], [*"yz", "d"], None)
    assert same["interval"] == result["interval"]
    assert "unjudged_why" not in same
    with (
        judge_server("both", "both") as (url, _),
        pytest.raises(RunError, match="no verdict on any of 2 rows") as caught,
    ):
        compare_by_judge(make_judge(url), url, make_questions(2), ["a", "b"], ["x", "y"], None)
    assert "a reply does not end with" in str(caught.value) and "file.py:function" in str(caught.value)


def test_cut_replies_are_called_cut() -> None:
    cut = {"choices": [{"message": {"content": "first"}, "finish_reason": "length"}]}
    with judge_server(cut, cut) as (url, _), pytest.raises(RunError) as caught:
        compare_by_judge(make_judge(url), url, make_questions(2), ["a", "b"], ["x", "y"], None)
    assert "a reply was cut at the server's limit of tokens" in str(caught.value) and "raise that limit" in str(
        caught.value
    )


def test_an_unusable_response_of_a_server_that_has_answered_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server.time, "sleep", lambda seconds: None)
    busy = b"<html>busy</html>"
    for replies, unjudged in (((busy,), 0), ((busy, {"error": "x"}, busy), 1)):
        rest = ("second",) if not unjudged else ()
        with judge_server("first", "second", "first", *replies, *rest, "second", "first") as (url, _):
            rows = ["a", "b", "c"], ["x", "y", "z"]
            result = compare_by_judge(make_judge(url), url, make_questions(3), *rows, None)
        assert (result["rows"], result["unjudged"], result["losses"]) == (3 - unjudged, unjudged, 1)
    assert "busy" in result["unjudged_why"]


def test_a_refused_request_costs_one_row() -> None:
    with judge_server("answer 1", "[answer 2]", 413, "Answer 2", "answer 1.") as (url, _):
        result = compare_by_judge(make_judge(url), url, make_questions(3), ["a", "b", "c"], ["x", "y", "z"], None)
    assert (result["wins"], result["losses"], result["unjudged"]) == (1, 1, 1) and result["lost"] == ["f:3"]
    with judge_server(413, 413) as (url, _), pytest.raises(RunError, match=r"no verdict on any of 2 rows: .*413"):
        compare_by_judge(make_judge(url), url, make_questions(2), ["a", "b"], ["x", "y"], None)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("first", 1),
        ("Second.", -1),
        ("**Tie**", 0),
        ("The first is short, so: second", -1),
        ("I cannot say", None),
        ("**Verdict:** first", 1),
        ('{"verdict": "second"}', -1),
        ("The first is too long.\nThe second answer is better.", -1),
        ("The first answer is better than the second.", None),
        ("first\n\n(Chosen because the second one is wrong.)", None),
        ("<think>\nOkay, first I need to look at", None),
        ("It is not the first", None),
        ("", None),
        ("Answer 1", 1),
        ("[answer 2]", -1),
        ("Assistant 2 is better.", -1),
        ("Verdict: 2", None),
        ("Score: 1", None),
        ("I give it 7 of 10", None),
    ],
)
def test_verdict_is_at_the_end_of_a_reply(reply: str, verdict: int | None) -> None:
    assert parse_verdict(reply) == verdict


def test_user_function_is_a_judge(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "def best(asked, gold, first, second):\n    return (first == gold) - (second == gold)\n"
        "def bad(asked, gold, first, second):\n    return {}[asked]\n"
        "def nan(asked, gold, first, second):\n    return float('nan')\n"
        "def two(first, second):\n    return 0\n"
    )
    own = make_judge(f"{file}:best")
    assert own("user: hi", "yo", "yo", "no") == 1 and own("", "yo", "no", "yo") == -1 and own("", "yo", "a", "b") == 0
    with pytest.raises(RunError, match="KeyError"):
        make_judge(f"{file}:bad")("user: hi", "yo", "a", "b")
    with pytest.raises(RunError, match="nan"):
        make_judge(f"{file}:nan")("user: hi", "yo", "a", "b")
    for name, model, message in (
        ("nobody", None, "neither"),
        (f"{file}:best", "m", "judge_model"),
        ("a.py:b", None, "no such"),
        (f"{file}:two", None, r"two\(first, second\): too many"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_judge(name, model)


@contextmanager
def judge_server(*replies: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run a server that gives these replies in turn (a text, a status, or a whole response); yield its requests too."""
    seen: list[dict[str, Any]] = []
    left = iter(replies)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            if self.path == "/v1/models":
                return self._send(200, {"data": [{"id": "one"}]})
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({**body, "key": self.headers.get("Authorization")})
            reply = next(left)
            if isinstance(reply, int):
                return self._send(reply, {"error": "no"})
            if isinstance(reply, dict | bytes):
                return self._send(200, reply)
            return self._send(200, {"choices": [{"message": {"content": reply}}]})

        do_GET = do_POST = _answer

        def _send(self, status: int, value: Any) -> None:
            text = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def test_server_is_asked_in_both_orders_and_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server.time, "sleep", lambda seconds: None)
    monkeypatch.setenv(judge.KEY, "secret")
    with judge_server("first", 503, "second", "second", "first") as (url, seen):
        result = compare_by_judge(make_judge(url), url, make_questions(2), ["old", "old"], ["new", "new"], None)
    assert (result["wins"], result["ties"], result["losses"]) == (1, 0, 1)
    assert {request["model"] for request in seen} == {"one"} and {request["key"] for request in seen} == {
        "Bearer secret"
    }
    texts = [request["messages"][0]["content"] for request in seen]
    assert [text.index("new") < text.index("old") for text in texts] == [True, False, False, True, False]
    assert all(request["temperature"] == 0 for request in seen)


def test_server_that_refuses_or_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server.time, "sleep", lambda seconds: None)
    with judge_server(401) as (url, _), pytest.raises(RunError, match="401"):
        make_judge(url, "m")("a", "b", "c", "d")
    with pytest.raises(RunError, match="does not answer"):
        make_judge("http://127.0.0.1:9/v1", "m")("a", "b", "c", "d")
    with pytest.raises(RunError, match="does not answer"):
        make_judge("http://127.0.0.1:9/v1")  # before anything is answered


@pytest.mark.parametrize("reply", [{"error": {"message": "no such model"}}, {"choices": []}, {"choices": "first"}])
def test_unexpected_response_is_an_error(reply: dict[str, Any]) -> None:
    with judge_server(reply) as (url, _), pytest.raises(RunError, match="not a response of"):
        make_judge(url)("a", "b", "c", "d")


@pytest.mark.parametrize("page", [b"<html>Sign in</html>", b"\xff", b""])
def test_response_that_is_not_json_is_not_called_silence(page: bytes) -> None:
    with judge_server(page) as (url, seen), pytest.raises(RunError) as caught:
        make_judge(url)("a", "b", "c", "d")
    message = "\n".join(caught.value.lines())
    assert "not a response of an OpenAI-compatible server" in message and "give the address up to /v1" in message
    assert "does not answer" not in message and len(seen) == 1  # not asked again
    assert page != b"<html>Sign in</html>" or "Sign in" in message


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": [{"type": "text", "text": "first"}]}])
def test_response_without_text_has_no_verdict(message: dict[str, Any]) -> None:
    response = {"choices": [{"message": message}]}
    with judge_server(response) as (url, _), pytest.raises(RequestRefused, match="not a text"):
        make_judge(url)("a", "b", "c", "d")


def test_eval_with_a_judge_stores_answers_when_the_judge_fails(
    adapter_folders: list[Path], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 3)
    words = ["eval", adapter_folders[0], "--data", rows, "--max-new-tokens", "8", "--json"]
    file = tmp_path / "own.py"
    file.write_text("def most(asked, gold, first, second):\n    return len(set(first)) - len(set(second))\n")
    code, out, err = run(*words, "--judge", f"{file}:most", capsys=capsys)
    assert code == 0, err
    result = json.loads(out)["judge"]
    assert result["rows"] == 3 == result["wins"] + result["ties"] + result["losses"] and "tuned wins" in err
    with judge_server(401) as (url, _):  # the answers are kept
        for name, why in ((url, "401"), (f"{server.url}/v1", "no verdict on any of 3 rows")):
            code, out, err = run(*words, "--judge", name, capsys=capsys)
            assert code == 1 and why in err
            stored = json.loads(out)
            assert stored["error"]["kind"] == "RunError" and "judge" not in stored
            assert len(stored["samples"]) == stored["rows"] == 3
    code, _, err = run("eval", adapter_folders[0], "--data", rows, "--judge-model", "m", capsys=capsys)
    assert code == 2 and "--judge" in err


def test_key_is_not_sent_to_a_redirect_and_not_accepted_in_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[str | None] = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            received.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"error": "odd"}')

        def log_message(self, *_: Any) -> None:
            pass

    class Redirect(Other):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{second.server_port}/")
            self.end_headers()

    monkeypatch.setenv(judge.KEY, "secret")
    with HTTPServer(("127.0.0.1", 0), Redirect) as first, HTTPServer(("127.0.0.1", 0), Other) as second:
        for server in (first, second):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RunError, match="302"):
            make_judge(f"http://127.0.0.1:{first.server_port}/v1")("a", "b", "c", "d")
        assert received == []
        with pytest.raises(RunError, match=r"not a response of .*odd"):
            make_judge(f"http://127.0.0.1:{second.server_port}/v1")("a", "b", "c", "d")
        for server in (first, second):
            server.shutdown()
    with pytest.raises(RecipeError) as refused:
        make_judge("http://me:hunter2@127.0.0.1/v1")
    assert "hunter2" not in " ".join(refused.value.lines())
