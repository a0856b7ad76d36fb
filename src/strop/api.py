"""The public functions of strop, which the command line uses too.

Functions that train or read data take recipe fields as keyword arguments (`**options`), in these forms:

- the field's name: `learning_rate=1e-4`, `max_steps=10`, `r=8`, `out="runs/mine"`
- a short name: `model`, `data`, `eval`, `lr`, `rank`, and the other short options of the command line
- a section as a dict: `train={"learning_rate": 1e-4}`, `lora={"r": 8}`; `model` and `data` may be dicts too
- a dotted name: `**{"train.epochs": 1}`

A path may be a string or a `pathlib.Path`. A run or a model may also be given as the `Run` that `train` returned.
Data may be a file, a list of files, or rows in memory: a DataFrame, a `datasets.Dataset`, or a list of dicts.

Functions that take long have `progress`: by default they show a bar in a terminal, the steps and the loss curve in a
notebook, and a line every 30 s where stderr is a log. `progress=False` shows nothing. `progress=True` prints the lines
of the command line where stderr is a log.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from typing_extensions import Unpack

from strop.config.arguments import check_path, public
from strop.config.functions import function_spec
from strop.config.options import Options
from strop.display.progress import show_answers, show_run, show_steps
from strop.engine.kernels.warmup import import_libraries
from strop.errors import InputError, ModelError

if TYPE_CHECKING:
    from strop.config.schema import Recipe
    from strop.data.prepare import Prepared
    from strop.data.types import DataKind
    from strop.display.tables import CheckReport
    from strop.engine.decode.model import Model
    from strop.evaluation.tables import Evaluation
    from strop.exporting.gguf import Exported
    from strop.exporting.hub import Pushed
    from strop.exporting.merge import Merged
    from strop.exporting.ollama import PreparedOllama
    from strop.planning.plan import Plan
    from strop.planning.tables import Comparison
    from strop.runs.events import Event
    from strop.training.run import Run

LOG = logging.getLogger(__name__)
PathLike = str | os.PathLike[str]
Rows = Any  # a data file, or rows in memory: a DataFrame, a datasets.Dataset or a list of dicts
StepProgress = bool | Callable[[str], None] | None
AnswerProgress = bool | Callable[[str, int, int], None] | None


@public
def plan(
    recipe: PathLike | None = None,
    *,
    memory: int | str | None = None,
    gpu: str | None = None,
    devices: int = 1,
    nodes: int = 1,
    **options: Unpack[Options],
) -> Plan:
    """Predict whether a recipe fits in memory, how long training takes, and what to change if it does not fit.

    Reads no weights and does not import torch.

    Args:
        recipe: path of a recipe file.
        memory: memory of the device, in bytes or as text such as "8GB". Default: the memory of this machine.
        gpu: name of a GPU to plan for, such as "RTX 4090". Default: this machine.
        devices: number of devices per machine.
        nodes: number of machines.
        **options: recipe fields, as for `train`. Without `data`, all rows are assumed to have the maximum length.
            `model` may be the path of a config.json.

    Returns:
        The plan: `fits`, peak memory by phase, time, and the chosen settings with their reasons.

    Raises:
        InputError: If an option, the model or the data is invalid.

    Examples:
        >>> strop.plan(model="demo", memory="8GB").fits
        >>> strop.plan(model="demo", data="rows.jsonl", gpu="RTX 4090", lora={"r": 64})
    """
    from strop.config.load import Choice, resolve
    from strop.machine.memory import parse_memory
    from strop.planning.machines import find_target
    from strop.planning.microbatch import measure_rows, plan_options
    from strop.planning.multi_device import Devices, target_share
    from strop.planning.plan import make_plan, read_model_facts, start_adapter

    resolved = resolve(_as_path(recipe), plan_options(flatten_options(options), recipe is not None))
    device = resolved.recipe.model.device
    cluster = Devices(devices, nodes)
    target = target_share(find_target(device, parse_memory(memory), gpu), cluster, local=memory is None and gpu is None)
    model = read_model_facts(resolved.recipe)
    if gpu is not None and device.partition(":")[0] != target.device:  # the recipe was written for another machine
        resolved = resolved.decide([Choice("model.device", target.device, "plan", f"of the given GPU, {gpu}")])
    rows, adapter = measure_rows(resolved.recipe), start_adapter(resolved.recipe)
    return make_plan(resolved, model, target, rows=rows, adapter=adapter, devices=cluster)


@public
def compare_methods(
    recipe: PathLike | None = None,
    *,
    memory: int | str | None = None,
    gpu: str | None = None,
    **options: Unpack[Options],
) -> Comparison:
    """Compare the peak memory of full fine-tuning, 16-bit LoRA and QLoRA for models of several sizes.

    Args:
        recipe: path of a recipe file; its model is added to the comparison.
        memory: memory of the device, in bytes or as text such as "8GB".
        gpu: name of a GPU, such as "RTX 4090".
        **options: recipe fields, as for `train`.

    Returns:
        One row per model, smallest first, with the peak memory of each method in bytes.

    Raises:
        InputError: If an option or the model is invalid.

    Examples:
        >>> strop.compare_methods(gpu="RTX 3060")
    """
    from strop.config.load import resolve
    from strop.machine.memory import parse_memory
    from strop.planning.choose import usable_bytes
    from strop.planning.machines import find_target
    from strop.planning.microbatch import plan_options
    from strop.planning.plan import read_model_facts
    from strop.planning.tables import Comparison, known_models
    from strop.planning.tables import compare_methods as compare

    values = plan_options(flatten_options(options), recipe is not None)
    has_model = "model.name" in values or recipe is not None
    if not has_model:
        values["model.name"] = "-"  # placeholder: a recipe needs a model
    resolved = resolve(_as_path(recipe), values).recipe
    has_target = memory is not None or gpu is not None or resolved.model.device != "auto"
    target = find_target(resolved.model.device, parse_memory(memory), gpu) if has_target else None
    device, dtype = "cuda" if target is None else target.device, resolved.model.dtype
    dtype = "bf16" if dtype == "auto" else dtype  # the table has 16-bit LoRA, also where fp32 is faster
    section = resolved.model.model_copy(update={"device": device, "dtype": dtype})
    models = known_models()
    if has_model:
        model = read_model_facts(resolved)
        models = sorted([*models, (model.name, model.shape, model.parameters)], key=lambda entry: entry[2])
    usable = usable_bytes(target.machine, device) if target is not None else None
    return Comparison(compare(resolved.model_copy(update={"model": section}), models, usable))


@public
def train(
    recipe: PathLike | None = None,
    *,
    callback: Callable[[Event], None] | None = None,
    memory: int | str | None = None,
    resume_existing: bool = False,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> Run:
    """Fine-tune a model and write a run folder.

    Under a launcher such as torchrun, each process calls this function, and only rank 0 calls `callback`.

    Args:
        recipe: path of a recipe file. Options override its values.
        callback: called with each event that is written to events.jsonl, a dictionary with `event` (its kind, such as
            "step", "eval" or "end"), `time`, and the fields of that kind.
        memory: maximum memory to use, in bytes or as text such as "8GB".
        resume_existing: resume the run if `out` already contains it.
        progress: None shows the steps in a terminal or a notebook, and a line every 30 s in a log. True shows every
            few seconds in a log too, False nothing.
        **options: recipe fields by name, or by section, such as `lora={"r": 8}`. docs/recipe.md explains all of them.
            The usual ones are
            model: Hub id, folder, .gguf file, run (to train it further), or "demo". Required.
            data: training rows: a file, a list of files, or rows in memory: a pandas or polars DataFrame, a
                `datasets.Dataset`, a pyarrow Table, or a list of dicts, which are written to a file in strop's cache
                folder. Required.
            eval: rows to evaluate on, in the same forms, or a share of the training rows such as "5%".
            out: the run folder. Default: runs/DATA-N.
            epochs: passes over the training rows. max_steps: number of steps instead.
            lr: peak learning rate. Default: by model size, alpha and batch size.
            batch_size: rows in a step. max_length: maximum tokens of a row.
            rank: rank of the adapter. alpha: numerator of the LoRA scale. Default: 2 * rank.
            quantization: storage format of the frozen weights.
            objective: what the rows teach: completions ("sft"), pairs ("dpo"), rewards ("grpo"), and others.
            adapter: adapter or run folder to start training from.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps".
            max_time: save and stop after this time, such as "30m".
            seed: random seed.

    Returns:
        The run, with `folder` and `report`.

    Raises:
        InputError: If the recipe, the model, the data or the folder is invalid; raised before weights load.
        RunError: If training fails.
        Stopped: After Ctrl-C or SIGTERM, once the run is saved.

    Examples:
        >>> run = strop.train(model="demo", data="rows.jsonl", out="runs/mine", lora={"r": 8}, train={"max_steps": 2})
        >>> run.report["loss"]["last"]
    """
    from strop.config.load import resolve
    from strop.distributed.launch import join_devices

    resolved = resolve(_as_path(recipe), flatten_options(options))
    check_recipe_inputs(resolved.recipe, resume_existing)
    with join_devices() as devices, show_run(progress, devices.is_main) as shown:
        import_libraries()
        from strop.machine.memory import parse_memory
        from strop.machine.torch_state import isolated_torch_state
        from strop.training.run import train as run_training

        limit = parse_memory(memory)
        listeners = [listener for listener in (callback, shown) if listener is not None]
        with isolated_torch_state():
            return run_training(resolved, listeners, memory=limit, devices=devices, resume_existing=resume_existing)


@public
def resume(
    run: PathLike,
    *,
    callback: Callable[[Event], None] | None = None,
    allow_changed: str | Sequence[str] = (),
    memory: int | str | None = None,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> Run:
    """Resume a run from its newest complete checkpoint. A finished run is returned unchanged.

    Args:
        run: the run folder.
        callback: called with each event that is written to events.jsonl, a dictionary with `event` (its kind, such as
            "step", "eval" or "end"), `time`, and the fields of that kind.
        allow_changed: what may have changed since the run started: "lr", "schedule", "base", "data", "template",
            "versions", or a recipe field.
        memory: maximum memory to use, in bytes or as text such as "8GB".
        progress: None shows the steps in a terminal or a notebook, and a line every 30 s in a log. True shows every
            few seconds in a log too, False nothing.
        **options: recipe fields with new values. `allow_changed` must list each of them.

    Returns:
        The run, with `folder` and `report`.

    Raises:
        InputError: If the folder is not a run, or something changed that `allow_changed` does not list.
        RunError: If training fails.
        Stopped: After Ctrl-C or SIGTERM, once the run is saved.

    Examples:
        >>> strop.resume("runs/mine")
    """
    from strop.distributed.launch import join_devices

    with join_devices() as devices, show_run(progress, devices.is_main) as shown:
        import_libraries()
        from strop.machine.memory import parse_memory
        from strop.machine.torch_state import isolated_torch_state
        from strop.training.run import resume as resume_training

        texts = [allow_changed] if isinstance(allow_changed, str) else allow_changed
        names = [name.strip() for text in texts for name in text.split(",")]
        limit = parse_memory(memory)
        listeners = [listener for listener in (callback, shown) if listener is not None]
        with isolated_torch_state():
            return resume_training(
                Path(run),
                listeners,
                options=flatten_options(options),
                allow_changed=names,
                memory=limit,
                devices=devices,
            )


@public
def evaluate(
    run: PathLike | Sequence[PathLike],
    data: Rows,
    *,
    metric: str | Callable[[str, str], bool] | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    general: bool = False,
    regression_data: Rows = (),
    regression_metric: str | Callable[[str, str], bool] | None = None,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    judge: str | Callable[[str, str, str, str], float] | None = None,
    judge_model: str | None = None,
    quantization: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: AnswerProgress = None,
    **options: Any,
) -> Evaluation:
    """Compare the base model and the tuned model on held-out rows. The result is also written to the run's report.

    Args:
        run: a run, adapter or model folder, .gguf file, Hub id or "demo"; or a list of them.
        data: a data file, a list of files, or rows in memory, as for `train`.
        metric: "exact" (default), "exact_json", "contains", "regex", "choice", "file.py:function", or a function of
            the right answer and an answer, which returns whether the answer is right; by default "preference" for
            pairs, "accuracy" for a classifier, "accuracy_at_1" for embeddings, and "mean_reward" for a run in an
            environment, where other metrics score the last turn of a trace.
        limit: maximum number of rows, which are then evenly chosen, and of rows of `regression_data`. Default: all.
        max_new_tokens: maximum length of an answer in tokens. Default: 1.25 times the longest reference answer, and at
            least 80.
        general: also evaluate on the built-in general set, to detect abilities that training made worse.
        regression_data: further rows on which the model should not get worse.
        regression_metric: metric for `regression_data`. Default: `metric`.
        tasks: tasks of lm-evaluation-harness, by name or .yaml file.
        task_limit: maximum number of documents per task.
        judge: decides which answer is better: "file.py:function", the URL of an OpenAI-compatible server, or a
            function of the conversation, the right answer and two answers, which returns a number above 0 if the first
            is better, and below 0 if the second is.
        judge_model: name of the model on the judge's server.
        quantization: "none", "nf4", "fp4", "int8", or "auto" (the quantization used in training).
        dtype: "auto" (that of training), "bf16", "fp32" or "fp16".
        force: load the adapter even if the base differs from the one it was trained on.
        progress: show how many answers are generated; or a function that is called with a label (such as
            "base and tuned"), the number of finished answers, and their total.
        **options: `format`, `columns` or `encoding` of the data. Default: the run's settings.

    Returns:
        The fields of `strop eval --json`. For a list of runs: {"runs": [...], "leaderboard": [...]}.

    Raises:
        InputError: If an option, the model or the data is invalid.
        RunError: If the judge fails. The error's `partial_result` has the results up to the failure.

    Examples:
        >>> result = strop.evaluate("runs/mine", "held_out.jsonl", metric="contains", max_new_tokens=8)
        >>> result["difference"]
    """
    from strop.distributed.launch import join_devices

    is_list = isinstance(run, Iterable) and not isinstance(run, str | os.PathLike)
    runs: Any = run if is_list else [run]
    names = [check_path("run", name) for name in runs]
    if not names:
        raise InputError("evaluate: the list of runs is empty", fix='give a run, such as "runs/mine"')
    options = flatten_options(options)
    data, regression_data = _data_files(data, "data"), _data_files(regression_data, "regression_data")
    metric_name, regression_name, judge_name = map(_name_function, (metric, regression_metric, judge))
    check_inputs(models=names, data=[data, regression_data], metrics=[metric_name, regression_name])
    with join_devices() as devices, show_answers(progress, devices.is_main) as advance:
        import_libraries()
        from strop.evaluation.run import EvalOptions, evaluate_models, rank_models
        from strop.machine.torch_state import isolated_torch_state

        with isolated_torch_state():
            chosen = EvalOptions(
                metric=metric_name,
                limit=limit,
                max_new_tokens=max_new_tokens,
                quantization=quantization,
                dtype=dtype,
                force=force,
                general=general,
                regression_data=regression_data,
                regression_metric=regression_name,
                tasks=tasks,
                task_limit=task_limit,
                judge=judge_name,
                judge_model=judge_model,
                reading=options,
            )
            results = evaluate_models(names, data, chosen, advance=advance, devices=devices)
    from strop.evaluation.tables import Evaluation

    return Evaluation({"runs": results, "leaderboard": rank_models(results)} if is_list else results[0])


@dataclass(frozen=True)
class CheckedRows:
    """A recipe's rows, prepared for training, with the recipe, the tokenizer and the kind of rows."""

    recipe: Recipe
    tokenizer: Any
    data_kind: DataKind
    prepared: Prepared

    def write_copy(self, out: Path) -> str:
        """Write a cleaned copy of the rows, and return a line about it. Raises the errors of `write_cleaned_copy`."""
        from strop.data.check import write_cleaned_copy

        changes = write_cleaned_copy(self.recipe.data, self.tokenizer, out, self.data_kind, self.recipe.train.labels)
        with out.open("rb") as file:
            written = sum(1 for _ in file)
        dropped = sum(change.change.startswith("dropped") for change in changes)
        return f"wrote {out}: {written:,} rows, {dropped:,} dropped (see {out}.changes.jsonl)"


