"""Check the model, the machine, the recipe, the data and the disk space of a run before any weights are read."""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import psutil
import torch

from strop.config.load import Choice, Resolved, read_resolved
from strop.config.schema import Recipe, TrainSection
from strop.data.answers import Answer
from strop.data.images import hide_images
from strop.data.prepare import Prepared
from strop.data.rendering.image_encoder import image_encoder
from strop.data.rendering.overlong import allowed_overlong
from strop.data.store import JoinedItems, Triplets
from strop.data.types import Classes, Prompt
from strop.display.terminal import LASTING
from strop.distributed.devices import Devices, threads_requested
from strop.engine.device import pick_device, pick_dtype, prepare_process
from strop.errors import (
    TROUBLESHOOTING_PAGE,
    DataError,
    DeviceError,
    FolderError,
    InputError,
    Location,
    MemoryLimitError,
    ModelError,
    RecipeError,
    RunError,
)
from strop.evaluation.environments import has_member, hash_file
from strop.evaluation.rewards import Rows, check_rewards, hash_rewards, parse_rewards, read_columns
from strop.evaluation.traces import ToolPrompts, Tracer, check_prompts, describe_environment, make_tracer
from strop.machine.doctor import why_no_code
from strop.machine.memory import free_memory
from strop.machine.probe import Machine, probe
from strop.models.adapter_config import (
    NEEDS_QUANTIZED_BASE,
    AdapterKind,
    adapts_image_encoder,
    check_adapter_kind,
    expand_adapter_config,
    find_adapter_folder,
    read_adapter_config,
    read_identity,
)
from strop.models.adapters import locate_tokenizer, read_classes
from strop.models.embedder import POOLING_FOLDER, read_pooling
from strop.models.experts import quantizable_names
from strop.models.families.layers import load_balancing_coefficient
from strop.models.families.shape import ModelShape
from strop.models.introspect import (
    count_parameters,
    count_path_kinds,
    find_modules_to_save,
    find_projectors,
    shape_from_model,
    text_path,
)
from strop.models.load import DTYPES, GGUF_NOTE, copies_needed, load_config, load_without_weights
from strop.models.lora import check_lora, check_score_head, count_trainable
from strop.models.source import Source, check_readable, fingerprint, locate, prequantized, quantization_method
from strop.models.streaming import is_written
from strop.models.tokenizer import load_tokenizer
from strop.objectives import require
from strop.objectives.classification import class_weights
from strop.objectives.table import count_score_outputs, data_kind_of, max_completion_tokens, prepare_rows
from strop.planning.choose import choose, choose_labels, find_unusual_values, memory_key, why_no_int8
from strop.planning.images import ImageLoad
from strop.planning.keep import choose_keep, why_not_kept
from strop.planning.machines import find_target
from strop.planning.memory import (
    CUDA_CONTEXT_BYTES,
    base_layer_bytes,
    constant_bytes,
    format_sizes,
    host_bytes,
    weight_bytes,
)
from strop.planning.microbatch import largest_micro_batch, measure_rows
from strop.planning.plan import make_plan, read_model_facts, start_adapter
from strop.planning.workload import Workload
from strop.runs.folder import RunFolder, cache_folder, free_bytes
from strop.runs.lock import sha256_text, versions
from strop.training.keep import add_kept_rows
from strop.training.rollouts import check_vllm
from strop.training.state import batch_stream, checkpoint_bytes
from strop.training.teacher import SoftRows, Teacher, add_teacher, find_policy_teacher, teacher_weight

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecipeFacts:
    """A complete recipe, and the sizes of its model."""

    resolved: Resolved
    memory_key: str  # key under which reduced memory settings are stored
    num_weights: int  # trainable weights
    shape: ModelShape
    parameters: int  # of the base


@dataclass(frozen=True)
class Setup(RecipeFacts):
    """Everything that a run needs, except the model's weights."""

    machine: Machine
    source: Source
    tokenizer: Any
    data: Prepared
    lock: dict[str, Any]
    columns: Rows  # of the rows, if a reward reads them
    teacher: Teacher | None  # of a policy objective
    tracer: Tracer | None  # of train.environment
    needs_quantized_base: bool  # the adapter corrects the error of its base (LoftQ)


def preview(resolved: Resolved, *, memory: int | None = None, devices: int = 1) -> Resolved:
    """Return the recipe that `train` would use on this machine, without reading weights and data."""
    prepare_process()
    source = locate(resolved.recipe.model.name, resolved.recipe.model.revision)
    return _complete_recipe(resolved, source, _probe_machine(resolved.recipe, memory, devices), devices).resolved


