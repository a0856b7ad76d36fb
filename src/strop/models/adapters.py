"""Save and load PEFT adapter folders, check that they belong to their base, and disable adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from strop.data.rendering.image_encoder import save_processor
from strop.data.rendering.render import Renderer
from strop.data.types import Classes
from strop.errors import ModelError
from strop.models.adapter_config import (
    STORED_BASE,
    STROP_FILE,
    WEIGHTS_FILE,
    AdapterKind,
    check_adapter_fits,
    check_adapter_kind,
    count_outputs,
    peft_load_errors,
    read_adapter_config,
    read_base_name,
    read_identity,
    why_base_changed,
)
from strop.models.embedder import set_padding, write_modules
from strop.models.introspect import max_positions
from strop.models.lora import add_score_head, grow_vocabulary, ignore_peft_warnings, patch_lora_forward
from strop.models.source import Source, fingerprint, locate, read_safetensors_header
from strop.models.tensor_files import FLOATS, is_finite
from strop.models.tokenizer import trained_token_rows
from strop.runs.folder import new_folder, write_json
from strop.runs.lock import sha256_file, versions


def save_adapter(model: peft.PeftModel, tokenizer: Any, folder: Path, identity: dict[str, Any]) -> None:
    """Write a PEFT adapter folder atomically: weights, config, tokenizer, chat template, strop.json."""
    # identity: {base: {name, fingerprint}, template, data, system (a system prompt in all training rows), reasoning,
    # pooling (of a model of embeddings)}
    if pooling := identity.get("pooling"):
        set_padding(tokenizer)
    with new_folder(folder) as temp:
        # By default PEFT queries the Hub to see whether embeddings were resized. Trained rows of the
        # embeddings are saved even so.
        model.save_pretrained(str(temp), safe_serialization=True, save_embedding_layers=False)
        tokenizer.save_pretrained(temp)
        save_processor(tokenizer, temp)
        if pooling:
            write_modules(temp, pooling, cast(Any, model).get_output_embeddings().weight.shape[1], max_positions(model))
        (temp / "README.md").unlink()  # PEFT's model card, which is an empty template
        base, written = identity.get("base"), read_adapter_config(temp).get("base_model_name_or_path")
        if base and written != base["name"]:  # of a GGUF file: PEFT reads its weights from this folder
            identity = {**identity, "base": {**base, "folder": written}}
        weights = {"sha256": sha256_file(temp / WEIGHTS_FILE)}
        write_json(temp / STROP_FILE, {**identity, "weights": weights, "versions": versions()})


def read_classes(folder: Path) -> Classes:
    """Return the classes of a classifier's adapter; those of other tools are named as transformers does."""
    identity = read_identity(folder)
    names = identity.get("labels") or [f"LABEL_{i}" for i in range(count_outputs(folder))]
    return Classes(tuple(names), bool(identity.get("several_labels")))


def locate_base(folder: Path) -> Source:
    if name := read_base_name(folder):
        return locate(name)
    what = f"{folder}: does not say which model it was trained on (base_model_name_or_path)"
    raise ModelError(what, fix="write it into its adapter_config.json")


def locate_tokenizer(folder: Path, source: Source) -> Source:
    """Return the source of an adapter's tokenizer: the adapter's folder, or its base if no tokenizer is saved there."""
    has_own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return Source(source.name, "folder", folder) if has_own else source


def model_identity(folder: Path | None, source: Source) -> dict[str, Any]:
    """Return strop.json of an adapter in `folder`, or without one of the model: merged, or with all weights trained."""
    return {} if folder is None and source.kind != "folder" else read_identity(folder or source.path)


def make_renderer(tokenizer: Any, identity: Mapping[str, Any]) -> Renderer:
    """Return the renderer that an adapter was trained with. identity: the result of `read_identity`."""
    return Renderer(tokenizer, reasoning=identity.get("reasoning", "auto"))


