"""Query vLLM in its own Python environment, and check adapters against what it supports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strop.errors import InputError, ModelError

MAX_RANK_VALUES = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # allowed values of --max-lora-rank in vLLM 0.32
DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
QUERY = """
import json, sys, torch, vllm
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_lora
arch = sys.argv[1]
known = arch in ModelRegistry.get_supported_archs()
lora = known and supports_lora(ModelRegistry.models[arch].load_model_cls())
print(json.dumps({"version": vllm.__version__, "known": known, "lora": bool(lora), "cuda": torch.cuda.is_available()}))
"""


def find_vllm_python(given: str | None, option: str = "--vllm-python") -> str:
    """Return the Python given by `option`, else the Python of the `vllm` on the PATH. Raises InputError."""
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
    """Return {version, known, lora, cuda} of a vLLM installation. Raises an error if it cannot run the architecture."""
    done = subprocess.run([python, "-c", QUERY, architecture], capture_output=True, text=True, env=vllm_environment())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise InputError(f"{python}: vLLM does not start there: {last}", fix="fix that environment (see docs/serve.md)")
    facts = dict(json.loads(done.stdout.strip().splitlines()[-1]))
    if not facts["known"] or (lora and not facts["lora"]):
        what = f"{architecture}{' with LoRA' if facts['known'] else ''}"
        raise ModelError(f"vLLM {facts['version']} does not support {what}", fix="use strop's own engine, without vLLM")
    return facts


def vllm_environment(without: str = "") -> dict[str, str]:
    """Return the environment for vLLM's process: offline, and without PYTHONPATH and the variable `without`."""
    offline = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in (without, "PYTHONPATH")}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **inherited, **offline}


def max_lora_rank(config: Mapping[str, Any], name: str, fix: str) -> int:
    """Return the --max-lora-rank for an adapter_config.json. Raises ModelError if vLLM does not support the adapter."""
    unsupported = [key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(key)]
    unsupported += ["bias"] if config.get("bias", "none") != "none" else []
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if unsupported or rank > MAX_RANK_VALUES[-1]:
        what = f"its {unsupported[0]}" if unsupported else f"rank {rank}"
        raise ModelError(f"{name}: vLLM does not support {what}", fix=fix)
    return next(allowed for allowed in MAX_RANK_VALUES if allowed >= rank)
