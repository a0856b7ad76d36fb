"""The facts about a fine-tuning run that decide its memory and time: model sizes, storage, adapters, computation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

from strop.config.schema import LoraSection, Recipe
from strop.engine.eligibility import why_config_not_fast
from strop.errors import ModelError, nearest
from strop.machine.probe import TILED_RANK, probe
from strop.models.families.shape import EMBEDDINGS, LinearShape, ModelShape, matches_pattern, target_names
from strop.models.families.table import FAMILIES, Family

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEADS = ("lm_head", "embed_out")  # the output heads among EMBEDDINGS
BITS = {"nf4": 4.0, "fp4": 4.0, "int8": 8.0}
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that the fast step multiplies by at once


@dataclass(frozen=True, kw_only=True)
class BaseWeights:
    shape: ModelShape
    parameters: int
    scheme: str = "none"  # quantization scheme, or "none"
    double_quantization: bool = True  # quantization constants are quantized too (4-bit schemes)
    resident_layers: int = 0  # quantized layers that are dequantized once instead of for each matmul
    shards: int = 1  # number of devices that hold one share of the base each; 1 if each device holds all of it


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    ranks: tuple[int, ...] = ()  # LoRA rank on each of `shape.linears`; 0 for a layer without an adapter
    extra_weights: int = 0  # others: modules trained in full, biases, DoRA magnitudes, the head's adapter
    head_rank: int = 0  # LoRA rank on the output head; 0 without an adapter
    dropout: bool = False
    dora: bool = False
    full_head: bool = False  # the output head is trained in full
    full_embedding: bool = False  # the input embedding is trained in full
    full_head_norms: bool = False  # norms of queries or keys are trained in full
    new_tokens: bool = False  # the embedding gets new rows


@dataclass(frozen=True, kw_only=True)
class Compute:
    device: str = "cpu"
    dtype_bytes: int = 2  # bytes per value of the compute dtype
    step: str = "fast"  # fast or plain, as `strop.engine.step` chooses it
    threads: int = 2
    attention_tiles: bool = False  # the fast step computes attention in tiles (CPU, bf16)
    own_head_matmul: bool = False  # the fast step multiplies by the head's weight with strop's kernel (CPU, bf16)
    int8_matmul: bool = False  # frozen weights are multiplied in 8-bit integers
    checkpointed_layers: int = 0  # number of layers that are recomputed in the backward pass
    offload: bool = False  # inputs of recomputed layers are kept in host memory
    optimizer: str = "adamw"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One way to train a model: its base, its trainable weights, and how a step is computed."""

    base: BaseWeights
    adapter: AdapterWeights = AdapterWeights()
    compute: Compute = Compute()

    @staticmethod
    def from_recipe(
        recipe: Recipe, shape: ModelShape, *, parameters: int | None = None, threads: int = 2, devices: int = 1
    ) -> Workload:
        """Return the workload of a recipe with a chosen device and dtype. Other open options: the least memory."""
        model, lora, train = recipe.model, recipe.lora, recipe.train
        names = _targets(shape, lora.target_modules)
        layer_ranks = [_ranks(x.path, lora, shape.layers) if x.name in names else [] for x in shape.linears]
        device = model.device.partition(":")[0]
        scheme = model.quantization if model.quantization != "auto" else "none"
        plain = why_plain(recipe, shape) is not None
        bf16_cpu = device == "cpu" and model.dtype == "bf16"
        # Where layers have different ranks, the mean, rounded up; `_extra_weights` corrects the rounding.
        ranks = tuple(-(-sum(ranks) // shape.layers) for ranks in layer_ranks)
        head_rank = _rank("lm_head", lora) if "lm_head" in names else 0
        return Workload(
            base=BaseWeights(
                shape=shape,
                parameters=parameters or shape.parameters,
                scheme=scheme,
                double_quantization=model.double_quantization,
                resident_layers=0 if scheme == "none" else min(shape.layers, model.resident_layers or 0),
                shards=devices if model.placement == "sharded" else 1,
            ),
            adapter=AdapterWeights(
                ranks=ranks,
                extra_weights=_extra_weights(recipe, shape, ranks, layer_ranks, head_rank),
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
                step="plain" if plain else "fast",
                threads=threads,
                attention_tiles=bf16_cpu and probe().has_tiled_attention(shape.head_size),
                own_head_matmul=bf16_cpu and probe().has_bf16_matmul((shape.hidden, shape.vocabulary)),
                int8_matmul=train.int8_matmul,
                checkpointed_layers=num_checkpointed(train.gradient_checkpointing, shape.layers, all_or_none=plain),
                offload=train.gradient_checkpointing == "offload",
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
        return self.shape.layers * layer + self.adapter.extra_weights

    @property
    def active_adapter_weights(self) -> int:
        """Number of trainable weights that one token uses: adapters of experts it does not choose are left out."""
        inactive = round(sum((1 - x.active) * x.adapter_size * rank for x, rank in self.ranked_linears()))
        return self.adapter_weights - self.shape.layers * inactive

    @property
    def expert_adapter_weights(self) -> int:
        experts = self.shape.expert_linears
        return self.shape.layers * sum(rank * x.adapter_size for x, rank in self.ranked_linears() if x in experts)

    @property
    def tiled_lora(self) -> bool:
        """True if the fast step computes the adapters' matmuls with strop's CPU kernels."""
        compute = self.compute
        return compute.step == "fast" and compute.attention_tiles and max(self.adapter.ranks, default=0) <= TILED_RANK

    @property
    def flash_attention(self) -> bool:
        """True if attention keeps only its output: flash attention on a GPU, in 16 bit."""
        return self.compute.device == "cuda" and self.compute.dtype_bytes == 2

    @property
    def gpu_operand_weights(self) -> int:
        """Number of adapter values in the compute dtype on a GPU, with the zeros between joined adapters."""
        adapted = {x.name: (rank, x) for x, rank in self.ranked_linears() if rank}
        total = 0
        for group in JOINED:
            joined = [adapted.pop(name) for name in group if name in adapted]
            total += sum(rank * x.inputs for rank, x in joined)
            total += sum(rank for rank, _ in joined) * sum(x.outputs for _, x in joined)
        return self.shape.layers * (total + sum(rank * x.adapter_size for rank, x in adapted.values()))

    @property
    def family(self) -> Family:
        return FAMILIES.get(self.shape.family, Family())

    @property
    def mlp_linears(self) -> tuple[LinearShape, ...]:
        family, experts = self.family, self.shape.expert_linears
        return tuple(x for x in self.shape.linears if x.leaf in (*family.gate_up, family.down) or x in experts)

    @property
    def mixer_linears(self) -> tuple[LinearShape, ...]:
        """Linear layers of the module that takes attention's place in some layers (linear attention, Mamba, ...)."""
        family, mlp = self.family, self.mlp_linears
        others = (x for x in self.shape.linears if x not in mlp) if family.mixer else ()
        attention, prefix = (*family.qkv, family.o), f"{family.mixer}."
        return tuple(x for x in others if x.leaf not in attention or x.path.startswith(prefix))

    @property
    def attention_share(self) -> float:
        keys = self.family.qkv[-1]
        return min(1.0, sum(x.share for x in self.shape.linears if x.leaf == keys)) if self.family.mixer else 1.0

    @property
    def model_code_share(self) -> float:
        """Share of the active weights that the fast step leaves to the model's own modules."""
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
    """Return how many layers `train.gradient_checkpointing` recomputes; all_or_none: as in transformers."""
    if isinstance(setting, int):
        return layers if all_or_none else min(setting, layers)
    return layers if setting in ("on", "offload") else 0


def why_not_offloaded(recipe: Recipe, shape: ModelShape) -> str | None:
    """Return why inputs of layers cannot be kept in host memory, or None. The recipe's device is chosen."""
    if not recipe.model.device.startswith("cuda"):
        return f"offloading gains nothing on {recipe.model.device}, which uses host memory"
    plain = why_plain(recipe, shape)
    return None if plain is None else f"the plain step does not offload, and it trains this recipe ({plain})"


def _num_trained_biases(lora: LoraSection, shape: ModelShape) -> int:
    """Return the number of trained bias values, chosen as peft does: all biases, or those of adapted layers."""
    if lora.bias != "lora_only":
        return shape.biases if lora.bias == "all" else 0
    names = _targets(shape, lora.target_modules)
    return shape.layers * sum(x.total_outputs for x in shape.linears if x.bias and x.name in names)


def _num_trained_in_full(lora: LoraSection, shape: ModelShape) -> int:
    """Return the number of weights in modules trained in full, matched as peft does: by the end of the module path."""
    names = tuple(lora.modules_to_save)
    if not names:
        return 0
    family = FAMILIES.get(shape.family, Family())
    norm = shape.hidden * (2 if family.norm_biases else 1)
    layer = {x.path: x.weights + x.total_outputs * x.bias for x in shape.linears} | dict.fromkeys(family.norms, norm)
    if shape.head_norms:
        layer |= {f"{family.attention}.{name}": shape.head_size for name in (family.q_norm, family.k_norm)}
    modules = [(f"model.layers.{n}.{path}", size) for n in range(shape.layers) for path, size in layer.items()]
    modules += [(f"model.{family.final_norm}", norm), *((name, shape.embedding) for name in EMBEDDINGS)]
    return sum(size for path, size in modules if _is_in_full(path, names))


def _is_in_full(path: str, names: tuple[str, ...]) -> bool:
    """Return whether a module, or a module that contains it, is trained in full."""
    return any(part.endswith(names) for part in accumulate(path.split("."), "{}.{}".format))


def _trains_head_norms(lora: LoraSection, shape: ModelShape) -> bool:
    """Return whether norms of queries or keys are trained in full, matched as peft does."""
    family, names = FAMILIES.get(shape.family, Family()), tuple(lora.modules_to_save)
    paths = (f"{family.attention}.{family.q_norm}", f"{family.attention}.{family.k_norm}")
    named = any(name.rpartition(".")[2] in (family.q_norm, family.k_norm) for name in names)
    return named or (shape.head_norms and any(path.endswith(names) for path in paths if names))


def why_plain(recipe: Recipe, shape: ModelShape) -> str | None:
    """Return why the fast step cannot train this recipe, or None if it can. recipe: with its device chosen."""
    model, lora = recipe.model, recipe.lora
    targets = _targets(shape, lora.target_modules)
    return why_config_not_fast(shape.text_config, device=model.device, dtype=model.dtype, lora=lora, targets=targets)


def _targets(shape: ModelShape, targets: str | list[str]) -> list[str]:
    """Return the leaf names of the target modules; of an unknown family whose config does not name them, all."""
    try:
        return target_names(shape.linear_kinds(), targets)
    except ModelError:
        if shape.known:
            raise
        return [linear.name for linear in shape.linears]


def _ranks(path: str, lora: LoraSection, layers: int) -> list[int]:
    """Return the adapter's rank on this module in each layer; 0 where the module is trained in full."""
    if not lora.rank_pattern and not lora.modules_to_save:
        return [lora.r] * layers
    paths, names = [f"model.layers.{n}.{path}" for n in range(layers)], tuple(lora.modules_to_save)
    return [0 if _is_in_full(full, names) else _rank(full, lora) for full in paths]


def _rank(path: str, lora: LoraSection) -> int:
    """Return the rank that peft chooses for a module path; a pattern is a path suffix or a regular expression."""
    return next((rank for pattern, rank in lora.rank_pattern.items() if matches_pattern(pattern, path)), lora.r)


def _extra_weights(
    recipe: Recipe, shape: ModelShape, mean_ranks: tuple[int, ...], layer_ranks: list[list[int]], head_rank: int
) -> int:
    """Return the number of trainable weights that are not in adapters on `shape.linears`."""
    lora = recipe.lora
    total = _num_trained_in_full(lora, shape) + head_rank * (shape.hidden + shape.vocabulary)
    for x, rank, ranks in zip(shape.linears, mean_ranks, layer_ranks, strict=True):
        total -= x.adapter_size * (shape.layers * rank - sum(ranks))  # the rounding of the mean rank
        total += x.total_outputs * sum(map(bool, ranks)) if lora.use_dora else 0
    total += len(lora.new_tokens) * shape.hidden
    total += shape.vocabulary if lora.use_dora and head_rank else 0
    total += shape.hidden if recipe.train.objective == "reward" else 0  # the score head
    return total + _num_trained_biases(lora, shape)


def check_patterns(lora: LoraSection, shape: ModelShape) -> None:
    """Raise ModelError for a rank or alpha pattern that matches no adapter, for families with known module paths."""
    names = _targets(shape, lora.target_modules)
    paths = [f"model.layers.{n}.{x.path}" for n in range(shape.layers) for x in shape.linears if x.name in names]
    paths += [name for name in HEADS if name in names]
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns if shape.known else ():
            if not any(matches_pattern(pattern, path) for path in paths):
                what = f"lora.{field}: {pattern} matches no layer with an adapter{nearest(pattern, names)}"
                raise ModelError(what, fix=f"the adapters are on {', '.join(names)}")
