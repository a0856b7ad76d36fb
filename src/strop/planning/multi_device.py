"""Several devices: what is sent each step, how long that takes on which link, tokens/s.

A step sends flags around, twice four bytes a device (over gloo), and the gradients in fp32 with the loss behind them as
one sum (over gloo between CPU processes, over NCCL between cards). LoRA's gradients are a few
megabytes, so nothing is hidden behind the computing. With `train.exact` the buffers of the ranks' micro-batches are
handed to everyone, one after the other, and added up in an order of their own.

Of a sharded base each layer is gathered in front of its computing, forward and backward, once a micro-batch: much more
than the gradients. The next layer comes while one computes, so that only what takes longer than the computing counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from strop.config.schema import Recipe
from strop.distributed.assign import in_a_row
from strop.distributed.deterministic_sum import nodes_of
from strop.errors import RecipeError
from strop.objectives.table import answers_of
from strop.planning.memory import base_layer_bytes
from strop.planning.microbatch import usual_micro_batch
from strop.planning.model_facts import Place
from strop.planning.time import Rate, step_seconds
from strop.planning.workload import Setting


@dataclass(frozen=True)
class Link:
    """bytes_per_s: one way, of the data sheet. hop_s: of a small message from one device to the next; inside_s: to the
    next in the same node, where the link is a network."""

    name: str
    bytes_per_s: float
    hop_s: float
    start_s: float = 0.0
    inside_s: float = 0.0


# Hops and start of NCCL's ring with its simple protocol, as NCCL itself estimates them (src/graph/tuning.cc: 8.4 us to
# begin; NVLink 3.4, PCI 5.7, network 14 us a hop). Rates are the links' own: PCIe 4.0 x16 by PCI-SIG (16 GT/s a lane,
# 128b/130b), NVLink 3 by NVIDIA's A100 data sheet (600 GB/s both ways), networks by their names.
NVLINK = Link("NVLink 3", 300e9, 3.4e-6, 8.4e-6)
INSIDE = (Link("PCIe 4.0 x16", 31.5e9, 5.7e-6, 8.4e-6), NVLINK)
NETWORKS = tuple(Link(f"{gb} Gb/s", gb * 1e9 / 8, 14e-6, 8.4e-6, NVLINK.hop_s) for gb in (10, 25, 100, 400))
# gloo between processes of one machine: `benchmarks/scale.py links`, on two cores that had other work (docs/scale.md).
LOOPBACK = Link("gloo, one machine", 0.5e9, 120e-6)


FLAG_SUMS, FLAG_BYTES = 2, 4  # of a step: before it and after its computing; a device's (devices.joined)
SLOTS = 8  # micro-batches that a step with train.exact has at least (training.shrink)


@dataclass(frozen=True)
class Devices:
    """each: devices of a node."""

    each: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        if min(self.each, self.nodes) < 1:
            raise RecipeError(f"{self.each} devices of {self.nodes} machines: each is at least 1", fix="give 1 or more")

    @property
    def count(self) -> int:
        return self.each * self.nodes


@dataclass(frozen=True)
class Over:
    """A step's communication over a link: its seconds, and tokens/s of all devices with it."""

    link: Link
    seconds: float
    tokens_per_s: float

    def as_json(self) -> dict[str, Any]:
        link = self.link
        named = {"link": link.name, "bytes_per_s": link.bytes_per_s}
        return {**named, "communication_s": self.seconds, "tokens_per_s": self.tokens_per_s}


@dataclass(frozen=True)
class Spread:
    """A run on several devices. sent_bytes: by a device, each step. compute_s: of a step, on the device with most rows.
    over: the slowest link first. mode: replicated or sharded."""

    devices: Devices
    sent_bytes: int
    compute_s: float
    over: tuple[Over, ...]
    notes: tuple[str, ...]
    mode: str = "replicated"

    def as_json(self) -> dict[str, Any]:
        count, nodes = self.devices.count, self.devices.nodes
        if count == 1:
            return {"count": 1, "nodes": 1, "mode": "one"}
        return {
            "count": count, "nodes": nodes, "mode": self.mode, "sent_bytes": self.sent_bytes,
            "compute_s": self.compute_s, "links": [one.as_json() for one in self.over], "notes": list(self.notes),
        }  # fmt: skip


