"""A base in host memory, tested on a CPU, where the copies are plain copies: the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

import strop
from strop.config.schema import LoraSection
from strop.engine.step import step_for
from strop.errors import ModelError
from strop.models import pinned
from strop.models.host_layers import CopyAhead, load_from_host
from strop.models.load import load_base
from strop.models.lora import add_lora
from strop.models.source import locate
from strop.models.streaming import load_streamed
from strop.training import build
from tests.support import tiny, tiny_families
from tests.support.random_models import FAMILY_CONFIGS, example, tiny_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "PIECE", 1000)  # most tensors cross from one to the next


@pytest.fixture
def from_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs with a streamed base on a CPU load it as on a GPU."""
    monkeypatch.setattr(
        build, "load_streamed", lambda source, dtype, **more: load_from_host(source, dtype, "cpu", **more)
    )


def train(model: Path, data: Path, out: Path, **options: Any) -> tuple[dict[str, torch.Tensor], list[float], Any]:
    """Return the adapter, the losses of the steps and the report of a run of four steps."""
    events: list[dict[str, Any]] = []
    usual = {"train.max_steps": 4, "model.resident_layers": None, "progress": False}
    run = strop.train(model=model, data=data, out=out, callback=events.append, **{**usual, **options})
    losses = [event["loss"] for event in events if event["event"] == "step"]
    return load_file(run.folder / "adapter" / "adapter_model.safetensors"), losses, run.report


@pytest.mark.parametrize("recomputed", ["off", "on"])
@pytest.mark.parametrize(
    "options",
    [
        {"model.dtype": "fp32", "data.eval": "25%"},
        {"model.dtype": "bf16", "lora.dropout": 0.1},
        {"model.dtype": "bf16", "model.quantization": "nf4", "train.micro_batch_tokens": 64},
        {"model.dtype": "fp32", "model.quantization": "nf4", "model.double_quantization": False},
        {"model.dtype": "fp32", "model.quantization": "int8"},
    ],
    ids=lambda options: ",".join(f"{name.split('.')[-1]}={value}" for name, value in options.items()),
)
def test_bits_are_those_of_a_base_in_memory(
    options: dict[str, Any], recomputed: str, tmp_path: Path, rows_file: Path, from_host: None
) -> None:
    tiny.save_tiny(tmp_path / "model", num_hidden_layers=5)
    options = {**options, "train.gradient_checkpointing": recomputed}
    whole, losses, _ = train(tmp_path / "model", rows_file, tmp_path / "whole", **options)
    streamed = train(tmp_path / "model", rows_file, tmp_path / "run", **options, **{"model.placement": "streamed"})
    assert streamed[1] == losses and streamed[2]["copy_wait_s"] == 0
    assert all(torch.equal(weight, streamed[0][name]) for name, weight in whole.items())


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "dpo": lambda n: {"prompt": "say", "chosen": f"word {n}", "rejected": "no"},
    "kto": lambda n: {"prompt": "say", "completion": f"word {n}", "label": n % 2 == 0},
    "classify": lambda n: {"text": f"say {n}", "label": "ab"[n % 2]},
}


