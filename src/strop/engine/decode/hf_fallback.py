"""Decoding with transformers, for models that the compiled decoder does not support.

`hf_generate` runs transformers' generate on a batch of prompts, for chat, evaluation and rollouts. It supports all
models. `HfDecoder` calls the model's own forward, for continuous batching in the server. It supports models whose state
consists of keys and values, and `check_batching` tests that the sequences in a batch do not affect each other.
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
from strop.engine.decode.decoder import Chunk, attends_bidirectionally, find_key_ends, find_positions
from strop.engine.decode.hf_cache import DecodeCache, Kv, PrefillCache, PrefixCache, concat_kv, kv_length, slice_kv
from strop.engine.decode.sampling import Logits, PassOutput, Sampling, SequenceState, Token
from strop.engine.eligibility import rope_types
from strop.engine.images import image_features
from strop.engine.train.buffers import copy_to_device
from strop.errors import ModelError, first_line
from strop.models.adapters import adapter_disabled, has_trained_biases
from strop.models.lora import adapter_delta, add_to_base
from strop.models.upstream_errors import convert_model_errors

FULL, SLIDING = "full_attention", "sliding_attention"  # types of layers in a config

# For check_batching:
PROMPT_LENGTHS = 21, 9  # the second sequence joins when the first has one token
NUM_TOKENS = 4
LIMITS = {torch.float32: 1e-3}  # maximum mean |difference| of log-probabilities, in nats per token
DEFAULT_LIMIT = 0.25  # for other dtypes
# What families compute from positions in the cache, which the short texts of check_batching would not show.
USES_CACHE_POSITIONS = {"gpt_neo": "its windows", "mpt": "its distances"}
# Families whose answers change with the other prompts of a batch (tests/engine/decode/test_hf_batches.py).
CHANGED_BY_BATCH = {
    "bart", "bigbird_pegasus", "blenderbot", "cpmant", "deepseek_v4", "git", "marian", "mbart", "minimax", "mvp",
    "pegasus", "prophetnet", "reformer", "rwkv", "trocr", "whisper", "xlnet",
}  # fmt: skip


def batch_keys(model: Any, prompts: Sequence[Ids]) -> list[int]:
    """Return a key for each prompt: those with the same one may share a batch of `hf_generate`. 0: with any other.

    Angles of some rotary embeddings depend on the longest row, such as those of Phi-3 with long contexts.
    """
    config = model.config.get_text_config()
    if config.model_type in CHANGED_BY_BATCH:
        return list(range(1, len(prompts) + 1))
    if not {"dynamic", "longrope"}.isdisjoint(rope_types(config)):
        return list(map(len, prompts))
    return [0] * len(prompts)


@torch.no_grad()
def hf_generate(
    model: Any, prompts: Sequence[Ids], sampling: Sampling, *, stop_ids: Sequence[int], max_new_tokens: int,
    pad_id: int, streamer: TextStreamer | None = None, with_log_probs: bool = False,
) -> tuple[list[list[int]], LogProbs | None]:  # fmt: skip
    """Complete a batch of prompts with transformers' generate. The caller sets the seed.

    Returns the new tokens of each prompt, padded to one length, and the log-probabilities (prompts, tokens) or None.
    """
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=sampling.temperature != 0, eos_token_id=list(stop_ids),
        pad_token_id=pad_id, use_cache=True, repetition_penalty=sampling.repetition_penalty,
        **(options if sampling.temperature != 0 else {}),
    )  # fmt: skip
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    device, training = next(model.parameters()).device, model.training
    recorder = _LogProbRecorder() if with_log_probs else None
    # Rollouts do not use the hook, because the matmul of a contiguous copy rounds differently in fp32.
    hook = nullcontext() if with_log_probs else model.get_output_embeddings().register_forward_pre_hook(_copy_input)
    features = image_features(model)
    images = {} if features is None else features.arguments(ids.to(device))
    model.eval()
    try:
        with convert_model_errors(str(model.config.model_type)), hook:
            output = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, streamer=streamer,
                logits_processor=LogitsProcessorList([recorder] if recorder else []), **images,
            )  # fmt: skip
    finally:
        model.train(training)
    return output[:, width:].tolist(), recorder.log_probs(output) if recorder else None


def _copy_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the head's input. For a strided input, PyTorch copies the whole head for each row (SmolLM2: 1.6 s)."""
    return (inputs[0].contiguous(), *inputs[1:])


