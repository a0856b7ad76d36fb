"""The fallback through transformers, for models that the compiled decoder does not support.

`hf_generate` runs transformers' generate on a batch of prompts. It works for every model, and serves chat, evaluation
and rollouts. `HfDecoder` calls the model's own forward with masks, positions and caches made here, for continuous
batching in the server: sequences of several adapters that join and leave. It needs a model whose state is keys and
values alone; `check_batching` tests that sequences in a batch do not affect each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer

from strop.data.types import Ids, LogProbs
from strop.engine.decode.batch import Batch
from strop.engine.decode.decoder import Chunk
from strop.engine.decode.hf_cache import (
    DecodeCache,
    Kv,
    PrefillCache,
    PrefixCache,
    concatenate,
    num_positions,
    slice_positions,
)
from strop.engine.decode.sampling import Logits, PassOutput, Sampling, SequenceState, Token
from strop.engine.train.buffers import copy_to_device
from strop.errors import ModelError
from strop.models.adapters import adapter_disabled, has_trained_biases
from strop.models.lora import adapter_delta, add_to_base
from strop.models.upstream_errors import attribute_errors

FULL, SLIDING = "full_attention", "sliding_attention"

# For check_batching:
PROMPT_LENGTHS = 21, 9  # the second sequence joins when the first has one token
NUM_TOKENS = 4
LIMITS = {torch.float32: 1e-3}  # mean |difference| of a token's log-probability, in nats
DEFAULT_LIMIT = 0.25  # of other types
CACHE_POSITIONS = {"gpt_neo": "its windows", "mpt": "its distances"}  # right in a short cache, wrong in a longer one


# --- transformers' generate ----------------------------------------------------------------------------------------


@torch.no_grad()
def hf_generate(
    model: Any,
    prompts: Sequence[Ids],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    pad_id: int,
    streamer: TextStreamer | None = None,
    with_log_probs: bool = False,
) -> tuple[list[list[int]], LogProbs | None]:
    """Complete a batch of prompts with transformers' generate. The caller sets the seed.

    Returns the new tokens of each prompt, padded to one length, and their log-probabilities (prompts, tokens) or None.
    """
    options: dict[str, Any] = {}
    if sampling.temperature != 0:
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=sampling.temperature != 0, eos_token_id=list(stop_ids),
        pad_token_id=pad_id, use_cache=True, repetition_penalty=sampling.repetition_penalty, **options,
    )  # fmt: skip
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    device, training = next(model.parameters()).device, model.training
    recorder = _LogProbRecorder() if with_log_probs else None
    # not for rollouts: the matmul of a contiguous copy rounds differently in fp32
    hook = nullcontext() if with_log_probs else model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    model.eval()
    try:
        with attribute_errors(str(model.config.model_type)), hook:
            output = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, streamer=streamer,
                logits_processor=LogitsProcessorList([recorder] if recorder else []),
            )  # fmt: skip
    finally:
        model.train(training)
    return output[:, width:].tolist(), recorder.log_probs(output) if recorder else None


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the head's input, a strided slice, for which torch copies the whole head once a row (SmolLM2: 1.6 s)."""
    return (inputs[0].contiguous(), *inputs[1:])


class _LogProbRecorder(LogitsProcessor):  # type: ignore[misc]
    """Records the log-probability of each sampled token; changes nothing."""

    def __init__(self) -> None:
        self._previous: Tensor | None = None
        self._recorded: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids)
        self._previous = scores.float().log_softmax(-1)
        return scores

    def _record(self, ids: Tensor) -> None:
        if self._previous is not None:
            self._recorded.append(self._previous.gather(1, ids[:, -1:].to(self._previous.device)))

    def log_probs(self, output: Tensor) -> LogProbs:
        """Return the log-probabilities, (rows, tokens). output: the token ids that generate returned."""
        self._record(output)
        log_probs: LogProbs = torch.cat(self._recorded, 1).double().cpu().numpy()
        return log_probs


