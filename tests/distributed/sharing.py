"""Runs on sharded bases, compared with runs on whole ones; and injected faults."""

from __future__ import annotations

import json
import os
import signal
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from strop.distributed.devices import Devices
from strop.distributed.sharded import ShardedBase
from strop.engine.train.fast import FastLoss
from strop.errors import RunError
from strop.models import sharding
from strop.models.sharding import GRAIN, ModelShards, ShardedLayer, ShardedTensor
from tests.distributed.crew import Prepare, crew, inside
from tests.distributed.suite import NEAR, Lab, apart, at_step, codes, events, outputs, write_pairs
from tests.support import tiny_families

SHARDED = ("--model.placement", "sharded")
NF4 = ("--model.quantization", "nf4", "--model.resident_layers", "1")


def sharded_equals_replicated(lab: Lab) -> None:
    """Sharded and replicated runs are bit-identical: fast and plain step, 16 and 4 bit, pairs, evaluation."""
    pairs = lab.folder / "pairs.jsonl"
    write_pairs(pairs)
    cases = [
        (3, ["--data.eval", "20%"]),
        (2, [*NF4, "--train.gradient_checkpointing", "1"]),
        (3, ["--train.objective", "dpo", "--data", str(pairs), "--data.eval", "20%", "--train.exact", "true"]),
    ]
    for world, more in cases:
        whole, out = lab.good(world, *more), lab.good(world, *SHARDED, *more, prepare=check_shares(world))
        assert apart(whole, out) == 0.0, (more, apart(whole, out))
        result = [[event["loss"] for event in events(one, "eval")] for one in (whole, out)]
        assert result[0] == result[1]
        reports = [json.loads((one / "report.json").read_text()) for one in (whole, out)]
        assert reports[0]["weight_change"] == reports[1]["weight_change"]
        assert (reports[0]["devices"]["mode"], reports[1]["devices"]["mode"]) == ("replicated", "sharded")
        held_out = reports[1]["devices"]["base"]
        assert held_out["whole_bytes"] / world <= held_out["held_bytes"] <= held_out["whole_bytes"] / world + 3 * GRAIN
        assert len(json.loads((out / "lock.json").read_text())["layers"]) == 3
    alone = lab.good(1, *cases[0][1])
    assert apart(alone, lab.good(2, *SHARDED, *cases[0][1])) < NEAR


def check_shares(world: int) -> dict[int, Prepare]:
    """Check on each rank that between two steps it holds only its share of the large weights."""

    def look(job: Any) -> None:
        parts = job.devices.base.shards
        mine = {unit.whole.untyped_storage().data_ptr() for unit in parts.distinct()}
        large = [p for p in job.model.parameters() if not p.requires_grad and p.dim() > 1]
        assert {p.untyped_storage().data_ptr() for p in large} <= mine
        assert not any(unit.is_gathered for unit in parts.distinct())
        resident_bytes = sum(unit.shard.untyped_storage().nbytes() for unit in parts.distinct())
        assert resident_bytes == parts.held_bytes

    return {rank: at_step(3, look) for rank in range(world)}


def sharded_families(lab: Lab) -> None:
    """Sharded runs are exact on any number of devices for a mixture of packed experts in the fast step, and for GPT-2
    (untied embeddings, biases, its own dropout) in the plain step."""
    for family, engine, more in (
        ("qwen3_moe", "fast", ["--lora.dropout", "0", "--model.quantization", "int8", "--model.resident_layers", "1"]),
        ("gpt2", "plain", ["--train.gradient_checkpointing", "on"]),
    ):
        lab.model = lab.folder / family
        tiny_families.save(family, lab.model)
        exact = ["--train.exact", "true", "--train.max_steps", "5", *more]
        one, whole, out = lab.good(1, *exact), lab.good(2, *exact), lab.good(3, *SHARDED, *exact)
        assert apart(one, whole) == 0.0, (family, apart(one, whole))
        assert apart(one, out) == 0.0, (family, apart(one, out))
        (start,) = events(out, "start")
        assert start["engine"] == engine
    noted = [event["text"] for event in events(lab.good(2, "--train.max_steps", "1"), "note")]  # GPT-2, not exact
    assert any("the model's own dropout" in text for text in noted)
    assert not any("the model's own dropout" in event["text"] for event in events(out, "note"))


