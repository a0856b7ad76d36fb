"""Continuous batching: texts join and leave between two passes; a prompt is read beside answers that go on.

Where few texts are under way, a pass takes as long for one row as for several: the weights' way from memory sets the
pace. The rows that are free then hold guesses: what followed, earlier in the text, on the tokens that stand at its end
(prompt lookup, after Leviathan et al., arXiv:2211.17192). A guess that is drawn is kept, and the answer is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from strop.engine.decode.cache import PREFILL_ROWS, NoRoom
from strop.engine.decode.decoder import CompiledDecoder, Decoder, Part
from strop.engine.decode.sampling import Ids, NoToken, Seen, SequenceState, Token
from strop.engine.kernels.dispatch import logprobs_of

JUDGED_AT_ONCE = 128  # rows of a pass that give logits: more would take more memory than the pass itself
ALIKE = 3  # tokens at a text's end that must have stood before, for what followed them to be guessed


@dataclass(frozen=True)
class News:
    """What a pass brought a text: its new tokens, which are appended; text.end says whether it has ended."""

    text: SequenceState
    tokens: tuple[Token, ...]


class Batch:
    """rows: texts that are answered together, at most. guess: guess tokens where rows are free."""

    def __init__(self, decoder: Decoder, rows: int, *, read_at_once: int = PREFILL_ROWS, guess: bool = True) -> None:
        self._decoder, self._rows, self._guess, self._read_at_once = decoder, rows, guess, read_at_once
        self.texts: list[SequenceState] = []
        self._behind: dict[
            SequenceState, list[SequenceState]
        ] = {}  # by the text whose prompt, which is theirs too, is read

    def add(self, text: SequenceState) -> bool:
        """False where there is no room for it now. Raises NoRoom where there would never be."""
        if len(self.texts) + self._num_waiting >= self._rows:
            return False
        try:
            self._decoder.begin(text)
        except NoRoom:
            if self.texts:
                return False
            raise
        self.texts.append(text)
        return True

    def add_group(self, texts: Sequence[SequenceState]) -> int:
        """How many texts with one prompt, from the first on, there is room for: the prompt is read once for them, and
        they begin together. Raises NoRoom where there would never be room for one."""
        assert isinstance(self._decoder, CompiledDecoder), "groups are for the engine's own decoder"
        if not self.add(texts[0]):
            return 0
        behind = self._behind.setdefault(texts[0], [])
        for text in texts[1 : self._rows - self._num_waiting - len(self.texts) + 1]:
            try:
                self._decoder.begin_behind(text, texts[0])
            except NoRoom:
                break
            behind.append(text)
        return 1 + len(behind)

    @property
    def _num_waiting(self) -> int:
        return sum(map(len, self._behind.values()))

    def remove(self, text: SequenceState) -> None:
        """A text leaves, whether it has ended or not; those that wait for its prompt leave with it."""
        self.texts.remove(text)
        for gone in (text, *self._behind.pop(text, ())):
            self._decoder.end(gone)

    def step(self) -> list[News]:
        """One pass. Texts that have ended have left. One whose expected answer is read has no new tokens before all of
        it is."""
        parts = self._parts()
        news = []
        plain = all(text.plain and not text.judging for part in parts if part.told for text in self._at(part))
        seen = self._decoder.read(parts, logits=not plain)
        at = 0
        for part in parts:
            if part.told:
                rows = seen.rows(at, at + part.told)
                at += part.told
                for text in self._behind.pop(part.text, ()):
                    assert isinstance(self._decoder, CompiledDecoder)
                    self._decoder.follow(text, part.text)
                    self.texts.append(text)
                    news.append(News(text, self._written(Part(text, 0, 1), rows)))
                read = self._judged if part.text.judging else self._written
                news.append(News(part.text, read(part, rows)))
        for text in [text for text in self.texts if text.end]:
            self.remove(text)
        return news

    def _at(self, part: Part) -> list[SequenceState]:
        """The texts that go on behind a part."""
        return [part.text, *self._behind.get(part.text, ())]

    def _judged(self, part: Part, seen: Seen) -> tuple[Token, ...]:
        text, at = part.text, part.text.done - part.told
        wanted = np.append(text.ids[at + 1 : text.done + 1], 0)[: part.told]  # behind the last stands nothing
        return text.judge(at, np.where(seen.finite, seen.likeliest, -1), logprobs_of(seen.logits, wanted))

    def _written(self, part: Part, seen: Seen) -> tuple[Token, ...]:
        """Appends the tokens that follow, as long as the guesses before them were right."""
        text, found = part.text, []
        for row in range(part.told):
            try:
                token = text.pick(seen, row)
            except NoToken as none:
                text.end = none.end
                break
            text.append(token.id)
            found.append(token)
            if text.end or row == len(part.guessed) or part.guessed[row] != token.id:
                break
            text.done += 1  # what was guessed is in the cache
        return tuple(found)

    def _parts(self) -> list[Part]:
        writing: list[SequenceState] = []
        reading: list[SequenceState] = []
        for text in self.texts:
            (writing if text.left == 1 and not text.judging else reading).append(text)
        room = self._decoder.free_rows - len(writing) if self._guess and not reading else 0
        parts = []
        for place, text in enumerate(writing):
            most = min(max(0, room) // (len(writing) - place), text.most - (text.length - text.prompt) - 1)
            guessed = guess(text.ids, most)
            room -= len(guessed)
            parts.append(Part(text, text.left, 1 + len(guessed), guessed))
        budget, telling = self._read_at_once, max(1, JUDGED_AT_ONCE - len(writing))
        for text in reading:
            count = min(text.left, budget)
            if count and telling:
                told = int(count == text.left)
                if text.judging:
                    told = max(0, text.done + count - max(text.done, text.first))
                    spared = max(0, told - telling)
                    told, count = told - spared, count - spared
                    telling -= told
                parts.append(Part(text, count, told))
            budget -= count
        return parts


def guess(ids: Ids, most: int) -> Sequence[int]:
    """What followed the last time that the text's last tokens stood in it, `most` tokens of it at most."""
    if most <= 0 or len(ids) <= ALIKE:
        return ()
    last = ids[-ALIKE:]
    same = np.ones(len(ids) - ALIKE, bool)
    for place in range(ALIKE):
        same &= ids[place : place + len(same)] == last[place]
    where = np.flatnonzero(same)
    if not len(where):
        return ()
    begin = int(where[-1]) + ALIKE
    found: list[int] = ids[begin : begin + most].tolist()
    return found


def decode_all(batch: Batch, texts: Sequence[SequenceState]) -> Iterator[News]:
    """Answers all texts, as many together as go; tells what each pass brings. Raises NoRoom where one is too long."""
    waiting = list(reversed(texts))
    try:
        while waiting or batch.texts:
            while waiting and batch.add(waiting[-1]):
                waiting.pop()
            yield from batch.step()
    finally:  # whoever asked may have gone
        for text in list(batch.texts):
            batch.remove(text)


def decode_groups(batch: Batch, groups: Sequence[Sequence[SequenceState]]) -> Iterator[News]:
    """The same of groups of texts with one prompt, which is read once for as many of a group as go together."""
    waiting = [list(group) for group in reversed(groups)]
    while waiting or batch.texts:
        while waiting and (begun := batch.add_group(waiting[-1])):
            del waiting[-1][:begun]
            if waiting[-1]:
                break
            waiting.pop()
        yield from batch.step()
