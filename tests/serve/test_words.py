"""Tokens as text: an answer that goes on with its prompt."""

from __future__ import annotations

import pytest

from strop.model.words import UNKNOWN, Words
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
        if (prompt := decoded(family, ids[:cut])).endswith(UNKNOWN):
            continue
        words = Words(tokenizer(family), (), ids[:cut])
        assert prompt + "".join(map(words.push, ids[cut:])) + words.end() == TEXT


def test_a_prompt_that_ends_within_a_character_loses_nothing_of_the_answer() -> None:
    ids = ids_of("mistral", "🎈jumps")
    for cut in (2, 3, 4):
        words = Words(tokenizer("mistral"), (), ids[:cut])
        assert ("".join(map(words.push, ids[cut:])) + words.end()).endswith("jumps")
