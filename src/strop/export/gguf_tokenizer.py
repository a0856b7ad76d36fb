"""The tokenizer in a GGUF file: carried over from the GGUF that the base came from, else made from tokenizer.json.

llama.cpp knows pre-tokenizers by name only. The name is found from what the tokenizer does, pattern by pattern; one
that is not known here is refused: under a wrong name the file loads, answers, and cuts some words differently.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import gguf

from strop.data.rendering.render import Renderer
from strop.data.rendering.template_source import adds_bos
from strop.errors import ModelError
from strop.models.source import Source

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SLASHED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# (steps before byte level, does byte level split by GPT-2's pattern, are known words kept whole) -> llama.cpp's name
PRE_TOKENIZERS = {
    ((), True, False): "gpt-2",
    (("digits",), True, False): "smollm",
    ((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",), False, True): "llama-bpe",
    ((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",), False, False): "dbrx",  # Phi-4
    ((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}",), False, False): "qwen2",
    ((rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED_REST}",), False, True): "tekken",  # Mistral Nemo
    (
        (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED_REST}",),
        False,
        False,
    ): "gpt-4o",  # Phi-4 mini
}
# llama.cpp's own patterns for these leave combining marks out: Devanagari and Thai come out otherwise (10 of 200)
APPROXIMATE = ("tekken", "gpt-4o")


@dataclass(frozen=True)
class Vocabulary:
    """model: gpt2 (byte-level BPE) or llama (SentencePiece's). carried: taken from the base's own GGUF.

    plain_text: is text outside a chat prompt tokenized as the tokenizer does it? eos, eot, bos: ids, or None.
    """

    carried: bool
    entries: dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]
    template: str | None
    bos: int | None
    eos: int
    eot: int
    add_bos: bool
    plain_text: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Is every string to be tokenized as the tokenizer does? A GGUF's own vocabulary is as good as it was."""
        return not self.carried and self.entries["tokenizer.ggml.pre"][0] not in APPROXIMATE

    def write(self, writer: gguf.GGUFWriter) -> None:
        for key, (value, kind, inner) in self.entries.items():
            writer.add_key_value(key, value, kind, inner)


def vocabulary(source: Source, renderer: Renderer, size: int) -> Vocabulary:
    """The vocabulary of a model with `size` embedding rows. Raises ModelError where it cannot be told exactly."""
    tokenizer = renderer.tokenizer
    carried = source.kind == "gguf"
    entries = _carried(source) if carried else _rebuilt(tokenizer, renderer, size)
    plain, notes = (True, []) if carried else _oddities(tokenizer, entries)
    tokens = entries["tokenizer.ggml.tokens"][0]
    if len(tokens) < len(tokenizer) or (carried and len(tokens) != size):
        what = f"{source.name}: {len(tokenizer)} tokens in the tokenizer, {len(tokens)} in its GGUF"
        raise ModelError(what, fix="use strop merge")
    if not renderer.stop_ids:
        raise ModelError(f"{source.name}: its tokenizer has no token that ends a text", fix="use strop merge")
    # llama.cpp stops at either; the stop token of the training text comes first, the tokenizer's own end after it
    eot = renderer.stop_ids[0]
    eos = eot if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    more = [stop for stop in renderer.stop_ids if stop not in (eot, eos)]
    ids: dict[str, int | None] = {
        "bos": tokenizer.bos_token_id, "eos": eos, "eot": eot, "eom": more[0] if more else None,
        "padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id,
    }  # fmt: skip
    for name, token in ids.items():
        if token is not None:
            entries[f"tokenizer.ggml.{name}_token_id"] = (int(token), gguf.GGUFValueType.UINT32, None)
    template = renderer.template
    add_bos = adds_bos(tokenizer)
    if template is not None:
        entries["tokenizer.chat_template"] = (template, gguf.GGUFValueType.STRING, None)
        # a chat prompt has one bos token: the one its template writes
        add_bos = add_bos and renderer.chat.opening.startswith(tokenizer.bos_token)
    entries["tokenizer.ggml.add_bos_token"] = (add_bos, gguf.GGUFValueType.BOOL, None)
    return Vocabulary(carried, entries, template, ids["bos"], eos, eot, add_bos, plain, notes)


def _carried(source: Source) -> dict[str, Any]:
    entries = {}
    for key, found in gguf.GGUFReader(source.path).fields.items():
        if key.startswith("tokenizer."):
            inner = found.types[-1] if found.types[0] == gguf.GGUFValueType.ARRAY else None
            entries[key] = (found.contents(), found.types[0], inner)
    return entries


def _rebuilt(tokenizer: Any, renderer: Renderer, size: int) -> dict[str, Any]:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ModelError(f"GGUF: no exporter for {model['type']} tokenizers", fix="use strop merge")
    pieces = dict(model["vocab"])
    added = {token["id"]: token for token in state["added_tokens"]}
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    sentencepiece = bool(model["byte_fallback"])
    if not sentencepiece and not merges:
        raise ModelError("GGUF: llama.cpp has no byte-level tokenizer without merges", fix="use strop merge")
    if sentencepiece and model.get("ignore_merges"):
        raise ModelError("GGUF: llama.cpp has no SentencePiece tokenizer that keeps known words", fix="use strop merge")
    if sentencepiece:
        _check_blanks(state)
    texts, kinds = [f"[PAD{n}]" for n in range(size)], [gguf.TokenType.UNUSED] * size
    for text, token in pieces.items():
        texts[token], kinds[token] = text, gguf.TokenType.NORMAL
        if sentencepiece and len(text) == 6 and text.startswith("<0x"):
            kinds[token] = gguf.TokenType.BYTE
    for token, known in added.items():
        control = known["special"] or token in renderer.stop_ids
        kinds[token] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
        texts[token] = known["content"] if control else known["content"].replace("▁", " ")
    if sentencepiece and model["unk_token"] in pieces:
        kinds[pieces[model["unk_token"]]] = gguf.TokenType.UNKNOWN
    string, array = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": ("llama" if sentencepiece else "gpt2", string, None),
        "tokenizer.ggml.pre": ("default" if sentencepiece else pre_tokenizer(state), string, None),
        "tokenizer.ggml.tokens": (texts, array, string),
        "tokenizer.ggml.token_type": ([int(kind) for kind in kinds], array, gguf.GGUFValueType.INT32),
    }
    if sentencepiece:
        # llama.cpp joins the pair whose whole has the highest score; the first merges come first
        scores = [0.0] * size
        for rank, (left, right) in enumerate(merges):
            token = pieces[left + right]
            scores[token] = scores[token] or -float(rank + 1)
        entries["tokenizer.ggml.scores"] = (scores, array, gguf.GGUFValueType.FLOAT32)
        prefix = _starts_with_blank(tokenizer) and _starts_with_blank(tokenizer, after=_a_control_token(tokenizer))
        entries["tokenizer.ggml.add_space_prefix"] = (prefix, gguf.GGUFValueType.BOOL, None)
    else:
        entries["tokenizer.ggml.merges"] = ([" ".join(merge) for merge in merges], array, string)
    return entries