@pytest.mark.parametrize("objective", ROWS)
def test_other_objectives(objective: str, tmp_path: Path, from_host: None) -> None:
    """They compute references without gradients, or replace the head."""
    rows = "".join(f"{json.dumps(ROWS[objective](n))}\n" for n in range(8))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    tiny.save_tiny(tmp_path / "model", num_hidden_layers=3)
    options = {"model.dtype": "fp32", "train.objective": objective, "train.batch_size": 4}
    files = tmp_path / "model", tmp_path / "rows.jsonl"
    whole, losses, _ = train(*files, tmp_path / "whole", **options)
    streamed, streamed_losses, _ = train(*files, tmp_path / "run", **options, **{"model.placement": "streamed"})
    assert losses == streamed_losses and all(torch.equal(weight, streamed[name]) for name, weight in whole.items())


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_gradients_of_all_fused_families(family: str, tmp_path: Path) -> None:
    """A weight that is joined with others by a copy would not be that of its layer."""
    model = tiny_of(family)
    for name, weight in model.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path)
    source, rows = locate(str(tmp_path)), [example(6, 0), example(9, 1)]
    results: list[list[torch.Tensor]] = []
    for load in (load_base, load_from_host):
        loaded: Any = load(source, torch.float32, "cpu")
        base = loaded[0] if isinstance(loaded, tuple) else loaded
        torch.manual_seed(0)
        tuned = add_lora(base, LoraSection(r=3, alpha=5), None).train()
        adapters = [weight for weight in tuned.parameters() if weight.requires_grad]
        for weight in adapters:
            torch.nn.init.normal_(weight, std=0.3)
        step = step_for(tuned)
        step.checkpoint(None)
        loss = step.token_loss(rows)
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in adapters if weight.grad is not None)])
    assert len(results[0]) > 1 and step.name == "fast"
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "opt"])
def test_other_families(family: str, rows_file: Path, tmp_path: Path, from_host: None) -> None:
    tiny_families.save(family, tmp_path / family)
    options = {"model.dtype": "fp32"}
    whole, losses, _ = train(tmp_path / family, rows_file, tmp_path / "whole", **options)
    streamed = train(tmp_path / family, rows_file, tmp_path / "run", **options, **{"model.placement": "streamed"})
    assert losses == streamed[1] and all(torch.equal(whole[name], streamed[0][name]) for name in whole)


def test_answers_and_settings_are_those_of_a_base_in_memory(tmp_path: Path) -> None:
    """Also of a base read from disk, of which transformers reads no generation_config.json."""
    tiny.save_tiny(tmp_path, num_hidden_layers=3)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_k": 3, "eos_token_id": [1, 2]}')
    source = locate(str(tmp_path))
    whole, base = load_base(source, torch.float32, "cpu"), load_from_host(source, torch.float32, "cpu")[0]
    for model in (whole, load_streamed(source, torch.float32)[0], base):
        config = cast(Any, model).generation_config
        assert (config.do_sample, config.top_k, config.eos_token_id) == (True, 3, [1, 2])
    ids = torch.arange(1, 9)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected, answer = (cast(Any, model).generate(ids, **options) for model in (whole, base))
    assert torch.equal(answer, expected)


def test_host_without_room_is_an_error(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "free_bytes", lambda: pinned.RESERVE)
    with pytest.raises(MemoryError, match="MiB left for the layers of the base"):
        load_from_host(locate(str(tiny_folder)), torch.float32, "cpu")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="up_proj"):
        load_from_host(locate(str(tmp_path)), torch.float32, "cpu")


@pytest.mark.parametrize("layers", [4, 5])
@pytest.mark.parametrize("gradients", [True, False])
def test_layers_are_copied_ahead_into_a_buffer_that_is_not_in_use(
    layers: int, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    ahead = CopyAhead(CPU)
    ahead._layers = [(0, 0, [])] * layers
    begin = ahead._begin_copy

    def record(number: int) -> None:
        if ahead._held[number % 2] != number:
            log.append(f"copy {number}")
        begin(number)

    monkeypatch.setattr(ahead, "_begin_copy", record)
    forward, backward = list(range(layers)), list(range(layers))[::-1]
    with torch.set_grad_enabled(gradients):
        for key in [*forward, *backward, *forward] if gradients else forward * 3:
            log.append(f"need {key}")
            ahead(key)
            log.append(f"compute {key}")
    in_use, held = None, [None, None]
    late = 0
    for place, entry in enumerate(log):
        action, number = entry.split(" ")
        if action == "copy":
            late += place > 0 and log[place - 1] == f"need {number}"
            assert in_use is None or int(number) % 2 != in_use % 2 or log[place - 1].startswith("need")
            held[int(number) % 2] = int(number)
        elif action == "compute":
            in_use = int(number)
            assert held[in_use % 2] == in_use, log[: place + 1]
    # the first layer, and where a pass begins with a layer of the buffer in use
    assert late == (1 if gradients or layers % 2 == 0 else 3)
