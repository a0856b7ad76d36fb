"""Peak memory by part, and that of loading and training: arithmetic on a model's sizes, no torch, no weights.

Every term has a cause that was measured alone; docs/plan.md has the measurements and how far the sums are off. Memory
on a CPU is resident memory of the process above what it is before the model loads; on CUDA what the card must have,
its context included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from strop.config.schema import Recipe
from strop.objectives.table import answers_of, drawn_tokens
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
        train, answer = recipe.train, drawn_tokens(recipe.train)
        if not answer:
            return None
        group = answers_of(train)
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
        rows = sum(x.rows for x in setting.shape.linears)
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
    layer = sum(x.weights for x in shape.linears if x not in shape.in_experts)
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
    copied = [] if shape.family in EXPERTS_AS_ONE else [*shape.in_experts]
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


# ---- from strop.planning.phases ----
"""Peak memory of every phase: of a run (`memory` has loading and training), and of the commands that follow it.

Those commands read the base first: their peak is the larger of `load` and their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from strop.engine.decode.cache import BLOCK as A_BLOCK
from strop.engine.decode.cache import READ_AT_ONCE, ROWS, blocks_for
from strop.models.families.layers import FAMILIES
from strop.planning.activations import MicroBatch
from strop.planning.memory import (
    BLOCK,
    CODE_BYTES,
    FP32_PRODUCTS_BYTES,
    LOOPS_BYTES,
    MIB,
    SCRATCH_BYTES,
    Drawn,
    Phase,
    held_parts,
    load,
    optimizer_bytes,
    packed_weights,
    phase_of,
    train,
    weight_bytes,
)
from strop.planning.workload import BYTES, Setting

ANSWERS_BYTES = 25 * MIB  # the loops that answer, beyond those that train (a server of SmolLM2, and some to spare)
LANES = 16  # numbers of a vector (engine.cpu.dots)
ANSWER = 80  # tokens of an answer that `strop eval` asks for, unless told otherwise
JUDGED_AT_ONCE = 128  # as in engine.answers.batch
SCREENED = 0.1  # of what is read for a token: a smaller head is not held in 8 bit besides, as in engine.answers.screen
GENERATED = 16  # rows of a batch of transformers' generate, as in model.generate
FREE_SHARE = 0.5  # of free memory, for keys and values at most, as in engine.answers.held
MEASURING_BYTES = 170 * MIB  # pages of libraries that compute in fp32, and what the heap keeps (two merges of the demo)
WRITING_BYTES = {"q8_0": 5.7, "f16": 11.6, "bf16": 11.6, "f32": 4.6}  # a number of a tensor (exports of the demo)
POSITIONS = 2048  # that a merge is measured on, of the first rows
PARITY_BYTES = 32 * MIB  # what is computed of a few positions' log-probabilities (exporting.parity)


@dataclass(frozen=True)
class Asked:
    """What `strop eval` asks at once: `texts`, which have `positions` in the cache. longest: tokens of a row; measured:
    of a row that a merge is measured on."""

    texts: int
    positions: int
    longest: int
    measured: int

    @staticmethod
    def of(rows: Sequence[tuple[int, int]], longest: int) -> Asked:
        """rows: (tokens, supervised) of each, which base and tuned are asked. Where there are none: as many as go
        together, of `longest` tokens with the answer."""
        rows = rows or [(longest, min(ANSWER, longest - 1))] * ROWS
        rooms = [tokens - answer + max(ANSWER, answer) for tokens, answer in rows] * 2
        together = sorted(map(blocks_for, rooms), reverse=True)[:ROWS]
        sizes, answers = zip(*rows, strict=True)
        before = accumulate(answers, initial=0)  # what rows begin with alike counts once
        measured = max(size for size, already in zip(sizes, before, strict=False) if already < POSITIONS)
        return Asked(len(together), A_BLOCK * sum(together), max(sizes), measured)


