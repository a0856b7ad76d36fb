"""The exported script of a run has the same losses as strop, step by step, in fp32."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import strop
from strop.errors import InputError
from strop.exporting.script import export_script
from strop.runs.events import read_events
from tests.engine.test_images import write_rows as write_rows_with_images
from tests.support import tiny, tiny_families
from tests.support.preferences import write_pairs
from tests.support.seeing import save_seeing
from tests.support.tiny import write_rows

FIELDS = {"model.dtype": "fp32", "train.max_steps": 6, "lora.r": 4, "train.learning_rate": 5e-3}


def losses_without_strop(folder: Path) -> list[float]:
    """Run the script in a process that cannot import strop."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = "import sys; sys.modules['strop'] = None; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
    process = subprocess.run(
        [sys.executable, "-c", code, str(folder / "train.py")], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line)["loss"] for line in process.stdout.splitlines()]


def losses(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """Run the script in this process, which has already imported transformers."""
    capsys.readouterr()
    runpy.run_path(str(folder / "train.py"), run_name="__main__")
    return [json.loads(line)["loss"] for line in capsys.readouterr().out.splitlines()]


def train(folder: Path, **options: object) -> list[float]:
    run = strop.train(out=folder, **{**FIELDS, **options})
    return [event["loss"] for event in read_events(run.folder / "events.jsonl") if event["event"] == "step"]


def test_sft_has_the_same_losses(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """Covers warmup, LoRA+ and an incomplete epoch at the end."""
    options = {"train.batch_size": 10, "train.micro_batch": 4, "train.warmup": 2, "train.lora_plus_ratio": 4}
    ours = train(tmp_path / "run", model=str(tiny_folder), data=str(rows_file), **options)
    written = export_script(tmp_path / "run", tmp_path / "script")
    assert written.encoded and written.rows == 24
    assert "Any" not in (tmp_path / "script" / "train.py").read_text(encoding="utf-8")
    theirs = losses_without_strop(tmp_path / "script")
    assert len(theirs) == 6 and ours[0] - ours[-1] > 0.05  # the model learns
    assert theirs == pytest.approx(ours, abs=1e-3)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "script" / "adapter")
    expected = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), tmp_path / "run" / "adapter"
    )
    for (name, weight), (_, trained) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.allclose(weight, trained, atol=1e-3), name


def test_losses_in_fp16_are_scaled(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model.dtype": "fp16", "model.device": "cpu", "model": str(tiny_folder), "data": str(rows_file)}
    ours = train(tmp_path / "run", **options)
    export_script(tmp_path / "run", tmp_path / "script")
    code = (tmp_path / "script" / "train.py").read_text(encoding="utf-8")
    assert "scaler.scale(loss).backward()" in code and "scaler.step(optimizer)" in code
    assert losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=3e-3)


def test_recomputed_layers_give_the_same_losses_without_a_warning(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers 5.24 renamed the call that turns recomputation on; pytest makes its warning an error."""
    options = {"train.gradient_checkpointing": "on", "model": str(tiny_folder), "data": str(rows_file)}
    ours = train(tmp_path / "run", **options)
    export_script(tmp_path / "run", tmp_path / "script")
    assert losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=1e-3)


def test_gguf_base_is_read_through_bf16(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading it in fp32 gives other weights: on the demo's model the losses differed by 6e-4 from the first step."""
    train(tmp_path / "first", model=str(tiny_folder), data=str(rows_file))
    strop.export("gguf", tmp_path / "first", tmp_path / "m.gguf", type="f32", measure=False)
    ours = train(tmp_path / "run", model=str(tmp_path / "m.gguf"), data=str(rows_file))
    export_script(tmp_path / "run", tmp_path / "script")
    assert losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=1e-5)