def pre_tokenizer(state: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json. Raises ModelError for an unknown one."""
    found = state["pre_tokenizer"] or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    level = steps[-1]
    described = tuple(_step(step) for step in steps[:-1])
    key = (described, bool(level.get("use_regex", True)), bool(state["model"].get("ignore_merges", False)))
    known = level.get("type") == "ByteLevel" and not level.get("add_prefix_space") and key in PRE_TOKENIZERS
    if not known or (state["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _unknown(state["normalizer"], found)
    return PRE_TOKENIZERS[key]


def _check_blanks(state: dict[str, Any]) -> None:
    """Raises ModelError where a SentencePiece tokenizer does more to a text than to make its blanks ▁ (Llama 2, Phi 3
    and Gemma in their normalizer, Mistral by Metaspace): llama.cpp has nothing else."""
    normalizer, pre = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer] if normalizer else []
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    others = [step for step in steps if step != blanks]
    if blanks in steps:  # a split at blanks comes too late then: there are none
        known = not pre or (pre["type"] == "Split" and pre["pattern"] == {"String": " "} and not pre["invert"])
        known = known and others in ([], [{"type": "Prepend", "prepend": "▁"}])
    else:
        known = not steps and pre.get("type") == "Metaspace" and pre["replacement"] == "▁" and not pre["split"]
    if not known:
        raise _unknown(normalizer, pre)


def _unknown(normalizer: Any, pre_tokenizer: Any) -> ModelError:
    return ModelError(
        "GGUF: llama.cpp knows no such pre-tokenizer, or strop does not know its name for it: "
        f"{json.dumps([normalizer, pre_tokenizer], ensure_ascii=False)[:300]}",
        fix="use strop merge, or please report the model's name",
    )


def _step(step: dict[str, Any]) -> str:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "digits"
    if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def _oddities(tokenizer: Any, entries: dict[str, Any]) -> tuple[bool, list[str]]:
    """(is plain text tokenized alike, what the user should know)"""
    state, notes, plain = json.loads(tokenizer.backend_tokenizer.to_str()), [], True
    if (state["normalizer"] or {}).get("type") == "NFC":
        notes.append("llama.cpp does not compose accents (Unicode NFC): decomposed text becomes other tokens there")
    prefix = entries.get("tokenizer.ggml.add_space_prefix")
    if prefix is not None and _starts_with_blank(tokenizer) and not prefix[0]:
        plain = False  # llama.cpp has this blank after every control token or never; a chat prompt has none
        notes.append("plain completions start without the blank that the tokenizer puts first; chat prompts are exact")
    return plain, notes


def _starts_with_blank(tokenizer: Any, after: str = "") -> bool:
    tokens = tokenizer.backend_tokenizer.encode(f"{after}a", add_special_tokens=False).tokens
    return bool(tokens[1 if after else 0].startswith("▁"))


def _a_control_token(tokenizer: Any) -> str:
    return next(str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special and not t.rstrip)
