"""model.placement streamed: a base that is read from files layer by layer."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig

import strop
from strop.config.load import resolve
from strop.errors import MemoryLimitError, RecipeError, RunError
from strop.machine.rates import Rates
from strop.models import streaming
from strop.models.sharding import EMBEDDING, HEAD
from strop.models.source import locate
from strop.models.streaming import LayerCycle, MappedLayer, ReadAhead, load_streamed
from strop.planning.activations import MicroBatch
from strop.planning.choose import choose
from strop.planning.tables import KNOWN
from strop.planning.time import Rate, tokens_per_s
from strop.training import keep
from strop.training.preflight import RecipeFacts, _check_host
from tests import ROOT
from tests.planning.test_choose import LLAMA_8B, machine
from tests.support import tiny, tiny_families
from tests.support.families import tokenizer
from tests.support.scripts import script

GIB = 1 << 30
STREAMED = {"model.placement": "streamed"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def train(model: Path, data: Path, out: Path, **options: Any) -> tuple[dict[str, torch.Tensor], list[float], list[str]]:
    """Return the adapter, the losses of the steps and the notes of a run of six steps."""
    events: list[dict[str, Any]] = []
    usual = {"train.max_steps": 6, "model.dtype": "bf16", "model.resident_layers": None, "progress": False}
    done = strop.train(model=model, data=data, out=out, callback=events.append, **{**usual, **options})
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert ("disk_wait_s" in done.report) == ("model.placement" in options)
    notes = [event["text"] for event in events if event["event"] == "note"]
    return load_file(done.folder / "adapter" / "adapter_model.safetensors"), losses, notes


@pytest.mark.parametrize(
    "options",
    [
        {"model.dtype": "fp32"},
        {"data.eval": "25%", "train.objective": "sft"},
        {"model.quantization": "nf4", "train.gradient_checkpointing": "on"},
        {"model.quantization": "int8", "lora.dropout": 0.1},
        {"model.quantization": "nf4", "lora.init": "loftq"},
        {"lora.use_dora": True, "lora.new_tokens": ["<A>"]},
        {"lora.modules_to_save": ["down_proj"]},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_bits_are_those_of_a_base_in_memory(
    options: dict[str, Any], tiny_folder: Path, rows_file: Path, tmp_path: Path, cache: Path
) -> None:
    """Also of a quantized base in memory, which is dequantized once where that fits."""
    whole, losses, _ = train(tiny_folder, rows_file, tmp_path / "whole", **options)
    streamed, streamed_losses, notes = train(tiny_folder, rows_file, tmp_path / "streamed", **options, **STREAMED)
    assert losses == streamed_losses
    assert whole.keys() == streamed.keys() and all(torch.equal(whole[name], streamed[name]) for name in whole)
    assert any(text.startswith("waited 0.") for text in notes)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "gemma4"])
def test_other_families(family: str, rows_file: Path, tmp_path: Path, cache: Path) -> None:
    """The plain step, experts that are joined while loading, and per-layer embeddings."""
    tiny_families.save(family, tmp_path / family)
    options = {"model.dtype": "fp32"}
    whole, losses, _ = train(tmp_path / family, rows_file, tmp_path / "whole", **options)
    streamed, streamed_losses, _ = train(tmp_path / family, rows_file, tmp_path / "streamed", **options, **STREAMED)
    assert losses == streamed_losses and all(torch.equal(whole[name], streamed[name]) for name in whole)


def test_resumed_run_has_the_same_bits(tiny_folder: Path, rows_file: Path, tmp_path: Path, cache: Path) -> None:
    whole, _, _ = train(tiny_folder, rows_file, tmp_path / "whole", **STREAMED)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 2:
            raise KeyboardInterrupt

    options = {"train.max_steps": 6, "train.save_steps": 2, "model.dtype": "bf16", "progress": False}
    with pytest.raises(BaseException):  # noqa: B017
        strop.train(model=tiny_folder, data=rows_file, out=tmp_path / "cut", callback=stop, **options, **STREAMED)
    resumed = strop.resume(tmp_path / "cut")
    adapter = load_file(resumed.folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], adapter[name]) for name in whole)


def layer_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("layers/*/*/*.bin"))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(("damage", "message"), [(flip_a_byte, "its content has changed"), (cut, "it was cut")])
def test_damaged_file_is_named(
    damage: Callable[[Path], None], message: str, tiny_folder: Path, rows_file: Path, tmp_path: Path, cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    train(tiny_folder, rows_file, tmp_path / "first", **STREAMED)
    (file,) = cache.glob("layers/*/*/layer-1.bin")
    read = MappedLayer.read
    if damage is cut:  # after it was mapped; before, it is written again

        def cut_and_read(layer: MappedLayer) -> None:
            cut(file)
            read(layer)

        monkeypatch.setattr(MappedLayer, "read", cut_and_read)
    else:
        damage(file)
    with pytest.raises(RunError, match=message) as caught:
        train(tiny_folder, rows_file, tmp_path / "second", **STREAMED)
    assert str(file) in caught.value.what or "layer-" in caught.value.what


def test_damaged_embedding_is_noticed(rows_file: Path, tmp_path: Path, cache: Path) -> None:
    """A pass reads only some rows of an embedding that has its own weight."""
    tiny_families.save("gpt_neox", tmp_path / "untied")
    train(tmp_path / "untied", rows_file, tmp_path / "first", **STREAMED)
    (file,) = cache.glob("layers/*/*/the-embedding.bin")
    flip_a_byte(file)
    with pytest.raises(RunError, match=r"the-embedding.bin: cannot be read: its content has changed"):
        train(tmp_path / "untied", rows_file, tmp_path / "second", **STREAMED)


def test_base_that_was_changed_in_some_rows_is_copied_again(tmp_path: Path, rows_file: Path, cache: Path) -> None:
    """The fingerprint of a base covers the beginning of each tensor only."""
    model = tiny.model(vocab_size=len(tokenizer("chatml")), hidden_size=64)
    for folder in ("model", "changed"):
        tokenizer("chatml").save_pretrained(tmp_path / folder)
    model.save_pretrained(tmp_path / "model")
    train(tmp_path / "model", rows_file, tmp_path / "first", **STREAMED)
    with torch.no_grad():
        model.model.embed_tokens.weight[-20:] += 1
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "changed")
    _, losses, _ = train(tmp_path / "model", rows_file, tmp_path / "second", **STREAMED)
    _, expected, _ = train(tmp_path / "changed", rows_file, tmp_path / "third")
    assert losses == expected


def test_cut_file_is_written_again(tiny_folder: Path, rows_file: Path, tmp_path: Path, cache: Path) -> None:
    first, _, _ = train(tiny_folder, rows_file, tmp_path / "first", **STREAMED)
    cut(layer_files(cache)[0])
    again, _, _ = train(tiny_folder, rows_file, tmp_path / "second", **STREAMED)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_disk_that_fails_is_an_error(tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ahead = load_streamed(locate(str(tiny_folder)), torch.float32)
    path_open = Path.open

    def fail(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "layer-0.bin":
            raise OSError(5, "Input/output error")
        return path_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(RunError, match=r"layer-0.bin: cannot be read: Input/output error"):
        ahead(0)


@pytest.mark.skipif(sys.platform != "linux", reason="MADV_POPULATE_READ")
def test_cut_file_is_noticed_also_where_it_was_read_before(tiny_folder: Path, cache: Path) -> None:
    _, ahead = load_streamed(locate(str(tiny_folder)), torch.float32)
    (file,) = cache.glob("layers/*/*/layer-0.bin")
    layer: Any = ahead._layers[0]
    layer.read()
    layer.release()
    layer.read()
    os.truncate(file, 0)
    with pytest.raises(RunError, match="it was cut"):
        layer.read()


@pytest.mark.parametrize("populates", [True, False], ids=["populated", "an old kernel"])
def test_pages_are_mapped_ahead(
    populates: bool, tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ahead = load_streamed(locate(str(tiny_folder)), torch.float32)
    if not populates:
        monkeypatch.setattr(streaming, "MADV_POPULATE_READ", 4000)  # EINVAL
    expected = model.get_submodule("model.layers.1.mlp.down_proj").weight.clone()
    for _ in range(2):
        for key in (EMBEDDING, 0, 1, HEAD, 1, 0):
            ahead(key)
        assert torch.equal(model.get_submodule("model.layers.1.mlp.down_proj").weight, expected)


class RecordedLayer:
    def __init__(self, key: int | str, log: list[str]) -> None:
        self._key, self._log = key, log

    def read(self) -> None:
        self._log.append(f"read {self._key}")

    def release(self) -> None:
        self._log.append(f"release {self._key}")

    def drop(self) -> None:
        self._log.append(f"drop {self._key}")

    size = 100


@pytest.mark.parametrize("free", [450, 10_000], ids=["two fit", "all fit"])
def test_answers_read_layers_ahead_and_keep_those_that_fit(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(streaming, "free_bytes", lambda: free)
    layers: dict[Any, Any] = {key: RecordedLayer(key, log) for key in (EMBEDDING, *range(5), HEAD)}
    cycle = LayerCycle(layers)
    for token in range(3):
        for number in range(5):
            cycle(number)
            log.append(f"compute {number} of {token}")
    cycle.wait()
    if free == 10_000:
        assert not [entry for entry in log if not entry.startswith("compute")]
        return
    assert {entry for entry in log if entry.startswith("drop")} == {"drop 2", "drop 3", "drop 4"}
    for token in range(3):
        for number in range(5):
            at = log.index(f"compute {number} of {token}")
            before = [entry for entry in log[:at] if entry.endswith(f" {number}")]
            assert before[-1] == f"read {number}" and before.count(f"read {number}") == token + 1
    assert log[-1] == "read 0"  # of the next token


def test_each_layer_is_read_before_it_is_computed_and_released_after() -> None:
    log: list[str] = []
    keys = [EMBEDDING, 0, 1, 2, HEAD]
    layers: dict[Any, Any] = {key: RecordedLayer(key, log) for key in keys}
    ahead = ReadAhead(layers, {key: nn.Identity() for key in keys})
    for key in (*keys, 2, 1, 0, *keys[:3]):  # forward, backward, the next forward
        ahead(key)
        log.append(f"compute {key}")
    mapped: set[str] = set()
    for number, entry in enumerate(log):
        action, _, key = entry.partition(" ")
        if action == "compute" and key != EMBEDDING:
            assert f"read {key}" in log[:number]
            mapped.add(key)
        if action == "release":
            mapped.discard(key)
        assert len(mapped) <= 1, log[: number + 1]
    assert log.index("read 2") < log.index("compute 2") and f"read {EMBEDDING}" not in log
    assert ahead.waited_s >= 0


def test_embedding_and_layers_are_views_of_files(tiny_folder: Path, cache: Path) -> None:
    model, ahead = load_streamed(locate(str(tiny_folder)), torch.bfloat16)
    large = [weight for weight in model.parameters() if weight.dim() > 1]
    attention = model.get_submodule("model.layers.0.self_attn")
    q, k, v = (getattr(attention, f"{name}_proj").weight for name in "qkv")
    assert k.data_ptr() == q.data_ptr() + q.nbytes and v.data_ptr() == k.data_ptr() + k.nbytes  # one product
    assert sum(weight.nbytes for weight in large) == sum(file.stat().st_size for file in layer_files(cache))
    assert len({file.stat().st_mtime_ns for file in layer_files(cache)}) >= 1
    load_streamed(locate(str(tiny_folder)), torch.bfloat16)  # nothing is written again
    assert [*ahead.modules] == [EMBEDDING, 0, 1, HEAD]


def planned(free: float, **options: Any) -> Any:
    settings = {"model": "m", "data": "d", "data.max_length": 512, **options}
    device = options.get("model.device", "cpu")
    return choose(resolve(None, settings), machine(free), LLAMA_8B, device, ("bf16", "measured"))


def test_plan_streams_what_does_not_fit() -> None:
    assert planned(40).recipe.model.placement == "auto"
    small = planned(6)
    assert small.recipe.model.placement == "streamed" and small.recipe.model.quantization == "none"
    assert "would not fit" in small.choices["model.placement"].why
    tiny_memory = planned(4, **{"model.quantization": "nf4"})
    assert tiny_memory.recipe.model.placement == "streamed" and tiny_memory.recipe.model.resident_layers == 0
    assert planned(12, **{"model.quantization": "nf4"}).recipe.model.placement == "auto"
    tiny_machine = planned(1)  # too small for either: what needs the least
    assert (tiny_machine.recipe.model.placement, tiny_machine.recipe.model.quantization) == ("streamed", "none")
    asked = planned(6, **STREAMED, **{"model.quantization": "auto"})
    assert asked.recipe.model.quantization == "none" and "from disk" in asked.choices["model.quantization"].why
    in_fp32 = planned(14, **{"model.dtype": "fp32"})  # quantized in memory: fp32 from disk is twice as much
    assert (in_fp32.recipe.model.placement, in_fp32.recipe.model.quantization) == ("auto", "nf4")


def plan_on_gpu(tmp_path: Path, model: str, gpu: str, **options: Any) -> strop.Plan:
    file = tmp_path / f"{model}.json"
    file.write_text(json.dumps(KNOWN[model]), encoding="utf-8")
    return strop.plan(model=str(file), gpu=gpu, **{"data.max_length": 1024, **options})


def test_plan_streams_to_a_gpu_what_does_not_fit_in_4_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = plan_on_gpu(tmp_path, "Llama-3.1-70B", "RTX 4090")
    model = large.resolved.recipe.model
    assert large.fits and (model.placement, model.quantization, model.resident_layers) == ("streamed", "nf4", 0)
    shape, base = large.workload.shape, large.workload.base
    assert large.phases["train"].parts["weights"] < base.parameters * 0.5 / 4
    in_layers = base.parameters - 2 * shape.embedding_weights
    assert large.host_bytes == pytest.approx(in_layers * 4.127 / 8, rel=0.01)
    packed = plan_on_gpu(tmp_path, "Llama-3.1-8B", "RTX 4060")  # fits in 4 bit
    assert (packed.resolved.recipe.model.placement, packed.resolved.recipe.model.quantization) == ("auto", "nf4")
    assert packed.host_bytes == 0
    asked = plan_on_gpu(tmp_path, "Llama-3.1-8B", "RTX 4060", **{"model.quantization": "none"})
    assert asked.fits and asked.resolved.recipe.model.placement == "streamed"
    large._print(Console(file=sys.stdout, width=140))
    printed = " ".join(capsys.readouterr().out.split())
    assert "host 32.9 GiB of its memory are needed too" in printed and "is copied to the GPU in each pass" in printed


def test_docs_have_the_table_of_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what_fits = script(ROOT / "benchmarks" / "what_fits.py")
    for name in what_fits.MODELS:
        (tmp_path / f"{name}.json").write_text(json.dumps(KNOWN[name]), encoding="utf-8")
    what_fits.print_gpus(tmp_path)
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "streaming.md").read_text(encoding="utf-8")


def test_host_without_room_for_the_layers_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the run, and by the plan on the machine itself."""
    this = replace(machine(16), gpus=("NVIDIA GeForce RTX 4060, 8188 MiB",))
    monkeypatch.setattr("strop.planning.machines.probe", lambda: this)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(KNOWN["Llama-3.1-8B"]), encoding="utf-8")
    options = {"model.quantization": "none", "data.max_length": 512, "model.device": "cuda"}
    assert strop.plan(model=str(file), **options).fits
    monkeypatch.setattr("strop.planning.machines.probe", lambda: replace(this, free_bytes=8 * GIB))
    short = strop.plan(model=str(file), **options)
    assert not short.fits and short.verdict == "training does not fit: 13.0 GiB of host memory needed, 8.0 GiB free"
    facts = RecipeFacts(short.resolved, "", 0, short.workload.shape, short.workload.base.parameters)
    with pytest.raises(MemoryLimitError, match=r"the host memory is too small: 13\.0 GiB needed") as raised:
        _check_host(facts, replace(this, free_bytes=8 * GIB))
    assert 'quantization="nf4"' in str(raised.value)
    _check_host(facts, this)


