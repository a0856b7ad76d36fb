"""Runs in a real browser: the table, a run from its preparation to its end, exports and comparisons."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.dash.test_page import NEW, facts_of, hold, open_at, sleeping
from tests.support.browser import DESK, PHONE, at, open_tab
from tests.support.dash import Dash, evaluated, make_run, run_dash, sample, session, step


def make_job(root: Path, kind: str, pid: int, result: Any = None, log: str = "", run: str = "one") -> str:
    """Create a job of a run, which runs as long as the process `pid`."""
    try:
        born = psutil.Process(pid).create_time()
    except psutil.Error:
        born = 1.0
    name = f"20261201-120000-{kind}-123456"
    folder = root / ".dash" / "jobs" / name
    folder.mkdir(parents=True)
    words = ["train", "--model.name=models/tiny", "--data.train=a.jsonl", "--data.train=b.jsonl"]
    job = {"id": name, "kind": kind, "run": run, "words": words, "started": time.time(), "pid": pid, "born": born}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    (folder / "out").write_text(json.dumps(result) if result else "", encoding="utf-8")
    (folder / "log").write_text(log, encoding="utf-8")
    return name


def claim(folder: Path, pid: int) -> Path:
    """Let a process own a run."""
    file = folder / "claim.json"
    file.write_text(json.dumps({"pid": pid, "started": psutil.Process(pid).create_time()}), encoding="utf-8")
    return file


def test_short_curve_is_not_smoothed(browser: Any, tmp_path: Path) -> None:
    for name, steps in (("short", 14), ("long", 30)):
        make_run(tmp_path, name, [*session(), *(step(n, loss=3 * 0.5**n) for n in range(1, steps + 1))])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/short", ".plot canvas")
        assert tab.page.locator(".legend .entry:visible").first.inner_text() == "training 1.831e-4".replace(
            "1e-4", "e-4"
        )
        assert not tab.page.get_by_label("Smoothing").is_visible()
        open_at(tab, own, "/run/long", ".plot canvas")
        entries = tab.page.locator(".plot").first.locator(".entry:visible").all_inner_texts()
        assert [text.rpartition(" ")[0] for text in entries] == ["training, each step", "training, smoothed"]
        assert tab.page.get_by_label("Smoothing").is_visible()


def test_run_that_prepares_shows_its_model_and_no_empty_curve(browser: Any, tmp_path: Path) -> None:
    with sleeping() as process, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        make_job(tmp_path, "train", process.pid)
        open_at(tab, own, "/runs", "tbody .state.running")
        assert tab.page.locator("td[data-name=model]").inner_text() == "tiny"
        assert tab.page.locator("td[data-name=data]").inner_text() == "a.jsonl, b.jsonl"
        assert tab.page.locator("td[data-name=steps]").inner_text() == ""
        open_at(tab, own, "/run/one", "text=Preparing the model and the rows.")
        assert not tab.page.locator(".plot").first.is_visible() and not tab.page.get_by_label("Smoothing").is_visible()
        tab.check("a run that prepares")


def test_run_that_prepares_is_stopped(browser: Any, tmp_path: Path) -> None:
    with sleeping() as process, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        make_job(tmp_path, "train", process.pid)
        open_at(tab, own, "/run/one", "text=Preparing the model and the rows.")
        tab.page.get_by_role("button", name="Stop and save").click()
        tab.page.wait_for_selector("#notice:has-text('stopped before its first step')")
        tab.page.wait_for_selector("h1:text-is('Runs')")
        assert process.wait(10) and own.get("/api/jobs").json()["jobs"][0]["state"] == "stopped"
        assert own.get("/api/runs").json()["runs"] == []
        tab.check("stopped")


@pytest.mark.parametrize("is_claimed", [False, True])
def test_resumed_run_that_prepares_shows_no_time_left_and_is_stopped(
    browser: Any, tmp_path: Path, is_claimed: bool
) -> None:
    stop = {"event": "stop", "time": 1, "step": 7, "why": "signal"}
    steps = [step(n, 150, seconds_left=4860.0) for n in range(1, 8)]
    folder = make_run(tmp_path, "one", [*session(), *steps, stop])
    with sleeping() as process, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        os.utime(folder / "events.jsonl", (1000, 1000))
        make_job(tmp_path, "resume", process.pid)
        if is_claimed:
            claim(folder, process.pid)
        open_at(tab, own, "/runs", "tbody .state.running")
        assert tab.page.locator("td[data-name=steps]").inner_text() == "7 / 150"
        open_at(tab, own, "/run/one", "text=Preparing to continue after step 7 of 150")
        assert " left" not in tab.page.locator(".progress").inner_text()
        tab.check("resumed")
        tab.page.get_by_role("button", name="Stop and save").click()
        tab.page.wait_for_selector(".state.stopped")
        assert process.wait(10)


def wait_of(activity: str, seconds: int = 12) -> str:
    """Return the line of a command's output for an activity that lasts."""
    return f"step     3  loss 1.0\nstill    {activity} ({seconds} s)\n"


