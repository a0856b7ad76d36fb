"""A chat template as Ollama has them (Go's text/template), found by rendering the Jinja one.

A prompt is taken apart at what is said in it. What can be put together again from the same pieces, for every one of
ten conversations, has a Go template; what cannot is refused. No family is known by name: ChatML as SmolLM2 and Qwen
write it, Llama 3, Mistral, Gemma and Phi 3 all fall apart this way.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from strop.data.rendering.render import Renderer
from strop.data.row_errors import RenderError
from strop.data.types import Message
from strop.errors import ModelError
from strop.export.template_strings import conversations

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
