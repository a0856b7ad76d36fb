"""Plans for several devices: bytes sent, seconds of communication, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from strop import plan
from strop.errors import RecipeError
from strop.machine.probe import Machine
from strop.models.families.shape import ModelShape
from strop.planning.machines import TargetMachine
from strop.planning.memory import PROCESS_BYTES, base_layer_bytes
from strop.planning.multi_device import (
    LOOPBACK,
    NETWORKS,
    NODE_LINKS,
    Devices,
    Link,
    _rate_share,
    all_reduce_seconds,
    gather_bytes,
    gather_seconds,
    ring_bytes,
    ring_seconds,
    target_share,
    tree_seconds,
)
from strop.planning.tables import KNOWN
from strop.planning.time import Rate
from strop.planning.workload import BaseWeights, Workload
from tests.support.runs import run

RATE = Rate(1e12, 1e11, "test", head_flops=5e11, attention_flops=4e11)
MACHINE = Machine("CPU", (), "Linux", "3.11", 8, 64 << 30, 60 << 30, ())


def target(device: str = "cpu", **changes: Any) -> TargetMachine:
    return TargetMachine(replace(MACHINE, **changes), device, ("bf16", ""), lambda _: RATE)


def sent_in_a_ring(size: int, count: int) -> list[int]:
    """Return the bytes that each device sends, by simulating a ring: sum one part each, then pass the sums on."""
    parts, sent = [size // count] * count, [0] * count
    summed_by = [[{device} for _ in parts] for device in range(count)]
    for step in range(2 * (count - 1)):
        moved = []
        for device in range(count):
            part = (device - step) % count if step < count - 1 else (device + 1 - (step - count + 1)) % count
            moved.append((device, (device + 1) % count, part, summed_by[device][part]))
            sent[device] += parts[part]
        for _, receiver, part, summed in moved:
            summed_by[receiver][part] = summed_by[receiver][part] | summed
    assert all(part == set(range(count)) for device in summed_by for part in device)
    return sent


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_ring_bytes_equal_a_simulated_ring(count: int) -> None:
    size = 840 * count
    assert set(sent_in_a_ring(size, count)) == {ring_bytes(size, count)}


def test_communication_seconds_equal_a_calculation_by_hand() -> None:
    link = Link("test", bytes_per_s=1e9, hop_s=1e-3, start_s=1e-2)
    assert ring_seconds(10**9, Devices(4), link) == pytest.approx(1e-2 + 6e-3 + 1.5)
    network = replace(link, node_hop_s=1e-4)
    assert ring_seconds(0, Devices(per_node=2, nodes=3), network) == pytest.approx(1e-2 + 4e-3 + 6e-4)
    assert tree_seconds(10**9, Devices(per_node=2, nodes=4), network) == pytest.approx(1e-2 + 2e-4 + 4e-3 + 2)
    thousand = Devices(nodes=1024)
    assert all_reduce_seconds(10**6, thousand, network, "cuda") < all_reduce_seconds(10**6, thousand, network, "cpu")


def test_processes_share_cores_memory_and_rates_of_a_cpu() -> None:
    part = target_share(target(), Devices(4), local=True)
    assert (part.machine.cores, part.machine.free_bytes) == (2, (15 << 30) - 3 * PROCESS_BYTES // 4), (
        "each process has its libraries"
    )
    rate = part.rate_of("bf16")
    assert (rate.flops, rate.head_flops, rate.attention_flops, rate.bandwidth) == (2.5e11, 1.25e11, 1e11, 2.5e10)
    whole = target()
    assert target_share(whole, Devices(1), local=True) is whole
    assert target_share(whole, Devices(1, nodes=4), local=True).machine == whole.machine


def test_gpus_are_not_shared_and_must_exist() -> None:
    two = target("cuda", gpus=("RTX 3090, 24576 MiB",) * 2)
    assert target_share(two, Devices(2, nodes=3), local=True) is two
    with pytest.raises(RecipeError, match=r"devices 3: .*2 GPUs"):
        target_share(two, Devices(3), local=True)
    assert target_share(two, Devices(8), local=False) is two


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_more_devices_than_the_machine_has_are_refused(device: str) -> None:
    with pytest.raises(RecipeError, match="devices"):
        target_share(target(device), Devices(9), local=True)


def test_every_rate_of_a_cpu_is_divided() -> None:
    unchanged = {"source", "gpu", "layer_s", "kinds_s", "plain", "unpacked_per_s", "integers"}
    names = [field.name for field in fields(Rate) if field.name not in unchanged]
    whole = Rate(**dict.fromkeys(names, 8.0), source="", plain=3.0)
    whole = replace(whole, unpacked_per_s={"nf4": 8.0}, integers={"int8": 8.0})
    part = _rate_share(whole, 4)
    assert all(getattr(part, name) == 2.0 for name in names)
    assert part.unpacked_per_s == {"nf4": 2.0} and part.integers == {"int8": 2.0} and part.plain == 3.0


def test_compute_time_is_constant_with_rows_per_device() -> None:
    one = plan(model="demo", gpu="A100 80GB", **{"train.batch_size": 4, "train.micro_batch": 4})
    several = plan(
        model="demo", gpu="A100 80GB", devices=8, nodes=2, **{"train.batch_size": 64, "train.micro_batch": 4}
    )
    multi_device = several.multi_device
    parts = [dict(result.phases["train"].parts, gradients=0) for result in (one, several)]
    assert parts[0] == parts[1]  # gradients of an earlier micro-batch differ
    step_s = 4 * 1024 / one.tokens_per_s
    assert multi_device.compute_s == pytest.approx(step_s, rel=0.01)
    times = multi_device.link_times
    assert [time.link for time in times] == list(NETWORKS)
    assert [time.tokens_per_s for time in times] == sorted(time.tokens_per_s for time in times)
    first = times[0]
    assert several.tokens_per_s == first.tokens_per_s
    assert first.tokens_per_s == pytest.approx(64 * 1024 / (multi_device.compute_s + first.seconds))
    assert multi_device.sent_bytes == pytest.approx(2 * 15 / 16 * 4 * several.workload.adapter_weights, rel=1e-3)
    shown = several.as_json()["devices"]
    assert (shown["count"], shown["nodes"], shown["mode"]) == (16, 2, "replicated")
    assert one.as_json()["devices"] == {"count": 1, "nodes": 1, "mode": "one"}


def test_links_depend_on_device_and_nodes() -> None:
    inside = plan(model="demo", gpu="A100 80GB", devices=2).multi_device
    assert [time.link for time in inside.link_times] == list(NODE_LINKS)
    on_cpu = plan(model="demo", memory=16 << 30, devices=2, **{"model.device": "cpu"}).multi_device
    assert [time.link for time in on_cpu.link_times] == [LOOPBACK]
    far = plan(model="demo", memory=16 << 30, devices=1, nodes=2, **{"model.device": "cpu"}).multi_device
    assert all(time.link.bytes_per_s <= LOOPBACK.bytes_per_s for time in far.link_times)


def test_devices_without_rows_are_idle() -> None:
    options = {"train.batch_size": 4, "train.micro_batch": 1}
    four = plan(model="demo", gpu="A100 80GB", devices=4, **options).multi_device
    eight = plan(model="demo", gpu="A100 80GB", devices=8, **options).multi_device
    assert eight.compute_s == four.compute_s
    assert any("4 devices are idle" in note for note in eight.notes)
    assert not any("idle" in note for note in four.notes)


def test_two_processes_that_do_not_fit_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "demo", "--memory", "3GB", "--device", "cpu", "--train.micro_batch", "8"]
    words += ["--model.quantization", "none", "--train.optimizer", "adamw", "--train.gradient_checkpointing", "off"]
    words += ["--data.max_length", "256", "--model.placement", "replicated", "--model.dtype", "bf16"]
    code, out, _ = run(*words, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["fits"]
    code, out, err = run(*words, "--devices", "2", "--json", capsys=capsys)
    shown = json.loads(out)
    assert code == 1 and not shown["fits"]
    assert "2 copies of the base" in err.replace("\n", " ")
    assert shown["devices"]["count"] == 2


def test_compare_with_devices_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("plan", "--compare", "--devices", "2", capsys=capsys)
    assert code == 2 and "--compare" in err


def test_sampling_on_several_devices_is_refused() -> None:
    options = {"train.objective": "grpo", "train.rewards": "length.py:length"}
    assert plan(model="demo", gpu="A100 80GB", **options).fits
    with pytest.raises(RecipeError, match="6"):
        plan(model="demo", gpu="A100 80GB", devices=2, nodes=3, **options)


def test_exact_training_sends_each_partial_sum_to_every_device() -> None:
    """Eight micro-batches make one buffer per device on two devices, and six buffers on three."""
    options = {"train.batch_size": 8, "train.micro_batch": 8, "model.device": "cpu"}
    plain, two, three = (
        plan(model="demo", memory=32 << 30, devices=count, **options, **{"train.exact": exact}).multi_device
        for count, exact in ((2, False), (2, True), (3, True))
    )
    assert two.sent_bytes == pytest.approx(2 * plain.sent_bytes, rel=1e-4)
    assert three.sent_bytes == pytest.approx(6 * plain.sent_bytes, rel=1e-4)
    assert three.link_times[0].seconds > two.link_times[0].seconds > plain.link_times[0].seconds


def test_base_is_sharded_if_it_does_not_fit_whole(tmp_path: Path) -> None:
    """An 8B model in 16 bit fits GPUs of 16 GiB only if two of them share it.

    A base that fits, and one with an option that needs all of it, is not sharded.
    """
    model = tmp_path / "config.json"
    model.write_text(json.dumps(KNOWN["Llama-3.1-8B"]), encoding="utf-8")
    options = {"model": str(model), "gpu": "RTX 4080", "model.quantization": "none", "data.max_length": 512}
    one = plan(**options, **{"model.placement": "replicated"})
    two, four = (plan(**options, devices=count) for count in (2, 4))
    assert not one.fits and two.fits and two.multi_device.mode == "sharded"
    choice = two.resolved.choices["model.placement"]
    assert (choice.value, choice.origin) == ("sharded", "plan") and "would not fit whole" in choice.why
    assert not plan(**options, devices=2, **{"model.placement": "replicated"}).fits
    weights = [result.phases["train"].parts["weights"] for result in (one, two, four)]
    assert weights == [pytest.approx(weights[0] / count, abs=4) for count in (1, 2, 4)]
    assert plan(**options).resolved.choices["model.placement"].value == "streamed"
    nf4 = plan(**{**options, "model.quantization": "nf4"}, devices=2)
    assert nf4.fits and nf4.multi_device.mode == "replicated" and nf4.workload.base.shards == 1
    packed = plan(**{**options, "model.quantization": "nf4"}, devices=2, **{"model.placement": "sharded"})
    assert packed.workload.base.resident_layers == 0 and packed.multi_device.mode == "sharded"
    assert packed.multi_device.sent_bytes < 0.4 * two.multi_device.sent_bytes
    needed = plan(**options, devices=2, **{"lora.use_dora": True})
    assert not needed.fits and needed.multi_device.mode == "replicated"
    with pytest.raises(RecipeError, match=r"not with lora\.use_dora"):
        plan(**options, devices=2, **{"lora.use_dora": True, "model.placement": "sharded"})


def test_gathered_bytes_equal_a_calculation_by_hand() -> None:
    """A model of two layers gathers the embedding, both layers, the head, and the first layer again."""
    shape = replace(ModelShape.from_config(KNOWN["Llama-3.1-8B"]), layers=2, tied=True, vocabulary=10, hidden=100)
    workload = Workload(base=BaseWeights(shape=shape, parameters=10_000, shards=2))
    layer = (2 * 10_000 - 2 * 1000) // 2
    assert base_layer_bytes(workload) == layer
    assert gather_bytes(workload) == 2 * 1000 + layer + layer + 2 * 1000 + layer
    link = Link("test", 1e6, 0.001)
    assert gather_seconds(workload, Devices(2), link) == pytest.approx(5 * 0.001 + gather_bytes(workload) / 2 / 1e6)
