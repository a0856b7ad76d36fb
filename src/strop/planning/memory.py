"""Predict the peak memory of each phase of a run, and of the commands after it.

Each term was measured alone (docs/plan.md). On a CPU, memory is the growth of the process's resident memory since
before the model was loaded. On CUDA, it is the memory of the GPU with its context. Imports no torch and reads no
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from strop.config.schema import Recipe
from strop.engine.decode.cache import BLOCK_SIZE as CACHE_BLOCK
from strop.engine.decode.cache import MAX_SEQUENCES, MIN_ANSWER_TOKENS, PREFILL_ROWS, answer_limit, blocks_for
from strop.models.families.table import FAMILIES
from strop.objectives.table import max_completion_tokens, sequences_per_row
from strop.planning.activations import LiveBytes, MicroBatch, offloaded_bytes, peak_live_bytes
from strop.planning.workload import BITS, BYTES, FUSED_LINEARS, AdapterWeights, Workload, bytes_if_converted

MIB = 1 << 20
PARTS = (
    "weights", "quantization_constants", "adapters", "gradients", "optimizer", "saved_activations", "live_layer",
    "head", "workspace", "mapped_files", "framework",
)  # fmt: skip
# Growth of a CPU process in one step of a tiny model (docs/plan.md, "What does not depend on the model").
CODE_BYTES = 20 * MIB  # transformers and PEFT
# Resident memory of a run before it loads its model: Python, PyTorch, transformers and PEFT (runs of the demo: 510 to
# 577 MiB). It counts against a memory limit, but is in no phase.
PROCESS_BYTES = 600 * MIB
KERNELS_BYTES = 24 * MIB  # numba with the compiled kernels
# PyTorch and cached oneDNN kernels (engine.device): in bf16 without and with LoRA matmuls, and in fp32
MATMULS_BYTES, MORE_MATMULS_BYTES, FP32_MATMULS_BYTES = 47 * MIB, 87 * MIB, 5 * MIB
SCRATCH_BYTES = 14 * MIB  # scratch memory of oneDNN, and small buffers
INTEGER_SUMS_BYTES = 72 * MIB  # engine.kernels.cpu.int8_matmul.SUMS_BYTES
CUDA_CONTEXT_BYTES = 450 * MIB  # with cuBLAS's workspace
# families that store the experts of a layer in one tensor
FUSED_EXPERTS = ("gpt_oss", "gemma4_text", "llama4_text", "qwen3_vl_moe_text")
BLOCK, NESTED = 64, 256  # weights per quantization constant, and constants per nested constant
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03, "lion": 4.0, "adafactor": 0.1, "sgd": 0.0}

DECODING_BYTES = 22 * MIB  # code and compiled kernels of generation (server of SmolLM2)
LANES = 16  # values per vector (engine.kernels.cpu.dots)
SCORED_AT_ONCE = 128  # positions scored at once, as in engine.decode.batch
SCREENED_SHARE = 0.1  # minimum share of the head in the weights read per token for an 8-bit copy, as in engine.decode
HF_BATCH_ROWS = 16  # rows in a batch of transformers' generate, as in engine.decode.hf_fallback
CACHE_SHARE = 0.5  # maximum share of free memory for keys and values, as in engine.decode.decoder_cache
# Comparing a merged model: log-probabilities, and freed memory that the heap keeps (two merges of the demo)
PARITY_PROCESS_BYTES = 202 * MIB
WRITING_BYTES = {"q8_0": 5.7, "f16": 7.4, "bf16": 7.4, "f32": 4.6}  # per value of a tensor (exports of the demo)
POSITIONS = 2048  # number of positions on which a merge is compared


@dataclass(frozen=True)
class Phase:
    """Bytes by part at the peak of a phase. The system can reclaim `mapped_files` (weight files that were copied)."""

    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        return self.peak_bytes - self.parts.get("mapped_files", 0)

    def as_json(self) -> dict[str, object]:
        return {"peak_bytes": self.peak_bytes, "needed_bytes": self.needed_bytes, "parts": dict(self.parts)}


def format_sizes(*sizes: int) -> list[str]:
    """Return sizes in one unit, MiB or GiB, with up to three decimals, so that different sizes look different."""
    unit, digits = (MIB, 0) if max(sizes) < 1 << 30 else (1 << 30, 1)
    while True:
        texts = [f"{size / unit:,.{digits}f} {'MiB' if unit == MIB else 'GiB'}" for size in sizes]
        if len(set(texts)) == len(set(sizes)) or digits == 3:
            return texts
        digits += 1


@dataclass(frozen=True)
class RolloutLoad:
    """Completions that are sampled for a step."""

    completions: int
    group: int  # completions per prompt
    prompt: int  # tokens of a prompt
    answer: int  # maximum number of tokens of a completion; in an environment, of all that follows the prompt
    vllm: bool = False  # vLLM samples them: on a GPU it launches a whole pass at once

    @staticmethod
    def from_recipe(recipe: Recipe, prompt: int | None = None) -> RolloutLoad | None:
        """Return the load of a recipe, or None if it samples nothing. prompt: tokens of a prompt.

        A trace in an environment is assumed to reach data.max_length, because the length of tool results is not known.
        """
        train, answer = recipe.train, max_completion_tokens(recipe.train)
        if not answer:
            return None
        group, prompt = sequences_per_row(train), prompt or recipe.data.max_length
        if train.environment is not None:
            prompt = max(1, min(prompt, recipe.data.max_length - answer))
            answer = recipe.data.max_length - prompt
        return RolloutLoad(train.batch_size * group, group, prompt, answer, train.vllm_python is not None)


@dataclass(frozen=True)
class EvaluationLoad:
    """Completions that `strop eval` generates at once."""

    completions: int
    positions: int  # cache positions of all completions
    longest: int  # tokens of the longest row
    measured: int  # tokens of the longest row on which a merge is compared

    @staticmethod
    def from_rows(rows: Sequence[tuple[int, int]], longest: int) -> EvaluationLoad:
        """Return the load of rows of (tokens, supervised tokens). Without rows, a full batch of `longest` tokens."""
        rows = rows or [(longest, min(MIN_ANSWER_TOKENS, longest - 1))] * MAX_SEQUENCES
        limit = answer_limit(max(answer for _, answer in rows))  # which the base model often reaches
        lengths = [tokens - answer + limit for tokens, answer in rows] * 2
        blocks = sorted(map(blocks_for, lengths), reverse=True)[:MAX_SEQUENCES]
        sizes, answers = zip(*rows, strict=True)
        starts = accumulate(answers, initial=0)
        measured = max(size for size, start in zip(sizes, starts, strict=False) if start < POSITIONS)
        return EvaluationLoad(len(blocks), CACHE_BLOCK * sum(blocks), max(sizes), measured)


def predict_phases(
    workload: Workload,
    batch: MicroBatch,
    evaluation: EvaluationLoad,
    usable: int,
    rollouts: RolloutLoad | None = None,
    *,
    dtype: str,
) -> dict[str, Phase]:
    """Return the phases by name. dtype: of generation on this machine, which may differ from training."""
    decoding = decoding_workload(workload, dtype)
    return {
        "load": load_phase(workload),
        **({} if rollouts is None else {"draw": rollout_phase(workload, rollouts)}),
        "train": train_phase(workload, batch),
        "evaluate": evaluate_phase(decoding, evaluation, usable),
        **({} if workload.adapter.full else {"merge": merge_phase(workload, evaluation.measured)}),
        "export": export_phase(trained_workload(workload), evaluation.measured),
        "serve": serve_phase(decoding, evaluation.longest),
    }


def dense_weights(workload: Workload) -> int:
    """Return the number of base weights stored in the compute dtype."""
    shape, base = workload.shape, workload.base
    packed = 0 if base.scheme == "none" else shape.quantizable_weights * (shape.layers - base.resident_layers)
    return base.parameters - packed // shape.layers


def packed_weights(workload: Workload) -> int:
    return workload.base.parameters - dense_weights(workload)


def weight_bytes(workload: Workload) -> int:
    if workload.adapter.full:
        return 4 * workload.base.parameters
    dense = dense_weights(workload) * workload.compute.dtype_bytes
    return int(dense + packed_weights(workload) * BITS.get(workload.base.scheme, 0) / 8)


def constant_bytes(workload: Workload) -> int:
    # 4 bit: an fp32 constant per block of weights. With double quantization: 8 bit, and an fp32 constant per NESTED
    # constants (QLoRA, arXiv:2305.14314, section 3). int8: one fp32 constant per row.
    packed, base, shape = packed_weights(workload), workload.base, workload.shape
    if not packed:
        return 0
    if base.scheme == "int8":
        return 4 * sum(x.total_outputs for x in shape.linears) * (shape.layers - base.resident_layers)
    blocks = packed / BLOCK
    return int(blocks + 4 * blocks / NESTED if base.double_quantization else 4 * blocks)


def workspace_bytes(workload: Workload) -> int:
    compute = workload.compute
    scratch = 32 * MIB if compute.device != "cpu" else SCRATCH_BYTES if compute.step == "plain" else 0
    casts = workload.adapter.full and compute.step == "fast" and compute.dtype_bytes < 4
    dequantized, gathered = _largest_dequantized(workload) if workload.dequantizes or casts else 0, 0
    if workload.base.shards > 1:  # two layers are gathered at once, or a layer and the embedding or head
        layer = base_layer_bytes(workload)
        gathered = layer + max(layer, compute.dtype_bytes * workload.shape.embedding_weights)
    return scratch + dequantized + gathered + integer_bytes(workload)


def integer_bytes(workload: Workload) -> int:
    """Return bytes of int8 matmuls: sums, and two 8-bit parts of each weight in 16 bit."""
    if not workload.compute.int8_matmul:
        return 0
    shape, base = workload.shape, workload.base
    layer = sum(x.weights for x in shape.linears if x not in shape.expert_linears)
    layers = shape.layers if base.scheme == "none" else base.resident_layers
    return 2 * (layers * layer + shape.embedding_weights) + INTEGER_SUMS_BYTES


def base_layer_bytes(workload: Workload) -> int:
    outside = workload.compute.dtype_bytes * workload.shape.embedding_weights * (1 if workload.shape.tied else 2)
    return (weight_bytes(workload) + constant_bytes(workload) - outside) // workload.shape.layers


def _largest_dequantized(workload: Workload) -> int:
    """Return bytes of the largest dequantized weight. A fused weight is dequantized in parts, which are copied."""
    sizes = {x.name: x.inputs * x.outputs for x in workload.shape.linears}
    largest = max(sizes.values())
    for names in FUSED_LINEARS if workload.compute.step == "fast" else ():
        parts = [sizes.get(name, 0) for name in names]
        largest = max(largest, sum(parts) + max(parts))
    return workload.compute.dtype_bytes * largest


def framework_bytes(workload: Workload) -> int:
    """Return bytes of code: libraries, compiled kernels, and the CUDA context."""
    compute = workload.compute
    if compute.device != "cpu":
        return CUDA_CONTEXT_BYTES
    kernels = KERNELS_BYTES if compute.step == "fast" else 0
    has_no_bf16_lora = workload.tiled_lora or compute.step == "plain"  # PEFT computes adapters in fp32
    bf16_matmuls = MATMULS_BYTES if has_no_bf16_lora else MORE_MATMULS_BYTES
    matmuls = FP32_MATMULS_BYTES if compute.dtype_bytes == 4 else bf16_matmuls
    return CODE_BYTES + matmuls + kernels


def constant_parts(workload: Workload, *, trained: bool) -> dict[str, int]:
    """Return the parts that are constant during a phase. trained: with the optimizer's state."""
    base = workload.base
    return {
        "weights": _streamed_bytes(workload) if base.streamed else weight_bytes(workload) // base.shards,
        "quantization_constants": 0 if base.streamed else constant_bytes(workload) // base.shards,
        "adapters": 0 if workload.adapter.full else 4 * workload.adapter_weights,
        "optimizer": int(STATE_BYTES[workload.compute.optimizer] * workload.adapter_weights) if trained else 0,
        "workspace": workspace_bytes(workload),
        "mapped_files": _mapped_copies(workload),
        "framework": framework_bytes(workload),
    }


