"""Modelfiles: the prompts that Ollama makes of them are the trained ones, rendered by Go's own template engine."""

from __future__ import annotations

import copy
import json
import urllib.error
from contextlib import nullcontext
from email.message import Message as Headers
from pathlib import Path
from typing import Any

import pytest

from strop.data.rendering.render import Renderer
from strop.data.types import Message
from strop.errors import FolderError, ModelError, ParityError
from strop.exporting import llama_cpp
from strop.exporting import ollama as module
from strop.exporting.llama_cpp import conversations
from strop.exporting.ollama import Pieces, export_ollama, modelfile, rendered_by_go, trims
from tests.support import gguf_models
from tests.support.families import TEMPLATES, tokenizer
from tests.support.tiny import write_rows

needs_go = pytest.mark.skipif(not module.go_is_installed(), reason="no Go toolchain")
SMOLLM2 = (  # a default system prompt where there is none
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a \"helpful\" one.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def renderer(style: str) -> Renderer:
    if style != "smollm2":
        return Renderer(tokenizer(style))
    copied = copy.deepcopy(gguf_models.byte_level("chatml", ("digits",)))  # that one is kept for other tests
    copied.chat_template = SMOLLM2
    return Renderer(copied)


@pytest.mark.parametrize("style", [*sorted(TEMPLATES), "smollm2"])
def test_a_template_is_put_together_again_from_its_pieces(style: str) -> None:
    own = renderer(style)
    pieces = Pieces.of(own)
    for messages in conversations(own.supports_system):
        assert pieces.prompt(messages) == own.chat.prompt(messages).text
    assert (pieces.system is not None) == own.supports_system
    assert trims(own) == (style in ("llama3", "gemma"))


@needs_go
@pytest.mark.parametrize("style", [*sorted(TEMPLATES), "smollm2"])
def test_go_renders_the_trained_prompt(style: str) -> None:
    own = renderer(style)
    bos = own.tokenizer.bos_token or ""
    pieces = Pieces.of(own)
    asked = conversations(own.supports_system)
    trained = [own.chat.prompt(messages).text for messages in asked]
    assert rendered_by_go(pieces.go(), asked) == trained
    if own.chat.opening.startswith(bos):
        assert [bos + prompt for prompt in rendered_by_go(pieces.without_bos(bos).go(), asked)] == trained
    begun = [*asked[0], Message("assistant", "Well")]  # an answer that is to be gone on with
    assert rendered_by_go(pieces.go(), [begun]) == [trained[0].removesuffix(pieces.asked) + pieces.given + "Well"]
    with pytest.raises(ModelError, match="Go refuses"):
        rendered_by_go("{{ if }}", asked)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for m in messages %}<|im_start|>{{ '!' if loop.index > 4 }}{{ m.content }}<|im_end|>{% endfor %}",
            "not the same around",
        ),
    ],
)
def test_a_template_without_such_pieces_is_refused(template: str, why: str) -> None:
    copied = copy.deepcopy(gguf_models.byte_level("chatml", ("digits",)))  # that one is kept for other tests
    copied.chat_template = template
    with pytest.raises(ModelError, match=why):
        Pieces.of(Renderer(copied))


def test_a_prompt_that_closes_a_block_of_reasoning_has_a_translation() -> None:
    copied = gguf_models.byte_level("chatml", ("digits",))
    block = "<think>\n\n</think>\n\n"
    copied.chat_template = TEMPLATES["chatml"].replace("assistant\n{%", f"assistant\n{block}{{%")
    pieces = Pieces.of(Renderer(copied))
    assert pieces.asked == pieces.given + block
    assert "<think>" in pieces.go() and pieces.go().count("{{ else }}") == 2  # no system prompt; the last user turn