def test_time_left_is_counted_and_shown_only_while_it_is_known(browser: Any, tmp_path: Path) -> None:
    compiling = "compiling CPU kernels for generating text in bfloat16, once on this machine; may take minutes"
    now = time.time()
    events = [*session(now), *(step(n, 40, time=now, seconds_left=900.0) for n in range(1, 4))]
    folder = make_run(tmp_path, "one", events)
    with sleeping() as process, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        claim(folder, process.pid)
        name = make_job(tmp_path, "train", process.pid)
        log = tmp_path / ".dash" / "jobs" / name / "log"
        open_at(tab, own, "/run/one", ".progress .clock:text-matches('min .*left, until about')")
        first = tab.page.locator(".progress .clock:has-text('left')").inner_text()
        tab.page.wait_for_function(  # without a new event
            "(first) => ![...document.querySelectorAll('.progress .clock')].some((one) => one.innerText === first)",
            arg=first,
        )
        open_at(tab, own, "/runs", "td[data-name=steps] .clock:has-text('left')")
        log.write_text(wait_of(compiling), encoding="utf-8")
        open_at(tab, own, "/run/one", f".progress:has-text('{compiling} (1')")
        assert " left" not in tab.page.locator(".progress").inner_text()
        shown = tab.page.locator(".progress").inner_text()
        tab.page.wait_for_function(
            "(shown) => document.querySelector('.progress').innerText !== shown && "
            "/minutes \\([0-9]+ s\\)/.test(document.querySelector('.progress').innerText)",
            arg=shown,
        )
        log.write_text(wait_of("computing step 4"), encoding="utf-8")
        tab.page.wait_for_selector(".progress .clock:has-text('left')")
        tab.check("time left")
        with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(step(40, 40, time=time.time(), seconds_left=381.0)) + "\n")
        log.write_text("step     40  loss 1.0\n", encoding="utf-8")
        tab.page.wait_for_selector(".progress:has-text('Step 40 of 40'):has-text('saving')")
        assert " left" not in tab.page.locator(".progress").inner_text()


def test_run_that_stops_shows_no_time_left(browser: Any, tmp_path: Path) -> None:
    now = time.time()
    events = [*session(now), *(step(n, 40, time=now, seconds_left=900.0) for n in range(1, 4))]
    folder = make_run(tmp_path, "one", events)
    slow = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); print(1, flush=True); time.sleep(600)"
    with (
        subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE) as process,
        run_dash(tmp_path) as own,
        open_tab(browser, own) as tab,
    ):
        assert process.stdout is not None and process.stdout.readline()
        claim(folder, process.pid)
        make_job(tmp_path, "train", process.pid)
        open_at(tab, own, "/run/one", ".progress .clock:has-text('left')")
        tab.page.get_by_role("button", name="Stop and save").click()
        for _ in range(2):
            tab.page.wait_for_selector(".progress:has-text('stopping: the step is finished and saved first')")
            assert " left" not in tab.page.locator(".progress").inner_text()
            assert tab.page.get_by_role("button", name="Stopping…").is_disabled()
            tab.page.reload()
        process.kill()


