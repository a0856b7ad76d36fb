"""Predict the communication of training on several devices: bytes sent per step, and seconds on each link.

A step all-reduces status flags twice (with gloo), and one fp32 buffer of all gradients and the loss (with gloo on CPUs
and NCCL on GPUs). With `train.exact`, ranks broadcast the buffers of micro-batches, which are summed in a fixed order.
The layers of a sharded base are gathered for the forward and backward pass of each micro-batch, in parallel with the
computation, so that only the time in excess of the computation counts.
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
from strop.planning.machines import TargetMachine
from strop.planning.memory import PROCESS_BYTES, base_layer_bytes
from strop.planning.microbatch import mean_micro_batch
from strop.planning.time import Rate, step_seconds
from strop.planning.workload import Workload


@dataclass(frozen=True)
class Link:
    name: str
    bytes_per_s: float  # bandwidth in one direction, from the data sheet
    hop_s: float  # seconds of a small message to the next device
    start_s: float = 0.0  # seconds to start an operation
    node_hop_s: float = 0.0  # seconds of a small message within a node (0: as `hop_s`)


# Hop and start times are those of NCCL's ring with the simple protocol (NCCL, src/graph/tuning.cc). Bandwidths are from
# PCI-SIG (16 GT/s per lane, 128b/130b) and from the data sheet of NVIDIA's A100 (600 GB/s in both directions).
NVLINK = Link("NVLink 3", 300e9, 3.4e-6, 8.4e-6)
NODE_LINKS = (Link("PCIe 4.0 x16", 31.5e9, 5.7e-6, 8.4e-6), NVLINK)
NETWORKS = tuple(Link(f"{gb} Gb/s", gb * 1e9 / 8, 14e-6, 8.4e-6, NVLINK.hop_s) for gb in (10, 25, 100, 400))
# gloo between processes of one machine: `benchmarks/scale.py links`, on two busy cores (docs/measured.md).
LOOPBACK = Link("gloo, one machine", 0.5e9, 120e-6)

# Fields of Rate that are divided by the number of processes on a CPU
SHARED_RATES = ("flops", "bandwidth", "head_flops", "attention_flops", "thin_flops", "moved", "frozen_flops")
FLAG_SUMS, FLAG_BYTES = 2, 4  # all-reduces of flags per step, and bytes per device
MIN_MICRO_BATCHES = 8  # minimum number of micro-batches per step with train.exact; further devices are idle


@dataclass(frozen=True)
class Devices:
    per_node: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        if min(self.per_node, self.nodes) < 1:
            what = f"--devices {self.per_node} --nodes {self.nodes}: must be at least 1"
            raise RecipeError(what, fix="give 1 or more")

    @property
    def count(self) -> int:
        return self.per_node * self.nodes


@dataclass(frozen=True)
class LinkTime:
    link: Link
    seconds: float  # of communication per step
    tokens_per_s: float  # of all devices

    def as_json(self) -> dict[str, Any]:
        return {
            "link": self.link.name, "bytes_per_s": self.link.bytes_per_s, "communication_s": self.seconds,
            "tokens_per_s": self.tokens_per_s,
        }  # fmt: skip


@dataclass(frozen=True)
class MultiDevicePlan:
    devices: Devices
    sent_bytes: int  # bytes that each device sends per step
    compute_s: float  # seconds of computation per step, on the busiest device
    link_times: tuple[LinkTime, ...]  # for each possible link, the slowest first
    notes: tuple[str, ...]
    mode: str = "replicated"  # replicated or sharded

    def as_json(self) -> dict[str, Any]:
        count, nodes = self.devices.count, self.devices.nodes
        if count == 1:
            return {"count": 1, "nodes": 1, "mode": "one"}
        return {
            "count": count, "nodes": nodes, "mode": self.mode, "sent_bytes": self.sent_bytes,
            "compute_s": self.compute_s, "links": [time.as_json() for time in self.link_times],
            "notes": list(self.notes),
        }  # fmt: skip


def target_share(target: TargetMachine, devices: Devices, *, local: bool) -> TargetMachine:
    """Return one device's share of the machine. Processes on a CPU share its cores, memory and bandwidth."""
    if devices.count == 1:
        return target
    kind, machine = target.device.partition(":")[0], target.machine
    per_node, gpus, cores = devices.per_node, len(machine.gpus), machine.cores
    if kind == "mps":
        raise RecipeError("--devices: an Apple GPU is one device", fix="leave --devices and --nodes out")
    if kind == "cuda":
        if local and gpus < per_node:
            what = f"--devices {per_node}: this machine has {gpus} GPU{'s' * (gpus != 1)}"
            raise RecipeError(what, fix="give fewer, or --gpu NAME to plan for others")
        return target
    if local and per_node > cores:
        what = f"--devices {per_node}: this machine has {cores} core{'s' * (cores != 1)}, and each device needs one"
        raise RecipeError(what, fix=f"give --devices {cores} or fewer")
    memory, free = machine.memory_bytes // per_node, machine.free_bytes - (per_node - 1) * PROCESS_BYTES
    part = replace(machine, cores=max(1, cores // per_node), memory_bytes=memory, free_bytes=max(0, free // per_node))
    return replace(target, machine=part, rate_of=lambda dtype: _rate_share(target.rate_of(dtype), per_node))


def _rate_share(rate: Rate, processes: int) -> Rate:
    shares: dict[str, Any] = {name: getattr(rate, name) / processes for name in SHARED_RATES}
    for name in ("integers", "unpacked_per_s"):
        shares[name] = {scheme: value / processes for scheme, value in getattr(rate, name).items()}
    return replace(rate, **shares)


def plan_devices(
    recipe: Recipe, workload: Workload, rate: Rate, devices: Devices, rows: Sequence[tuple[int, int]] = ()
) -> MultiDevicePlan:
    """Predict the communication and speed of a run on several devices. rate: of one device."""
    train, sequences = recipe.train, sequences_per_row(recipe.train)
    busiest_rows = -(-train.batch_size // devices.count)  # rows of the busiest device, which determines the time
    if exact := train.exact and devices.count > 1:
        busiest_rows = min(busiest_rows, -(-train.batch_size // MIN_MICRO_BATCHES))
    micro_batch = min(train.micro_batch, busiest_rows) if train.micro_batch is not None else None
    device_train = train.model_copy(update={"batch_size": busiest_rows, "micro_batch": micro_batch})
    batch = mean_micro_batch(recipe.model_copy(update={"train": device_train}), rows)
    micro_batches = -(-train.batch_size * sequences // batch.num_sequences)  # of a step, on all devices
    if exact:
        busiest_rows = min(train.batch_size, -(-micro_batches // devices.count) * batch.num_sequences // sequences)
    compute = step_seconds(workload, batch, busiest_rows * sequences / batch.num_sequences, rate)
    # Tokens of a step. A shared prefix is computed once and counted for each sequence.
    tokens = (batch.tokens + batch.shared) / batch.num_sequences * train.batch_size * sequences
    size = gradient_bytes(workload, devices)
    assigned = assign_contiguous([1.0] * micro_batches, devices.count) if exact else ()
    buffers = sum(len(nodes_to_send(micro_batches, batches)) for batches in assigned)  # broadcasts with train.exact
    sent = buffers * size if buffers else ring_bytes(size, devices.count)
    sent += FLAG_SUMS * ring_bytes(FLAG_BYTES * devices.count, devices.count)
    passes = -(-busiest_rows * sequences // batch.num_sequences) if workload.base.shards > 1 else 0
    sent += passes * gather_bytes(workload) * (devices.count - 1) // devices.count
    times = []
    for link in _list_links(workload, devices):
        seconds = flags_seconds(devices, link)
        seconds += max(0.0, passes * gather_seconds(workload, devices, link) - compute)
        if buffers:
            seconds += buffers * broadcast_seconds(size, devices, link, workload.compute.device)
        else:
            seconds += all_reduce_seconds(size, devices, link, workload.compute.device)
        times.append(LinkTime(link, seconds, tokens / (compute + seconds)))
    mode = "sharded" if workload.base.shards > 1 else "replicated"
    return MultiDevicePlan(devices, sent, compute, tuple(times), _list_notes(recipe, workload, devices), mode)


def gradient_bytes(workload: Workload, devices: Devices) -> int:
    """Return bytes of the buffer that is all-reduced: fp32 gradients, the loss, and two values per device."""
    return 4 * (workload.adapter_weights + 1 + 2 * devices.count)


def ring_bytes(size: int, count: int) -> int:
    """Return bytes that each device sends in a ring all-reduce (Patarasu and Yuan, JPDC 69(2), 2009)."""
    return round(2 * (count - 1) / count * size)


def ring_seconds(size: int, devices: Devices, link: Link) -> float:
    """Return the seconds of a ring all-reduce: for n devices 2 (n - 1) steps, each with 1/n of the bytes."""
    steps = 2 * (devices.count - 1)
    across = 2 * (devices.nodes - 1)
    hops = across * link.hop_s + (steps - across) * (link.node_hop_s or link.hop_s)
    return link.start_s + hops + ring_bytes(size, devices.count) / link.bytes_per_s


def tree_seconds(size: int, devices: Devices, link: Link) -> float:
    """Return the seconds of an all-reduce in NCCL's double binary tree (Sanders, Speck and Traeff, 2009)."""
    inside = 2 * (devices.per_node - 1) * (link.node_hop_s or link.hop_s)
    across = 2 * math.ceil(math.log2(devices.nodes)) * link.hop_s
    return link.start_s + inside + across + 2 * size / link.bytes_per_s


def all_reduce_seconds(size: int, devices: Devices, link: Link, device: str) -> float:
    """Return the seconds of an all-reduce. Gloo uses a ring, NCCL a ring or a tree."""
    ring = ring_seconds(size, devices, link)
    return ring if device == "cpu" else min(ring, tree_seconds(size, devices, link))


def broadcast_seconds(size: int, devices: Devices, link: Link, device: str) -> float:
    """Return the seconds of a broadcast. Gloo uses a binary tree (its broadcast.cc), NCCL a pipeline."""
    rounds = math.ceil(math.log2(devices.count))
    if device == "cpu":
        return rounds * (link.hop_s + size / link.bytes_per_s)
    return link.start_s + (devices.count - 1) * link.hop_s + size / link.bytes_per_s


def gather_bytes(workload: Workload) -> int:
    """Return bytes gathered for a micro-batch: embedding, layers and head, and for the backward pass the layers."""
    ends = 2 * workload.compute.dtype_bytes * workload.shape.embedding_weights
    return ends + base_layer_bytes(workload) * (2 * workload.shape.layers - 1)


def gather_seconds(workload: Workload, devices: Devices, link: Link) -> float:
    number = 2 * workload.shape.layers + 1
    hops = number * (link.start_s + (devices.count - 1) * (link.node_hop_s or link.hop_s))
    return hops + gather_bytes(workload) * (devices.count - 1) / devices.count / link.bytes_per_s


def flags_seconds(devices: Devices, link: Link) -> float:
    """Return the seconds to all-reduce the flags, which uses gloo's ring over TCP also between GPUs."""
    hop = max(link.hop_s, LOOPBACK.hop_s)
    return FLAG_SUMS * 2 * (devices.count - 1) * hop


def _list_links(workload: Workload, devices: Devices) -> list[Link]:
    if devices.count == 1:
        return []
    if workload.compute.device != "cpu":
        return list(NODE_LINKS if devices.nodes == 1 else NETWORKS)
    if devices.nodes == 1:
        return [LOOPBACK]
    rate, hop = LOOPBACK.bytes_per_s, LOOPBACK.hop_s  # limits of gloo on any network
    return [Link(link.name, min(link.bytes_per_s, rate), max(link.hop_s, hop), node_hop_s=hop) for link in NETWORKS]


def _list_notes(recipe: Recipe, workload: Workload, devices: Devices) -> tuple[str, ...]:
    if devices.count == 1:
        return ()
    note = "every device has the whole base"
    if workload.base.shards > 1:
        note = (
            f"every device has 1/{workload.base.shards} of the base; {gather_bytes(workload) / 2**20:,.0f} MiB of it "
        )
        note += "are gathered for each micro-batch: larger micro-batches, if they fit, are faster"
    elif workload.compute.device == "cpu":
        note = f"the processes share one machine's cores and memory: {devices.per_node} copies of the base on each "
        note += "node, and no more cores than one process would have"
    idle = devices.count - recipe.train.batch_size
    if idle <= 0:
        return (note,)
    return note, f"{recipe.train.batch_size} rows per step for {devices.count} devices: {idle} devices are idle"
