"""The server with clients in use: openai, litellm, llm, curl, a fuzzer and a browser."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from strop.display.tables import example_request
from tests.support.browser import open_browser
from tests.support.serving import CHAT, SYSTEM, Server

USER: list[Any] = [{"role": "user", "content": "hello there"}]


def program(name: str) -> str:
    """Return the path of a program next to this Python or on the PATH; skip the test without it."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} on the PATH")
    return path


def greedy(server: Server, model: str = "calm") -> str:
    answer = server.chat(model=model, max_tokens=12, temperature=0)
    return str(answer.json()["choices"][0]["message"]["content"])


def test_openai_client(server: Server) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["calm", "bold", "base"]
        assert client.models.retrieve("bold").id == "bold"
        options = {"model": "calm", "messages": USER, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
        assert whole.choices[0].message.content == greedy(server)
        assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens == 12
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == greedy(server)
        assert chunks[-1].usage.completion_tokens == 12
        plain = client.completions.create(model="base", prompt="hello", max_tokens=4, logprobs=1)
        assert plain.choices[0].finish_reason == "length" and len(plain.choices[0].logprobs.tokens) == 4
        with pytest.raises(openai.NotFoundError, match="'x' not found"):
            client.chat.completions.create(model="x", messages=USER)
        with pytest.raises(openai.BadRequestError, match="n: "):
            client.chat.completions.create(model="calm", messages=USER, n=3)
        pytest.importorskip("llguidance")
        schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
        expected = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}},
        }
        answer = client.chat.completions.create(model="calm", messages=USER, response_format=expected, max_tokens=200)
        assert set(json.loads(answer.choices[0].message.content)) == {"a"}


LITELLM = """
import sys, litellm
url, streamed = sys.argv[1], sys.argv[2] == "stream"
options = {"api_base": url, "api_key": "none", "max_tokens": 12, "temperature": 0, "stream": streamed}
answer = litellm.completion(model="openai/calm", messages=[{"role": "user", "content": "hello there"}], **options)
parts = [chunk.choices[0].delta.content or "" for chunk in answer] if streamed else [answer.choices[0].message.content]
sys.stdout.buffer.write("".join(parts).encode())
"""


@pytest.mark.skipif("STROP_LITELLM_PYTHON" not in os.environ, reason="STROP_LITELLM_PYTHON is not set (`make deploy`)")
def test_litellm_client(server: Server) -> None:
    for way in ("stream", "whole"):
        command = [os.environ["STROP_LITELLM_PYTHON"], "-c", LITELLM, server.url + "/v1", way]
        done = subprocess.run(command, capture_output=True, timeout=120)
        assert done.stdout.decode() == greedy(server), done.stderr.decode()[-1000:]


def test_llm_program(server: Server, tmp_path: Path) -> None:
    llm = program("llm")
    entry = f"- model_id: mine\n  model_name: calm\n  api_base: {server.url}/v1\n  api_key_name: none\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry, encoding="utf-8")
    command = [llm, "-m", "mine", "-o", "max_tokens", "12", "-o", "temperature", "0", "--key", "none", "hello there"]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    for more in ([], ["--no-stream"]):
        done = subprocess.run([*command, *more], env=environment, capture_output=True, timeout=60)
        assert done.stdout.decode().strip() == greedy(server).strip(), done.stderr.decode()


