"""Requests in a batch against one at a time, with the compiled decoder and with the fallback; streamed text."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig, LlamaConfig

from strop.data.types import Ids
from strop.engine.decode.cache import BlockPool
from strop.engine.decode.decoder import CompiledDecoder, Decoder, why_decoder_unsupported
from strop.engine.decode.hf_fallback import HfDecoder
from strop.engine.decode.model import load
from strop.engine.decode.sampling import NoToken, Sampling, SequenceState
from strop.models.tokenizer import TextStream
from strop.serve.engine import Engine, Job, Metrics, Piece, QueueFull
from strop.serve.models import _GrammarMask, load_models
from tests.support.families import tokenizer
from tests.support.random_models import tiny as random_model
from tests.support.random_models import tiny_of
from tests.support.serving import save_adapters
from tests.support.tiny import model as tiny_model


class EngineClient:
    """An engine with its jobs, and the pieces of each."""

    def __init__(self, model: Any, *, slots: int = 4, queue: int = 99, fallback: bool = False) -> None:
        self.metrics = Metrics()
        fallback = fallback or why_decoder_unsupported(model) is not None
        self.decoder: Decoder = HfDecoder(model, keep=2000) if fallback else CompiledDecoder(model, 2000)
        self.engine = Engine(self.decoder, slots=slots, queue=queue, metrics=self.metrics)
        self.pieces: list[list[Piece]] = []
        self.finished: list[threading.Event] = []

    def submit(
        self, ids: Ids, tokens: int, adapter: str | None = None, sampling: Sampling | None = None, mask: Any = None
    ) -> Job:
        pieces: list[Piece] = []
        finished = threading.Event()

        def on_piece(piece: Piece) -> None:
            pieces.append(piece)
            if piece.finish_reason is not None:
                finished.set()

        job = Job("m", tokenizer("chatml"), [], ids, adapter, tokens, sampling or Sampling(), on_piece, mask=mask)
        self.engine.submit(job)
        self.pieces.append(pieces)
        self.finished.append(finished)
        return job

    def completions(self) -> list[list[int]]:
        """Wait for all jobs, and return their tokens."""
        for finished in self.finished:
            assert finished.wait(60)
        return [[token.id for piece in pieces for token in piece.tokens] for pieces in self.pieces]

    def finish_reasons(self) -> list[str | None]:
        return [pieces[-1].finish_reason for pieces in self.pieces]


def tiny(config: type = LlamaConfig, **changes: Any) -> Any:
    """Return a random model with large weights, so that its predictions differ."""
    model = random_model(config, **changes).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(6)
    return model


def greedy_without_cache(model: Any, ids: Ids, tokens: int) -> list[int]:
    """Run the whole sequence through the model for each token."""
    text = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.inference_mode():
        for _ in range(tokens):
            text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return text[0, len(ids) :].tolist()


def prompts(vocabulary: int) -> list[Ids]:
    """Return prompts of different lengths, some with a shared prefix."""
    random = np.random.default_rng(0)
    rows = [random.integers(3, vocabulary, int(length)).astype(np.int32) for length in random.integers(2, 50, 8)]
    return [*rows, np.concatenate([rows[0], rows[1]]), np.concatenate([rows[7], rows[7], rows[2]])]


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"]


@pytest.mark.parametrize(("family", "fallback"), [(family, True) for family in FAMILIES] + [("llama", False)])
def test_batch_gives_the_completions_of_single_requests(family: str, fallback: bool) -> None:
    model = tiny_of(family)
    client = EngineClient(model, fallback=fallback)
    client.engine.start()
    lengths = [3 + 5 * place % 17 for place in range(10)]  # requests leave and join at every step
    rows = prompts(model.config.vocab_size)
    for ids, tokens in zip(rows, lengths, strict=True):
        client.submit(ids, tokens)
    outputs = client.completions()
    client.engine.close()
    assert outputs == [greedy_without_cache(model, ids, tokens) for ids, tokens in zip(rows, lengths, strict=True)]
    assert client.metrics.cached_tokens._value.get() > 0 or family != "llama"


@pytest.mark.parametrize("fallback", [True, False])
def test_adapters_and_base_share_a_batch(fallback: bool, tiny_folder: Path, tmp_path: Path) -> None:
    folders = [str(folder) for folder in save_adapters(tmp_path, tiny_folder)]
    loaded = load_models(folders, device="cpu", dtype="fp32", quantization="auto", force=False)
    assert list(loaded.models) == ["calm", "bold", "base"]
    client = EngineClient(loaded.module, fallback=fallback)
    client.engine.start()
    rows = prompts(300)
    of = [[*loaded.models.values()][place % 3].adapter for place in range(len(rows))]
    for ids, adapter in zip(rows, of, strict=True):
        client.submit(ids, 12, adapter)
    outputs = client.completions()
    client.engine.close()
    references = {"default": load(folders[0], dtype="fp32").module, "adapter1": load(folders[1], dtype="fp32").module}
    for ids, adapter, answer in zip(rows, of, outputs, strict=True):
        if adapter is None:
            with references["default"].disable_adapter():
                assert answer == greedy_without_cache(references["default"], ids, 12)
        else:
            assert answer == greedy_without_cache(references[adapter], ids, 12)
    assert len({tuple(answer) for answer in outputs[:3]}) == 3


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["q_proj", "lm_head"]}])
def test_dora_and_head_adapters_are_served_in_turn(options: dict[str, Any], tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tokenizer("chatml").save_pretrained(tmp_path / "base")
    folders = [str(folder) for folder in save_adapters(tmp_path, tmp_path / "base", **options)]
    loaded = load_models(folders, device="cpu", dtype="fp32", quantization="auto", force=False)
    assert isinstance(loaded.module, PeftModel)
    client = EngineClient(loaded.module)
    client.engine.start()
    rows, of = prompts(300)[:6], ["default", None, "adapter1", "adapter1", "default", None]
    for ids, adapter in zip(rows, of, strict=True):
        client.submit(ids, 8, adapter)
    outputs = client.completions()
    client.engine.close()
    for place, (ids, adapter) in enumerate(zip(rows, of, strict=True)):
        model = load(folders[adapter == "adapter1"], dtype="fp32").module
        if adapter is None:
            model = model.unload()
        assert outputs[place] == greedy_without_cache(model, ids, 8)


def test_completion_equals_that_of_chat(tiny_folder: Path, tmp_path: Path) -> None:
    folder = str(save_adapters(tmp_path, tiny_folder)[1])
    served = load_models([folder], device="cpu", dtype="fp32", quantization="auto", force=False)
    chat = load(folder, dtype="fp32")
    expected = chat.chat("hello", max_new_tokens=20, sampling=Sampling())
    model = served.models["bold"]
    client = EngineClient(served.module)
    client.engine.start()
    client.submit(model.prompt([{"role": "user", "content": "hello"}], None), 20, "default")
    client.completions()
    client.engine.close()
    assert "".join(piece.text for piece in client.pieces[0]) == expected


@pytest.mark.parametrize("fallback", [True, False])
def test_seeded_completion_does_not_depend_on_the_batch(fallback: bool) -> None:
    model = tiny()
    ids, sampling = prompts(model.config.vocab_size)[0], Sampling(temperature=1.0, top_p=0.9, seed=7)
    client = EngineClient(model, slots=8, fallback=fallback)
    client.engine.start()
    for other in (None, 1, 2, 3, None):
        client.submit(ids, 16, sampling=sampling if other is None else Sampling(1.0, seed=other))
    outputs = client.completions()
    client.submit(ids, 16, sampling=sampling)
    outputs = client.completions()
    client.engine.close()
    assert outputs[0] == outputs[4] == outputs[5]
    assert len({tuple(answer) for answer in outputs}) == 4


def test_full_queue_raises_and_a_cancelled_job_frees_its_place() -> None:
    client = EngineClient(tiny(), slots=1, queue=1)
    ids = np.arange(3, 9, dtype=np.int32)
    first = client.submit(ids, 10_000)  # cancelled before the engine starts
    second = client.submit(ids, 2)
    with pytest.raises(QueueFull):
        client.submit(ids, 2)
    client.engine.cancel(first)
    client.engine.start()
    assert client.finished[1].wait(30)
    assert second.cancelled is False and client.pieces[0] == []
    client.engine.close()
    last: list[Piece] = []
    client.engine.submit(Job("m", tokenizer("chatml"), [], ids, None, 2, Sampling(), last.append))
    assert last == [Piece("", (), "closed")]


def test_failed_engine_fails_all_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    client = EngineClient(tiny())
    monkeypatch.setattr(CompiledDecoder, "forward", lambda *_, **__: 1 / 0)
    client.submit(np.arange(3, 9, dtype=np.int32), 5)
    client.engine.start()
    client.completions()
    assert client.engine._ended is not None and client.engine._ended.exception(10)
    assert client.pieces[0][-1].finish_reason == "failed" and client.engine.failed


def test_decoder_that_fails_to_release_fails_all_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    client, failures = EngineClient(tiny()), list[bool]()
    monkeypatch.setattr(client.engine, "_on_failure", lambda: failures.append(True))
    for method in ("forward", "release"):
        monkeypatch.setattr(CompiledDecoder, method, lambda *_, **__: 1 / 0)
    client.submit(np.arange(3, 9, dtype=np.int32), 5)
    client.engine.start()
    client.completions()
    assert client.engine._ended is not None and client.engine._ended.exception(10)
    assert client.pieces[0][-1].finish_reason == "failed" and failures == [True]


NAN_TOKEN = 96


def poisoned() -> Any:
    """Return a model with NaN in the embedding of one token."""
    model = tiny(tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[NAN_TOKEN] = float("nan")
    return model


@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_fail_only_their_request(temperature: float, fallback: bool) -> None:
    model, rows = poisoned(), prompts(96)
    client = EngineClient(model, fallback=fallback)
    bad = np.concatenate([rows[5], np.array([NAN_TOKEN], np.int32), rows[1]])
    for place, ids in enumerate([rows[0], bad, rows[2], rows[3], bad, rows[4], rows[7]]):
        client.submit(ids, 9, sampling=Sampling(temperature if place in (1, 4) else 0.0))
    client.engine.start()
    outputs = client.completions()
    client.engine.close()
    assert client.finish_reasons() == ["length", "failed", "length", "length", "failed", "length", "length"]
    for place, ids in ((0, rows[0]), (2, rows[2]), (3, rows[3]), (5, rows[4]), (6, rows[7])):
        assert outputs[place] == greedy_without_cache(model, ids, 9)
    if isinstance(client.decoder, HfDecoder):
        assert all(
            torch.isfinite(keys).all() for _, kv in client.decoder._prefix_cache._entries.values() for keys, _ in kv
        )
    assert not client.engine.failed


@pytest.mark.parametrize("fallback", [True, False])
def test_nan_in_a_cache_row_does_not_reach_later_requests(fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = poisoned(), prompts(96)
    client = EngineClient(model, slots=2, fallback=fallback)
    append = SequenceState.append

    def wrong(self: SequenceState, token: int) -> None:
        append(self, NAN_TOKEN if self.length == 58 else token)

    monkeypatch.setattr(SequenceState, "append", wrong)
    client.submit(np.resize(rows[7], 55), 30)
    client.submit(rows[0][:9], 25)
    client.submit(np.resize(rows[1], 60), 3)  # longer than the sequence that failed
    client.engine.start()
    outputs = client.completions()
    client.engine.close()
    assert client.finish_reasons() == ["failed", "length", "length"]
    assert outputs[1:] == [
        greedy_without_cache(model, rows[0][:9], 25),
        greedy_without_cache(model, np.resize(rows[1], 60), 3),
    ]


def test_grammar_without_allowed_token_fails_only_its_request() -> None:
    model, rows = tiny(), prompts(90)
    client = EngineClient(model)

    def mask(tokens: Any, scores: Any) -> None:
        if len(tokens) == 3:
            raise NoToken("format")

    client.submit(rows[0], 9, mask=mask)
    client.submit(rows[1], 9)
    client.engine.start()
    outputs = client.completions()
    client.engine.close()
    assert client.finish_reasons() == ["format", "length"]
    assert outputs == [greedy_without_cache(model, rows[0], 3), greedy_without_cache(model, rows[1], 9)]


def test_grammar_matcher_in_error_raises_no_token() -> None:
    class Matcher:
        def consume_token(self, token: int) -> bool:
            return False

        def compute_bitmask(self) -> bytes:
            return bytes([4])  # allows the end of a turn, as llguidance does in this state

        def is_error(self) -> bool:
            return True

    with pytest.raises(NoToken):
        _GrammarMask(Matcher())([1], np.zeros(8, np.float32))


def test_out_of_memory_fails_current_requests_and_later_ones_work(monkeypatch: pytest.MonkeyPatch) -> None:
    client, ids = EngineClient(tiny()), np.arange(3, 9, dtype=np.int32)
    with monkeypatch.context() as patch:
        patch.setattr(BlockPool, "share_prefix", lambda *_: (_ for _ in ()).throw(MemoryError()))
        client.submit(ids, 2)
        client.submit(ids, 2)
        client.engine.start()
        client.completions()
    assert client.finish_reasons() == ["memory", "memory"]
    client.submit(ids, 2)
    assert len(client.completions()[2]) == 2
    client.engine.close()


def test_finished_request_is_delivered_when_the_next_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two finish in one pass; the text of the second runs out of memory."""
    client, ids, calls = EngineClient(tiny()), np.arange(3, 9, dtype=np.int32), list[int]()

    def end(self: TextStream) -> str:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return ""

    monkeypatch.setattr(TextStream, "end", end)
    client.submit(ids, 2)
    client.submit(ids, 2)
    client.engine.start()
    client.completions()
    client.engine.close()
    assert client.finish_reasons() == ["length", "memory"]


