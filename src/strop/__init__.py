"""strop fine-tunes open language models with LoRA on your own hardware, and proves the result.

    import strop
    run = strop.train(model="demo", data="rows.jsonl", out="runs/mine", lora={"r": 8})
    strop.evaluate(run.folder, "held_out.jsonl", metric="exact_json")
    strop.load(run.folder).chat("...")

Importing strop imports no torch; each function imports what it needs when it is called.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from strop.errors import InputError, RunError, Stopped, StropError

if TYPE_CHECKING:
    from strop.engine.decode.model import Model
    from strop.export.gguf import Exported
    from strop.export.hub import Pushed
    from strop.export.merge import Merged
    from strop.export.ollama import Prepared
    from strop.planning.compare import Row
    from strop.planning.plan import Plan
    from strop.training.run import Run

# peft imports bitsandbytes, and that advises to install a package of kernels that strop has no use for.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "RunError",
    "Stopped",
    "StropError",
    "check",
    "compare_methods",
    "evaluate",
    "export",
    "load",
    "merge",
    "plan",
    "push",
    "resume",
    "train",
]


def plan(
    recipe: str | Path | None = None,
    *,
    memory: int | str | None = None,
    gpu: str | None = None,
    devices: int = 1,
    nodes: int = 1,
    **options: Any,
) -> Plan:
    """Whether a recipe fits, how long it takes, and what to change where it does not; reads no weights, needs no torch.

    options: as of `train`; without `data`, the plan is about rows of the longest length. `model` may be the path of a
    config.json alone. memory: of the device, bytes or a text such as 8GB; gpu: a card by its name. Default: this
    machine. devices: of each of `nodes` machines like it (processes share a CPU and its memory).
    Raises InputError.
    """
    from strop.config.load import Choice, resolve
    from strop.machine.memory import limit_bytes
    from strop.planning.devices import Devices, share
    from strop.planning.inputs import look_at, place_for, row_sizes, start_adapter, without_data
    from strop.planning.plan import make_plan

    resolved = resolve(Path(recipe) if recipe else None, without_data(_flat(options), recipe is not None))
    model = resolved.recipe.model
    several = Devices(devices, nodes)
    place = share(place_for(model.device, limit_bytes(memory), gpu), several, here=memory is None and gpu is None)
    looked_at = look_at(resolved.recipe)
    if gpu is not None and model.device.partition(":")[0] != place.device:  # a recipe that was made for another machine
        resolved = resolved.decide([Choice("model.device", place.device, "plan", f"of --gpu {gpu}")])
    return make_plan(
        resolved,
        place.machine,
        looked_at,
        place.rate_of,
        device=place.device,
        dtype=place.dtype,
        rows=row_sizes(resolved.recipe),
        adapter=start_adapter(resolved.recipe),
        devices=several,
    )


def compare_methods(
    recipe: str | Path | None = None, *, memory: int | str | None = None, gpu: str | None = None, **options: Any
) -> list[Row]:
    """Peak memory of full fine-tuning, 16-bit LoRA and QLoRA for models of several sizes, and for `model` if given."""
    from strop.config.load import resolve
    from strop.machine.memory import limit_bytes
    from strop.planning.choose import usable_bytes
    from strop.planning.compare import compare, known_models
    from strop.planning.inputs import look_at, place_for, without_data

    given = without_data(_flat(options), recipe is not None)
    own = "model.name" in given or recipe is not None
    if not own:
        given["model.name"] = "-"
    chosen = resolve(Path(recipe) if recipe else None, given).recipe
    asked = memory is not None or gpu is not None or chosen.model.device != "auto"
    place = place_for(chosen.model.device, limit_bytes(memory), gpu) if asked else None
    device, dtype = ("cuda", "bf16") if place is None else (place.device, place.dtype[0])
    model = chosen.model.model_copy(update={"device": device, "dtype": dtype})
    models = known_models()
    if own:
        found = look_at(chosen)
        models = sorted([*models, (found.name, found.shape, found.parameters)], key=lambda entry: entry[2])
    usable = usable_bytes(place.machine, device) if place is not None else None
    return compare(chosen.model_copy(update={"model": model}), models, usable)


def train(
    recipe: str | Path | None = None,
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
    memory: int | str | None = None,
    **options: Any,
) -> Run:
    """Fine-tunes and returns the Run (folder, report).

    options: recipe fields as on the command line: `model`, `data`, `eval`, `out`, `preset`, `seed`; a section as a
    dict (`lora={"r": 8}`); or a dotted name (`**{"train.epochs": 1}`). `model` and `data` may be dicts too.
    callback: receives each event that events.jsonl gets. memory: what the run may have, bytes or a text such as 8GB.
    Started by torchrun or another launcher, it joins the other processes, and only rank 0 has a callback.
    Raises InputError before weights load, RunError while training, Stopped after Ctrl-C.
    """
    from strop.config.load import resolve
    from strop.distributed.launch import joined

    resolved = resolve(Path(recipe) if recipe else None, _flat(options))
    with joined() as devices:
        from strop.machine.memory import limit_bytes
        from strop.machine.torch_state import isolated_torch_state
        from strop.training.run import train as run_training

        with isolated_torch_state():
            return run_training(resolved, [callback] if callback else [], memory=limit_bytes(memory), devices=devices)


def resume(
    run: str | os.PathLike[str],
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
    allow_changed: str | Sequence[str] = (),
    memory: int | str | None = None,
    **options: Any,
) -> Run:
    """Goes on with a run from its newest complete checkpoint; a finished run is returned as it is.

    options: recipe fields with a new value, each of which `allow_changed` must name (see `strop resume --help`).
    """
    from strop.distributed.launch import joined

    listeners = [callback] if callback else []
    with joined() as devices:
        from strop.machine.memory import limit_bytes
        from strop.machine.torch_state import isolated_torch_state
        from strop.training.run import resume as go_on

        names = [allow_changed] if isinstance(allow_changed, str) else allow_changed
        limit = limit_bytes(memory)
        with isolated_torch_state():
            return go_on(
                Path(run), listeners, options=_flat(options), allow_changed=names, memory=limit, devices=devices
            )


def evaluate(
    run: str | os.PathLike[str],
    data: str | Path | Sequence[str | Path],
    *,
    metric: str = "exact",
    max_new_tokens: int = 80,
    general: bool = False,
    regression_data: str | Path | Sequence[str | Path] = (),
    regression_metric: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Base and tuned on held-out rows: the fields of `strop eval --json`. general: and on the general set.

    regression_data: and on rows of one's own that should not get worse, judged by regression_metric or metric.
    options: `data.format`, `data.columns`, `data.encoding`, where rows are not to be read as those of the run.
    """
    from strop.distributed.launch import joined

    with joined() as devices:
        from strop.evaluation.run import evaluate_model
        from strop.machine.torch_state import isolated_torch_state

        with isolated_torch_state():
            return evaluate_model(
                os.fspath(run), _texts(data, "data"), metric=metric, max_new_tokens=max_new_tokens, general=general,
                regression_data=_texts(regression_data, "regression_data"), regression_metric=regression_metric,
                devices=devices, options=options,
            )  # fmt: skip


