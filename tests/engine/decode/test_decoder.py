"""The engine's answers against transformers' own, family by family; its numbers against fp32's; what shares what."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from strop.engine.decode import exact_argmax
from strop.engine.decode.batch import Batch, decode_all, decode_groups
from strop.engine.decode.cache import BLOCK_SIZE
from strop.engine.decode.decoder import CompiledDecoder, Part, why_not_decoder
from strop.engine.decode.sampling import ExpectedCompletion, Ids, Sampling, SequenceState
from strop.engine.kernels.cpu import decode_layer as passes
from strop.engine.kernels.cpu import decode_matmul
from strop.models.families.table import FAMILIES
from strop.models.quantize import QuantizedLinear, dequantize_layers, quantize_weight, replace_linears
from tests.support.random_models import adapted, tiny_of

TOKENS = 12


@pytest.fixture(autouse=True)
def _every_head_is_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of models whose head is a larger part of them."""
    monkeypatch.setattr(exact_argmax, "WORTH", 0.0)


def prompts(many: int = 8) -> list[Ids]:
    """Ragged, on both sides of a window of 4 and of a block; the last begins as another does, for a block and more."""
    random = np.random.default_rng(0)
    made = [random.integers(3, 96, int(n)).astype(np.int32) for n in [1, 3, 50, 17, 33, 8, 64][: many - 1]]
    return [*made, np.concatenate([made[2][: BLOCK_SIZE + 5], made[3]])]


def alone(model: Any, ids: Ids, tokens: int = TOKENS) -> list[int]:
    """Greedy, with the whole text read anew for each token: no cache at all."""
    text = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.inference_mode():
        for _ in range(tokens):
            text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return text[0, len(ids) :].tolist()


def answers(decoder: CompiledDecoder, texts: list[SequenceState], rows: int, **options: Any) -> list[list[int]]:
    for _ in decode_all(Batch(decoder, rows, **options), texts):
        pass
    return [text.answer for text in texts]