def test_cancelled_request_releases_its_blocks() -> None:
    client, ids = EngineClient(tiny()), np.arange(3, 9, dtype=np.int32)
    assert isinstance(client.decoder, CompiledDecoder)
    whole = client.decoder.blocks.free
    jobs = [client.submit(ids, 400), client.submit(ids, 3)]
    client.engine.start()
    assert client.finished[1].wait(30)
    client.engine.cancel(jobs[0])
    for _ in range(200):
        if client.decoder.blocks.free == whole:
            break
        time.sleep(0.05)
    assert client.decoder.blocks.free == whole and client.engine.num_active == 0
    client.engine.close()


def test_request_overrides_the_sampling_of_the_generation_config() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    own = Sampling.from_generation_config(config)
    assert own == Sampling(0.7, 0.8, 20, 1.05)
    assert own.override(temperature=0.0, top_p=None, seed=3) == Sampling(0.0, 0.8, 20, 1.05, 3)
    assert own.override(top_k=0, repetition_penalty=1.0, seed=None) == Sampling(0.7, 0.8, 0, 1.0)


@pytest.mark.parametrize("stops", [[], ["zz"], ["hell"], ["o w", "lo"], ["ö"]])
def test_streamed_text_has_whole_characters_and_ends_before_a_stop_string(stops: list[str]) -> None:
    backend = tokenizer("chatml")
    text = "hello wörld 🎈 and so on, hello"
    words = TextStream(backend, stops)
    shown = []
    for token in backend(text, add_special_tokens=False)["input_ids"]:
        shown.append(words.push(token))
        if words.stopped:
            break
    shown.append(words.end())
    places = [text.find(stop) for stop in stops if stop in text]
    assert "".join(shown) == (text[: min(places)] if places else text)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)