@public
def check(
    recipe: PathLike | None = None, *, show: int = 0, fix: PathLike | None = None, **options: Unpack[Options]
) -> CheckReport:
    """Check the rows that a recipe would train on. Invalid rows are reported instead of raising an error.

    Args:
        recipe: path of a recipe file.
        show: number of rows to print token by token with the report, with the tokens that are trained on.
        fix: a new file (.jsonl) for a cleaned copy of the rows; `fix` with `.changes.jsonl` lists what was changed.
        **options: recipe fields, as for `train`. Without `recipe` and `model`, the demo model's tokenizer is used.

    Returns:
        The fields of `strop check --json`.

    Raises:
        InputError: If an option or the model is invalid, or a data file cannot be read.

    Examples:
        >>> strop.check(model="demo", data="rows.jsonl")["rows"]["used"]
        >>> print(strop.check(model="demo", data="rows.jsonl", show=1))
    """
    from strop.display.tables import CheckReport

    if show < 0:
        raise InputError(f"check: show is {show}", fix="give a number of rows, such as show=3")
    checked = check_rows(recipe, options)
    return CheckReport(checked.prepared, show, None if fix is None else checked.write_copy(Path(fix)))


def check_rows(recipe: PathLike | None, options: Mapping[str, Any]) -> CheckedRows:
    """Prepare a recipe's rows for training; see `check` for the arguments and errors."""
    from strop.config.load import resolve
    from strop.models.source import locate
    from strop.models.tokenizer import check_template, load_tokenizer
    from strop.objectives.classification import class_weights
    from strop.objectives.table import data_kind_of, prepare_rows

    values = flatten_options(options) if recipe else {"model.name": "demo", **flatten_options(options)}
    resolved = resolve(_as_path(recipe), values).recipe
    source, data_kind = locate(resolved.model.name, resolved.model.revision), data_kind_of(resolved.train)
    check_template(source, resolved.data, data_kind)
    tokenizer = load_tokenizer(source)
    LOG.info("reading and checking the rows")
    prepared = prepare_rows(resolved, tokenizer, strict=False)
    if prepared.classes is not None and prepared.classes.names:
        class_weights(resolved.train.class_weights, dict.fromkeys(prepared.classes.names, 1))
    return CheckedRows(resolved, tokenizer, data_kind, prepared)