def set_up_on_all(
    resolved: Resolved, memory: int | None, folder: RunFolder, devices: Devices, threads: int | None = None
) -> Setup:
    """Set up a run on all devices, first on rank 0, then on one rank of each node, so that the others read caches.

    threads: number of CPU threads, for results that do not change when a run is resumed.
    Raises InputError if the ranks do not see the same run folder, base, rows, template and versions.
    """
    if threads is None and resolved.recipe.train.exact and not threads_requested():
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)  # rounding in a matmul depends on the number of threads
    setup: Setup | None = None
    rank_round = 0 if devices.rank == 0 else 1 if devices.local_rank == 0 else 2
    for current_round in range(3 if devices.world_size > 1 else 1):
        with devices.all_or_none():
            if current_round == rank_round:
                setup = set_up(resolved, memory, devices, folder)
                if devices.rank == 0:
                    check_space(folder, setup)
        resolved = devices.gather(resolved if setup is None else setup.resolved)[0]
    assert setup is not None
    for rank, is_visible in enumerate(devices.gather(folder.path.is_dir())):
        if not is_visible:
            what = f"{folder.path}: rank {rank} does not see this folder"
            raise InputError(what, fix="give a folder on a disk that all nodes share with --out")
    devices.require_same(_get_identity(setup))
    chosen = {"values": _get_values(resolved), "precision": resolved.recipe.model.dtype}
    return replace(setup, resolved=resolved, lock={**setup.lock, **chosen})


def _get_identity(setup: Setup) -> dict[str, str]:
    lock = setup.lock
    releases = {name: text.rpartition(".")[0] for name, text in lock["versions"].items() if name in ("torch", "strop")}
    hashes = {name: str(lock[name]) for name in ("data", "template")}
    return {"base": lock["base"]["fingerprint"], **hashes, **releases}


def _get_values(resolved: Resolved) -> dict[str, Any]:
    return {field: choice.value for field, choice in resolved.choices.items()}


def set_up(resolved: Resolved, memory: int | None, devices: Devices, folder: RunFolder) -> Setup:
    """Check a run and prepare its rows. folder: keeps what another model has computed. Raises InputError."""
    lora = resolved.recipe.lora
    max_rank = max([lora.r, *lora.rank_pattern.values()])
    prepare_process(deterministic=resolved.recipe.train.deterministic, rank=max_rank)  # before a GPU is used
    check_trackers(resolved.recipe.track)
    source = locate(resolved.recipe.model.name, resolved.recipe.model.revision)
    machine = _probe_machine(resolved.recipe, memory, devices.local_world_size)
    facts = _complete_recipe(resolved, source, machine, devices.world_size)
    resolved, recipe, shape = facts.resolved, facts.resolved.recipe, facts.shape
    if memory is not None:
        _check_limit(facts, machine, memory, devices.world_size)
    _check_host(facts, machine)
    check_vllm(recipe)
    start = find_start_adapter(recipe)
    # a start adapter may have its own tokens and chat template
    tokenizer = load_tokenizer(source if start is None else locate_tokenizer(start, source))
    LOG.info("reading and checking the rows")
    prepare = partial(prepare_rows, recipe, tokenizer, cache=cache_folder() / "data")
    data = prepare()
    vision = resolved.choices["lora.vision"]
    if vision.value != "none" and vision.origin != "plan" and not data.renderer.image_table:
        what = f"lora.vision {vision.value}: no row has an image, so nothing but the text model would be trained"
        raise RecipeError(what, fix="leave lora.vision out")
    if recipe.lora.vision == "all" and (images := ImageLoad.measure(image_encoder(tokenizer), source)) is not None:
        shape = replace(shape, image_patches=images.patches)
        facts = replace(facts, shape=shape)
    if recipe.train.teacher is not None and teacher_weight(recipe.train) and data.renderer.image_table:
        what = "train.teacher: the probabilities of a teacher for rows with images are not supported"
        raise RecipeError(what, fix="--train.teacher_weight 0, which trains on its answers, or leave the teacher out")
    if recipe.train.teacher is not None and recipe.train.objective == "sft":
        data = add_teacher(recipe, tokenizer, lambda answers: prepare(answers=answers), folder)
    teacher = find_policy_teacher(recipe, tokenizer)
    if teacher is not None:
        data = replace(data, teacher_hash=sha256_text(teacher.key))
    if data.classes is not None:
        facts = _set_classes(facts, data.classes, data.train_items)
        resolved, recipe = facts.resolved, facts.resolved.recipe
    if isinstance(data.train_items, Triplets):
        _check_negatives(recipe, data.train_items)
    if recipe.train.keep == "auto":
        resolved = choose_keep(resolved, len(data.train), int(data.train.lengths.sum()), why_not_kept(data))
        facts, recipe = replace(facts, resolved=resolved), resolved.recipe
    if recipe.train.keep_share:
        try:
            data = add_kept_rows(data, recipe, source, folder.kept)
        except RecipeError as error:  # such as a base model without answers
            if resolved.choices["train.keep"].origin != "plan":
                raise
            resolved = resolved.decide([Choice("train.keep", "off", "plan", error.what)])
            facts, recipe = replace(facts, resolved=resolved), resolved.recipe
    if recipe.train.keep_share or recipe.train.teacher is not None:
        free_memory()  # of models that answered
    has_environment = recipe.train.environment is not None
    columns = read_columns(parse_rewards(recipe.train.rewards), recipe.data, all_rows=has_environment)
    rewards_hash = _check_rewards(recipe, data, columns)
    tracer = None
    if has_environment:
        tracer = make_tracer(recipe.train, recipe.data.max_length, data.renderer, columns)
        data = _add_tools(recipe, data, tracer)
    _check_positions(recipe, shape, data)
    if not recipe.lora.new_tokens:  # otherwise each token gets an embedding
        _check_vocabulary(source, shape, tokenizer, data)
    if data.renderer.template is not None:  # data.template, which is saved with the tokenizer
        tokenizer.chat_template = data.renderer.template
    lock = {
        "base": {"name": source.name, "fingerprint": fingerprint(source)},
        "data": data.hash,
        "kept": data.kept_hash,
        "teacher": data.teacher_hash,
        "template": data.renderer.template_hash,
        "rewards": rewards_hash,
        "environment": None if tracer is None else hash_file(tracer.environment.spec),
        "recipe": sha256_text(json.dumps(recipe.model_dump(exclude={"out"}), sort_keys=True)),
        "values": _get_values(resolved),
        "seed": recipe.seed,
        "precision": recipe.model.dtype,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "machine": asdict(machine),
        "devices": {"count": devices.world_size, "nodes": devices.nodes},
    }
    return Setup(
        **vars(facts), machine=machine, source=source, tokenizer=tokenizer, data=data, lock=lock, columns=columns,
        teacher=teacher, tracer=tracer,
        needs_quantized_base=recipe.lora.init == "loftq"
        or (start is not None and bool(read_identity(start).get(NEEDS_QUANTIZED_BASE))),
    )  # fmt: skip


