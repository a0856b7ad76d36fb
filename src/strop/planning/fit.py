"""Fit a recipe to the memory of a machine: choose the options that decide it, or list the changes that would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from strop.config.load import Choice, Resolved
from strop.config.schema import Recipe
from strop.errors import RecipeError
from strop.models.families.shape import ModelShape
from strop.objectives.table import data_kind_of, max_completion_tokens, sequences_per_row
from strop.planning.activations import offloaded_bytes
from strop.planning.memory import load_phase, train_phase
from strop.planning.microbatch import MICRO_BATCH_TOKENS, largest_micro_batch, usual_micro_batch
from strop.planning.time import Rate, tokens_per_s
from strop.planning.workload import Workload, why_not_offloaded

GPU_MICRO_BATCH_TOKENS = (16384, 8192, 4096)  # tried on a GPU, where they fit without recomputation
MIN_LENGTH = 256  # tokens; shorter rows hold little of a conversation
GIB = 1 << 30
# How rows beyond a lowered data.max_length are cut, by what the objective learns from.
OVERLONG = {"turns": "split", "prompts": "drop"}


@dataclass(frozen=True)
class MemoryBudget:
    """A model, the memory that training it may use, and the speed of a CPU in a dtype (None on other devices)."""

    shape: ModelShape
    parameters: int
    usable: int
    devices: int = 1
    rate_of: Callable[[str], Rate] | None = None

    def workload(self, recipe: Recipe) -> Workload:
        return Workload.from_recipe(recipe, self.shape, parameters=self.parameters, devices=self.devices)

    def needed(self, recipe: Recipe, **changes: Any) -> int:
        """Return the bytes that training by this recipe needs, with these fields of its workload changed."""
        workload = self.workload(recipe).replace(**changes)
        batch = largest_micro_batch(recipe, workload)
        return max(train_phase(workload, batch).needed_bytes, load_phase(workload).needed_bytes)

    def fits(self, recipe: Recipe, **changes: Any) -> bool:
        return self.needed(recipe, **changes) <= self.usable

    def min_checkpointed(self, recipe: Recipe) -> int | None:
        """Return the fewest checkpointed layers with which the recipe fits, or None if it fits with no number."""
        layers = self.shape.layers
        return next((k for k in range(layers + 1) if self.fits(recipe, checkpointed_layers=k)), None)

    def compare(self, needed: int) -> str:
        """Return a clause on the needed and the usable memory, for the user."""
        return f"{needed / GIB:.1f} GiB needed at most, {self.usable / GIB:.1f} GiB usable"

    def tokens_per_s(self, recipe: Recipe, rate: Rate) -> float:
        """Return the predicted speed on one device, on rows of the maximum length."""
        workload = Workload.from_recipe(recipe, self.shape, parameters=self.parameters)
        return tokens_per_s(workload, usual_micro_batch(recipe), rate)


def fit(resolved: Resolved, budget: MemoryBudget) -> Resolved:
    for decide in (_lower_dtype, _quantize, _shrink_micro_batch, _grow_micro_batch, _apply_last_resorts):
        resolved = resolved.decide(decide(resolved, budget))
    return _fastest_micro_batch(resolved, budget)


def fit_devices(resolved: Resolved, budget: MemoryBudget) -> Resolved:
    """Choose the open options for several devices: the whole base on each if it fits, otherwise a share on each."""
    field, placement, blocker = "model.placement", resolved.recipe.model.placement, _why_not_sharded(resolved.recipe)
    if placement == "sharded" and blocker:
        raise RecipeError(f"--{field} sharded: not with {blocker}", fix="leave one of them out")
    if placement != "auto":
        return fit(resolved, budget)
    whole = fit(resolved.decide([Choice(field, "replicated", "plan", "fits whole on each device")]), budget)
    needed = budget.needed(whole.recipe)
    if needed <= budget.usable:
        return whole
    if blocker:
        why = f"would not fit, and cannot be sharded with {blocker}"
        return whole.decide([Choice(field, "replicated", "plan", why)])
    why = f"would not fit whole on each device: {budget.compare(needed)}"
    return fit(resolved.decide([Choice(field, "sharded", "plan", why)]), budget)


def default_micro_batch(recipe: Recipe) -> list[Choice]:
    """Return the choice of `train.micro_batch_tokens`, if the recipe leaves the micro-batch open."""
    if recipe.train.micro_batch is not None or recipe.train.micro_batch_tokens is not None:
        return []
    tokens = max(MICRO_BATCH_TOKENS, recipe.data.max_length)
    return [Choice("train.micro_batch_tokens", tokens, "plan", "large enough to keep the cores busy")]


def smaller_scheme(recipe: Recipe) -> str:
    """Return the quantization scheme for a base that would not fit in 16 bit."""
    return "int8" if recipe.train.int8_matmul else "nf4"


def _fastest_micro_batch(resolved: Resolved, budget: MemoryBudget) -> Resolved:
    """Lower `train.micro_batch_tokens` on a CPU if the predicted time per token, on the longest rows, falls."""
    # A smaller micro-batch leaves memory for recomputing fewer layers or dequantizing more of them once.
    best, field = _fill_memory(resolved, budget), "train.micro_batch_tokens"
    size, smallest = resolved.recipe.train.micro_batch_tokens, max(MIN_LENGTH, resolved.recipe.data.max_length)
    if budget.rate_of is None or size is None or resolved.choices[field].origin != "plan":
        return best
    rate = budget.rate_of(best.recipe.model.dtype)
    checkpointed = Workload.from_recipe(best.recipe, budget.shape).compute.checkpointed_layers
    seconds = first = 1 / budget.tokens_per_s(best.recipe, rate)
    while size > smallest:
        size = max(smallest, size // 2)
        candidate = _fill_memory(resolved.decide([Choice(field, size, "plan", "")]), budget)
        candidate_seconds = 1 / budget.tokens_per_s(candidate.recipe, rate)
        if candidate_seconds < seconds and budget.fits(candidate.recipe):
            compute = Workload.from_recipe(candidate.recipe, budget.shape).compute
            fewer = compute.checkpointed_layers < checkpointed
            gain = "less is recomputed" if fewer else "more layers are dequantized once"
            why = f"faster than a larger micro-batch here ({candidate_seconds / first:.2f} of the time): {gain}"
            best, seconds = candidate.decide([Choice(field, size, "plan", why)]), candidate_seconds
    return best


def _fill_memory(resolved: Resolved, budget: MemoryBudget) -> Resolved:
    """Choose resident layers and checkpointing for a given micro-batch, so that as much as possible is kept."""
    for decide in (_choose_resident_layers, _choose_checkpointing):
        resolved = resolved.decide(decide(resolved, budget))
    return resolved


def _why_not_sharded(recipe: Recipe) -> str | None:
    """Return the option that reads or trains weights of the base outside of its forward pass, or None."""
    lora = recipe.lora
    options = {
        "lora.use_dora": lora.use_dora, "lora.init loftq": lora.init == "loftq", "lora.new_tokens": lora.new_tokens,
        "lora.modules_to_save": lora.modules_to_save, "train.int8_matmul": recipe.train.int8_matmul,
    }  # fmt: skip
    return next((option for option, value in options.items() if value), None)


def _lower_dtype(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose bf16 if fp32, the faster dtype of this CPU, does not fit at its smallest."""
    recipe, field = resolved.recipe, "model.dtype"
    if recipe.model.dtype != "fp32" or resolved.choices[field].origin != "plan" or recipe.model.device != "cpu":
        return []
    scheme = "nf4" if _may_quantize(resolved) else recipe.model.quantization
    needed = budget.needed(_smallest(resolved), scheme=scheme, checkpointed_layers=budget.shape.layers)
    if needed <= budget.usable:
        return []
    return [Choice(field, "bf16", "plan", f"fp32 is faster here, but would not fit: {budget.compare(needed)}")]


