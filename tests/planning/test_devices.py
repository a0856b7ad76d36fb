"""Several devices on paper: what is sent, how long it takes, what cannot work."""

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
from strop.planning.compare import KNOWN
from strop.planning.devices import (
    INSIDE,
    LOOPBACK,
    NETWORKS,
    SLOTS,
    Devices,
    Link,
    _part,
    pass_bytes,
    pass_seconds,
    ring_bytes,
    ring_seconds,
    share,
    sum_seconds,
    tree_seconds,
)
from strop.planning.inputs import Place
from strop.planning.memory import base_layer_bytes
from strop.planning.time import Rate
from strop.planning.workload import Setting
from strop.training import oom
from tests.support.runs import run

RATE = Rate(1e12, 1e11, "test", head_flops=5e11, attention_flops=4e11)
MACHINE = Machine("Linux", "3.11", "CPU", (), 8, 64 << 30, 60 << 30, ())


def place(device: str = "cpu", **changes: Any) -> Place:
    return Place(replace(MACHINE, **changes), device, ("bf16", ""), lambda _: RATE)


def sent_in_a_ring(size: int, count: int) -> list[int]:
    """Bytes that each device sends, by playing a ring: every device adds up one part, then hands the sums around."""
    parts, sent = [size // count] * count, [0] * count
    held = [[{device} for _ in parts] for device in range(count)]
    for step in range(2 * (count - 1)):
        moved = []
        for device in range(count):
            part = (device - step) % count if step < count - 1 else (device + 1 - (step - count + 1)) % count
            moved.append((device, (device + 1) % count, part, held[device][part]))
            sent[device] += parts[part]
        for _, to, part, summed in moved:
            held[to][part] = held[to][part] | summed
    assert all(part == set(range(count)) for device in held for part in device)
    return sent


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_bytes_are_those_of_a_ring(count: int) -> None:
    size = 840 * count
    assert set(sent_in_a_ring(size, count)) == {ring_bytes(size, count)}


def test_seconds_by_hand() -> None:
    link = Link("test", bytes_per_s=1e9, hop_s=1e-3, start_s=1e-2)
    assert ring_seconds(10**9, Devices(4), link) == pytest.approx(1e-2 + 6e-3 + 1.5)
    network = replace(link, inside_s=1e-4)
    assert ring_seconds(0, Devices(each=2, nodes=3), network) == pytest.approx(1e-2 + 4e-3 + 6e-4)
    assert tree_seconds(10**9, Devices(each=2, nodes=4), network) == pytest.approx(1e-2 + 2e-4 + 4e-3 + 2)
    many = Devices(nodes=1024)
    assert sum_seconds(10**6, many, network, "cuda") < sum_seconds(10**6, many, network, "cpu")


def test_processes_share_a_cpu() -> None:
    part = share(place(), Devices(4), here=True)
    assert (part.machine.cores, part.machine.free_bytes) == (2, 15 << 30)
    rate = part.rate_of("bf16")
    assert (rate.flops, rate.head_flops, rate.attention_flops, rate.bandwidth) == (2.5e11, 1.25e11, 1e11, 2.5e10)
    whole = place()
    assert share(whole, Devices(1), here=True) is whole
    assert share(whole, Devices(1, nodes=4), here=True).machine == whole.machine


def test_a_card_is_its_own() -> None:
    cards = ("RTX 3090, 24576 MiB",) * 2
    two = place("cuda", gpus=cards)
    assert share(two, Devices(2, nodes=3), here=True) is two
    with pytest.raises(RecipeError, match="2 cards here"):
        share(two, Devices(3), here=True)
    assert share(two, Devices(8), here=False) is two


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_refuses_what_cannot_work(device: str) -> None:
    with pytest.raises(RecipeError, match="--devices"):
        share(place(device), Devices(9), here=True)


def test_processes_of_one_cpu_share_all_of_its_rates() -> None:
    kept = {"source", "peak", "layer_s", "kinds_s", "plain", "unpacked_per_s", "integers"}
    whole = Rate(**{one.name: 8.0 for one in fields(Rate) if one.name not in kept}, source="", plain=3.0)
    whole = replace(whole, unpacked_per_s={"nf4": 8.0}, integers={"int8": 8.0})
    part = _part(whole, 4)
    assert all(getattr(part, one.name) == 2.0 for one in fields(Rate) if one.name not in kept)
    assert part.unpacked_per_s == {"nf4": 2.0} and part.integers == {"int8": 2.0} and part.plain == 3.0


def test_each_device_computes_its_part() -> None:
    """Cards do not share: with as many more rows as devices, a step's computing takes as long."""
    one = plan(model="demo", gpu="A100 80GB", **{"train.batch_size": 4, "train.micro_batch": 4})
    several = plan(
        model="demo", gpu="A100 80GB", devices=8, nodes=2, **{"train.batch_size": 64, "train.micro_batch": 4}
    )
    spread = several.spread
    parts = [dict(found.phases["train"].parts, gradients=0) for found in (one, several)]
    assert parts[0] == parts[1]  # but for those of an earlier micro-batch
    a_step = 4 * 1024 / one.tokens_per_s
    assert spread.compute_s == pytest.approx(a_step, rel=0.01)
    assert [over.link for over in spread.over] == list(NETWORKS)
    assert [over.tokens_per_s for over in spread.over] == sorted(over.tokens_per_s for over in spread.over)
    first = spread.over[0]
    assert several.tokens_per_s == first.tokens_per_s
    assert first.tokens_per_s == pytest.approx(64 * 1024 / (spread.compute_s + first.seconds))
    assert spread.sent_bytes == pytest.approx(2 * 15 / 16 * 4 * several.setting.adapter_weights, rel=1e-3)
    told = several.as_json()["devices"]
    assert (told["count"], told["nodes"], told["mode"]) == (16, 2, "replicated")
    assert one.as_json()["devices"] == {"count": 1, "nodes": 1, "mode": "one"}


def test_links_are_those_between_the_devices() -> None:
    inside = plan(model="demo", gpu="A100 80GB", devices=2).spread
    assert [over.link for over in inside.over] == list(INSIDE)
    on_cpu = plan(model="demo", memory=16 << 30, devices=2, **{"model.device": "cpu"}).spread
    assert [over.link for over in on_cpu.over] == [LOOPBACK]
    far = plan(model="demo", memory=16 << 30, devices=1, nodes=2, **{"model.device": "cpu"}).spread
    assert all(over.link.bytes_per_s <= LOOPBACK.bytes_per_s for over in far.over)


def test_more_devices_than_rows_gain_nothing() -> None:
    asked = {"train.batch_size": 4, "train.micro_batch": 1}
    four = plan(model="demo", gpu="A100 80GB", devices=4, **asked).spread
    eight = plan(model="demo", gpu="A100 80GB", devices=8, **asked).spread
    assert eight.compute_s == four.compute_s
    assert any("4 of them have nothing to do" in note for note in eight.notes)
    assert not any("nothing to do" in note for note in four.notes)


def test_memory_is_shared_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What fits once does not fit twice: exit 1, and the reason is said."""
    words = ["plan", "--model", "demo", "--memory", "2GB", "--device", "cpu", "--train.micro_batch", "8"]
    words += ["--model.quantization", "none", "--train.optimizer", "adamw", "--train.gradient_checkpointing", "off"]
    words += ["--data.max_length", "256", "--model.placement", "replicated"]
    code, out, _ = run(*words, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["fits"]
    code, out, said = run(*words, "--devices", "2", "--json", capsys=capsys)
    told = json.loads(out)
    assert code == 1 and not told["fits"]
    assert "2 copies of the base" in said.replace("\n", " ")
    assert told["devices"]["count"] == 2


def test_compare_is_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run("plan", "--compare", "--devices", "2", capsys=capsys)
    assert code == 2 and "--compare" in said


def test_answers_are_drawn_on_one_device() -> None:
    """Nothing is planned that training refuses."""
    asked = {"train.objective": "grpo", "train.rewards": "length.py:length"}
    assert plan(model="demo", gpu="A100 80GB", **asked).fits
    with pytest.raises(RecipeError, match="samples completions on one device, and 6"):
        plan(model="demo", gpu="A100 80GB", devices=2, nodes=3, **asked)


def test_the_same_bits_cost_their_sending() -> None:
    """Eight micro-batches on two devices make a node each, which goes to everyone whole; on three six do."""
    assert SLOTS == oom.SLOTS
    asked = {"train.batch_size": 8, "train.micro_batch": 8, "model.device": "cpu"}
    plain, two, three = (
        plan(model="demo", memory=32 << 30, devices=count, **asked, **{"train.exact": exact}).spread
        for count, exact in ((2, False), (2, True), (3, True))
    )
    assert two.sent_bytes == pytest.approx(2 * plain.sent_bytes, rel=1e-4)
    assert three.sent_bytes == pytest.approx(6 * plain.sent_bytes, rel=1e-4)
    assert three.over[0].seconds > two.over[0].seconds > plain.over[0].seconds


def test_the_base_is_sharded_where_it_does_not_fit_whole(tmp_path: Path) -> None:
    """An 8B model in 16 bit on cards of 16 GiB: not on one, not on two that hold it whole each, but on two that share
    it; where it fits whole, or what is asked for needs it whole, it is."""
    model = tmp_path / "config.json"
    model.write_text(json.dumps(KNOWN["Llama-3.1-8B"]), encoding="utf-8")
    asked = {"model": str(model), "gpu": "RTX 4080", "model.quantization": "none", "data.max_length": 512}
    one, two, four = (plan(**asked, devices=count) for count in (1, 2, 4))
    assert not one.fits and two.fits and two.spread.mode == "sharded"
    choice = two.resolved.choices["model.placement"]
    assert (choice.value, choice.origin) == ("sharded", "plan") and "would not fit whole" in choice.why
    assert not plan(**asked, devices=2, **{"model.placement": "replicated"}).fits
    weights = [found.phases["train"].parts["weights"] for found in (one, two, four)]
    assert weights == [pytest.approx(weights[0] / count, abs=4) for count in (1, 2, 4)]
    assert one.resolved.choices["model.placement"].value == "auto"
    nf4 = plan(**{**asked, "model.quantization": "nf4"}, devices=2)
    assert nf4.fits and nf4.spread.mode == "replicated" and nf4.setting.shards == 1
    packed = plan(**{**asked, "model.quantization": "nf4"}, devices=2, **{"model.placement": "sharded"})
    assert packed.setting.resident_layers == 0 and packed.spread.mode == "sharded"
    assert packed.spread.sent_bytes < 0.4 * two.spread.sent_bytes
    needed = plan(**asked, devices=2, **{"lora.use_dora": True})
    assert not needed.fits and needed.spread.mode == "replicated"
    with pytest.raises(RecipeError, match=r"not with lora\.use_dora"):
        plan(**asked, devices=2, **{"lora.use_dora": True, "model.placement": "sharded"})


def test_what_is_gathered_is_counted() -> None:
    """By hand, for a model of two layers: embedding, both layers, head, and the first layer again."""
    setting = Setting(replace(ModelShape.from_config(KNOWN["Llama-3.1-8B"]), layers=2, tied=True), 10_000, shards=2)
    setting = replace(setting, shape=replace(setting.shape, vocabulary=10, hidden=100))
    layer = (2 * 10_000 - 2 * 1000) // 2
    assert base_layer_bytes(setting) == layer
    assert pass_bytes(setting) == 2 * 1000 + layer + layer + 2 * 1000 + layer
    link = Link("test", 1e6, 0.001)
    assert pass_seconds(setting, Devices(2), link) == pytest.approx(5 * 0.001 + pass_bytes(setting) / 2 / 1e6)
