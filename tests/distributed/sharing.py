"""Runs on a base of which each rank holds a share, compared with runs on whole ones; and what is hurt on purpose."""

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
from strop.distributed.sharded import Sharded
from strop.engine.train.fast import FastLoss
from strop.errors import RunError
from strop.models import sharding
from strop.models.sharding import GRAIN, ModelShards, ShardedTensor, ShardedUnit
from tests.distributed.crew import Prepare, crew, inside
from tests.distributed.suite import NEAR, Lab, apart, at_step, codes, events, said, write_pairs
from tests.support import tiny_families

SHARDED = ("--model.placement", "sharded")
NF4 = ("--model.quantization", "nf4", "--model.resident_layers", "1")


def the_same_run(lab: Lab) -> None:
    """Fast and plain step, 16 and 4 bit, resident and streamed layers, checkpointing, pairs, evaluation: to the bit."""
    pairs = lab.folder / "pairs.jsonl"
    write_pairs(pairs)
    cases = [
        (3, ["--data.eval", "20%"]),
        (2, [*NF4, "--train.gradient_checkpointing", "1"]),
        (3, ["--train.objective", "dpo", "--data", str(pairs), "--data.eval", "20%", "--train.exact", "true"]),
    ]
    for world, more in cases:
        whole, out = lab.good(world, *more), lab.good(world, *SHARDED, *more, prepare=looking(world))
        assert apart(whole, out) == 0.0, (more, apart(whole, out))
        found = [[event["loss"] for event in events(one, "eval")] for one in (whole, out)]
        assert found[0] == found[1]
        reports = [json.loads((one / "report.json").read_text()) for one in (whole, out)]
        assert reports[0]["weight_change"] == reports[1]["weight_change"]
        assert (reports[0]["devices"]["mode"], reports[1]["devices"]["mode"]) == ("replicated", "sharded")
        held = reports[1]["devices"]["base"]
        assert held["whole_bytes"] / world <= held["held_bytes"] <= held["whole_bytes"] / world + 3 * GRAIN
        assert len(json.loads((out / "lock.json").read_text())["layers"]) == 3
    alone = lab.good(1, *cases[0][1])
    assert apart(alone, lab.good(2, *SHARDED, *cases[0][1])) < NEAR


def looking(world: int) -> dict[int, Prepare]:
    """Each rank looks at what it holds of the base between two steps: of the large weights, its share."""

    def look(job: Any) -> None:
        parts = job.devices.base.parts
        mine = {unit.whole.untyped_storage().data_ptr() for unit in parts.distinct()}
        large = [p for p in job.model.parameters() if not p.requires_grad and p.dim() > 1]
        assert {p.untyped_storage().data_ptr() for p in large} <= mine
        assert not any(unit.there for unit in parts.distinct())
        kept = sum(unit.own.untyped_storage().nbytes() for unit in parts.distinct())
        assert kept == parts.held_bytes

    return {rank: at_step(3, look) for rank in range(world)}


def families(lab: Lab) -> None:
    """A mixture of packed experts, which the model's own modules compute in the fast step, and a model with untied
    embeddings, biases and dropout of its own (GPT-2), in the plain one: on a share, exact on any number of devices."""
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
    assert any("dropout of the model's own" in text for text in noted)
    assert not any("dropout of the model's own" in event["text"] for event in events(out, "note"))


def bytes_arrive(lab: Lab) -> None:
    """All 256 values of a byte, and all floats that are no numbers, come as they left; what does not is found."""
    world = 3

    def exchange(devices: Devices) -> None:
        values = torch.arange(256, dtype=torch.uint8).repeat(5)
        sixteen = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        nans = sixteen[sixteen.isnan()]
        wide = torch.tensor([0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1, -0x400000 + 1], dtype=torch.int32)
        sent = {"bytes": values, "bf16": nans.view(torch.uint8), "fp32": wide.view(torch.uint8)}
        held: dict[str, torch.Tensor] = {}
        slots = [
            ShardedTensor(name, data.shape, torch.uint8, lambda view, name=name: held.update({name: view}),
                 lambda low, high, data=data: data[low:high])
            for name, data in sent.items()
        ]  # fmt: skip
        unit = ShardedUnit("layer 0", slots, devices.rank, world, "cpu")
        assert unit.own.numel() * world >= unit.size and not unit.there
        base = Sharded(ModelShards({0: unit}, {0: nn.Identity()}, unit.size, unit.own.numel()), devices)
        for _ in range(2):
            base.begin(backward=False)
            base(0)
            for name, data in sent.items():
                assert torch.equal(held[name], data), name
            base.end()
            assert not unit.there
        spoiled = Sharded(ModelShards({0: unit}, {0: nn.Identity()}, unit.size, unit.own.numel()), devices)
        if devices.rank == 1:
            unit.own[5] ^= 1  # after it was read
        spoiled.begin(backward=False)
        with pytest.raises(RunError, match="layer 0 of the base does not arrive"):
            spoiled(0)
        spoiled.end()

    ended = crew(inside(exchange), world, lab.folder / "said").end()
    assert codes(ended) == [0] * world, said(ended)