def _add_tools(recipe: Recipe, data: Prepared, tracer: Tracer) -> Prepared:
    """Return the data with the tools of an environment in its prompts, after `reset` was called for the first row.

    Raises DataError for rows that cannot be its prompts, and RecipeError for an environment that gives no reward.
    """
    spec, items = tracer.environment.spec, (data.train_items, data.eval_items)
    with_tools = [
        Location(row.file, row.line, "the row has tools, and the environment has its own")
        for rows in (data.train_conversations, data.eval_conversations)
        for row in rows or ()
        if row.tools
    ]
    if with_tools:
        raise DataError(f"{len(with_tools)} rows have tools", fix="remove the column `tools`", where=with_tools)
    prompts = [cast("Sequence[Prompt]", rows) for rows in items if rows is not None]
    for rows, role in zip(prompts, ("training", "evaluation"), strict=False):
        LOG.info("prompts  %s rows: %s", role, check_prompts(tracer, rows), extra=LASTING)
    try:
        [first] = tracer.start([(prompts[0][0], recipe.seed)])
    except RunError as error:
        raise RecipeError(error.what, fix=error.fix) from None
    if not has_member(first.environment, "reward") and not recipe.train.rewards:
        what = f"environment {spec}: it has no reward, and there are no --train.rewards"
        raise RecipeError(what, fix="add an attribute or a method `reward`, or give --train.rewards")
    tracer.environment.give_back(first.environment)
    train, held_out = (None if rows is None else ToolPrompts(cast("Any", rows), tracer) for rows in items)
    return replace(data, train_items=cast("Any", train), eval_items=cast("Any", held_out))


def _set_classes(facts: RecipeFacts, classes: Classes, texts: Any) -> RecipeFacts:
    """Write the classes into the recipe. Raises RecipeError if the start adapter or the class weights have others."""
    recipe, resolved = facts.resolved.recipe, facts.resolved
    class_weights(recipe.train.class_weights, texts.counts)
    if (start := find_start_adapter(recipe)) is not None and (before := read_classes(start)) != classes:
        what = f"--model.adapter: it has the classes {', '.join(before.names)}" + ", several per text" * before.several
        is_part = classes.several == before.several and {*classes.names} <= {*before.names}
        fix = f"--train.labels {shlex.quote(','.join(before.names))}" if is_part else "give rows with these labels"
        raise RecipeError(what, fix=f"{fix}, or train a new adapter")
    resolved = choose_labels(resolved, classes.names)
    new_outputs = len(classes.names) - count_score_outputs(recipe.train)
    return replace(facts, resolved=resolved, num_weights=facts.num_weights + new_outputs * facts.shape.hidden)


