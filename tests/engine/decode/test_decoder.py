"""The compiled decoder against transformers, family by family; its precision; sharing of prefixes."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from strop.data.types import Ids
from strop.engine.decode import compiled_model, generate
from strop.engine.decode.batch import Batch, batch_for, decode_all, decode_groups
from strop.engine.decode.cache import BLOCK_SIZE, BlockPool
from strop.engine.decode.decoder import Chunk, CompiledDecoder, why_decoder_unsupported
from strop.engine.decode.sampling import ExpectedCompletion, Sampling, SequenceState
from strop.engine.kernels.cpu import decode_layer as passes
from strop.engine.kernels.cpu import decode_matmul
from strop.models.families.table import FAMILIES
from strop.models.quantize import QuantizedLinear, dequantize_layers, quantize_weight, replace_linears
from tests.support.random_models import FAMILY_CONFIGS, adapted, tiny_of
from tests.support.slow import slow_except

TOKENS = 12


@pytest.fixture(autouse=True)
def _use_exact_argmax_for_every_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use exact argmax, which otherwise requires a head that is a larger part of the weights."""
    monkeypatch.setattr(compiled_model, "MIN_HEAD_SHARE", 0.0)


def prompts(count: int = 8) -> list[Ids]:
    """Return prompts shorter and longer than a window of 4 and than a block. The last shares a prefix longer than a
    block.
    """
    random = np.random.default_rng(0)
    rows = [random.integers(3, 96, int(n)).astype(np.int32) for n in [1, 3, 50, 17, 33, 8, 64][: count - 1]]
    return [*rows, np.concatenate([rows[2][: BLOCK_SIZE + 5], rows[3]])]


