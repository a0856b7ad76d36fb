"""Peak memory of every phase: of a run (`memory` has loading and training), and of the commands that follow it.

Those commands read the base first: their peak is the larger of `load` and their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from strop.engine.decode.cache import BLOCK_SIZE as A_BLOCK
from strop.engine.decode.cache import MAX_SEQUENCES, PREFILL_ROWS, blocks_for
from strop.models.families.table import FAMILIES
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
        rows = rows or [(longest, min(ANSWER, longest - 1))] * MAX_SEQUENCES
        rooms = [tokens - answer + max(ANSWER, answer) for tokens, answer in rows] * 2
        together = sorted(map(blocks_for, rooms), reverse=True)[:MAX_SEQUENCES]
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
    rows = min(PREFILL_ROWS + asked.texts, asked.positions)
    told = 4 * min(JUDGED_AT_ONCE, asked.positions) * setting.shape.vocabulary
    return phase_of({**found.parts, "live_layer": _pass_bytes(setting, rows), "head": told + _small_head(setting)})


def draw(setting: Setting, drawn: Drawn) -> Phase:
    """Answers before a step: as serving, while the optimizer's state waits; texts that do not fit wait too."""
    served = serve(setting, drawn.prompt + drawn.answer, texts=min(drawn.texts, MAX_SEQUENCES)).parts
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
    return setting.device == "cpu" and family is not None and family.fully_fused


def position_bytes(setting: Setting) -> int:
    """Of the cache, a position."""
    shape = setting.shape
    width = -(-shape.head_size // LANES) * LANES
    return 2 * shape.layers * shape.key_value_heads * width * setting.element


def serve(setting: Setting, context: int, *, texts: int = 1) -> Phase:
    """Base and adapter, and `texts` conversations of `context` tokens that are answered together."""
    held, shape, positions = held_parts(setting, trained=False), setting.shape, texts * context
    if not _compiled(setting):  # transformers' own forward
        cache = 2 * shape.layers * shape.key_value_size * positions * setting.element
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
        "live_layer": _pass_bytes(setting, min(PREFILL_ROWS, positions)),
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
    return setting.shape.layers * sum(rank * (setting.element * x.inputs + 4 * x.total_outputs) for x, rank in pairs)


def _pass_bytes(setting: Setting, rows: int) -> int:
    """What engine.answers computes a pass over so many rows in: a product's input, queries, its output and the residual
    stream, the last two in fp32."""
    shape, b = setting.shape, setting.element
    inner = max(shape.hidden, shape.query_size, shape.intermediate)
    outputs = max(shape.query_size + 2 * shape.key_value_size, 2 * shape.intermediate, shape.hidden)
    return rows * (b * (inner + shape.query_size + shape.hidden) + 4 * (outputs + shape.hidden))


def _prompt_bytes(setting: Setting, batch: MicroBatch) -> int:
    """transformers' own forward over a prompt; the head sees its last row alone."""
    shape, b = setting.shape, setting.element
    return batch.tokens * (3 * shape.hidden + 3 * shape.intermediate) * b + 4 * shape.vocabulary
