"""Describe what determines a run's memory and time: model sizes, quantization, adapters and the training step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

from strop.config.schema import LoraSection, Recipe
from strop.engine.eligibility import why_config_not_fast, why_full_not_fast
from strop.errors import ModelError
from strop.machine.probe import MAX_TILED_RANK, this_cpu
from strop.models.families.shape import (
    EMBEDDINGS,
    LinearShape,
    ModelShape,
    check_lora_paths,
    matches_pattern,
    target_names,
)
from strop.models.families.table import FAMILIES, Family
from strop.objectives.table import count_score_outputs, data_kind_of

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEADS = ("lm_head", "embed_out")  # the output heads among EMBEDDINGS
BITS = {"nf4": 4.0, "fp4": 4.0, "int8": 8.0}  # per quantized weight
# Layers with the same input. The fast step (strop.engine.train.fast) computes each group in one matmul.
FUSED_LINEARS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class BaseWeights:
    shape: ModelShape
    parameters: int
    scheme: str = "none"  # quantization scheme, or "none"
    double_quantization: bool = True  # quantization constants are quantized too (4-bit schemes)
    resident_layers: int = 0  # quantized layers that are dequantized once instead of for each matmul
    shards: int = 1  # number of devices over which the base is sharded; 1 if each device has all of it
    streamed: bool = False  # weights are read from mapped files layer by layer
    converted_bytes: int = 0  # bytes per weight of files whose weights are converted to another dtype; 0: as stored


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    ranks: tuple[int, ...] = ()  # LoRA rank of each of `shape.linears`; 0 without an adapter
    extra_weights: int = 0  # other trainable weights: full modules, biases, DoRA magnitudes, the head's adapter
    head_rank: int = 0  # LoRA rank on the output head; 0 without an adapter
    dropout: bool = False
    dora: bool = False
    full_head: bool = False  # the output head is trained in full
    full_embedding: bool = False  # the input embedding is trained in full
    full_head_norms: bool = False  # q_norm or k_norm is trained in full
    new_tokens: bool = False  # the embedding has rows for added tokens
    full: bool = False  # all weights of the text model are trained, in fp32, and there are no adapters


@dataclass(frozen=True, kw_only=True)
class Compute:
    device: str = "cpu"
    dtype_bytes: int = 2  # bytes per value of the compute dtype
    step: str = "fast"  # fast or plain (strop.engine.step)
    threads: int = 2
    attention_tiles: bool = False  # the fast step computes attention in tiles (CPU, bf16)
    bf16_head_kernel: bool = False  # the fast step uses strop's matmul kernel for the output head (CPU, bf16)
    int8_matmul: bool = False  # matmuls with frozen weights are computed in int8
    checkpointed_layers: int = 0  # number of layers that are recomputed in the backward pass
    offload: bool = False  # inputs of recomputed layers are kept in host memory
    embeds_twice: bool = False  # each text is also computed without gradients (GradCache)
    optimizer: str = "adamw"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The base model, the trainable weights, and the training step of a run."""

    base: BaseWeights
    adapter: AdapterWeights = AdapterWeights()
    compute: Compute = Compute()

    @staticmethod
    def from_recipe(
        recipe: Recipe, shape: ModelShape, *, parameters: int | None = None, threads: int = 2, devices: int = 1
    ) -> Workload:
        """Return the workload of a recipe with a known device and dtype. Other options set to auto count as off."""
        model, lora, train = recipe.model, recipe.lora, recipe.train
        full = train.method == "full"
        names = _find_targets(shape, lora.target_modules)
        layer_ranks = [_find_layer_ranks(x.path, lora, shape.layers) if x.name in names else [] for x in shape.linears]
        device = model.device.partition(":")[0]
        scheme = model.quantization if model.quantization != "auto" else "none"
        is_plain = why_recipe_not_fast(recipe, shape) is not None
        bf16_cpu = device == "cpu" and model.dtype == "bf16"
        # The mean rank over the layers, rounded up. `_count_extra_weights` corrects the rounding.
        ranks = tuple(-(-sum(ranks) // shape.layers) for ranks in layer_ranks)
        head_rank = _find_rank("lm_head", lora) if "lm_head" in names else 0
        return Workload(
            base=BaseWeights(
                shape=shape,
                parameters=parameters or shape.parameters,
                scheme=scheme,
                double_quantization=model.double_quantization,
                resident_layers=0 if scheme == "none" else min(shape.layers, model.resident_layers or 0),
                shards=devices if model.placement == "sharded" else 1,
                streamed=model.placement == "streamed",
                converted_bytes=bytes_if_converted(shape, "fp32" if full else model.dtype),
            ),
            adapter=AdapterWeights(
                ranks=(0,) * len(shape.linears),
                extra_weights=shape.parameters + len(lora.new_tokens) * shape.hidden * (1 if shape.tied else 2),
                full_head=True,
                full_embedding=True,
                full_head_norms=shape.head_norms,
                full=True,
            )
            if full
            else AdapterWeights(
                ranks=ranks,
                extra_weights=_count_extra_weights(recipe, shape, ranks, layer_ranks, head_rank),
                head_rank=head_rank,
                dropout=lora.dropout > 0,
                dora=lora.use_dora,
                full_head=any(name in HEADS for name in lora.modules_to_save),
                full_embedding=any(name in EMBEDDINGS and name not in HEADS for name in lora.modules_to_save),
                full_head_norms=_trains_head_norms(lora, shape),
                new_tokens=bool(lora.new_tokens),
            ),
            compute=Compute(
                device=device,
                dtype_bytes=BYTES.get(model.dtype, 2),
                step="plain" if is_plain else "fast",
                threads=threads,
                attention_tiles=bf16_cpu and this_cpu().has_tiled_attention(shape.head_size),
                bf16_head_kernel=bf16_cpu and this_cpu().has_bf16_matmul((shape.hidden, shape.vocabulary)),
                int8_matmul=train.int8_matmul,
                checkpointed_layers=num_checkpointed(train.gradient_checkpointing, shape.layers, all_or_none=is_plain),
                offload=train.gradient_checkpointing == "offload",
                embeds_twice=data_kind_of(train) == "triplets",
                optimizer=train.optimizer,
            ),
        )

    @property
    def shape(self) -> ModelShape:
        return self.base.shape

    @property
    def adapter_weights(self) -> int:
        """Number of trainable weights: A (r, in) and B (out, r) of each adapted layer, and `extra_weights`."""
        layer = sum(rank * x.adapter_size for x, rank in self.ranked_linears())
        return round(self.shape.layers * layer) + self.adapter.extra_weights

    @property
    def active_adapter_weights(self) -> int:
        """Number of trainable weights that one token uses: without the experts that it is not routed to."""
        inactive = sum((1 - x.active) * x.adapter_size * rank for x, rank in self.ranked_linears())
        return self.adapter_weights - round(self.shape.layers * inactive)

    @property
    def expert_adapter_weights(self) -> int:
        experts = self.shape.expert_linears
        layer = sum(rank * x.adapter_size for x, rank in self.ranked_linears() if x in experts)
        return round(self.shape.layers * layer)

    @property
    def tiled_lora(self) -> bool:
        """True if the fast step computes the adapters' matmuls with strop's CPU kernels."""
        has_tiles = self.compute.step == "fast" and self.compute.attention_tiles
        return has_tiles and max(self.adapter.ranks, default=0) <= MAX_TILED_RANK

    @property
    def flash_attention(self) -> bool:
        """True if attention saves no probabilities, as flash attention on a GPU in 16 bit."""
        return self.compute.device == "cuda" and self.compute.dtype_bytes == 2

    @property
    def gpu_operand_weights(self) -> int:
        """Number of LoRA weights that the fast step copies to the compute dtype on a GPU."""
        # The B matrices of fused layers form one block-diagonal matrix, which is stored with its zeros.
        adapted = {x.name: (rank, x) for x, rank in self.ranked_linears() if rank}
        total = 0
        for names in FUSED_LINEARS:
            fused = [adapted.pop(name) for name in names if name in adapted]
            total += sum(rank * x.inputs for rank, x in fused)
            total += sum(rank for rank, _ in fused) * sum(x.outputs for _, x in fused)
        return round(self.shape.layers * (total + sum(rank * x.adapter_size for rank, x in adapted.values())))

    @property
    def family(self) -> Family:
        return FAMILIES.get(self.shape.family, Family())

    @property
    def mlp_linears(self) -> tuple[LinearShape, ...]:
        family, experts = self.family, self.shape.expert_linears
        return tuple(x for x in self.shape.linears if x.leaf in (*family.gate_up, family.down) or x in experts)

    @property
    def mixer_linears(self) -> tuple[LinearShape, ...]:
        """Linear layers of the module that replaces attention in some layers (linear attention, Mamba, ...)."""
        family, mlp = self.family, self.mlp_linears
        not_mlp = (x for x in self.shape.linears if x not in mlp) if family.mixer else ()
        attention, prefix = (*family.qkv, family.o), f"{family.mixer}."
        return tuple(x for x in not_mlp if x.leaf not in attention or x.path.startswith(prefix))

    @property
    def attention_share(self) -> float:
        """Share of the layers that have attention."""
        keys = self.family.qkv[-1]
        return min(1.0, sum(x.share for x in self.shape.linears if x.leaf == keys)) if self.family.mixer else 1.0

    @property
    def model_code_share(self) -> float:
        """Share of the active weights that are multiplied by modules of transformers in the fast step."""
        linears = (*self.mixer_linears, *(self.mlp_linears if self.family.moe else ()))
        return sum(x.active_weights for x in linears) / max(1, sum(x.active_weights for x in self.shape.linears))

    @property
    def dequantizes(self) -> bool:
        """True if some weights are dequantized for each matmul."""
        return self.base.scheme != "none" and self.base.resident_layers < self.shape.layers

    def replace(self, **changes: object) -> Workload:
        """Return a copy with these fields of `base`, `adapter` or `compute` changed."""
        groups: dict[str, Any] = {}
        for name in ("base", "adapter", "compute"):
            group = getattr(self, name)
            changed = {field.name: changes.pop(field.name) for field in fields(group) if field.name in changes}
            groups[name] = dataclasses.replace(group, **changed)
        if changes:
            raise TypeError(f"Workload has no {', '.join(changes)}")
        return Workload(**groups)

    def ranked_linears(self) -> zip[tuple[LinearShape, int]]:
        return zip(self.shape.linears, self.adapter.ranks, strict=True)


def num_checkpointed(setting: str | int, layers: int, *, all_or_none: bool = False) -> int:
    """Return the number of layers that are recomputed. all_or_none: a number as setting means all layers."""
    if isinstance(setting, int):
        return layers if all_or_none else min(setting, layers)
    return layers if setting in ("on", "offload") else 0


def why_not_offloaded(recipe: Recipe, shape: ModelShape) -> str | None:
    """Return why the inputs of layers cannot be kept in host memory, or None. The recipe's device must be known."""
    if not recipe.model.device.startswith("cuda"):
        return f"offloading gains nothing on {recipe.model.device}, which uses host memory"
    why = why_recipe_not_fast(recipe, shape)
    return None if why is None else f"offloading needs strop's fused kernels, which do not support this recipe ({why})"


def _num_trained_biases(lora: LoraSection, shape: ModelShape) -> int:
    if lora.bias != "lora_only":
        return shape.biases if lora.bias == "all" else 0
    names = _find_targets(shape, lora.target_modules)
    return shape.layers * sum(x.total_outputs for x in shape.linears if x.bias and x.name in names)


def _num_trained_in_full(lora: LoraSection, shape: ModelShape) -> int:
    """Return the number of weights in modules trained in full. As in PEFT, a name matches the end of a path."""
    names = tuple(lora.modules_to_save)
    if not names:
        return 0
    family = FAMILIES.get(shape.family, Family())
    norm = shape.hidden * (2 if family.norm_biases else 1)
    layer = {x.path: x.weights + x.total_outputs * x.bias for x in shape.linears} | dict.fromkeys(family.norms, norm)
    if shape.head_norms:
        layer |= {f"{family.attention}.{name}": shape.head_size for name in (family.q_norm, family.k_norm)}
    modules = [(f"model.layers.{n}.{path}", size) for n in range(shape.layers) for path, size in layer.items()]
    modules += [(f"model.{family.final_norm}", norm), *((name, shape.embedding_weights) for name in EMBEDDINGS)]
    return sum(size for path, size in modules if _is_fully_trained(path, names))


def _is_fully_trained(path: str, names: tuple[str, ...]) -> bool:
    """Return whether a module, or one that contains it, is trained in full."""
    return any(part.endswith(names) for part in accumulate(path.split("."), "{}.{}".format))


def _trains_head_norms(lora: LoraSection, shape: ModelShape) -> bool:
    family, names = FAMILIES.get(shape.family, Family()), tuple(lora.modules_to_save)
    paths = (f"{family.attention}.{family.q_norm}", f"{family.attention}.{family.k_norm}")
    named = any(name.rpartition(".")[2] in (family.q_norm, family.k_norm) for name in names)
    return named or (shape.head_norms and any(path.endswith(names) for path in paths if names))


def why_recipe_not_fast(recipe: Recipe, shape: ModelShape) -> str | None:
    """Return why the fast step cannot train this recipe, or None if it can. Its device must be known."""
    model, lora = recipe.model, recipe.lora
    if recipe.train.method == "full":
        why = why_config_not_fast(shape.text_config)
        return why or why_full_not_fast(shape.text_config, model.dtype)
    targets = _find_targets(shape, lora.target_modules)
    return why_config_not_fast(shape.text_config, lora=lora, targets=targets)


def bytes_if_converted(shape: ModelShape, dtype: str) -> int:
    """Return the bytes per stored weight if the files have another dtype, else 0."""
    stored = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(shape.stored_dtype, "bf16")
    return 0 if stored == dtype else BYTES[stored]


def _find_targets(shape: ModelShape, targets: str | list[str]) -> list[str]:
    """Return the leaf names of the target modules. For a family without known names: all linear layers."""
    try:
        return target_names(shape.linear_kinds(), targets)
    except ModelError:
        if shape.known:
            raise
        return [linear.name for linear in shape.linears]


def _find_layer_ranks(path: str, lora: LoraSection, layers: int) -> list[int]:
    """Return the adapter's rank on a module in each layer; 0 if the module is trained in full."""
    if not lora.rank_pattern and not lora.modules_to_save:
        return [lora.r] * layers
    paths, names = [f"model.layers.{n}.{path}" for n in range(layers)], tuple(lora.modules_to_save)
    return [0 if _is_fully_trained(full, names) else _find_rank(full, lora) for full in paths]


def _find_rank(path: str, lora: LoraSection) -> int:
    """Return the adapter's rank on a module. A pattern is a path suffix or a regular expression, as in PEFT."""
    return next((rank for pattern, rank in lora.rank_pattern.items() if matches_pattern(pattern, path)), lora.r)


def _count_extra_weights(
    recipe: Recipe, shape: ModelShape, mean_ranks: tuple[int, ...], layer_ranks: list[list[int]], head_rank: int
) -> int:
    """Return the number of trainable weights that are not in adapters on `shape.linears`."""
    lora = recipe.lora
    total = _num_trained_in_full(lora, shape) + head_rank * (shape.hidden + shape.vocabulary)
    for x, rank, ranks in zip(shape.linears, mean_ranks, layer_ranks, strict=True):
        total -= round(x.adapter_size * (shape.layers * rank - sum(ranks)))  # the rounding of the mean rank
        total += x.total_outputs * sum(map(bool, ranks)) if lora.use_dora else 0
    total += len(lora.new_tokens) * shape.hidden
    total += shape.vocabulary if lora.use_dora and head_rank else 0
    total += shape.hidden * count_score_outputs(recipe.train)
    total += shape.projector_weights if lora.vision != "none" else 0
    total += lora.r * shape.tower_sizes if lora.vision == "all" else 0
    return total + _num_trained_biases(lora, shape)


def check_paths(lora: LoraSection, shape: ModelShape) -> None:
    """Raise ModelError for a target or pattern that does not apply as written. Unknown families are not checked."""
    if not shape.known:
        return
    names = _find_targets(shape, lora.target_modules)
    paths = [f"model.layers.{n}.{x.path}" for n in range(shape.layers) for x in shape.linears if x.name in names]
    paths += [name for name in HEADS if name in names]
    check_lora_paths(lora, names, paths)