class _LogProbRecorder(LogitsProcessor):  # type: ignore[misc]
    """Records the log-probability of each sampled token."""

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
        """Return the log-probabilities, (rows, tokens). output: the result of generate."""
        self._record(output)
        log_probs: LogProbs = torch.cat(self._recorded, 1).double().cpu().numpy()
        return log_probs


class TextCallbackStreamer(TextStreamer):  # type: ignore[misc]
    """Calls a function with the decoded text instead of printing it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


class HfDecoder:
    """Decoder on a model's own forward, for a causal language model or a PeftModel with any number of adapters.

    Prompts are concatenated to one row, with a mask that separates them. Decoding sequences are the rows of a
    DecodeCache. Adapters that cannot be mixed in a batch (see can_mix_adapters) have a cache and forward pass each.

    keep: the number of positions of finished sequences that are cached for later sequences with the same prefix.

    Raises ModelError for an architecture whose state is more than keys and values.
    """

    num_cheap_rows = 1  # a pass over more rows takes longer, so speculative decoding is off

    def __init__(self, model: Any, keep: int) -> None:
        self._peft = model if hasattr(model, "peft_config") else None
        self.model: Any = model.get_base_model() if self._peft is not None else model
        self.device: torch.device = next(self.model.parameters()).device
        can_mix = self._peft is not None and not has_trained_biases(model) and can_mix_adapters(self.model)
        self._mixed_lora = MixedLora(self.model) if can_mix else None
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
        self._images = image_features(self.model)
        self._prefix_cache = PrefixCache(keep)
        self._prefilling: dict[SequenceState, Kv] = {}  # keys and values of prompts that are being processed
        self._caches: dict[str, DecodeCache] = {}  # by _group_name
        self._rows: dict[str, list[SequenceState]] = {}  # the sequences in the rows of each cache

    @property
    def whole_images(self) -> bool:
        return attends_bidirectionally(self._images)

    def kv_bytes_per_position(self) -> int:
        """Return the number of bytes per position, measured by processing one token."""
        sequence = SequenceState(np.zeros(1, np.int32), None)
        self.admit(sequence)
        self.forward([Chunk(sequence, 1)])
        kv = self._prefilling.pop(sequence)
        return sum(tensor.numel() * tensor.element_size() for pair in kv for tensor in pair)

    def admit(self, sequence: SequenceState) -> None:
        kv = self._prefix_cache.find(sequence.adapter, sequence.ids)
        self._prefilling[sequence] = kv
        sequence.num_cached = sequence.num_reused = kv_length(kv)

    def release(self, sequence: SequenceState) -> None:
        """Move the sequence to the prefix cache, or clear its row if it failed."""
        if self._prefilling.pop(sequence, None) is not None:
            return
        group = self._group_name(sequence.adapter)
        cache, rows = self._caches[group], self._rows[group]
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
            del self._caches[group], self._rows[group]

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], *, logits: bool = True) -> PassOutput:
        by_sequence: dict[SequenceState, Logits] = {}
        for group, rows in self._rows.items():
            by_sequence |= dict(zip(rows, self._decode(group).float().cpu().numpy(), strict=True))
        prompts: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            if chunk.sequence in self._prefilling:
                prompts.setdefault(self._group_name(chunk.sequence.adapter), []).append(chunk)
        for group, group_chunks in prompts.items():
            by_sequence |= self._prefill(group, group_chunks)
        outputs = [by_sequence[chunk.sequence] for chunk in chunks if chunk.num_outputs]
        return PassOutput.from_logits(np.stack(outputs) if outputs else np.empty((0, 1), np.float32))

    def _group_name(self, adapter: str | None) -> str:
        """Return the name of the group of adapters whose sequences are decoded together with this one."""
        return "" if self._mixed_lora is not None or self._peft is None else f"+{adapter}" if adapter else "base"

    def _prefill(self, group: str, chunks: list[Chunk]) -> dict[SequenceState, Logits]:
        """Process prompts of a group. Add the finished ones to the group's cache, and return their logits."""
        before = {chunk.sequence: self._prefilling[chunk.sequence] for chunk in chunks}
        logits = self._forward_prompts(chunks)
        if len(chunks) > 1 and logits and not torch.stack([row.max() for row in logits.values()]).isfinite().all():
            # NaN spreads to other sequences of the pass. Process each alone, so that only one request fails.
            self._prefilling |= before
            logits = {}
            for chunk in chunks:
                logits |= self._forward_prompts([chunk])
        for chunk in chunks:
            chunk.sequence.num_cached += chunk.count
            if chunk.num_outputs:
                self._caches.setdefault(group, DecodeCache()).add(self._prefilling.pop(chunk.sequence))
                self._rows.setdefault(group, []).append(chunk.sequence)
        if not logits:
            return {}
        values = torch.stack(list(logits.values())).float().cpu().numpy()
        return dict(zip(logits, values, strict=True))

    def _forward_prompts(self, chunks: Sequence[Chunk]) -> dict[SequenceState, Tensor]:
        """Process the next positions of prompts, and return the logits (vocabulary,) of finished prompts."""
        counts = torch.tensor([chunk.count for chunk in chunks])
        starts = torch.tensor([kv_length(self._prefilling[chunk.sequence]) for chunk in chunks])
        spans = list(zip(chunks, starts.tolist(), (starts + counts).tolist(), strict=True))
        ids = torch.cat([_to_tensor(chunk.sequence.ids[start:end]) for chunk, start, end in spans])
        positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
        owners = torch.arange(len(chunks)).repeat_interleave(counts)
        past_positions = torch.cat([torch.arange(start) for start in starts.tolist()])
        past_owners = torch.arange(len(chunks)).repeat_interleave(starts)
        key_positions, key_owners = torch.cat([past_positions, positions]), torch.cat([past_owners, owners])
        visible = (owners[:, None] == key_owners) & (positions[:, None] >= key_positions)
        bidirectional = None
        if self.whole_images:
            key_ends = [find_key_ends(self._images, chunk.sequence, chunk.count) for chunk in chunks]
            is_before_end = torch.from_numpy(np.concatenate(key_ends))[:, None] > key_positions
            bidirectional = (owners[:, None] == key_owners) & is_before_end
        ends = counts.cumsum(0)
        cache = PrefillCache(concat_kv([self._prefilling[chunk.sequence] for chunk in chunks]))
        with self._use_adapters([chunk.sequence.adapter for chunk in chunks for _ in range(chunk.count)]):
            masks = self._build_masks(visible, positions[:, None] - key_positions, bidirectional)
            ropes = self._find_positions([(chunk.sequence, chunk.count) for chunk in chunks], positions)[..., None, :]
            logits = self._forward(ids[None], ropes, masks, cache, logits_to_keep=ends - 1)[0]
        for chunk, end in zip(chunks, ends.tolist(), strict=True):
            new = slice_kv(cache.new, end - chunk.count, end)
            self._prefilling[chunk.sequence] = concat_kv([self._prefilling[chunk.sequence], new])
        return {chunk.sequence: logits[i] for i, chunk in enumerate(chunks) if chunk.num_outputs}

    def _decode(self, group: str) -> Tensor:
        """Process the last token of each sequence of a group, and return the logits (rows, vocabulary)."""
        cache, rows = self._caches[group], self._rows[group]
        positions = cache.start_step(self.device)
        distance = positions[:, :, None] - torch.arange(cache.width, device=self.device)
        (last,) = copy_to_device([np.array([[sequence.ids[-1]] for sequence in rows], dtype=np.int64)], self.device)
        with self._use_adapters([sequence.adapter for sequence in rows]):
            ropes = self._find_positions([(sequence, 1) for sequence in rows], positions[:, 0])[..., None]
            logits = self._forward(last, ropes, self._build_masks(distance >= 0, distance), cache)[:, -1]
        cache.finish_step()
        for sequence in rows:
            sequence.num_cached += 1
        return logits

    def _find_positions(self, spans: Sequence[tuple[SequenceState, int]], positions: Tensor) -> Tensor:
        """Return the positions of the rotary embedding, (T,) or (3, T). positions: of the tokens, (T,)."""
        space = find_positions(self._images, spans)
        return positions if space is None else copy_to_device([space], self.device)[0]

    def _build_masks(self, visible: Tensor, distance: Tensor, bidirectional: Tensor | None = None) -> Any:
        """Return the attention mask, or the masks by type of layer, in the format of the model.

        visible: whether a query attends to a key without a window. distance: the position of the query minus that of
        the key. Both are (queries, keys) or (rows, 1, keys). bidirectional: like visible, for layers in which the
        features of an image attend to all of its features.
        """
        full_keys = sliding_keys = visible
        if bidirectional is not None and self._images is not None:
            types = self._images.bidirectional_layers
            full_keys, sliding_keys = (bidirectional if {"", name} & types else visible for name in (FULL, SLIDING))
        full = self._build_mask(full_keys)
        if self._window is None:
            return full
        sliding = self._build_mask(sliding_keys & (distance < self._window))
        return {FULL: full, SLIDING: sliding} if len(self._layer_types) > 1 else sliding

    def _build_mask(self, visible: Tensor) -> Tensor:
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


