"""The plain script of a run trains as strop did: the same losses, step by step, in fp32."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import strop
from strop.errors import InputError
from strop.exporting.script import export_script
from strop.runs.events import read_events
from tests.support import tiny_families
from tests.support.preferences import write_pairs
from tests.support.tiny import write_rows

FIELDS = {"model.dtype": "fp32", "train.max_steps": 6, "lora.r": 4, "train.learning_rate": 5e-3}


def losses_apart(folder: Path) -> list[float]:
    """What the script prints, run as it is, in a process that cannot import strop."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    block = "import sys; sys.modules['strop'] = None; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", block, str(folder / "train.py")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["loss"] for line in done.stdout.splitlines()]


def losses(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """The same in this process, which has loaded transformers already."""
    capsys.readouterr()
    runpy.run_path(str(folder / "train.py"), run_name="__main__")
    return [json.loads(line)["loss"] for line in capsys.readouterr().out.splitlines()]


def trained(folder: Path, **options: object) -> list[float]:
    run = strop.train(out=folder, **{**FIELDS, **options})
    return [event["loss"] for event in read_events(run.folder / "events.jsonl") if event["event"] == "step"]


def test_sft_has_the_same_losses(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """Several turns of a schedule with warmup, LoRA+ and a part of an epoch at the end."""
    options = {"train.batch_size": 10, "train.micro_batch": 4, "train.warmup": 2, "train.lora_plus_ratio": 4}
    ours = trained(tmp_path / "run", model=str(tiny_folder), data=str(rows_file), **options)
    written = export_script(tmp_path / "run", tmp_path / "script")
    assert written.encoded and written.rows == 24
    assert "Any" not in (tmp_path / "script" / "train.py").read_text(encoding="utf-8")
    theirs = losses_apart(tmp_path / "script")
    assert len(theirs) == 6 and ours[0] - ours[-1] > 0.05  # it learns something, so that equal losses mean something
    assert theirs == pytest.approx(ours, abs=1e-3)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "script" / "adapter")
    other = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), tmp_path / "run" / "adapter"
    )
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-3), name


def test_a_gguf_base_is_read_by_way_of_bf16_as_strop_reads_it(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights in fp32 are others, and on the demo's model the losses were 6e-4 apart from the first step on."""
    trained(tmp_path / "first", model=str(tiny_folder), data=str(rows_file))
    strop.export("gguf", tmp_path / "first", tmp_path / "m.gguf", type="f32", measure=False)
    ours = trained(tmp_path / "run", model=str(tmp_path / "m.gguf"), data=str(rows_file))
    export_script(tmp_path / "run", tmp_path / "script")
    assert losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=1e-5)


def test_dpo_has_the_same_losses(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    options = {"train.objective": "dpo", "train.beta": 0.5, "train.sft_weight": 0.1, "train.batch_size": 4}
    ours = trained(tmp_path / "run", model=str(tiny_folder), data=str(data), **options)
    written = export_script(tmp_path / "run", tmp_path / "script")
    assert written.encoded and written.rows == 12
    theirs = losses(tmp_path / "script", capsys)
    assert ours[0] - ours[-1] > 0.05 and theirs == pytest.approx(ours, abs=1e-3)


def test_rows_that_a_chat_template_alone_does_not_say(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A turn that is not trained on, and raw text: the rows hold their tokens."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    said += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d e f"}]
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"messages": said}) + "\n") * 8, encoding="utf-8")
    ours = trained(tmp_path / "run", model=str(tiny_folder), data=str(data))
    written = export_script(tmp_path / "run", tmp_path / "script")
    assert not written.encoded and losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=1e-3)


def test_a_run_from_an_adapter(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = {"model": str(tiny_folder), "data": str(rows_file)}
    trained(tmp_path / "first", **of, **{"lora.dropout": 0.3})
    ours = trained(tmp_path / "run", **of, **{"model.adapter": str(tmp_path / "first"), "lora.dropout": 0.0})
    export_script(tmp_path / "run", tmp_path / "script")
    assert losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=1e-3)


def test_dropout_of_the_base_itself_is_told(tmp_path: Path, tiny_folder: Path, rows_file: Path) -> None:
    """GPT-2 has some, and draws it anew: the losses of script and run are not the same."""
    tiny_families.save("gpt2", tmp_path / "gpt2")
    trained(tmp_path / "a", model=str(tmp_path / "gpt2"), data=str(rows_file))
    assert "other masks" in " ".join(export_script(tmp_path / "a", tmp_path / "x").notes)
    trained(tmp_path / "b", model=str(tiny_folder), data=str(rows_file))
    assert not export_script(tmp_path / "b", tmp_path / "y").notes


def test_what_it_cannot_do_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    trained(tmp_path / "a", model=str(tiny_folder), data=str(rows), **{"model.quantization": "int8"})
    with pytest.raises(InputError, match="int8"):
        export_script(tmp_path / "a", tmp_path / "x")
    trained(tmp_path / "b", model=str(tiny_folder), data=str(rows))
    rows.write_text(rows.read_text(encoding="utf-8").replace("what", "when"), encoding="utf-8")
    with pytest.raises(InputError, match="rows are not those"):
        export_script(tmp_path / "b", tmp_path / "x")
    assert not (tmp_path / "x").exists()
