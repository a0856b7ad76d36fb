"""Curves of a run's events: spikes are kept, repeated steps count once, and nothing is read twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import strop
from strop.dash.history import History, extremes, mark_for
from tests.support.dash import lines, session, step


def history(folder: Path, *events: dict[str, object]) -> History:
    (folder / "events.jsonl").write_text(lines(list(events)), encoding="utf-8")
    result = History(folder / "events.jsonl")
    result.update()
    return result


def test_single_step_spike_survives_decimation(tmp_path: Path) -> None:
    events = [step(number, 20_000, loss=2 + math.sin(number) / 10) for number in range(1, 20_001)]
    events[12_344]["loss"], events[7]["loss"] = 9.5, -3.0
    loss = history(tmp_path, *session(), *events).curves(points=100)["series"]["loss"]
    assert len(loss["x"]) <= 202
    points = dict(zip(loss["x"], loss["y"], strict=True))
    assert points[12_345] == 9.5 and points[8] == -3.0
    assert loss["x"][0] == 1 and loss["x"][-1] == 20_000 and loss["x"] == sorted(loss["x"])


def test_extremes_include_minimum_and_maximum_of_each_part() -> None:
    random = np.random.default_rng(0)
    x, y = np.sort(random.random(5000)), random.normal(size=5000)
    chosen = extremes(x, y, 50)
    parts = np.minimum(((x - x[0]) / (x[-1] - x[0]) * 50).astype(int), 49)
    for part in range(50):
        inside = np.flatnonzero(parts == part)
        assert {inside[y[inside].argmin()], inside[y[inside].argmax()]} <= set(chosen.tolist())


def test_metric_of_some_steps_has_all_their_values(tmp_path: Path) -> None:
    steps = [step(number) | ({"kept": number / 10} if number in (2, 3, 7) else {}) for number in range(1, 9)]
    series = history(tmp_path, *session(), *steps).curves()["series"]["kept"]
    assert series["x"] == [2, 3, 7] and series["y"] == pytest.approx([0.2, 0.3, 0.7])


def test_zoom_returns_more_points(tmp_path: Path) -> None:
    result = history(tmp_path, *session(), *(step(number, 5000) for number in range(1, 5001)))
    part = result.curves("step", 100, 1000, 1100)["series"]["loss"]
    assert part["x"] == list(range(1000, 1101))
    assert set(result.curves(fields=("grad_norm",))["series"]) == {"grad_norm"}


def test_update_reads_appended_bytes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = history(tmp_path, *session(), step(1), step(2))
    read: list[int] = []
    taken = result._add_lines
    monkeypatch.setattr(result, "_add_lines", lambda raw: (read.append(len(raw)), taken(raw)))
    assert not result.update() and not read
    more = lines([step(3)])
    with result.path.open("a") as file:
        file.write(more + '{"event": "step", "ti')  # the next line is incomplete
    assert result.update() and read == [len(more)] and list(result.steps) == [1, 2, 3]
    with result.path.open("a") as file:
        file.write(lines([step(4)])[len('{"event": "step", "ti') :])
    assert result.update() and list(result.steps) == [1, 2, 3, 4] and result.generation == 0
    whole = History(result.path)
    whole.update()
    assert whole.curves() == result.curves()


def test_replaced_file_is_read_from_the_start(tmp_path: Path) -> None:
    result = history(tmp_path, *session(), step(1), step(2))
    other = tmp_path / "other"
    other.write_text(lines([*session(), *(step(number, loss=1.0) for number in range(1, 9))]))
    other.replace(result.path)
    assert result.update() and len(result.steps) == 8 and result.generation == 1
    result.path.unlink()
    assert result.update() and not result.steps and result.curves()["rows"] == 0


def test_repeated_steps_count_once(tmp_path: Path) -> None:
    first = [
        *session(),
        *(step(number) for number in range(1, 11)),
        {"event": "eval", "time": 1, "step": 8, "loss": 3.0},
    ]
    back = {"event": "rollback", "time": 1011, "step": 10, "to": 6, "why": "loss 90 is far above", "rate_scale": 0.25}
    again = [step(number, time=1011.0 + number, loss=7.0) for number in range(7, 9)]
    result = history(tmp_path, *first, back, *again)
    series = result.curves()["series"]
    assert list(result.steps) == [1, 2, 3, 4, 5, 6, 7, 8] and series["loss"]["y"][-2:] == [7.0, 7.0]
    assert series["undone"]["x"] == [7, 8, 9, 10] and series["eval_loss"]["x"] == []
    assert result.generation == 1
    [mark] = [mark for mark in result.marks if mark["kind"] == "rollback"]
    assert mark["text"] == "rolled back from step 10 to 6: loss 90 is far above; learning rate times 0.25"


def test_time_axis_excludes_pauses(tmp_path: Path) -> None:
    """The time between two sessions is not counted, and the axis is monotonic if the clock is set back."""
    evening = [*session(1000), *(step(number, time=1000.0 + number) for number in range(1, 6))]
    morning = [*session(50_000, start=4), *(step(number, time=50_000.0 + number - 4) for number in range(5, 8))]
    result = history(tmp_path, *evening, *morning, step(8, time=49_000.0), step(9, time=50_006.0))
    x = result.curves("time")["series"]["loss"]["x"]
    assert x == [1, 2, 3, 4, 5, 6, 7, 7, 10]
    assert result.curves("tokens")["series"]["loss"]["x"] == [100.0 * number for number in range(1, 10)]


def test_last_values_include_the_last_evaluation(tmp_path: Path) -> None:
    events = [step(1), step(2), {"event": "eval", "step": 2, "loss": 3.5}, step(3, loss=0.5)]
    last = history(tmp_path, *session(), *events).curves()["last"]
    assert (last["step"], last["loss"], last["eval_loss"]) == (3, 0.5, 3.5)
    assert "eval_loss" not in history(tmp_path, *session(), *events[:2]).curves()["last"]


def test_epoch_axis_has_the_epoch_starts(tmp_path: Path) -> None:
    result = history(tmp_path, *session(), *(step(number) for number in range(1, 101)))
    assert result.steps_per_epoch == 50
    assert result.curves("epoch")["series"]["loss"]["x"][49] == 1.0


def test_epochs_are_those_of_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    """Not every step is logged, and a row becomes several examples."""
    rows = [{"text": f"{n} of many words " * 20} for n in range(10)]
    options: dict[str, Any] = {"data.overlong": "split", "max_length": 32, "batch_size": 4, "train.log_steps": 7}
    run = strop.train(model=tiny_folder, data=rows, out=tmp_path / "run", epochs=2, **options)
    (result := History(run.folder / "events.jsonl")).update()
    assert run.report["steps"] > 10
    assert result.last["epochs"] == 2 and result.axis("epoch", [run.report["steps"]]) == 2


def test_long_curve_has_the_mean_loss_of_each_part(tmp_path: Path) -> None:
    events = [step(number, 1000, loss=float(number % 10 == 0)) for number in range(1, 1001)]
    series = history(tmp_path, *session(), *events).curves(points=100)["series"]
    assert series["loss_mean"]["y"] == [0.1] * 100 and series["loss_mean"]["steps"] == 10
    assert "loss_mean" not in history(tmp_path, *session(), *events[:200]).curves(points=100)["series"]


def test_samples_of_repeated_steps_are_replaced(tmp_path: Path) -> None:
    def sampled(number: int, completion: object) -> dict[str, Any]:
        return {"event": "samples", "step": number, "samples": [{"prompt": "p", "completion": completion}]}

    steps = [step(number) for number in range(1, 5)]
    events = [*steps[:2], sampled(2, "a"), *steps[2:], sampled(4, "b" * 9000), *session(start=2), steps[2]]
    result = history(tmp_path, *session(), *events)
    assert result.samples == {2: [{"prompt": "p", "reference": "", "completion": "a"}]}
    assert not [mark for mark in result.marks if mark["kind"] == "samples"]
    result = history(tmp_path, *session(), *events[:6], sampled(2, "new"), sampled(5, None), sampled(6, 7))
    assert list(result.samples) == [4, 2, 5, 6] and len(result.samples[4][0]["completion"]) == 4000
    odd = [{"event": "samples", "step": 3, "samples": value} for value in (None, "text", [3], {"a": 1})]
    assert history(tmp_path, *session(), *odd, sampled(4, "c")).samples.keys() == {4}


def test_sampled_answers_are_shown_with_their_reward_and_are_no_events(tmp_path: Path) -> None:
    answers = {"event": "answers", "step": 1, "prompt": "p", "answer": "a", "reward": 0.0, "rewards": [0.0, 1.0]}
    cut = {"event": "samples", "step": 2, "samples": [{"prompt": "p", "completion": "c", "cut": True}] * 2}
    result = history(tmp_path, *session(), answers, step(1), step(2), cut)
    assert result.samples[1] == [{"prompt": "p", "reference": "", "completion": "a", "reward": 0}]
    assert result.curves()["series"]
    assert result.samples[2][0]["cut"] and not [mark for mark in result.marks if mark["kind"] == "answers"]


def test_samples_of_evaluations_are_kept_longer_than_answers_of_steps(tmp_path: Path) -> None:
    events = [{"event": "answers", "step": number, "answer": "a"} for number in range(1, 120)]
    events.insert(1, {"event": "samples", "step": 1, "samples": [{"prompt": "p", "completion": "c"}] * 2})
    samples = history(tmp_path, *session(), *events).samples
    assert len(samples) == 100 and list(samples)[:2] == [1, 21] and len(samples[1]) == 2


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    odd = [
        "not json", "[1, 2]", "null", '{"event": "step"}', '{"event": "step", "step": "7", "loss": 1}', "\ufffd",
        '{"event": "step", "time": 5, "step": 2, "loss": null, "grad_norm": "x", "tokens": true}',
        '{"event": "eval", "step": 2, "loss": "low"}', '{"event": ["a"], "step": {}}', "[" * 5000,
    ]  # fmt: skip
    file.write_bytes(b"\xff\xfe\n" + lines([*session(), step(1)]).encode() + "\n".join([*odd, ""]).encode())
    result = History(file)
    result.update()
    assert list(result.steps) == [1, 2]
    assert json.dumps(result.curves(), allow_nan=False)
    assert result.curves()["series"]["loss"]["x"] == [1]


def test_number_of_marks_is_limited(tmp_path: Path) -> None:
    saves = [{"event": "save", "time": 1, "step": number, "checkpoint": f"step-{number:06d}"} for number in range(400)]
    notes = [{"event": "note", "time": 1, "text": "x"} for _ in range(6000)]
    result = history(tmp_path, *session(), *saves, *notes)
    kinds = [mark["kind"] for mark in result.marks]
    assert kinds.count("save") == 200 and len(kinds) == 5000 and result.marks_left_out == 6000 + 201 - 5000


def test_text_of_a_reference_check() -> None:
    event = {"event": "reference-check", "step": 0, "off": 1.5e-7, "loss": 0.5}
    mark = mark_for(event)
    assert mark is not None and mark["text"] == "reference unchanged, log-probabilities differ by 1.5e-07 at most"
    mark = mark_for({"event": "reference", "rows": 1234, "seconds": 0.1})
    assert mark is not None and mark["text"] == "log-probabilities of the reference: 1,234 rows computed"


def test_memory_mark_text() -> None:
    tried = {"event": "rehearsal", "predicted_bytes": 3 << 29, "usable_bytes": 4 << 30, "done": True, "tokens": 9}
    assert _result(tried) == "1.50 GiB predicted, 4.0 GiB usable at that time: dry run of the largest micro-batch"
    assert "skipped" in _result({**tried, "done": False})
    assert _result({"event": "shrink", "step": 2, "to": "smaller pieces", "why": "no memory"}) == (
        "out of memory at step 2; now smaller pieces: no memory"
    )


def _result(event: dict[str, Any]) -> str:
    mark = mark_for(event)
    assert mark is not None
    return str(mark["text"])
