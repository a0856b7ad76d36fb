"""Implement `strop export ollama`: write a GGUF file and a Modelfile, and compare its prompts with those of training.

Ollama's chat templates are written in Go's text/template. To translate a Jinja template, a rendered prompt is split at
the message contents. If the pieces reproduce the prompts of ten conversations, they are combined to a Go template, else
the template is refused. This supports ChatML (SmolLM2, Qwen), Llama 3, Mistral, Gemma and Phi 3.

The result is tested by rendering prompts with a running Ollama, or else with a Go toolchain if one is installed.
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

from rich.console import Console
from rich.markup import escape

from strop.data.rendering.render import Renderer
from strop.data.row_errors import RenderError
from strop.data.types import Message
from strop.display.tables import Printed, print_notes
from strop.errors import ModelError, ParityError
from strop.exporting.gguf import Exported, export_gguf, print_checks
from strop.exporting.llama_cpp import make_sample_conversations
from strop.exporting.merge import TunedModel
from strop.runs.folder import check_new_output, exclusive_output, new_folder

MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"
CONTEXT_LENGTH = 4096  # Ollama's default is smaller, and it truncates prompts silently
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # Ollama runs on this machine: no proxy
# Messages whose contents are easy to find in a rendered prompt.
_MARKED_MESSAGES = [
    Message("system", "Qzsystemq"), Message("user", "Qzfirstq"), Message("assistant", "Qzanswerq"),
    Message("user", "Qzsecondq"),
]  # fmt: skip


@dataclass(frozen=True, repr=False)
class PreparedOllama(Printed):
    """A folder for `ollama create`."""

    out: Path
    exported: Exported
    rendered_by: str | None  # "ollama" or "go"; None if the prompts are untested
    prompts: int  # number of prompts that were tested
    commands: list[str]  # shell commands to use the folder
    notes: list[str]

    def _print(self, out: Console) -> None:
        print_prepared(self, out)

    def __repr__(self) -> str:
        return f"PreparedOllama({str(self.out)!r}, kind={self.exported.kind!r})"

    def as_json(self) -> dict[str, Any]:
        return {
            **self.exported.as_json(), "out": str(self.out), "files": sorted([MODEL_FILE, MODELFILE]),
            "template": {"rendered_by": self.rendered_by, "prompts_equal": self.prompts if self.rendered_by else None},
            "commands": self.commands, "notes": self.notes,
        }  # fmt: skip


def print_prepared(prepared: PreparedOllama, out: Console) -> None:
    print_checks(prepared.exported, out)
    if prepared.rendered_by is not None:
        out.print(f"[bold]prompts[/]  {prepared.prompts} of {prepared.prompts} equal ({prepared.rendered_by})")
    print_notes(prepared.notes, out)
    out.print(f"[bold]exported[/] {escape(str(prepared.out))}; now:")
    for command in prepared.commands:
        out.print(f"         {command}", markup=False)


def export_ollama(
    name: str,
    out: Path,
    *,
    kind: str | None = None,
    data: str | None = None,
    measure: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> PreparedOllama:
    """Write a folder for `ollama create`; see `strop.export`."""
    check_new_output(out)
    tuned = TunedModel.open(name)
    renderer = Renderer(tuned.load_tokenizer())
    pieces = TemplatePieces.split(renderer)
    system = tuned.system
    with exclusive_output(out), new_folder(out) as temp:
        options: Any = {"kind": kind, "data": data, "measure": measure, "progress": progress}
        exported = export_gguf(name, temp / MODEL_FILE, **options, has_modelfile=True)
        bos = str(renderer.tokenizer.bos_token or "") if exported.vocabulary.add_bos else ""
        template = pieces.without_bos(bos).to_go()  # the tokenizer adds bos
        (temp / MODELFILE).write_text(write_modelfile(template, renderer, system), encoding="utf-8")
        rendered_by, prompts, reason = _check_prompts(template, renderer, bos, system, temp)
    notes = list(exported.notes)
    if strips_messages(renderer):
        notes.append("the chat template strips white space around messages, which Ollama's cannot: send none")
    if drops_reasoning(renderer, pieces):
        what = "the chat template leaves out the reasoning of earlier answers, which Ollama's cannot"
        notes.append(f"{what}: send them without <think>...</think>")
    if renderer.chat.traits.tools:
        notes.append("tools are not in Ollama's template; the template in the GGUF file has them")
    if system is not None and '"""' in system:
        notes.append('the system prompt of the training rows contains """, which a Modelfile cannot: send it yourself')
    if rendered_by is None:
        notes.append(f"Ollama's prompts are untested: {reason}")
    model = _make_model_name(name)
    commands = [f"ollama create {model} -f {shlex.quote(str(out / MODELFILE))}", f"ollama run {model}"]
    exported = replace(exported, out=out / MODEL_FILE)  # the folder has its name now
    return PreparedOllama(out, exported, rendered_by, prompts, commands, notes)


