"""Requests in a batch against one at a time, by strop's engine and by transformers' forward; text as it comes."""

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
from strop.engine.decode.cache import Blocks
from strop.engine.decode.decoder import CompiledDecoder, Decoder, why_not_decoder
from strop.engine.decode.hf_cache import Kept
from strop.engine.decode.hf_fallback import HfDecoder
from strop.engine.decode.model import load
from strop.engine.decode.sampling import NoToken, Sampling, SequenceState
from strop.errors import ModelError
from strop.models.tokenizer import TextStream
from strop.serve.engine import Engine, Full, Job, Metrics, Piece
from strop.serve.grammar import _Grammar
from strop.serve.models import load_models
from tests.support.families import tokenizer
from tests.support.random_models import tiny as random_model
from tests.support.random_models import tiny_of
from tests.support.serving import save_adapters
from tests.support.tiny import model as tiny_model


class Asked:
    """Jobs in an engine, and what was told of each."""

    def __init__(self, model: Any, *, slots: int = 4, queue: int = 99, plain: bool = False) -> None:
        self.metrics = Metrics()
        plain = plain or why_not_decoder(model) is not None
        self.decoder: Decoder = HfDecoder(model, keep=2000) if plain else CompiledDecoder(model, 2000)
        self.engine = Engine(self.decoder, slots=slots, queue=queue, metrics=self.metrics)
        self.pieces: list[list[Piece]] = []
        self._ended: list[threading.Event] = []

    def submit(
        self, ids: Ids, tokens: int, adapter: str | None = None, sampling: Sampling | None = None, mask: Any = None
    ) -> Job:
        told: list[Piece] = []
        ended = threading.Event()

        def tell(piece: Piece) -> None:
            told.append(piece)
            if piece.end is not None:
                ended.set()

        job = Job("m", tokenizer("chatml"), [], ids, adapter, tokens, sampling or Sampling(), tell, mask=mask)
        self.engine.submit(job)
        self.pieces.append(told)
        self._ended.append(ended)
        return job

    def answers(self) -> list[list[int]]:
        for ended in self._ended:
            assert ended.wait(60)
        return [[token.id for piece in told for token in piece.tokens] for told in self.pieces]


def tiny(config: type = LlamaConfig, **changes: Any) -> Any:
    """With weights that make its predictions differ."""
    model = random_model(config, **changes).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(6)
    return model


def alone(model: Any, ids: Ids, tokens: int) -> list[int]:
    """Greedy, with the whole text read anew for each token: no cache at all."""
    text = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.inference_mode():
        for _ in range(tokens):
            text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return text[0, len(ids) :].tolist()


def prompts(vocabulary: int) -> list[Ids]:
    """Of ragged lengths; some begin alike."""
    random = np.random.default_rng(0)
    made = [random.integers(3, vocabulary, int(length)).astype(np.int32) for length in random.integers(2, 50, 8)]
    return [*made, np.concatenate([made[0], made[1]]), np.concatenate([made[7], made[7], made[2]])]


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"]


@pytest.mark.parametrize(("family", "plain"), [(family, True) for family in FAMILIES] + [("llama", False)])
def test_a_batch_answers_as_one_at_a_time(family: str, plain: bool) -> None:
    model = tiny_of(family)
    asked = Asked(model, plain=plain)
    asked.engine.start()
    lengths = [3 + 5 * place % 17 for place in range(10)]  # requests leave and others join at every step
    rows = prompts(model.config.vocab_size)
    for ids, tokens in zip(rows, lengths, strict=True):
        asked.submit(ids, tokens)
    found = asked.answers()
    asked.engine.close()
    assert found == [alone(model, ids, tokens) for ids, tokens in zip(rows, lengths, strict=True)]
    assert asked.metrics.kept_tokens._value.get() > 0 or family != "llama"


