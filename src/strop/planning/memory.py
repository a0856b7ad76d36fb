"""Peak memory by part, and that of loading and training: arithmetic on a model's sizes, no torch, no weights.

Every term has a cause that was measured alone; docs/plan.md has the measurements and how far the sums are off. Memory
on a CPU is resident memory of the process above what it is before the model loads; on CUDA what the card must have,
its context included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from strop.config.schema import Recipe
from strop.objectives.table import max_completion_tokens, sequences_per_row
from strop.planning.activations import Alive, MicroBatch, at_peak
from strop.planning.workload import BITS, Setting

MIB = 1 << 20
PARTS = (
    "weights", "quantization_constants", "adapters", "gradients", "optimizer", "saved_activations", "live_layer",
    "head", "workspace", "mapped_files", "framework",
)  # fmt: skip
# What a CPU process grows by on its way through one step of a tiny model (docs/plan.md, "What does not depend on the
# model"): transformers' and peft's code for the model; numba and LLVM with the compiled loops; PyTorch's own code, and
# oneDNN's kernels of as many kinds of product as are kept (engine.device), which computes in bf16.
CODE_BYTES = 20 * MIB
LOOPS_BYTES = 85 * MIB
PRODUCTS_BYTES = 47 * MIB
MORE_PRODUCTS_BYTES, FP32_PRODUCTS_BYTES = 87 * MIB, 5 * MIB
SCRATCH_BYTES = 14 * MIB  # oneDNN's scratch and small blocks at the peak; the fast step's are in activations.HOLES
INTEGER_SUMS_BYTES = 72 * MIB  # engine.cpu.integers.SUMS_BYTES
CUDA_CONTEXT_BYTES = 450 * MIB  # of the driver, cuBLAS's workspace included
EXPERTS_AS_ONE = ("gpt_oss", "gemma4_text", "llama4_text")  # in their files, as transformers holds them
BLOCK, NESTED = 64, 256  # weights that share a constant, constants that share one
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03, "lion": 4.0, "adafactor": 0.1, "sgd": 0.0}


@dataclass(frozen=True)
class Phase:
    """Bytes by part at the phase's peak. mapped_files: pages of the weight files, which the system takes back where
    memory is short: they are resident, but nothing fails for want of them."""

    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        return self.peak_bytes - self.parts.get("mapped_files", 0)

    def as_json(self) -> dict[str, object]:
        return {"peak_bytes": self.peak_bytes, "parts": dict(self.parts)}


@dataclass(frozen=True)
class Drawn:
    """What a step draws: `texts` answers of at most `answer` tokens, `group` to each prompt of `prompt` tokens."""

    texts: int
    group: int
    prompt: int
    answer: int

    @staticmethod
    def of(recipe: Recipe, prompt: int | None = None) -> Drawn | None:
        """prompt: tokens, where they are known; else as long as they may be. None where nothing is drawn."""
        train, answer = recipe.train, max_completion_tokens(recipe.train)
        if not answer:
            return None
        group = sequences_per_row(train)
        return Drawn(train.batch_size * group, group, prompt or recipe.data.max_length, answer)


def dense_weights(setting: Setting) -> int:
    """Numbers of the base that are held in the type that is computed in."""
    shape = setting.shape
    packed = 0 if setting.scheme == "none" else shape.quantizable * (shape.layers - setting.resident_layers)
    return setting.parameters - packed // shape.layers


def packed_weights(setting: Setting) -> int:
    return setting.parameters - dense_weights(setting)


def weight_bytes(setting: Setting) -> int:
    return int(dense_weights(setting) * setting.element + packed_weights(setting) * BITS.get(setting.scheme, 0) / 8)


def constant_bytes(setting: Setting) -> int:
    """4 bit: a number a block of 64, in fp32 or (double) in 8 bit with one fp32 for 256 of them, which makes 4.127 bits
    a weight (QLoRA, arXiv:2305.14314, 3). int8: an fp32 number a row."""
    packed = packed_weights(setting)
    if not packed:
        return 0
    if setting.scheme == "int8":
        rows = sum(x.total_outputs for x in setting.shape.linears)
        return 4 * rows * (setting.shape.layers - setting.resident_layers)
    blocks = packed / BLOCK
    return int(blocks + 4 * blocks / NESTED if setting.double else 4 * blocks)


def optimizer_bytes(setting: Setting) -> int:
    return int(STATE_BYTES[setting.optimizer] * setting.adapter_weights)


def workspace_bytes(setting: Setting) -> int:
    """One dequantized weight as the products see it, with the parts it is laid together from, what is gathered of a
    sharded base, and small scratch."""
    scratch = 32 * MIB if setting.device != "cpu" else SCRATCH_BYTES if setting.step == "plain" else 0
    dequantized = _largest_dequantized(setting) if setting.streamed else 0
    return scratch + dequantized + gathered_bytes(setting) + integer_bytes(setting)


def integer_bytes(setting: Setting) -> int:
    """Two parts in 8 bit of each weight that is in fp32, of the head's too, and sums in 32 bit (engine.cpu.integers).
    What is held in 8 bit is multiplied as it is."""
    if not setting.integers:
        return 0
    shape = setting.shape
    layer = sum(x.weights for x in shape.linears if x not in shape.expert_linears)
    layers = shape.layers if setting.scheme == "none" else setting.resident_layers
    return 2 * (layers * layer + shape.embedding) + INTEGER_SUMS_BYTES


def gathered_bytes(setting: Setting) -> int:
    """Of a sharded base, what is there at a time: a layer and the next one, or the embedding or the head beside one."""
    if setting.shards == 1:
        return 0
    layer = base_layer_bytes(setting)
    return layer + max(layer, setting.element * setting.shape.embedding)


def base_layer_bytes(setting: Setting) -> int:
    """Of one decoder layer: weights and their constants."""
    outside = setting.element * setting.shape.embedding * (1 if setting.shape.tied else 2)
    return (weight_bytes(setting) + constant_bytes(setting) - outside) // setting.shape.layers


def _largest_dequantized(setting: Setting) -> int:
    """Layers that share an input are one product (gate and up): the whole, and the part that is copied into it."""
    shape = setting.shape
    whole = {x.name: x.inputs * x.outputs for x in shape.linears}
    single, joined = max(whole.values()), 0
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        parts = [whole.get(name, 0) for name in group]
        joined = max(joined, sum(parts) + max(parts) if setting.step == "fast" else 0)
    return setting.element * max(single, joined)


def framework_bytes(setting: Setting) -> int:
    if setting.device != "cpu":
        return CUDA_CONTEXT_BYTES
    loops = LOOPS_BYTES if setting.step == "fast" else 0
    few = setting.tiled_lora or setting.step == "plain"  # peft computes its adapters in fp32
    products = FP32_PRODUCTS_BYTES if setting.element == 4 else PRODUCTS_BYTES if few else MORE_PRODUCTS_BYTES
    return CODE_BYTES + products + loops


def held_parts(setting: Setting, *, trained: bool) -> dict[str, int]:
    """What is there through a whole phase."""
    adapters = 4 * setting.adapter_weights
    return {
        "weights": weight_bytes(setting) // setting.shards,
        "quantization_constants": constant_bytes(setting) // setting.shards,
        "adapters": adapters,
        "optimizer": optimizer_bytes(setting) if trained else 0,
        "workspace": workspace_bytes(setting),
        "mapped_files": _replaced_bytes(setting),
        "framework": framework_bytes(setting),
    }


def _replaced_bytes(setting: Setting) -> int:
    """16-bit weights are used where their file is mapped. The fast step lays those that share an input side by side in
    memory of its own, transformers the experts that a file has one by one, and an embedding that gets new tokens is
    copied; the file's pages of the same weights stay mapped as long as any other weight of the file is."""
    if setting.device != "cpu" or setting.scheme != "none" or setting.element != 2:
        return 0
    if setting.shards > 1:  # a share is in memory of its own as it is read
        return 0
    shape = setting.shape
    grown = shape.embedding * (1 if shape.tied else 2) if setting.more_tokens else 0
    copied = [] if shape.family in EXPERTS_AS_ONE else [*shape.expert_linears]
    if setting.step == "fast":
        joined = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        copied += [x for x in shape.linears if x.name in joined]
    return setting.element * (shape.layers * sum(x.weights for x in copied) + grown)


