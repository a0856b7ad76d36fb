"""The environment of its own in which vLLM lives, and what it takes of adapters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strop.errors import InputError, ModelError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM 0.32 takes as --max-lora-rank
DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
ASK = """
import json, sys, torch, vllm
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_lora
arch = sys.argv[1]
known = arch in ModelRegistry.get_supported_archs()
lora = known and supports_lora(ModelRegistry.models[arch].load_model_cls())
print(json.dumps({"version": vllm.__version__, "known": known, "lora": bool(lora), "cuda": torch.cuda.is_available()}))
"""


def find_vllm_python(given: str | None, option: str = "--vllm-python") -> str:
    """The Python that has vLLM: the one given by this option, or that of the `vllm` on the PATH. Raises InputError."""
    fix = f"give {option} /path/to/environment/bin/python (see docs/serve.md)"
    if given is not None:
        if shutil.which(given) is None:
            raise InputError(f"{option} {given}: no such program", fix=fix)
        return given
    script = shutil.which("vllm")
    python = Path(script).resolve().parent / "python" if script else None
    if python is None or not python.exists():
        raise InputError("no vllm on the PATH", fix=fix)
    return str(python)


def query_vllm(python: str, architecture: str, *, lora: bool) -> dict[str, Any]:
    """Its version, and whether it has a GPU: {version, known, lora, cuda}. lora: adapters are wanted.

    Raises InputError where vLLM does not start, ModelError where it does not know the architecture.
    """
    done = subprocess.run([python, "-c", ASK, architecture], capture_output=True, text=True, env=vllm_environment())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise InputError(
            f"{python}: vLLM does not start there: {last}", fix="mend that environment (see docs/serve.md)"
        )
    found = dict(json.loads(done.stdout.strip().splitlines()[-1]))
    if not found["known"] or (lora and not found["lora"]):
        what = f"{architecture}{' with LoRA' if found['known'] else ''}"
        raise ModelError(f"vLLM {found['version']} does not know {what}", fix="leave vLLM out: strop's engine answers")
    return found


def vllm_environment(without: str = "") -> dict[str, str]:
    """What vLLM's process is given: nothing of strop's own paths, nor this variable, and no network."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    own = {name: value for name, value in os.environ.items() if name not in (without, "PYTHONPATH")}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **own, **quiet}


def max_lora_rank(config: Mapping[str, Any], name: str, fix: str) -> int:
    """What vLLM must be told so that it takes an adapter with this adapter_config.json. Raises ModelError, with this
    fix, for one that it cannot run."""
    odd = [key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(key)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if odd or rank > RANKS[-1]:
        what = f"its {odd[0]}" if odd else f"rank {rank}"
        raise ModelError(f"{name}: vLLM does not take {what}", fix=fix)
    return next(allowed for allowed in RANKS if allowed >= rank)
