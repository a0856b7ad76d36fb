"""`strop export ollama`: a folder with the GGUF file and a Modelfile, and whether its prompts are the trained ones.

Compared with a real Ollama where one runs, else with Go's own template engine where a Go toolchain is installed; where
neither is, the result says that it is untested.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from strop.data.rendering.render import Renderer
from strop.data.row_errors import RenderError
from strop.data.types import Message
from strop.errors import FolderError, ModelError, ParityError
from strop.exporting.gguf import Exported, export_gguf
from strop.exporting.llama_cpp import conversations
from strop.models.adapters import adapter_folder, base_source, read_identity, with_tokenizer
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.runs.folder import exclusive_output, new_folder

MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"
CONTEXT = 4096  # Ollama's own default is smaller, and cuts prompts without a word
_local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
NOBODY = "neither a running ollama nor a Go toolchain is here"


@dataclass(frozen=True)
class Prepared:
    """exported: the GGUF file in the folder. rendered_by: ollama, go, or None (untested). prompts: equal, of ten."""

    out: Path
    exported: Exported
    rendered_by: str | None
    prompts: int
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
    say: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Makes the folder `out` for `ollama create`. The rest: as in export_gguf, whose errors it raises.

    Raises ModelError for a chat template that Ollama's cannot express, before any weights are read.
    """
    if out.exists():
        raise FolderError(f"{out}: already exists", fix="give --out a new folder")
    folder = adapter_folder(name)
    renderer = Renderer(load_tokenizer(locate(name) if folder is None else with_tokenizer(folder, base_source(folder))))
    pieces = Pieces.of(renderer)
    system = read_identity(folder).get("system") if folder is not None else None
    with exclusive_output(out), new_folder(out) as temp:
        exported = export_gguf(name, temp / MODEL_FILE, kind=kind, data=data, measure=measure, say=say)
        bos = str(renderer.tokenizer.bos_token or "") if exported.vocabulary.add_bos else ""
        template = pieces.without_bos(bos).go()
        (temp / MODELFILE).write_text(modelfile(template, renderer, system), encoding="utf-8")
        rendered_by, prompts, why_not = _check(template, renderer, bos, system, temp)
    notes = list(exported.notes)
    if trims(renderer):
        notes.append("the trained template strips white space around a message, which Ollama's cannot: send none")
    if renderer.chat.supports_tools:
        notes.append("tools are not in Ollama's template; the GGUF file's own has them")
    if system is not None and '"""' in system:
        notes.append("the system prompt of the training rows holds three quotes, which a Modelfile cannot: send it")
    if rendered_by is None:
        notes.append(f"Ollama's prompts are untested: {why_not}")
    commands = [
        f"ollama create {_model_name(name)} -f {shlex.quote(str(out / MODELFILE))}",
        f"ollama run {_model_name(name)}",
    ]
    return Prepared(out, exported, rendered_by, prompts, commands, notes)


def modelfile(template: str, renderer: Renderer, system: str | None) -> str:
    """The Modelfile; answers as strop evaluates them: greedy, without a repeat penalty."""
    lines = [f"FROM ./{MODEL_FILE}", f'TEMPLATE """{template}"""']
    if system is not None and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in renderer.chat.stops]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {CONTEXT}"]
    return "\n".join(lines) + "\n"


def _check(
    template: str, renderer: Renderer, bos: str, system: str | None, folder: Path
) -> tuple[str | None, int, str]:
    """(by what the ten prompts were rendered, how many, else why they were not).

    Raises ParityError where one is not the trained one.
    """
    asked = conversations(renderer.supports_system)
    by, told, why_not = "ollama", None, NOBODY
    if _ollama_runs():
        try:
            told, why_not = _rendered_by_ollama(folder, asked), "this ollama is too old to show them"
        except (OSError, http.client.HTTPException, ValueError) as error:
            why_not = f"ollama did not answer: {error}"
    if told is None and go_is_installed():
        by, told = "go", rendered_by_go(template, asked)
    if told is None:
        return None, 0, why_not
    for messages, prompt in zip(asked, told, strict=True):
        adds = by == "ollama" and system is not None and messages[0].role != "system"  # the Modelfile's own
        trained = renderer.chat.prompt([Message("system", str(system)), *messages] if adds else messages).text
        if bos + prompt != trained:
            raise ParityError(f"Ollama's prompt is {prompt!r}, trained with {trained!r}", fix="please report it")
    return by, len(told), ""


