"""Base against tuned by a judge: a function, strop's own server, and servers that answer otherwise."""

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
from strop.evaluation import judge
from strop.evaluation.compare import Question
from strop.evaluation.judge import compare_by_judge, judge_for, verdict_in
from tests.support import tiny
from tests.support.runs import run
from tests.support.serving import Server


def asked(number: int) -> list[Question]:
    turns = (Message("user", "hi"), Message("assistant", "yo"))
    return [Question("hi", "yo", Conversation("f", line + 1, turns)) for line in range(number)]


def longer(conversation: str, gold: str, first: str, second: str) -> int:
    return (len(first) > len(second)) - (len(first) < len(second))


def test_wins_ties_and_losses_with_an_interval() -> None:
    found = compare_by_judge(longer, "f", asked(4), ["a", "bb", "ccc", "dd"], ["aa", "bb", "c", "dddd"], None)
    assert (found["wins"], found["ties"], found["losses"], found["rows"]) == (2, 1, 1, 4)
    assert found["win_rate"] == pytest.approx((2 + 0.5) / 4) and found["lost"] == ["f:3"]
    low, high = found["interval"]
    assert 0 <= low < found["win_rate"] < high <= 1 and found["order_decided"] == 0


def test_who_wins_by_standing_first_does_not_win() -> None:
    always = compare_by_judge(lambda *_: 1, "f", asked(3), ["a", "b", "c"], ["x", "y", "c"], None)
    assert (always["wins"], always["ties"], always["losses"]) == (0, 3, 0) and always["win_rate"] == 0.5
    assert always["order_decided"] == 2  # equal answers are even without asking
    half = iter([1, 0] * 3)
    once = compare_by_judge(lambda *_: next(half), "f", asked(3), ["a", "b", "c"], ["x", "y", "z"], None)
    assert once["wins"] == 3  # better in one order, even in the other


def test_a_judge_that_says_nothing_is_even_and_counted() -> None:
    found = compare_by_judge(lambda *_: None, "f", asked(2), ["a", "b"], ["x", "y"], None)
    assert found["unsaid"] == 4 and found["ties"] == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("first", 1),
        ("Second.", -1),
        ("**Tie**", 0),
        ("The first is short, so: second", -1),
        ("I cannot say", None),
        ("", None),
    ],
)
def test_verdicts_in_answers(answer: str, said: int | None) -> None:
    assert verdict_in(answer) == said


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "def best(asked, gold, first, second):\n    return (first == gold) - (second == gold)\n"
        "def bad(asked, gold, first, second):\n    return {}[asked]\n"
        "def nan(asked, gold, first, second):\n    return float('nan')\n"
        "def two(first, second):\n    return 0\n"
    )
    own = judge_for(f"{file}:best")
    assert own("user: hi", "yo", "yo", "no") == 1 and own("", "yo", "no", "yo") == -1 and own("", "yo", "a", "b") == 0
    with pytest.raises(RunError, match="KeyError"):
        judge_for(f"{file}:bad")("user: hi", "yo", "a", "b")
    with pytest.raises(RunError, match="gives nan"):
        judge_for(f"{file}:nan")("user: hi", "yo", "a", "b")
    for name, model, said in (
        ("nobody", None, "neither"),
        (f"{file}:best", "m", "--judge-model"),
        ("a.py:b", None, "no such"),
        (f"{file}:two", None, r"two\(first, second\): too many"),
    ):
        with pytest.raises(RecipeError, match=said):
            judge_for(name, model)