def test_curl_program(server: Server) -> None:
    curl = program("curl")
    body = json.dumps({"model": "calm", "messages": USER, "max_tokens": 12, "temperature": 0})
    command = [
        curl,
        "-sS",
        "--fail",
        server.url + "/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == greedy(server)
    printed = example_request({"url": server.url, "models": ["calm"]})
    done = subprocess.run([curl, *shlex.split(printed)[1:]], capture_output=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"]
    form = [curl, "-sS", "-o", os.devnull, "-w", "%{http_code}", server.url + "/v1/chat/completions", "-d", body]
    assert subprocess.run(form, capture_output=True, timeout=60, check=True).stdout == b"415"


@pytest.mark.slow
def test_fuzzed_requests_never_get_a_500(server: Server, tmp_path: Path) -> None:
    """Valid and invalid requests, generated from the server's OpenAPI schema."""
    schemathesis = program("schemathesis")
    report = tmp_path / "report.xml"
    command = [
        schemathesis, "run", server.url + "/openapi.json", "--checks", "not_a_server_error", "--max-examples", "12",
        "--seed", "1", "--suppress-health-check", "all", "--report", "junit", "--report-junit-path", str(report),
    ]  # fmt: skip
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "", "NO_COLOR": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "POST /v1/chat/completions" in report.read_text(encoding="utf-8")
    assert server.chat(max_tokens=2).status_code == 200


# --- the page in a browser ---------------------------------------------------------------------------------------


def test_page_chats_with_base_and_tuned(server: Server) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or program("google-chrome")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        foreign: list[str] = []
        page.on(
            "request", lambda request: foreign.append(request.url) if not request.url.startswith(server.url) else None
        )
        page.goto(server.url)
        expect, sides = playwright.expect, page.locator(".side")
        expect(sides).to_have_count(2)
        assert [sides.nth(place).locator("select").input_value() for place in (0, 1)] == ["base", "calm"]
        page.locator("#settings > summary").click()
        page.fill("#limit", "12")
        page.fill("#temperature", "0")
        page.locator("h1").click()
        page.fill("#text", "hello there")
        page.keyboard.press("Enter")
        for place, model in enumerate(("base", "calm")):
            expect(sides.nth(place).locator(".answer")).to_have_text(greedy(server, model))
        expect(page.locator("#send")).to_have_text("Send")
        assert page.evaluate_handle("document.documentElement.scrollWidth").json_value() <= 390
        page.fill("#text", "<img src=x onerror=\"document.title='owned'\">")
        page.locator("#send").click()
        expect(sides.first.locator(".user").nth(1)).to_have_text("<img src=x onerror=\"document.title='owned'\">")
        expect(page.locator("#send")).to_have_text("Send")
        assert page.title() == "strop" and page.locator("main img").count() == 0
        html = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"  # the same as output of the model
        chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": html}, "finish_reason": "stop"}]})
        stream = f"data: {chunk}\n\ndata: [DONE]\n\n"
        page.route(f"**{CHAT}", lambda request: request.fulfill(content_type="text/event-stream", body=stream))
        page.fill("#text", "some HTML")
        page.locator("#send").click()
        expect(sides.first.locator(".answer").nth(2)).to_have_text(html)
        assert page.title() == "strop" and page.locator("main img, main b").count() == 0
        page.unroute(f"**{CHAT}")
        page.locator("#new-chat").click()
        expect(page.locator(".answer")).to_have_count(0)
        page.locator("#settings > summary").click()
        page.fill("#limit", "450")
        page.locator("h1").click()
        page.fill("#text", "a long answer")
        page.keyboard.press("Enter")
        expect(page.locator("#send")).to_have_text("Stop")
        page.locator("#send").click()
        expect(page.locator(".note").first).to_be_visible()
        browser.close()
    assert not errors and not foreign
    server.wait_idle()


def test_each_side_gets_its_default_system_prompt(server: Server) -> None:
    models = requests.get(server.url + "/v1/models", timeout=10).json()["data"]
    models.sort(key=lambda model: ["bold", "calm", "base"].index(model["id"]))
    with open_browser() as browser:
        page = browser.new_page()
        received: dict[str, Any] = {}
        page.route("**/v1/models", lambda way: way.fulfill(json={"data": models}))

        def answer(way: Any) -> None:
            body = way.request.post_data_json
            received[body["model"]] = [(message["role"], message["content"]) for message in body["messages"]]
            way.fulfill(content_type="text/event-stream", body="data: [DONE]\n\n")

        page.route(f"**{CHAT}", answer)
        page.goto(server.url)
        page.wait_for_selector(".side >> nth=1")

        def ask(*selected: str) -> tuple[dict[str, Any], str]:
            """Return the messages of each model, and the placeholder of the system prompt."""
            received.clear()
            for place, model in enumerate(selected):
                page.locator(".side select").nth(place).select_option(model)
            page.locator("#new-chat").click()
            page.fill("#text", "hi")
            page.keyboard.press("Enter")
            page.wait_for_function("() => document.querySelectorAll('.answer:not(.waiting)').length === 2")
            return dict(received), page.locator("#system").get_attribute("placeholder")

        user, bold = ("user", "hi"), ("system", SYSTEM)
        assert page.locator("#system").input_value() == ""
        assert ask("base", "bold") == ({"base": [bold, user], "bold": [user]}, SYSTEM)  # the server adds bold's
        assert ask("base", "calm") == ({"base": [user], "calm": [user]}, "none")
        assert ask("bold", "calm") == ({"bold": [user], "calm": [user]}, f"bold: {SYSTEM}\ncalm: none")
        page.evaluate("document.getElementById('system').value = 'be brief'")
        assert set(map(tuple, ask("base", "calm")[0].values())) == {(("system", "be brief"), user)}
