"""Write the tokenizer of a GGUF file: copied from the base's GGUF file, or else built from tokenizer.json.

A GGUF file identifies the pre-tokenizer by a name from llama.cpp. The name is looked up by the tokenizer's split
patterns. Unknown patterns are refused, because with a wrong name llama.cpp would split some words differently.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import gguf

from strop.data.rendering.render import Renderer
from strop.data.rendering.template_source import adds_bos
from strop.errors import ModelError
from strop.models.families.gguf_header import GgufReader
from strop.models.source import Source

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SLASHED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_GPT_4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED_REST}"

# (steps before ByteLevel, ByteLevel's use_regex, the model's ignore_merges) -> llama.cpp's name
PRE_TOKENIZERS = {
    ((), True, False): "gpt-2",
    (("digits",), True, False): "smollm",
    ((_LLAMA_3,), False, True): "llama-bpe",
    ((_LLAMA_3,), False, False): "dbrx",  # Phi-4
    ((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}",), False, False): "qwen2",
    ((rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED_REST}",), False, True): "tekken",  # Mistral Nemo
    ((_GPT_4O,), False, False): "gpt-4o",  # Phi-4 mini
}
# llama.cpp's patterns for these ignore combining marks: 10 of 200 sample strings (Devanagari, Thai) split differently.
APPROXIMATE = ("tekken", "gpt-4o")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's entries in a GGUF file."""

    exact: bool  # whether llama.cpp should tokenize every string exactly as the tokenizer does
    entries: dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]  # value, type, type of array elements
    bos: int | None
    eos: int
    add_bos: bool  # whether llama.cpp adds bos before a text
    plain_text: bool = True  # whether text outside chat prompts is tokenized exactly
    notes: list[str] = field(default_factory=list)  # messages for the user

    def write(self, writer: gguf.GGUFWriter) -> None:
        for key, (value, kind, inner) in self.entries.items():
            writer.add_key_value(key, value, kind, inner)


def build_vocabulary(source: Source, renderer: Renderer, size: int) -> Vocabulary:
    """Return the vocabulary of a model with `size` embedding rows. Raises ModelError for unsupported tokenizers."""
    tokenizer = renderer.tokenizer
    copied = source.kind == "gguf"
    entries = _copy_entries(source) if copied else _build_entries(tokenizer, renderer, size)
    plain_text, notes = (True, []) if copied else _find_differences(tokenizer, entries)
    tokens = entries["tokenizer.ggml.tokens"][0]
    if len(tokens) < len(tokenizer) or (copied and len(tokens) != size):
        what = f"{source.name}: {len(tokenizer)} tokens in the tokenizer, {len(tokens)} in its GGUF"
        raise ModelError(what, fix="use `strop merge`")
    if not renderer.stop_ids:
        raise ModelError(f"{source.name}: its tokenizer has no token that ends a text", fix="use `strop merge`")
    # llama.cpp stops at eot, eos and eom. eot is the token that ends an answer in training.
    eot = renderer.stop_ids[0]
    eos = eot if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    other_stops = [stop for stop in renderer.stop_ids if stop not in (eot, eos)]
    ids: dict[str, int | None] = {
        "bos": tokenizer.bos_token_id, "eos": eos, "eot": eot, "eom": other_stops[0] if other_stops else None,
        "padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id,
    }  # fmt: skip
    for name, token in ids.items():
        if token is not None:
            entries[f"tokenizer.ggml.{name}_token_id"] = (int(token), gguf.GGUFValueType.UINT32, None)
    template = renderer.template
    add_bos = adds_bos(tokenizer)
    if template is not None:
        entries["tokenizer.chat_template"] = (template, gguf.GGUFValueType.STRING, None)
        # With add_bos, llama.cpp would add bos to chat prompts too, so the template must write it.
        add_bos = add_bos and renderer.chat.traits.opening.startswith(tokenizer.bos_token)
    entries["tokenizer.ggml.add_bos_token"] = (add_bos, gguf.GGUFValueType.BOOL, None)
    exact = not copied and entries["tokenizer.ggml.pre"][0] not in APPROXIMATE
    return Vocabulary(exact, entries, ids["bos"], eos, add_bos, plain_text, notes)


def _copy_entries(source: Source) -> dict[str, Any]:
    entries = {}
    for key, entry in GgufReader(source.path).fields.items():
        if key.startswith("tokenizer."):
            inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            entries[key] = (entry.contents(), entry.types[0], inner)
    return entries