def _to_tensor(ids: Ids) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))


def can_mix_adapters(model: Any) -> bool:
    """Return whether all adapters of a model are plain LoRA on linear layers, without DoRA or modules trained in full.

    Adapters on the head are not supported, because the input of the head does not contain all tokens.
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
    """Replaces PEFT's forward on all LoRA layers of a model, so that the tokens of a batch can use different adapters.

    tokens: the indices of the tokens of each adapter in the flattened batch; None for all tokens.
    """

    def __init__(self, model: Any) -> None:
        assert can_mix_adapters(model)
        self.tokens: dict[str, Tensor | None] = {}
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.forward = partial(self._forward, module)

    def set_adapters(self, adapters: Iterable[str | None], device: torch.device) -> None:
        """Set the adapter of each token of the next batch; None for the base model."""
        token_adapters = np.array([name or "" for name in adapters])
        names = sorted(set(token_adapters.tolist()) - {""})
        if len(names) == 1 and (token_adapters == names[0]).all():
            self.tokens = {names[0]: None}
        else:
            indices = copy_to_device([np.flatnonzero(token_adapters == name) for name in names], device)
            self.tokens = dict(zip(names, indices, strict=True))

    def _forward(self, module: Any, x: Tensor) -> Tensor:
        delta: Tensor | None = None
        for name, tokens in self.tokens.items():
            if name not in module.lora_A:
                continue
            if tokens is None:
                delta = adapter_delta(module, name, x)
                continue
            part = adapter_delta(module, name, x.flatten(0, -2)[tokens])
            if delta is None:
                delta = part.new_zeros(*x.shape[:-1], part.shape[-1])
            delta.view(-1, part.shape[-1])[tokens] = part
        result: Tensor = module.base_layer(x) if delta is None else add_to_base(module.base_layer, x, delta)
        return result


@torch.inference_mode()
def check_batching(decoder: HfDecoder, module: Any) -> None:
    """Check that the base model gives two sequences in a batch the same log-probabilities as each of them alone.

    This fails for families that use positions in the cache instead of the position ids and masks.

    decoder: a new decoder for `module`. Raises ModelError if the results differ or the model's code fails.
    """
    base = decoder.model
    kind, fix = base.config.model_type, "use `strop chat` or `strop eval`, or serve it with --engine vllm"
    if feature := USES_CACHE_POSITIONS.get(kind):
        what = f"{kind}: {feature} are computed from positions in the cache, which the sequences of a batch share"
        raise ModelError(what, fix=fix)
    try:
        results = _decode_test_sequences(decoder, base.get_input_embeddings().weight.shape[0])
        with nullcontext() if module is base else adapter_disabled(module):
            errors = [error for item in results.items() for error in _log_prob_errors(base, *item)]
    except Exception as error:  # from the model's own code
        message = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{kind}: cannot decode several sequences in a batch: {message}", fix=fix) from None
    if not np.mean(errors) <= LIMITS.get(base.dtype, DEFAULT_LIMIT):
        what = f"two sequences in a batch differ from each alone by {np.mean(errors):.2g} nats per token"
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
    """Return |difference| between the tokens' log-probabilities and those of a forward pass over the sequence alone."""
    device = base.get_input_embeddings().weight.device
    logits = base(input_ids=_to_tensor(sequence.ids)[None].to(device), use_cache=False).logits[0]
    log_probs = logits.float().log_softmax(-1).cpu()
    first = len(sequence.ids) - len(tokens) - 1
    return [abs(float(log_probs[first + i, token.id]) - token.logprob) for i, token in enumerate(tokens)]