def share(place: Place, devices: Devices, *, here: bool) -> Place:
    """What one device of several has of a place: of a CPU its part of cores, memory and rates; a card is its own.

    here: the place is this machine, as it is. Raises RecipeError for devices that there are not.
    """
    if devices.count == 1:
        return place
    kind, machine = place.device.partition(":")[0], place.machine
    if kind == "mps":
        raise RecipeError("--devices: an Apple GPU is one device", fix="leave --devices and --nodes out")
    if kind == "cuda":
        if here and len(machine.gpus) < devices.each:
            there = f"{len(machine.gpus)} card{'s' * (len(machine.gpus) != 1)} here"
            raise RecipeError(f"--devices {devices.each}: {there}", fix="give fewer, or --gpu NAME to plan for others")
        return place
    if here and devices.each > machine.cores:
        there = f"{machine.cores} core{'s' * (machine.cores != 1)} here, and a device is a process with its own"
        raise RecipeError(f"--devices {devices.each}: {there}", fix=f"give --devices {machine.cores} or fewer")
    number = devices.each
    part = replace(
        machine,
        cores=max(1, machine.cores // number),
        memory_bytes=machine.memory_bytes // number,
        free_bytes=machine.free_bytes // number,
    )
    return replace(place, machine=part, rate_of=lambda dtype: _part(place.rate_of(dtype), number))


def _part(rate: Rate, number: int) -> Rate:
    """The processes of one CPU share its cores and its memory's bandwidth."""
    return replace(
        rate,
        flops=rate.flops / number,
        bandwidth=rate.bandwidth / number,
        head_flops=rate.head_flops / number,
        attention_flops=rate.attention_flops / number,
        thin_flops=rate.thin_flops / number,
        moved=rate.moved / number,
        frozen_flops=rate.frozen_flops / number,
        integers={scheme: found / number for scheme, found in rate.integers.items()},
        unpacked_per_s={scheme: found / number for scheme, found in rate.unpacked_per_s.items()},
    )


def spread(
    recipe: Recipe, setting: Setting, rate: Rate, devices: Devices, rows: Sequence[tuple[int, int]] = ()
) -> Spread:
    """rate: of one device. rows: tokens and supervised tokens of each answer, where they are known.

    A step is as long as its busiest device takes, which has the batch's rows over the devices, rounded up (of rows of
    one length; ragged ones are dealt out by their tokens).
    """
    train, answers = recipe.train, answers_of(recipe.train)
    most = -(-train.batch_size // devices.count)
    if exact := train.exact and devices.count > 1:
        most = min(most, -(-train.batch_size // SLOTS))
    one = recipe.model_copy(update={"train": train.model_copy(update=_no_larger(recipe, most))})
    usual = usual_micro_batch(one, rows)
    at_once = usual.number
    parts = -(-train.batch_size * answers // at_once)  # micro-batches of the step, on whichever device
    if exact:
        most = min(train.batch_size, -(-parts // devices.count) * at_once // answers)
    compute = step_seconds(setting, usual, most * answers / at_once, rate)
    tokens = (usual.tokens + usual.shared) / at_once * train.batch_size * answers
    size, buffers = gradient_bytes(setting, devices), _buffers(parts, devices) if exact else 0
    around = buffers * size if buffers else ring_bytes(size, devices.count)
    around += FLAG_SUMS * ring_bytes(FLAG_BYTES * devices.count, devices.count)
    passes = -(-most * answers // at_once) if setting.shards > 1 else 0
    around += passes * pass_bytes(setting) * (devices.count - 1) // devices.count
    over = []
    for link in _links(setting, devices):
        seconds = flags_seconds(devices, link)
        seconds += max(0.0, passes * pass_seconds(setting, devices, link) - compute)
        if buffers:
            seconds += buffers * broadcast_seconds(size, devices, link, setting.device)
        else:
            seconds += sum_seconds(size, devices, link, setting.device)
        over.append(Over(link, seconds, tokens / (compute + seconds)))
    mode = "sharded" if setting.shards > 1 else "replicated"
    return Spread(devices, around, compute, tuple(over), _notes(recipe, setting, devices), mode)


def _no_larger(recipe: Recipe, rows: int) -> dict[str, Any]:
    """A batch of so many rows, and a micro-batch that is not larger."""
    asked = recipe.train.micro_batch
    return {"batch_size": rows, "micro_batch": min(asked, rows) if asked is not None else None}


def gradient_bytes(setting: Setting, devices: Devices) -> int:
    """The one buffer: fp32 gradients of every trainable weight, the loss, and two numbers of each device."""
    return 4 * (setting.adapter_weights + 1 + 2 * devices.count)


def ring_bytes(size: int, count: int) -> int:
    """Sent by each of `count` devices that sum `size` bytes in a ring: 2 (n - 1) / n of them, half to sum the parts,
    half to hand the sums around (Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms", JPDC 69(2), 2009)."""
    return round(2 * (count - 1) / count * size)


def ring_seconds(size: int, devices: Devices, link: Link) -> float:
    """2 (n - 1) steps one after the other, each a hop and an n-th of the bytes. Of several nodes the ring crosses the
    network 2 (nodes - 1) times on its longest way, and every part of the bytes crosses it."""
    steps = 2 * (devices.count - 1)
    across = 2 * (devices.nodes - 1)
    hops = across * link.hop_s + (steps - across) * (link.inside_s or link.hop_s)
    return link.start_s + hops + ring_bytes(size, devices.count) / link.bytes_per_s


def tree_seconds(size: int, devices: Devices, link: Link) -> float:
    """NCCL's double binary tree: fewer hops, up and down, and twice the bytes over a link (Sanders, Speck and Traeff,
    "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel Computing 35(12), 2009)."""
    inside = 2 * (devices.each - 1) * (link.inside_s or link.hop_s)
    across = 2 * math.ceil(math.log2(devices.nodes)) * link.hop_s
    return link.start_s + inside + across + 2 * size / link.bytes_per_s


def sum_seconds(size: int, devices: Devices, link: Link, device: str) -> float:
    """Of the gradients. gloo sums in a ring; NCCL takes the faster of both ways."""
    ring = ring_seconds(size, devices, link)
    return ring if device == "cpu" else min(ring, tree_seconds(size, devices, link))


def broadcast_seconds(size: int, devices: Devices, link: Link, device: str) -> float:
    """From one to all. gloo: by a binomial tree, so that the last has it after log2 n sendings (gloo/broadcast.cc);
    NCCL: from one to the next in pieces, all at work at once."""
    rounds = math.ceil(math.log2(devices.count))
    if device == "cpu":
        return rounds * (link.hop_s + size / link.bytes_per_s)
    return link.start_s + (devices.count - 1) * link.hop_s + size / link.bytes_per_s


def pass_bytes(setting: Setting) -> int:
    """Gathered for one micro-batch: the embedding, each layer, the head, and each layer but the last again."""
    ends = 2 * setting.element * setting.shape.embedding
    return ends + base_layer_bytes(setting) * (2 * setting.shape.layers - 1)


def pass_seconds(setting: Setting, devices: Devices, link: Link) -> float:
    """In a ring each device hands on (n - 1) / n of the bytes, in n - 1 steps a gathering."""
    number = 2 * setting.shape.layers + 1
    hops = number * (link.start_s + (devices.count - 1) * (link.inside_s or link.hop_s))
    return hops + pass_bytes(setting) * (devices.count - 1) / devices.count / link.bytes_per_s


def _buffers(parts: int, devices: Devices) -> int:
    """Handed around in a step with `train.exact`: what each rank has added up of its neighbouring micro-batches."""
    return sum(len(nodes_of(parts, own)) for own in in_a_row([1.0] * parts, devices.count))


def flags_seconds(devices: Devices, link: Link) -> float:
    """gloo's ring, over TCP even between cards."""
    hop = max(link.hop_s, LOOPBACK.hop_s)
    return FLAG_SUMS * 2 * (devices.count - 1) * hop


def _links(setting: Setting, devices: Devices) -> list[Link]:
    if devices.count == 1:
        return []
    if setting.device != "cpu":
        return list(INSIDE if devices.nodes == 1 else NETWORKS)
    if devices.nodes == 1:
        return [LOOPBACK]
    rate, hop = LOOPBACK.bytes_per_s, LOOPBACK.hop_s  # gloo's own work a byte and a message; no network makes it less
    return [Link(link.name, min(link.bytes_per_s, rate), max(link.hop_s, hop), inside_s=hop) for link in NETWORKS]


def _notes(recipe: Recipe, setting: Setting, devices: Devices) -> tuple[str, ...]:
    if devices.count == 1:
        return ()
    said = ["every device holds the whole base"]
    if setting.shards > 1:
        gathered = pass_bytes(setting) / 1e6
        said = [
            f"every device holds 1/{setting.shards} of the base; {gathered:,.0f} MB of it are gathered for each "
            "micro-batch: larger micro-batches, if they fit, are faster"
        ]
    elif setting.device == "cpu":
        said = [
            f"the processes share one machine's cores and memory: {devices.each} copies of the base on each node, and "
            "no more cores than one process would have"
        ]
    rows = recipe.train.batch_size
    if rows < devices.count:
        said.append(
            f"{rows} rows a step for {devices.count} devices: {devices.count - rows} of them have nothing to do"
        )
    return tuple(said)