def _streamed_bytes(workload: Workload) -> int:
    """Return bytes of a streamed base in memory: the layer that is computed and the next, or a layer and the head.

    On a GPU, embedding and head stay in memory.
    """
    layer = base_layer_bytes(workload)
    if workload.compute.device != "cpu":
        return weight_bytes(workload) + constant_bytes(workload) - (workload.shape.layers - 2) * layer
    return layer + max(layer, workload.compute.dtype_bytes * workload.shape.embedding_weights)


def host_bytes(workload: Workload, batch: MicroBatch) -> int:
    """Return bytes that a run on a GPU keeps in host memory: the layers of a streamed base, and offloaded inputs."""
    is_streamed = workload.base.streamed and workload.compute.device != "cpu"
    layers = workload.shape.layers * base_layer_bytes(workload) if is_streamed else 0
    return layers + offloaded_bytes(workload, batch)


def _mapped_copies(workload: Workload) -> int:
    """Return bytes of weights that are copied, but whose files stay mapped (on a CPU in the dtype of the files)."""
    # FastLoss copies weights to fuse them, transformers to stack experts, and new tokens extend the embedding.
    shape, compute, base = workload.shape, workload.compute, workload.base
    if compute.device != "cpu" or base.scheme != "none" or base.converted_bytes or base.shards > 1 or base.streamed:
        return 0  # shards and streamed layers are read into other memory
    embeddings = shape.embedding_weights * (1 if shape.tied else 2) if workload.adapter.new_tokens else 0
    copied = [] if shape.family in FUSED_EXPERTS else [*shape.expert_linears]
    if compute.step == "fast":
        copied += [x for x in shape.linears if any(x.name in names for names in FUSED_LINEARS)]
    return compute.dtype_bytes * (shape.layers * sum(x.weights for x in copied) + embeddings)