def spread(model: Any) -> Any:
    """With weights that make its predictions differ."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "lora" not in name:
            weight.data.mul_(4)
    return model.eval()


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.fully_fused])
def test_answers_are_those_of_transformers(family: str) -> None:
    """Rows join and leave, some of the base and some of the adapter, some with parts that others have read."""
    model = spread(adapted(family))
    decoder, rows = CompiledDecoder(model, 1000), prompts()
    texts = [SequenceState(ids, None if place % 3 == 1 else "default", most=TOKENS) for place, ids in enumerate(rows)]
    found = answers(decoder, texts, 3, read_at_once=20)
    for text, ids, answer in zip(texts, rows, found, strict=True):
        with model.disable_adapter() if text.adapter is None else nullcontext():
            assert answer == alone(model, ids)
    assert decoder.blocks.free == decoder.blocks.count


def logits_of(decoder: CompiledDecoder, texts: list[SequenceState]) -> list[np.ndarray]:
    """At every position of the texts, read together."""
    for text in texts:
        decoder.begin(text)
    lengths = [text.left for text in texts]
    seen = decoder.read([Part(text, text.left, text.left) for text in texts])
    found = np.split(seen.logits.copy(), np.cumsum(lengths)[:-1])
    for text in texts:
        decoder.end(text)
    decoder.blocks.forget()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    model = adapted("qwen3", hidden_size=64, intermediate_size=96, head_dim=32).to(dtype).eval()
    decoder, rows = CompiledDecoder(model, 2000), prompts()
    made = [SequenceState(ids, None if place % 2 else "default") for place, ids in enumerate(rows)]
    together = logits_of(decoder, made)
    for text, wanted in zip(made, together, strict=True):
        again = SequenceState(text.ids, text.adapter)
        decoder.begin(again)
        parts = []
        while again.left:  # three positions at a time, as if they came one after the other
            count = min(3, again.left)
            parts.append(decoder.read([Part(again, count, count)]).logits.copy())
        assert np.array_equal(np.concatenate(parts), wanted)
        decoder.end(again)
        decoder.blocks.forget()


def test_bf16_is_no_further_from_fp32_than_transformers_is() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4}
    model = spread(adapted("llama", **sizes, num_hidden_layers=3)).to(torch.bfloat16)
    rows = prompts()[:-1]
    found = logits_of(CompiledDecoder(model, 2000), [SequenceState(ids, "default") for ids in rows])
    wide = spread(adapted("llama", **sizes, num_hidden_layers=3))
    wide.load_state_dict(model.state_dict())  # the same weights, those of bf16
    ours, theirs = [], []
    for ids, logits in zip(rows, found, strict=True):
        given = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.inference_mode():
            true = wide(input_ids=given).logits[0].log_softmax(-1)
            theirs.append((model(input_ids=given).logits[0].float().log_softmax(-1) - true).flatten())
        ours.append((torch.from_numpy(logits).log_softmax(-1) - true).flatten())
    assert torch.cat(ours).square().mean() <= torch.cat(theirs).square().mean()
    assert torch.cat(ours).abs().max() < 1.2 * torch.cat(theirs).abs().max()


def quantized(scheme: str, dtype: torch.dtype, sizes: dict[str, int]) -> tuple[Any, dict[str, QuantizedLinear]]:
    """A tiny Llama, and its linear layers, whose weights are packed."""
    model = tiny_of("llama", head_dim=16, num_attention_heads=4, **sizes).to(dtype).eval()
    whole = {name: module.weight.data for name, module in model.named_modules() if hasattr(module, "weight")}
    made = replace_linears(model, scheme, dtype, lambda name: "layers" in name)
    for name, module in made.items():
        module.load_packed(quantize_weight(whole[name], scheme))
    return model, made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_quantized_weights_answer_as_whole_ones(scheme: str, dtype: torch.dtype) -> None:
    """From the packed bytes: the bits of the dequantized weights; where AMX multiplies these, as near as bf16 is. Not
    of 8 bit behind bf16 where that is multiplied as it is held: the test behind this one."""
    pytest.importorskip("bitsandbytes")
    if scheme == "int8" and dtype == torch.bfloat16 and passes.AS_HELD:
        pytest.skip("multiplied as it is held here")
    for sizes in ({"hidden_size": 128, "intermediate_size": 256}, {"hidden_size": 48, "intermediate_size": 80}):
        model, made = quantized(scheme, dtype, sizes)
        packed = [module.packed_weight() for module in made.values()]
        assert all(packed) or (scheme != "int8" and sizes["hidden_size"] % 64)
        texts = [SequenceState(ids, None) for ids in prompts()[:-1]]
        found = logits_of(CompiledDecoder(model, 2000), texts)
        dequantize_layers(model, 99)
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
        for one, other in zip(found, logits_of(CompiledDecoder(model, 2000), texts), strict=True):
            if decode_matmul.TILES and dtype == torch.bfloat16:
                assert np.abs(one - other).max() < 0.02
            else:
                assert np.array_equal(one, other)


@pytest.mark.skipif(not passes.AS_HELD, reason="this CPU does not multiply 8 bit as it is held")
def test_eight_bit_as_it_is_held_is_nearer_to_fp32_than_the_dequantized_weight() -> None:
    model, made = quantized("int8", torch.bfloat16, {"hidden_size": 128, "intermediate_size": 256})
    texts = [SequenceState(ids, None) for ids in prompts()[:-1]]
    wide = deepcopy(model).float()
    for name in made:
        wide.get_submodule(name).dtype = torch.float32
    true, found = (np.concatenate(logits_of(CompiledDecoder(one, 2000), texts)) for one in (wide, model))
    few = [
        np.concatenate(logits_of(CompiledDecoder(model, 2000), [SequenceState(ids, None)])) for ids in prompts()[:-1]
    ]
    assert np.array_equal(np.concatenate(few), found)  # whatever is read beside
    dequantize_layers(model, 99)
    whole = np.concatenate(logits_of(CompiledDecoder(model, 2000), texts))
    assert np.square(found - true).mean() < np.square(whole - true).mean()
    assert np.square(found - true).mean() > 0


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"r": 20, "use_rslora": True}])
def test_kinds_of_adapters(lora: dict[str, Any]) -> None:
    model = spread(adapted("qwen2", lora=lora))
    for name, weight in model.named_parameters():
        if "magnitude" in name:
            weight.data.mul_(1.3)
    decoder, rows = CompiledDecoder(model, 1000), prompts()
    texts = [SequenceState(ids, None if place % 2 else "default", most=TOKENS) for place, ids in enumerate(rows)]
    for text, ids, answer in zip(texts, rows, answers(decoder, texts, 5), strict=True):
        with model.disable_adapter() if text.adapter is None else nullcontext():
            assert answer == alone(model, ids)


def test_new_weights_of_an_adapter_are_taken_up() -> None:
    model = spread(adapted("llama"))
    decoder, ids = CompiledDecoder(model, 500), prompts()[2]
    before = answers(decoder, [SequenceState(ids, "default", most=TOKENS)], 1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(-3)
    decoder.refresh()
    after = answers(decoder, [SequenceState(ids, "default", most=TOKENS)], 1)
    assert after == [alone(model, ids)] != before


def test_guesses_change_nothing_but_the_number_of_passes() -> None:
    model, random = spread(adapted("llama")), np.random.default_rng(1)
    said = random.integers(3, 96, 9).astype(np.int32)
    rows = [np.concatenate([said, said, said[:n]]) for n in (4, 6, 8)]
    for sampling in (Sampling(), Sampling(0.7, 0.9, seed=3), Sampling(repetition_penalty=1.2)):
        found, passes = {}, {}
        for guess in (True, False):
            texts = [SequenceState(ids, "default", most=30, sampling=sampling) for ids in rows]
            batch = Batch(CompiledDecoder(model, 1000), 3, guess=guess)
            passes[guess] = sum(1 for _ in decode_all(batch, texts))
            found[guess] = [text.answer for text in texts]
        assert found[True] == found[False]
        assert passes[True] < passes[False] or sampling != Sampling()


def test_a_beginning_is_read_once() -> None:
    decoder = CompiledDecoder(adapted("llama").eval(), 1000)
    ids = prompts()[6]
    first, second, other = (SequenceState(ids, adapter, most=2) for adapter in ("default", "default", None))
    answers(decoder, [first], 1)
    answers(decoder, [second, other], 2)
    assert second.found == len(ids) - 1  # the answer follows on the last, which is read again
    assert other.found == 0 and first.answer == second.answer


@pytest.mark.parametrize("same", [1, 17, BLOCK_SIZE + 9])
def test_a_beginning_that_ends_within_a_block_is_read_once(same: int) -> None:
    model, random = spread(adapted("llama")), np.random.default_rng(1)
    decoder, ids = CompiledDecoder(model, 1000), random.integers(3, 96, 2 * BLOCK_SIZE + 3).astype(np.int32)
    answers(decoder, [SequenceState(ids, "default", most=2)], 1)
    other = np.concatenate([ids[:same], (ids[same : same + 1] + 1) % 96, ids[5:25]])
    texts = [SequenceState(other, adapter, most=TOKENS) for adapter in ("default", None)]
    found = answers(decoder, texts, 2)
    assert [text.found for text in texts] == [same, 0]
    assert found == answers(
        CompiledDecoder(model, 1000), [SequenceState(other, text.adapter, most=TOKENS) for text in texts], 2
    )
    again = SequenceState(ids, "default", most=2)  # nothing was written into what it was copied from
    assert answers(decoder, [again], 1) == answers(
        CompiledDecoder(model, 1000), [SequenceState(ids, "default", most=2)], 1
    )
    assert again.found == len(ids) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("at_once", [5, 64, 256])
def test_expected_answers_change_nothing_and_are_judged(at_once: int) -> None:
    """Right answers, some of which the model would give whole, half or not at all, and some longer than may be."""
    model = spread(adapted("llama"))
    decoder, rows = CompiledDecoder(model, 3000), prompts()
    plain = [SequenceState(ids, None if place % 3 == 1 else "default", most=TOKENS) for place, ids in enumerate(rows)]
    given = answers(decoder, plain, 4)
    stop = given[4][-1]
    texts, wanted = [], []
    for place, (ids, answer) in enumerate(zip(rows, given, strict=True)):
        right = np.array([*answer, 7, 8, 9], np.int32)[: [15, 12, 5, 1][place % 4]]
        if place % 3:
            right[len(right) // 2] = (right[len(right) // 2] + 1) % 96
        first = len(ids) // 2 if place % 2 else None
        stops = (stop,) if place == 4 else ()
        wanted.append(answer[: answer.index(stop) + 1] if stops else answer)
        expected = ExpectedCompletion(right, first)
        texts.append(SequenceState(ids, plain[place].adapter, most=TOKENS, stop_ids=stops, expected=expected))
        texts.append(
            SequenceState(ids, plain[place].adapter, most=TOKENS, stop_ids=stops)
        )  # one that nobody judges, beside it
        wanted.append(wanted[-1])
    assert answers(decoder, texts, 5, read_at_once=at_once) == wanted
    assert decoder.blocks.free == decoder.blocks.count
    for text, ids in zip(texts[::2], rows, strict=True):
        whole = np.concatenate([ids, text.expected.ids])
        first = len(ids) - 1 if text.expected.first is None else text.expected.first
        with model.disable_adapter() if text.adapter is None else nullcontext(), torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(whole.astype(np.int64))[None]).logits[0].double()
        logs = logits.log_softmax(-1)[np.arange(first, len(whole) - 1), whole[first + 1 :]]
        assert np.allclose(text.logprobs, logs, atol=1e-5) and len(text.logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_needs_no_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers are found in the head in 8 bit, and are those of the whole head; a text beside them that is drawn
    has its logits."""
    model = adapted("llama", hidden_size=64, intermediate_size=96, head_dim=32).to(dtype).eval()
    asked: list[bool] = []
    likeliest = exact_argmax.ExactArgmax.likeliest

    def answered(*others: SequenceState, whole: bool = False) -> list[list[int]]:
        def counted(asking: exact_argmax.ExactArgmax, z: Any) -> Any:
            asked.append(True)
            return None if whole else likeliest(asking, z)

        monkeypatch.setattr(exact_argmax.ExactArgmax, "likeliest", counted)
        asked.clear()
        texts = [SequenceState(ids, name, most=TOKENS) for ids in prompts() for name in ("default", None)]
        return answers(CompiledDecoder(model, 4000), [*others, *texts], 5)[len(others) :]

    plain = answered()
    assert len(asked) > TOKENS
    assert plain == answered(whole=True)
    drawn = SequenceState(prompts()[0], None, most=300, sampling=Sampling(1.0, seed=1))  # until all others are there
    assert plain == answered(drawn)
    assert not asked