def write_modelfile(template: str, renderer: Renderer, system: str | None) -> str:
    """Return a Modelfile for greedy decoding without a repeat penalty, as in strop's evaluation."""
    lines = [f"FROM ./{MODEL_FILE}", f'TEMPLATE """{template}"""']
    if system is not None and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in renderer.chat.stops]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {CONTEXT_LENGTH}"]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class TemplatePieces:
    """The text that a chat template writes around message contents."""

    start: str  # before the first user message, if there is no system prompt
    system: tuple[str, str] | None  # before and after a system prompt; None if the template does not support one
    last_user_end: str  # after the last user message; may start the reasoning of the answer
    user_end: str  # after the other user messages
    answer_end: str  # after an answer, up to the next user message

    @staticmethod
    def split(renderer: Renderer) -> TemplatePieces:
        """Split a template into pieces. Raises ModelError if they do not reproduce its prompts."""
        start, user_end, answer_end, last_user_end = _split_prompt(renderer, _MARKED_MESSAGES[1:])
        system = None
        if renderer.chat.traits.system:
            before, after, *rest = _split_prompt(renderer, _MARKED_MESSAGES)
            system = (before, after)
            if rest != [user_end, answer_end, last_user_end]:
                raise _translation_error("a system prompt changes the text after it")
        pieces = TemplatePieces(start, system, last_user_end, user_end, answer_end)
        for messages in make_sample_conversations(renderer.chat.traits.system):
            expected = renderer.chat.prompt(messages).text
            if pieces.render(messages) != expected:
                raise _translation_error(f"the text around turns varies, as in {expected!r}")
        return pieces

    def render(self, messages: Sequence[Message]) -> str:
        """Render the prompt for messages that end with a user message."""
        system = [message.content for message in messages if message.role == "system"]
        text = self.start if not system or self.system is None else self.system[0] + system[0] + self.system[1]
        for message in messages:
            if message.role == "user":
                text += message.content + (self.last_user_end if message is messages[-1] else self.user_end)
            elif message.role == "assistant":
                text += message.content + self.answer_end
        return text

    def without_bos(self, bos: str) -> TemplatePieces:
        """Return the pieces without a bos token at the start."""
        system = None if self.system is None else (self.system[0].removeprefix(bos), self.system[1])
        return replace(self, start=self.start.removeprefix(bos), system=system)

    def to_go(self) -> str:
        """Return the Go template. Text is written as quoted strings, which preserves white space."""
        start = _quote(self.start)
        if self.system is not None:
            with_system = f"{_quote(self.system[0])}{{{{ .System }}}}{_quote(self.system[1])}"
            start = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{start}{{{{ end }}}}"
        if_not_last = "{{- if gt (len (slice $.Messages $at)) 1 }}"
        user_end = _quote(self.last_user_end)
        if self.last_user_end != self.user_end:
            user_end = f"{if_not_last}{_quote(self.user_end)}{{{{ else }}}}{user_end}{{{{ end }}}}"
        return (
            f"{start}\n"
            "{{- range $at, $_ := .Messages }}\n"
            f'{{{{- if eq .Role "user" }}}}{{{{ .Content }}}}{user_end}\n'
            '{{- else if eq .Role "assistant" }}{{ .Content }}\n'
            f"{if_not_last}{_quote(self.answer_end)}{{{{ end }}}}\n"
            "{{- end }}{{ end }}"
        )


