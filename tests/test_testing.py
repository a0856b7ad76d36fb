"""strop.testing: a tiny model, rows and a whole run for the tests of other projects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import strop
from strop import testing


def test_tiny_run_trains_and_can_be_loaded(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    run = testing.tiny_run(tmp_path, callback=events.append, seed=3)
    assert run.folder == tmp_path / "run" and run.report["steps"] == 4 and run.report["data"]["used"] == 24
    assert events[-1]["event"] == "end" and sum(event["event"] == "step" for event in events) == 4
    assert isinstance(strop.load(run.folder).chat("what is 3", max_new_tokens=2), str)
    with pytest.raises(strop.InputError, match="contains a run, which is finished"):
        testing.tiny_run(tmp_path)


def test_libraries_print_no_warnings(tmp_path: Path) -> None:
    """Checked in a new process, because pytest filters warnings."""
    script = (
        "import sys; from strop import testing; import strop; run = testing.tiny_run(sys.argv[1]); "
        "strop.load(run.folder).chat('what is 3', max_new_tokens=2); import logging; "
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('from kernels-community: %s', 1)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Warning" not in done.stderr and "kernels" not in done.stderr, done.stderr


def test_tiny_model_loads_in_transformers_and_depends_on_its_seed(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    folders = [testing.tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert torch.equal(torch.get_rng_state(), before)  # the global random state is unchanged
    weights = [AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in folders]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    text = "any text: Größe, 字 <|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and len(tokenizer) == weights[0].shape[0]


def test_tiny_rows_are_valid_training_rows(tmp_path: Path) -> None:
    file = testing.tiny_rows(tmp_path / "rows.jsonl", 3)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    checked = strop.check(model=str(testing.tiny_model(tmp_path / "model")), data=str(file))
    assert len(rows) == checked["rows"]["used"] == 3 and rows[2]["messages"][1]["content"] == "it is 4!!"