def phases(
    setting: Setting, batch: MicroBatch, asked: Asked, usable: int, drawn: Drawn | None = None, *, dtype: str
) -> dict[str, Phase]:
    """Every phase. asked: by an evaluation; its longest row is what is served, its first are what a merge is measured
    on. usable: bytes that there are. drawn: in front of each step, if anything is. dtype: what commands that answer
    compute in here, whatever the run was trained in."""
    answers = answering(setting, dtype)
    return {
        "load": load(setting),
        **({} if drawn is None else {"draw": draw(setting, drawn)}),
        "train": train(setting, batch),
        "evaluate": evaluate(answers, asked, usable),
        "merge": merge(setting, asked.measured),
        "export": export(setting, asked.measured),
        "serve": serve(answers, asked.longest),
    }


def answering(setting: Setting, dtype: str) -> Setting:
    """As a run's model is loaded to answer: on one device, and on a CPU with a quantized base dequantized once."""
    layers = setting.shape.layers if setting.device == "cpu" else setting.resident_layers
    return setting.but(shards=1, resident_layers=layers, element=BYTES[dtype])


def evaluate(setting: Setting, asked: Asked, usable: int) -> Phase:
    """`strop eval`, base and tuned in one batch, of a setting that is `answering`. Fewer texts are answered together
    where memory is short."""
    if not _compiled(setting):  # so many rows go through transformers' generate together
        live = _prompt_bytes(setting, MicroBatch.rows([asked.longest] * GENERATED))
        return phase_of({**serve(setting, asked.longest, texts=GENERATED).parts, "live_layer": live})
    room = int(FREE_SHARE * max(0, usable - serve(setting, 0).peak_bytes)) // position_bytes(setting)
    found = serve(setting, min(asked.positions, room))
    rows = min(READ_AT_ONCE + asked.texts, asked.positions)
    told = 4 * min(JUDGED_AT_ONCE, asked.positions) * setting.shape.vocabulary
    return phase_of({**found.parts, "live_layer": _pass_bytes(setting, rows), "head": told + _small_head(setting)})


def draw(setting: Setting, drawn: Drawn) -> Phase:
    """Answers before a step: as serving, while the optimizer's state waits; texts that do not fit wait too."""
    served = serve(setting, drawn.prompt + drawn.answer, texts=min(drawn.texts, ROWS)).parts
    return phase_of({**served, "optimizer": optimizer_bytes(setting)})


def merge(setting: Setting, longest: int) -> Phase:
    """On the CPU: two models are measured one after the other, computing in fp32 on 16-bit weights, on rows of
    `longest` tokens; the first one's distributions wait in a file."""
    shape = setting.shape
    weights, head = measuring_bytes(setting.parameters, shape.vocabulary, shape.hidden, shape.tied, longest=longest)
    return phase_of({
        "weights": weights,
        "adapters": 4 * setting.adapter_weights,
        "head": head,
        "workspace": SCRATCH_BYTES,
        "framework": CODE_BYTES + FP32_PRODUCTS_BYTES + MEASURING_BYTES,
    })  # fmt: skip


def measuring_bytes(
    parameters: int, vocabulary: int, hidden: int, tied: bool, *, element: int = 2, longest: int = 1024
) -> tuple[int, int]:
    """(weights, head) of a model that computes in fp32 on weights of `element` bytes, each cast for its product: the
    embedding is in fp32 as well, a head of its own is the largest cast, and a row has a matrix of logits."""
    embedding = 4 * vocabulary * hidden
    head = (0 if tied else embedding) + 4 * vocabulary * longest + PARITY_BYTES
    return element * parameters + embedding, head


