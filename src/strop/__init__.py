"""Fine-tune open language models with LoRA on your own hardware, and measure the result.

    import strop

    run = strop.train(model="demo", data="rows.jsonl", out="runs/mine", lora={"r": 8})
    strop.evaluate(run, "held_out.jsonl", metric="exact_json")
    strop.load(run).chat("...")

Functions:
    check            show what a recipe trains on, row by row
    plan             predict memory and time, and what to change if it does not fit
    compare_methods  compare the memory of full fine-tuning, LoRA and QLoRA
    train            fine-tune a model, and return a Run
    resume           continue a run from its newest checkpoint
    sweep            compare settings, and find out whether one is better than the default
    evaluate         compare base and tuned model on held-out rows, and return an Evaluation
    load             load a run or a model, and return a Model with the methods generate and chat
    merge            merge an adapter into its base
    export           write a run for llama.cpp or Ollama
    push             upload a run to the Hugging Face Hub

`help(strop.train)` shows its arguments, which are recipe fields such as `model`, `data` and `lr`.

Classes: Run, Sweep, Model, Plan and Evaluation, which the functions return, and Sampling, an argument of
`Model.generate`.
Errors: StropError, and its subclasses InputError (such as RecipeError, DataError, ModelError and FolderError), RunError
(such as ParityError and MemoryLimitError), Stopped, and with several processes PeerFailed.

In signatures, a PathLike is a string, a pathlib.Path or a Run; Rows are a data file, a DataFrame, a datasets.Dataset
or a list of dicts; an Event is a dictionary with `event` (its kind, such as "step"), `time` and the fields of that
kind; a StepProgress or AnswerProgress is a bool, None (in a terminal or notebook only), or a function to call.

Importing strop does not import torch. Each function imports what it needs when it is called.
"""

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

from strop.api import check, compare_methods, evaluate, export, load, merge, plan, push, resume, train
from strop.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    DiskError,
    DivergedError,
    FolderError,
    GatedError,
    InputError,
    MemoryLimitError,
    ModelError,
    NonFiniteError,
    ParityError,
    PeerFailed,
    QuantizerError,
    RecipeError,
    RunError,
    Stopped,
    StropError,
    closest,
)
from strop.sweeping import sweep

if TYPE_CHECKING:
    from strop.engine.decode.model import Model as Model
    from strop.engine.decode.sampling import Sampling as Sampling
    from strop.evaluation.tables import Evaluation as Evaluation
    from strop.planning.plan import Plan as Plan
    from strop.sweeping.run import Sweep as Sweep
    from strop.training.run import Run as Run

# bitsandbytes, which peft imports, recommends a package of kernels that strop does not use
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))
# tqdm, which the Hugging Face libraries use, recommends ipywidgets in a notebook
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "DataError",
    "DeviceError",
    "DiskError",
    "DivergedError",
    "FolderError",
    "GatedError",
    "InputError",
    "MemoryLimitError",
    "ModelError",
    "NonFiniteError",
    "ParityError",
    "PeerFailed",
    "QuantizerError",
    "RecipeError",
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
    "sweep",
    "train",
]

_CLASSES = {  # imported when they are used: their modules import torch
    "Evaluation": "strop.evaluation.tables",
    "Model": "strop.engine.decode.model",
    "Plan": "strop.planning.plan",
    "Run": "strop.training.run",
    "Sampling": "strop.engine.decode.sampling",
    "Sweep": "strop.sweeping.run",
}

_OTHER_NAMES = {  # other names for functions -> ours
    **dict.fromkeys(("fit", "finetune", "fine_tune", "sft", "Trainer"), "train"),
    **dict.fromkeys(("eval", "test", "score", "benchmark"), "evaluate"), "compare": "evaluate",
    **dict.fromkeys(("chat", "ask"), "load(...).chat"), **dict.fromkeys(("generate", "predict"), "load(...).generate"),
    **dict.fromkeys(("convert", "quantize"), "export"), "estimate": "plan", "validate": "check", "upload": "push",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    near = None if name.startswith("_") else _OTHER_NAMES.get(name) or _closest_name(name)
    hint = f" (did you mean strop.{near}?)" if near else ""
    raise AttributeError(f"module 'strop' has no attribute {name!r}{hint}")


def _closest_name(name: str) -> str | None:
    """Return the public name most similar to `name`. Names of errors are compared without their common end."""
    known = {word.removesuffix("Error"): word for word in (*__all__, *_CLASSES)}
    stem = name.removesuffix("Error")
    near = closest(stem, [word for word, full in known.items() if name == stem or full.endswith("Error")])
    return None if near is None else known[near]


def __dir__() -> list[str]:
    return sorted([*__all__, *_CLASSES, "__doc__", "__name__", "__version__"])
