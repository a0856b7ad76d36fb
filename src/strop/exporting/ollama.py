"""`strop export ollama`: a folder with the GGUF file and a Modelfile, and whether its prompts are the trained ones.

Compared with a real Ollama where one runs, else with Go's own template engine where a Go toolchain is installed; where
neither is, the result says that it is untested.
"""

from __future__ import annotations

import http.client
import json
import os
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
from strop.data.types import Message
from strop.errors import FolderError, ParityError
from strop.exporting.gguf import Exported, export_gguf
from strop.exporting.go_template import Pieces, go_is_installed, rendered_by_go, trims
from strop.exporting.template_strings import conversations
from strop.models.adapters import adapter_folder, base_source, read_identity, tokenizer_source
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
    renderer = Renderer(
        load_tokenizer(locate(name) if folder is None else tokenizer_source(folder, base_source(folder)))
    )
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
    if renderer.chat.traits.tools:
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