@contextmanager
def standing_in(*replies: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives these replies in turn (a text, a status, or a whole answer), and keeps what it was asked."""
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
            if isinstance(reply, dict):
                return self._send(200, reply)
            return self._send(200, {"choices": [{"message": {"content": reply}}]})

        do_GET = do_POST = _answer

        def _send(self, status: int, value: Any) -> None:
            text = json.dumps(value).encode()
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


def test_a_server_is_asked_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    monkeypatch.setenv(judge.KEY, "secret")
    with standing_in("first", 503, "second", "tie", "first") as (url, seen):
        found = compare_by_judge(judge_for(url), url, asked(2), ["old", "old"], ["new", "new"], None)
    assert (found["wins"], found["ties"], found["losses"]) == (1, 0, 1)
    assert {one["model"] for one in seen} == {"one"} and {one["key"] for one in seen} == {"Bearer secret"}
    places = [one["messages"][0]["content"].index("new") < one["messages"][0]["content"].index("old") for one in seen]
    assert places == [True, False, False, True, False] and all(one["temperature"] == 0 for one in seen)


def test_a_server_that_refuses_or_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    with standing_in(401) as (url, _), pytest.raises(RunError, match="401"):
        judge_for(url, "m")("a", "b", "c", "d")
    with pytest.raises(RunError, match="does not answer"):
        judge_for("http://127.0.0.1:9/v1", "m")("a", "b", "c", "d")
    with pytest.raises(RunError, match="does not answer"):
        judge_for("http://127.0.0.1:9/v1")  # before anything is answered


@pytest.mark.parametrize("reply", [{"error": {"message": "no such model"}}, {"choices": []}, {"choices": "first"}])
def test_a_server_that_answers_something_else(reply: dict[str, Any]) -> None:
    with standing_in(reply) as (url, _), pytest.raises(RunError, match="not what OpenAI's servers answer"):
        judge_for(url)("a", "b", "c", "d")


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": [{"type": "text", "text": "first"}]}])
def test_an_answer_without_a_text_names_no_winner(message: dict[str, Any]) -> None:
    with standing_in({"choices": [{"message": message}]}) as (url, _):
        assert judge_for(url)("a", "b", "c", "d") is None


def test_eval_with_a_judge_from_the_command_line(
    adapter_folders: list[Path], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 3)
    words = ["eval", adapter_folders[0], "--data", rows, "--max-new-tokens", "8", "--json"]
    file = tmp_path / "own.py"
    file.write_text("def most(asked, gold, first, second):\n    return len(set(first)) - len(set(second))\n")
    for name in (f"{file}:most", f"{server.url}/v1"):
        code, said, err = run(*words, "--judge", name, capsys=capsys)
        assert code == 0, err
        found = json.loads(said)["judge"]
        assert found["rows"] == 3 == found["wins"] + found["ties"] + found["losses"] and "tuned wins" in err
    with standing_in(401) as (url, _):  # what was answered is kept
        code, said, err = run(*words, "--judge", url, capsys=capsys)
    assert code == 1 and "401" in err
    kept = json.loads(said)
    assert kept["error"]["kind"] == "RunError" and len(kept["samples"]) == kept["rows"] == 3 and "judge" not in kept
    code, _, err = run("eval", adapter_folders[0], "--data", rows, "--judge-model", "m", capsys=capsys)
    assert code == 2 and "--judge" in err


def test_the_key_stays_with_the_server_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str | None] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"error": "odd"}')

        def log_message(self, *_: Any) -> None:
            pass

    class Sends(Elsewhere):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{second.server_port}/")
            self.end_headers()

    monkeypatch.setenv(judge.KEY, "secret")
    with HTTPServer(("127.0.0.1", 0), Sends) as first, HTTPServer(("127.0.0.1", 0), Elsewhere) as second:
        for server in (first, second):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RunError, match="302"):
            judge_for(f"http://127.0.0.1:{first.server_port}/v1")("a", "b", "c", "d")
        assert heard == []
        with pytest.raises(RunError, match=r"not what OpenAI's servers answer: .*odd"):
            judge_for(f"http://127.0.0.1:{second.server_port}/v1")("a", "b", "c", "d")
        for server in (first, second):
            server.shutdown()
    with pytest.raises(RecipeError) as refused:
        judge_for("http://me:hunter2@127.0.0.1/v1")
    assert "hunter2" not in " ".join(refused.value.lines())