def _quote(text: str) -> str:
    """Return a Go template action that writes the text. JSON's escapes are valid in Go."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _split_prompt(renderer: Renderer, messages: Sequence[Message]) -> list[str]:
    """Split a rendered prompt at the contents of its messages."""
    try:
        text = renderer.chat.prompt(messages).text
    except RenderError as error:
        raise _translation_error(error.what) from error
    markers = "|".join(message.content for message in _MARKED_MESSAGES)
    if re.findall(markers, text) != [message.content for message in messages]:
        raise _translation_error("it reorders or omits messages")
    return re.split(markers, text)


def _translation_error(reason: str) -> ModelError:
    what = f"Ollama: this chat template cannot be translated into Ollama's: {reason}"
    return ModelError(what, fix="use `strop export gguf`: llama.cpp uses the template unchanged")


def strips_messages(renderer: Renderer) -> bool:
    """Return whether the chat template strips white space around messages."""
    return " Qz " not in renderer.chat.prompt([Message("user", " Qz ")]).text


def drops_reasoning(renderer: Renderer, pieces: TemplatePieces) -> bool:
    """Return whether the chat template leaves out the reasoning of earlier answers, as that of Qwen 3."""
    answer = Message("assistant", "<think>\nQrz\n</think>\n\nQsz")
    messages = [Message("user", "Qxz"), answer, Message("user", "Qyz")]
    return renderer.chat.prompt(messages).text != pieces.render(messages)


def _check_prompts(
    template: str, renderer: Renderer, bos: str, system: str | None, folder: Path
) -> tuple[str | None, int, str]:
    """Compare the prompts of ten conversations with those of training. Raises ParityError if one differs.

    Returns which program rendered them ("ollama", "go" or None), how many were compared, and why if none were.
    """
    conversations = make_sample_conversations(renderer.chat.traits.system)
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
        # Ollama adds the Modelfile's system prompt.
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
    request = {"template": template, "conversations": list(map(_to_json, conversations))}
    process = subprocess.run(
        ["go", "run", str(Path(__file__).with_name("render.go"))],
        input=json.dumps(request), capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if process.returncode:
        raise ModelError(f"Ollama: Go rejects the template: {process.stderr.strip()[:300]}", fix="please report it")
    return list(json.loads(process.stdout))


def _to_json(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def server_url() -> str:
    """Return the URL of the user's Ollama, reading OLLAMA_HOST as Ollama's client does."""
    address = os.environ.get("OLLAMA_HOST", "").strip(" \"'")
    parts = urlsplit(address if "://" in address else f"//{address}")
    default_port = {"http": 80, "https": 443}.get(parts.scheme, 11434)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname or "0.0.0.0", parts.hostname)
    if ":" in str(host):  # IPv6
        host = f"[{host}]"
    return f"{'https' if parts.scheme == 'https' else 'http'}://{host}:{parts.port or default_port}"


def _ollama_is_running() -> bool:
    """Return whether Ollama runs on this machine. Other machines are not used, as the model would be uploaded there."""
    try:
        if shutil.which("ollama") is None or urlsplit(server_url()).hostname not in ("127.0.0.1", "::1", "localhost"):
            return False
        with _opener.open(f"{server_url()}/api/version", timeout=2):
            return True
    except (OSError, http.client.HTTPException, ValueError):
        return False


def _render_with_ollama(folder: Path, conversations: Sequence[Sequence[Message]]) -> list[str] | None:
    """Render prompts with a temporary model in Ollama. Returns None if this version of Ollama cannot show prompts."""
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
    """Return the prompt that Ollama would send to the model, by its debug option `_debug_render_only`."""
    body = {"model": name, "messages": _to_json(messages), "stream": False, "_debug_render_only": True}
    request = urllib.request.Request(
        f"{server_url()}/api/chat", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with _opener.open(request, timeout=300) as response:
        prompt: str | None = json.load(response).get("_debug_info", {}).get("rendered_template")
    return prompt


def _make_model_name(name: str) -> str:
    """Convert the name of a run to a valid model name for Ollama."""
    valid = re.sub(r"[^a-z0-9_.-]", "-", Path(name).name.lower())
    return valid.strip("-_.") or "tuned"
