"""`strop export ollama`: write a GGUF file and a Modelfile, and compare the prompts with those of training.

The prompts are rendered by a running Ollama, or else by Go's template engine if a Go toolchain is installed; without
both, the result says that they are untested.

Ollama's chat templates are written in Go's text/template. They are built by rendering the Jinja template: a prompt is
split at the message contents, and if ten conversations can be put together from the same pieces, these make a Go
template. Other templates are refused. No family is known by name; ChatML as in SmolLM2 and Qwen, Llama 3, Mistral,
Gemma and Phi 3 are all made of such pieces.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from strop.data.rendering.render import Renderer
from strop.data.row_errors import RenderError
from strop.data.types import Message
from strop.errors import FolderError, ModelError, ParityError
from strop.exporting.gguf import Exported, export_gguf
from strop.exporting.llama_cpp import sample_conversations
from strop.models.adapters import adapter_folder, base_source, read_identity, tokenizer_source
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.runs.folder import exclusive_output, new_folder

MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"
CONTEXT = 4096  # Ollama's default is smaller, and truncates prompts silently
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Messages whose contents are easy to find in a rendered prompt.
_MARKED_TURNS = [
    Message("system", "Qzsystemq"), Message("user", "Qzfirstq"), Message("assistant", "Qzanswerq"),
    Message("user", "Qzsecondq"),
]  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A folder for `ollama create`."""

    out: Path
    exported: Exported
    rendered_by: str | None  # ollama or go; None if the prompts are untested
    prompts: int  # equal to those of training, of ten
    commands: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return {
            **self.exported.as_json(), "out": str(self.out), "files": sorted([MODEL_FILE, MODELFILE]),
            "template": {"rendered_by": self.rendered_by, "prompts_equal": self.prompts if self.rendered_by else None},
            "commands": self.commands, "notes": self.notes,
        }  # fmt: skip


