"""Texts of many requests through transformers' own forward, for models that strop's engine does not answer with.

Reading lays several texts end to end in one row, with a mask that keeps them apart, so that nothing is padded. From
then on each text is a row of Slots, and all rows get their next token at once. Both are the model's own forward with
masks and positions of our making.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.engine.decode.decoder import Part
from strop.engine.decode.hf_cache import Kept, Kv, Reading, Slots, cut, side_by_side
from strop.engine.decode.hf_fallback import MixedLora, can_mix
from strop.engine.decode.sampling import Ids, Logits, Seen, SequenceState
from strop.engine.train.transfer import sent
from strop.errors import ModelError
from strop.models.adapters import adapter_disabled, has_trained_biases

FULL, SLIDING = "full_attention", "sliding_attention"


class HfDecoder:
    """What answers.Batch needs (answers.Decoder), from a transformers causal language model, or a PeftModel with any
    number of adapters on it. keep: positions of texts that have left which are kept for others that begin alike.

    Texts whose adapters can share a batch are in the same lane; others have one each.
    Raises ModelError for an architecture whose state is more than keys and values.
    """

    free_rows = 1  # a pass reads one token of each text

    def __init__(self, model: Any, keep: int) -> None:
        self._peft = model if hasattr(model, "peft_config") else None
        self.model: Any = model.get_base_model() if self._peft is not None else model
        self.device: torch.device = next(self.model.parameters()).device
        mixes = self._peft is not None and not has_trained_biases(model) and can_mix(self.model)
        self._mixed = MixedLora(self.model) if mixes else None
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
        self._kept = Kept(keep)
        self._read: dict[SequenceState, Kv] = {}  # of texts that are being read
        self._lanes: dict[str, Slots] = {}
        self._rows: dict[str, list[SequenceState]] = {}  # the texts of each lane, as they lie in its Slots

    def position_bytes(self) -> int:
        """Bytes that one position of one text takes, found by reading a token."""
        text = SequenceState(np.zeros(1, np.int32), None)
        self.begin(text)
        self.read([Part(text, 1)])
        kv = self._read.pop(text)
        return sum(tensor.numel() * tensor.element_size() for pair in kv for tensor in pair)

    def begin(self, text: SequenceState) -> None:
        kv = self._kept.find(text.adapter, text.ids)
        self._read[text], text.done = kv, _length(kv)
        text.found = text.done

    def end(self, text: SequenceState) -> None:
        """What the text holds is kept for those that begin alike, or wiped out (NaN times 0 is NaN)."""
        if self._read.pop(text, None) is not None:
            return
        lane = self._lane(text.adapter)
        slots, rows = self._lanes[lane], self._rows[lane]
        row = rows.index(text)
        if text.end == "failed":
            slots.wipe(row)
        else:
            self._kept.add(text.adapter, text.ids[: text.done].copy(), slots.take(row))
        slots.remove(row)
        rows[row] = rows[-1]
        rows.pop()
        if not rows:
            del self._lanes[lane], self._rows[lane]

    @torch.inference_mode()
    def read(self, parts: Sequence[Part], *, logits: bool = True) -> Seen:
        found: dict[SequenceState, Logits] = {}
        for lane, rows in self._rows.items():
            found |= dict(zip(rows, self._step(lane).float().cpu().numpy(), strict=True))
        reading: dict[str, list[Part]] = {}
        for part in parts:
            if part.text in self._read:
                reading.setdefault(self._lane(part.text.adapter), []).append(part)
        for lane, mine in reading.items():
            found |= self._read_on(lane, mine)
        told = [found[part.text] for part in parts if part.told]
        return Seen.of(np.stack(told) if told else np.empty((0, 1), np.float32))

    def _lane(self, adapter: str | None) -> str:
        """Texts with the same lane are decoded together."""
        return "" if self._mixed is not None or self._peft is None else f"+{adapter}" if adapter else "base"

    def _read_on(self, lane: str, parts: list[Part]) -> dict[SequenceState, Logits]:
        """Reads on in texts of one lane; those that are read to the end become rows of it. Their next logits."""
        before = {part.text: self._read[part.text] for part in parts}
        logits = self._pass(parts)
        if len(parts) > 1 and logits and not torch.stack([one.max() for one in logits.values()]).isfinite().all():
            self._read |= before  # NaN passes from one to those beside it: whose it was shows when each is read alone
            logits = {}
            for part in parts:
                logits |= self._pass([part])
        for part in parts:
            part.text.done += part.count
            if part.told:
                self._lanes.setdefault(lane, Slots()).add(self._read.pop(part.text))
                self._rows.setdefault(lane, []).append(part.text)
        if not logits:
            return {}
        told = torch.stack(list(logits.values())).float().cpu().numpy()
        return dict(zip(logits, told, strict=True))

    def _pass(self, parts: Sequence[Part]) -> dict[SequenceState, Tensor]:
        """The next positions of these texts; the logits (vocabulary,) behind those that are read to the end."""
        counts, dones = [part.count for part in parts], [_length(self._read[part.text]) for part in parts]
        places = list(zip(parts, dones, counts, strict=True))
        ids = torch.cat([_tensor(part.text.ids[done : done + count]) for part, done, count in places])
        at = torch.cat([torch.arange(done, done + count) for _, done, count in places])
        own = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(counts))
        past_at = torch.cat([torch.arange(done) for done in dones])
        past_own = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(dones))
        key_at, key_own = torch.cat([past_at, at]), torch.cat([past_own, own])
        before = (own[:, None] == key_own) & (at[:, None] >= key_at)
        ends = torch.tensor(counts).cumsum(0)
        cache = Reading(side_by_side([self._read[part.text] for part in parts]))
        with self._adapters([part.text.adapter for part in parts for _ in range(part.count)]):
            logits = self._forward(
                ids[None], at[None], self._masks(before, at[:, None] - key_at), cache, logits_to_keep=ends - 1
            )[0]
        start = 0
        for part, end in zip(parts, ends.tolist(), strict=True):
            self._read[part.text] = side_by_side([self._read[part.text], cut(cache.read, start, end)])
            start = end
        return {part.text: logits[place] for place, part in enumerate(parts) if part.told}

    def _step(self, lane: str) -> Tensor:
        """The logits (rows, vocabulary) after the last token of each row of a lane, which this pass adds to it."""
        slots, rows = self._lanes[lane], self._rows[lane]
        at = slots.begin(self.device)
        age = at[:, :, None] - torch.arange(slots.width, device=self.device)
        (last,) = sent([np.array([[text.ids[-1]] for text in rows], dtype=np.int64)], self.device)
        with self._adapters([text.adapter for text in rows]):
            logits = self._forward(last, at, self._masks(age >= 0, age), slots)[:, -1]
        slots.advance()
        for text in rows:
            text.done += 1
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
            with adapter_disabled(self._peft):
                yield
        else:
            self._peft.set_adapter(tokens[0])
            yield


def _length(kv: Kv) -> int:
    return int(kv[0][0].shape[2]) if kv else 0


def _tensor(ids: Ids) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))