def test_a_pass_that_tells_nothing_asks_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt that is read in pieces, all but the last; in 8 bit no rows were once taken for two."""
    model = adapted("llama", hidden_size=64, intermediate_size=96, head_dim=32).to(torch.bfloat16).eval()
    asked: list[int] = []
    likeliest = exact_argmax.ExactArgmax.likeliest
    monkeypatch.setattr(
        exact_argmax.ExactArgmax, "likeliest", lambda self, z: asked.append(len(z)) or likeliest(self, z)
    )
    texts = [SequenceState(ids, "default", most=3) for ids in prompts()]
    whole = answers(CompiledDecoder(model, 2000), texts, 2)
    begun = len(asked)
    again = [SequenceState(ids, "default", most=3) for ids in prompts()]
    assert answers(CompiledDecoder(model, 2000), again, 2, read_at_once=5) == whole
    assert len(asked) > begun and min(asked) > 0


def test_numbers_that_are_not_finite_end_an_expected_answer() -> None:
    model = adapted("llama").eval()
    model.get_base_model().lm_head.weight.data[5] = torch.nan
    text = SequenceState(prompts()[2], "default", most=3, expected=ExpectedCompletion(np.array([1, 2], np.int32)))
    assert answers(CompiledDecoder(model, 500), [text], 1) == [[]] and text.end == "failed"


def test_a_beginning_that_is_being_read_is_waited_for() -> None:
    class Counting(CompiledDecoder):
        rows = 0

        def read(self, parts: Any, **how: Any) -> Any:
            self.rows += sum(part.count for part in parts)
            return super().read(parts, **how)

    decoder, ids = Counting(adapted("llama").eval(), 2000), prompts()[6]
    texts = [SequenceState(np.append(ids, np.int32(place)), "default", most=1) for place in range(5)]
    texts.append(SequenceState(ids, None, most=1))
    answers(decoder, texts, 6)
    assert decoder.rows == 2 * len(ids) + 1 + 4
    assert [text.found for text in texts] == [0, *[len(ids)] * 4, 0]


def test_who_stops_listening_leaves_no_text_behind() -> None:
    decoder = CompiledDecoder(adapted("llama").eval(), 500)
    going = decode_all(Batch(decoder, 3), [SequenceState(ids, None, most=TOKENS) for ids in prompts()])
    next(going)
    assert decoder.blocks.free < decoder.blocks.count
    going.close()
    assert decoder.blocks.free == decoder.blocks.count


def test_what_the_engine_declines() -> None:
    assert why_not_decoder(tiny_of("llama")) is None
    assert "not in the table" in str(why_not_decoder(_of("gpt_neo")))
    assert "experts by the model's own modules" in str(why_not_decoder(tiny_of("gpt_oss")))
    assert "trained in full" in str(why_not_decoder(adapted("llama", lora={"modules_to_save": ["lm_head"]})))
    assert "an adapter on" in str(
        why_not_decoder(adapted("llama", lora={"target_modules": ["lm_head"]}, tie_word_embeddings=False))
    )
    assert "float64" in str(why_not_decoder(tiny_of("llama").double()))


def _of(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 64, "attention_types": [[["global"], 2]]}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


@pytest.mark.parametrize("length", [5, BLOCK_SIZE, BLOCK_SIZE + 7, 2 * BLOCK_SIZE])
@pytest.mark.parametrize("rows", [3, 64])
def test_a_groups_prompt_is_read_once(length: int, rows: int) -> None:
    """Its texts begin together, with the numbers that each would have alone; more than go together come later."""
    model = spread(adapted("llama"))
    prompts = [ids[:length] for ids in np.random.default_rng(1).integers(3, 96, (2, 80)).astype(np.int32)]

    def texts(ids: Ids) -> list[SequenceState]:
        sampling = (Sampling(temperature=1.0, seed=seed) for seed in range(5))
        return [SequenceState(ids, "default", most=TOKENS, stop_ids=[7], sampling=one, logprobs=0) for one in sampling]

    single = CompiledDecoder(model, 1000)
    wanted = [answers(single, [text], 1)[0] for ids in prompts for text in texts(ids)]
    decoder, groups, read = CompiledDecoder(model, 1000), [texts(ids) for ids in prompts], 0
    seen, batch = decoder.read, Batch(decoder, rows, guess=False)

    def counted(parts: list[Part], **how: Any) -> Any:
        nonlocal read
        read += sum(part.count for part in parts if part.text.done < part.text.prompt)
        return seen(parts, **how)

    decoder.read = counted  # type: ignore[method-assign, assignment]
    logs: dict[SequenceState, list[float]] = {text: [] for group in groups for text in group}
    for news in decode_groups(batch, groups):
        logs[news.text] += [token.logprob for token in news.tokens]
    assert [text.answer for group in groups for text in group] == wanted and len(set(map(tuple, wanted))) > 6
    if rows == 64:
        assert read == 2 * length
    assert decoder.blocks.free == decoder.blocks.count
    text = groups[0][1]
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(text.ids.astype(np.int64))[None]).logits[0].log_softmax(-1)
    found = logits[range(length - 1, text.length - 1), text.answer]
    assert logs[text] == pytest.approx(found.tolist(), abs=1e-4)


def test_a_group_leaves_with_the_text_that_reads_for_it() -> None:
    model = adapted("llama")
    decoder = CompiledDecoder(model, 1000)
    batch, group = (
        Batch(decoder, 8),
        [SequenceState(np.arange(3, 40, dtype=np.int32), "default", most=4) for _ in range(3)],
    )
    assert batch.add_group(group) == 3 and len(batch.texts) == 1
    batch.remove(group[0])
    assert decoder.blocks.free == decoder.blocks.count and not batch.texts