def train_phase(workload: Workload, batch: MicroBatch) -> Phase:
    """Return the peak of training, from the second step on (the first has no optimizer state yet)."""
    # Gradients grow while activations are freed. On a GPU they count at the peak only if an earlier micro-batch has
    # allocated them. On a CPU, the C library keeps their memory from step to step.
    adapter, compute = workload.adapter, workload.compute
    parts = constant_parts(workload, trained=True)
    trainable = 4 * workload.adapter_weights
    if compute.step == "fast" and compute.device == "cuda":
        parts["adapters"] += compute.dtype_bytes * workload.gpu_operand_weights
    elif compute.step == "fast" and not workload.tiled_lora:
        # Layers that are not recomputed save the adapter in the compute dtype for the backward pass.
        share = 1 - compute.checkpointed_layers / workload.shape.layers if compute.dtype_bytes < 4 else 0.5
        parts["adapters"] += int(compute.dtype_bytes * (workload.adapter_weights - adapter.extra_weights) * share)
    gradients_at_peak = trainable if batch.more or compute.device == "cpu" else 0
    # the peak of the forward and backward pass, and the optimizer's update
    moments = [(peak_live_bytes(workload, batch), gradients_at_peak), (LiveBytes(), trainable)]
    live, gradients = max(moments, key=lambda moment: moment[0].total + moment[1])
    return make_phase({**parts, "gradients": gradients, **vars(live)})


