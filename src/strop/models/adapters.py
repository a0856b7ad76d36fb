"""Adapters on disk (PEFT's format, with a card and the fingerprint of their base), and models ready to answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file
from torch import nn

from strop.data.rendering.render import Renderer
from strop.errors import ModelError
from strop.models.adapter_config import WEIGHTS_FILE, read_adapter_config, check_adapter_fits, peft_load_errors
from strop.models.adapters import copy_biases, has_trained_biases, store_base_biases
from strop.models.lora import REWARD_TASK, add_score_head, grow_vocabulary, why_base_changed, patch_lora_forward, ignore_peft_warnings
from strop.models.source import Source, fingerprint, locate, read_safetensors_header
from strop.models.tensor_files import FLOATS, is_finite
from strop.models.tokenizer import trained_token_rows
from strop.runs.folder import RunFolder, is_run, new_folder, write_json
from strop.runs.lock import sha256_file, versions

STROP_FILE = "strop.json"  # beside adapter_config.json: base fingerprint, template and data hash


def save_adapter(model: peft.PeftModel, tokenizer: Any, folder: Path, identity: dict[str, Any]) -> None:
    """Writes a PEFT adapter folder, whole or not at all: weights, config, tokenizer, template, strop.json.

    identity: {base: {name, fingerprint}, template, data, system, reasoning}; base is checked when it is loaded, system
    (that every training row had, or None) is what `chat` starts with, reasoning what became of it in training.
    """
    with new_folder(folder) as temp:
        # peft would look the base up on the Hub to see whether embeddings were resized; trained rows are saved anyway
        model.save_pretrained(str(temp), safe_serialization=True, save_embedding_layers=False)
        tokenizer.save_pretrained(temp)
        (temp / "README.md").unlink()  # peft's own card, all of it blanks to fill in
        weights = {"sha256": sha256_file(temp / WEIGHTS_FILE)}
        write_json(temp / STROP_FILE, {**identity, "weights": weights, "versions": versions()})


def adapter_folder(name: str) -> Path | None:
    """The adapter that a run or adapter folder holds; None where the name is not such a folder.

    Raises ModelError for a run that has no adapter yet.
    """
    path = Path(name).expanduser()
    if is_run(path):
        adapter = RunFolder(path).adapter
        if not (adapter / "adapter_config.json").is_file():
            raise ModelError(f"{path}: this run has no adapter yet", fix=f"strop resume {path}")
        return adapter
    return path if (path / "adapter_config.json").is_file() else None


def is_reward_adapter(folder: Path) -> bool:
    """Whether an adapter is a reward model's: it scores answers and writes none."""
    return bool(read_adapter_config(folder).get("task_type") == REWARD_TASK)


def check_adapter_kind(folder: Path, scores: bool) -> None:
    """Raises ModelError for a reward model's adapter where one is wanted that writes, or the other way round."""
    if is_reward_adapter(folder) == scores:
        return
    if scores:
        raise ModelError(f"{folder}: writes answers and has no score", fix="give the adapter of a reward model")
    what = f"{folder}: a reward model's adapter, which scores answers and writes none"
    raise ModelError(what, fix="strop eval RUN --data PAIRS, or AutoModelForSequenceClassification of transformers")


def base_source(folder: Path) -> Source:
    """The base of an adapter folder. Raises ModelError where it is not to be found."""
    if name := read_adapter_config(folder).get("base_model_name_or_path"):
        return locate(str(name))
    raise ModelError(f"{folder}: does not say which model it was trained on (base_model_name_or_path)")


def tokenizer_source(folder: Path, source: Source) -> Source:
    """Where an adapter's tokenizer is: in its own folder, or, of one that another tool saved without, with its base."""
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return Source(source.name, "folder", folder) if own else source


def read_identity(folder: Path) -> dict[str, Any]:
    """strop.json of an adapter folder; {} for an adapter that another tool made."""
    file = folder / STROP_FILE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: damaged: {error}", fix="put it back, or take another adapter of the run") from None


def make_renderer(tokenizer: Any, identity: Mapping[str, Any]) -> Renderer:
    """What renders for an adapter as in its training. tokenizer: its own; identity: as `read_identity` gives it."""
    return Renderer(tokenizer, reasoning=identity.get("reasoning", "auto"))