@public
def load(
    name: PathLike,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    force: bool = False,
    progress: StepProgress = None,
) -> Model:
    """Load a model for generation.

    Args:
        name: a run, adapter or model folder, .gguf file, Hub id, or "demo".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dtype: "auto" (that of training), "bf16", "fp32" or "fp16". A .gguf file is rounded to bf16 first.
        quantization: "none", "nf4", "fp4", "int8", or "auto" (the quantization used in training).
        force: load the adapter even if the base differs from the one it was trained on.
        progress: show each step; or a function that is called with its description.

    Returns:
        The model, with the methods `generate` and `chat`.

    Raises:
        InputError: If the model, the device or an option is invalid.
        RunError: If this process was forked from one that used strop.

    Examples:
        >>> model = strop.load("runs/mine")
        >>> model.chat("lunch with Ana, 12.50 eur", max_new_tokens=8)
        >>> model.generate(["taxi, 31 eur", "train, 12 eur"], max_new_tokens=8)
    """
    check_inputs(models=[name])
    with show_steps(progress, "loading the libraries"):
        import_libraries()
        from strop.engine.decode.model import load as load_model
        from strop.machine.torch_state import isolated_torch_state

        with isolated_torch_state():
            return load_model(name, device=device, dtype=dtype, quantization=quantization, force=force)