def export_ollama(
    name: str,
    out: Path,
    *,
    kind: str | None = None,
    data: str | None = None,
    measure: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Write a folder for `ollama create`. See `strop.export`. An untranslatable template is refused first."""
    if out.exists():
        raise FolderError(f"{out}: already exists", fix="give --out a new folder")
    folder = adapter_folder(name)
    renderer = Renderer(
        load_tokenizer(locate(name) if folder is None else tokenizer_source(folder, base_source(folder)))
    )
    pieces = TemplatePieces.split(renderer)
    system = read_identity(folder).get("system") if folder is not None else None
    with exclusive_output(out), new_folder(out) as temp:
        exported = export_gguf(name, temp / MODEL_FILE, kind=kind, data=data, measure=measure, progress=progress)
        bos = str(renderer.tokenizer.bos_token or "") if exported.vocabulary.add_bos else ""
        template = pieces.without_bos(bos).to_go()
        (temp / MODELFILE).write_text(write_modelfile(template, renderer, system), encoding="utf-8")
        rendered_by, prompts, reason = _check_prompts(template, renderer, bos, system, temp)
    notes = list(exported.notes)
    if strips_messages(renderer):
        notes.append("the chat template strips white space around messages, which Ollama's cannot: send none")
    if renderer.chat.traits.tools:
        notes.append("tools are not in Ollama's template; the template in the GGUF file has them")
    if system is not None and '"""' in system:
        notes.append('the system prompt of the training rows contains """, which a Modelfile cannot: send it yourself')
    if rendered_by is None:
        notes.append(f"Ollama's prompts are untested: {reason}")
    model = _model_name(name)
    commands = [f"ollama create {model} -f {shlex.quote(str(out / MODELFILE))}", f"ollama run {model}"]
    return Prepared(out, exported, rendered_by, prompts, commands, notes)


def write_modelfile(template: str, renderer: Renderer, system: str | None) -> str:
    """Return a Modelfile that generates like strop's evaluation: greedy, without a repeat penalty."""
    lines = [f"FROM ./{MODEL_FILE}", f'TEMPLATE """{template}"""']
    if system is not None and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in renderer.chat.stops]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {CONTEXT}"]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class TemplatePieces:
    """The text that a chat template writes around message contents."""

    start: str  # before the first turn, without a system prompt
    system: tuple[str, str] | None  # before and after a system prompt
    last_user_end: str  # after the user turn to answer; may open a block of reasoning
    user_end: str  # after an answered user turn
    answer_end: str  # after an answer, including what opens the next user turn

    @staticmethod
    def split(renderer: Renderer) -> TemplatePieces:
        """Split a template into pieces. Raises ModelError if it is not made of such pieces."""
        start, user_end, answer_end, last_user_end = _split_prompt(renderer, _MARKED_TURNS[1:])
        system = None
        if renderer.supports_system:
            before, after, *rest = _split_prompt(renderer, _MARKED_TURNS)
            system = (before, after)
            if rest != [user_end, answer_end, last_user_end]:
                raise _untranslatable("a system prompt changes the text after it")
        pieces = TemplatePieces(start, system, last_user_end, user_end, answer_end)
        for messages in sample_conversations(renderer.supports_system):
            expected = renderer.chat.prompt(messages).text
            if pieces.render(messages) != expected:
                raise _untranslatable(f"the text around turns varies, as in {expected!r}")
        return pieces

    def render(self, messages: Sequence[Message]) -> str:
        """Render the prompt of messages that end with a user turn."""
        system = [message.content for message in messages if message.role == "system"]
        text = self.start if not system or self.system is None else self.system[0] + system[0] + self.system[1]
        for message in messages:
            if message.role == "user":
                text += message.content + (self.last_user_end if message is messages[-1] else self.user_end)
            elif message.role == "assistant":
                text += message.content + self.answer_end
        return text

    def without_bos(self, bos: str) -> TemplatePieces:
        """Return the pieces for a tokenizer that adds the bos token itself."""
        system = None if self.system is None else (self.system[0].removeprefix(bos), self.system[1])
        return replace(self, start=self.start.removeprefix(bos), system=system)

    def to_go(self) -> str:
        """Return the Go template. Literal text is quoted, so no white space is lost."""
        start = _quote(self.start)
        if self.system is not None:
            with_system = f"{_quote(self.system[0])}{{{{ .System }}}}{_quote(self.system[1])}"
            start = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{start}{{{{ end }}}}"
        if_more = "{{- if gt (len (slice $.Messages $at)) 1 }}"  # if further messages follow
        user_end = _quote(self.last_user_end)
        if self.last_user_end != self.user_end:
            user_end = f"{if_more}{_quote(self.user_end)}{{{{ else }}}}{user_end}{{{{ end }}}}"
        return (
            f"{start}\n"
            "{{- range $at, $_ := .Messages }}\n"
            f'{{{{- if eq .Role "user" }}}}{{{{ .Content }}}}{user_end}\n'
            '{{- else if eq .Role "assistant" }}{{ .Content }}\n'
            f"{if_more}{_quote(self.answer_end)}{{{{ end }}}}\n"
            "{{- end }}{{ end }}"
        )


def _quote(text: str) -> str:
    """Write literal text as a Go action. JSON's escapes are valid in Go."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _split_prompt(renderer: Renderer, messages: Sequence[Message]) -> list[str]:
    """Split a rendered prompt at the contents of its messages."""
    try:
        text = renderer.chat.prompt(messages).text
    except RenderError as error:
        raise _untranslatable(str(error)) from error
    markers = "|".join(turn.content for turn in _MARKED_TURNS)
    if re.findall(markers, text) != [message.content for message in messages]:
        raise _untranslatable("it reorders or omits messages")
    return re.split(markers, text)


def _untranslatable(reason: str) -> ModelError:
    return ModelError(
        f"Ollama: this chat template cannot be translated into Ollama's: {reason}",
        fix="use strop export gguf: llama.cpp uses the template unchanged",
    )


def strips_messages(renderer: Renderer) -> bool:
    """Return whether the template strips white space around a message, which Ollama's templates cannot."""
    return " Qz " not in renderer.chat.prompt([Message("user", " Qz ")]).text


