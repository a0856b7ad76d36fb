"""What memory and time depend on besides the rows: the model's shape and how it is stored, adapted and computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from strop.config.schema import LoraSection, Recipe
from strop.engine.eligibility import why_config_not_fast
from strop.errors import ModelError, nearest
from strop.machine.probe import TILED_RANK, probe
from strop.models.families.shape import EMBEDDINGS, LinearShape, ModelShape, matches_pattern, target_names
from strop.models.families.table import FAMILIES, Family

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEADS = ("lm_head", "embed_out")  # of EMBEDDINGS
BITS = {"nf4": 4.0, "fp4": 4.0, "int8": 8.0}


@dataclass(frozen=True)
class Setting:
    """One way to train a model. ranks: of the adapter on each of shape.linears, 0 where there is none.

    element: bytes of a number in the type that is computed in. whole: weights that are trained and are not of these
    adapters: in full, biases, DoRA's magnitudes, an adapter on the head (its rank: head_rank). whole_head,
    whole_embedding, whole_head_norms (of q and k): these are trained in full. more_tokens: the embedding grows. step:
    fast or plain, as engine.step decides. tiles: the fast step's attention runs in tiles; own_products: it multiplies
    by the head's weight itself. shards: devices that hold a share of the base each; 1: each holds all of it. offload:
    inputs of layers that are computed again wait in the host's memory. integers: frozen weights are multiplied in 8-bit
    integers.
    """

    shape: ModelShape
    parameters: int
    device: str = "cpu"
    element: int = 2
    scheme: str = "none"
    double: bool = True
    resident_layers: int = 0
    ranks: tuple[int, ...] = ()
    whole: int = 0
    optimizer: str = "adamw"
    checkpoint_layers: int = 0
    step: str = "fast"
    threads: int = 2
    tiles: bool = False
    own_products: bool = False
    dropout: bool = False
    dora: bool = False
    shards: int = 1
    offload: bool = False
    head_rank: int = 0
    whole_head: bool = False
    whole_embedding: bool = False
    whole_head_norms: bool = False
    more_tokens: bool = False
    integers: bool = False

    @staticmethod
    def of(
        recipe: Recipe, shape: ModelShape, parameters: int | None = None, threads: int = 2, devices: int = 1
    ) -> Setting:
        """From a recipe whose device and type are chosen; what else is open counts as what needs least."""
        model, lora, train = recipe.model, recipe.lora, recipe.train
        names = _targets(shape, lora.target_modules)
        by_layer = [_ranks(x.path, lora, shape.layers) if x.name in names else [] for x in shape.linears]
        ranks = tuple(-(-sum(own) // shape.layers) for own in by_layer)  # the mean, where layers differ
        device = model.device.partition(":")[0]
        scheme = model.quantization if model.quantization != "auto" else "none"
        resident = 0 if scheme == "none" else min(shape.layers, model.resident_layers or 0)
        head_rank = _rank("lm_head", lora.r, lora.rank_pattern) if "lm_head" in names else 0
        whole = trained_in_full(lora, shape) + head_rank * (shape.hidden + shape.vocabulary)
        for x, rank, own in zip(shape.linears, ranks, by_layer, strict=True):
            whole -= x.adapter_size * (shape.layers * rank - sum(own))  # what the mean was rounded up by
        whole += len(lora.new_tokens) * shape.hidden
        if lora.use_dora:
            whole += sum(x.total_outputs * sum(map(bool, own)) for x, own in zip(shape.linears, by_layer, strict=True))
            whole += shape.vocabulary if head_rank else 0
        whole += shape.hidden if train.objective == "reward" else 0  # its head
        whole += trained_biases(lora, shape)
        plain = why_plain(recipe, shape) is not None
        return Setting(
            shape,
            parameters or shape.parameters,
            device,
            BYTES.get(model.dtype, 2),
            scheme,
            model.double_quantization,
            resident,
            ranks,
            whole,
            train.optimizer,
            num_checkpointed(train.gradient_checkpointing, shape.layers, whole=plain),
            "plain" if plain else "fast",
            threads,
            device == "cpu" and model.dtype == "bf16" and probe().has_tiled_attention(shape.head_size),
            device == "cpu" and model.dtype == "bf16" and probe().has_bf16_matmul((shape.hidden, shape.vocabulary)),
            lora.dropout > 0,
            lora.use_dora,
            devices if model.placement == "sharded" else 1,
            train.gradient_checkpointing == "offload",
            head_rank,
            any(name in HEADS for name in lora.modules_to_save),
            any(name in EMBEDDINGS and name not in HEADS for name in lora.modules_to_save),
            _head_norms_in_full(lora, shape),
            bool(lora.new_tokens),
            train.int8_matmul,
        )

    @property
    def adapter_weights(self) -> int:
        """Trainable numbers: A (r, in) and B (out, r) of each adapted layer, and what is trained in full."""
        layer = sum(rank * x.adapter_size for x, rank in zip(self.shape.linears, self.ranks, strict=True))
        return self.shape.layers * layer + self.whole

    @property
    def active_adapter_weights(self) -> int:
        """Those of them that a token goes through: adapters of experts that it does not choose are left out."""
        linears = zip(self.shape.linears, self.ranks, strict=True)
        return self.adapter_weights - self.shape.layers * round(
            sum((1 - x.active) * x.adapter_size * r for x, r in linears)
        )

    @property
    def expert_adapter_weights(self) -> int:
        linears = zip(self.shape.linears, self.ranks, strict=True)
        return self.shape.layers * sum(r * x.adapter_size for x, r in linears if x in self.shape.expert_linears)

    @property
    def tiled_lora(self) -> bool:
        """The fast step computes the adapters' products itself (engine.cpu.lora_tiles)."""
        return self.step == "fast" and self.tiles and max(self.ranks, default=0) <= TILED_RANK

    @property
    def flash(self) -> bool:
        """Flash attention on a card keeps its output alone (engine.card.attention); cards without bf16 have none."""
        return self.device == "cuda" and self.element == 2

    @property
    def operand_weights(self) -> int:
        """Numbers of the adapters as a card lays them out in the type that is computed in, zeros included: those on one
        input stand beside each other for all of its outputs (engine.card.lora)."""
        of = {x.name: (rank, x) for x, rank in zip(self.shape.linears, self.ranks, strict=True) if rank}
        total, groups = 0, (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
        for group in groups:
            found = [of.pop(name) for name in group if name in of]
            total += sum(rank * x.inputs for rank, x in found)
            total += sum(rank for rank, _ in found) * sum(x.outputs for _, x in found)
        return self.shape.layers * (total + sum(rank * x.adapter_size for rank, x in of.values()))

    @property
    def family(self) -> Family:
        return FAMILIES.get(self.shape.family, Family())

    @property
    def behind(self) -> tuple[LinearShape, ...]:
        """The linear layers of the MLP, and experts."""
        row, experts = self.family, self.shape.expert_linears
        return tuple(x for x in self.shape.linears if x.leaf in (*row.gate_up, row.down) or x in experts)

    @property
    def mixed(self) -> tuple[LinearShape, ...]:
        """Those of what stands in attention's place in some layers."""
        row, behind = self.family, self.behind
        others = (x for x in self.shape.linears if x not in behind) if row.mixer else ()
        return tuple(x for x in others if x.leaf not in (*row.qkv, row.o) or x.path.startswith(f"{row.mixer}."))

    @property
    def attended(self) -> float:
        """Share of the layers that have attention."""
        keys = self.family.qkv[-1]
        return min(1.0, sum(x.share for x in self.shape.linears if x.leaf == keys)) if self.family.mixer else 1.0

    @property
    def by_model(self) -> str:
        """What the model's own modules compute in the fast step."""
        return self.family.model_parts

    @property
    def shares(self) -> bool:
        """The fast step computes once what rows begin with in common."""
        return self.family.mixer is None

    @property
    def weights_by_model(self) -> float:
        """Share of the active weights that the model's own modules compute in the fast step."""
        own = (*self.mixed, *(self.behind if self.family.moe else ()))
        return sum(x.active_weights for x in own) / max(1, sum(x.active_weights for x in self.shape.linears))

    @property
    def streamed(self) -> bool:
        """Some weights are dequantized for each product."""
        return self.scheme != "none" and self.resident_layers < self.shape.layers

    def but(self, **changes: object) -> Setting:
        return replace(self, **changes)  # type: ignore[arg-type]


def num_checkpointed(asked: str | int, layers: int, *, whole: bool = False) -> int:
    """Layers that are computed again in the backward: on or offload (all), off or auto (none), or a number of them.

    whole: all or none, as transformers does it.
    """
    if isinstance(asked, int):
        return layers if whole else min(asked, layers)
    return layers if asked in ("on", "offload") else 0


def why_not_offloaded(recipe: Recipe, shape: ModelShape) -> str | None:
    """Why inputs of layers cannot wait in the host's memory; recipe: with its device chosen."""
    if not recipe.model.device.startswith("cuda"):
        return f"nothing is gained on {recipe.model.device}, whose memory is the host's"
    plain = why_plain(recipe, shape)
    return None if plain is None else f"the plain step cannot, which trains this ({plain})"


def trained_biases(lora: LoraSection, shape: ModelShape) -> int:
    """Numbers of the biases that are trained, as peft picks them: all that there are, or those of adapted layers."""
    if lora.bias != "lora_only":
        return shape.biases if lora.bias == "all" else 0
    names = _targets(shape, lora.target_modules)
    return shape.layers * sum(x.total_outputs for x in shape.linears if x.bias and x.name in names)


def trained_in_full(lora: LoraSection, shape: ModelShape) -> int:
    """Numbers of the modules that are trained in full, as peft picks them: by the end of their path; with all that is
    in them."""
    names = tuple(lora.modules_to_save)
    if not names:
        return 0
    row = FAMILIES.get(shape.family, Family())
    norm = shape.hidden * (2 if row.norm_biases else 1)
    layer = {x.path: x.weights + x.total_outputs * x.bias for x in shape.linears} | dict.fromkeys(row.norms, norm)
    if shape.head_norms:
        layer |= {f"{row.attention}.{name}": shape.head_size for name in (row.q_norm, row.k_norm)}
    modules = [(f"model.layers.{n}.{path}", size) for n in range(shape.layers) for path, size in layer.items()]
    modules += [(f"model.{row.final_norm}", norm), *((name, shape.embedding) for name in EMBEDDINGS)]
    return sum(size for path, size in modules if _is_in_full(path, names))


def _is_in_full(path: str, names: tuple[str, ...]) -> bool:
    """Whether a module, or one that it is in, is trained in full."""
    return any(part.endswith(names) for part in accumulate(path.split("."), "{}.{}".format))


def _head_norms_in_full(lora: LoraSection, shape: ModelShape) -> bool:
    """Whether norms of q or k are among them: named so, or by what their names end with."""
    row, names = FAMILIES.get(shape.family, Family()), tuple(lora.modules_to_save)
    own = (f"{row.attention}.{row.q_norm}", f"{row.attention}.{row.k_norm}")
    asked = any(name.rpartition(".")[2] in (row.q_norm, row.k_norm) for name in names)
    return asked or (shape.head_norms and any(path.endswith(names) for path in own if names))


def why_plain(recipe: Recipe, shape: ModelShape) -> str | None:
    """Return why the fast step cannot train this recipe, or None if it can. recipe: with its device chosen."""
    model, lora = recipe.model, recipe.lora
    targets = _targets(shape, lora.target_modules)
    return why_config_not_fast(shape.text_config, device=model.device, dtype=model.dtype, lora=lora, targets=targets)


def _targets(shape: ModelShape, targets: str | list[str]) -> list[str]:
    """Leaf names; all of a model whose family is not in the table, where its config does not name them."""
    try:
        return target_names(shape.linear_kinds(), targets)
    except ModelError:
        if shape.known:
            raise
        return [linear.name for linear in shape.linears]


def _ranks(path: str, lora: LoraSection, layers: int) -> list[int]:
    """Of the adapter on a layer's module in each layer; 0 where it is trained in full."""
    if not lora.rank_pattern and not lora.modules_to_save:
        return [lora.r] * layers
    paths, names = [f"model.layers.{n}.{path}" for n in range(layers)], tuple(lora.modules_to_save)
    return [0 if _is_in_full(one, names) else _rank(one, lora.r, lora.rank_pattern) for one in paths]


def _rank(path: str, rank: int, patterns: dict[str, int]) -> int:
    """As peft picks it: by a suffix of the module's path, or a regular expression for one."""
    return next((other for pattern, other in patterns.items() if matches_pattern(pattern, path)), rank)


def check_names(lora: LoraSection, shape: ModelShape) -> None:
    """Raises ModelError for a rank or an alpha of no layer that has an adapter, as a run does; of families in the
    table, whose paths are known."""
    names = _targets(shape, lora.target_modules)
    paths = [f"model.layers.{n}.{x.path}" for n in range(shape.layers) for x in shape.linears if x.name in names]
    paths += [name for name in HEADS if name in names]
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns if shape.known else ():
            if not any(matches_pattern(pattern, path) for path in paths):
                what = f"lora.{field}: {pattern} matches no layer with an adapter{nearest(pattern, names)}"
                raise ModelError(what, fix=f"the adapters are on {', '.join(names)}")