def trained_kind(train: TrainSection) -> AdapterKind:
    """Return the kind of adapter that an objective trains."""
    kinds: dict[str, AdapterKind] = {"classes": "classifier", "triplets": "embedder"}
    if (kind := kinds.get(data_kind_of(train))) is not None:
        return kind
    return "reward" if count_score_outputs(train) else "text"


def _check_limit(facts: RecipeFacts, machine: Machine, memory: int, devices: int) -> None:
    """Raise MemoryLimitError if a run on a CPU cannot hold the weights of the base within a limit in bytes."""
    recipe = facts.resolved.recipe
    workload = Workload.from_recipe(recipe, facts.shape, parameters=facts.parameters, devices=devices)
    needed = weight_bytes(workload) + constant_bytes(workload)
    if recipe.model.placement == "streamed":  # one layer at a time
        needed = base_layer_bytes(workload)
    if recipe.model.device == "cpu" and needed > machine.free_bytes:
        limit, free = memory / 2**20, machine.free_bytes / 2**20
        left = f"{free:,.0f} of {limit:,.0f} MiB are left in this process"
        what = f"--memory: the weights of the base need {needed / 2**20:,.0f} MiB, and {left}"
        full = recipe.train.method == "full"
        smaller = (
            "a smaller model or --train.method lora"
            if full
            else (
                "a smaller model or --model.quantization nf4"
                if recipe.model.quantization == "none"
                else "a smaller model"
            )
        )
        least = psutil.Process().memory_info().rss + needed
        raise MemoryLimitError(what, fix=f"give much more than --memory {least / 2**20:,.0f}MiB, or use {smaller}")


def _check_host(facts: RecipeFacts, machine: Machine) -> None:
    """Raise MemoryLimitError if the layers that a run streams to a GPU do not fit in host memory."""
    recipe = facts.resolved.recipe
    workload = Workload.from_recipe(recipe, facts.shape, parameters=facts.parameters)
    if (needed := host_bytes(workload, largest_micro_batch(recipe, workload))) > machine.free_bytes:
        needs, free = format_sizes(needed, machine.free_bytes)
        what = f"the host memory is too small: {needs} needed for what does not fit on the GPU, {free} free"
        packs = recipe.model.quantization == "none" and recipe.model.placement == "streamed"
        raise MemoryLimitError(what, fix=f"use a smaller model{', or --model.quantization nf4' * packs}")


@contextmanager
def suggest_changes(resolved: Resolved, memory: int | None, devices: Devices) -> Iterator[None]:
    """Give a MemoryLimitError of a run on a CPU the fix of `strop plan`, if the recipe does not fit in the limit."""
    try:
        yield
    except MemoryLimitError as error:
        recipe = resolved.recipe
        if memory is None or devices.world_size > 1 or pick_device(recipe.model.device) != "cpu":
            raise
        rows, adapter = measure_rows(recipe), start_adapter(recipe)
        plan = make_plan(resolved, read_model_facts(recipe), find_target("cpu", memory), rows=rows, adapter=adapter)
        if plan.fits:
            raise
        last = plan.suggestions[-1]
        flags = " ".join(f"--{field} {value}" for field, value in last.options.items())
        suggested = MemoryLimitError(error.what, fix=f"train with {flags if last.fits else last.what}")
        suggested.partial_result = error.partial_result
        raise suggested from None


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a tracker whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin it is a folder, which wandb creates
            what = f"--track {name}: the package {name} is not installed"
            raise RecipeError(what, fix=f"pip install {name}, or remove it from `track`")