def _build_entries(tokenizer: Any, renderer: Renderer, size: int) -> dict[str, Any]:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ModelError(f"GGUF: {model['type']} tokenizers are not supported", fix="use `strop merge`")
    pieces = dict(model["vocab"])
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    is_sentencepiece = bool(model["byte_fallback"])
    if not is_sentencepiece and not merges:
        raise ModelError("GGUF: llama.cpp has no byte-level tokenizer without merges", fix="use `strop merge`")
    if is_sentencepiece and model.get("ignore_merges"):
        what = "GGUF: llama.cpp has no SentencePiece tokenizer that encodes a known word as one token (ignore_merges)"
        raise ModelError(what, fix="use `strop merge`")
    if is_sentencepiece:
        _check_sentencepiece(state)
    texts, types = [f"[PAD{n}]" for n in range(size)], [gguf.TokenType.UNUSED] * size
    for text, token in pieces.items():
        texts[token], types[token] = text, gguf.TokenType.NORMAL
        if is_sentencepiece and len(text) == 6 and text.startswith("<0x"):
            types[token] = gguf.TokenType.BYTE
    for added in state["added_tokens"]:
        token, is_control = added["id"], added["special"] or added["id"] in renderer.stop_ids
        types[token] = gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED
        texts[token] = added["content"] if is_control else added["content"].replace("▁", " ")
    if is_sentencepiece and model["unk_token"] in pieces:
        types[pieces[model["unk_token"]]] = gguf.TokenType.UNKNOWN
    string, array = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": ("llama" if is_sentencepiece else "gpt2", string, None),
        "tokenizer.ggml.pre": ("default" if is_sentencepiece else find_pre_tokenizer(state), string, None),
        "tokenizer.ggml.tokens": (texts, array, string),
        "tokenizer.ggml.token_type": ([int(token_type) for token_type in types], array, gguf.GGUFValueType.INT32),
    }
    if is_sentencepiece:
        # llama.cpp merges the pair with the highest score first, so earlier merges get higher scores.
        scores = [0.0] * size
        for rank, (left, right) in enumerate(merges):
            token = pieces[left + right]
            scores[token] = scores[token] or -float(rank + 1)
        entries["tokenizer.ggml.scores"] = (scores, array, gguf.GGUFValueType.FLOAT32)
        added_tokens = tokenizer.added_tokens_decoder.values()
        control_token = next((str(token.content) for token in added_tokens if token.special and not token.rstrip), "")
        prefix = _adds_space(tokenizer) and _adds_space(tokenizer, after=control_token)
        entries["tokenizer.ggml.add_space_prefix"] = (prefix, gguf.GGUFValueType.BOOL, None)
    else:
        entries["tokenizer.ggml.merges"] = ([" ".join(merge) for merge in merges], array, string)
    return entries


def find_pre_tokenizer(state: dict[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json, or raise ModelError."""
    pre_tokenizer = state["pre_tokenizer"] or {}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    last = steps[-1]
    ignore_merges = bool(state["model"].get("ignore_merges", False))
    key = (tuple(map(_describe_step, steps[:-1])), bool(last.get("use_regex", True)), ignore_merges)
    supported = last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and key in PRE_TOKENIZERS
    if not supported or (state["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _pre_tokenizer_error(state["normalizer"], pre_tokenizer)
    return PRE_TOKENIZERS[key]


def _check_sentencepiece(state: dict[str, Any]) -> None:
    """Raise ModelError if a SentencePiece tokenizer has other steps than replacing spaces by ▁.

    Llama 2, Phi 3 and Gemma replace spaces in the normalizer, Mistral in the Metaspace pre-tokenizer.
    """
    normalizer, pre = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer] if normalizer else []
    replace_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if replace_spaces in steps:
        other_steps = [step for step in steps if step != replace_spaces]
        # A split at spaces has no effect, as there are none left.
        supported = not pre or (pre["type"] == "Split" and pre["pattern"] == {"String": " "} and not pre["invert"])
        supported = supported and other_steps in ([], [{"type": "Prepend", "prepend": "▁"}])
    else:
        supported = not steps and pre.get("type") == "Metaspace" and pre["replacement"] == "▁" and not pre["split"]
    if not supported:
        raise _pre_tokenizer_error(normalizer, pre)


def _pre_tokenizer_error(normalizer: Any, pre_tokenizer: Any) -> ModelError:
    details = json.dumps([normalizer, pre_tokenizer], ensure_ascii=False)[:300]
    return ModelError(
        f"GGUF: unknown pre-tokenizer, which llama.cpp may not support: {details}",
        fix="use `strop merge`, or please report the model's name",
    )


def _describe_step(step: dict[str, Any]) -> str:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "digits"
    if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def _find_differences(tokenizer: Any, entries: dict[str, Any]) -> tuple[bool, list[str]]:
    """Return whether llama.cpp tokenizes plain text exactly, and notes for the user on differences."""
    state, notes, plain_text = json.loads(tokenizer.backend_tokenizer.to_str()), [], True
    if (state["normalizer"] or {}).get("type") == "NFC":
        notes.append("llama.cpp does not compose accents (Unicode NFC): decomposed text gets other tokens")
    prefix = entries.get("tokenizer.ggml.add_space_prefix")
    if prefix is not None and _adds_space(tokenizer) and not prefix[0]:
        plain_text = False  # llama.cpp adds the space after every control token or never, but chat prompts have none
        notes.append("plain completions start without the space that the tokenizer adds; chat prompts are exact")
    return plain_text, notes


def _adds_space(tokenizer: Any, after: str = "") -> bool:
    tokens = tokenizer.backend_tokenizer.encode(f"{after}a", add_special_tokens=False).tokens
    return bool(tokens[1 if after else 0].startswith("▁"))
