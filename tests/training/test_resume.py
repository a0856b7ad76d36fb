"""Resume after a kill, with damaged files, changed values or a moved base; and rollbacks."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import strop
from strop.dash.history import History
from strop.errors import DiskError, DivergedError, InputError, Stopped
from strop.evaluation.diagnosis import changes_loss, diagnose
from strop.evaluation.report import write_report
from strop.runs.events import drop_undone_events, read_events
from strop.runs.folder import RunFolder
from strop.runs.lock import sha256_text
from strop.training import state
from strop.training.criteria import SupervisedCriterion
from strop.training.loop import fit
from tests.support import tiny
from tests.support.jobs import events
from tests.support.runs import run
from tests.support.steps import changed_step
from tests.training.test_guard import with_loss


class Cut(Exception):
    pass


def cut_at(kind: str, step: int) -> Callable[[dict[str, Any]], None]:
    def cut(event: dict[str, Any]) -> None:
        if event["event"] == kind and event["step"] == step:
            raise Cut

    return cut


def cut_run(folder: Path, model: Path, rows: Path, *, at: int = 4, **options: Any) -> Path:
    """Return a run of 12 steps that was killed just after a save."""
    settings = {"train.max_steps": 12, "train.batch_size": 4, "train.save_steps": 2, "lora.r": 4, "model.dtype": "fp32"}
    with pytest.raises(Cut):
        strop.train(
            model=str(model), data=str(rows), out=folder, callback=cut_at("save", at), **{**settings, **options}
        )
    return folder


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


def flip(file: Path) -> None:
    result = bytearray(file.read_bytes())
    result[-6] ^= 0x40
    file.write_bytes(result)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:99])])
@pytest.mark.parametrize("last", [False, True])
def test_the_best_weights_are_never_taken_from_a_damaged_checkpoint(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, damage: Callable[[Path], None], last: bool
) -> None:
    """last: all steps were already done."""
    other = tmp_path / "other.jsonl"
    pairs = [{"prompt": f"what is {n}", "completion": "zebra " * n} for n in range(1, 6)]
    other.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = {
        "data.eval": str(other), "train.eval_steps": 2, "train.learning_rate": 5e-2, "train.lr_scheduler": "constant"
    }  # fmt: skip
    out = cut_run(tmp_path / "r", tiny_folder, rows_file, at=12 if last else 10, **options)
    best = json.loads((out / "checkpoints" / ("step-000012" if last else "step-000010") / "state.json").read_text())
    assert best["best_step"] < best["step"]
    damage(out / "checkpoints" / f"step-{best['best_step']:06d}" / "weights.safetensors")
    report = strop.resume(out).report
    losses = {event["step"]: event["loss"] for event in events(out, "eval")}
    assert report["adapter_step"] == 12 and report["eval_loss"] == losses[12]
    assert any("the best weights so far are lost" in event["text"] for event in events(out, "note"))
    weights = load_file(out / "checkpoints" / "step-000012" / "weights.safetensors")
    built = adapter(out)
    assert all(torch.equal(weight, built[name.replace(".default", "")]) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("before", "after"), [("adamw", "adafactor"), ("adamw", "lion"), ("adamw_8bit", "adamw"), ("lion", "adamw_8bit")]
)
def test_resume_with_another_optimizer_resets_its_state_with_a_note(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, before: str, after: str
) -> None:
    out = cut_run(tmp_path / "r", tiny_folder, rows_file, **{"train.optimizer": before})
    assert strop.resume(out, allow_changed=["optimizer"], **{"train.optimizer": after}).report["steps"] == 12
    text = [event["text"] for event in events(out, "note") if "the optimizer state is reset" in event["text"]]
    assert len(text) == 1


def test_paged_optimizer_resumes_8_bit_state(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    out = cut_run(tmp_path / "r", tiny_folder, rows_file, **{"train.optimizer": "adamw_8bit"})
    whole = shutil.copytree(out, tmp_path / "whole")
    strop.resume(out, allow_changed=["optimizer"], **{"train.optimizer": "paged_adamw_8bit"})
    strop.resume(whole)
    assert same(adapter(out), adapter(whole))


@pytest.mark.parametrize(
    ("field", "value"), [("train.batch_size", 6), ("train.gradient_checkpointing", "on"), ("seed", 5)]
)
def test_changed_value_survives_a_kill_before_the_next_save(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, field: str, value: Any
) -> None:
    out = cut_run(tmp_path / "r", tiny_folder, rows_file, **{"train.gradient_checkpointing": "off"})
    whole = shutil.copytree(out, tmp_path / "whole")
    strop.resume(whole, allow_changed=[field], **{field: value})
    with pytest.raises(Cut):
        strop.resume(out, callback=cut_at("step", 6), allow_changed=[field], **{field: value})
    strop.resume(out)
    assert same(adapter(out), adapter(whole))
    newest = json.loads((out / "checkpoints" / "step-000012" / "state.json").read_text())
    assert newest["recompute"] is (field == "train.gradient_checkpointing")
    notes = [event["text"] for event in read_events(whole / "events.jsonl") if event["event"] == "note"]
    counted = [note for note in notes if note.startswith("steps have other rows than before: 4 steps were 0.7 epochs")]
    assert len(counted) == (field == "train.batch_size") and all(note.endswith("count as 1.0") for note in counted)


def test_the_best_step_is_chosen_again_after_a_change_of_what_is_measured(
    tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Losses on other evaluation rows have another scale: the earlier ones are not the best, and no overfitting."""
    rows = rows_file.read_text().splitlines(keepends=True)
    easy, hard = tmp_path / "easy.jsonl", tmp_path / "hard.jsonl"
    easy.write_text("".join(rows[:4]))
    hard.write_text('{"prompt": "zq", "completion": "WVXKJ#%&@WVXKJ#%&@"}\n' * 4)
    options = {"train.eval_steps": 2, "data.eval": str(easy)}
    out = cut_run(tmp_path / "r", tiny_folder, rows_file, **options)
    with pytest.raises(InputError, match="data has changed"):
        strop.resume(out, eval=hard)
    run = strop.resume(out, eval=hard, allow_changed="data")
    losses = {event["step"]: event["loss"] for event in run.events if event["event"] == "eval"}
    later = {step: loss for step, loss in losses.items() if step > 4}
    assert min(later.values()) > max(losses[2], losses[4])
    assert run.report["eval_loss"] == min(later.values()) and run.report["adapter_step"] == min(
        later, key=later.__getitem__
    )
    assert not any("overfitting" in text for text in run.report["diagnosis"])
    notes = [event["text"] for event in run.events if event["event"] == "note"]
    assert any("until step 4 do not count for the best step: data changed" in note for note in notes)