@public
def merge(
    run: PathLike,
    out: PathLike,
    *,
    dtype: str = "bf16",
    data: Rows = None,
    measure: bool = True,
    progress: StepProgress = None,
) -> Merged:
    """Merge an adapter into its base as a new model folder, and compare the merged model with the tuned model.

    Args:
        run: a run or adapter folder.
        out: the model folder to write.
        dtype: "bf16", "fp16" or "fp32".
        data: rows to compare the models on, as a file or in memory. Default: the run's rows.
        measure: compare the predictions of both models at up to 2,048 positions of the rows, which on a CPU can take
            longer than the rest. Use False to skip it, for example if the models are too large for this machine.
        progress: show each step; or a function that is called with its description.

    Returns:
        The merged model: `out`, `files`, and `parity` with the measured differences.

    Raises:
        InputError: If the run or the folder is invalid; raised before anything is written.
        ParityError: If the merged model differs too much from the tuned model.

    Examples:
        >>> strop.merge("runs/mine", "mine-merged").parity
    """
    rows = None if data is None else _data_files(data, "data")
    check_inputs(adapters=[run], data=[rows], out=out)
    with show_steps(progress, "loading the libraries") as step:
        import_libraries()
        from strop.exporting.merge import merge as merge_adapter
        from strop.machine.torch_state import isolated_torch_state

        with isolated_torch_state():
            return merge_adapter(os.fspath(run), Path(out), dtype=dtype, data=rows, measure=measure, progress=step)