def load_phase(workload: Workload) -> Phase:
    # On a CPU, weights stay in mapped files, and converted weights count in addition to the files' pages.
    constant = constant_parts(workload, trained=False)
    compute, stored_bytes = workload.compute, workload.base.converted_bytes
    copied = compute.device == "cpu" and workload.base.scheme == "none" and stored_bytes > 0
    mapped = weight_bytes(workload.replace(dtype_bytes=stored_bytes, full=False)) if copied else 0
    parts = {"weights": constant["weights"], "quantization_constants": constant["quantization_constants"]}
    mapped_streamed = workload.base.streamed and compute.device == "cpu"
    if (workload.base.shards > 1 and copied) or mapped_streamed:  # the largest tensor, as stored and converted
        mapped, parts["workspace"] = 0, (stored_bytes + compute.dtype_bytes) * workload.shape.embedding_weights
    framework = CODE_BYTES if compute.device == "cpu" else CUDA_CONTEXT_BYTES
    return make_phase({**parts, "mapped_files": mapped, "framework": framework})


def make_phase(parts: Mapping[str, int]) -> Phase:
    return Phase({name: int(parts.get(name, 0)) for name in PARTS})


def trained_workload(workload: Workload) -> Workload:
    """Return the workload of the model that a run saves: with adapters, or without them if all weights are trained."""
    no_adapters = AdapterWeights(ranks=workload.adapter.ranks)
    return (
        Workload(base=workload.base, adapter=no_adapters, compute=workload.compute)
        if workload.adapter.full
        else workload
    )