def test_micro_batch_grows_where_the_disk_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = planned(12).recipe
    monkeypatch.setattr("strop.planning.fit.DISK_BYTES_PER_S", 1e6)
    slow = planned(12)
    assert slow.recipe.model.placement == usual.model.placement == "streamed"
    assert slow.recipe.train.micro_batch_tokens > usual.train.micro_batch_tokens
    assert "reading the base" in slow.choices["train.micro_batch_tokens"].why
    assert planned(12, **{"train.micro_batch_tokens": 1024}).recipe.train.micro_batch_tokens == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.device": "mps"}, "on a CPU or CUDA, and the run is on mps"),
        ({"model.device": "cuda", "lora.new_tokens": ["<A>"]}, "on a GPU not with lora.new_tokens"),
        ({"train.int8_matmul": True, "model.dtype": "fp32"}, "streamed"),
        ({"train.method": "full"}, "streamed"),
        ({"model.quantization": "nf4", "model.resident_layers": 2}, "resident_layers 2"),
    ],
)
def test_what_cannot_be_streamed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(40, **STREAMED, **options)


def test_general_answers_come_from_the_disk_too(
    tiny_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that answers before training is not in memory either."""
    recipe = resolve(None, {"model": str(tiny_folder), "data": "d", "model.dtype": "fp32", **STREAMED}).recipe
    monkeypatch.setattr("strop.engine.decode.model.load_base", lambda *_, **__: pytest.fail("loaded into memory"))
    assert keep._load(recipe, locate(str(tiny_folder))).generate(["hi"], max_new_tokens=2)


def test_answers_of_a_base_larger_than_memory(tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["count to 3", "count to 9"]
    expected = strop.load(tiny_folder, dtype="fp32").generate(prompts, max_new_tokens=8)
    monkeypatch.setattr(streaming, "free_bytes", lambda: 1000)
    model = strop.load(tiny_folder, dtype="fp32")
    assert "is read from disk for each token of the answers" in model.notes[-1]
    assert model.generate(prompts, max_new_tokens=8) == expected
    (file,) = cache.glob("layers/*/*/layer-1.bin")
    flip_a_byte(file)
    with pytest.raises(RunError, match=r"layer-1.bin: cannot be read"):
        strop.load(tiny_folder, dtype="fp32")
    os.truncate(file, 0)
    with pytest.raises(RunError, match=r"layer-1.bin: cannot be read: it was cut"):
        model.generate(prompts, max_new_tokens=2)


def test_planned_time_of_a_larger_base_is_close_to_the_measured(tmp_path: Path) -> None:
    """The rates were measured by `strop doctor` on that machine, the day before, beside other programs."""
    file = ROOT / "benchmarks" / "results" / "streamed_2026-12-01.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    measured = [one["tokens_per_s"] for one in stored["results"] if one["shape"] == "8B"]
    layers, hidden, inner, heads, kv_heads, vocabulary = (32, 4096, 14336, 32, 8, 128256)  # benchmarks/big_model.py
    LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    options = {"model.device": "cpu", "model.dtype": "bf16", "train.micro_batch_tokens": 512}
    streamed, whole = (
        strop.plan(model=tmp_path / "config.json", memory=64 << 30, **options, **placement).workload
        for placement in (STREAMED, {"model.placement": "replicated"})
    )
    rate, batch = Rate.measured(Rates(**stored["rates"]), "bf16"), MicroBatch.rows([256, 256])
    assert tokens_per_s(streamed, batch, rate) == pytest.approx(statistics.median(measured), rel=0.25)
    assert tokens_per_s(whole, batch, rate) > 1.3 * statistics.median(measured), "reading takes time"