def export(setting: Setting, longest: int, kind: str = "q8_0") -> Phase:
    """A GGUF file of this type, tensor by tensor: the largest as it is on disk, in fp32, and as it is written. In front
    of it, of an adapter that was trained on quantized weights: which base it does better on, by its loss on rows of
    `longest` tokens. (Where llama.cpp is there to measure it, an export needs what a merge needs.)"""
    largest = max(setting.shape.embedding, *(x.inputs * x.outputs for x in setting.shape.linears))
    written = phase_of({
        "adapters": 4 * setting.adapter_weights,
        "workspace": int(WRITING_BYTES.get(kind, WRITING_BYTES["f16"]) * largest),
        "framework": CODE_BYTES,
    })  # fmt: skip
    if setting.scheme == "none":
        return written
    parts = merge(setting, longest).parts
    measured = phase_of({**parts, "framework": parts["framework"] - MEASURING_BYTES})
    return max(written, measured, key=lambda phase: phase.peak_bytes)


def _compiled(setting: Setting) -> bool:
    """Whether strop's own engine answers."""
    family = FAMILIES.get(setting.shape.family)
    return setting.device == "cpu" and family is not None and family.by_hand


def position_bytes(setting: Setting) -> int:
    """Of the cache, a position."""
    shape = setting.shape
    width = -(-shape.head_size // LANES) * LANES
    return 2 * shape.layers * shape.key_value_heads * width * setting.element


def serve(setting: Setting, context: int, *, texts: int = 1) -> Phase:
    """Base and adapter, and `texts` conversations of `context` tokens that are answered together."""
    held, shape, positions = held_parts(setting, trained=False), setting.shape, texts * context
    if not _compiled(setting):  # transformers' own forward
        cache = 2 * shape.layers * shape.key_value * positions * setting.element
        live = MicroBatch.rows([context])
        return phase_of({**held, "saved_activations": cache, "live_layer": _prompt_bytes(setting, live)})
    constants = 4 * packed_weights(setting) // BLOCK if setting.scheme in ("nf4", "fp4") else 0
    return phase_of({
        **held,
        "quantization_constants": held["quantization_constants"] + constants,
        "adapters": held["adapters"] + _laid_out(setting),
        "mapped_files": 0,
        "workspace": SCRATCH_BYTES,
        "saved_activations": positions * position_bytes(setting),
        "live_layer": _pass_bytes(setting, min(READ_AT_ONCE, positions)),
        # of the rows that give logits, and once more side by side
        "head": 2 * 4 * texts * shape.vocabulary + _small_head(setting),
        "framework": CODE_BYTES + LOOPS_BYTES + ANSWERS_BYTES,
    })  # fmt: skip


def _small_head(setting: Setting) -> int:
    """The head once more in 8 bit (engine.answers.screen), with two numbers for each of its rows."""
    shape = setting.shape
    head = setting.element * shape.vocabulary * shape.hidden
    read = weight_bytes(setting) - (0 if shape.tied else head)
    return 0 if shape.softcap or head <= SCREENED * read else shape.vocabulary * (shape.hidden + 8)


def _laid_out(setting: Setting) -> int:
    """The adapter as the engine lays it out beside peft's: A in the type that is computed in, B in fp32."""
    pairs = zip(setting.shape.linears, setting.ranks, strict=True)
    return setting.shape.layers * sum(rank * (setting.element * x.inputs + 4 * x.rows) for x, rank in pairs)


def _pass_bytes(setting: Setting, rows: int) -> int:
    """What engine.answers computes a pass over so many rows in: a product's input, queries, its output and the residual
    stream, the last two in fp32."""
    shape, b = setting.shape, setting.element
    inner = max(shape.hidden, shape.query, shape.intermediate)
    outputs = max(shape.query + 2 * shape.key_value, 2 * shape.intermediate, shape.hidden)
    return rows * (b * (inner + shape.query + shape.hidden) + 4 * (outputs + shape.hidden))


def _prompt_bytes(setting: Setting, batch: MicroBatch) -> int:
    """transformers' own forward over a prompt; the head sees its last row alone."""
    shape, b = setting.shape, setting.element
    return batch.tokens * (3 * shape.hidden + 3 * shape.intermediate) * b + 4 * shape.vocabulary