def attach_adapter(
    base: nn.Module,
    folder: Path,
    source: Source,
    *,
    trainable: bool = False,
    force: bool = False,
    name: str = "default",
    kind: AdapterKind = "text",
) -> tuple[peft.PeftModel, list[str]]:
    """Load an adapter onto its base (`source`), and return the model and warnings about mismatches."""
    # force: allow a base that it was not trained on, if names and shapes fit. Raises ModelError if the adapter does not
    # belong to the base, does not fit, was changed since it was saved, or has NaN.
    config = read_adapter_config(folder)
    check_adapter_kind(folder, kind)
    mismatches = check_adapter_base(folder, source, force=force)
    check_adapter_weights(folder)
    _check_stored_base(base, folder)
    if isinstance(base, peft.PeftModel):
        _check_shared_base(base, folder, config)
    else:
        if outputs := count_outputs(folder):
            add_score_head(base, outputs)
        last_row = max((row for rows in trained_token_rows(config).values() for row in rows), default=-1)
        grow_vocabulary(base, 1 + last_row)
    # of a model without biases, an adapter has none either
    has_biases = any(name.endswith(".bias") for name in read_safetensors_header(folder / WEIGHTS_FILE))
    trains_biases = str(config.get("bias", "none")) != "none" and has_biases
    if isinstance(base, peft.PeftModel) and (trains_biases or has_trained_biases(base)):
        whose = "it has" if trains_biases else "an adapter before it has"
        what = f"{folder}: cannot share a base: {whose} trained biases (lora.bias)"
        raise ModelError(what, fix="load each by itself")
    weights = base.named_parameters() if trains_biases else ()
    base_biases = {name: weight.detach().clone() for name, weight in weights if name.endswith("bias")}
    # By default PEFT loads onto a GPU if there is one, which starts CUDA even for a model on the CPU.
    devices = (weight.device for weight in base.parameters() if weight.device.type != "meta")
    options: dict[str, Any] = {"is_trainable": trainable, "torch_device": str(next(devices, "cpu"))}
    shared = isinstance(base, peft.PeftModel)
    missing_keys = ignore_peft_warnings("Found missing adapter keys")  # checked below
    with ExitStack() as stack, peft_load_errors(folder, source.name, shared), missing_keys:
        if isinstance(base, peft.PeftModel):
            model = base
            stack.callback(_remove_adapter, model, name)  # unless it fits
            model.load_adapter(str(folder), adapter_name=name, **options)
        else:
            model = peft.PeftModel.from_pretrained(base, str(folder), adapter_name=name, **options)
        state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        check_adapter_fits({key: weight.shape for key, weight in state.items()}, folder, source.name)
        stack.pop_all()
    if trains_biases:
        # PEFT overwrites the base's biases with the adapter's; `adapter_disabled` restores them.
        names = [name for name, _ in model.named_parameters()]
        base_names = [name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in names]
        biases = {name: base_biases[key] for name, key in zip(names, base_names, strict=True) if key in base_biases}
        cast(Any, model).biases_of_base = biases
    return patch_lora_forward(model), mismatches


def _check_stored_base(base: nn.Module, folder: Path) -> None:
    """Raise ModelError if the adapter's file has weights of the base (PEFT adds an adapted head) with other values."""
    names = [name for name in read_safetensors_header(folder / WEIGHTS_FILE) if name.endswith(STORED_BASE)]
    stored = load_file(folder / WEIGHTS_FILE) if names else {}
    model = base.get_base_model() if isinstance(base, peft.PeftModel) else base
    for name in names:
        module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(STORED_BASE))
        weight = cast(Tensor, getattr(module, "base_layer", module).weight).detach()
        same_shape = weight.shape == stored[name].shape
        if not weight.is_meta and not (same_shape and torch.equal(weight.cpu(), stored[name].to(weight.dtype))):
            what = f"{folder}: {name} has other values than the base"
            raise ModelError(what, fix="load it on the base it was trained on")


