"""Training on several devices: bytes sent per step, seconds of communication on each link, tokens/s.

A step sums flags (four bytes per device, twice, with gloo) and then one fp32 buffer of all gradients with the loss
(with gloo between CPU processes, NCCL between GPUs). LoRA gradients are a few megabytes, so communication does not
overlap with computation. With `train.exact`, the buffers of the ranks' micro-batches are broadcast one after the other
and summed in a fixed order.

Each layer of a sharded base is gathered before it is computed, forward and backward, once per micro-batch: much more
than the gradients. The next layer is gathered while one computes, so only the time beyond the computation counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from strop.config.schema import Recipe
from strop.distributed.assign import assign_contiguous, nodes_to_send
from strop.errors import RecipeError
from strop.objectives.table import sequences_per_row
from strop.planning.machines import Target
from strop.planning.memory import base_layer_bytes
from strop.planning.microbatch import usual_micro_batch
from strop.planning.time import Rate, step_seconds
from strop.planning.workload import Workload


@dataclass(frozen=True)
class Link:
    """A connection between devices.

    Args:
        name: shown to the user.
        bytes_per_s: data rate in one direction, from the data sheet.
        hop_s: seconds of a small message to the next device.
        start_s: seconds to start an operation.
        inside_s: for a network, seconds of a small message within a node; 0: as `hop_s`.
    """

    name: str
    bytes_per_s: float
    hop_s: float
    start_s: float = 0.0
    inside_s: float = 0.0


# Hop and start times of NCCL's ring with the simple protocol, as in NCCL's own estimate (src/graph/tuning.cc: 8.4 us to
# start; per hop NVLink 3.4 us, PCI 5.7 us, network 14 us). Rates: PCIe 4.0 x16 by PCI-SIG (16 GT/s per lane,
# 128b/130b), NVLink 3 by NVIDIA's A100 data sheet (600 GB/s in both directions), networks by their names.
NVLINK = Link("NVLink 3", 300e9, 3.4e-6, 8.4e-6)
INSIDE = (Link("PCIe 4.0 x16", 31.5e9, 5.7e-6, 8.4e-6), NVLINK)
NETWORKS = tuple(Link(f"{gb} Gb/s", gb * 1e9 / 8, 14e-6, 8.4e-6, NVLINK.hop_s) for gb in (10, 25, 100, 400))
# gloo between processes of one machine: `benchmarks/scale.py links`, on two busy cores (docs/scale.md).
LOOPBACK = Link("gloo, one machine", 0.5e9, 120e-6)


FLAG_SUMS, FLAG_BYTES = 2, 4  # sums of flags per step, before and after its computation; bytes per device
SLOTS = 8  # minimum number of micro-batches in a step with train.exact (training.oom)


@dataclass(frozen=True)
class Devices:
    """Number of devices per node, and of nodes.

    Raises:
        RecipeError: a number is below 1.
    """

    each: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        if min(self.each, self.nodes) < 1:
            raise RecipeError(f"--devices {self.each} --nodes {self.nodes}: the least is 1", fix="give 1 or more")

    @property
    def count(self) -> int:
        return self.each * self.nodes


@dataclass(frozen=True)
class LinkTime:
    """Communication seconds of a step over one link, and tokens/s of all devices with it."""

    link: Link
    seconds: float
    tokens_per_s: float

    def as_json(self) -> dict[str, Any]:
        link = {"link": self.link.name, "bytes_per_s": self.link.bytes_per_s}
        return {**link, "communication_s": self.seconds, "tokens_per_s": self.tokens_per_s}


@dataclass(frozen=True)
class MultiDevicePlan:
    """A run on several devices.

    Args:
        devices: number of devices and nodes.
        sent_bytes: bytes that each device sends per step.
        compute_s: seconds of computation per step, on the device with most rows.
        link_times: one entry per possible link, the slowest first.
        notes: sentences for the user.
        mode: replicated or sharded.
    """

    devices: Devices
    sent_bytes: int
    compute_s: float
    link_times: tuple[LinkTime, ...]
    notes: tuple[str, ...]
    mode: str = "replicated"

    def as_json(self) -> dict[str, Any]:
        count, nodes = self.devices.count, self.devices.nodes
        if count == 1:
            return {"count": 1, "nodes": 1, "mode": "one"}
        return {
            "count": count, "nodes": nodes, "mode": self.mode, "sent_bytes": self.sent_bytes,
            "compute_s": self.compute_s, "links": [time.as_json() for time in self.link_times],
            "notes": list(self.notes),
        }  # fmt: skip


def target_share(target: Target, devices: Devices, *, local: bool) -> Target:
    """Return what one of several devices has of a target.

    Processes on a CPU share its cores, memory and bandwidth; each GPU is its own device. local: the target is this
    machine.

    Raises:
        RecipeError: this machine has fewer devices.
    """
    if devices.count == 1:
        return target
    kind, machine = target.device.partition(":")[0], target.machine
    if kind == "mps":
        raise RecipeError("--devices: an Apple GPU is one device", fix="leave --devices and --nodes out")
    if kind == "cuda":
        if local and len(machine.gpus) < devices.each:
            gpus = f"{len(machine.gpus)} GPU{'s' * (len(machine.gpus) != 1)}"
            what = f"--devices {devices.each}: this machine has {gpus}"
            raise RecipeError(what, fix="give fewer, or --gpu NAME to plan for others")
        return target
    if local and devices.each > machine.cores:
        cores = f"{machine.cores} core{'s' * (machine.cores != 1)}"
        what = f"--devices {devices.each}: this machine has {cores}, and each device needs one"
        raise RecipeError(what, fix=f"give --devices {machine.cores} or fewer")
    number = devices.each
    part = replace(
        machine,
        cores=max(1, machine.cores // number),
        memory_bytes=machine.memory_bytes // number,
        free_bytes=machine.free_bytes // number,
    )
    return replace(target, machine=part, rate_of=lambda dtype: _rate_share(target.rate_of(dtype), number))


def _rate_share(rate: Rate, number: int) -> Rate:
    return replace(
        rate,
        flops=rate.flops / number,
        bandwidth=rate.bandwidth / number,
        head_flops=rate.head_flops / number,
        attention_flops=rate.attention_flops / number,
        thin_flops=rate.thin_flops / number,
        moved=rate.moved / number,
        frozen_flops=rate.frozen_flops / number,
        integers={scheme: flops / number for scheme, flops in rate.integers.items()},
        unpacked_per_s={scheme: weights / number for scheme, weights in rate.unpacked_per_s.items()},
    )


def plan_devices(
    recipe: Recipe, workload: Workload, rate: Rate, devices: Devices, rows: Sequence[tuple[int, int]] = ()
) -> MultiDevicePlan:
    """Predict the communication and speed of a run on several devices.

    A step takes as long as its busiest device, which has the batch's rows divided by the devices, rounded up. That is
    for rows of one length; rows of different lengths are assigned by their tokens.

    Args:
        recipe: the run.
        workload: its workload.
        rate: speed of one device.
        devices: number of devices and nodes.
        rows: (tokens, supervised tokens) of each answer, if they are known.
    """
    train, answers = recipe.train, sequences_per_row(recipe.train)
    most = -(-train.batch_size // devices.count)  # rows of the busiest device
    if exact := train.exact and devices.count > 1:
        most = min(most, -(-train.batch_size // SLOTS))
    device_recipe = recipe.model_copy(update={"train": train.model_copy(update=_limited_batch(recipe, most))})
    usual = usual_micro_batch(device_recipe, rows)
    at_once = usual.number
    micro_batches = -(-train.batch_size * answers // at_once)  # of a step, on all devices
    if exact:
        most = min(train.batch_size, -(-micro_batches // devices.count) * at_once // answers)
    compute = step_seconds(workload, usual, most * answers / at_once, rate)
    tokens = (usual.tokens + usual.shared) / at_once * train.batch_size * answers
    size, buffers = gradient_bytes(workload, devices), _exact_buffers(micro_batches, devices) if exact else 0
    sent = buffers * size if buffers else ring_bytes(size, devices.count)
    sent += FLAG_SUMS * ring_bytes(FLAG_BYTES * devices.count, devices.count)
    passes = -(-most * answers // at_once) if workload.base.shards > 1 else 0
    sent += passes * gather_bytes(workload) * (devices.count - 1) // devices.count
    times = []
    for link in _links(workload, devices):
        seconds = flags_seconds(devices, link)
        seconds += max(0.0, passes * gather_seconds(workload, devices, link) - compute)
        if buffers:
            seconds += buffers * broadcast_seconds(size, devices, link, workload.compute.device)
        else:
            seconds += sum_seconds(size, devices, link, workload.compute.device)
        times.append(LinkTime(link, seconds, tokens / (compute + seconds)))
    mode = "sharded" if workload.base.shards > 1 else "replicated"
    return MultiDevicePlan(devices, sent, compute, tuple(times), _notes(recipe, workload, devices), mode)


def _limited_batch(recipe: Recipe, rows: int) -> dict[str, Any]:
    """Return a batch size of this many rows, and a micro-batch that is not larger."""
    micro_batch = recipe.train.micro_batch
    return {"batch_size": rows, "micro_batch": min(micro_batch, rows) if micro_batch is not None else None}


def gradient_bytes(workload: Workload, devices: Devices) -> int:
    """Return bytes of the gradient buffer: fp32 gradients, the loss, and two values per device."""
    return 4 * (workload.adapter_weights + 1 + 2 * devices.count)


def ring_bytes(size: int, count: int) -> int:
    """Return bytes that each of `count` devices sends to sum `size` bytes in a ring: 2 (n - 1) / n of them.

    Half is for summing the parts, half for distributing the sums (Patarasu and Yuan, "Bandwidth optimal all-reduce
    algorithms", JPDC 69(2), 2009).
    """
    return round(2 * (count - 1) / count * size)


def ring_seconds(size: int, devices: Devices, link: Link) -> float:
    """Return the seconds of a ring all-reduce: 2 (n - 1) sequential steps, each a hop and an n-th of the bytes.

    With several nodes, the ring crosses the network 2 (nodes - 1) times on its longest path, with every part of the
    bytes.
    """
    steps = 2 * (devices.count - 1)
    across = 2 * (devices.nodes - 1)
    hops = across * link.hop_s + (steps - across) * (link.inside_s or link.hop_s)
    return link.start_s + hops + ring_bytes(size, devices.count) / link.bytes_per_s


def tree_seconds(size: int, devices: Devices, link: Link) -> float:
    """Return the seconds of NCCL's double binary tree: fewer hops than a ring, and twice the bytes over a link.

    Sanders, Speck and Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel
    Computing 35(12), 2009.
    """
    inside = 2 * (devices.each - 1) * (link.inside_s or link.hop_s)
    across = 2 * math.ceil(math.log2(devices.nodes)) * link.hop_s
    return link.start_s + inside + across + 2 * size / link.bytes_per_s


def sum_seconds(size: int, devices: Devices, link: Link, device: str) -> float:
    """Return the seconds to sum the gradients: in a ring with gloo, the faster of ring and tree with NCCL."""
    ring = ring_seconds(size, devices, link)
    return ring if device == "cpu" else min(ring, tree_seconds(size, devices, link))


def broadcast_seconds(size: int, devices: Devices, link: Link, device: str) -> float:
    """Return the seconds of a broadcast: a binomial tree of log2 n rounds with gloo (gloo/broadcast.cc), a pipeline
    from device to device with NCCL."""
    rounds = math.ceil(math.log2(devices.count))
    if device == "cpu":
        return rounds * (link.hop_s + size / link.bytes_per_s)
    return link.start_s + (devices.count - 1) * link.hop_s + size / link.bytes_per_s


def gather_bytes(workload: Workload) -> int:
    """Return bytes gathered for one micro-batch: embedding, layers, head, and again all layers but the last."""
    ends = 2 * workload.compute.dtype_bytes * workload.shape.embedding
    return ends + base_layer_bytes(workload) * (2 * workload.shape.layers - 1)


def gather_seconds(workload: Workload, devices: Devices, link: Link) -> float:
    """Return the seconds to gather one micro-batch's weights, each in a ring of n - 1 steps with (n - 1) / n of the
    bytes."""
    number = 2 * workload.shape.layers + 1
    hops = number * (link.start_s + (devices.count - 1) * (link.inside_s or link.hop_s))
    return hops + gather_bytes(workload) * (devices.count - 1) / devices.count / link.bytes_per_s


def _exact_buffers(micro_batches: int, devices: Devices) -> int:
    """Return the number of buffers broadcast in a step with `train.exact`: each rank's partial sums."""
    return sum(
        len(nodes_to_send(micro_batches, own)) for own in assign_contiguous([1.0] * micro_batches, devices.count)
    )


def flags_seconds(devices: Devices, link: Link) -> float:
    """Return the seconds to sum the flags, in gloo's ring over TCP, also between GPUs."""
    hop = max(link.hop_s, LOOPBACK.hop_s)
    return FLAG_SUMS * 2 * (devices.count - 1) * hop


def _links(workload: Workload, devices: Devices) -> list[Link]:
    if devices.count == 1:
        return []
    if workload.compute.device != "cpu":
        return list(INSIDE if devices.nodes == 1 else NETWORKS)
    if devices.nodes == 1:
        return [LOOPBACK]
    rate, hop = LOOPBACK.bytes_per_s, LOOPBACK.hop_s  # gloo's own work per byte and message bounds every network
    return [Link(link.name, min(link.bytes_per_s, rate), max(link.hop_s, hop), inside_s=hop) for link in NETWORKS]


def _notes(recipe: Recipe, workload: Workload, devices: Devices) -> tuple[str, ...]:
    if devices.count == 1:
        return ()
    notes = ["every device has the whole base"]
    if workload.base.shards > 1:
        gathered = gather_bytes(workload) / 1e6
        notes = [
            f"every device has 1/{workload.base.shards} of the base; {gathered:,.0f} MB of it are gathered for each "
            "micro-batch: larger micro-batches, if they fit, are faster"
        ]
    elif workload.compute.device == "cpu":
        notes = [
            f"the processes share one machine's cores and memory: {devices.each} copies of the base on each node, and "
            "no more cores than one process would have"
        ]
    rows = recipe.train.batch_size
    if rows < devices.count:
        notes.append(f"{rows} rows per step for {devices.count} devices: {devices.count - rows} devices are idle")
    return tuple(notes)
