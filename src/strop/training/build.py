"""Build the model and the job of a run."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from strop.config.schema import ModelSection
from strop.distributed.devices import Devices
from strop.distributed.sharded import ShardedBase
from strop.engine.decode.generate import Sampler, generation_stop_ids
from strop.engine.images import install_images
from strop.engine.step import step_for
from strop.engine.train.plain import WeightGatherer
from strop.errors import RunError
from strop.evaluation.rewards import parse_rewards
from strop.models.adapters import attach_adapter, restore_precision
from strop.models.host_layers import load_from_host
from strop.models.load import DTYPES, load_base, restore_packed_weights
from strop.models.lora import (
    add_lora,
    cast_trainable_to_fp32,
    init_loftq,
    set_dropout,
    train_all_weights,
    trainable_parameters,
)
from strop.models.sharding import load_sharded
from strop.models.source import Source
from strop.models.streaming import load_streamed
from strop.objectives.embedding import EMBED
from strop.objectives.policy import PolicyLoss
from strop.objectives.table import count_score_outputs, objective_of, task_of
from strop.planning.choose import usable_bytes
from strop.runs.events import EventLog
from strop.runs.folder import RunFolder, write_json
from strop.training import guard
from strop.training.contrastive import EmbedCriterion
from strop.training.criteria import Criterion, make_criterion
from strop.training.optim import make_optimizer
from strop.training.preflight import Setup, find_start_adapter, trained_kind
from strop.training.rollouts import PolicyCriterion, disable_model_dropout
from strop.training.samples import select_samples
from strop.training.state import Job, Progress, TrainState, set_memory_options
from strop.training.teacher import PolicyTeacher


def build_model(setup: Setup, resuming: bool, devices: Devices) -> tuple[Any, WeightGatherer | None]:
    """Load the base, add adapters, and return the model in train mode, and what makes its weights available.

    resuming: weights come from a checkpoint.
    """
    recipe = setup.resolved.recipe
    assert recipe.model.dtype != "auto"
    if recipe.train.method == "full":  # in fp32, because bf16 rounds small updates away
        base = load_base(setup.source, torch.float32, recipe.model.device)
        torch.manual_seed(recipe.seed)
        return train_all_weights(base, recipe.lora.new_tokens, setup.tokenizer).train(), None
    base, gatherer = _load_base(setup.source, recipe.model, devices)
    cast(Any, base).weight_gatherer = gatherer
    torch.manual_seed(recipe.seed)  # for the adapters' initial values and for dropout
    start = find_start_adapter(recipe)
    if start is not None:
        model, _ = attach_adapter(base, start, setup.source, trainable=True, kind=trained_kind(recipe.train))
        model = restore_precision(cast_trainable_to_fp32(model), start)
        set_dropout(model, recipe.lora.dropout)
    else:
        outputs = count_score_outputs(recipe.train)
        model = add_lora(base, recipe.lora, setup.tokenizer, task=task_of(recipe.train), outputs=outputs)
        if recipe.lora.init == "loftq" and not resuming:
            init_loftq(model, setup.source)
    install_images(model, setup.tokenizer)
    return model.train(), gatherer


def _load_base(source: Source, model: ModelSection, devices: Devices) -> tuple[nn.Module, WeightGatherer | None]:
    storage: dict[str, Any] = {"quantization": model.quantization, "double": model.double_quantization}
    arguments = source, DTYPES[model.dtype], model.device
    if model.placement == "streamed" and model.device == "cpu":
        return load_streamed(*arguments[:2], **storage)
    if model.placement == "streamed":
        return load_from_host(*arguments, **storage)
    options = {**storage, "resident_layers": model.resident_layers or 0}
    if devices.world_size == 1 or model.placement != "sharded":
        return load_base(*arguments, **options), None
    with devices.all_or_none():
        base, parts = load_sharded(*arguments, devices.rank, devices.world_size, **options)
    devices.base = ShardedBase(parts, devices)
    return base, devices.base


def check_base_digests(folder: RunFolder, devices: Devices) -> None:
    """Store the digests of a sharded base's layers in lock.json. Raises RunError if they have changed."""
    if devices.base is None:
        return
    digests = devices.base.digests
    with devices.all_or_none():
        lock = folder.read_lock()
        recorded = lock.get("layers", {})
        if changed := [name for name, digest in recorded.items() if digests.get(name) != digest]:
            what = f"{changed[0]} of the base has changed since this run was started"
            raise RunError(what, fix="restore the base, or start a new run")
        if devices.is_main and not recorded:
            write_json(folder.lock, {**lock, "layers": digests})


def build_job(
    folder: RunFolder, setup: Setup, model: Any, log: EventLog, devices: Devices,
    sampler: Sampler | None = None, teacher: PolicyTeacher | None = None, gatherer: WeightGatherer | None = None,
) -> Job:  # fmt: skip
    """Return the job that trains `model`.

    sampler: samples completions instead of strop's engine. teacher: judges their tokens. gatherer: what `build_model`
    returns with the model.
    """
    recipe, data, weights = setup.resolved.recipe, setup.data, trainable_parameters(model)
    full = recipe.train.method == "full"
    step = step_for(model, int8_matmul=recipe.train.int8_matmul, dtype=DTYPES[recipe.model.dtype] if full else None)
    scale = guard.FIRST_LOSS_SCALE if recipe.model.dtype == "fp16" else 1.0
    state = TrainState(weights, make_optimizer(weights, recipe.train), Progress(loss_scale=scale))
    set_memory_options(state.progress, recipe.train)
    section, repack_weights = recipe.model, None
    if gatherer is None and section.quantization != "none" and section.resident_layers:
        scheme = (section.quantization, section.double_quantization, DTYPES[section.dtype])
        repack_weights = partial(restore_packed_weights, model.get_base_model(), setup.source, *scheme)
    criterion: Criterion
    objective = objective_of(recipe.train)
    if isinstance(objective, PolicyLoss):
        disable_model_dropout(model)
        stop_ids = (*data.renderer.end_ids, *generation_stop_ids(model.generation_config))
        rewards = parse_rewards(recipe.train.rewards)
        criterion = PolicyCriterion(
            objective, recipe.train, recipe.seed, model, setup.tokenizer, stop_ids, rewards, weights, log,
            columns=setup.columns, sampler=sampler, teacher=teacher, tracer=setup.tracer,
        )  # fmt: skip
    elif objective is EMBED:
        disable_model_dropout(model)
        criterion = EmbedCriterion(recipe.train, devices)
    else:
        criterion = make_criterion(recipe.train, model, devices, data.train_items)
    usable = usable_bytes(setup.machine, section.device)
    # a sharded base would need all ranks for each pass
    samples = None if devices.base is not None else select_samples(recipe, data, setup.tokenizer)
    return Job(
        recipe, folder, model, step, data.train_items or data.train, data.eval_items or data.eval, state, log,
        repack_weights, setup.memory_key, usable, criterion, devices, samples, gatherer,
    )  # fmt: skip


def broadcast_weights(job: Job) -> None:
    """Copy the trainable weights of rank 0 to all ranks."""
    if job.devices.world_size == 1:
        return
    weights = list(job.state.weights.values())
    flat = torch.cat([weight.detach().float().flatten() for weight in weights])
    job.devices.any_rank()
    job.devices.broadcast(flat, 0)
    with torch.no_grad():
        parts = flat.split([weight.numel() for weight in weights])  # type: ignore[no-untyped-call]
        for weight, values in zip(weights, parts, strict=True):
            weight.copy_(values.view_as(weight))