def test_the_micro_batch_of_the_plan_is_replaced_by_an_option(
    tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The plan's train.micro_batch_tokens is in recipe.yaml, and a run has one of the two."""
    out = cut_run(tmp_path / "r", tiny_folder, rows_file)
    with pytest.raises(InputError) as raised:
        strop.resume(out, micro_batch=2, epochs=9)
    names = re.search(r'allow_changed="(.*)"', str(raised.value))
    assert names and set(names[1].split(",")) >= {"train.micro_batch", "train.epochs"}  # one argument, valid in Python
    assert strop.resume(out, micro_batch=2, epochs=9, allow_changed=names[1]).report["steps"] == 12


def test_a_changed_keep_is_allowed_by_its_name(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    out = cut_run(tmp_path / "r", tiny_folder, rows_file, **{"train.keep": 0.2})
    with pytest.raises(InputError, match=r'resume with allow_changed="train.keep"$'):
        strop.resume(out, keep="off")
    assert strop.resume(out, keep="off", allow_changed="keep").report["steps"] == 12


@pytest.mark.parametrize(
    ("name", "changes"),
    [("data", True), ("train.beta", True), ("data.max_length", True), ("train.teacher_weight", True),
     ("lora.alpha", True), ("lora.alpha_pattern", True), ("lora.use_rslora", True), ("lora.dropout", False),
     ("train.learning_rate", False), ("train.epochs", False), ("versions", False), ("kept", False)],
)  # fmt: skip
def test_which_changes_make_losses_incomparable(name: str, changes: bool) -> None:
    assert changes_loss(name) is changes


def test_new_learning_rate_is_not_scaled_by_an_earlier_rollback(
    tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The factor of 0.25 from an earlier rollback does not apply to it, and another rollback is possible."""
    fixed = {"train.lr_scheduler": "constant", "train.warmup": 0, "train.learning_rate": 1e-3}
    out = cut_run(tmp_path / "r", tiny_folder, rows_file, **fixed)
    newest = out / "checkpoints" / "step-000004"
    text = json.dumps({**json.loads((newest / "state.json").read_text()), "rate_scale": 0.25, "rollbacks": 1})
    (newest / "state.json").write_text(text)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(text), "sha256": sha256_text(text)}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    same_rate = shutil.copytree(out, tmp_path / "same")
    with pytest.raises(Cut):
        strop.resume(out, callback=cut_at("step", 5), allow_changed=["lr"], **{"train.learning_rate": 2e-4})
    strop.resume(out)
    assert {event["learning_rate"] for event in events(out, "step") if event["step"] > 4} == {2e-4}
    strop.resume(same_rate)
    assert {event["learning_rate"] for event in events(same_rate, "step") if event["step"] > 4} == {2.5e-4}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"out": "other"}, "out: cannot be changed"),
        ({"preset": "balanced"}, "preset: cannot be changed"),
        ({"lora.init": "gaussian"}, "cannot resume"),
    ],
)
def test_options_that_apply_only_at_the_start_are_refused_on_resume(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    out = cut_run(tmp_path / "r", tiny_folder, rows_file)
    with pytest.raises(InputError, match=message):
        strop.resume(out, allow_changed=["init"], **option)


def test_rollback_after_resume_with_other_rows(tmp_path: Path) -> None:
    options = {"train.max_steps": 12, "train.save_steps": 4}
    first = tiny.job(tmp_path / "r", tiny.examples(40), **{**options, "train.max_steps": 4})
    fit(first)
    job = tiny.job(tmp_path / "r", tiny.examples(48), **options)
    state.restore_checkpoint(state.newest_checkpoint(job.folder, pytest.fail), job.state)
    job.state.progress.position = {}
    job.state.progress.position = {**first.state.progress.position, "rows": 48}
    fit(with_loss(job, lambda call, loss: loss * (math.nan if call in (1, 2, 3) else 1.0)))
    assert job.state.progress.step == 12 and job.state.progress.rollbacks == 1


def test_rollback_keeps_counted_time_and_tokens(tmp_path: Path) -> None:
    """The report's tokens_per_s is their quotient."""
    job = tiny.job(tmp_path / "r", tiny.examples(40), **{"train.max_steps": 12, "train.save_steps": 4})
    good, computed = job.step.token_loss, []

    def counting(rows: Any) -> torch.Tensor:
        computed.append(sum(len(row) for row in rows))
        return good(rows)

    counted = replace(job, step=changed_step(job.step, token_loss=counting))
    fit(with_loss(counted, lambda call, loss: loss * (math.nan if call in (6, 7, 8) else 1.0)))
    assert job.state.progress.rollbacks == 1 and len(computed) == 8 + 5
    assert job.state.progress.tokens == sum(computed)


def test_rollback_skips_checkpoints_saved_during_bad_steps(tmp_path: Path) -> None:
    options = {"train.max_steps": 12, "train.save_steps": 2}
    whole = tiny.job(tmp_path / "whole", tiny.examples(40), **options)
    fit(with_loss(whole, lambda call, loss: loss * (math.nan if call in (5, 6, 7) else 1.0)))

    def stopping(call: int, loss: torch.Tensor) -> torch.Tensor:
        if call == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss * (math.nan if call in (5, 6) else 1.0)

    stopped = tiny.job(tmp_path / "stopped", tiny.examples(40), **options)
    with pytest.raises(Stopped):
        fit(with_loss(stopped, stopping))
    again = tiny.job(tmp_path / "stopped", tiny.examples(40), **options)
    state.restore_checkpoint(state.newest_checkpoint(again.folder, pytest.fail), again.state)
    assert again.state.progress.step == 6 and again.state.progress.streak == [4, 5]
    fit(with_loss(again, lambda call, loss: loss * (math.nan if call == 1 else 1.0)))
    back = events(again.folder.path, "rollback")[0]
    assert (back["step"], back["to"]) == (6, 4)
    assert all(torch.equal(weight, whole.state.weights[name]) for name, weight in again.state.weights.items())


def test_best_checkpoint_of_a_skipped_step_is_kept(tmp_path: Path) -> None:
    """The state before the bad steps is kept too, for a rollback."""
    evaluations = iter(range(1, 100))

    def change(call: int, loss: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return loss * (math.nan if call in (3, 5) else 1.0)  # steps 2 and 3
        return loss * (1.0, 0.1, 0.09, 9.0, 9.0, 9.0)[next(evaluations) - 1]

    options = {"train.max_steps": 6, "train.eval_steps": 1, "train.keep_checkpoints": 1, "train.micro_batch": 8}
    job = tiny.job(tmp_path / "r", tiny.examples(40), tiny.examples(8, seed=1), **options)
    checkpoints = []
    emit = job.log.emit

    def seen(kind: str, **fields: Any) -> None:
        emit(kind, **fields)
        if kind == "save" and fields["step"] == 3:
            checkpoints.extend(step for step, _ in job.folder.checkpoints())

    job.log.emit = seen  # type: ignore[method-assign]
    fit(with_loss(job, change))
    assert [event["step"] for event in events(job.folder.path, "skip")] == [2, 3]
    assert job.state.progress.best_step == 3 and job.folder.checkpoint(3).is_dir()
    assert checkpoints == [1, 2, 3]


@pytest.mark.parametrize("line", [b"\0" * 40, b"\xff\xfe", b'{"event": "st', b"[1]", b"{}"])
def test_damaged_event_line_is_ignored(tiny_folder: Path, rows_file: Path, tmp_path: Path, line: bytes) -> None:
    out = cut_run(tmp_path / "r", tiny_folder, rows_file)
    whole = (out / "events.jsonl").read_bytes().splitlines(True)
    (out / "events.jsonl").write_bytes(b"".join([*whole[:5], line + b"\n", *whole[5:]]))
    assert len(read_events(out / "events.jsonl")) == len(whole)
    assert strop.resume(out).report["steps"] == 12 and (out / "report.html").is_file()


@pytest.mark.parametrize("text", ["", '{"data": "12', "[]", "{}", "3"])
def test_damaged_lock_is_named(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    out = cut_run(tmp_path / "r", tiny_folder, rows_file)
    (out / "lock.json").write_text(text)
    with pytest.raises(InputError, match=r"lock\.json: damaged"):
        strop.resume(out)
    assert run("runs", tmp_path, capsys=capsys)[0] == 0


@pytest.mark.parametrize("text", ["", '{"exit": 0', "[]"])
def test_damaged_report_is_rewritten(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    out = cut_run(tmp_path / "r", tiny_folder, rows_file)
    before = strop.resume(out).report
    (out / "report.json").write_text(text)
    code, listed, _ = run("runs", tmp_path, "--json", capsys=capsys)
    assert code == 0 and json.loads(listed)["runs"][0]["finished"] is False
    again = strop.resume(out).report
    assert again["steps"] == before["steps"] == 12 and again["loss"] == before["loss"]
    assert json.loads((out / "report.json").read_text())["exit"] == 0


def test_moved_base_and_rows_are_given_once(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    out = cut_run(tmp_path / "r", base, rows_file)
    base, rows = base.rename(tmp_path / "moved"), rows_file.rename(tmp_path / "moved.jsonl")
    out = out.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no such run or model folder"):
        strop.resume(out)
    with pytest.raises(Cut):
        strop.resume(out, callback=cut_at("step", 6), **{"model.name": str(base), "data.train": str(rows)})
    assert strop.resume(out).report["steps"] == 12
    assert json.loads((out / "lock.json").read_text())["overrides"] == []
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_copy_of_a_running_run_can_be_resumed(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    out = cut_run(tmp_path / "r", tiny_folder, rows_file)
    hold = "import sys; from pathlib import Path; from strop.runs.folder import RunFolder\n"
    hold += "with RunFolder(Path(sys.argv[1])).claim(): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            copied = shutil.copytree(out, tmp_path / "copy")
            with pytest.raises(InputError, match=f"in use by process {other.pid}"):
                strop.resume(out)
            assert RunFolder(out).holder == other.pid and RunFolder(copied).holder is None
            assert strop.resume(copied).report["steps"] == 12
        finally:
            other.kill()


def test_undone_steps_count_once_in_the_diagnosis() -> None:
    """Only the last execution of a step counts, and a problem that repeats after a resume is reported once."""

    def loss_event(step: int, equal: float) -> dict[str, Any]:
        return {"event": "step", "step": step, "loss": 0.0, "reward": 0.5, "equal_groups": equal, "stop_rate": 1.0}

    shrunk = {"event": "shrink", "step": 2, "to": "half"}
    whole = [loss_event(1, 1.0), loss_event(2, 1.0), shrunk, loss_event(3, 0.8)]
    cut = [*whole, {"event": "resume", "step": 2}, shrunk, loss_event(3, 0.8)]
    assert diagnose(cut, None) == diagnose(whole, None)
    assert diagnose(whole, None)[0].startswith("93%")


def test_skips_and_rollbacks_that_a_resume_undoes_are_dropped(tmp_path: Path) -> None:
    """A rollback undoes steps, not skips; the save decides which of them a resume undoes, not their steps."""
    back = {"event": "rollback", "step": 7, "to": 4, "why": "loss", "passed": [5], "rate_scale": 0.25}
    bad = [{"event": "skip", "step": step, "why": "NaN", "rows": []} for step in (5, 6)]
    first = [
        *({"event": "step", "step": n, "loss": 2.0} for n in range(1, 5)),
        {"event": "save", "step": 4},
        *bad,
        back,
    ]
    before = [*first, {"event": "resume", "step": 4, "checkpoint": "step-000004"}]
    after = [*first, {"event": "step", "step": 6, "loss": 2.0}, {"event": "save", "step": 6}]
    after += [{"event": "resume", "step": 6, "checkpoint": "step-000006"}]
    for logged, recoveries in ((before, []), (after, ["skip", "skip", "rollback"])):
        logged = [{"time": 1.0, **event} for event in logged]
        remaining = drop_undone_events(logged)
        assert [event["event"] for event in remaining if event["event"] in ("skip", "rollback")] == recoveries
        assert any("went back to step 4" in finding for finding in diagnose(remaining, 0.01)) == bool(recoveries)
        page = write_report(tmp_path, {"run": "r"}, logged).read_text(encoding="utf-8")
        assert ("1 rollback" in page) == bool(recoveries) and "1 resume" in page
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in logged))
        history = History(tmp_path / "events.jsonl")
        history.update()
        assert [mark["kind"] for mark in history.marks if mark["kind"] in ("skip", "rollback")] == recoveries


def test_report_of_a_stop_shows_that_the_resume_failed(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "run"
    options = {"max_steps": 4, "dtype": "fp32", "lora": {"r": 4}, "progress": False}
    with pytest.raises(Stopped):
        strop.train(model=tiny_folder, data=rows_file, out=out, callback=stop, **options)
    error = DivergedError("step 3: the loss is far above", fix="lower the rate")
    with monkeypatch.context() as patch, pytest.raises(DivergedError):
        patch.setattr("strop.training.run.fit", Mock(side_effect=error))
        strop.resume(out, progress=False)
    report, page = json.loads((out / "report.json").read_text()), (out / "report.html").read_text(encoding="utf-8")
    assert (report["ended"], report["exit"], report["error"]["kind"]) == ("error", 1, "DivergedError")
    assert report["steps"] == 2 and not strop.Run(out).finished
    text = "resumed and failed: step 3: the loss is far above. Fix: lower the rate. The adapter is that of step 2."
    assert text in page and "Stopped after step" not in page
    report = strop.resume(out, progress=False).report
    assert report["ended"] == "steps" and "error" not in report and "failed" not in (out / "report.html").read_text()


def test_full_disk_at_the_claim_raises_a_disk_error(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"train.max_steps": 2, "model.dtype": "fp32", "lora.r": 4}
    run = strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / "run"), **options)
    (run.folder / "report.json").unlink()

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "full")  # errors of writes have no file name

    monkeypatch.setattr("strop.runs.folder.write_atomic", full)
    with pytest.raises(DiskError, match="run: cannot be written: No space left"):
        strop.resume(run.folder)


def test_a_finished_run_that_was_copied_names_the_copy(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    options = {"train.max_steps": 2, "model.dtype": "fp32", "lora.r": 4}
    run = strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / "run"), **options)
    copy = shutil.copytree(run.folder, tmp_path / "copy")
    report = strop.resume(copy).report
    assert (report["run"], report["adapter"]) == (str(copy), str(copy / "adapter"))


def test_evaluation_where_time_is_up_does_not_count_on_resume(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, 3.0, 1.0, 2.0, 3.0])  # at steps 3 and 6, and then at steps 1, 3 and 6
    monkeypatch.setattr(SupervisedCriterion, "evaluate", lambda *_: {"loss": next(losses)})
    options = {"train.max_steps": 9, "train.eval_steps": 3, "train.early_stopping": 1, "train.samples": 0}
    options |= {"data.eval": str(rows_file), "model.dtype": "fp32", "lora.r": 4}
    whole = strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / "whole"), **options)
    options["train.max_time"] = "0s"
    run = strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / "run"), **options)
    assert [run.report[name] for name in ("steps", "adapter_step", "eval_loss")] == [1, 1, 1.0]
    run = strop.resume(run.folder, **{"allow_changed": ["train.max_time"], "train.max_time": None})
    for one in (whole, run):
        assert [one.report[name] for name in ("steps", "adapter_step", "eval_loss")] == [6, 3, 2.0]
    weights = [(one.folder / "adapter" / "adapter_model.safetensors").read_bytes() for one in (whole, run)]
    assert weights[0] == weights[1]


def test_cached_answers_are_removed_with_their_adapter(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """A page would show them as those of the new adapter."""
    options = {"train.max_steps": 2, "train.max_time": "0.001s", "model.dtype": "fp32", "lora.r": 4}
    run = strop.train(model=str(tiny_folder), data=str(rows_file), out=str(tmp_path / "run"), **options)
    assert (run.report["ended"], run.report["steps"]) == ("time", 1)
    (run.folder / "answers.json").write_text("{}")
    assert strop.resume(run.folder).report["steps"] == 2
    assert not (run.folder / "answers.json").exists()