@overload
def export(
    target: Literal["gguf"],
    run: PathLike,
    out: PathLike,
    *,
    type: str | None = None,
    adapter: bool = False,
    data: Rows = None,
    measure: bool = True,
    progress: StepProgress = None,
) -> Exported: ...


@overload
def export(
    target: Literal["ollama"],
    run: PathLike,
    out: PathLike,
    *,
    type: str | None = None,
    adapter: bool = False,
    data: Rows = None,
    measure: bool = True,
    progress: StepProgress = None,
) -> PreparedOllama: ...


@public
def export(
    target: Literal["gguf", "ollama"],
    run: PathLike,
    out: PathLike,
    *,
    type: str | None = None,
    adapter: bool = False,
    data: Rows = None,
    measure: bool = True,
    progress: StepProgress = None,
) -> Exported | PreparedOllama:
    """Export a run for llama.cpp or Ollama, and compare the result with the tuned model if llama.cpp is installed.

    Args:
        target: "gguf" writes a GGUF file for llama.cpp, "ollama" a folder for `ollama create`.
        run: a run or adapter folder.
        out: the file or folder to write.
        type: "f32", "f16", "bf16" or "q8_0" (default); if llama.cpp is installed, also "q6_k", "q5_k_m" and "q4_k_m".
        adapter: write only the adapter, in f32 ("gguf" only).
        data: rows to compare the models on, as a file or in memory. Default: the run's rows.
        measure: compare the predictions of both models at up to 2,048 positions of the rows, which on a CPU can take
            longer than the rest. Use False to skip it, for example if the models are too large for this machine.
        progress: show each step; or a function that is called with its description.

    Returns:
        The exported files and the measured differences.

    Raises:
        InputError: If the run or an option is invalid; raised before anything is written.
        ParityError: If the exported model differs too much from the tuned model.

    Examples:
        >>> strop.export("gguf", "runs/mine", "mine.gguf", type="f16")
    """
    if target not in ("gguf", "ollama"):
        raise InputError(f"export: unknown target {target}", fix="give gguf or ollama")
    if adapter and target == "ollama":
        raise InputError("export: ollama needs the whole model, not an adapter", fix="omit adapter, or give gguf")
    name, rows = os.fspath(run), None if data is None else _data_files(data, "data")
    check_inputs(models=[run], data=[rows], out=out, suffix=".gguf" if target == "gguf" else "")
    with show_steps(progress, "loading the libraries") as step:
        import_libraries()
        from strop.exporting.gguf import export_gguf
        from strop.exporting.ollama import export_ollama
        from strop.machine.torch_state import isolated_torch_state

        with isolated_torch_state():
            if target == "ollama":
                return export_ollama(name, Path(out), kind=type, data=rows, measure=measure, progress=step)
            return export_gguf(name, Path(out), kind=type, adapter=adapter, data=rows, measure=measure, progress=step)


