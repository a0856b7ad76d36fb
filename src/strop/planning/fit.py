"""Fit a recipe to a machine's memory: choose the options that affect memory, or suggest changes to the recipe."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from strop.config.load import Choice, Resolved
from strop.config.schema import Recipe
from strop.errors import RecipeError
from strop.models.families.shape import ModelShape
from strop.objectives.table import data_kind_of, longest_sequence, sequences_per_row
from strop.planning.activations import offloaded_bytes
from strop.planning.memory import MIB, PROCESS_BYTES, format_sizes, load_phase, train_phase
from strop.planning.microbatch import MICRO_BATCH_TOKENS, Rows, largest_micro_batch, mean_micro_batch
from strop.planning.time import DISK_BYTES_PER_S, HOST_BYTES_PER_S, Rate, stream_rate, tokens_per_s
from strop.planning.workload import Workload, num_checkpointed, why_not_offloaded

GPU_MICRO_BATCH_TOKENS = (16384, 8192, 4096)  # tried on a GPU, where they fit without recomputation
HOST_SHARE = 0.8  # of the rate between GPU and host, up to which a run does not wait for a streamed base
MIN_LENGTH = 256  # minimum data.max_length that is chosen or suggested
GIB = 1 << 30
MIN_MODEL_SHARE = 0.02  # of the parameters, of a smaller model that is suggested
GPU_RESERVE, GPU_RESERVE_SHARE = 3 * GIB // 2, 0.08  # bytes that resident layers leave free on a GPU
# data.overlong for a lowered data.max_length, by the kind of data of the objective.
OVERLONG = {"turns": "split", "prompts": "drop"}


@dataclass(frozen=True)
class MemoryBudget:
    """A model, and the memory in bytes that training it may use."""

    shape: ModelShape
    parameters: int
    usable: int
    devices: int = 1
    rate_of: Callable[[str], Rate] | None = None  # returns the speed of a CPU or a CUDA GPU in a dtype
    compare_speeds: bool = True  # choose the fastest micro-batch on a CPU
    rows: Rows | None = None  # None: they may all have the maximum length

    def workload(self, recipe: Recipe) -> Workload:
        return Workload.from_recipe(recipe, self.shape, parameters=self.parameters, devices=self.devices)

    def needed(self, recipe: Recipe, **changes: Any) -> int:
        """Return the bytes that a recipe needs. changes: fields of its workload to change first."""
        workload = self.workload(recipe).replace(**changes)
        rows = self.rows and self.rows.cut(longest_sequence(recipe))
        batch = largest_micro_batch(recipe, workload, rows)
        return max(train_phase(workload, batch).needed_bytes, load_phase(workload).needed_bytes)

    def fits(self, recipe: Recipe, *, reserve: int = 0, **changes: Any) -> bool:
        """Return whether a recipe fits, and leaves `reserve` bytes."""
        return self.needed(recipe, **changes) <= self.usable - reserve

    def min_checkpointed(self, recipe: Recipe) -> int | None:
        """Return the minimum number of checkpointed layers with which the recipe fits, or None."""
        layers = self.shape.layers
        return next((k for k in range(layers + 1) if self.fits(recipe, checkpointed_layers=k)), None)

    def waits_for_base(self, recipe: Recipe) -> bool:
        """Return whether a recipe may need longer to read its streamed base than to compute."""
        assert self.rate_of is not None, "a base is streamed on a CPU or a CUDA GPU"
        rate, workload = self.rate_of(recipe.model.dtype), self.workload(recipe)
        limit = HOST_SHARE * HOST_BYTES_PER_S if rate.gpu else DISK_BYTES_PER_S
        return stream_rate(workload, mean_micro_batch(recipe), rate) > limit

    def describe(self, needed: int) -> str:
        required, usable = format_sizes(needed, self.usable)
        return f"{required} needed if every row had max_length, {usable} usable"

    def tokens_per_s(self, recipe: Recipe, rate: Rate) -> float:
        """Predict the speed of one device on rows of the maximum length."""
        workload = Workload.from_recipe(recipe, self.shape, parameters=self.parameters)
        return tokens_per_s(workload, mean_micro_batch(recipe), rate)


def fit(resolved: Resolved, budget: MemoryBudget) -> Resolved:
    rules = (
        _choose_bf16,
        _stream_16_bit,
        _choose_quantization,
        _stream,
        _shrink_micro_batch,
        _grow_micro_batch,
        _grow_streamed_micro_batch,
        _apply_last_resorts,
    )
    for choose in rules:
        resolved = resolved.decide(choose(resolved, budget))
    return _choose_fastest_micro_batch(resolved, budget)


def fit_devices(resolved: Resolved, budget: MemoryBudget) -> Resolved:
    """Choose options for several devices, which replicate the base if it fits and otherwise shard it."""
    field, placement, blocker = "model.placement", resolved.recipe.model.placement, _needs_all_weights(resolved.recipe)
    if placement == "sharded" and blocker:
        raise RecipeError(f"--{field} sharded: not with {blocker}", fix="leave one of them out")
    if placement != "auto":
        return fit(resolved, budget)
    if resolved.recipe.train.method == "full":
        choice = Choice(field, "replicated", "plan", "all weights are trained on each device")
        return fit(resolved.decide([choice]), budget)
    whole = fit(resolved.decide([Choice(field, "replicated", "plan", "fits whole on each device")]), budget)
    needed = budget.needed(whole.recipe)
    if needed <= budget.usable:
        return whole
    if blocker:
        why = f"would not fit, and cannot be sharded with {blocker}"
        return whole.decide([Choice(field, "replicated", "plan", why)])
    why = f"would not fit whole on each device: {budget.describe(needed)}"
    return fit(resolved.decide([Choice(field, "sharded", "plan", why)]), budget)


def default_micro_batch(recipe: Recipe) -> list[Choice]:
    """Choose `train.micro_batch_tokens`, if the recipe sets no micro-batch size."""
    if recipe.train.micro_batch is not None or recipe.train.micro_batch_tokens is not None:
        return []
    tokens = max(MICRO_BATCH_TOKENS, recipe.data.max_length)
    return [Choice("train.micro_batch_tokens", tokens, "plan", "large enough to keep the cores busy")]


def _choose_scheme(recipe: Recipe) -> str:
    """Return the quantization scheme for a base that would not fit in 16 bit."""
    return "int8" if recipe.train.int8_matmul else "nf4"


def _choose_fastest_micro_batch(resolved: Resolved, budget: MemoryBudget) -> Resolved:
    """Lower `train.micro_batch_tokens` on a CPU if that reduces the predicted time per token."""
    # A smaller micro-batch leaves memory to recompute fewer layers, or to dequantize more of them only once.
    best, field = _fill_memory(resolved, budget), "train.micro_batch_tokens"
    size, smallest = resolved.recipe.train.micro_batch_tokens, max(MIN_LENGTH, resolved.recipe.data.max_length)
    is_compared = budget.compare_speeds and budget.rate_of is not None and resolved.recipe.model.device == "cpu"
    if not is_compared or size is None or resolved.choices[field].origin != "plan":
        return best
    assert budget.rate_of is not None
    rate = budget.rate_of(best.recipe.model.dtype)
    checkpointed = Workload.from_recipe(best.recipe, budget.shape).compute.checkpointed_layers
    seconds = initial_seconds = 1 / budget.tokens_per_s(best.recipe, rate)
    while size > smallest:
        size = max(smallest, size // 2)
        candidate = _fill_memory(resolved.decide([Choice(field, size, "plan", "")]), budget)
        if candidate.recipe.model.placement == "streamed" and budget.waits_for_base(candidate.recipe):
            break
        candidate_seconds = 1 / budget.tokens_per_s(candidate.recipe, rate)
        if candidate_seconds < seconds and budget.fits(candidate.recipe):
            compute = Workload.from_recipe(candidate.recipe, budget.shape).compute
            fewer = compute.checkpointed_layers < checkpointed
            gain = "less is recomputed" if fewer else "more layers are dequantized once"
            share = candidate_seconds / initial_seconds
            why = f"faster than a larger micro-batch here ({share:.2f} of the time): {gain}"
            best, seconds = candidate.decide([Choice(field, size, "plan", why)]), candidate_seconds
    return best


def _fill_memory(resolved: Resolved, budget: MemoryBudget) -> Resolved:
    """Choose resident layers and checkpointing for a given micro-batch, to save as much recomputation as fits."""
    resolved = resolved.decide(_choose_resident_layers(resolved, budget))
    return resolved.decide(_choose_checkpointing(resolved, budget))


def why_not_streamed(recipe: Recipe, devices: int = 1) -> str | None:
    """Return why the base cannot be streamed from disk or host memory, or None. The recipe's device must be known."""
    model, blocker = recipe.model, _needs_all_weights(recipe)
    on_gpu = model.device.startswith("cuda")
    reasons = {
        f"on a CPU or CUDA, and the run is on {model.device}": model.device != "cpu" and not on_gpu,
        f"on a GPU not with {blocker}": on_gpu and blocker is not None,
        "on one GPU only": on_gpu and devices > 1,
        "not with train.method full": recipe.train.method == "full",
        "not with train.int8_matmul": recipe.train.int8_matmul,
        f"not with model.resident_layers {model.resident_layers}": bool(model.resident_layers),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _needs_all_weights(recipe: Recipe) -> str | None:
    """Return an option that needs the base's weights outside of its forward pass, or None."""
    lora = recipe.lora
    options = {
        "lora.use_dora": lora.use_dora, "lora.init loftq": lora.init == "loftq", "lora.new_tokens": lora.new_tokens,
        "lora.modules_to_save": lora.modules_to_save, "train.int8_matmul": recipe.train.int8_matmul,
    }  # fmt: skip
    return next((option for option, value in options.items() if value), None)


def _stream_16_bit(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose to stream a base in 16 bit on a CPU, rather than to quantize it without being asked to."""
    model = resolved.recipe.model
    may_stream = model.device == "cpu" and model.dtype != "fp32" and model.quantization == "none"
    return _stream(resolved, budget) if may_stream else []


def _stream(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose to stream a base, from disk or to a GPU from host memory, if it does not fit with layers recomputed."""
    recipe, field = resolved.recipe, "model.placement"
    if recipe.model.placement != "auto" or why_not_streamed(recipe) is not None:
        return []
    smallest, layers = _with_smallest_micro_batch(resolved), budget.shape.layers
    offloads = _may_offload(recipe, budget)
    needed = budget.needed(smallest, checkpointed_layers=layers, offload=offloads)
    if needed <= budget.usable:
        return []
    # What does not even fit in 4 bit is streamed in any case, because that needs the least.
    fits_packed = _may_quantize(resolved) and budget.fits(smallest, checkpointed_layers=layers, scheme="nf4")
    if fits_packed and not budget.fits(smallest, checkpointed_layers=layers, streamed=True):
        return []
    return [Choice(field, "streamed", "plan", f"would not fit: {budget.describe(needed)}")]


def _choose_bf16(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose bf16 if fp32 is faster on this CPU, but does not fit."""
    recipe, field = resolved.recipe, "model.dtype"
    if recipe.model.dtype != "fp32" or resolved.choices[field].origin != "plan" or recipe.model.device != "cpu":
        return []
    scheme = "nf4" if _may_quantize(resolved) else recipe.model.quantization
    needed = budget.needed(_with_smallest_micro_batch(resolved), scheme=scheme, checkpointed_layers=budget.shape.layers)
    if needed <= budget.usable:
        return []
    return [Choice(field, "bf16", "plan", f"fp32 is faster here, but would not fit: {budget.describe(needed)}")]


def _choose_quantization(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose a base in 16 bit if it fits with all layers recomputed, and otherwise a quantized one."""
    recipe, field = resolved.recipe, "model.quantization"
    if not _may_quantize(resolved):
        return []
    if budget.shape.prequantized:
        return [Choice(field, budget.shape.prequantized, "plan", "as the weights are stored on disk")]
    if recipe.model.placement == "streamed" and recipe.model.device == "cpu":
        why = "read from disk: 4 bit would not take less memory"
        return [Choice(field, "none", "plan", why)] if recipe.model.quantization == "auto" else []
    needed = budget.needed(_with_smallest_micro_batch(resolved), scheme="none", checkpointed_layers=budget.shape.layers)
    if needed <= budget.usable:
        why = f"16-bit weights fit: {budget.describe(needed)}"
        return [Choice(field, "none", "plan", why)] if recipe.model.quantization == "auto" else []
    return [Choice(field, _choose_scheme(recipe), "plan", f"16-bit weights would not fit: {budget.describe(needed)}")]


def _may_quantize(resolved: Resolved) -> bool:
    recipe = resolved.recipe
    if recipe.train.method == "full":
        return False
    default = resolved.choices["model.quantization"].origin == "default"
    return recipe.model.quantization == "auto" or (recipe.preset == "auto" and default and recipe.model.adapter is None)


def _with_smallest_micro_batch(resolved: Resolved) -> Recipe:
    """Return the recipe with one row per micro-batch, unless the user has set the size of the micro-batch."""
    recipe = resolved.recipe
    if recipe.train.micro_batch is None:
        return _with_train(recipe, micro_batch_tokens=recipe.data.max_length)
    is_preset = resolved.choices["train.micro_batch"].origin == "preset"
    return _with_train(recipe, micro_batch=1) if is_preset else recipe


def _with_train(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _shrink_micro_batch(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Halve the micro-batch until it fits with every layer recomputed, down to one row of the maximum length."""
    recipe, layers = resolved.recipe, _max_checkpointed(resolved.recipe, budget)
    current = recipe.train.micro_batch or recipe.train.micro_batch_tokens or 0
    name, smallest = ("micro_batch", 1) if recipe.train.micro_batch else ("micro_batch_tokens", recipe.data.max_length)
    if resolved.choices[f"train.{name}"].origin != "plan" and resolved.choices["train.micro_batch"].origin != "preset":
        return []
    size = current
    while size > smallest and not budget.fits(recipe, checkpointed_layers=layers):
        size = max(smallest, size // 2)
        recipe = _with_train(recipe, **{name: size})
    if size == current:
        return []
    why = f"more would not fit: {budget.describe(budget.needed(resolved.recipe))}"
    return [Choice(f"train.{name}", size, "plan", why)]


def _grow_micro_batch(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose the largest micro-batch that fits on a GPU without recomputation, up to all tokens of a step."""
    recipe, field = resolved.recipe, "train.micro_batch_tokens"
    current = recipe.train.micro_batch_tokens
    if not recipe.model.device.startswith("cuda") or current is None or resolved.choices[field].origin != "plan":
        return []
    rows = recipe.train.batch_size * sequences_per_row(recipe.train)
    step_tokens = rows * (longest_sequence(recipe))
    for tokens in GPU_MICRO_BATCH_TOKENS:
        is_useful = current < tokens and tokens // 2 < step_tokens
        if is_useful and budget.fits(_with_train(recipe, micro_batch_tokens=tokens)):
            return [Choice(field, tokens, "plan", "the largest that fits without recomputation, which is fastest")]
    return []


def _grow_streamed_micro_batch(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose a larger micro-batch for a streamed base, up to all tokens of a step, if reading it may take longer."""
    recipe, field = resolved.recipe, "train.micro_batch_tokens"
    size, layers = recipe.train.micro_batch_tokens, _max_checkpointed(recipe, budget)
    if recipe.model.placement != "streamed" or size is None or resolved.choices[field].origin != "plan":
        return []
    step_tokens = recipe.train.batch_size * sequences_per_row(recipe.train) * longest_sequence(recipe)
    while size < step_tokens and budget.waits_for_base(recipe):
        larger = _with_train(recipe, micro_batch_tokens=min(2 * size, step_tokens))
        if not budget.fits(larger, checkpointed_layers=layers, offload=_may_offload(recipe, budget)):
            break
        recipe, size = larger, min(2 * size, step_tokens)
    grown = size > (resolved.recipe.train.micro_batch_tokens or 0)
    return [Choice(field, size, "plan", "so that reading the base takes less time than computing")] if grown else []


def _max_checkpointed(recipe: Recipe, budget: MemoryBudget) -> int:
    setting = recipe.train.gradient_checkpointing
    return num_checkpointed("on" if setting == "auto" else setting, budget.shape.layers)


def _may_offload(recipe: Recipe, budget: MemoryBudget) -> bool:
    return recipe.train.gradient_checkpointing == "auto" and why_not_offloaded(recipe, budget.shape) is None


def _apply_last_resorts(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose offloading, or an 8-bit optimizer and shorter rows. Only unset options change, and only if it fits."""
    recipe, layers = resolved.recipe, _max_checkpointed(resolved.recipe, budget)
    needed = budget.needed(recipe, checkpointed_layers=layers)
    if needed <= budget.usable:
        return []
    why = f"would not fit: {budget.describe(needed)}"
    if _may_offload(recipe, budget) and budget.fits(recipe, checkpointed_layers=layers, offload=True):
        why = f"{why} with the inputs of layers on the GPU"
        return [Choice("train.gradient_checkpointing", "offload", "plan", why)]
    unset = {field for field, choice in resolved.choices.items() if choice.origin == "default"}
    values: dict[str, Any] = {"train.optimizer": "adamw_8bit"} if "train.optimizer" in unset else {}
    length = recipe.data.max_length
    while True:
        choices = [Choice(field, value, "plan", why) for field, value in values.items()]
        if budget.fits(resolved.decide(choices).recipe, checkpointed_layers=layers):
            return choices
        if length <= MIN_LENGTH or "data.max_length" not in unset or recipe.train.micro_batch is not None:
            return []
        length = max(MIN_LENGTH, length // 2)
        values["data.max_length"] = values["train.micro_batch_tokens"] = length
        if "data.overlong" in unset:
            values["data.overlong"] = OVERLONG.get(data_kind_of(recipe.train), "truncate-start")


def _choose_resident_layers(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Choose how many layers are dequantized only once: as many as fit in addition to the saved activations."""
    recipe, field = resolved.recipe, "model.resident_layers"
    if recipe.model.quantization == "none" or recipe.model.resident_layers is not None:
        return []
    if recipe.model.placement == "sharded" and budget.devices > 1:
        return [Choice(field, 0, "plan", "fewer bytes to gather")]
    if recipe.model.placement == "streamed":
        return [Choice(field, 0, "plan", "the base is not in memory")]
    if recipe.train.int8_matmul:
        return [Choice(field, 0, "plan", "multiplied in 8 bit, as stored")]
    # On a GPU they save little time, and CUDA's modules and the fragments between blocks take memory too.
    reserve = max(GPU_RESERVE, round(GPU_RESERVE_SHARE * budget.usable)) if recipe.model.device != "cpu" else 0
    counts = range(budget.shape.layers, 0, -1)
    layers = next((k for k in counts if budget.fits(recipe, reserve=reserve, resident_layers=k)), 0)
    why = "dequantized once: faster, in the memory of 16 bit" if layers else "no memory for 16-bit weights"
    return [Choice(field, layers, "plan", why)]


def _choose_checkpointing(resolved: Resolved, budget: MemoryBudget) -> list[Choice]:
    """Checkpoint as few layers as possible: recomputing all of them takes about a third of the time."""
    recipe, field = resolved.recipe, "train.gradient_checkpointing"
    if recipe.train.gradient_checkpointing != "auto":
        return []
    layers, without = budget.min_checkpointed(recipe), budget.needed(recipe)
    if layers == 0:
        return [Choice(field, "off", "plan", f"fits: {budget.describe(without)}")]
    if layers is None:
        needed = budget.needed(recipe, checkpointed_layers=budget.shape.layers)
        return [Choice(field, "on", "plan", f"would not fit, and even with it: {budget.describe(needed)}")]
    all_or_none = Workload.from_recipe(recipe, budget.shape).compute.step == "plain"  # as in transformers
    value: Any = "on" if all_or_none or layers == budget.shape.layers else layers
    return [Choice(field, value, "plan", f"would not fit: {budget.describe(without)} without")]


@dataclass(frozen=True)
class Suggestion:
    """A change to the recipe that saves memory, in addition to the suggestions before it."""

    what: str
    gives_up: str  # the cost in quality, time or host memory
    options: dict[str, Any]  # all options changed, including those of the suggestions before
    peak_bytes: int  # memory needed with these options
    fits: bool  # whether the plan fits with them
    time: float  # time per token, relative to the plan

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "time": round(self.time, 3)}


Changes = Iterator[tuple[str, str, dict[str, Any]]]  # the first fields of Suggestion: what, gives_up, options


def list_suggestions(
    recipe: Recipe, budget: MemoryBudget, rate: Rate, fits_in: Callable[[int], bool] | None = None
) -> list[Suggestion]:
    """Return changes that save memory, the cheapest first, until the recipe fits.

    If it never does, return only a memory limit, or without `fits_in` all changes and a smaller model. fits_in: whether
    the plan fits with a memory limit in bytes.
    """
    suggestions: list[Suggestion] = []
    options: dict[str, Any] = {}
    speed, changed, needed = budget.tokens_per_s(recipe, rate), recipe, budget.needed(recipe)
    for suggest in _RULES:
        for what, gives_up, new_options in suggest(changed, budget):
            choices = [Choice(field, value, "plan", what) for field, value in new_options.items()]
            candidate = Resolved(changed, {}).decide(choices).recipe
            if (less := budget.needed(candidate)) >= needed:
                continue
            options |= new_options
            changed, needed = candidate, less
            time = speed / budget.tokens_per_s(changed, rate)
            suggestions.append(Suggestion(what, gives_up, dict(options), needed, needed <= budget.usable, time))
            if suggestions[-1].fits:
                return suggestions
    parameters = int(budget.parameters * budget.usable / max(1, needed))
    size = f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
    what, time = f"a model of at most about {size} parameters", parameters / budget.parameters
    if fits_in is not None:
        limit = f"a memory limit of {smallest_limit(fits_in)}GiB"
        limit += f", of which Python and its libraries take {PROCESS_BYTES // MIB} MiB"
        what = f"{limit}, or {what}" if time > MIN_MODEL_SHARE else limit
        return [Suggestion(what, "memory", {}, budget.needed(recipe), False, 1.0)]
    return [*suggestions, Suggestion(what, "what a larger model can do", dict(options), needed, False, time)]


def smallest_limit(fits_in: Callable[[int], bool]) -> float:
    """Return the smallest memory limit in GiB, a multiple of 0.1, for which `fits_in` is true of its bytes."""

    def fits(tenths: int) -> bool:
        return fits_in(int(tenths / 10 * GIB))

    most = 1
    while not fits(most):
        most *= 2
    tenths = range(most // 2 + 1, most + 1)
    return tenths[bisect_left(tenths, True, hi=len(tenths) - 1, key=fits)] / 10


def _suggest_recomputation(recipe: Recipe, budget: MemoryBudget) -> Changes:
    workload, layers = Workload.from_recipe(recipe, budget.shape), budget.shape.layers
    if workload.compute.checkpointed_layers < layers:
        fewest = budget.min_checkpointed(recipe) or layers
        value: Any = "on" if fewest == layers else fewest
        what = f"recompute {fewest} of {layers} layers in the backward pass"
        yield what, "time", {"train.gradient_checkpointing": value}
    if recipe.train.gradient_checkpointing != "offload" and why_not_offloaded(recipe, budget.shape) is None:
        workload = workload.replace(checkpointed_layers=layers, offload=True)
        size = offloaded_bytes(workload, largest_micro_batch(recipe, workload)) / GIB
        what = f"keep the inputs of layers in host memory: {size:.1f} GiB"
        yield what, "host memory", {"train.gradient_checkpointing": "offload"}


def _suggest_quantization(recipe: Recipe, budget: MemoryBudget) -> Changes:
    if recipe.train.method == "full":
        rank = {"train.method": "lora", "train.learning_rate": None}
        yield "adapters instead of all weights", "what only all weights can learn", rank
        return
    if recipe.model.placement == "streamed":  # in 4 bit it would not be, and take more
        return
    current, fixed = recipe.model.quantization, budget.shape.prequantized
    schemes: list[str] = [current] if current not in ("none", "auto") and recipe.model.resident_layers else []
    smaller = _choose_scheme(recipe)
    method = "multiplied as stored" if recipe.train.int8_matmul else "dequantized for each matmul"
    schemes += [smaller] if current in {"none", "auto", "int8"} - {smaller} and fixed is None else []
    for scheme in schemes:
        options = {"model.quantization": scheme, "model.resident_layers": 0}
        yield f"store the base in {scheme}, {method}", "a little accuracy, and time", options


def _suggest_fewer_rows(recipe: Recipe, budget: MemoryBudget) -> Changes:
    train, length = recipe.train, recipe.data.max_length
    rows = train.micro_batch or max(1, min(train.batch_size, (train.micro_batch_tokens or length) // length))
    while rows > 1:
        rows //= 2
        in_rows, in_tokens = {"train.micro_batch": rows}, {"train.micro_batch_tokens": rows * length}
        what = f"{rows} row{'s' * (rows > 1)} at once, {-(-train.batch_size // rows)} micro-batches per step"
        yield what, "time, if rows are short", in_tokens if train.micro_batch is None else in_rows


def _suggest_8bit_optimizer(recipe: Recipe, budget: MemoryBudget) -> Changes:
    if recipe.train.optimizer == "adamw":
        yield "the optimizer's moments in 8 bit", "a little accuracy", {"train.optimizer": "adamw_8bit"}


def _suggest_shorter_rows(recipe: Recipe, budget: MemoryBudget) -> Changes:
    length = recipe.data.max_length
    while length > MIN_LENGTH:
        length = max(MIN_LENGTH, length // 2)
        options: dict[str, Any] = {"data.max_length": length}
        if recipe.data.overlong == "refuse":
            options["data.overlong"] = OVERLONG.get(data_kind_of(recipe.train), "truncate-start")
        if recipe.train.micro_batch is None:
            options["train.micro_batch_tokens"] = length
        yield f"rows of at most {length} tokens", "longer rows are split or left out", options


def _suggest_fewer_targets(recipe: Recipe, budget: MemoryBudget) -> Changes:
    gives_up = "some of what the adapter can learn"
    if recipe.lora.target_modules != "attention":
        yield "adapters on attention only", gives_up, {"lora.target_modules": "attention"}
    if recipe.lora.r > 8:
        yield "rank 8", gives_up, {"lora.r": 8, "lora.alpha": 16.0}


# The cheapest changes first.
_RULES = (
    _suggest_recomputation, _suggest_quantization, _suggest_fewer_rows, _suggest_8bit_optimizer, _suggest_shorter_rows,
    _suggest_fewer_targets,
)  # fmt: skip
