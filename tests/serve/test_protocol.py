"""Tokens as text: an answer that goes on with its prompt, and tokens told of one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from strop.engine.decode.sampling import Token
from strop.models.tokenizer import REPLACEMENT, TextStream, TokenBytes
from strop.serve.protocol import Writer
from tests.support.families import tokenizer

FAMILIES = ["chatml", "llama3", "gemma", "mistral"]  # the last has blanks as ▁, and bytes as <0xNN>
TEXT = "The quick fox é 🎈 jumps over"


def ids_of(family: str, text: str = TEXT) -> list[int]:
    ids: list[int] = tokenizer(family)(text, add_special_tokens=False)["input_ids"]
    return ids


def decoded(family: str, ids: list[int]) -> str:
    return str(tokenizer(family).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_goes_on_where_its_prompt_ends(family: str) -> None:
    ids = ids_of(family)
    assert decoded(family, ids) == TEXT
    for cut in range(len(ids)):
        if (prompt := decoded(family, ids[:cut])).endswith(REPLACEMENT):
            continue
        words = TextStream(tokenizer(family), (), ids[:cut])
        assert prompt + "".join(map(words.push, ids[cut:])) + words.end() == TEXT


def test_a_prompt_that_ends_within_a_character_loses_nothing_of_the_answer() -> None:
    ids = ids_of("mistral", "🎈jumps")
    for cut in (2, 3, 4):
        words = TextStream(tokenizer("mistral"), (), ids[:cut])
        assert ("".join(map(words.push, ids[cut:])) + words.end()).endswith("jumps")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_tokens_are_those_of_their_text(family: str) -> None:
    own = tokenizer(family)
    joined = b"".join(TokenBytes(own).of(token) for token in ids_of(family))
    assert joined == (" " if family == "mistral" else "").encode() + TEXT.encode()
    assert TokenBytes(own).of(own.eos_token_id).decode() == own.eos_token


def test_a_replacement_character_is_a_character() -> None:
    own = copy.deepcopy(tokenizer("chatml"))
    own.add_tokens([f"<{REPLACEMENT}>"])
    assert TokenBytes(own).of(len(own) - 1).decode() == f"<{REPLACEMENT}>"


def told(family: str, ids: list[int], prompt: list[int], likeliest: Any = ()) -> dict[str, Any]:
    """What a plain completion says of its tokens; told token by token it says the same."""
    own = tokenizer(family)
    tokens = [Token(token, -1.0, tuple(likeliest)) for token in ids]
    words = TextStream(own, (), prompt)
    pieces = [words.push(token) for token in ids]
    pieces[-1] += words.end()
    whole = Writer("m", own, prompt, chat=False, logprobs=True).whole("".join(pieces), tokens, "stop", {})
    writer = Writer("m", own, prompt, chat=False, logprobs=True)
    ends = [None] * (len(ids) - 1) + ["stop"]
    chunks = [writer.chunk(piece, [token], end) for piece, token, end in zip(pieces, tokens, ends, strict=True)]
    found: dict[str, Any] = whole["choices"][0]["logprobs"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert found == {key: [one for part in parts for one in part[key]] for key in found}
    return {**found, "text": whole["choices"][0]["text"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_offsets_point_into_the_text_that_was_given_out(family: str) -> None:
    hidden = tokenizer(family).eos_token_id
    ids = ids_of(family)
    found = told(family, [*ids[1:], hidden], ids[:1])
    text, offsets = found["text"], found["text_offset"]
    assert decoded(family, ids[:1]) + text == TEXT
    for name, offset in zip(found["tokens"][:-1], offsets, strict=False):
        if name.startswith("bytes:"):
            assert text[offset] in "é🎈"
        else:
            assert text[offset:].startswith(name)
    assert offsets[-1] == len(text)
    assert "".join(name for name in found["tokens"][:-1] if not name.startswith("bytes:")) == (
        text.replace("é", "").replace("🎈", "")
    )


def test_offsets_of_a_blank_and_a_part_of_a_character_in_one_token() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate([*letters, "Ġð"])}, [("Ġ", "ð")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    own = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = [Token(token) for token in own("a 🎈")["input_ids"]]
    found = Writer("m", own, [], chat=False, logprobs=True).whole("a 🎈", tokens, "stop", {})["choices"][0]["logprobs"]
    assert found["tokens"][:2] == ["a", "bytes:\\x20\\xf0"]
    assert found["text_offset"] == [0, 1, 2, 2, 2]


def test_a_stop_string_leaves_no_place_behind_the_text() -> None:
    own, ids = tokenizer("chatml"), ids_of("chatml", "one two")
    tokens = [Token(token) for token in ids]
    writer = Writer("m", own, [], chat=False, logprobs=True)
    offsets = writer.whole("one", tokens, "stop", {})["choices"][0]["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] == 3


def test_alternatives_that_are_parts_of_characters_stand_side_by_side() -> None:
    first, second = (ids_of("chatml", sign)[0] for sign in "éĀ")
    found = told("chatml", ids_of("chatml", "a"), [], [(first, -1.0), (second, -2.0)])
    assert found["top_logprobs"] == [{"bytes:\\xc3": -1.0, "bytes:\\xc4": -2.0}]
    chat = Writer("m", tokenizer("chatml"), [], chat=True, logprobs=True).whole("", [Token(first)], "stop", {})
    assert chat["choices"][0]["logprobs"]["content"] == [
        {"token": "bytes:\\xc3", "logprob": 0.0, "bytes": [0xC3], "top_logprobs": []}
    ]
