"""Answers of a model in training, drawn by vLLM: in a process of its own, with the adapter as it is at each step."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import peft
from torch import nn

from strop.config.schema import Recipe
from strop.data.types import Ids
from strop.engine.decode.generate import SampledCompletion
from strop.errors import RecipeError, RunError
from strop.models.load import weights_folder
from strop.models.source import Source, read_config
from strop.models.vllm import DTYPE_NAMES, find_vllm_python, max_lora_rank, query_vllm, vllm_environment
from strop.objectives.table import answers_of, drawn_tokens, learning_of

CARD_SHARE = 0.3  # of a card's memory that vLLM may take: its own copy of the base, and the cache
AT_ONCE = 256  # answers
OPTION, WITHOUT = "--train.vllm_python", "leave --train.vllm_python out: strop's engine draws"
WORKER = Path(__file__).with_name("vllm_worker.py")


def check_vllm(recipe: Recipe) -> None:
    """Raises RecipeError where a recipe asks for vLLM and nothing is drawn, or what it would draw from is another
    model; ModelError where it does not take the adapter."""
    given = recipe.train.vllm_python
    if given is None:
        return
    if learning_of(recipe.train) != "prompts":
        raise RecipeError(f"{OPTION}: objective {recipe.train.objective} draws no answers", fix="leave it out")
    if recipe.model.quantization != "none":
        said = f"{OPTION}: vLLM would draw from the base in 16 bit, not from {recipe.model.quantization}"
        raise RecipeError(said, fix="take --model.quantization none, or leave it out")
    find_vllm_python(given, OPTION)
    max_lora_rank(_config(recipe), OPTION, WITHOUT)


def _config(recipe: Recipe) -> dict[str, Any]:
    lora = recipe.lora
    names = ("r", "rank_pattern", "use_dora", "bias")
    more = {"modules_to_save": lora.modules_to_save, "trainable_token_indices": lora.new_tokens}
    return {**{name: getattr(lora, name) for name in names}, **more}


@dataclass(frozen=True)
class ByVllm:
    """Draws as model.draw.draw does. Seeds decide what is drawn, but not alone: vLLM's sums depend on what is computed
    beside an answer, so that a resumed run may draw others."""

    process: subprocess.Popen[str]
    log: Any
    version: str
    numbers: Iterator[int] = field(default_factory=partial(count, 1))  # vLLM keeps an adapter by its number

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Ids],
        seeds: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        most: int,
    ) -> list[list[SampledCompletion]]:
        """To each prompt an answer for each of its seeds. Raises RunError where vLLM ends."""
        with tempfile.TemporaryDirectory() as folder:
            whole: Any = model
            whole.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
            asked = {
                "adapter": folder, "number": next(self.numbers), "prompts": [ids.tolist() for ids in prompts],
                "seeds": [list(some) for some in seeds], "most": most, "stop": list(stop_ids),
            }  # fmt: skip
            found = iter(_ask(self.process, self.log, asked))
        return [[_drawn(next(found)) for _ in some] for some in seeds]


def _drawn(told: dict[str, Any]) -> SampledCompletion:
    return SampledCompletion(np.array(told["ids"], np.int32), np.array(told["log_probs"]), told["stopped"])


@contextmanager
def drawing(recipe: Recipe, source: Source, model: peft.PeftModel) -> Iterator[ByVllm]:
    """vLLM, started on the base; model: whose adapter it will be given.

    Raises InputError, ModelError and RunError where it does not start."""
    train, weights = recipe.train, weights_folder(source)
    python = find_vllm_python(train.vllm_python, OPTION)
    config, longest = read_config(weights), recipe.data.max_length + drawn_tokens(train)
    found = query_vllm(python, config["architectures"][0], lora=True)
    how: dict[str, Any] = {
        "model": str(weights), "skip_tokenizer_init": True, "dtype": DTYPE_NAMES[recipe.model.dtype],
        "max_model_len": min(longest, int(config.get("max_position_embeddings", longest))),
        "max_num_seqs": min(AT_ONCE, train.batch_size * answers_of(train)),
        "enforce_eager": not found["cuda"], "seed": recipe.seed, "disable_log_stats": True,
    }  # fmt: skip
    how |= {
        "enable_lora": True,
        "max_lora_rank": max_lora_rank(model.active_peft_config.to_dict(), source.name, WITHOUT),
    }
    how |= {"max_loras": 1, "max_cpu_loras": 1} | ({"gpu_memory_utilization": CARD_SHARE} if found["cuda"] else {})
    environment = {**vllm_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryFile("w+") as log:
        command, pipe = [python, "-c", WORKER.read_text("utf-8")], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
        try:
            version = _ask(process, log, how)["version"]
            yield ByVllm(process, log, version)
        finally:
            process.kill()
            for end in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # asked of one that had ended
                    end.close()  # type: ignore[union-attr]
            process.wait()


def _ask(process: subprocess.Popen[str], log: Any, what: Any) -> Any:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
        told = process.stdout.readline()
    except BrokenPipeError:
        told = ""
    if not told:
        log.seek(0)
        said = [line.strip() for line in log.read().splitlines() if line.strip()] or ["nothing"]
        faults = [line for line in said if "error" in line.lower() and "://" not in line] or said
        raise RunError(f"vLLM ended: {faults[-1]}", fix="mend its environment (see docs/serve.md), or leave it out")
    return json.loads(told)