def decoding_workload(workload: Workload, dtype: str) -> Workload:
    """Return the workload of generation: on one device, and dequantized once on a CPU if the base is in memory."""
    dequantizes = workload.compute.device == "cpu" and not workload.base.streamed
    layers = workload.shape.layers if dequantizes else workload.base.resident_layers
    converted_bytes = bytes_if_converted(workload.shape, dtype)
    workload = trained_workload(workload)
    return workload.replace(shards=1, resident_layers=layers, dtype_bytes=BYTES[dtype], converted_bytes=converted_bytes)


def evaluate_phase(workload: Workload, evaluation: EvaluationLoad, usable: int) -> Phase:
    """Return the peak of `strop eval` for a `decoding_workload`, limited by CACHE_SHARE of the free memory."""
    if not _has_decoder(workload):
        live = _prompt_bytes(workload, MicroBatch.rows([evaluation.longest] * HF_BATCH_ROWS))
        parts = serve_phase(workload, evaluation.longest, completions=HF_BATCH_ROWS).parts
        return make_phase({**parts, "live_layer": live})
    free = max(0, usable - serve_phase(workload, 0).peak_bytes)
    positions = int(CACHE_SHARE * free) // position_bytes(workload)
    parts = serve_phase(workload, min(evaluation.positions, positions)).parts
    rows = min(PREFILL_ROWS + evaluation.completions, evaluation.positions)
    logits = 4 * min(SCORED_AT_ONCE, evaluation.positions) * workload.shape.vocabulary
    head = logits + _screening_head_bytes(workload)
    return make_phase({**parts, "live_layer": _pass_bytes(workload, rows), "head": head})


def rollout_phase(workload: Workload, rollouts: RolloutLoad) -> Phase:
    """Return the peak of sampling before a step: that of a server, and the optimizer's state."""
    context, rows = rollouts.prompt + rollouts.answer, min(rollouts.completions, MAX_SEQUENCES)
    parts = serve_phase(workload, context, completions=rows).parts
    return make_phase({**parts, "optimizer": constant_parts(workload, trained=True)["optimizer"]})


def merge_phase(workload: Workload, longest: int) -> Phase:
    """Return the peak of merging on a CPU, which compares two models on rows of `longest` tokens."""
    sizes = workload.shape.vocabulary, workload.shape.hidden, workload.shape.tied
    weights, head = parity_model_bytes(workload.base.parameters, *sizes, longest=longest)
    return make_phase({
        "weights": weights,
        "adapters": 4 * workload.adapter_weights,
        "head": head,
        "workspace": SCRATCH_BYTES,
        "framework": CODE_BYTES + FP32_MATMULS_BYTES + PARITY_PROCESS_BYTES,
    })  # fmt: skip


def parity_model_bytes(
    parameters: int, vocabulary: int, hidden: int, tied: bool, *, dtype_bytes: int = 2, longest: int = 1024
) -> tuple[int, int]:
    """Return bytes of (weights, head) of a model that converts weights of `dtype_bytes` to fp32 for each matmul."""
    # The embedding is in fp32, an untied head is the largest converted weight, and a row has a matrix of logits.
    embedding = 4 * vocabulary * hidden
    head = (0 if tied else embedding) + 4 * vocabulary * longest
    return dtype_bytes * parameters + embedding, head