def server() -> str:
    """The URL of the user's Ollama: OLLAMA_HOST, read as its own client reads it."""
    given = os.environ.get("OLLAMA_HOST", "").strip(" \"'")
    parts = urlsplit(given if "://" in given else f"//{given}")
    default = {"http": 80, "https": 443}.get(parts.scheme, 11434)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname or "0.0.0.0", parts.hostname)
    shown = f"[{host}]" if ":" in str(host) else host
    return f"{'https' if parts.scheme == 'https' else 'http'}://{shown}:{parts.port or default}"


def _ollama_runs() -> bool:
    """On this machine: no other is sent a model without being asked to."""
    try:
        if shutil.which("ollama") is None or urlsplit(server()).hostname not in ("127.0.0.1", "::1", "localhost"):
            return False
        with _local.open(f"{server()}/api/version", timeout=2):
            return True
    except (OSError, http.client.HTTPException, ValueError):
        return False


def _rendered_by_ollama(folder: Path, asked: Sequence[Sequence[Message]]) -> list[str] | None:
    """The prompts of a real Ollama, which is given the folder under a name of its own, and forgets it after.

    None where that Ollama is too old to show them.
    """
    name = f"strop-check-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(
        ["ollama", "create", name, "-f", str(folder / MODELFILE)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise ParityError(f"ollama create: {made.stderr.strip()[-300:]}", fix="please report it with the Modelfile")
    try:
        told = [_ask(name, messages) for messages in asked]
    finally:
        subprocess.run(["ollama", "rm", name], capture_output=True, check=False)
    shown = [prompt for prompt in told if prompt is not None]
    return shown if len(shown) == len(told) else None


def _ask(name: str, messages: Sequence[Message]) -> str | None:
    """What Ollama would send to the model (its debug option renders only)."""
    said = [{"role": message.role, "content": message.content} for message in messages]
    body = json.dumps({"model": name, "messages": said, "stream": False, "_debug_render_only": True}).encode()
    request = urllib.request.Request(f"{server()}/api/chat", body, {"Content-Type": "application/json"})
    with _local.open(request, timeout=300) as answer:
        told = json.load(answer)
    prompt: str | None = told.get("_debug_info", {}).get("rendered_template")
    return prompt


def _model_name(name: str) -> str:
    """A name that Ollama takes, from the run's."""
    plain = (sign if sign.isascii() and (sign.isalnum() or sign in "-_.") else "-" for sign in Path(name).name.lower())
    kept = "".join(plain)
    return kept.strip("-_.") or "tuned"


_SAID = {"system": "Qzsystemq", "user": "Qzfirstq", "assistant": "Qzanswerq", "again": "Qzsecondq"}


@dataclass(frozen=True)
class Pieces:
    """What a template writes around what is said. system: (before, after) a system prompt, None where it has none.

    asked: after a user turn that is to be answered; given: after one whose answer follows. They differ where a prompt
    writes a block of reasoning that a given answer does not have.
    """

    start: str
    system: tuple[str, str] | None
    asked: str
    given: str
    answer_end: str  # and what opens the next user turn

    @staticmethod
    def of(renderer: Renderer) -> Pieces:
        """Raises ModelError for a template that is not made of such pieces."""
        user, answer, again = (
            Message("user", _SAID["user"]),
            Message("assistant", _SAID["assistant"]),
            Message("user", _SAID["again"]),
        )
        turns = [user, answer, again]
        start, given, answer_end, asked = _apart(renderer, turns)
        system = None
        if renderer.supports_system:
            before, after, *rest = _apart(renderer, [Message("system", _SAID["system"]), *turns])
            system = (before, after)
            if rest != [given, answer_end, asked]:
                raise _refused("a system prompt changes what comes after it")
        pieces = Pieces(start, system, asked, given, answer_end)
        for messages in conversations(renderer.supports_system):
            if pieces.prompt(messages) != renderer.chat.prompt(messages).text:
                raise _refused(f"it is not the same around every turn, as in {renderer.chat.prompt(messages).text!r}")
        return pieces

    def prompt(self, messages: Sequence[Message]) -> str:
        """The prompt for messages that end with a user turn."""
        told = [message.content for message in messages if message.role == "system"]
        text = self.start if not told or self.system is None else self.system[0] + told[0] + self.system[1]
        for message in messages:
            if message.role == "user":
                text += message.content + (self.asked if message is messages[-1] else self.given)
            elif message.role == "assistant":
                text += message.content + self.answer_end
        return text

    def without_bos(self, bos: str) -> Pieces:
        """For a tokenizer that puts the bos token there itself."""
        system = None if self.system is None else (self.system[0].removeprefix(bos), self.system[1])
        return Pieces(self.start.removeprefix(bos), system, self.asked, self.given, self.answer_end)

    def go(self) -> str:
        """The Go template. Literal text is quoted, so that no white space is lost."""
        start = _text(self.start)
        if self.system is not None:
            with_system = f"{_text(self.system[0])}{{{{ .System }}}}{_text(self.system[1])}"
            start = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{start}{{{{ end }}}}"
        more = "{{- if gt (len (slice $.Messages $at)) 1 }}"  # do other messages follow?
        after = _text(self.asked)
        if self.asked != self.given:
            after = f"{more}{_text(self.given)}{{{{ else }}}}{after}{{{{ end }}}}"
        return (
            f"{start}\n"
            "{{- range $at, $_ := .Messages }}\n"
            f'{{{{- if eq .Role "user" }}}}{{{{ .Content }}}}{after}\n'
            '{{- else if eq .Role "assistant" }}{{ .Content }}\n'
            f"{more}{_text(self.answer_end)}{{{{ end }}}}\n"
            "{{- end }}{{ end }}"
        )


def _text(text: str) -> str:
    """A literal as an action; JSON's escapes are Go's."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _apart(renderer: Renderer, messages: Sequence[Message]) -> list[str]:
    """A rendered prompt without what is said: one piece more than messages."""
    try:
        text = renderer.chat.prompt(messages).text
    except RenderError as fault:
        raise _refused(str(fault)) from fault
    found = re.split("|".join(_SAID.values()), text)
    said = re.findall("|".join(_SAID.values()), text)
    if said != [message.content for message in messages]:
        raise _refused("it shows messages in another order, or not all of them")
    return found


def _refused(why: str) -> ModelError:
    return ModelError(
        f"Ollama: this chat template has no translation into Ollama's: {why}",
        fix="use strop export gguf: llama.cpp takes the template as it is",
    )


def trims(renderer: Renderer) -> bool:
    """Does the template strip white space around a message? Ollama's templates cannot."""
    return " Qz " not in renderer.chat.prompt([Message("user", " Qz ")]).text


def go_is_installed() -> bool:
    return shutil.which("go") is not None


def rendered_by_go(template: str, asked: Sequence[Sequence[Message]]) -> list[str]:
    """The prompts that Go's text/template makes; needs a Go toolchain. Raises ModelError for a bad template."""
    said = [[{"role": message.role, "content": message.content} for message in messages] for messages in asked]
    done = subprocess.run(
        ["go", "run", str(Path(__file__).with_name("render.go"))],
        input=json.dumps({"template": template, "conversations": said}),
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if done.returncode:
        raise ModelError(f"Ollama: Go refuses the template: {done.stderr.strip()[:300]}", fix="please report it")
    return list(json.loads(done.stdout))