def check_recipe_inputs(recipe: Recipe, resume_existing: bool = False) -> None:
    """Check the inputs of a new run; see `check_inputs`."""
    from strop.data.reading.sources import read_eval_share
    from strop.distributed.devices import find_ranks
    from strop.runs.folder import check_new_run, is_run

    if find_ranks() is not None:  # the processes of a launcher have to fail together
        return
    out = Path(recipe.out).expanduser() if recipe.out else None  # in a recipe, no shell has expanded ~
    if out is not None and not (resume_existing and is_run(out)):
        check_new_run(out)
    evaluated = None if read_eval_share(recipe.data.eval) else recipe.data.eval
    check_inputs(
        models=[recipe.model.name], revision=recipe.model.revision, data=[recipe.data.train, evaluated],
        adapters=[recipe.model.adapter] if recipe.model.adapter else (),
    )  # fmt: skip
    _check_first_rows(recipe.model_dump_json())


@cache  # `strop train` checks its rows before the libraries load, and the function that it calls checks them again
def _check_first_rows(recipe_json: str) -> None:
    """Raise the error of a run on a local model whose template is missing or whose first rows are invalid."""
    from strop.config.schema import Recipe
    from strop.models.source import is_on_disk, locate
    from strop.models.tokenizer import check_template, load_tokenizer
    from strop.objectives.table import data_kind_of, prepare_rows

    recipe = Recipe.model_validate_json(recipe_json)
    if not is_on_disk(recipe.model.name) or recipe.model.adapter:  # an adapter has a template of its own
        return
    source, data_kind = locate(recipe.model.name, recipe.model.revision), data_kind_of(recipe.train)
    check_template(source, recipe.data, data_kind)

    from strop.data.prepare import has_bad_rows  # after the checks above, because it takes a second

    if recipe.data.bad_rows == "refuse" and has_bad_rows(recipe.data, data_kind):
        prepare_rows(recipe, load_tokenizer(source))