def gathered_bytes_are_exact(lab: Lab) -> None:
    """Gather all byte values and all NaN patterns unchanged, and detect a corrupted byte."""
    world = 3

    def exchange(devices: Devices) -> None:
        values = torch.arange(256, dtype=torch.uint8).repeat(5)
        sixteen = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        nans = sixteen[sixteen.isnan()]
        wide = torch.tensor([0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1, -0x400000 + 1], dtype=torch.int32)
        sent = {"bytes": values, "bf16": nans.view(torch.uint8), "fp32": wide.view(torch.uint8)}
        held_out: dict[str, torch.Tensor] = {}
        slots = [
            ShardedTensor(name, data.shape, torch.uint8, lambda view, name=name: held_out.update({name: view}),
                 lambda low, high, data=data: data[low:high])
            for name, data in sent.items()
        ]  # fmt: skip
        unit = ShardedLayer("layer 0", slots, devices.rank, world, "cpu")
        assert unit.shard.numel() * world >= unit.size and not unit.is_gathered
        base = ShardedBase(ModelShards({0: unit}, {0: nn.Identity()}, unit.size, unit.shard.numel()), devices)
        for _ in range(2):
            base.begin(backward=False)
            base(0)
            for name, data in sent.items():
                assert torch.equal(held_out[name], data), name
            base.end()
            assert not unit.is_gathered
        spoiled = ShardedBase(ModelShards({0: unit}, {0: nn.Identity()}, unit.size, unit.shard.numel()), devices)
        if devices.rank == 1:
            unit.shard[5] ^= 1  # corrupted after it was read
        spoiled.begin(backward=False)
        with pytest.raises(RunError, match="layer 0 of the base was corrupted"):
            spoiled(0)
        spoiled.end()

    ended = crew(inside(exchange), world, lab.folder / "output").end()
    assert codes(ended) == [0] * world, outputs(ended)


def faults_between_layers(lab: Lab) -> None:
    """One rank raises, runs out of memory or is killed in the middle of a pass while the others wait for its shards."""

    def at_layer(act: Any) -> Prepare:
        def prepare() -> None:
            through, count = FastLoss._compute_layer, iter(range(1, 10_000))

            def hurt(self: Any, *args: Any) -> Any:
                if next(count) == 12:
                    act()
                return through(self, *args)

            mock.patch.object(FastLoss, "_compute_layer", hurt).start()

        return prepare

    def fail() -> None:
        raise ValueError("planted")

    def starve() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    _, ended = lab.train(3, *SHARDED, prepare={1: at_layer(fail)})
    assert codes(ended) == [1, 1, 1] and "ValueError: planted" in ended[1].output, outputs(ended)
    one, out = lab.good(1), lab.good(3, *SHARDED, prepare={2: at_layer(starve)})
    (shrunk,) = events(out, "shrink")
    assert "rank 2 of 3" in shrunk["why"] and apart(one, out) < NEAR
    _, ended = lab.train(2, *SHARDED, prepare={0: at_layer(lambda: os.kill(os.getpid(), signal.SIGKILL))})
    assert codes(ended) == [-signal.SIGKILL, 1], outputs(ended)


def sharded_resume(lab: Lab) -> None:
    """A run saved on 3 sharded ranks resumes on 2 and on 1. Another base, and a non-finite weight on any rank, are
    refused."""
    more = ["--train.exact", "true"]
    whole = lab.good(1, *more)
    for world, words in ((2, []), (1, [])):
        stop = at_step(5, lambda job: os.kill(os.getpid(), signal.SIGTERM))
        out, ended = lab.train(3, *SHARDED, *more, prepare={2: stop})
        assert codes(ended) == [130] * 3, outputs(ended)
        if world == 2:
            lock = json.loads((out / "lock.json").read_text())
            (out / "lock.json").write_text(json.dumps({**lock, "layers": {**lock["layers"], "layer 1": "0" * 16}}))
            ended = lab.start(2, ["resume", str(out)]).end()
            assert codes(ended) == [1, 1] and "layer 1 of the base has changed" in outputs(ended), outputs(ended)
            (out / "lock.json").write_text(json.dumps(lock))
        lab.resume(world, out, *words)
        assert apart(whole, out) == 0.0, world
    _, ended = lab.train(2, *SHARDED, "--lora.use_dora", "true", "--lora.dropout", "0")
    assert codes(ended) == [2, 2] and "not with lora.use_dora" in outputs(ended), outputs(ended)

    def poison() -> None:
        read = sharding.CheckpointTensors.read_bytes

        def poisoned(self: Any, name: str, low: int, high: int) -> torch.Tensor:
            result = read(self, name, low, high)
            if "down_proj" in name:
                result[:4] = torch.tensor([0, 0, 0xC0, 0x7F], dtype=torch.uint8)
            return result

        mock.patch.object(sharding.CheckpointTensors, "read_bytes", poisoned).start()

    _, ended = lab.train(2, *SHARDED, prepare={1: poison})
    assert codes(ended) == [2, 2] and "holds NaN or infinity" in ended[1].output, outputs(ended)


def unusual_models(lab: Lab) -> None:
    """Test Llama 4's text model, whose modules have an unusual prefix, and layers that are computed more than once."""
    lab.model = lab.folder / "llama4"
    tiny_families.save("llama4_text", lab.model)
    more = ["--train.exact", "true", "--train.max_steps", "3", "--lora.dropout", "0"]  # Llama 4 is a mixture
    assert apart(lab.good(1, *more), lab.good(2, *SHARDED, *more)) == 0.0
    lab.model = lab.folder / "hrm"
    tiny_families.save("hrm_text", lab.model)
    _, ended = lab.train(2, *SHARDED, *more)
    assert codes(ended) == [1, 1] and "Traceback" not in outputs(ended), outputs(ended)
    assert "this model cannot be sharded Fix: give --model.placement replicated" in outputs(ended).replace("\n", " ")