@pytest.mark.parametrize("plain", [True, False])
def test_adapters_share_a_batch(plain: bool, tiny_folder: Path, tmp_path: Path) -> None:
    folders = [str(folder) for folder in save_adapters(tmp_path, tiny_folder)]
    loaded = load_models(folders, device="cpu", dtype="fp32", quantization="auto", force=False)
    assert list(loaded.models) == ["calm", "bold", "base"]
    asked = Asked(loaded.module, plain=plain)
    asked.engine.start()
    rows = prompts(300)
    of = [[*loaded.models.values()][place % 3].adapter for place in range(len(rows))]
    for ids, adapter in zip(rows, of, strict=True):
        asked.submit(ids, 12, adapter)
    found = asked.answers()
    asked.engine.close()
    references = {"default": load(folders[0], dtype="fp32").module, "adapter1": load(folders[1], dtype="fp32").module}
    for ids, adapter, answer in zip(rows, of, found, strict=True):
        if adapter is None:
            with references["default"].disable_adapter():
                assert answer == alone(references["default"], ids, 12)
        else:
            assert answer == alone(references[adapter], ids, 12)
    assert len({tuple(answer) for answer in found[:3]}) == 3


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["q_proj", "lm_head"]}])
def test_adapters_that_cannot_share_a_batch_take_turns(options: dict[str, Any], tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tokenizer("chatml").save_pretrained(tmp_path / "base")
    folders = [str(folder) for folder in save_adapters(tmp_path, tmp_path / "base", **options)]
    loaded = load_models(folders, device="cpu", dtype="fp32", quantization="auto", force=False)
    assert isinstance(loaded.module, PeftModel)
    asked = Asked(loaded.module)
    asked.engine.start()
    rows, of = prompts(300)[:6], ["default", None, "adapter1", "adapter1", "default", None]
    for ids, adapter in zip(rows, of, strict=True):
        asked.submit(ids, 8, adapter)
    found = asked.answers()
    asked.engine.close()
    for place, (ids, adapter) in enumerate(zip(rows, of, strict=True)):
        model = load(folders[adapter == "adapter1"], dtype="fp32").module
        if adapter is None:
            model = model.unload()
        assert found[place] == alone(model, ids, 8)


def test_answers_are_those_of_strop_chat(tiny_folder: Path, tmp_path: Path) -> None:
    folder = str(save_adapters(tmp_path, tiny_folder)[1])
    served = load_models([folder], device="cpu", dtype="fp32", quantization="auto", force=False)
    chat = load(folder, dtype="fp32")
    wanted = chat.chat("hello", max_new_tokens=20, sampling=Sampling())
    model = served.models["bold"]
    asked = Asked(served.module)
    asked.engine.start()
    asked.submit(model.prompt([{"role": "user", "content": "hello"}], None), 20, "default")
    asked.answers()
    asked.engine.close()
    assert "".join(piece.text for piece in asked.pieces[0]) == wanted


@pytest.mark.parametrize("plain", [True, False])
def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(plain: bool) -> None:
    model = tiny()
    ids, sampling = prompts(model.config.vocab_size)[0], Sampling(temperature=1.0, top_p=0.9, seed=7)
    asked = Asked(model, slots=8, plain=plain)
    asked.engine.start()
    for other in (None, 1, 2, 3, None):
        asked.submit(ids, 16, sampling=sampling if other is None else Sampling(1.0, seed=other))
    found = asked.answers()
    asked.submit(ids, 16, sampling=sampling)
    found = asked.answers()
    asked.engine.close()
    assert found[0] == found[4] == found[5]
    assert len({tuple(answer) for answer in found}) == 4


def test_a_full_queue_and_a_freed_slot() -> None:
    asked = Asked(tiny(), slots=1, queue=1)
    ids = np.arange(3, 9, dtype=np.int32)
    first = asked.submit(ids, 10_000)  # never answered: the engine has not started
    second = asked.submit(ids, 2)
    with pytest.raises(Full):
        asked.submit(ids, 2)
    asked.engine.cancel(first)
    asked.engine.start()
    assert asked._ended[1].wait(30)
    assert second.cancelled is False and asked.pieces[0] == []
    asked.engine.close()
    last: list[Piece] = []
    asked.engine.submit(Job("m", tokenizer("chatml"), [], ids, None, 2, Sampling(), last.append))
    assert last == [Piece("", (), "closed")]


def test_a_fault_of_the_engine_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(tiny())
    monkeypatch.setattr(CompiledDecoder, "read", lambda *_, **__: 1 / 0)
    asked.submit(np.arange(3, 9, dtype=np.int32), 5)
    asked.engine.start()
    asked.answers()
    assert asked.engine._ended is not None and asked.engine._ended.exception(10)
    assert asked.pieces[0][-1].end == "failed" and asked.engine.failed


def test_a_decoder_that_cannot_even_end_a_text_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, failures = Asked(tiny()), list[bool]()
    monkeypatch.setattr(asked.engine, "_on_failure", lambda: failures.append(True))
    for method in ("read", "end"):
        monkeypatch.setattr(CompiledDecoder, method, lambda *_, **__: 1 / 0)
    asked.submit(np.arange(3, 9, dtype=np.int32), 5)
    asked.engine.start()
    asked.answers()
    assert asked.engine._ended is not None and asked.engine._ended.exception(10)
    assert asked.pieces[0][-1].end == "failed" and failures == [True]


NAN_TOKEN = 96


def poisoned() -> Any:
    """A model for which one token of its vocabulary is NaN."""
    model = tiny(tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[NAN_TOKEN] = float("nan")
    return model


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_not_finite_fail_their_own_request(temperature: float, plain: bool) -> None:
    model, rows = poisoned(), prompts(96)
    asked = Asked(model, plain=plain)
    bad = np.concatenate([rows[5], np.array([NAN_TOKEN], np.int32), rows[1]])
    for place, ids in enumerate([rows[0], bad, rows[2], rows[3], bad, rows[4], rows[7]]):
        asked.submit(ids, 9, sampling=Sampling(temperature if place in (1, 4) else 0.0))
    asked.engine.start()
    found = asked.answers()
    asked.engine.close()
    ends = [told[-1].end for told in asked.pieces]
    assert ends == ["length", "failed", "length", "length", "failed", "length", "length"]
    for place, ids in ((0, rows[0]), (2, rows[2]), (3, rows[3]), (5, rows[4]), (6, rows[7])):
        assert found[place] == alone(model, ids, 9)
    if isinstance(asked.decoder, HfDecoder):
        assert all(torch.isfinite(keys).all() for _, kv in asked.decoder._kept._texts.values() for keys, _ in kv)
    assert not asked.engine.failed


@pytest.mark.parametrize("plain", [True, False])
def test_a_row_that_turns_to_nan_leaves_nothing_behind(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = poisoned(), prompts(96)
    asked = Asked(model, slots=2, plain=plain)
    append = SequenceState.append

    def wrong(self: SequenceState, token: int) -> None:
        append(self, NAN_TOKEN if self.length == 58 else token)

    monkeypatch.setattr(SequenceState, "append", wrong)
    asked.submit(np.resize(rows[7], 55), 30)
    asked.submit(rows[0][:9], 25)
    asked.submit(np.resize(rows[1], 60), 3)  # wider than where the first one failed
    asked.engine.start()
    found = asked.answers()
    asked.engine.close()
    assert [told[-1].end for told in asked.pieces] == ["failed", "length", "length"]
    assert found[1:] == [alone(model, rows[0][:9], 25), alone(model, np.resize(rows[1], 60), 3)]


def test_a_grammar_at_a_dead_end_fails_its_own_request() -> None:
    model, rows = tiny(), prompts(90)
    asked = Asked(model)

    def mask(tokens: Any, scores: Any) -> None:
        if len(tokens) == 3:
            raise NoToken("format")

    asked.submit(rows[0], 9, mask=mask)
    asked.submit(rows[1], 9)
    asked.engine.start()
    found = asked.answers()
    asked.engine.close()
    assert [told[-1].end for told in asked.pieces] == ["format", "length"]
    assert found == [alone(model, rows[0], 3), alone(model, rows[1], 9)]


def test_a_matcher_in_error_is_not_the_end_of_an_answer() -> None:
    class Matcher:
        def consume_token(self, token: int) -> bool:
            return False

        def compute_bitmask(self) -> bytes:
            return bytes([4])  # the end of a turn, as llguidance has it then

        def is_error(self) -> bool:
            return True

    with pytest.raises(NoToken):
        _Grammar(Matcher())([1], np.zeros(8, np.float32))


def test_no_memory_while_requests_come_in_fails_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ids = Asked(tiny()), np.arange(3, 9, dtype=np.int32)
    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "share", lambda *_: (_ for _ in ()).throw(MemoryError()))
        asked.submit(ids, 2)
        asked.submit(ids, 2)
        asked.engine.start()
        asked.answers()
    assert [told[-1].end for told in asked.pieces] == ["memory", "memory"]
    asked.submit(ids, 2)
    assert len(asked.answers()[2]) == 2
    asked.engine.close()


def test_an_answer_that_has_ended_is_told_whatever_happens_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two end in one pass; there is no memory for the words of the second."""
    asked, ids, calls = Asked(tiny()), np.arange(3, 9, dtype=np.int32), list[int]()

    def end(self: TextStream) -> str:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return ""

    monkeypatch.setattr(TextStream, "end", end)
    asked.submit(ids, 2)
    asked.submit(ids, 2)
    asked.engine.start()
    asked.answers()
    asked.engine.close()
    assert [told[-1].end for told in asked.pieces] == ["length", "memory"]


def test_a_request_that_is_cancelled_gives_its_room_back() -> None:
    asked, ids = Asked(tiny()), np.arange(3, 9, dtype=np.int32)
    assert isinstance(asked.decoder, CompiledDecoder)
    whole = asked.decoder.blocks.free
    jobs = [asked.submit(ids, 400), asked.submit(ids, 3)]
    asked.engine.start()
    assert asked._ended[1].wait(30)
    asked.engine.cancel(jobs[0])
    for _ in range(200):
        if asked.decoder.blocks.free == whole:
            break
        time.sleep(0.05)
    assert asked.decoder.blocks.free == whole and asked.engine._active() == 0
    asked.engine.close()


def test_what_the_cache_cannot_hold_is_refused() -> None:
    model = tiny()
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        HfDecoder(model, keep=0)


def test_the_longest_common_beginning_is_kept() -> None:
    kept = Kept(100)
    long = np.arange(60, dtype=np.int32)

    def kv(length: int) -> Any:
        return [(torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2))]

    kept.add("a", long[:40], kv(40))
    kept.add("a", long, kv(60))  # takes the place of its own beginning
    assert len(kept._texts) == 1
    assert kept.find("a", np.append(long[:50], np.int32(999)))[0][0].shape[2] == 50
    assert kept.find("a", long)[0][0].shape[2] == 59  # a token must be left to be read
    assert kept.find(None, long) == [] and kept.find("a", long[:20]) == []
    kept.add(None, long, kv(60))
    assert kept.find("a", long) == []  # 120 tokens were too many: the older went


def test_a_request_changes_the_models_own_sampling() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    own = Sampling.own(config)
    assert own == Sampling(0.7, 0.8, 20, 1.05)
    assert own.changed(0.0, None, 3) == Sampling(0.0, 0.8, 20, 1.05, 3)


@pytest.mark.parametrize("stops", [[], ["zz"], ["hell"], ["o w", "lo"], ["ö"]])
def test_text_comes_whole_and_ends_before_a_stop_string(stops: list[str]) -> None:
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