class TextCallbackStreamer(TextStreamer):  # type: ignore[misc]
    """Passes decoded text on to a function instead of printing it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


# --- continuous batching -------------------------------------------------------------------------------------------


class HfDecoder:
    """Decoder on a model's own forward, for a causal language model or a PeftModel with any number of adapters.

    Prompts are concatenated into one row, with a mask that separates them, so nothing is padded. Decoding sequences are
    the rows of a DecodeCache. Sequences whose adapters can share a batch are in one lane; other adapters have a lane
    each.

    keep: positions of finished sequences that are kept for later ones with the same prefix.

    Raises ModelError for an architecture whose state is more than keys and values.
    """

    num_cheap_rows = 1  # no drafts: a pass processes one token of each sequence

    def __init__(self, model: Any, keep: int) -> None:
        self._peft = model if hasattr(model, "peft_config") else None
        self.model: Any = model.get_base_model() if self._peft is not None else model
        self.device: torch.device = next(self.model.parameters()).device
        mixes = self._peft is not None and not has_trained_biases(model) and can_mix_adapters(self.model)
        self._mixed_lora = MixedLora(self.model) if mixes else None
        config = self.model.config.get_text_config()
        self._layer_types = set(getattr(config, "layer_types", None) or ())
        if unknown := self._layer_types - {FULL, SLIDING}:
            types, fix = ", ".join(sorted(unknown)), "merge it (`strop merge`) and serve it with --engine vllm"
            what = f"{config.model_type}: strop's server cannot keep the state of layers of type {types}"
            raise ModelError(what, fix=fix)
        self._window = getattr(config, "sliding_window", None) if self._layer_types != {FULL} else None
        self._bool_masks = config._attn_implementation == "sdpa"
        parameters = inspect.signature(self.model.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._prefix_cache = PrefixCache(keep)
        self._prefilling: dict[SequenceState, Kv] = {}  # keys and values of prompts that are not finished
        self._lanes: dict[str, DecodeCache] = {}
        self._rows: dict[str, list[SequenceState]] = {}  # the sequences of each lane, in the order of its cache's rows

    def kv_bytes_per_position(self) -> int:
        """Measure the bytes that one position takes, by processing one token."""
        sequence = SequenceState(np.zeros(1, np.int32), None)
        self.admit(sequence)
        self.forward([Chunk(sequence, 1)])
        kv = self._prefilling.pop(sequence)
        return sum(tensor.numel() * tensor.element_size() for pair in kv for tensor in pair)

    def admit(self, sequence: SequenceState) -> None:
        kv = self._prefix_cache.find(sequence.adapter, sequence.ids)
        self._prefilling[sequence] = kv
        sequence.num_cached = sequence.num_reused = num_positions(kv)

    def release(self, sequence: SequenceState) -> None:
        """Move the sequence to the prefix cache; clear it if it failed, because NaN times 0 is NaN."""
        if self._prefilling.pop(sequence, None) is not None:
            return
        lane = self._lane(sequence.adapter)
        cache, rows = self._lanes[lane], self._rows[lane]
        row = rows.index(sequence)
        if sequence.finish_reason == "failed":
            cache.clear_row(row)
        else:
            ids = sequence.ids[: sequence.num_cached].copy()
            self._prefix_cache.add(sequence.adapter, ids, cache.copy_row(row))
        cache.remove(row)
        rows[row] = rows[-1]
        rows.pop()
        if not rows:
            del self._lanes[lane], self._rows[lane]

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], *, logits: bool = True) -> PassOutput:
        by_sequence: dict[SequenceState, Logits] = {}
        for lane, rows in self._rows.items():
            by_sequence |= dict(zip(rows, self._decode(lane).float().cpu().numpy(), strict=True))
        prompts: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            if chunk.sequence in self._prefilling:
                prompts.setdefault(self._lane(chunk.sequence.adapter), []).append(chunk)
        for lane, lane_chunks in prompts.items():
            by_sequence |= self._prefill(lane, lane_chunks)
        outputs = [by_sequence[chunk.sequence] for chunk in chunks if chunk.num_outputs]
        return PassOutput.from_logits(np.stack(outputs) if outputs else np.empty((0, 1), np.float32))

    def _lane(self, adapter: str | None) -> str:
        """Return the lane of an adapter: sequences of one lane are decoded together."""
        return "" if self._mixed_lora is not None or self._peft is None else f"+{adapter}" if adapter else "base"

    def _prefill(self, lane: str, chunks: list[Chunk]) -> dict[SequenceState, Logits]:
        """Process prompts of one lane. Finished ones become rows of its cache; return their logits."""
        before = {chunk.sequence: self._prefilling[chunk.sequence] for chunk in chunks}
        logits = self._forward_prompts(chunks)
        if len(chunks) > 1 and logits and not torch.stack([row.max() for row in logits.values()]).isfinite().all():
            # NaN spreads to other sequences of the pass: process each alone, so that only its own request fails
            self._prefilling |= before
            logits = {}
            for chunk in chunks:
                logits |= self._forward_prompts([chunk])
        for chunk in chunks:
            chunk.sequence.num_cached += chunk.count
            if chunk.num_outputs:
                self._lanes.setdefault(lane, DecodeCache()).add(self._prefilling.pop(chunk.sequence))
                self._rows.setdefault(lane, []).append(chunk.sequence)
        if not logits:
            return {}
        values = torch.stack(list(logits.values())).float().cpu().numpy()
        return dict(zip(logits, values, strict=True))

    def _forward_prompts(self, chunks: Sequence[Chunk]) -> dict[SequenceState, Tensor]:
        """Process the next positions of prompts; return the logits (vocabulary,) of those that are finished."""
        counts = torch.tensor([chunk.count for chunk in chunks])
        starts = torch.tensor([num_positions(self._prefilling[chunk.sequence]) for chunk in chunks])
        places = list(zip(chunks, starts.tolist(), (starts + counts).tolist(), strict=True))
        ids = torch.cat([_tensor(chunk.sequence.ids[start:end]) for chunk, start, end in places])
        positions = torch.cat([torch.arange(start, end) for _, start, end in places])
        owners = torch.arange(len(chunks)).repeat_interleave(counts)
        past_positions = torch.cat([torch.arange(start) for start in starts.tolist()])
        past_owners = torch.arange(len(chunks)).repeat_interleave(starts)
        key_positions, key_owners = torch.cat([past_positions, positions]), torch.cat([past_owners, owners])
        visible = (owners[:, None] == key_owners) & (positions[:, None] >= key_positions)
        ends = counts.cumsum(0)
        cache = PrefillCache(concatenate([self._prefilling[chunk.sequence] for chunk in chunks]))
        with self._use_adapters([chunk.sequence.adapter for chunk in chunks for _ in range(chunk.count)]):
            masks = self._masks(visible, positions[:, None] - key_positions)
            logits = self._forward(ids[None], positions[None], masks, cache, logits_to_keep=ends - 1)[0]
        for chunk, end in zip(chunks, ends.tolist(), strict=True):
            new = slice_positions(cache.new, end - chunk.count, end)
            self._prefilling[chunk.sequence] = concatenate([self._prefilling[chunk.sequence], new])
        return {chunk.sequence: logits[place] for place, chunk in enumerate(chunks) if chunk.num_outputs}

    def _decode(self, lane: str) -> Tensor:
        """Process the last token of each row of a lane; return the logits (rows, vocabulary)."""
        cache, rows = self._lanes[lane], self._rows[lane]
        positions = cache.start_step(self.device)
        distance = positions[:, :, None] - torch.arange(cache.width, device=self.device)
        (last,) = copy_to_device([np.array([[sequence.ids[-1]] for sequence in rows], dtype=np.int64)], self.device)
        with self._use_adapters([sequence.adapter for sequence in rows]):
            logits = self._forward(last, positions, self._masks(distance >= 0, distance), cache)[:, -1]
        cache.finish_step()
        for sequence in rows:
            sequence.num_cached += 1
        return logits

    def _masks(self, visible: Tensor, distance: Tensor) -> Any:
        """Return the attention masks in the form that the model takes.

        visible: whether a query may see a key; distance: how far back the key is; (queries, keys) or (rows, 1, keys).
        """
        full = self._mask(visible)
        if self._window is None:
            return full
        sliding = self._mask(visible & (distance < self._window))
        return {FULL: full, SLIDING: sliding} if len(self._layer_types) > 1 else sliding

    def _mask(self, visible: Tensor) -> Tensor:
        shaped = (visible[:, None] if visible.dim() == 3 else visible[None, None]).to(self.device)
        if self._bool_masks:
            return shaped
        dtype = self.model.dtype
        return torch.zeros_like(shaped, dtype=dtype).masked_fill(~shaped, torch.finfo(dtype).min)

    def _forward(self, ids: Tensor, positions: Tensor, masks: Any, cache: Any, **options: Any) -> Tensor:
        options = {name: value.to(self.device) for name, value in options.items()}
        logits: Tensor = self.model(
            input_ids=ids.to(self.device), position_ids=positions.to(self.device), attention_mask=masks, use_cache=True,
            return_dict=True, **{self._cache_argument: cache}, **options,
        ).logits  # fmt: skip
        return logits

    @contextmanager
    def _use_adapters(self, adapters: Sequence[str | None]) -> Iterator[None]:
        if self._mixed_lora is not None:
            self._mixed_lora.set_adapters(adapters, self.device)
            yield
        elif self._peft is None:
            yield
        elif adapters[0] is None:
            with adapter_disabled(self._peft):
                yield
        else:
            self._peft.set_adapter(adapters[0])
            yield


def _tensor(ids: Ids) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))


# --- several adapters in one batch ---------------------------------------------------------------------------------


def can_mix_adapters(model: Any) -> bool:
    """Return whether all adapters of a model are plain LoRA on linear layers: not DoRA, trained rows or modules.

    An adapter on the head is excluded too: the head sees the last tokens only, and MixedLora could not assign them.
    """
    if isinstance(model.get_output_embeddings(), LoraLayer):
        return False
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return False
        if isinstance(module, LoraLayer):
            variants = [*module.lora_variant.values(), *(bias for bias in module.lora_bias.values() if bias)]
            if type(module) is not PeftLinear or variants or module.merged:
                return False
    return True


class MixedLora:
    """Replaces PEFT's forward on every LoRA layer of a model, so that each token of a batch uses its own adapter.

    tokens: for each adapter, the indices of its tokens in the flattened batch; None for all of them.
    """

    def __init__(self, model: Any) -> None:
        assert can_mix_adapters(model)
        self.tokens: dict[str, Tensor | None] = {}
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.forward = partial(self._forward, module)

    def set_adapters(self, adapters: Iterable[str | None], device: torch.device) -> None:
        """Set the adapter of each token of the next batch; None for the base model."""
        by_token = np.array([name or "" for name in adapters])
        names = sorted(set(by_token.tolist()) - {""})
        if len(names) == 1 and (by_token == names[0]).all():
            self.tokens = {names[0]: None}
        else:
            indices = copy_to_device([np.flatnonzero(by_token == name) for name in names], device)
            self.tokens = dict(zip(names, indices, strict=True))

    def _forward(self, module: Any, x: Tensor) -> Tensor:
        change: Tensor | None = None
        for name, tokens in self.tokens.items():
            if name not in module.lora_A:
                continue
            if tokens is None:
                change = adapter_delta(module, name, x)
                continue
            part = adapter_delta(module, name, x.flatten(0, -2)[tokens])
            if change is None:
                change = part.new_zeros(*x.shape[:-1], part.shape[-1])
            change.view(-1, part.shape[-1])[tokens] = part
        result: Tensor = module.base_layer(x) if change is None else add_to_base(module.base_layer, x, change)
        return result


# --- a check before serving ----------------------------------------------------------------------------------------


@torch.inference_mode()
def check_batching(decoder: HfDecoder, module: Any) -> None:
    """Check that the base model completes two sequences in a batch as it completes each alone.

    Some families count positions in the cache, or its length, and ignore the positions and masks that they are given.
    Their output would be wrong without an error.

    Raises ModelError if the outputs differ or the model's code fails. decoder: a new one, for `module`.
    """
    base = decoder.model
    kind, fix = base.config.model_type, "use `strop chat` or `strop eval`, or serve it with --engine vllm"
    if counted := CACHE_POSITIONS.get(kind):
        what = f"{kind}: {counted} are counted by positions in the cache, which the sequences of a batch share"
        raise ModelError(what, fix=fix)
    try:
        tokens_of = _decode_test_sequences(decoder, base.get_input_embeddings().weight.shape[0])
        with nullcontext() if module is base else adapter_disabled(module):
            errors = [error for item in tokens_of.items() for error in _log_prob_errors(base, *item)]
    except Exception as error:  # the family's own code may raise anything, and then the model cannot be served
        message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ModelError(f"{kind}: cannot decode several sequences in a batch: {message}", fix=fix) from None
    if not np.mean(errors) <= LIMITS.get(base.dtype, DEFAULT_LIMIT):
        what = f"two sequences in a batch differ from each alone by {np.mean(errors):.2g} nats a token"
        raise ModelError(f"{kind}: {what}", fix=fix)


def _decode_test_sequences(decoder: HfDecoder, vocabulary: int) -> dict[SequenceState, list[Token]]:
    batch, lengths = Batch(decoder, len(PROMPT_LENGTHS)), list(PROMPT_LENGTHS)
    tokens: dict[SequenceState, list[Token]] = {}
    while lengths or batch.sequences:
        if lengths:
            ids = (np.arange(lengths.pop(0), dtype=np.int32) * 7 + 5) % vocabulary
            sequence = SequenceState(ids, None, max_new_tokens=NUM_TOKENS, num_logprobs=0)
            tokens[sequence] = []
            batch.add(sequence)
        for progress in batch.step():
            tokens[progress.sequence] += progress.tokens
    return tokens


def _log_prob_errors(base: Any, sequence: SequenceState, tokens: Sequence[Token]) -> list[float]:
    """Return |difference| of each token's log-probability from a forward pass over the sequence alone."""
    device = base.get_input_embeddings().weight.device
    logits = base(input_ids=_tensor(sequence.ids)[None].to(device), use_cache=False).logits[0]
    log_probs = logits.float().log_softmax(-1).cpu()
    first = len(sequence.ids) - len(tokens) - 1
    return [abs(float(log_probs[first + place, token.id]) - token.logprob) for place, token in enumerate(tokens)]