def hurt_between_layers(lab: Lab) -> None:
    """An exception, and no memory, in the middle of a pass on one rank, while the others wait for its bytes."""

    def at_layer(act: Any) -> Prepare:
        def prepare() -> None:
            through, count = FastLoss._through, iter(range(1, 10_000))

            def hurt(self: Any, *args: Any) -> Any:
                if next(count) == 12:
                    act()
                return through(self, *args)

            mock.patch.object(FastLoss, "_through", hurt).start()

        return prepare

    def fail() -> None:
        raise ValueError("planted")

    def starve() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    _, ended = lab.train(3, *SHARDED, prepare={1: at_layer(fail)})
    assert codes(ended) == [1, 1, 1] and "ValueError: planted" in ended[1].said, said(ended)
    one, out = lab.good(1), lab.good(3, *SHARDED, prepare={2: at_layer(starve)})
    (shrunk,) = events(out, "shrink")
    assert "rank 2 of 3" in shrunk["why"] and apart(one, out) < NEAR
    _, ended = lab.train(2, *SHARDED, prepare={0: at_layer(lambda: os.kill(os.getpid(), signal.SIGKILL))})
    assert codes(ended) == [-signal.SIGKILL, 1], said(ended)


def goes_on(lab: Lab) -> None:
    """Saved on 3 ranks with a share each, resumed on 2 with a share each, then on one alone; another base is refused,
    and a weight that is not finite, on whichever rank."""
    more = ["--train.exact", "true"]
    whole = lab.good(1, *more)
    for world, words in ((2, []), (1, [])):
        stop = at_step(5, lambda job: os.kill(os.getpid(), signal.SIGTERM))
        out, ended = lab.train(3, *SHARDED, *more, prepare={2: stop})
        assert codes(ended) == [130] * 3, said(ended)
        if world == 2:
            lock = json.loads((out / "lock.json").read_text())
            (out / "lock.json").write_text(json.dumps({**lock, "layers": {**lock["layers"], "layer 1": "0" * 16}}))
            ended = lab.start(2, ["resume", str(out)]).end()
            assert codes(ended) == [1, 1] and "layer 1 of the base is not what it was" in said(ended), said(ended)
            (out / "lock.json").write_text(json.dumps(lock))
        lab.resume(world, out, *words)
        assert apart(whole, out) == 0.0, world
    _, ended = lab.train(2, *SHARDED, "--lora.use_dora", "true", "--lora.dropout", "0")
    assert codes(ended) == [2, 2] and "not with lora.use_dora" in said(ended), said(ended)

    def poison() -> None:
        read = sharding.Tensors.part

        def poisoned(self: Any, name: str, low: int, high: int) -> torch.Tensor:
            found = read(self, name, low, high)
            if "down_proj" in name:
                found[:4] = torch.tensor([0, 0, 0xC0, 0x7F], dtype=torch.uint8)
            return found

        mock.patch.object(sharding.Tensors, "part", poisoned).start()

    _, ended = lab.train(2, *SHARDED, prepare={1: poison})
    assert codes(ended) == [2, 2] and "holds NaN or infinity" in ended[1].said, said(ended)


def odd_models(lab: Lab) -> None:
    """Llama 4's text half, whose parts are not where its prefix says; and layers that are computed more than once."""
    lab.model = lab.folder / "llama4"
    tiny_families.save("llama4_text", lab.model)
    more = ["--train.exact", "true", "--train.max_steps", "3"]
    assert apart(lab.good(1, *more), lab.good(2, *SHARDED, *more)) == 0.0
    lab.model = lab.folder / "hrm"
    tiny_families.save("hrm_text", lab.model)
    _, ended = lab.train(2, *SHARDED, *more)
    assert codes(ended) == [1, 1] and "Traceback" not in said(ended), said(ended)
    assert "this model cannot be sharded: give --model.placement replicated" in said(ended).replace("\n", " ")