def attach_adapter(
    base: nn.Module,
    folder: Path,
    source: Source,
    *,
    trainable: bool = False,
    force: bool = False,
    name: str = "default",
    scores: bool = False,
) -> tuple[peft.PeftModel, list[str]]:
    """(the base with the adapter of a folder on it, notes on what `force` let pass). scores: of a reward model.

    base: without an adapter, or with others, under other names.
    Raises ModelError where the adapter was trained on another base (unless forced), does not fit this one in every
    name and shape, was changed since it was saved, or holds NaN.
    """
    config = read_adapter_config(folder)
    check_adapter_kind(folder, scores)
    notes = check_adapter_base(folder, source, force=force)
    check_adapter_weights(folder)
    if not isinstance(base, peft.PeftModel):
        if scores:
            add_score_head(base)
        grow_vocabulary(base, 1 + max((row for rows in trained_token_rows(config).values() for row in rows), default=-1))
    own_biases = str(config.get("bias", "none")) != "none"
    if isinstance(base, peft.PeftModel) and (own_biases or has_trained_biases(base)):
        what = f"{folder}: an adapter with trained biases (lora.bias) cannot share a base with another"
        raise ModelError(what, fix="load each by itself")
    before = copy_biases(base) if own_biases else {}
    # peft would read it onto a card, if there is one, and start CUDA for a model on the CPU
    places = (weight.device for weight in base.parameters() if weight.device.type != "meta")
    how: dict[str, Any] = {"is_trainable": trainable, "torch_device": str(next(places, "cpu"))}
    with peft_load_errors(folder, source.name), ignore_peft_warnings("Found missing adapter keys"):  # refused below
        if isinstance(base, peft.PeftModel):
            model = base
            model.load_adapter(str(folder), adapter_name=name, **how)
        else:
            model = peft.PeftModel.from_pretrained(base, str(folder), adapter_name=name, **how)
    places = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    check_adapter_fits({key: weight.shape for key, weight in places.items()}, folder, source.name)
    if own_biases:
        store_base_biases(model, before)
    return patch_lora_forward(model), notes


def attach_second(module: peft.PeftModel, folder: Path, source: Source, name: str, *, force: bool = False) -> list[str]:
    """Loads a further adapter onto a base (`source`) that has one; gives notes on what `force` let pass.

    Raises ModelError where it was trained on another base (unless forced), or does not fit.
    """
    trained_on = read_identity(folder).get("base") or {"fingerprint": fingerprint(base_source(folder))}
    if not force and trained_on["fingerprint"] != fingerprint(source):
        raise ModelError(f"{folder}: trained on another base than {source.name}", fix="load it by itself")
    notes = attach_adapter(module, folder, source, force=force, name=name)[1]
    module.eval()
    return notes


def check_adapter_base(folder: Path, source: Source, *, force: bool = False) -> list[str]:
    """Raises ModelError where an adapter was trained on another base; with `force`, gives that as a note."""
    trained_on, found = read_identity(folder).get("base"), fingerprint(source)
    if moved := why_base_changed(read_adapter_config(folder)):
        what = f"{folder}: {moved}"
    elif not trained_on or trained_on["fingerprint"] == found:
        return []
    else:
        prints = f"fingerprint {trained_on['fingerprint'][:12]} expected, {found[:12]} found"
        what = f"{folder}: trained on {trained_on['name']}, which is not {source.name} ({prints})"
    if not force:
        raise ModelError(what, fix="load it on its own base (chat and eval take --force)")
    return [what]


def check_adapter_weights(folder: Path) -> None:
    """Raises ModelError for an adapter file that is damaged, was changed since it was saved, or holds NaN."""
    file, known = folder / WEIGHTS_FILE, read_identity(folder).get("weights", {}).get("sha256")
    kinds = {name: entry["dtype"] for name, entry in read_safetensors_header(file).items()}
    if odd := next((name for name, kind in kinds.items() if kind not in FLOATS), None):
        what = f"{file}: {odd} is stored as {kinds[odd]}, which no adapter is trained in"
        raise ModelError(what, fix="save it in 16 or 32 bit")
    if bad := [name for name, weight in load_file(file).items() if not is_finite(weight.float())]:
        raise ModelError(f"{file}: {bad[0]} holds NaN or infinity", fix="take an older checkpoint of the run")
    found = sha256_file(file)
    if known and found != known:
        what = f"{file}: not the file that was saved: sha256 {found[:12]}, {known[:12]} expected"
        raise ModelError(what, fix=f"make it again, or remove {STROP_FILE} if the change was meant")


# ---- from strop.models.biases ----
"""Biases that an adapter trained: peft puts them in the place of the base's, and leaves them there without it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn


def copy_biases(base: nn.Module) -> dict[str, Tensor]:
    """Copies of all that a model without an adapter has, by name."""
    return {name: bias.detach().clone() for name, bias in base.named_parameters() if name.endswith("bias")}


def store_base_biases(model: PeftModel, base: Mapping[str, Tensor]) -> None:
    """Has `adapter_disabled` put these back, which the model had before its adapter came."""
    named = ((name, name.removeprefix("base_model.model.")) for name, _ in model.named_parameters())
    cast(Any, model).biases_of_base = {
        name: base[plain] for name, one in named if (plain := one.replace(".base_layer.", ".")) in base
    }


def has_trained_biases(model: nn.Module) -> bool:
    """Whether an adapter brought biases of its own."""
    return bool(getattr(model, "biases_of_base", None))


@contextmanager
def adapter_disabled(model: PeftModel) -> Iterator[None]:
    """Inside this block the model is its base: the adapter is off, and biases are the base's."""
    own: Mapping[str, Tensor] = getattr(model, "biases_of_base", {})
    places = {name: weight for name, weight in model.named_parameters() if name in own} if own else {}
    tuned = {name: weight.detach().clone() for name, weight in places.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Careful, disabling adapter")  # it warns of what is done here
        with model.disable_adapter():
            try:
                _copy(own, places)
                yield
            finally:
                _copy(tuned, places)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    for name, place in places.items():
        place.copy_(values[name])