def export_phase(workload: Workload, longest: int, kind: str = "q8_0") -> Phase:
    """Return the peak of writing a GGUF file of this type, without a comparison with llama.cpp."""
    # Tensors are written one at a time. An adapter that was trained on quantized weights is first compared on the
    # quantized and the original base, on rows of `longest` tokens.
    largest = max(workload.shape.embedding_weights, *(x.inputs * x.outputs for x in workload.shape.linears))
    written = make_phase({
        "adapters": 4 * workload.adapter_weights,
        "workspace": int(WRITING_BYTES.get(kind, WRITING_BYTES["f16"]) * largest),
        "framework": CODE_BYTES,
    })  # fmt: skip
    if workload.base.scheme == "none":
        return written
    parts = merge_phase(workload, longest).parts
    measured = make_phase({**parts, "workspace": 0, "framework": FP32_MATMULS_BYTES})
    return max(written, measured, key=lambda phase: phase.peak_bytes)


def _has_decoder(workload: Workload) -> bool:
    """Return whether strop's decoder supports the model. Otherwise transformers generates."""
    family = FAMILIES.get(workload.shape.family)
    return workload.compute.device == "cpu" and family is not None and family.fully_fused


def position_bytes(workload: Workload) -> int:
    shape = workload.shape
    width = -(-shape.head_size // LANES) * LANES
    return 2 * shape.layers * shape.key_value_heads * width * workload.compute.dtype_bytes


def serve_phase(workload: Workload, context: int, *, completions: int = 1) -> Phase:
    """Return the peak of serving `completions` of `context` tokens at once."""
    constant, shape, positions = constant_parts(workload, trained=False), workload.shape, completions * context
    if not _has_decoder(workload):
        cache = 2 * shape.layers * shape.key_value_size * positions * workload.compute.dtype_bytes
        live = _prompt_bytes(workload, MicroBatch.rows([context]))
        return make_phase({**constant, "saved_activations": cache, "live_layer": live})
    constants = 4 * packed_weights(workload) // BLOCK if workload.base.scheme in ("nf4", "fp4") else 0
    b, ranked = workload.compute.dtype_bytes, workload.ranked_linears()
    # The decoder copies the adapter: A in the compute dtype, B in fp32.
    adapter = shape.layers * sum(rank * (b * x.inputs + 4 * x.total_outputs) for x, rank in ranked)
    return make_phase({
        **constant,
        "quantization_constants": constant["quantization_constants"] + constants,
        "adapters": constant["adapters"] + adapter,
        "mapped_files": 0,
        "workspace": SCRATCH_BYTES,
        "saved_activations": positions * position_bytes(workload),
        "live_layer": _pass_bytes(workload, min(PREFILL_ROWS, positions)),
        # logits of each row, and again in one matrix
        "head": 2 * 4 * completions * shape.vocabulary + _screening_head_bytes(workload),
        "framework": DECODING_BYTES,
    })  # fmt: skip


def _screening_head_bytes(workload: Workload) -> int:
    """Return bytes of the head's 8-bit copy, with two values per row, which speeds up an exact argmax."""
    shape = workload.shape
    head = workload.compute.dtype_bytes * shape.vocabulary * shape.hidden
    read = weight_bytes(workload) - (0 if shape.tied else head)
    return 0 if shape.softcap or head <= SCREENED_SHARE * read else shape.vocabulary * (shape.hidden + 8)


def _pass_bytes(workload: Workload, rows: int) -> int:
    """Return bytes of a pass of strop's decoder: inputs and queries, and outputs and the residual stream in fp32."""
    shape, b = workload.shape, workload.compute.dtype_bytes
    inputs = max(shape.hidden, shape.query_size, shape.intermediate)
    outputs = max(shape.query_size + 2 * shape.key_value_size, 2 * shape.intermediate, shape.hidden)
    return rows * (b * (inputs + shape.query_size + shape.hidden) + 4 * (outputs + shape.hidden))


def _prompt_bytes(workload: Workload, batch: MicroBatch) -> int:
    """Return bytes of transformers' forward pass over a prompt, with logits of the last row only."""
    shape, b = workload.shape, workload.compute.dtype_bytes
    return batch.tokens * (3 * shape.hidden + 3 * shape.intermediate) * b + 4 * shape.vocabulary