def _check_shared_base(model: peft.PeftModel, folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError if PEFT cannot load an adapter next to those of the model, because of trained embeddings."""
    rows, others = trained_token_rows(config), [vars(other) for other in model.peft_config.values()]
    alone = "load each by itself"
    if max((row for ids in rows.values() for row in ids), default=-1) >= len(model.get_input_embeddings().weight):
        raise ModelError(f"{folder}: has more tokens than the model", fix=f"load it first, or {alone}")
    if not rows and any(map(trained_token_rows, others)):
        what = f"{folder}: trains no tokens, and an adapter before it does"
        raise ModelError(what, fix=f"load the adapter with tokens last, or {alone}")
    tokens = {name for one in (config, *others) for name in trained_token_rows(one)}
    full = {str(name) for one in (config, *others) for name in one.get("modules_to_save") or ()}
    if both := {name for name in tokens if any(name == other.rpartition(".")[2] for other in full)}:
        what = f"{folder}: one adapter trains rows of {min(both)}, and another trains all of it"
        raise ModelError(what, fix=alone)


def _remove_adapter(model: peft.PeftModel, name: str) -> None:
    """Remove what is left of an adapter that PEFT could not load."""
    with suppress(Exception):  # of whatever part was loaded
        if name in model.peft_config:
            model.delete_adapter(name)


@torch.no_grad()
def restore_precision(model: peft.PeftModel, folder: Path) -> peft.PeftModel:
    """Copy the adapter's weights into modules that were cast to fp32: PEFT has rounded them to the base's dtype."""
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for key, weight in load_file(folder / WEIGHTS_FILE).items():
        if not key.endswith(STORED_BASE):
            state[key].copy_(weight)
    return model


def attach_another_adapter(
    module: peft.PeftModel, folder: Path, source: Source, name: str, *, force: bool = False
) -> list[str]:
    """Load another adapter onto a base (`source`) that already has one, and return warnings about mismatches."""
    if not force:
        check_same_base(folder, source, "load it by itself")
    mismatches = attach_adapter(module, folder, source, force=force, name=name)[1]
    module.eval()
    return mismatches


def check_same_base(folder: Path, source: Source, fix: str) -> None:
    """Raise ModelError if an adapter, of another tool too, was trained on another base than `source`."""
    trained_on = read_identity(folder).get("base") or {"fingerprint": fingerprint(locate_base(folder))}
    if trained_on["fingerprint"] != fingerprint(source):
        raise ModelError(f"{folder}: trained on another base than {source.name}", fix=fix)


def check_adapter_base(folder: Path, source: Source, *, force: bool = False) -> list[str]:
    """Raise ModelError if the adapter was trained on a different base; with `force`, return a warning instead."""
    trained_on, actual, fix = read_identity(folder).get("base"), fingerprint(source), "load it on its own base"
    if reason := why_base_changed(read_adapter_config(folder)):
        what = f"{folder}: {reason}"
    elif not trained_on or trained_on["fingerprint"] == actual:
        return []
    else:
        fingerprints = f"fingerprint {trained_on['fingerprint'][:12]} expected, {actual[:12]} found"
        reason = f"is not {trained_on['name']}, on which it was trained"
        if trained_on["name"] == source.name:
            reason, fix = "has changed since training", "restore its files, or train again"
        what = f"{folder}: its base {source.name} {reason} ({fingerprints})"
    if not force:
        raise ModelError(what, fix=f"{fix} (chat and eval take --force)")
    return [what]


def check_adapter_weights(folder: Path) -> None:
    """Raise ModelError if the adapter file is damaged, has changed since it was saved, or contains NaN."""
    file, expected = folder / WEIGHTS_FILE, read_identity(folder).get("weights", {}).get("sha256")
    dtypes = {name: entry["dtype"] for name, entry in read_safetensors_header(file).items()}
    if name := next((name for name, dtype in dtypes.items() if dtype not in FLOATS), None):
        what = f"{file}: {name} is stored as {dtypes[name]}, which is not a dtype for adapters"
        raise ModelError(what, fix="save it in 16 or 32 bit")
    if bad := [name for name, weight in load_file(file).items() if not is_finite(weight.float())]:
        raise ModelError(f"{file}: {bad[0]} holds NaN or infinity", fix="take an older checkpoint of the run")
    actual = sha256_file(file)
    if expected and actual != expected:
        what = f"{file}: not the file that was saved: sha256 {actual[:12]}, {expected[:12]} expected"
        raise ModelError(what, fix=f"restore it, or remove {STROP_FILE} if the change was intended")


def has_trained_biases(model: nn.Module) -> bool:
    return bool(getattr(model, "biases_of_base", None))


@contextmanager
def adapter_disabled(model: peft.PeftModel) -> Iterator[None]:
    """Disable the adapter inside the block; if it has trained biases, use the base's biases there."""
    base_biases: Mapping[str, Tensor] = getattr(model, "biases_of_base", {})
    biases = {name: weight for name, weight in model.named_parameters() if name in base_biases} if base_biases else {}
    tuned_biases = {name: weight.detach().clone() for name, weight in biases.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Careful, disabling adapter")  # PEFT warns that trained biases stay in use
        with model.disable_adapter():
            try:
                _copy_into(base_biases, biases)
                yield
            finally:
                _copy_into(tuned_biases, biases)


@torch.no_grad()
def _copy_into(values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])