def _check_prompts(
    template: str, renderer: Renderer, bos: str, system: str | None, folder: Path
) -> tuple[str | None, int, str]:
    """Compare ten prompts with those of training. Returns (what rendered them, how many, why they are untested)."""
    conversations = sample_conversations(renderer.supports_system)
    engine, prompts, reason = "ollama", None, "no Ollama is running, and no Go toolchain is installed"
    if _ollama_is_running():
        try:
            prompts, reason = _render_with_ollama(folder, conversations), "this version of Ollama cannot show them"
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"Ollama did not answer: {error}"
    if prompts is None and go_is_installed():
        engine, prompts = "go", render_with_go(template, conversations)
    if prompts is None:
        return None, 0, reason
    for messages, prompt in zip(conversations, prompts, strict=True):
        # Ollama adds the Modelfile's system prompt
        with_system = engine == "ollama" and system is not None and messages[0].role != "system"
        all_messages = [Message("system", str(system)), *messages] if with_system else messages
        expected = renderer.chat.prompt(all_messages).text
        if bos + prompt != expected:
            raise ParityError(f"Ollama's prompt is {prompt!r}, trained with {expected!r}", fix="please report it")
    return engine, len(prompts), ""


def go_is_installed() -> bool:
    return shutil.which("go") is not None


def render_with_go(template: str, conversations: Sequence[Sequence[Message]]) -> list[str]:
    """Render prompts with Go's text/template; needs a Go toolchain. Raises ModelError for an invalid template."""
    request = {"template": template, "conversations": list(map(_as_json, conversations))}
    process = subprocess.run(
        ["go", "run", str(Path(__file__).with_name("render.go"))],
        input=json.dumps(request), capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if process.returncode:
        raise ModelError(f"Ollama: Go rejects the template: {process.stderr.strip()[:300]}", fix="please report it")
    return list(json.loads(process.stdout))


def _as_json(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def server_url() -> str:
    """Return the URL of the user's Ollama, reading OLLAMA_HOST as Ollama's client does."""
    address = os.environ.get("OLLAMA_HOST", "").strip(" \"'")
    parts = urlsplit(address if "://" in address else f"//{address}")
    default_port = {"http": 80, "https": 443}.get(parts.scheme, 11434)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname or "0.0.0.0", parts.hostname)
    shown = f"[{host}]" if ":" in str(host) else host
    return f"{'https' if parts.scheme == 'https' else 'http'}://{shown}:{parts.port or default_port}"


def _ollama_is_running() -> bool:
    """Return whether Ollama runs on this machine. A model is not sent to another machine for a check."""
    try:
        if shutil.which("ollama") is None or urlsplit(server_url()).hostname not in ("127.0.0.1", "::1", "localhost"):
            return False
        with _opener.open(f"{server_url()}/api/version", timeout=2):
            return True
    except (OSError, http.client.HTTPException, ValueError):
        return False


def _render_with_ollama(folder: Path, conversations: Sequence[Sequence[Message]]) -> list[str] | None:
    """Create a temporary model in Ollama and render prompts with it. Return None if Ollama is too old to show them."""
    name = f"strop-check-{uuid.uuid4().hex[:8]}"
    process = subprocess.run(
        ["ollama", "create", name, "-f", str(folder / MODELFILE)], capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise ParityError(f"ollama create: {process.stderr.strip()[-300:]}", fix="please report it with the Modelfile")
    try:
        prompts = [_request_prompt(name, messages) for messages in conversations]
    finally:
        subprocess.run(["ollama", "rm", name], capture_output=True, check=False)
    return None if None in prompts else [str(prompt) for prompt in prompts]


def _request_prompt(name: str, messages: Sequence[Message]) -> str | None:
    """Return the prompt that Ollama would send to the model, using its render-only debug option."""
    body = {"model": name, "messages": _as_json(messages), "stream": False, "_debug_render_only": True}
    request = urllib.request.Request(
        f"{server_url()}/api/chat", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with _opener.open(request, timeout=300) as response:
        prompt: str | None = json.load(response).get("_debug_info", {}).get("rendered_template")
    return prompt


def _model_name(name: str) -> str:
    """Return a valid model name for Ollama, derived from the run's."""
    valid = re.sub(r"[^a-z0-9_.-]", "-", Path(name).name.lower())
    return valid.strip("-_.") or "tuned"