def train(setting: Setting, batch: MicroBatch) -> Phase:
    """From the second step on: the first has no optimizer state yet.

    The gradients are fp32 and as many as the adapter's weights. They grow while activations go, so that on a card they
    count at the peak only where an earlier micro-batch of the step has left some. On a CPU they are small blocks, whose
    memory the C library keeps from step to step.
    """
    held = held_parts(setting, trained=True)
    trainable = 4 * setting.adapter_weights
    if setting.step == "fast" and setting.device == "cuda":
        held["adapters"] += setting.element * setting.operand_weights
    elif setting.step == "fast" and not setting.tiled_lora:
        # The adapter in the type that is computed in is kept for the backward, of each layer that keeps anything.
        share = 1 - setting.checkpoint_layers / setting.shape.layers if setting.element < 4 else 0.5
        held["adapters"] += int(setting.element * (setting.adapter_weights - setting.whole) * share)
    alive = at_peak(setting, batch)
    waiting = trainable if batch.more or setting.device == "cpu" else 0
    moments = [(alive, waiting), (Alive(), trainable)]  # the second: the optimizer's own step
    alive, gradients = max(moments, key=lambda moment: moment[0].total + moment[1])
    return phase_of(
        {
            **held,
            "gradients": gradients,
            "saved_activations": alive.saved_activations,
            "live_layer": alive.live_layer,
            "head": alive.head,
        }
    )


def load(setting: Setting) -> Phase:
    """Reading the base. On a CPU 16-bit weights stay where their files are mapped; for fp32 they are copied out, and
    the files' pages count until the last is. A quantized base is read tensor by tensor, each with its file opened anew;
    of a card the files' pages lie in the host's memory. Of a sharded base a device reads its share."""
    held = held_parts(setting, trained=False)
    copied = setting.device == "cpu" and setting.scheme == "none" and setting.element != 2
    mapped = weight_bytes(setting.but(element=2)) if copied else 0
    parts = {"weights": held["weights"], "quantization_constants": held["quantization_constants"]}
    if setting.shards > 1 and copied:  # tensor by tensor: the largest as it is read, and as it is wanted
        mapped, parts["workspace"] = 0, (2 + setting.element) * setting.shape.embedding
    framework = CODE_BYTES if setting.device == "cpu" else CUDA_CONTEXT_BYTES
    return phase_of({**parts, "mapped_files": mapped, "framework": framework})


def phase_of(parts: Mapping[str, int]) -> Phase:
    return Phase({name: int(parts.get(name, 0)) for name in PARTS})
