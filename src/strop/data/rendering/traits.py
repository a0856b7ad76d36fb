"""What a chat template was found to do (prober.py finds it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strop.data.rendering.traits import InputFormat


@dataclass(frozen=True)
class TurnEnding:
    """How a turn ends: text that ends with `cut` gets `add` in its place, the last token of which is `stop`."""

    cut: str
    add: str
    stop: str
    how: str  # written: by the template; later: only where another turn follows; role: by that turn's own token; eos


@dataclass(frozen=True)
class Join:
    """Where a prompt that ends with `prompt` is no prefix of the training text: that has `head` there, then `drop`,
    and is written as the prompt, `insert`, and what comes after these. by_place: for what the template writes around
    turns, not for reasoning."""

    prompt: str
    head: str
    drop: str
    insert: str
    by_place: bool = False


@dataclass(frozen=True)
class Mode:
    """How a row is rendered. options: variables of the template. plain, thinking: joins of turns without and with
    reasoning. ending, call_ending: how turns end, and those with calls (None: as the others)."""

    options: dict[str, Any]
    ending: TurnEnding
    call_ending: TurnEnding | None
    plain: tuple[Join, ...] = ()
    thinking: tuple[Join, ...] = ()


@dataclass(frozen=True)
class Traits:
    """opening: how a prompt looks. texts: plain conversations as rendered, for the control tokens in them.
    needs_empty: whether rows without reasoning would be trained behind an opened block, or not at all, as the template
    is. bare, thinking: modes of rows without and with reasoning; empty: of rows without, where they get the block that
    the template writes when reasoning is off. call_fault: why a call is not shown. closes: what ends reasoning before
    an answer's text. marks: what reasoning stands between, where that is a pair such as <think> and </think>.
    """

    dialect: InputFormat
    opening: str
    texts: tuple[str, ...]
    system: bool
    tools: bool
    calls: bool
    call_fault: str
    parallel: bool
    reasoning: bool
    reasoning_beside_calls: bool
    reasoning_ends: tuple[str, ...]
    marks: tuple[tuple[str, str], ...]
    needs_empty: bool
    bare: Mode
    empty: Mode
    thinking: Mode

    @property
    def endings(self) -> list[TurnEnding]:
        modes = (self.bare, self.empty, self.thinking)
        found = [ending for mode in modes for ending in (mode.ending, mode.call_ending) if ending is not None]
        return list(dict.fromkeys(found))