def greedy_without_cache(model: Any, ids: Ids, tokens: int = TOKENS) -> list[int]:
    """Run the whole sequence through the model for each token."""
    sequence = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.inference_mode():
        for _ in range(tokens):
            sequence = torch.cat([sequence, model(input_ids=sequence, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return sequence[0, len(ids) :].tolist()


def completions(decoder: CompiledDecoder, sequences: list[SequenceState], rows: int, **options: Any) -> list[list[int]]:
    for _ in decode_all(Batch(decoder, rows, **options), sequences):
        pass
    return [sequence.completion for sequence in sequences]


def with_large_weights(model: Any) -> Any:
    """Scale the weights, so that the predictions differ."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "lora" not in name:
            weight.data.mul_(4)
    return model.eval()


@pytest.mark.parametrize("family", [name for name in FAMILY_CONFIGS if FAMILIES[name].fully_fused])
def test_completions_equal_those_of_transformers(family: str) -> None:
    """Sequences join and leave, of the base and of the adapter; some reuse the prefix of others."""
    model = with_large_weights(adapted(family))
    decoder, rows = CompiledDecoder(model, 1000), prompts()
    sequences = [
        SequenceState(ids, None if place % 3 == 1 else "default", max_new_tokens=TOKENS)
        for place, ids in enumerate(rows)
    ]
    outputs = completions(decoder, sequences, 3, prefill_rows=20)
    for sequence, ids, answer in zip(sequences, rows, outputs, strict=True):
        with model.disable_adapter() if sequence.adapter is None else nullcontext():
            assert answer == greedy_without_cache(model, ids)
    assert decoder.blocks.free == decoder.blocks.count


def logits_of(decoder: CompiledDecoder, sequences: list[SequenceState]) -> list[np.ndarray]:
    """Return the logits at every position, from one pass over all sequences."""
    for sequence in sequences:
        decoder.admit(sequence)
    lengths = [sequence.num_uncached for sequence in sequences]
    seen = decoder.forward([Chunk(sequence, sequence.num_uncached, sequence.num_uncached) for sequence in sequences])
    outputs = np.split(seen.logits.copy(), np.cumsum(lengths)[:-1])
    for sequence in sequences:
        decoder.release(sequence)
    decoder.blocks = BlockPool(decoder.blocks.count)
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    model = adapted("qwen3", hidden_size=64, intermediate_size=96, head_dim=32).to(dtype).eval()
    decoder, rows = CompiledDecoder(model, 2000), prompts()
    sequences = [SequenceState(ids, None if place % 2 else "default") for place, ids in enumerate(rows)]
    together = logits_of(decoder, sequences)
    for sequence, expected_outputs in zip(sequences, together, strict=True):
        again = SequenceState(sequence.ids, sequence.adapter)
        decoder.admit(again)
        chunks = []
        while again.num_uncached:  # three positions at a time
            count = min(3, again.num_uncached)
            chunks.append(decoder.forward([Chunk(again, count, count)]).logits.copy())
        assert np.array_equal(np.concatenate(chunks), expected_outputs)
        decoder.release(again)
        decoder.blocks = BlockPool(decoder.blocks.count)


def test_bf16_error_is_at_most_that_of_transformers() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4}
    model = with_large_weights(adapted("llama", **sizes, num_hidden_layers=3)).to(torch.bfloat16)
    rows = prompts()[:-1]
    outputs = logits_of(CompiledDecoder(model, 2000), [SequenceState(ids, "default") for ids in rows])
    wide = with_large_weights(adapted("llama", **sizes, num_hidden_layers=3))
    wide.load_state_dict(model.state_dict())  # the weights as rounded to bf16
    ours, theirs = [], []
    for ids, logits in zip(rows, outputs, strict=True):
        generated = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.inference_mode():
            true = wide(input_ids=generated).logits[0].log_softmax(-1)
            theirs.append((model(input_ids=generated).logits[0].float().log_softmax(-1) - true).flatten())
        ours.append((torch.from_numpy(logits).log_softmax(-1) - true).flatten())
    assert torch.cat(ours).square().mean() <= torch.cat(theirs).square().mean()
    assert torch.cat(ours).abs().max() < 1.2 * torch.cat(theirs).abs().max()


def quantized(scheme: str, dtype: torch.dtype, sizes: dict[str, int]) -> tuple[Any, dict[str, QuantizedLinear]]:
    """Return a tiny Llama with quantized linear layers, and these layers by name."""
    model = tiny_of("llama", head_dim=16, num_attention_heads=4, **sizes).to(dtype).eval()
    whole = {name: module.weight.data for name, module in model.named_modules() if hasattr(module, "weight")}
    layers = replace_linears(model, scheme, dtype, lambda name: "layers" in name)
    for name, module in layers.items():
        module.load_packed(quantize_weight(whole[name], scheme))
    return model, layers


@pytest.mark.parametrize("dtype", slow_except([torch.float32, torch.bfloat16], [torch.bfloat16]))
@pytest.mark.parametrize("scheme", slow_except(["nf4", "fp4", "int8"], ["nf4", "int8"]))
def test_quantized_weights_give_the_logits_of_dequantized_weights(scheme: str, dtype: torch.dtype) -> None:
    """They are bit-identical, with AMX equal up to bf16 rounding. int8 weights with bf16 inputs are tested below."""
    pytest.importorskip("bitsandbytes")
    if scheme == "int8" and dtype == torch.bfloat16 and passes.INT8_DOTS:
        pytest.skip("this CPU multiplies int8 without dequantizing")
    for sizes in ({"hidden_size": 128, "intermediate_size": 256}, {"hidden_size": 48, "intermediate_size": 80}):
        model, layers = quantized(scheme, dtype, sizes)
        packed = [module.packed_weight() for module in layers.values()]
        assert all(packed) or (scheme != "int8" and sizes["hidden_size"] % 64)
        sequences = [SequenceState(ids, None) for ids in prompts()[:-1]]
        outputs = logits_of(CompiledDecoder(model, 2000), sequences)
        dequantize_layers(model, 99)
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
        for quantized_logits, logits in zip(outputs, logits_of(CompiledDecoder(model, 2000), sequences), strict=True):
            if decode_matmul.USES_AMX and dtype == torch.bfloat16:
                assert np.abs(quantized_logits - logits).max() < 0.02
            else:
                assert np.array_equal(quantized_logits, logits)


@pytest.mark.skipif(not passes.INT8_DOTS, reason="this CPU dequantizes int8 weights")
def test_int8_matmul_is_closer_to_fp32_than_the_dequantized_weight() -> None:
    model, layers = quantized("int8", torch.bfloat16, {"hidden_size": 128, "intermediate_size": 256})
    sequences = [SequenceState(ids, None) for ids in prompts()[:-1]]
    wide = deepcopy(model).float()
    for name in layers:
        wide.get_submodule(name).dtype = torch.float32
    true, outputs = (np.concatenate(logits_of(CompiledDecoder(variant, 2000), sequences)) for variant in (wide, model))
    few = [
        np.concatenate(logits_of(CompiledDecoder(model, 2000), [SequenceState(ids, None)])) for ids in prompts()[:-1]
    ]
    assert np.array_equal(np.concatenate(few), outputs)  # independent of the batch
    dequantize_layers(model, 99)
    whole = np.concatenate(logits_of(CompiledDecoder(model, 2000), sequences))
    assert np.square(outputs - true).mean() < np.square(whole - true).mean()
    assert np.square(outputs - true).mean() > 0


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"r": 20, "use_rslora": True}])
def test_dora_and_rslora_adapters_match_transformers(lora: dict[str, Any]) -> None:
    model = with_large_weights(adapted("qwen2", lora=lora))
    for name, weight in model.named_parameters():
        if "magnitude" in name:
            weight.data.mul_(1.3)
    decoder, rows = CompiledDecoder(model, 1000), prompts()
    sequences = [
        SequenceState(ids, None if place % 2 else "default", max_new_tokens=TOKENS) for place, ids in enumerate(rows)
    ]
    for sequence, ids, answer in zip(sequences, rows, completions(decoder, sequences, 5), strict=True):
        with model.disable_adapter() if sequence.adapter is None else nullcontext():
            assert answer == greedy_without_cache(model, ids)


def test_changed_adapter_weights_are_used_by_the_next_batch() -> None:
    model, ids = with_large_weights(adapted("llama")), prompts()[2]

    def completion() -> list[int]:
        sequence = SequenceState(ids, "default", max_new_tokens=TOKENS)
        for _ in decode_all(batch_for(model, [sequence]), [sequence]):
            pass
        return sequence.completion

    before = completion()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-3)
    assert completion() == greedy_without_cache(model, ids) != before


def test_speculative_decoding_saves_passes_and_keeps_the_output() -> None:
    model, random = with_large_weights(adapted("llama")), np.random.default_rng(1)
    phrase = random.integers(3, 96, 9).astype(np.int32)
    rows = [np.concatenate([phrase, phrase, phrase[:n]]) for n in (4, 6, 8)]
    for sampling in (Sampling(), Sampling(0.7, 0.9, seed=3), Sampling(repetition_penalty=1.2)):
        outputs, passes = {}, {}
        for speculative in (True, False):
            sequences = [SequenceState(ids, "default", max_new_tokens=30, sampling=sampling) for ids in rows]
            batch = Batch(CompiledDecoder(model, 1000), 3, speculative=speculative)
            passes[speculative] = sum(1 for _ in decode_all(batch, sequences))
            outputs[speculative] = [sequence.completion for sequence in sequences]
        assert outputs[True] == outputs[False]
        assert passes[True] < passes[False] or sampling != Sampling()


def test_cached_prefix_is_reused_by_the_same_adapter_only() -> None:
    decoder = CompiledDecoder(adapted("llama").eval(), 1000)
    ids = prompts()[6]
    first, second, other = (SequenceState(ids, adapter, max_new_tokens=2) for adapter in ("default", "default", None))
    completions(decoder, [first], 1)
    completions(decoder, [second, other], 2)
    assert second.num_reused == len(ids) - 1  # the last token is processed again, for its logits
    assert other.num_reused == 0 and first.completion == second.completion


@pytest.mark.parametrize("same", [1, 17, BLOCK_SIZE + 9])
def test_prefix_that_ends_inside_a_block_is_reused(same: int) -> None:
    model, random = with_large_weights(adapted("llama")), np.random.default_rng(1)
    decoder, ids = CompiledDecoder(model, 1000), random.integers(3, 96, 2 * BLOCK_SIZE + 3).astype(np.int32)
    completions(decoder, [SequenceState(ids, "default", max_new_tokens=2)], 1)
    other = np.concatenate([ids[:same], (ids[same : same + 1] + 1) % 96, ids[5:25]])
    sequences = [SequenceState(other, adapter, max_new_tokens=TOKENS) for adapter in ("default", None)]
    outputs = completions(decoder, sequences, 2)
    assert [sequence.num_reused for sequence in sequences] == [same, 0]
    assert outputs == completions(
        CompiledDecoder(model, 1000),
        [SequenceState(other, sequence.adapter, max_new_tokens=TOKENS) for sequence in sequences],
        2,
    )
    again = SequenceState(ids, "default", max_new_tokens=2)  # the block that was copied is unchanged
    assert completions(decoder, [again], 1) == completions(
        CompiledDecoder(model, 1000), [SequenceState(ids, "default", max_new_tokens=2)], 1
    )
    assert again.num_reused == len(ids) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("at_once", [5, 64, 256])
def test_expected_completions_are_scored_and_do_not_change_the_output(at_once: int) -> None:
    """The model would generate the expected completions fully, partly or not at all; some exceed the limit."""
    model = with_large_weights(adapted("llama"))
    decoder, rows = CompiledDecoder(model, 3000), prompts()
    plain = [
        SequenceState(ids, None if place % 3 == 1 else "default", max_new_tokens=TOKENS)
        for place, ids in enumerate(rows)
    ]
    generated = completions(decoder, plain, 4)
    stop = generated[4][-1]
    sequences, expected_outputs = [], []
    for place, (ids, answer) in enumerate(zip(rows, generated, strict=True)):
        right = np.array([*answer, 7, 8, 9], np.int32)[: [15, 12, 5, 1][place % 4]]
        if place % 3:
            right[len(right) // 2] = (right[len(right) // 2] + 1) % 96
        first = len(ids) // 2 if place % 2 else None
        stops = (stop,) if place == 4 else ()
        expected_outputs.append(answer[: answer.index(stop) + 1] if stops else answer)
        expected = ExpectedCompletion(right, first)
        sequences.append(
            SequenceState(ids, plain[place].adapter, max_new_tokens=TOKENS, stop_ids=stops, expected=expected)
        )
        sequences.append(
            SequenceState(ids, plain[place].adapter, max_new_tokens=TOKENS, stop_ids=stops)
        )  # without an expected completion
        expected_outputs.append(expected_outputs[-1])
    assert completions(decoder, sequences, 5, prefill_rows=at_once) == expected_outputs
    assert decoder.blocks.free == decoder.blocks.count
    for sequence, ids in zip(sequences[::2], rows, strict=True):
        whole = np.concatenate([ids, sequence.expected.ids])
        first = len(ids) - 1 if sequence.expected.first is None else sequence.expected.first
        with model.disable_adapter() if sequence.adapter is None else nullcontext(), torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(whole.astype(np.int64))[None]).logits[0].double()
        logs = logits.log_softmax(-1)[np.arange(first, len(whole) - 1), whole[first + 1 :]]
        assert np.allclose(sequence.expected_logprobs, logs, atol=1e-5) and len(logs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_decoding_uses_exact_argmax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is that of the full head. With a sampled sequence in the batch, the full head is used."""
    model = adapted("llama", hidden_size=64, intermediate_size=96, head_dim=32, vocab_size=96).to(dtype).eval()
    calls: list[bool] = []
    argmax = compiled_model.ExactArgmax.argmax

    def greedy(*others: SequenceState, full_head: bool = False) -> list[list[int]]:
        def counted(screen: compiled_model.ExactArgmax, z: Any) -> Any:
            calls.append(True)
            return None if full_head else argmax(screen, z)

        monkeypatch.setattr(compiled_model.ExactArgmax, "argmax", counted)
        calls.clear()
        sequences = [SequenceState(ids, name, max_new_tokens=TOKENS) for ids in prompts() for name in ("default", None)]
        return completions(CompiledDecoder(model, 4000), [*others, *sequences], 5)[len(others) :]

    expected = greedy()
    assert len(calls) > TOKENS
    assert expected == greedy(full_head=True)
    sampled = SequenceState(
        prompts()[0], None, max_new_tokens=300, sampling=Sampling(1.0, seed=1)
    )  # lasts longer than the others
    assert expected == greedy(sampled)
    assert not calls


def test_passes_without_outputs_skip_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are all passes over a long prompt except the last. The int8 kernel once treated zero rows as two."""
    model = adapted("llama", hidden_size=64, intermediate_size=96, head_dim=32, vocab_size=96).to(torch.bfloat16).eval()
    calls: list[int] = []
    argmax = compiled_model.ExactArgmax.argmax
    monkeypatch.setattr(compiled_model.ExactArgmax, "argmax", lambda self, z: calls.append(len(z)) or argmax(self, z))
    sequences = [SequenceState(ids, "default", max_new_tokens=3) for ids in prompts()]
    whole = completions(CompiledDecoder(model, 2000), sequences, 2)
    begun = len(calls)
    again = [SequenceState(ids, "default", max_new_tokens=3) for ids in prompts()]
    assert completions(CompiledDecoder(model, 2000), again, 2, prefill_rows=5) == whole
    assert len(calls) > begun and min(calls) > 0


def test_nan_logits_fail_a_sequence_with_an_expected_completion() -> None:
    model = adapted("llama").eval()
    model.get_base_model().lm_head.weight.data[5] = torch.nan
    sequence = SequenceState(
        prompts()[2], "default", max_new_tokens=3, expected=ExpectedCompletion(np.array([1, 2], np.int32))
    )
    assert completions(CompiledDecoder(model, 500), [sequence], 1) == [[]] and sequence.finish_reason == "failed"


def test_sequences_wait_for_a_prefix_that_is_being_processed() -> None:
    class Counting(CompiledDecoder):
        rows = 0

        def forward(self, chunks: Any, **options: Any) -> Any:
            self.rows += sum(chunk.count for chunk in chunks)
            return super().forward(chunks, **options)

    decoder, ids = Counting(adapted("llama").eval(), 2000), prompts()[6]
    sequences = [SequenceState(np.append(ids, np.int32(place)), "default", max_new_tokens=1) for place in range(5)]
    sequences.append(SequenceState(ids, None, max_new_tokens=1))
    completions(decoder, sequences, 6)
    assert decoder.rows == 2 * len(ids) + 1 + 4
    assert [sequence.num_reused for sequence in sequences] == [0, *[len(ids)] * 4, 0]


def test_closing_the_iterator_releases_all_blocks() -> None:
    decoder = CompiledDecoder(adapted("llama").eval(), 500)
    going = decode_all(Batch(decoder, 3), [SequenceState(ids, None, max_new_tokens=TOKENS) for ids in prompts()])
    next(going)
    assert decoder.blocks.free < decoder.blocks.count
    going.close()
    assert decoder.blocks.free == decoder.blocks.count


def test_unsupported_models_get_a_reason() -> None:
    assert why_decoder_unsupported(tiny_of("llama")) is None
    assert "not in the table" in str(why_decoder_unsupported(gpt_neo_like("gpt_neo")))
    assert "experts by the model's own modules" in str(why_decoder_unsupported(tiny_of("gpt_oss")))
    assert "trained in full" in str(why_decoder_unsupported(adapted("llama", lora={"modules_to_save": ["lm_head"]})))
    assert "an adapter on" in str(
        why_decoder_unsupported(adapted("llama", lora={"target_modules": ["lm_head"]}, tie_word_embeddings=False))
    )
    assert "float64" in str(why_decoder_unsupported(tiny_of("llama").double()))


def gpt_neo_like(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 64, "attention_types": [[["global"], 2]]}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


@pytest.mark.parametrize("length", [5, BLOCK_SIZE, BLOCK_SIZE + 7, 2 * BLOCK_SIZE])
@pytest.mark.parametrize("rows", [3, 64])
def test_group_processes_its_prompt_once(length: int, rows: int) -> None:
    """The completions are those of each sequence alone. Sequences that do not fit into the batch start later."""
    model = with_large_weights(adapted("llama"))
    prompts = [ids[:length] for ids in np.random.default_rng(1).integers(3, 96, (2, 80)).astype(np.int32)]

    def group_of(ids: Ids) -> list[SequenceState]:
        sampling = (Sampling(temperature=1.0, seed=seed) for seed in range(5))
        return [
            SequenceState(ids, "default", max_new_tokens=TOKENS, stop_ids=[7], sampling=setting, num_logprobs=0)
            for setting in sampling
        ]

    single = CompiledDecoder(model, 1000)
    expected_outputs = [completions(single, [sequence], 1)[0] for ids in prompts for sequence in group_of(ids)]
    decoder, groups, prompt_rows = CompiledDecoder(model, 1000), [group_of(ids) for ids in prompts], 0
    forward, batch = decoder.forward, Batch(decoder, rows, speculative=False)

    def counted(chunks: list[Chunk], **options: Any) -> Any:
        nonlocal prompt_rows
        prompt_rows += sum(chunk.count for chunk in chunks if chunk.sequence.num_cached < chunk.sequence.prompt_length)
        return forward(chunks, **options)

    decoder.forward = counted  # type: ignore[method-assign, assignment]
    logs: dict[SequenceState, list[float]] = {sequence: [] for group in groups for sequence in group}
    for progress in decode_groups(batch, groups):
        logs[progress.sequence] += [token.logprob for token in progress.tokens]
    assert [sequence.completion for group in groups for sequence in group] == expected_outputs and len(
        set(map(tuple, expected_outputs))
    ) > 6
    if rows == 64:
        assert prompt_rows == 2 * length
    assert decoder.blocks.free == decoder.blocks.count
    sequence = groups[0][1]
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(sequence.ids.astype(np.int64))[None]).logits[0].log_softmax(-1)
    outputs = logits[range(length - 1, sequence.length - 1), sequence.completion]
    assert logs[sequence] == pytest.approx(outputs.tolist(), abs=1e-4)


def test_followers_leave_with_their_leader() -> None:
    model = adapted("llama")
    decoder = CompiledDecoder(model, 1000)
    batch, group = (
        Batch(decoder, 8),
        [SequenceState(np.arange(3, 40, dtype=np.int32), "default", max_new_tokens=4) for _ in range(3)],
    )
    assert batch.add_group(group) == 3 and len(batch.sequences) == 1
    batch.remove(group[0])
    assert decoder.blocks.free == decoder.blocks.count and not batch.sequences


def test_progress_begins_after_the_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a terminal shows a bar of 0 rows instead of what is compiled."""
    calls: list[str] = []

    def compile_kernels(*_: Any) -> Any:
        calls.append("compiling")
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "batch_for", compile_kernels)
    finished = generate.generate(
        tiny_of("llama"), None, [np.array([5, 6], np.int32)], stop_ids=(), max_new_tokens=2, partial=True,
        advance=lambda done: calls.append("progress"),
    )  # fmt: skip
    assert finished == []
    assert calls == ["compiling"]