def check(recipe: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """What would be trained on, row by row: the fields of `strop check --json`; nothing is refused.

    options: as of `train`; without `model`, the demo's tokenizer.
    """
    from strop.config.load import resolve
    from strop.data.prepare import prepare
    from strop.models.source import locate
    from strop.models.tokenizer import load_tokenizer
    from strop.objectives.table import learning_of

    given = _flat(options) if recipe else {"model.name": "demo", **_flat(options)}
    chosen = resolve(Path(recipe) if recipe else None, given).recipe
    tokenizer = load_tokenizer(locate(chosen.model.name, chosen.model.revision))
    learning = learning_of(chosen.train)
    return prepare(chosen.data, tokenizer, strict=False, learning=learning).report.as_json()


def merge(
    run: str | os.PathLike[str],
    out: str | Path,
    *,
    dtype: str = "bf16",
    data: str | Path | None = None,
    measure: bool = True,
) -> Merged:
    """The adapter of a run or adapter folder in its base, as a new model folder, measured against the adapter.

    dtype: bf16, fp16 or fp32. data: rows to measure on; default: the run's own.
    Raises InputError before anything is written, ParityError where the merged model is not the tuned one.
    """
    from strop.export.merge import merge as merge_into
    from strop.machine.torch_state import isolated_torch_state

    with isolated_torch_state():
        return merge_into(os.fspath(run), Path(out), dtype=dtype, data=_text(data), measure=measure)


def load(
    name: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    force: bool = False,
) -> Model:
    """A run, adapter or model folder, .gguf file, Hub id or `demo`, ready to `.generate` and `.chat`."""
    from strop.engine.decode.model import load as load_model
    from strop.machine.torch_state import isolated_torch_state

    with isolated_torch_state():
        return load_model(name, device=device, dtype=dtype, quantization=quantization, force=force)


def export(
    target: Literal["gguf", "ollama"],
    run: str | os.PathLike[str],
    out: str | Path,
    *,
    type: str | None = None,
    adapter: bool = False,
    data: str | Path | None = None,
    measure: bool = True,
) -> Exported | Prepared:
    """A GGUF file for llama.cpp, or a folder for Ollama, compared with the adapter where llama.cpp is installed.

    type: f32, f16, bf16, q8_0 (the default); with llama.cpp q6_k, q5_k_m, q4_k_m. adapter: it alone, in f32 (gguf).
    Raises InputError before anything is written, ParityError where what was made is not the tuned model.
    """
    from strop.export.gguf import export_gguf
    from strop.export.ollama import export_ollama
    from strop.machine.torch_state import isolated_torch_state

    if target not in ("gguf", "ollama") or (adapter and target == "ollama"):
        raise InputError(f"export: no {target}{' of an adapter' if adapter else ''}", fix="give gguf or ollama")
    with isolated_torch_state():
        if target == "gguf":
            return export_gguf(os.fspath(run), Path(out), kind=type, adapter=adapter, data=_text(data), measure=measure)
        return export_ollama(os.fspath(run), Path(out), kind=type, data=_text(data), measure=measure)


def push(
    run: str | os.PathLike[str], repo: str, *, public: bool = False, base: str | None = None, message: str | None = None
) -> Pushed:
    """Sends the adapter of a run or adapter folder, or a model folder, to the Hub as `repo` (OWNER/NAME): one commit.

    public: for everybody; without it a new repository is private, and a public one is refused. base: the Hub id of an
    adapter's base, where it was trained on a folder, a GGUF file or the demo's model. message: of the commit.
    Raises InputError before anything is sent, RunError where the Hub cannot be reached or holds other bytes after.
    """
    from strop.export.hub import push as push_to

    return push_to(os.fspath(run), repo, public=public, base=base, message=message)


def _text(data: str | Path | None) -> str | None:
    return None if data is None else _files(data, "data")


def _texts(data: str | Path | Sequence[str | Path], name: str) -> str | list[str]:
    found: str | list[str] = _files(data, name)
    return found


def _files(given: Any, name: str) -> Any:
    """Data files as text. Raises InputError for what is no path: rows that are in memory are not read."""
    for path in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(path, str | os.PathLike):
            what = f"{name}: a file or a list of files, not {type(path).__name__}"
            raise InputError(what, fix="write rows that are in memory into a file (JSON Lines), and give its path")
    return _plain(given)


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    from strop.config.load import SHORT_FORMS

    sections = ("model", "data", "lora", "train")
    flat: dict[str, Any] = {}
    for name, value in options.items():
        section = name in sections and isinstance(value, Mapping)
        fields = {f"{name}.{field}": inner for field, inner in value.items()} if section else {name: value}
        for field, given in fields.items():
            whole = SHORT_FORMS.get(field, field)
            if whole in flat:
                raise InputError(f"{whole}: given twice", fix="give it once")
            if whole == "train.rewards" and any(map(callable, given if isinstance(given, list) else [given])):
                raise InputError(f"{whole}: a function is given by its name", fix="give 'file.py:function'")
            files = whole in ("data.train", "data.eval") and not isinstance(given, int | float | None)
            flat[whole] = _files(given, whole) if files else _plain(given)
    return flat


def _plain(value: Any) -> Any:
    """A path, a Run, or a list with such, as a recipe has it: as text."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