def _complete_recipe(resolved: Resolved, source: Source, machine: Machine, devices: int = 1) -> RecipeFacts:
    recipe = resolved.recipe
    device = pick_device(recipe.model.device)
    start, outputs = find_start_adapter(recipe), count_score_outputs(recipe.train)
    if start is not None:
        check_adapter_kind(start, trained_kind(recipe.train))
    bare = load_without_weights(source)
    if outputs:
        check_score_head(bare.config)
    shape, parameters = shape_from_model(load_config(source).to_dict(), source.config(), bare), count_parameters(bare)
    if trained_kind(recipe.train) == "embedder":
        resolved = resolved.decide(_choose_pooling(recipe, start, source))
    resolved = resolved.decide(_choose_vision(resolved, bare, source, start))
    adapter = None if start is None else expand_adapter_config(start, read_adapter_config(start))
    dtype = pick_dtype(device) if recipe.model.dtype == "auto" else (recipe.model.dtype, "")
    if note := machine.note_on(device, recipe.model.dtype):
        LOG.warning(note)
    resolved = choose(resolved, machine, shape, device, dtype, adapter, parameters, devices)
    if (full := recipe.train.method == "full") and (method := quantization_method(source.config())):
        what = f"train.method full: the weights of {source.name} are quantized by {method}, and cannot be trained"
        raise ModelError(what, fix="use the model with 16-bit weights, or --train.method lora")
    if not full:
        names = check_lora(bare, resolved.recipe.lora, is_continued=start is not None)
        if trained_kind(recipe.train) == "embedder":
            _check_embedder(bare, resolved.recipe, shape, names)
    scheme = resolved.recipe.model.quantization
    if scheme != "none":
        check_readable(source.path if source.kind == "folder" else source.path.parent)
    if scheme != "none" and prequantized(source.config()) is None and not quantizable_names(bare):
        what = f"--model.quantization {scheme}: {shape.family} has no linear weights to quantize"
        raise ModelError(what, fix="use --model.quantization none")
    key = memory_key(resolved.recipe, machine, shape)
    num_weights = count_trainable(bare, resolved.recipe.lora, outputs=outputs, full=full)
    return RecipeFacts(resolved, key, num_weights, shape, parameters)


def _choose_vision(resolved: Resolved, bare: Any, source: Source, start: Path | None) -> list[Choice]:
    """Add the projector to lora.modules_to_save, or follow the adapter to start from. Raises RecipeError."""
    lora, names = resolved.recipe.lora, find_projectors(bare)
    vision: str = lora.vision
    if start is not None:
        saved = read_adapter_config(start).get("modules_to_save") or ()
        trained = "projector" if names and set(names) <= set(saved) else "none"
        trained = "all" if adapts_image_encoder(start) else trained
        if vision == trained:
            return []
        if resolved.choices["lora.vision"].origin != "default":
            what = f"lora.vision {vision}: the adapter to start from was trained with {trained}"
            raise RecipeError(what, fix="leave lora.vision out, or train a new adapter")
        return [Choice("lora.vision", trained, "plan", "as in the adapter it starts from")]
    if vision == "none":
        return []
    if not names:
        raise RecipeError(f"lora.vision {vision}: {source.name} has no image encoder", fix="leave lora.vision out")
    if resolved.recipe.train.method == "full":
        what = f"lora.vision {vision}: train.method full trains all weights of the text model, and no others"
        raise RecipeError(what, fix="leave lora.vision out, or train with --train.method lora")
    modules = list(dict.fromkeys([*lora.modules_to_save, *names]))
    return [Choice("lora.modules_to_save", modules, "plan", f"lora.vision {vision}")]


def _choose_pooling(recipe: Recipe, start: Path | None, source: Source) -> list[Choice]:
    """Choose the pooling of the adapter or model that training starts from. Raises RecipeError for another one."""
    folder = start or (source.path if (source.path / POOLING_FOLDER).is_dir() else None)
    given = recipe.train.pooling
    if folder is None or (given is not None and start is None):
        return []
    pooling = read_pooling(folder)
    if given not in (None, pooling):
        what = f"--train.pooling {given}: the adapter to start from has {pooling}"
        raise RecipeError(what, fix="leave train.pooling out, or train a new adapter")
    return [Choice("train.pooling", pooling, "plan", "as in the model it starts from")] if given is None else []


def _check_embedder(bare: Any, recipe: Recipe, shape: ModelShape, names: Sequence[str]) -> None:
    """Raise RecipeError for adapters of a model of embeddings that cannot be trained or loaded. names: adapted."""
    head = next(path for path, module in bare.named_modules() if module is bare.get_output_embeddings())
    leaf = head.rpartition(".")[2]
    for field, values in (("target_modules", names), ("modules_to_save", recipe.lora.modules_to_save)):
        if leaf in values or head in values:
            what = f"lora.{field}: {leaf} is the output head, which embeddings do not use"
            raise RecipeError(what, fix=f"leave {leaf} out")
    if recipe.lora.dropout and shape.expert_linears:
        what = "lora.dropout: embed computes each text twice, and the masks of a mixture of experts cannot be repeated"
        raise RecipeError(what, fix="leave lora.dropout out")


def _check_negatives(recipe: Recipe, rows: Triplets) -> None:
    """Raise InputError if there is no other text to compare a positive with."""
    if recipe.train.batch_size == 1 and (lacking := sum(len(row.examples) == 2 for row in rows)):
        what = f"train.batch_size 1: {lacking:,} rows have no negatives, so a batch of one has nothing to compare"
        raise RecipeError(what, fix="use --train.batch_size 8 or more, or rows with negatives")
    for side, name in enumerate(("anchor", "positive")) if not rows.negatives else ():
        if len({row.examples[side].ids.tobytes() for row in rows}) == 1:
            what = f"all training rows have the same {name}, and none has negatives, so there is nothing to compare"
            raise DataError(what, fix="give rows with different texts, or with negatives")