def test_dpo_has_the_same_losses(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    options = {"train.objective": "dpo", "train.beta": 0.5, "train.sft_weight": 0.1, "train.batch_size": 4}
    ours = train(tmp_path / "run", model=str(tiny_folder), data=str(data), **options)
    written = export_script(tmp_path / "run", tmp_path / "script")
    assert written.encoded and written.rows == 12
    theirs = losses(tmp_path / "script", capsys)
    assert ours[0] - ours[-1] > 0.05 and theirs == pytest.approx(ours, abs=1e-3)


def test_dpo_on_a_4_bit_base_has_the_same_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In eval mode, bitsandbytes repacks 4-bit weights on CPUs with AVX512 BF16, and the outputs change."""
    base = tiny.save_tiny(tmp_path / "base")
    torch.manual_seed(0)
    config = tiny.config(hidden_size=64, intermediate_size=128)  # rows of whole blocks
    LlamaForCausalLM(config).save_pretrained(base)
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    options = {"train.objective": "dpo", "train.batch_size": 12, "model.quantization": "nf4"}
    ours = train(tmp_path / "run", model=str(base), data=str(data), **options)
    export_script(tmp_path / "run", tmp_path / "script")
    theirs = losses(tmp_path / "script", capsys)
    assert ours[0] - ours[-1] > 0.02 and theirs == pytest.approx(ours, abs=1e-4)


def test_rows_that_the_template_cannot_encode_are_stored_as_tokens(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first answer is not trained on."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    turns += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d e f"}]
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8, encoding="utf-8")
    ours = train(tmp_path / "run", model=str(tiny_folder), data=str(data))
    written = export_script(tmp_path / "run", tmp_path / "script")
    assert not written.encoded and losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=1e-3)


def test_run_that_continues_an_adapter_has_the_same_losses(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = {"model": str(tiny_folder), "data": str(rows_file)}
    train(tmp_path / "first", **inputs, **{"lora.dropout": 0.3})
    ours = train(tmp_path / "run", **inputs, **{"model.adapter": str(tmp_path / "first"), "lora.dropout": 0.0})
    export_script(tmp_path / "run", tmp_path / "script")
    assert losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # GLM-4V's processor
@pytest.mark.parametrize(
    ("family", "vision"),
    [("idefics3", "all"), ("gemma3", "none"), ("qwen2_5_vl", "none"), ("llava", "projector"), ("glm4v", "none")],
)
def test_rows_with_images_have_the_same_losses(
    family: str, vision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows with one image, with several, and without; gradients reach the encoder where it is trained."""
    base = save_seeing(tmp_path / "base", family)
    write_rows_with_images(tmp_path, several=True)
    options = {"train.batch_size": 2, "data.max_length": 4000, "lora.vision": vision}
    ours = train(tmp_path / "run", model=str(base), data=str(tmp_path / "rows.jsonl"), **options)
    written = export_script(tmp_path / "run", tmp_path / "script")
    assert not written.encoded and "images" in written.files and len(list((tmp_path / "script/images").iterdir())) == 4
    shutil.rmtree(tmp_path / "run")
    theirs = losses(tmp_path / "script", capsys)
    assert ours[0] - ours[-1] > 0.05 and theirs == pytest.approx(ours, abs=1e-3)


def test_parts_trained_in_full_are_in_fp32_beside_a_16_bit_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_seeing(tmp_path / "base", "llava")
    write_rows_with_images(tmp_path, several=False)
    options = {"model.dtype": "bf16", "data.max_length": 4000, "lora.vision": "projector"}
    ours = train(tmp_path / "run", model=str(base), data=str(tmp_path / "rows.jsonl"), **options)
    export_script(tmp_path / "run", tmp_path / "script")
    assert ours[0] - ours[-1] > 0.3 and losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=0.02)


def test_dpo_with_images_has_the_same_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_seeing(tmp_path / "base", "qwen2_5_vl")
    [row, *_] = write_rows_with_images(tmp_path, several=False)
    [question, answer] = row["messages"]
    pairs = [
        {"prompt": [question], "chosen": [answer], "rejected": [{"role": "assistant", "content": f"no {n}"}]}
        for n in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    options = {"train.objective": "dpo", "train.batch_size": 4, "data.max_length": 4000}
    ours = train(tmp_path / "run", model=str(base), data=str(tmp_path / "pairs.jsonl"), **options)
    export_script(tmp_path / "run", tmp_path / "script")
    assert ours[0] - ours[-1] > 0.05 and losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=1e-3)


def test_texts_on_a_model_that_reads_images_have_the_same_losses(
    tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training, Gemma 3 needs `token_type_ids`, which are 0 for text."""
    base = save_seeing(tmp_path / "base", "gemma3")
    ours = train(tmp_path / "run", model=str(base), data=str(rows_file))
    export_script(tmp_path / "run", tmp_path / "script")
    assert losses(tmp_path / "script", capsys) == pytest.approx(ours, abs=1e-3)


def test_dropout_of_the_base_has_a_note(tmp_path: Path, tiny_folder: Path, rows_file: Path) -> None:
    """GPT-2 has dropout, so the losses of script and run differ."""
    tiny_families.save("gpt2", tmp_path / "gpt2")
    train(tmp_path / "a", model=str(tmp_path / "gpt2"), data=str(rows_file))
    assert "Dropout masks" in " ".join(export_script(tmp_path / "a", tmp_path / "x").notes)
    train(tmp_path / "b", model=str(tiny_folder), data=str(rows_file))
    assert not export_script(tmp_path / "b", tmp_path / "y").notes


def test_resume_with_other_settings_has_a_note(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    train(tmp_path / "a", model=str(tiny_folder), data=str(rows_file))
    lock = json.loads((tmp_path / "a" / "lock.json").read_text())
    changes = [{"name": "train.learning_rate", "was": 0.1, "now": 0.2}, {"name": "torch", "was": "1", "now": "2"}]
    (tmp_path / "a" / "lock.json").write_text(json.dumps({**lock, "overrides": changes}))
    [note] = export_script(tmp_path / "a", tmp_path / "x").notes
    what = "The run was resumed with another train.learning_rate (0.1 before)"
    assert note == f"{what}, which the script has from the first step."


def test_unsupported_runs_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    train(tmp_path / "a", model=str(tiny_folder), data=str(rows), **{"model.quantization": "int8"})
    with pytest.raises(InputError, match="int8"):
        export_script(tmp_path / "a", tmp_path / "x")
    train(tmp_path / "b", model=str(tiny_folder), data=str(rows))
    rows.write_text(rows.read_text(encoding="utf-8").replace("what", "when"), encoding="utf-8")
    with pytest.raises(InputError, match="rows have changed"):
        export_script(tmp_path / "b", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    tiny_families.save("gpt2", tmp_path / "gpt2")
    train(tmp_path / "c", model=str(tmp_path / "gpt2"), data=str(rows), **{"lora.bias": "all", "model.dtype": "bf16"})
    with pytest.raises(InputError, match="bias"):
        export_script(tmp_path / "c", tmp_path / "x")
