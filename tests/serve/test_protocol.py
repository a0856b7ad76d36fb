"""Text and log-probabilities of tokens in responses: detokenization, bytes and offsets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from strop.engine.decode.sampling import Token
from strop.models.tokenizer import REPLACEMENT, TextStream, TokenBytes
from strop.serve.protocol import ResponseWriter
from tests.support.families import tokenizer

FAMILIES = ["chatml", "llama3", "gemma", "mistral"]  # the last has spaces as ▁ and bytes as <0xNN>
TEXT = "The quick fox é 🎈 jumps over"


def ids_of(family: str, text: str = TEXT) -> list[int]:
    ids: list[int] = tokenizer(family)(text, add_special_tokens=False)["input_ids"]
    return ids


def decoded(family: str, ids: list[int]) -> str:
    return str(tokenizer(family).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_completion_text_continues_its_prompt(family: str) -> None:
    ids = ids_of(family)
    assert decoded(family, ids) == TEXT
    for cut in range(len(ids)):
        if (prompt := decoded(family, ids[:cut])).endswith(REPLACEMENT):
            continue
        words = TextStream(tokenizer(family), (), ids[:cut])
        assert prompt + "".join(map(words.push, ids[cut:])) + words.end() == TEXT


def test_prompt_that_ends_inside_a_character_loses_no_text() -> None:
    ids = ids_of("mistral", "🎈jumps")
    for cut in (2, 3, 4):
        words = TextStream(tokenizer("mistral"), (), ids[:cut])
        assert ("".join(map(words.push, ids[cut:])) + words.end()).endswith("jumps")


@pytest.mark.parametrize("family", FAMILIES)
def test_token_bytes_join_to_the_text(family: str) -> None:
    own = tokenizer(family)
    joined = b"".join(TokenBytes(own).decode(token) for token in ids_of(family))
    assert joined == (" " if family == "mistral" else "").encode() + TEXT.encode()
    assert TokenBytes(own).decode(own.eos_token_id).decode() == own.eos_token


def test_token_with_a_replacement_character_keeps_it() -> None:
    own = copy.deepcopy(tokenizer("chatml"))
    own.add_tokens([f"<{REPLACEMENT}>"])
    assert TokenBytes(own).decode(len(own) - 1).decode() == f"<{REPLACEMENT}>"


def logprobs_of(family: str, ids: list[int], prompt: list[int], top_logprobs: Any = ()) -> dict[str, Any]:
    """Return the logprobs of a plain completion, after a check that the streamed ones are equal."""
    own = tokenizer(family)
    tokens = [Token(token, -1.0, tuple(top_logprobs)) for token in ids]
    words = TextStream(own, (), prompt)
    pieces = [words.push(token) for token in ids]
    pieces[-1] += words.end()
    whole = ResponseWriter("m", own, prompt, chat=False, logprobs=True).response("".join(pieces), tokens, "stop", {})
    writer = ResponseWriter("m", own, prompt, chat=False, logprobs=True)
    ends = [None] * (len(ids) - 1) + ["stop"]
    chunks = [writer.chunk(piece, [token], end) for piece, token, end in zip(pieces, tokens, ends, strict=True)]
    logprobs: dict[str, Any] = whole["choices"][0]["logprobs"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert logprobs == {key: [value for part in parts for value in part[key]] for key in logprobs}
    return {**logprobs, "text": whole["choices"][0]["text"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_text_offsets_point_to_the_tokens(family: str) -> None:
    hidden = tokenizer(family).eos_token_id
    ids = ids_of(family)
    logprobs = logprobs_of(family, [*ids[1:], hidden], ids[:1])
    text, offsets = logprobs["text"], logprobs["text_offset"]
    assert decoded(family, ids[:1]) + text == TEXT
    for name, offset in zip(logprobs["tokens"][:-1], offsets, strict=False):
        if name.startswith("bytes:"):
            assert text[offset] in "é🎈"
        else:
            assert text[offset:].startswith(name)
    assert offsets[-1] == len(text)
    assert "".join(name for name in logprobs["tokens"][:-1] if not name.startswith("bytes:")) == (
        text.replace("é", "").replace("🎈", "")
    )


def test_text_offset_of_a_token_with_a_space_and_a_part_of_a_character() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate([*letters, "Ġð"])}, [("Ġ", "ð")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    own = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = [Token(token) for token in own("a 🎈")["input_ids"]]
    response = ResponseWriter("m", own, [], chat=False, logprobs=True).response("a 🎈", tokens, "stop", {})
    logprobs = response["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["a", "bytes:\\x20\\xf0"]
    assert logprobs["text_offset"] == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("family", ["chatml", "mistral"])
@pytest.mark.parametrize("cuts", [(1,), (3,), (1, 2), (3, 1), (2, 3, 1)])
def test_text_offsets_after_invalid_utf8_point_to_the_tokens(family: str, cuts: tuple[int, ...]) -> None:
    """The first bytes of characters are followed by other text, and by a whole character."""
    prompt, word, balloon = ids_of(family, "a"), ids_of(family, "one two")[-2:], ids_of(family, "🎈")[-4:]
    broken = [token for cut in cuts for token in balloon[:cut]]
    between = [] if family == "chatml" else word  # mistral decodes bytes in a row alike: as characters, or as invalid
    logprobs = logprobs_of(family, [*broken, *word, *balloon, *broken, *between, *balloon, *word], prompt)
    text, offsets, names = logprobs["text"], logprobs["text_offset"], logprobs["tokens"]
    assert REPLACEMENT in text and text.count("🎈") == 2 and offsets == sorted(offsets)
    for name, offset in zip(names, offsets, strict=True):
        assert text[offset] in (REPLACEMENT, "🎈") if name.startswith("bytes:") else text[offset:].startswith(name)
    first = names.index("bytes:\\xf0", len(broken))
    assert {text[offset] for offset in offsets[first : first + 4]} == {"🎈"}


def test_offsets_of_stop_string_tokens_are_at_the_end_of_the_text() -> None:
    own, ids = tokenizer("chatml"), ids_of("chatml", "one two")
    tokens = [Token(token) for token in ids]
    writer = ResponseWriter("m", own, [], chat=False, logprobs=True)
    offsets = writer.response("one", tokens, "stop", {})["choices"][0]["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] == 3


def test_alternatives_that_are_parts_of_characters_are_kept_apart() -> None:
    first, second = (ids_of("chatml", sign)[0] for sign in "éĀ")
    logprobs = logprobs_of("chatml", ids_of("chatml", "a"), [], [(first, -1.0), (second, -2.0)])
    assert logprobs["top_logprobs"] == [{"bytes:\\xc3": -1.0, "bytes:\\xc4": -2.0}]
    chat = ResponseWriter("m", tokenizer("chatml"), [], chat=True, logprobs=True).response(
        "", [Token(first)], "stop", {}
    )
    assert chat["choices"][0]["logprobs"]["content"] == [
        {"token": "bytes:\\xc3", "logprob": 0.0, "bytes": [0xC3], "top_logprobs": []}
    ]