def test_resumed_run_that_loads_offers_its_adapter_and_says_when_it_changes(browser: Any, tmp_path: Path) -> None:
    stop = {"event": "stop", "time": 1, "step": 2, "why": "signal"}
    folder = make_run(tmp_path, "one", [*session(), step(1), step(2), stop], {"exit": 6})
    (folder / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter" / name).write_text("{}", encoding="utf-8")
    with sleeping() as process, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        os.utime(folder / "events.jsonl", (1000, 1000))
        make_job(tmp_path, "resume", process.pid)
        for part in ("answers", "export"):
            open_at(tab, own, f"/run/one/{part}", "text=Its adapter is still the one from before.")
            assert "no adapter yet" not in tab.page.locator("main").inner_text()
        assert tab.page.get_by_role("button", name="Adapter (zip").is_visible()
        tab.check("resumed, export")


def test_check_of_a_file_says_what_it_waits_for(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        held = hold(tab, "data")
        tab.page.goto(at(dash, f"/data?options={NEW}"))
        tab.page.wait_for_selector("text=The first check also starts Python's libraries and loads the tokenizer.")
        tab.page.wait_for_selector(".empty:text-matches('Reading the rows… .[1-9]')")
        tab.check("first check")
        held.pop().continue_()
        tab.page.wait_for_selector(".tokens .stop")


def test_process_is_shown_only_while_a_run_has_one(browser: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one", [*session(), *(step(n, 4, seconds_left=4.0 - n) for n in range(1, 5))])
    with sleeping() as process, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        owner = claim(folder, process.pid)
        open_at(tab, own, "/runs", "tbody .state.running")
        assert tab.page.locator("td[data-name=steps]").inner_text() == "4 / 4"  # not "0.0 s left"
        open_at(tab, own, "/run/one", f"text=The run's process ({process.pid}) uses")
        assert facts_of(tab)["training time"] == "4.0 s"
        owner.unlink()
        tab.page.wait_for_selector(".state.crashed")
        assert "The run's process" not in tab.page.locator("main").inner_text()


def test_colours_of_compared_runs_do_not_depend_on_their_order(browser: Any, tmp_path: Path) -> None:
    names = ["one", "two", "three", "four"]
    for name in names:
        make_run(tmp_path, name, [*session(), step(1), step(2)])
    colours = []
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        for order in (names, names[::-1]):
            open_at(tab, own, f"/compare?runs={','.join(order)}", ".plot canvas")
            entries = tab.page.locator(".plot >> nth=1 >> .entry").all()
            found = {entry.inner_text().split()[0]: entry.locator("i").get_attribute("style") for entry in entries}
            assert len(set(found.values())) == len(names)
            colours.append(found)
            tab.page.goto("about:blank")
    assert colours[0] == colours[1]


def test_comparison_leads_to_the_evaluation_of_runs_without_a_score(browser: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path, name, [*session(), step(1), step(2)])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/compare?runs=one,two", ".plot canvas")
        text = tab.page.locator("main").inner_text()
        assert text.count("Not comparable") == 1 and "cannot be compared" not in text
        assert tab.page.get_by_role("link", name="Evaluate two").is_visible()
        tab.page.get_by_role("link", name="Evaluate one").click()
        tab.page.wait_for_selector(".tabs [aria-current]:text-is('Answers')")


def test_comparison_fills_in_the_evaluation_of_the_other_run(browser: Any, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        folder = make_run(tmp_path, name, [*session(), step(1), step(2)], {"exit": 0})
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    answers = {"max_tokens": 12, "tuned_cut": 0}
    evaluated(tmp_path / "two", [sample(n, False, True) for n in range(3)], answers=answers, metric="contains")
    with sleeping() as process, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        make_job(tmp_path, "evaluate", process.pid, run="three")
        open_at(tab, own, "/compare?runs=one,two,three", ".plot canvas")
        assert tab.page.get_by_role("link", name="three is being evaluated").is_visible()
        assert tab.page.get_by_role("link", name="Evaluate three").count() == 0
        tab.page.get_by_role("link", name="Evaluate one").click()
        for _ in range(2):
            tab.page.wait_for_selector("[data-option=metric]")
            assert tab.page.get_by_label("File of held-out rows", exact=True).input_value() == "held.jsonl"
            assert tab.page.get_by_label("Metric").input_value() == "contains"
            assert tab.page.get_by_label("Maximum answer length in tokens").input_value() == "12"
            tab.page.reload()
        tab.check("evaluate")


def test_run_is_renamed_while_its_process_ends(tmp_path: Path) -> None:
    make_run(tmp_path, "one", [*session(), step(1), {"event": "stop", "time": 1, "step": 1, "why": "signal"}])
    with sleeping() as process, run_dash(tmp_path) as own:
        make_job(tmp_path, "train", process.pid)
        assert own.get("/api/jobs?run=one").json()["jobs"][0]["state"] == "running"
        answer = own.post("/api/runs/one/notes", {"note": "", "tags": [], "to": "two"})
        assert answer.status_code == 200, answer.text
        assert own.get("/api/runs/two").json()["state"] == "stopped"


def test_gguf_file_is_downloaded(browser: Any, dash: Dash, dashboard: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.gguf"
    file.write_bytes(b"GGUF of a test")
    with open_tab(browser, dash) as tab:
        name = make_job(dashboard / "runs", "gguf", 2**22 - 3, {"out": str(file), "not_measured": "not measured"})
        open_at(tab, dash, "/run/one/export", ".job")
        with tab.page.expect_download() as saved:
            tab.page.get_by_role("button", name="Download the GGUF file").click()
        assert saved.value.suggested_filename == "tuned.gguf"
        assert Path(saved.value.path()).read_bytes() == b"GGUF of a test"
    shutil.rmtree(dashboard / "runs" / ".dash" / "jobs" / name)


def test_gguf_file_is_downloaded_after_the_run_is_renamed(browser: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", "one", [*session(), step(1), step(2)], {"exit": 0})
    (folder / "one.gguf").write_bytes(b"GGUF of a test")
    commands = ["ollama create one -f runs/one/ollama/Modelfile", "ollama run one"]
    result = {"out": "runs/one/one.gguf", "not_measured": "not measured", "commands": commands}
    make_job(tmp_path / "runs", "gguf", 2**22 - 3, result)
    with run_dash(Path("runs"), tmp_path) as own, open_tab(browser, own) as tab:
        assert own.post("/api/runs/one/notes", {"note": "", "tags": [], "to": "a new name"}).status_code == 200
        open_at(tab, own, "/run/a%20new%20name/export", ".job")
        tab.page.wait_for_selector("code:text-is('runs/a new name/one.gguf')")
        tab.page.wait_for_selector("code:text-is(\"ollama create one -f 'runs/a new name/ollama/Modelfile'\")")
        with tab.page.expect_download() as saved:
            tab.page.get_by_role("button", name="Download the GGUF file").click()
        assert Path(saved.value.path()).read_bytes() == b"GGUF of a test"
        tab.check("renamed")
        (tmp_path / "runs" / "a new name" / "one.gguf").unlink()
        tab.page.get_by_role("button", name="Download the GGUF file").click()
        tab.page.wait_for_selector(".job [role=alert]:has-text('runs/a new name/one.gguf: no such file')")


def test_wait_of_a_job_and_of_the_chat_is_counted(browser: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one", [*session(), step(1), step(2)], {"exit": 0})
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    waiting = "waiting for another program that compiles CPU kernels, once on this machine; may take minutes"
    counted = f"text=/{waiting} .(2[1-9]|[3-9][0-9]) s/"
    with sleeping() as process, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        for kind in ("merge", "serve"):
            make_job(tmp_path, kind, process.pid, log=wait_of(waiting, 20))
        open_at(tab, own, "/run/one/export", ".job")
        tab.page.wait_for_selector(counted)
        open_at(tab, own, "/chat", ".state.running")
        tab.page.wait_for_selector(counted)
        tab.check("waits")


def test_job_that_measures_after_its_last_part_shows_no_full_bar(
    browser: Any, tmp_path: Path, dash: Dash, dashboard: Path
) -> None:
    with sleeping() as process, open_tab(browser, dash) as tab:
        name = make_job(dashboard / "runs", "merge", process.pid, log="still    merging: shard 1 of 2\n")
        open_at(tab, dash, "/run/one/export", ".job .bar")
        (dashboard / "runs" / ".dash" / "jobs" / name / "log").write_text(
            "still    merging: shard 2 of 2\n", encoding="utf-8"
        )
        tab.page.wait_for_selector(".job:has-text('shard 2 of 2')")
        assert tab.page.locator(".job .bar").count() == 0
    shutil.rmtree(dashboard / "runs" / ".dash" / "jobs" / name)


@pytest.mark.parametrize("size", [DESK, PHONE])
def test_tags_and_large_links_are_shown_at_every_width(browser: Any, tmp_path: Path, size: Any) -> None:
    folder = make_run(tmp_path, "one", [*session(), step(1), step(2)])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        own.post(f"/api/runs/{folder.name}/notes", {"note": "", "tags": ["first", "second"]})
        tab.page.set_viewport_size(size)
        open_at(tab, own, "/runs", "tbody .state")
        assert [tag.is_visible() for tag in tab.page.locator("tbody .tag").all()] == [True, True]
        boxes = [link.bounding_box() for link in tab.page.locator("#nav a").all()]
        assert all(box["height"] >= 30 for box in boxes)
        tab.check("tags")
