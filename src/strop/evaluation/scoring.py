"""Where an answer differs from the right one, word by word; for both pages that show answers."""

from __future__ import annotations

import difflib

LIKE = 0.6  # answers that have less in common are shown as they are: marks all over help nobody


def pieces(gold: str, answer: str) -> list[tuple[str, str]]:
    """The answer in pieces (text, same | added | missing) against the gold; in one where they have little in common."""
    wanted, given = _words(gold), _words(answer)
    matcher = difflib.SequenceMatcher(None, wanted, given, autojunk=False)
    if matcher.ratio() < LIKE:
        return [(answer, "same")]
    parts = []
    for tag, a1, a2, b1, b2 in matcher.get_opcodes():
        if tag in ("delete", "replace"):
            parts.append(("".join(wanted[a1:a2]), "missing"))
        if b2 > b1:
            parts.append(("".join(given[b1:b2]), "same" if tag == "equal" else "added"))
    return parts


def _words(text: str) -> list[str]:
    """Words and what stands between them, one by one."""
    words: list[str] = []
    for character in text:
        if words and character.isalnum() and words[-1][-1].isalnum():
            words[-1] += character
        else:
            words.append(character)
    return words