def check_inputs(
    *,
    models: Sequence[PathLike] = (),
    revision: str | None = None,
    adapters: Sequence[PathLike] = (),
    data: Sequence[Any] = (),
    metrics: Sequence[str | None] = (),
    out: PathLike | None = None,
    suffix: str = "",
) -> None:
    """Raise InputError for names and paths that do not exist, and for an output that exists or lacks the suffix.

    This takes less than a second, so that a typing error is reported before the libraries load, which takes longer.
    """
    from strop.data.reading import sources
    from strop.distributed.devices import find_ranks
    from strop.evaluation.metrics import MODEL_METRICS, find_metric
    from strop.models.adapter_config import adapter_folder, find_adapter_folder
    from strop.models.source import check_exists
    from strop.runs.folder import check_new_output

    if find_ranks() is not None:  # the processes of a launcher have to fail together
        return
    if out is not None:
        check_new_output(Path(out), suffix)
    for name in models:
        check_exists(os.fspath(name), revision)
        adapter_folder(os.fspath(name))  # a run that is still being trained
    for name in adapters:
        find_adapter_folder(os.fspath(name))
    for spec in data:
        if spec:
            sources.check_exists(spec)
    for metric in metrics:
        if metric not in (None, *MODEL_METRICS):
            find_metric(metric)