def find_start_adapter(recipe: Recipe) -> Path | None:
    """Return the folder of `model.adapter`, or None. Raises ModelError if it has no adapter."""
    return None if recipe.model.adapter is None else find_adapter_folder(recipe.model.adapter)


def _probe_machine(recipe: Recipe, memory: int | None, processes: int = 1) -> Machine:
    """Return this machine with the memory that is free for one of the run's processes on it."""
    machine, device = probe(memory), pick_device(recipe.model.device)
    if processes > 1:
        if device not in ("cpu", "cuda"):
            raise DeviceError(f"--model.device {device}: there are {processes} processes", fix="use cpu, or cuda")
        machine = replace(machine, free_bytes=machine.free_bytes // processes)
    if not device.startswith("cuda"):
        return machine
    free, total = torch.cuda.mem_get_info(device)
    # memory that PyTorch has reserved, and the context, count as free, because the plan counts them as needed
    free += torch.cuda.memory_reserved(device) + CUDA_CONTEXT_BYTES
    return replace(machine, card_free_bytes=min(free, total))


def _check_positions(recipe: Recipe, shape: ModelShape, data: Prepared) -> None:
    completion_tokens = max_completion_tokens(recipe.train)
    if not shape.learned or not (text := _too_long_message(recipe, shape, data)):
        return
    choices = " or ".join(allowed_overlong(data_kind_of(recipe.train)))
    fix = f"--data.max_length {shape.positions}, with --data.overlong {choices}"
    if completion_tokens:
        fix = "lower --train.answer_tokens, or --data.max_length with --data.overlong drop"
    raise DataError(f"{text}: it has learned embeddings for these positions only", fix=fix)


def _check_vocabulary(source: Source, shape: ModelShape, tokenizer: Any, data: Prepared) -> None:
    """Raise ModelError if a row has a token without an embedding."""
    if len(tokenizer) <= shape.vocabulary:
        return
    num_embeddings = int(load_without_weights(source).get_input_embeddings().num_embeddings)  # type: ignore[operator]
    for row in (row for rows in (data.train, data.eval or ()) for row in rows):
        ids = hide_images(row.ids)
        if (unknown := ids[ids >= num_embeddings]).size:
            token = tokenizer.convert_ids_to_tokens(int(unknown[0]))
            what = f"{source.name} has {num_embeddings:,} embeddings, none for token {unknown[0]} ({token})"
            raise ModelError(
                f"{row.file}:{row.line}: {what}",
                fix="use the model's own tokenizer, or resize the model's embeddings and save it",
            )


def _check_rewards(recipe: Recipe, data: Prepared, rows: Rows) -> str | None:
    """Check that the rewards can judge all rows, and return the hash of what they depend on."""
    rewards = parse_rewards(recipe.train.rewards)
    if recipe.train.environment is None and (reward := next((x for x in rewards if x.reads_traces), None)):
        what = f"reward {reward.spec}: its parameters are those of a trace, and there is no environment"
        raise RecipeError(what, fix="give --train.environment, or remove messages and environment")
    for prompts in (data.train_items, data.eval_items) if rewards else ():
        if prompts is not None:
            check_rewards(rewards, cast("Sequence[Prompt]", prompts), rows, require(recipe.train.reward_timeout))
    return hash_rewards(rewards, rows)


def check_space(folder: RunFolder, setup: Setup) -> None:
    """Raise FolderError if there is no space for copies of the base in the cache, or for checkpoints and adapter."""
    kept, checkpoint = setup.resolved.recipe.train.keep_checkpoints, checkpoint_bytes(setup.num_weights)
    least = 3 * checkpoint + 4 * setup.num_weights + (16 << 20)  # one, the best one, and one that is being written
    needed = least + (kept - 1) * checkpoint
    lower = ", or lower --train.keep_checkpoints" if least <= free_bytes(folder.path) else ""
    _check_free(cache_folder(), "copies of the base need", _copies_bytes(setup), "or set STROP_CACHE to another disk")
    _check_free(folder.path, "the run needs", needed, f"give a folder on another disk with --out{lower}")


def _check_free(path: Path, user: str, needed: int, fix: str) -> None:
    if needed and (free := free_bytes(path)) < needed:
        what = f"{path}: {user} {needed / 2**20:,.0f} MiB of disk, {free / 2**20:,.0f} MiB are free"
        raise FolderError(what, fix=f"free some space, {fix}; see {TROUBLESHOOTING_PAGE}#disk")


def _copies_bytes(setup: Setup) -> int:
    model = setup.resolved.recipe.model
    scheme = (model.quantization, model.double_quantization, DTYPES[model.dtype])
    half, packed = copies_needed(setup.source, *scheme)
    workload = Workload.from_recipe(setup.resolved.recipe, setup.shape, parameters=setup.parameters)
    workload = workload.replace(resident_layers=0)
    layers = model.placement == "streamed" and model.device == "cpu" and not is_written(setup.source, *scheme)
    return 2 * setup.parameters * half + (weight_bytes(workload) + constant_bytes(workload)) * (packed + layers)


def check_same_recipe(resolved: Resolved, folder: Path) -> None:
    """Raise InputError if a value that the user has set differs from that of the run in this folder."""
    run_choices = read_resolved(folder / "recipe.yaml").choices
    where = []
    for field, choice in resolved.choices.items():
        is_set = choice.origin in ("recipe", "option") and field != "out" and choice.value not in (None, "auto")
        if is_set and choice.value != (value := run_choices[field].value):
            text = f"{field} was {value} when this run was started, and is {choice.value}"
            where.append(Location(str(folder), None, text))
    if where:
        what = f"{folder}: this folder has a run with other settings"
        fix = "restore the settings, or see `strop resume --help`"
        if RunFolder(folder).finished:
            what += ", and is finished"
            fix = "give another --out; `--model` of this folder trains it further"
        raise InputError(what, fix=fix, where=where)


def locked_device_count(lock: Mapping[str, Any]) -> int:
    return int(lock.get("devices", {}).get("count", 1))


def startup_notes(setup: Setup) -> list[str]:
    """Return notes to log before training, such as unused options and hardware."""
    values, hardware = find_unusual_values(setup.resolved, setup.shape), (_unused_gpu_note(setup), _int8_note(setup))
    notes = [*values, *filter(None, hardware), *_list_option_notes(setup), *_list_model_notes(setup)]
    if setup.tracer is not None:
        notes += describe_environment(setup.tracer)
    return [*notes, *_list_cut_references(setup), *filter(None, [_kept_note(setup), _teacher_note(setup)])]


def _kept_note(setup: Setup) -> str | None:
    rows, items = setup.data.train, setup.data.train_items
    if not isinstance(items, JoinedItems):
        return None
    share = items.kept_tokens / (items.kept_tokens + rows.lengths.sum())
    return f"train.keep: {len(items) - len(items.own):,} rows of general prompts, {100 * share:.0f}% of the tokens"


def _teacher_note(setup: Setup) -> str | None:
    train = setup.resolved.recipe.train
    if train.teacher is None:
        return None
    weight = teacher_weight(train)
    if train.objective != "sft":
        return f"train.teacher {train.teacher}: judges each sampled token, with the weight {weight:g}"
    number = sum(isinstance(answer, Answer) for answer in setup.data.answers.values())
    note = f"train.teacher {train.teacher}: answered {number:,} rows; its probabilities have the weight {weight:g}"
    if not isinstance(setup.data.train_items, SoftRows):
        return note
    items = setup.data.train_items
    return f"{note}, are known for {items.known:.0%} of the tokens, and add up to {items.held:.0%} on average"


def _list_cut_references(setup: Setup) -> Iterator[str]:
    """Yield a note if completions cannot be as long as the reference answers of the prompts."""
    limit, renderer = max_completion_tokens(setup.resolved.recipe.train), setup.data.renderer
    for role, rows in (("training", setup.data.train_conversations), ("evaluation", setup.data.eval_conversations)):
        answers = filter(None, map(renderer.reference_answer, rows or ())) if limit else ()
        texts = (renderer.tokenizer.encode(answer, add_special_tokens=False) for answer in answers)
        if rows and (cut := sum(len(ids) >= limit for ids in texts)):
            yield f"{cut:,} of {len(rows):,} {role} rows have a reference longer than train.answer_tokens {limit}"


def _unused_gpu_note(setup: Setup) -> str | None:
    gpus, device = setup.machine.gpus, setup.resolved.choices["model.device"]
    if not gpus or device.origin != "plan" or device.value != "cpu":
        return None
    if (no_code := why_no_code()) is not None:
        return f"{no_code[0]}: training runs on the CPU; `{no_code[1]}` installs one that has"
    built = torch.version.cuda or "no CUDA"
    what = f"torch {torch.__version__} (built for {built}) cannot use {gpus[0]}"
    return f"{what}: training runs on the CPU; see {TROUBLESHOOTING_PAGE}#cuda"


def _int8_note(setup: Setup) -> str | None:
    recipe, dtype = setup.resolved.recipe, setup.resolved.choices["model.dtype"]
    if dtype.value != "fp32" or dtype.origin != "plan" or recipe.train.int8_matmul:
        return None
    if recipe.int8_matmul_conflict() or why_no_int8(recipe, setup.machine, setup.shape):
        return None
    return "this CPU multiplies 8-bit integers faster: --train.int8_matmul true; see docs/performance.md#integers"


def _list_option_notes(setup: Setup) -> Iterator[str]:
    recipe, is_single = setup.resolved.recipe, setup.lock["devices"]["count"] == 1
    model, train = recipe.model, recipe.train
    if not model.double_quantization and model.quantization not in ("nf4", "fp4"):
        yield "model.double_quantization false has no effect: the base is not in 4 bit"
    if model.placement == "sharded" and is_single:
        yield "model.placement sharded has no effect on a single device"
    if train.timeout != "30m" and is_single:
        yield f"train.timeout {train.timeout} has no effect on a single device"
    if train.deterministic and model.device == "cpu":
        yield "train.deterministic has no effect: a CPU computes the same bits each time without it"
    if train.eval_steps is not None and recipe.data.eval is None:
        yield f"train.eval_steps {train.eval_steps} has no effect without data.eval"
    steps = batch_stream(recipe, len(setup.data.train_items or setup.data.train)).total_steps
    if train.warmup >= max(1, steps):
        yield f"train.warmup {train.warmup:g}: the run has {steps} steps, so its learning rate never reaches its peak"
    start, scheme = find_start_adapter(recipe), model.quantization
    start_scheme = scheme if start is None else read_identity(start).get("quantization", scheme)
    if start_scheme != scheme:
        old, new = ("not quantized" if x == "none" else f"in {x}" for x in (start_scheme, scheme))
        loftq = "; adapters that began with lora.init loftq need it" if start_scheme != "none" else ""
        what = f"the adapter to start from was trained on the base {old}, and here the base is {new}"
        yield f"{what}: --model.quantization {start_scheme} gives the same weights{loftq}"


def _list_model_notes(setup: Setup) -> Iterator[str]:
    shape, recipe, config = setup.shape, setup.resolved.recipe, load_config(setup.source)
    if expert_weights := shape.layers * sum(linear.weights for linear in shape.expert_linears):
        active = setup.parameters - shape.idle_expert_weights
        yield f"a mixture of experts: {active:,} of {setup.parameters:,} weights are active per token"
        if not Workload.from_recipe(recipe, shape, parameters=setup.parameters).expert_adapter_weights:
            share = expert_weights / setup.parameters
            yield f"its experts ({share:.0%} of the weights) have no adapters; target all-linear adds them"
        loss = load_balancing_coefficient(config)
        if loss and recipe.train.objective != "sft":
            use = f"not used by objective {recipe.train.objective}, though its config sets it"
        else:
            use = f"on, at {loss:g}, as in its config" if loss else "off, as in its config (output_router_logits)"
        yield f"load-balancing loss: {use}"
    dtype = setup.resolved.choices["model.dtype"]
    if setup.source.kind == "gguf" and dtype.value == "fp32" and dtype.origin != "plan":
        yield GGUF_NOTE
    bare = load_without_weights(setup.source)
    if setup.source.kind != "gguf" and text_path(bare):
        parts = ["text model"] + ["image encoder"] * (recipe.lora.vision == "all")
        parts += ["projector of images"] * bool(set(find_projectors(bare)) & set(recipe.lora.modules_to_save))
        frozen = "audio encoders" if recipe.lora.vision == "all" else "image and audio encoders"
        verb = "is" if len(parts) == 1 else "are"
        yield f"{config.model_type}: its {' and the '.join(parts)} {verb} trained; {frozen} are frozen"
    for name in recipe.lora.modules_to_save:
        kinds = count_path_kinds(find_modules_to_save(bare, name))
        if len(kinds) > 1:
            listed = ", ".join(f"{path} ({count})" for path, count in kinds.items())
            total = sum(kinds.values())
            yield f"lora.modules_to_save {name}: all {total} modules with this suffix are trained in full: {listed}"
    if text := _too_long_message(recipe, shape, setup.data):
        yield text


def _too_long_message(recipe: Recipe, shape: ModelShape, data: Prepared) -> str | None:
    if recipe.train.environment is not None:  # a trace may have this length
        return shape.too_long_message(np.array([recipe.data.max_length]), 0)
    return shape.too_long_message(_row_lengths(data), max_completion_tokens(recipe.train))


def _row_lengths(data: Prepared) -> npt.NDArray[np.int64]:
    return np.concatenate([rows.lengths for rows in (data.train, data.eval) if rows is not None])
