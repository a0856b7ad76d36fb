"""All actions of the page by clicks on the demo data, from inspecting the data to deleting a run."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from strop.demo import data_files
from tests.support.browser import at, open_tab
from tests.support.dash import run_dash

LONG = 180_000  # a child process imports torch and may compile, on a busy machine

FURTHER = (
    "(was) => +(document.querySelector('.progress')?.textContent.replace(/,/g, '').match(/[0-9]+/) ?? [0])[0] > was"
)


def test_the_whole_story_by_clicks(browser: Any, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "tiny-model")
    for file, name, number in zip(data_files(), ("rows.jsonl", "held-out.jsonl"), (24, 8), strict=True):
        some = file.read_text(encoding="utf-8").splitlines(keepends=True)[:number]
        (tmp_path / name).write_text("".join(some), encoding="utf-8")
    with run_dash(Path("runs"), tmp_path) as dash, open_tab(browser, dash) as tab:
        page = tab.page
        page.set_default_timeout(LONG)

        def press(name: str) -> None:
            page.get_by_role("button", name=name, exact=True).first.click()

        def follow(name: str) -> None:
            page.get_by_role("link", name=name, exact=True).first.click()

        def choose(label: str, entry: str) -> None:
            press(f"Choose: {label}")
            page.locator("dialog").get_by_role("button", name=entry, exact=True).click()

        page.goto(at(dash, "/runs"))
        page.wait_for_selector("text=No runs yet")
        follow("Data")
        choose("Rows", "rows.jsonl")
        choose("Model", "tiny-model")
        page.wait_for_selector(".tokens .stop >> nth=2")
        follow("Plan a run with this data")
        page.wait_for_selector("text=It fits")
        choose("Evaluation rows", "held-out.jsonl")
        page.get_by_label("Rank", exact=True).focus()
        page.keyboard.press("ArrowLeft")  # 16 to 8
        page.wait_for_selector("code:text('--lora.r=8')")
        page.get_by_label("Epochs").fill("3000")
        page.keyboard.press("Enter")
        page.get_by_label("Run name").fill("first")
        page.wait_for_selector("code:text('--out=runs/first')")
        press("Start")
        page.wait_for_selector("h1:text('first')")
        page.wait_for_selector(".plot >> nth=0 >> canvas")  # the loss falls
        press("Stop and save")
        page.wait_for_selector(".state.stopped")
        step = page.locator(".progress").text_content()
        page.reload()  # the page restores its state from the folder
        page.wait_for_selector(".plot canvas")
        assert page.locator(".progress").text_content() == step and "of 15,000" in step
        press("Resume")
        page.wait_for_selector(".state.running")
        follow("Training")
        page.wait_for_function(FURTHER, arg=int(re.findall(r"\d+", step.replace(",", ""))[0]))
        page.wait_for_selector("text=resumed from step")
        press("Stop and save")
        page.wait_for_selector(".state.stopped")

        press("Duplicate")
        page.wait_for_selector("text=It fits")
        page.get_by_label("Epochs").fill("2")
        page.keyboard.press("Enter")
        page.get_by_label("Run name").fill("second")
        page.wait_for_selector("code:text('--out=runs/second')")
        assert page.get_by_label("Rank", exact=True).input_value() == "3"  # 2 to the power of 3
        press("Start")
        page.wait_for_selector("h1:text('second')")
        page.wait_for_selector(".state.finished")

        follow("Answers")
        page.get_by_label("File of held-out rows", exact=True).fill("held-out.jsonl")
        page.get_by_label("Maximum answer length in tokens").fill("6")
        press("Evaluate")
        page.wait_for_selector(".sample >> nth=7")
        follow("Vote blind")
        page.wait_for_selector(".vote article")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("[role=status]:has-text('1')")

        follow("Export")
        press("Export: Merged model")
        page.wait_for_selector("text=The export matches the tuned model.")
        assert list((tmp_path / "runs" / "second" / "merged").glob("*.safetensors"))
        press("Export: GGUF file")
        measured = (
            ":is(.verdict, .soft):text-matches('^(The export matches the tuned model|Parity was not measured: .)')"
        )
        page.wait_for_selector(f"{measured} >> nth=1")  # not measured where llama.cpp is not installed
        press("Export: Ollama")
        page.wait_for_selector(f"{measured} >> nth=2")
        page.wait_for_selector("code:text('ollama create')")
        assert (tmp_path / "runs" / "second" / "ollama" / "Modelfile").is_file()

        follow("Chat")
        press("Start")
        page.get_by_label("Your message").fill("what is 2")
        page.keyboard.press("Enter")
        page.wait_for_function("() => [...document.querySelectorAll('.chat')].length === 2")
        page.wait_for_selector("button:text-is('Send')")
        answers = page.locator(".chat p:nth-child(2)").all_text_contents()
        assert len(answers) == 2 and all(answers)
        press("Unload the model")
        page.wait_for_selector("text=No model is loaded")

        follow("Runs")
        page.get_by_label("Compare first").check()
        page.get_by_label("Compare second").check()
        press("Compare 2")
        page.wait_for_selector("code:text('train.epochs')")
        page.goto(dash.url + "/#/run/second")
        press("Edit")
        page.get_by_label("Name", exact=True).fill("third")
        page.get_by_label("Tags").fill("best")
        press("Save")
        page.wait_for_selector("h1:text('third')")
        follow("Answers")
        page.wait_for_selector(".sample >> nth=7")
        follow("Export")
        with page.expect_download() as saved:
            page.get_by_role("button", name="Adapter (zip").click()
        assert "adapter/adapter_model.safetensors" in zipfile.ZipFile(saved.value.path()).namelist()
        page.wait_for_selector("text=The export matches the tuned model.")  # the jobs have the new name
        page.goto(dash.url + "/#/run/first")
        press("Delete")
        page.get_by_label("Type the run's name").fill("first")
        press("Delete run")
        page.wait_for_selector("h1:text('Runs')")
        page.wait_for_function("() => document.querySelectorAll('tbody tr').length === 1")
        assert not (tmp_path / "runs" / "first").exists() and (tmp_path / "runs" / "third").is_dir()
        tab.check("the story")
