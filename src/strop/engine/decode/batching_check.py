"""Whether transformers' own forward answers texts side by side as it answers each alone.

Some families count where keys lie in the cache, or how much of it is filled, in place of the positions and masks that
they are given: their numbers would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from strop.engine.decode.batch import Batch
from strop.engine.decode.hf_fallback import PlainDecoder
from strop.engine.decode.sampling import Sampling, Text, Token
from strop.errors import ModelError
from strop.models.adapters import adapter_disabled

LENGTHS = 21, 9  # of the prompts; the second joins when the first has an answer of one token
TOKENS = 4
LIMITS = {torch.float32: 1e-3}  # mean |difference| of a token's log-probability, in nats; else:
LIMIT = 0.25
OF_PLACES = {"gpt_neo": "its windows", "mpt": "its distances"}  # right in a short cache, and wrong in a longer one


@torch.inference_mode()
def prove(decoder: PlainDecoder, module: Any) -> None:
    """decoder: new, of `module`. Raises ModelError where the base's answers of two texts together are not those of each
    alone, or there are none."""
    base = decoder.model
    kind, fix = base.config.model_type, "answer with `strop chat` or `strop eval`, or serve it with --engine vllm"
    if counted := OF_PLACES.get(kind):
        raise ModelError(f"{kind}: {counted} are counted by places in the cache, which texts share here", fix=fix)
    try:
        told = _together(decoder, base.get_input_embeddings().weight.shape[0])
        with nullcontext() if module is base else adapter_disabled(module):
            gaps = [gap for text, tokens in told.items() for gap in _gaps(base, text, tokens)]
    except Exception as error:  # whatever the family's own code makes of it, it cannot be served
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ModelError(f"{kind}: cannot answer several texts side by side: {said}", fix=fix) from None
    if not np.mean(gaps) <= LIMITS.get(base.dtype, LIMIT):
        what = f"answers of two texts side by side differ from those alone by {np.mean(gaps):.2g} nats a token"
        raise ModelError(f"{kind}: {what}", fix=fix)


def _together(decoder: PlainDecoder, vocabulary: int) -> dict[Text, list[Token]]:
    batch = Batch(decoder, len(LENGTHS))
    told: dict[Text, list[Token]] = {}
    for length in LENGTHS:
        ids = (np.arange(length, dtype=np.int32) * 7 + 5) % vocabulary
        text = Text(ids, None, most=TOKENS, sampling=Sampling(), logprobs=0)
        told[text] = []
        batch.add(text)
        for news in batch.step():
            told[news.text] += news.tokens
    while batch.texts:
        for news in batch.step():
            told[news.text] += news.tokens
    return told


def _gaps(base: Any, text: Text, tokens: Sequence[Token]) -> list[float]:
    """|difference| of each token's log-probability."""
    device = base.get_input_embeddings().weight.device
    logits = base(input_ids=torch.from_numpy(text.ids.astype(np.int64))[None].to(device), use_cache=False).logits[0]
    logs = logits.float().log_softmax(-1).cpu()
    first = len(text.ids) - len(tokens) - 1
    return [abs(float(logs[first + place, token.id]) - token.logprob) for place, token in enumerate(tokens)]
