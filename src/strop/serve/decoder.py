"""The model as a batch of requests sees it: texts are read side by side, then all rows get their next token at once.

Reading lays several texts end to end in one row, with a mask that keeps them apart, so that nothing is padded. From
then on each request is a row of Slots. Both are the model's own forward with masks and positions of our making.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.data.conversation import Ids
from strop.errors import ModelError
from strop.serve.mixed import MixedLora, can_mix
from strop.serve.slots import Kv, Reading, Slots, cut, side_by_side

FULL, SLIDING = "full_attention", "sliding_attention"


class Text:
    """A text while it is read: `kv` holds what was read of `ids`, computed with `adapter` (None: the base).

    alone: it is to be read without others beside it.
    """

    def __init__(self, ids: Ids, adapter: str | None, kv: Kv | None = None) -> None:
        self.ids, self.adapter, self.kv = ids, adapter, kv or []
        self.alone = False

    @property
    def done(self) -> int:
        return int(self.kv[0][0].shape[2]) if self.kv else 0

    @property
    def left(self) -> int:
        return len(self.ids) - self.done


class Decoder:
    """model: a transformers causal language model, or a PeftModel with any number of adapters on it.

    Requests whose adapters can share a batch are in the same lane (`lane`); others have one each.
    Raises ModelError for an architecture whose state is more than keys and values.
    """

    def __init__(self, model: Any) -> None:
        self._peft = model if hasattr(model, "peft_config") else None
        self.model: Any = model.get_base_model() if self._peft is not None else model
        self.device: torch.device = next(self.model.parameters()).device
        self._mixed = MixedLora(self.model) if self._peft is not None and can_mix(self.model) else None
        config = self.model.config.get_text_config()
        self._kinds = set(getattr(config, "layer_types", None) or ())
        if self._kinds - {FULL, SLIDING}:
            raise ModelError(
                f"{config.model_type}: layers of kind {', '.join(sorted(self._kinds - {FULL, SLIDING}))}, "
                "whose state strop's server does not keep",
                fix="merge it (`strop merge`) and serve it with --engine vllm",
            )
        self._window = getattr(config, "sliding_window", None) if self._kinds != {FULL} else None
        self._bool_masks = config._attn_implementation == "sdpa"
        takes = inspect.signature(self.model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"
        self.lanes: dict[str, Slots] = {}

    def position_bytes(self) -> int:
        """Bytes that one position of one request takes, found by reading a token."""
        text = Text(np.zeros(1, np.int32), None)
        with torch.inference_mode():
            self.read([text], 1)
        return sum(tensor.numel() * tensor.element_size() for pair in text.kv for tensor in pair)

    def lane(self, adapter: str | None) -> str:
        """Requests with the same lane are decoded together."""
        return "" if self._mixed is not None or self._peft is None else f"+{adapter}" if adapter else "base"

    def read(self, texts: Sequence[Text], budget: int) -> dict[int, Tensor]:
        """Reads about `budget` tokens more of the texts, of one lane, in order.

        Gives, for each text that is read to its end, by its place, the logits (vocabulary,) of what follows.
        """
        parts: list[tuple[Text, int]] = []
        for text in texts:
            count = min(text.left, budget)
            if count <= 0:
                break
            parts.append((text, count))
            budget -= count
        ids = torch.cat([_tensor(text.ids[text.done : text.done + count]) for text, count in parts])
        at = torch.cat([torch.arange(text.done, text.done + count) for text, count in parts])
        own = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([count for _, count in parts]))
        past_at = torch.cat([torch.arange(text.done) for text, _ in parts])
        past_own = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([text.done for text, _ in parts]))
        key_at, key_own = torch.cat([past_at, at]), torch.cat([past_own, own])
        before = (own[:, None] == key_own) & (at[:, None] >= key_at)
        ends = torch.tensor([count for _, count in parts]).cumsum(0)
        cache = Reading(side_by_side([text.kv for text, _ in parts]))
        with self._adapters([text.adapter for text, count in parts for _ in range(count)]):
            logits = self._forward(
                ids[None], at[None], self._masks(before, at[:, None] - key_at), cache, logits_to_keep=ends - 1
            )[0]
        finished, start = {}, 0
        for place, ((text, _), end) in enumerate(zip(parts, ends.tolist(), strict=True)):
            text.kv = side_by_side([text.kv, cut(cache.read, start, end)])
            start = end
            if text.left == 0:
                finished[place] = logits[place]
        return finished

    def step(self, lane: str, last: Sequence[int], adapters: Sequence[str | None]) -> Tensor:
        """The logits (rows, vocabulary) after the last token of each row of a lane, which this pass adds to it."""
        slots = self.lanes[lane]
        at = slots.begin(self.device)
        age = at[:, :, None] - torch.arange(slots.width, device=self.device)
        with self._adapters(adapters):
            logits = self._forward(torch.tensor(last)[:, None], at, self._masks(age >= 0, age), slots)[:, -1]
        slots.advance()
        return logits

    def _masks(self, seen: Tensor, age: Tensor) -> Any:
        """seen, age: (queries, keys) or (rows, 1, keys): may a query see a key, and how far back is it?"""
        full = self._mask(seen)
        if self._window is None:
            return full
        near = self._mask(seen & (age < self._window))
        return {FULL: full, SLIDING: near} if len(self._kinds) > 1 else near

    def _mask(self, seen: Tensor) -> Tensor:
        shaped = (seen[:, None] if seen.dim() == 3 else seen[None, None]).to(self.device)
        if self._bool_masks:
            return shaped
        kind = self.model.dtype
        return torch.zeros_like(shaped, dtype=kind).masked_fill(~shaped, torch.finfo(kind).min)

    def _forward(self, ids: Tensor, at: Tensor, masks: Any, cache: Any, **more: Any) -> Tensor:
        more = {name: value.to(self.device) for name, value in more.items()}
        out: Tensor = self.model(
            input_ids=ids.to(self.device), position_ids=at.to(self.device), attention_mask=masks, use_cache=True,
            return_dict=True, **{self._cache_name: cache}, **more,
        ).logits  # fmt: skip
        return out

    @contextmanager
    def _adapters(self, tokens: Sequence[str | None]) -> Iterator[None]:
        """tokens: the adapter of each token of the batch."""
        if self._mixed is not None:
            self._mixed.choose(tokens, self.device)
            yield
        elif self._peft is None:
            yield
        elif tokens[0] is None:
            with self._peft.disable_adapter():
                yield
        else:
            self._peft.set_adapter(tokens[0])
            yield


def _tensor(ids: Ids) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))
