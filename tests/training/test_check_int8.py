"""Runs whose frozen weights are multiplied in 8-bit integers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

import strop
from strop.errors import RecipeError, RunError
from strop.machine.probe import Machine, probe
from strop.models.families.shape import ModelShape
from strop.planning.choose import choose
from strop.planning.memory import integer_bytes
from strop.planning.microbatch import mean_micro_batch
from strop.planning.tables import KNOWN
from strop.planning.time import Rate, micro_batch_seconds
from strop.planning.workload import Workload
from strop.runs.events import read_events
from strop.training import dry_run
from strop.training.preflight import _int8_note as int8_note
from tests.support import tiny
from tests.support.slow import slow_except

needs = pytest.mark.skipif(not probe().has_int8_dot, reason="this CPU has no VNNI")
QUICK = {
    "train.int8_matmul": True, "lora.r": 4, "train.max_steps": 6, "train.batch_size": 4, "train.save_steps": 2,
    "lora.dropout": 0.1,
}  # fmt: skip


class Cut(Exception):
    pass


def cut(event: dict[str, Any]) -> None:
    if event["event"] == "save" and event["step"] == 4:
        raise Cut


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@needs
@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_int8_run_notes_its_errors_and_resumes_bit_identically(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, scheme: str
) -> None:
    options = {"model": str(tiny_folder), "data": str(rows_file), **QUICK, "model.quantization": scheme}
    whole = strop.train(out=tmp_path / "whole", **options)
    (note,) = [e["text"] for e in read_events(whole.folder / "events.jsonl") if e["event"] == "note"]
    assert "8-bit integers" in note and "against fp32 on" in note
    lock = json.loads((whole.folder / "lock.json").read_text())
    assert lock["precision"] == "fp32"
    with pytest.raises(Cut):
        strop.train(out=tmp_path / "cut", callback=cut, **options)
    strop.resume(tmp_path / "cut")
    result = weights(tmp_path / "cut")
    assert all(torch.equal(tensor, result[name]) for name, tensor in weights(whole.folder).items())
    floats = strop.train(out=tmp_path / "floats", **{**options, "train.int8_matmul": False})
    assert whole.report["loss"] == pytest.approx(floats.report["loss"], rel=1e-3)
    assert not all(torch.equal(tensor, result[name]) for name, tensor in weights(floats.folder).items())


@needs
@pytest.mark.parametrize("objective", slow_except(["dpo", "orpo", "kto", "reward"], ["dpo"]))
def test_int8_works_with_preference_objectives(tiny_folder: Path, tmp_path: Path, objective: str) -> None:
    rows = [{"prompt": f"what is {n}", "chosen": f"it is {n}", "rejected": "no idea"} for n in range(8)]
    if objective == "kto":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": n % 2 == 0} for n, r in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = {"model": str(tiny_folder), "data": str(tmp_path / "rows.jsonl"), **QUICK, "train.objective": objective}
    run = strop.train(out=tmp_path / "run", **options)
    assert run.report["steps"] == 6


@needs
def test_int8_error_beyond_the_limit_stops_the_run_before_the_first_step(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "INT8_MAX_GRADIENT_ERROR", 1e-9)
    with pytest.raises(RunError, match=r"int8_matmul: relative error .* against fp32, more than"):
        strop.train(model=str(tiny_folder), data=str(rows_file), out=tmp_path / "run", **QUICK)
    assert not [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "step"]


def test_int8_with_the_plain_step_is_refused(tmp_path: Path) -> None:
    """A model may turn out not to fit the fast step, although its config did not show it."""
    job = tiny.job(tmp_path / "run", tiny.examples(4))
    assert job.step.name == "plain"
    with pytest.raises(RunError, match="fused kernels"):
        dry_run.check_int8(job, tiny.examples(4))


LLAMA_8B = ModelShape.from_config(KNOWN["Llama-3.1-8B"])
LAPTOP = Machine("a CPU", ("avx2", "avx_vnni"), "Linux", "3.11", 8, 64 << 30, 60 << 30, ())


def chosen(machine: Machine = LAPTOP, shape: ModelShape = LLAMA_8B, device: str = "cpu", **options: Any) -> Any:
    resolved = tiny.recipe(**{"model.dtype": "auto", "train.int8_matmul": True, **options})
    return choose(resolved, machine, shape, device, ("bf16", "measured"))


def test_int8_matmul_chooses_fp32_and_keeps_int8_weights() -> None:
    assert chosen().recipe.model.dtype == "fp32"
    eight = chosen(**{"model.quantization": "int8"}).recipe
    assert eight.model.resident_layers == 0
    tight = replace(LAPTOP, free_bytes=24 << 30)
    assert chosen(tight, **{"model.quantization": "auto"}).recipe.model.quantization == "int8"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"machine": replace(LAPTOP, vector=("avx2",))}, "a CPU has no 8-bit integer dot products"),
        ({"device": "cuda", "machine": replace(LAPTOP, gpus=("card, 24564 MiB",))}, "the run is on cuda"),
        (
            {"shape": replace(LLAMA_8B, family="gpt2", text_config={"model_type": "gpt2"})},
            "which do not support this recipe",
        ),
    ],
)
def test_int8_matmul_is_refused_where_it_is_not_supported(how: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        chosen(**how)


@pytest.mark.parametrize(
    "options",
    [
        {"model.dtype": "bf16"},
        {"model.quantization": "nf4"},
        {"lora.use_dora": True},
        {"model.placement": "sharded"},
    ],
)
def test_options_in_conflict_with_int8_matmul_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny.recipe(**{"train.int8_matmul": True, **options})
    assert "cannot be combined with" in caught.value.what and next(iter(options)) in caught.value.what


@pytest.mark.parametrize(
    ("machine", "options", "noted"),
    [
        (LAPTOP, {}, True),
        (LAPTOP, {"model.dtype": "fp32"}, False),  # the user's choice
        (LAPTOP, {"train.int8_matmul": True}, False),
        (LAPTOP, {"lora.use_dora": True}, False),
        (LAPTOP, {"model.quantization": "nf4"}, False),
        (replace(LAPTOP, vector=("avx2",)), {}, False),
    ],
)
def test_int8_matmul_is_suggested_to_fp32_runs(machine: Machine, options: dict[str, Any], noted: bool) -> None:
    resolved = tiny.recipe(**{"model.dtype": "auto", **options})
    setup = SimpleNamespace(
        resolved=choose(resolved, machine, LLAMA_8B, "cpu", ("fp32", "measured")), machine=machine, shape=LLAMA_8B
    )
    assert (int8_note(cast(Any, setup)) is not None) == noted


def test_plan_counts_int8_memory_and_time() -> None:
    whole, plain, eight = (
        chosen(**{"train.int8_matmul": yes, "model.dtype": "fp32", "model.quantization": scheme}).recipe
        for yes, scheme in ((True, "none"), (False, "none"), (True, "int8"))
    )
    rate = Rate(1e11, 2e10, "a test", integers={"none": 2e11, "int8": 3e11})
    seconds = [
        micro_batch_seconds(Workload.from_recipe(recipe, LLAMA_8B), mean_micro_batch(recipe), rate)
        for recipe in (whole, plain, eight)
    ]
    assert seconds[2] < seconds[0] < seconds[1]
    sums = integer_bytes(Workload.from_recipe(eight, LLAMA_8B)) - 2 * LLAMA_8B.embedding_weights
    from strop.engine.kernels.cpu.int8_matmul import SUMS_BYTES  # its import starts threads

    assert sums == SUMS_BYTES
    int8_bytes = integer_bytes(Workload.from_recipe(whole, LLAMA_8B)) - sums
    assert int8_bytes == pytest.approx(2 * LLAMA_8B.parameters, rel=0.1)
    assert integer_bytes(Workload.from_recipe(plain, LLAMA_8B)) == 0 < sums
