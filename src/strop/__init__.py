"""Fine-tune open language models with LoRA on your own hardware, and measure the result.

    import strop

    run = strop.train(model="demo", data="rows.jsonl", out="runs/mine", lora={"r": 8})
    strop.evaluate(run, "held_out.jsonl", metric="exact_json")
    strop.load(run).chat("...")

Importing strop does not import torch. Each function imports what it needs when it is called.
"""

import logging
import warnings

from strop.api import check, compare_methods, evaluate, export, load, merge, plan, push, resume, train
from strop.errors import InputError, RunError, Stopped, StropError

# bitsandbytes, which peft imports, recommends a package of kernels that strop does not use
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))
# tqdm, which the Hugging Face libraries use, recommends ipywidgets in a notebook
warnings.filterwarnings("ignore", message="IProgress not found")

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