@public
def push(
    run: PathLike,
    repo: str,
    *,
    public: bool = False,
    base: str | None = None,
    message: str | None = None,
    progress: StepProgress = None,
) -> Pushed:
    """Upload an adapter or a model to the Hugging Face Hub, in one commit.

    Args:
        run: a run, adapter or model folder.
        repo: the repository, as "OWNER/NAME". It is created if it does not exist.
        public: create a public repository, or allow pushing to an existing public one.
        base: Hub id of the adapter's base, if the adapter was trained on a folder, a GGUF file or the demo model.
        message: the commit message.
        progress: show each step; or a function that is called with its description.

    Returns:
        The uploaded files and the URL of the repository.

    Raises:
        InputError: If the folder, the repository or an option is invalid; raised before anything is uploaded.
        RunError: If the Hub cannot be reached, or its files differ from the uploaded ones.

    Examples:
        >>> strop.push("runs/mine", "me/mine")
    """
    if not Path(run).exists():
        from strop.runs.folder import suggest_path

        what = f"{run}: no such run, adapter or model folder{suggest_path(os.fspath(run))}"
        raise ModelError(what, fix="give one of these")
    with show_steps(progress, "reading the folder") as step:
        import_libraries()
        from strop.exporting.hub import push as push_folder

        return push_folder(os.fspath(run), repo, public=public, base=base, message=message, progress=step)


def _as_path(recipe: PathLike | None) -> Path | None:
    return Path(recipe) if recipe else None


def _data_files(value: Any, name: str) -> Any:
    """Convert paths of data files to text, and write rows in memory to a file in the cache. Raises InputError."""
    from strop.data.reading.in_memory import find_rows, refuse_other_rows, write_rows

    if (rows := find_rows(value)) is not None:
        return write_rows(name, rows)
    if isinstance(value, list) and not value:
        raise InputError(f"{name}: the list has no rows and no files", fix="give rows as dicts, or paths")
    if isinstance(value, list | tuple):
        refuse_other_rows(name, value)
        return [_data_files(part, name) for part in value]
    if not isinstance(value, str | os.PathLike):
        what = f"{name}: a file, a list of files, a DataFrame, a Dataset or a list of dicts, not {type(value).__name__}"
        raise InputError(what, fix="convert the rows to a list of dicts")
    return os.fspath(value)


def flatten_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options by dotted name, with paths as text. Raises InputError for duplicates."""
    from strop.config.names import full_name
    from strop.config.schema import option_fields

    full_names = {field.rpartition(".")[2]: field for field, _ in option_fields()}
    sections = ("model", "data", "lora", "train")
    flat: dict[str, Any] = {}
    given: dict[str, str] = {}  # field -> how the caller named it
    for name, option in options.items():
        if name in ("lora", "train") and not isinstance(option, Mapping):
            example = '{"r": 8}' if name == "lora" else '{"epochs": 1}'
            raise InputError(f"{name}: a dictionary such as {example}, not {option!r}", fix="give its fields by name")
        is_section = name in sections and isinstance(option, Mapping)
        if name == "data" and is_section and not any(f"data.{key}" in full_names.values() for key in option):
            what = f"data: a dictionary of columns ({', '.join(map(str, option))}), not rows"
            raise InputError(what, fix='give a list of rows such as [{"prompt": "hi", "completion": "yo"}]')
        for field, value in (option if is_section else {name: option}).items():
            dotted = full_name(field) if not is_section else f"{name}.{field}"
            short = full_names.get(field) or full_name(field)
            if dotted not in full_names.values() and (not is_section or short.startswith(f"{name}.")):
                dotted = short
            keyword = f'{name}={{"{field}": ...}}' if is_section else field
            if dotted in flat:
                what = f"{dotted}: given twice, as {given[dotted]} and as {keyword}"
                raise InputError(what, fix="leave out one of them")
            given[dotted] = keyword
            if dotted == "train.rewards" and not isinstance(value, str | None):
                parts = value if isinstance(value, list | tuple) else [value]
                value = [function_spec(dotted, part) for part in parts]
            if dotted == "train.environment":
                value = function_spec(dotted, value)
            is_files = dotted in ("data.train", "data.eval") and not isinstance(value, int | float | None)
            flat[dotted] = _data_files(value, dotted) if is_files else _paths_to_text(value)
    return flat


def _name_function(value: Any) -> Any:
    """Return a function as a name that has it, and other values unchanged."""
    from strop.evaluation.metrics import FunctionName

    return FunctionName(value) if callable(value) else value


def _paths_to_text(value: Any) -> Any:
    """Convert a path or a Run, or each in a list, to text; return other values unchanged."""
    if isinstance(value, list | tuple):
        return [_paths_to_text(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
