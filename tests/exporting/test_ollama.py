"""Ollama exports: prompts rendered by Go's template engine are equal to those of training."""

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
from strop.exporting.llama_cpp import make_sample_conversations
from strop.exporting.ollama import TemplatePieces, export_ollama, render_with_go, strips_messages, write_modelfile
from tests.support import gguf_models
from tests.support.families import TEMPLATES, tokenizer
from tests.support.tiny import write_rows

needs_go = pytest.mark.skipif(not module.go_is_installed(), reason="no Go toolchain")
SMOLLM2 = (  # has a default system prompt
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a \"helpful\" one.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def renderer(style: str) -> Renderer:
    if style != "smollm2":
        return Renderer(tokenizer(style))
    return with_template(SMOLLM2)


def with_template(template: str) -> Renderer:
    copied = copy.deepcopy(gguf_models.byte_level("chatml", ("digits",)))  # the original is cached for other tests
    copied.chat_template = template
    return Renderer(copied)


@pytest.mark.parametrize("style", [*sorted(TEMPLATES), "smollm2"])
def test_pieces_render_the_trained_prompts(style: str) -> None:
    trained = renderer(style)
    pieces = TemplatePieces.split(trained)
    for messages in make_sample_conversations(trained.chat.traits.system):
        assert pieces.render(messages) == trained.chat.prompt(messages).text
    assert (pieces.system is not None) == trained.chat.traits.system
    assert strips_messages(trained) == (style in ("llama3", "gemma"))


@needs_go
@pytest.mark.parametrize("style", [*sorted(TEMPLATES), "smollm2"])
def test_go_renders_the_trained_prompt(style: str) -> None:
    trained = renderer(style)
    bos = trained.tokenizer.bos_token or ""
    pieces = TemplatePieces.split(trained)
    conversations = make_sample_conversations(trained.chat.traits.system)
    prompts = [trained.chat.prompt(messages).text for messages in conversations]
    assert render_with_go(pieces.to_go(), conversations) == prompts
    if trained.chat.opening.startswith(bos):
        without_bos = render_with_go(pieces.without_bos(bos).to_go(), conversations)
        assert [bos + prompt for prompt in without_bos] == prompts
    unfinished = [*conversations[0], Message("assistant", "Well")]
    expected = prompts[0].removesuffix(pieces.last_user_end) + pieces.user_end + "Well"
    assert render_with_go(pieces.to_go(), [unfinished]) == [expected]
    with pytest.raises(ModelError, match="Go rejects"):
        render_with_go("{{ if }}", conversations)


def test_template_with_varying_pieces_is_refused() -> None:
    template = "{% for m in messages %}<|im_start|>{{ '!' if loop.index > 4 }}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ModelError, match="cannot be translated"):
        TemplatePieces.split(with_template(template))


def test_prompt_with_an_empty_block_of_reasoning_is_translated() -> None:
    block = "<think>\n\n</think>\n\n"
    template = TEMPLATES["chatml"].replace("assistant\n{%", f"assistant\n{block}{{%")
    pieces = TemplatePieces.split(with_template(template))
    assert pieces.last_user_end == pieces.user_end + block
    go_template = pieces.to_go()
    assert "<think>" in go_template and go_template.count("{{ else }}") == 2  # no system prompt; the last user turn


def test_template_that_drops_earlier_reasoning_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("go_is_installed", "_ollama_is_running"):
        monkeypatch.setattr(module, program, lambda: False)
    dropping = TEMPLATES["chatml"].replace("m.content", "m.content.split('</think>')[-1].lstrip('\\n')")
    dropping = dropping.replace("message['content']", "message['content'].split('</think>')[-1].lstrip('\\n')")
    for template, drops in ((TEMPLATES["chatml"], False), (dropping, True)):
        base = gguf_models.save("qwen2", tmp_path / f"base {drops}")
        (base / "chat_template.jinja").write_text(template, encoding="utf-8")
        prepared = export_ollama(str(base), tmp_path / f"out {drops}", measure=False)
        assert any("leaves out the reasoning of earlier answers" in note for note in prepared.notes) is drops


def test_modelfile_sets_template_system_and_sampling(tmp_path: Path) -> None:
    trained = renderer("chatml")
    text = write_modelfile(TemplatePieces.split(trained).to_go(), trained, "Be brief.")
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert 'SYSTEM """Be brief."""' in text and 'PARAMETER stop "<|im_end|>"' in text
    assert {"PARAMETER temperature 0", "PARAMETER repeat_penalty 1"} <= set(text.splitlines())
    assert "SYSTEM" not in write_modelfile("x", trained, None)


def test_export_writes_gguf_and_modelfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr(module, "go_is_installed", lambda: False)
    monkeypatch.setattr(module, "_ollama_is_running", lambda: False)
    rows = str(write_rows(tmp_path / "rows.jsonl", 8))
    tuned = gguf_models.adapt(gguf_models.save("qwen2", tmp_path / "base"), tmp_path / "My run")
    prepared = export_ollama(str(tuned), tmp_path / "out", data=rows)
    assert prepared.exported.out == tmp_path / "out" / "model.gguf" and prepared.exported.out.is_file()
    assert "ollama create" in str(prepared) and "parity" in str(prepared) and "\n" not in repr(prepared)
    result = prepared.as_json()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == result["files"] == ["Modelfile", "model.gguf"]
    assert result["template"] == {"rendered_by": None, "prompts_equal": None} and result["parity"] is None
    assert any("untested" in note for note in result["notes"]) and result["out"] == str(tmp_path / "out")
    assert result["commands"] == [f"ollama create my-run -f {tmp_path}/out/Modelfile", "ollama run my-run"]
    with pytest.raises(FolderError, match="already exists"):
        export_ollama(str(tuned), tmp_path / "out", data=rows)
    # a running Ollama that renders other prompts
    monkeypatch.setattr(module, "_ollama_is_running", lambda: True)
    monkeypatch.setattr(module, "_render_with_ollama", lambda folder, conversations: ["other"] * len(conversations))
    with pytest.raises(ParityError, match="Ollama's prompt is 'other'"):
        export_ollama(str(tuned), tmp_path / "again", data=rows)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("address", "url"),
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
def test_server_url_follows_ollama_host(address: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", address)
    assert module.server_url() == url
    monkeypatch.setattr(module.shutil, "which", lambda _: "/bin/ollama")
    monkeypatch.setattr(module._opener, "open", lambda *_, **__: nullcontext())
    assert module._ollama_is_running() == ("gpu-box" not in url)


def test_prompts_are_untested_if_ollama_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise urllib.error.HTTPError("u", 500, "no such model", Headers(), None)

    monkeypatch.setattr(module, "go_is_installed", lambda: False)
    monkeypatch.setattr(module, "_ollama_is_running", lambda: True)
    monkeypatch.setattr(module, "_render_with_ollama", refuse)
    trained = renderer("chatml")
    template = TemplatePieces.split(trained).to_go()
    engine, count, reason = module._check_prompts(template, trained, "", None, tmp_path)
    assert (engine, count) == (None, 0) and "did not answer" in reason and "500" in reason


def test_model_names_are_valid_for_ollama() -> None:
    names = [module._make_model_name(name) for name in ("runs/My run", "Ünsinn-7", "模型")]
    assert names == ["my-run", "nsinn-7", "tuned"]


def test_ollama_creates_renders_and_removes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the program and its server by stand-ins."""
    commands: list[list[str]] = []
    bodies: list[dict[str, Any]] = []

    class Process:
        returncode, stderr = 0, ""

    class Response:
        def __enter__(self) -> Response:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self) -> bytes:
            return json.dumps({"_debug_info": {"rendered_template": f"prompt {len(bodies)}"}}).encode()

    def send(request: Any, timeout: float) -> Response:
        bodies.append(json.loads(request.data))
        return Response()

    def run(command: list[str], **_: Any) -> Process:
        commands.append(command)
        return Process()

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module._opener, "open", send)
    conversations = make_sample_conversations(True)[:2]
    assert module._render_with_ollama(tmp_path, conversations) == ["prompt 1", "prompt 2"]
    assert [command[1] for command in commands] == ["create", "rm"]
    assert commands[0][2] == commands[1][2] == bodies[0]["model"]
    assert all(body["_debug_render_only"] and body["stream"] is False for body in bodies)
    monkeypatch.setattr(Response, "read", lambda self: b'{"message": {"content": "an answer"}}')  # an older version
    assert module._render_with_ollama(tmp_path, conversations) is None