def test_the_modelfile(tmp_path: Path) -> None:
    own = renderer("chatml")
    text = modelfile(Pieces.of(own).go(), own, "Be brief.")
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert 'SYSTEM """Be brief."""' in text and 'PARAMETER stop "<|im_end|>"' in text
    assert {"PARAMETER temperature 0", "PARAMETER repeat_penalty 1"} <= set(text.splitlines())
    assert "SYSTEM" not in modelfile("x", own, None)


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr(module, "go_is_installed", lambda: False)
    monkeypatch.setattr(module, "_ollama_runs", lambda: False)
    rows = str(write_rows(tmp_path / "rows.jsonl", 8))
    tuned = gguf_models.adapt(gguf_models.save("qwen2", tmp_path / "base"), tmp_path / "My run")
    prepared = export_ollama(str(tuned), tmp_path / "made", data=rows)
    told = prepared.as_json()
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == told["files"] == ["Modelfile", "model.gguf"]
    assert told["template"] == {"rendered_by": None, "prompts_equal": None} and told["parity"] is None
    assert any("untested" in note for note in told["notes"]) and told["out"] == str(tmp_path / "made")
    assert told["commands"] == [f"ollama create my-run -f {tmp_path}/made/Modelfile", "ollama run my-run"]
    with pytest.raises(FolderError, match="already exists"):
        export_ollama(str(tuned), tmp_path / "made", data=rows)
    # a real Ollama is asked where it runs; here one that renders something else
    monkeypatch.setattr(module, "_ollama_runs", lambda: True)
    monkeypatch.setattr(module, "_rendered_by_ollama", lambda folder, asked: ["other"] * len(asked))
    with pytest.raises(ParityError, match="Ollama's prompt is 'other'"):
        export_ollama(str(tuned), tmp_path / "again", data=rows)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        (":8000", "http://127.0.0.1:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("http://gpu-box", "http://gpu-box:80"),
        ("https://gpu-box/", "https://gpu-box:443"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_where_ollama_is(given: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", given)
    assert module.server() == url
    monkeypatch.setattr(module.shutil, "which", lambda _: "/bin/ollama")
    monkeypatch.setattr(module._local, "open", lambda *_, **__: nullcontext())
    assert module._ollama_runs() == ("gpu-box" not in url)


def test_an_ollama_that_does_not_answer_leaves_prompts_untested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise urllib.error.HTTPError("u", 500, "no such model", Headers(), None)

    monkeypatch.setattr(module, "go_is_installed", lambda: False)
    monkeypatch.setattr(module, "_ollama_runs", lambda: True)
    monkeypatch.setattr(module, "_rendered_by_ollama", refuse)
    own = renderer("chatml")
    by, number, why = module._check(Pieces.of(own).go(), own, "", None, tmp_path)
    assert (by, number) == (None, 0) and "did not answer" in why and "500" in why


def test_names_that_ollama_takes() -> None:
    assert [module._model_name(name) for name in ("runs/My run", "Ünsinn-7", "模型")] == ["my-run", "nsinn-7", "tuned"]


def test_how_a_real_ollama_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the program and its server: created, asked to render only, removed."""
    ran: list[list[str]] = []
    bodies: list[dict[str, Any]] = []

    class Done:
        returncode, stderr = 0, ""

    class Answer:
        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self) -> bytes:
            return json.dumps({"_debug_info": {"rendered_template": f"prompt {len(bodies)}"}}).encode()

    def ask(request: Any, timeout: float) -> Answer:
        bodies.append(json.loads(request.data))
        return Answer()

    def run(command: list[str], **_: Any) -> Done:
        ran.append(command)
        return Done()

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module._local, "open", ask)
    asked = conversations(True)[:2]
    assert module._rendered_by_ollama(tmp_path, asked) == ["prompt 1", "prompt 2"]
    assert [command[1] for command in ran] == ["create", "rm"] and ran[0][2] == ran[1][2] == bodies[0]["model"]
    assert all(body["_debug_render_only"] and body["stream"] is False for body in bodies)
    monkeypatch.setattr(Answer, "read", lambda self: b'{"message": {"content": "an answer"}}')  # an older one
    assert module._rendered_by_ollama(tmp_path, asked) is None