def _quantize(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose 16 bit if it fits, with recomputation if need be, and otherwise a quantized base."""
    recipe, field = resolved.recipe, "model.quantization"
    if not _may_quantize(resolved):
        return []
    if budget.shape.prequantized:
        return [Choice(field, budget.shape.prequantized, "plan", "as the weights are stored on disk")]
    needed = budget.needed(_smallest(resolved), scheme="none", checkpointed_layers=budget.shape.layers)
    if needed <= budget.usable:
        why = f"16-bit weights fit: {budget.compare(needed)}"
        return [Choice(field, "none", "plan", why)] if recipe.model.quantization == "auto" else []
    return [Choice(field, smaller_scheme(recipe), "plan", f"16-bit weights would not fit: {budget.compare(needed)}")]


def _may_quantize(resolved: Resolved) -> bool:
    recipe = resolved.recipe
    default = resolved.choices["model.quantization"].origin == "default"
    return recipe.model.quantization == "auto" or (recipe.preset == "auto" and default and recipe.model.adapter is None)


def _smallest(resolved: Resolved) -> Recipe:
    """Return the recipe with one row per micro-batch, unless the user has set the micro-batch."""
    recipe = resolved.recipe
    if recipe.train.micro_batch is None:
        return _with_train(recipe, micro_batch_tokens=recipe.data.max_length)
    by_preset = resolved.choices["train.micro_batch"].origin == "preset"
    return _with_train(recipe, micro_batch=1) if by_preset else recipe


def _with_train(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _shrink_micro_batch(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Halve the micro-batch until it fits with every layer recomputed, down to one row of the maximum length."""
    recipe, layers = resolved.recipe, _max_checkpointed(resolved.recipe, budget)
    now = recipe.train.micro_batch or recipe.train.micro_batch_tokens or 0
    name, smallest = ("micro_batch", 1) if recipe.train.micro_batch else ("micro_batch_tokens", recipe.data.max_length)
    if resolved.choices[f"train.{name}"].origin != "plan" and resolved.choices["train.micro_batch"].origin != "preset":
        return []
    size = now
    while size > smallest and not budget.fits(recipe, checkpointed_layers=layers):
        size = max(smallest, size // 2)
        recipe = _with_train(recipe, **{name: size})
    if size == now:
        return []
    why = f"more would not fit: {budget.compare(budget.needed(resolved.recipe))}"
    return [Choice(f"train.{name}", size, "plan", why)]


def _grow_micro_batch(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose the largest micro-batch on a GPU that fits without recomputation, but no more than a step has."""
    recipe, field = resolved.recipe, "train.micro_batch_tokens"
    now = recipe.train.micro_batch_tokens
    if not recipe.model.device.startswith("cuda") or now is None or resolved.choices[field].origin != "plan":
        return []
    rows = recipe.train.batch_size * sequences_per_row(recipe.train)
    step_tokens = rows * (recipe.data.max_length + max_completion_tokens(recipe.train))
    for tokens in GPU_MICRO_BATCH_TOKENS:
        if now < tokens and tokens // 2 < step_tokens and budget.fits(_with_train(recipe, micro_batch_tokens=tokens)):
            return [Choice(field, tokens, "plan", "the largest that fits without recomputation, which is fastest")]
    return []


def _max_checkpointed(recipe: Recipe, budget: MemoryBudget) -> int:
    setting = recipe.train.gradient_checkpointing
    if setting in ("auto", "on", "offload"):
        return budget.shape.layers
    return setting if isinstance(setting, int) else 0


def _apply_last_resorts(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Offload, or use an 8-bit optimizer and then shorter rows, where unset; no choice if all of them do not fit."""
    recipe, layers = resolved.recipe, _max_checkpointed(resolved.recipe, budget)
    needed = budget.needed(recipe, checkpointed_layers=layers)
    if needed <= budget.usable:
        return []
    why = f"would not fit: {budget.compare(needed)}"
    may_offload = recipe.train.gradient_checkpointing == "auto" and why_not_offloaded(recipe, budget.shape) is None
    if may_offload and budget.fits(recipe, checkpointed_layers=layers, offload=True):
        why = f"{why} with the inputs of layers on the GPU"
        return [Choice("train.gradient_checkpointing", "offload", "plan", why)]
    is_open = {field: choice.origin == "default" for field, choice in resolved.choices.items()}
    values: dict[str, Any] = {"train.optimizer": "adamw_8bit"} if is_open["train.optimizer"] else {}
    length = recipe.data.max_length
    while True:
        choices = [Choice(field, value, "plan", why) for field, value in values.items()]
        if budget.fits(resolved.decide(choices).recipe, checkpointed_layers=layers):
            return choices
        if length <= MIN_LENGTH or not is_open["data.max_length"] or recipe.train.micro_batch is not None:
            return []
        length = max(MIN_LENGTH, length // 2)
        values["data.max_length"] = values["train.micro_batch_tokens"] = length
        if is_open["data.overlong"]:
            values["data.overlong"] = OVERLONG.get(data_kind_of(recipe.train), "truncate-start")


def _choose_resident_layers(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose how many quantized layers are dequantized once: as many as fit next to the saved activations."""
    recipe, field = resolved.recipe, "model.resident_layers"
    if recipe.model.quantization == "none" or recipe.model.resident_layers is not None:
        return []
    if recipe.model.placement == "sharded" and budget.devices > 1:
        return [Choice(field, 0, "plan", "fewer bytes to gather")]
    if recipe.train.int8_matmul:
        return [Choice(field, 0, "plan", "multiplied in 8 bit, as stored")]
    layers = next((k for k in range(budget.shape.layers, 0, -1) if budget.fits(recipe, resident_layers=k)), 0)
    why = "dequantized once: faster, in the memory of 16 bit" if layers else "no memory for 16-bit weights"
    return [Choice(field, layers, "plan", why)]


def _choose_checkpointing(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Checkpoint as few layers as fit. Each costs another forward pass, all of them about a third of the time."""
    recipe, field = resolved.recipe, "train.gradient_checkpointing"
    if recipe.train.gradient_checkpointing != "auto":
        return []
    layers, without = budget.min_checkpointed(recipe), budget.needed(recipe)
    if layers == 0:
        return [Choice(field, "off", "plan", f"fits: {budget.compare(without)}")]
    if layers is None:
        needed = budget.needed(recipe, checkpointed_layers=budget.shape.layers)
        return [Choice(field, "on", "plan", f"would not fit, and even with it: {budget.compare(needed)}")]
    # transformers checkpoints all layers or none
    plain = Workload.from_recipe(recipe, budget.shape).compute.step == "plain"
    value: Any = "on" if plain or layers == budget.shape.layers else layers
    return [Choice(field, value, "plan", f"would not fit: {budget.compare(without)} without")]


@dataclass(frozen=True)
class Rung:
    """One more change that makes a plan smaller."""

    what: str
    gives_up: str  # what it costs
    options: dict[str, Any]  # all options changed so far
    peak_bytes: int  # memory needed with these options
    fits: bool  # whether the plan fits with them
    time: float  # time per token, relative to the plan

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "time": round(self.time, 3)}


Changes = Iterator[tuple[str, str, dict[str, Any]]]  # (what, what it gives up, options) of each change


def list_rungs(recipe: Recipe, budget: MemoryBudget, rate: Rate) -> list[Rung]:
    """Return changes, the cheapest first, up to the first with which the plan fits, or else a smaller model."""
    rungs: list[Rung] = []
    options: dict[str, Any] = {}
    first, now = budget.tokens_per_s(recipe, rate), recipe
    for changes in (_checkpoint, _offload, _stream, _fewer_rows, _small_moments, _shorter_rows, _fewer_targets):
        for what, gives_up, changed in changes(now, budget):
            options |= changed
            now = _changed(now, changed)
            needed = budget.needed(now)
            time = first / budget.tokens_per_s(now, rate)
            rungs.append(Rung(what, gives_up, dict(options), needed, needed <= budget.usable, time))
            if rungs[-1].fits:
                return rungs
    needed = budget.needed(now)
    parameters = int(budget.parameters * budget.usable / max(1, needed))
    what = f"a model of at most about {parameters / 1e9:.1f} B parameters"
    smaller = Rung(what, "what a larger model can do", dict(options), needed, False, parameters / budget.parameters)
    return [*rungs, smaller]


def _checkpoint(recipe: Recipe, budget: MemoryBudget) -> Changes:
    layers = budget.shape.layers
    if Workload.from_recipe(recipe, budget.shape).compute.checkpointed_layers < layers:
        fewest = budget.min_checkpointed(recipe) or layers
        value: Any = "on" if fewest == layers else fewest
        what = f"recompute {fewest} of {layers} layers in the backward pass"
        yield what, "time", {"train.gradient_checkpointing": value}


def _offload(recipe: Recipe, budget: MemoryBudget) -> Changes:
    if recipe.train.gradient_checkpointing != "offload" and why_not_offloaded(recipe, budget.shape) is None:
        workload = Workload.from_recipe(recipe, budget.shape)
        workload = workload.replace(checkpointed_layers=budget.shape.layers, offload=True)
        size = offloaded_bytes(workload, largest_micro_batch(recipe, workload)) / GIB
        what = f"keep the inputs of layers in host memory: {size:.1f} GiB"
        yield what, "host memory", {"train.gradient_checkpointing": "offload"}


def _stream(recipe: Recipe, budget: MemoryBudget) -> Changes:
    now, fixed = recipe.model.quantization, budget.shape.prequantized
    schemes: list[str] = [now] if now not in ("none", "auto") and (recipe.model.resident_layers or 0) > 0 else []
    smaller = smaller_scheme(recipe)
    how = "multiplied as stored" if recipe.train.int8_matmul else "dequantized for each matmul"
    schemes += [smaller] if now in {"none", "auto", "int8"} - {smaller} and fixed is None else []
    for scheme in schemes:
        changed = {"model.quantization": scheme, "model.resident_layers": 0}
        yield f"store the base in {scheme}, {how}", "a little accuracy, and time", changed


def _fewer_rows(recipe: Recipe, budget: MemoryBudget) -> Changes:
    train, length = recipe.train, recipe.data.max_length
    rows = train.micro_batch or max(1, min(train.batch_size, (train.micro_batch_tokens or length) // length))
    while rows > 1:
        rows //= 2
        micro_batches = -(-train.batch_size // rows)
        field = "train.micro_batch" if train.micro_batch is not None else "train.micro_batch_tokens"
        changed = {field: rows if train.micro_batch is not None else rows * length}
        what = f"{rows} row{'s' * (rows > 1)} at once, {micro_batches} micro-batches per step"
        yield what, "time, where rows are short", changed


def _small_moments(recipe: Recipe, budget: MemoryBudget) -> Changes:
    if recipe.train.optimizer == "adamw":
        yield "the optimizer's moments in 8 bit", "a little accuracy", {"train.optimizer": "adamw_8bit"}


def _shorter_rows(recipe: Recipe, budget: MemoryBudget) -> Changes:
    length = recipe.data.max_length
    while length > MIN_LENGTH:
        length = max(MIN_LENGTH, length // 2)
        changed: dict[str, Any] = {"data.max_length": length}
        if recipe.data.overlong == "refuse":
            changed["data.overlong"] = OVERLONG.get(data_kind_of(recipe.train), "truncate-start")
        if recipe.train.micro_batch is None:
            changed["train.micro_batch_tokens"] = length
        yield f"rows of at most {length} tokens", "longer rows are split or left out", changed


def _fewer_targets(recipe: Recipe, budget: MemoryBudget) -> Changes:
    gives_up = "some of what the adapter can learn"
    if recipe.lora.target_modules != "attention":
        yield "adapters on attention only", gives_up, {"lora.target_modules": "attention"}
    if recipe.lora.r > 8:
        yield "rank 8", gives_up, {"lora.r": 8, "lora.alpha": 16.0}


def _changed(recipe: Recipe, options: dict[str, Any]) -> Recipe:
    tree = recipe.model_dump()
    for field, value in options.items():
        section, _, name = field.partition(".")
        tree[section][name] = value
    return Recipe.model_validate(tree)
