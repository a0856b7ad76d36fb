"""Probabilities in the responses of an OpenAI-compatible server, as labels of a student.

A server names tokens by their bytes, and not by ids. A token of the student has the server's probabilities if that
has a token of the same bytes at the same place of the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.data.answers import Answers, TopTokens, find_answer
from strop.data.rendering.render import Renderer
from strop.data.store import Examples
from strop.data.types import Example
from strop.errors import RecipeError
from strop.models.tokenizer import TokenBytes
from strop.training.soft_labels import Distributions

TOP_LOGPROBS = 20  # for each token: the maximum of OpenAI's API
MIN_SHARE = 0.5  # of the tokens of the answers, that have probabilities
NO_PLACE = -1, -1

LOG = logging.getLogger(__name__)


class TokenReader:
    """Reads the log-probabilities of a response. tokenizer: that of the student."""

    def __init__(self, tokenizer: Any) -> None:
        decode = TokenBytes(tokenizer).decode
        self._ids = {decode(token): token for token in reversed(range(len(tokenizer)))}

    def read(self, choice: Mapping[str, Any], answer: str) -> list[TopTokens]:
        """Return the most likely tokens at each token of an answer, which is the end of the choice's text.

        Raises RecipeError if there are none.
        """
        try:
            entries = [(_bytes_of(entry), [entry, *entry["top_logprobs"]]) for entry in choice["logprobs"]["content"]]
            begin = _find_answer([raw for raw, _ in entries], answer, str(choice["message"]["content"]))
            found, place = list[TopTokens](), -begin
            for raw, alternatives in entries:
                known = [(self._ids.get(_bytes_of(x)), float(x["logprob"])) for x in reversed(alternatives)]
                logprobs = {token: logprob for token, logprob in known if token is not None}
                kept = sorted(logprobs, key=lambda token: -logprobs[token])[:TOP_LOGPROBS]
                found.append(TopTokens(place, place + len(raw), kept, [logprobs[token] for token in kept]))
                place += len(raw)
        except (LookupError, TypeError, AttributeError, ValueError):
            what = f"train.teacher: the server gives no {TOP_LOGPROBS} log-probabilities of its answers"
            raise RecipeError(what, fix="--train.teacher_weight 0, which trains on the answers alone") from None
        return found if begin >= 0 else []


def read_distributions(rows: Examples, answers: Answers, renderer: Renderer) -> Distributions:
    """Return the server's probabilities for each supervised token, or 1 for the token itself where it gave none.

    Columns without a token have a probability below 0. renderer: that of the student. Raises RecipeError if the
    server's tokens are mostly others.
    """
    decode = TokenBytes(renderer.tokenizer).decode
    ids, probs, counts = list[list[int]](), list[list[float]](), np.zeros(2, np.int64)
    for i, row in enumerate(rows):
        answer = find_answer(rows.conversation(i), answers)
        labels = row.ids[row.weights > 0].tolist()
        places = {} if answer is None else _find_places(row, answer.text, decode, renderer.end_ids)
        known = {} if answer is None else {(token.begin, token.end): token for token in answer.tokens}
        for j, label in enumerate(labels):
            token = known.get(places.get(j, NO_PLACE))
            has_probs = token is not None and label in token.ids
            chosen = dict(zip(token.ids, np.exp(token.logprobs), strict=True)) if token and has_probs else {label: 1.0}
            counts += j in places, has_probs
            unused = (x for x in range(2 * TOP_LOGPROBS) if x not in chosen)
            chosen |= {next(unused): -1.0 for _ in range(TOP_LOGPROBS - len(chosen))}
            ids.append([*chosen])
            probs.append([*chosen.values()])
    tokens, matched = counts.tolist()
    LOG.info("train.teacher: the server gave the probabilities of %d of the %d tokens of its answers", matched, tokens)
    if not tokens:
        what = "train.teacher: the server has answered none of the rows that are trained on"
        raise RecipeError(what, fix="leave the teacher out, or give rows without an answer that it can answer")
    if matched < MIN_SHARE * tokens:
        what = f"train.teacher: {tokens - matched:,} of {tokens:,} tokens are not those of the server's answers"
        fix = "choose a teacher of the same family, or train on its answers alone: --train.teacher_weight 0"
        raise RecipeError(what, fix=fix)
    return {"ids": np.array(ids, np.int32), "probs": np.array(probs, np.float32)}


def lacks_probabilities(probs: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return whether `read_distributions` had no probabilities for each token, (S,). probs: (S, K), from it."""
    found: npt.NDArray[np.bool_] = (probs[:, 0] == 1) & (probs[:, 1:] < 0).all(1)
    return found


def _find_places(
    row: Example, answer: str, decode: Callable[[int], bytes], end_ids: Collection[int]
) -> dict[int, tuple[int, int]]:
    """Return begin and end, in bytes of the answer, of supervised tokens: those of the last answer of the row.

    end_ids: as of Renderer. If the answer is not found, all are at NO_PLACE.
    """
    supervised = np.flatnonzero(row.weights > 0)
    first = int(np.flatnonzero(np.diff(supervised, prepend=-2) > 1)[-1])
    tokens = row.ids[supervised[first:]].tolist()
    raw, last = [decode(token) for token in tokens], len(tokens)
    while last and (tokens[last - 1] in end_ids or not raw[last - 1].strip()):
        last -= 1
    begin = _end_of(b"".join(raw[:last]), answer.strip().encode())
    ends = np.cumsum([len(x) for x in raw]) - begin
    pairs = enumerate(zip(raw, ends, strict=True))
    return {first + i: NO_PLACE if begin < 0 else (int(end) - len(x), int(end)) for i, (x, end) in pairs}


def _find_answer(raw: Sequence[bytes], answer: str, content: str) -> int:
    """Return where an answer, without space around it, begins in the bytes of a response's tokens, or -1.

    content: the text of the response, which ends with the answer. Before it, the tokens may have reasoning that the
    server leaves out, and after it a token that ends the response.
    """
    core, text = answer.strip().encode(), content.strip().encode()
    parts = [part for part in (b"".join(raw[:-1]), b"".join(raw)) if part.rstrip().endswith(text)]
    if not parts or not text.endswith(core):
        return -1
    return len(parts[0].rstrip()) - len(core)


def _end_of(text: bytes, answer: bytes) -> int:
    """Return where an answer begins that is at the end of a text, before space; or its last place, or -1."""
    stripped = text.rstrip()
    return len(stripped) - len(answer) if stripped.endswith(answer) else text.rfind(answer)


def _bytes_of(entry: Mapping[str, Any]) -> bytes:
    raw = entry.get("bytes")
    return str(entry["token"]).encode() if raw is None else bytes(raw)
